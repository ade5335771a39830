"""Self-training for StarDist: the real images of a training set, and unlabelled images with what StarDist finds there.

    python benchmarks/segmenters/self_train_stardist.py TRAINED REAL UNLABELLED OUTPUT

TRAINED is the output of train_stardist.py on REAL. UNLABELLED holds images. OUTPUT becomes a training set.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from folders import add_stretch, unit_gray
from PIL import Image
from stardist.models import StarDist2D

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("trained", type=Path, help="output of train_stardist.py on the real images")
parser.add_argument("real", type=Path, help="training set of the real images")
parser.add_argument("unlabelled", type=Path, help="folder of images")
parser.add_argument("output", type=Path, help="new training set")
parser.add_argument("--images", type=int, default=200, help="random unlabelled images to label (200)")
parser.add_argument("--seed", type=int, default=0, help="of the choice")
add_stretch(parser)
args = parser.parse_args()
for kind in ("images", "instances"):
    shutil.copytree(args.real / kind, args.output / kind)
paths = sorted(args.unlabelled.iterdir())
chosen = np.random.default_rng(args.seed).permutation(len(paths))[: args.images]
model = StarDist2D(None, name="model", basedir=str(args.trained))
for path in (paths[index] for index in sorted(chosen)):
    image = unit_gray(np.array(Image.open(path).convert("RGB")), args.stretch).clip(0, 1)
    cells, _ = model.predict_instances(image)
    if cells.any():
        Image.fromarray(np.rint(255 * image).astype(np.uint8)).save(args.output / "images" / f"{path.stem}.png")
        Image.fromarray(cells.astype(np.uint16)).save(args.output / "instances" / f"{path.stem}.png")
