"""Do synthetic images help a segmenter: splits of the labels, the practice loop, and the comparison of all arms."""
