"""Score predicted instance maps with this project's AP, beside the score of the tool's own function.

python benchmarks/segmenters/score.py TEST_FOLDER OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.files import find_files, read_mask
from evaluation.instances import AP_THRESHOLDS, InstanceCounts, mean_of_known, touching_cells


def main(test: Path, output: Path) -> dict:
    """AP over the cells of all images and as the mean of the images, touching cells, PQ; the tool's own AP."""
    everything, touching, single = InstanceCounts(), InstanceCounts(), []
    predicted = find_files(output / "predicted", "instance labels")
    for name, path in find_files(test / "instances", "instance labels").items():
        truth, found = read_mask(path), read_mask(predicted[name])
        one = InstanceCounts()
        one.add(found, truth)
        single.append(one)
        everything.add(found, truth)
        touching.add(*touching_cells(found, truth))
    own = json.loads((output / "own_scores.json").read_text())
    scores = {
        "ap": {str(value): everything.ap(value) for value in AP_THRESHOLDS},
        "ap_mean_of_images": {str(value): mean_of_known([one.ap(value) for one in single]) for value in AP_THRESHOLDS},
        "ap50_touching": touching.ap(0.5),
        "pq": everything.pq,
        f"ap_by_{own['tool']}" + ("" if own["pooled"] else "_mean_of_images"): own["ap"],
    }
    (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2])), indent=2))
