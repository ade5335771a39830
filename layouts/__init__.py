"""New masks: simulated nuclei, or the cells of given masks in new layouts."""
