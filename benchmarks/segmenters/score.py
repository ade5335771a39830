"""Score predicted instance maps with this project's AP, beside the score of the tool's own function.

    python benchmarks/segmenters/score.py TEST_FOLDER OUTPUT
    python benchmarks/segmenters/score.py TEST_FOLDER OUTPUT DATA/nuclei/index.csv modality

The second form also gives the AP at IoU 0.5 of each group; the table has the columns ``name`` and ``modality``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.files import find_files, read_mask
from dataset.groups import read_groups
from evaluation.instances import AP_THRESHOLDS, InstanceCounts, mean_of_known, touching_cells

TEST_PREFIX = "test__"  # of the test images of evaluate.py split


def main(test: Path, output: Path, groups: Mapping[str, str] | None = None) -> dict:
    """AP over the cells of all images and as the mean of the images, touching cells, PQ; the tool's own AP."""
    everything, touching, single = InstanceCounts(), InstanceCounts(), []
    grouped: dict[str, InstanceCounts] = {}
    predicted = find_files(output / "predicted", "instance labels")
    for name, path in find_files(test / "instances", "instance labels").items():
        truth, found = read_mask(path), read_mask(predicted[name])
        one = InstanceCounts()
        one.add(found, truth)
        single.append(one)
        everything.add(found, truth)
        touching.add(*touching_cells(found, truth))
        if groups:
            grouped.setdefault(groups[name.removeprefix(TEST_PREFIX)], InstanceCounts()).add(found, truth)
    own = json.loads((output / "own_scores.json").read_text())
    scores = {
        "ap": {str(value): everything.ap(value) for value in AP_THRESHOLDS},
        "ap_mean_of_images": {str(value): mean_of_known([one.ap(value) for one in single]) for value in AP_THRESHOLDS},
        "ap50_touching": touching.ap(0.5),
        "pq": everything.pq,
        "ap50_of_groups": {group: counts.ap(0.5) for group, counts in sorted(grouped.items())},
        f"ap_by_{own['tool']}" + ("" if own["pooled"] else "_mean_of_images"): own["ap"],
    }
    (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


if __name__ == "__main__":
    test, output, *table = sys.argv[1:]
    print(
        json.dumps(main(Path(test), Path(output), read_groups(Path(table[0]), table[1]) if table else None), indent=2)
    )
