"""StarDist 2D from scratch: trained, thresholds chosen on the training images, test images predicted."""

from __future__ import annotations

import json

import numpy as np
import tensorflow as tf
from folders import half_real, parser_of, read_folder, unit_gray, write_prediction
from stardist.matching import matching_dataset
from stardist.models import Config2D, StarDist2D
from strong import augment

EPOCH = 100  # steps
DRAWN = 1000  # list entries, so that each image gets its share
VALIDATION = 256  # pixels: side of the parts of real images that choose the thresholds
parser = parser_of(__doc__)
parser.add_argument("--strong", action="store_true", help="augment as evaluate.py utility does")
args = parser.parse_args()
rng = np.random.default_rng(args.seed)
tf.keras.utils.set_random_seed(args.seed)
names, images, labels = read_folder(args.train)
images = [unit_gray(image, stretch=False) for image in images]  # stretched already: a dark synthetic crop stays dark
# a list in which each image stands as often as it is to be drawn: StarDist draws all alike
chosen = rng.choice(len(names), max(DRAWN, 4 * len(names)), p=half_real(names))
real = [index for index, name in enumerate(names) if name.startswith("real_")]
epochs = max(1, args.steps // EPOCH)
config = Config2D(
    n_rays=32, grid=(2, 2), n_channel_in=3, train_patch_size=(64, 64), train_batch_size=8, train_epochs=epochs,
    train_steps_per_epoch=EPOCH, train_tensorboard=False,
)  # fmt: skip
model = StarDist2D(config, name="model", basedir=str(args.output))


def turned(image: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flips, quarter turns, brightness and noise, as in StarDist's own example."""
    turns, flip = int(rng.integers(4)), rng.integers(2)
    image, cells = (np.rot90(one, turns, (0, 1)) for one in (image, cells))
    if flip:
        image, cells = image[:, ::-1], cells[:, ::-1]
    image = image * rng.uniform(0.6, 2) + rng.uniform(-0.2, 0.2)
    return image + rng.normal(0, 0.02 * rng.uniform(0, 1), image.shape), cells


def changed(image: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The augmentation that was asked for."""
    return augment(image, cells, rng) if args.strong else turned(image, cells)


def middle(array: np.ndarray) -> np.ndarray:
    """At most VALIDATION pixels of a side, from the middle."""
    rows, columns = (slice(max(0, (n - VALIDATION) // 2), (n + VALIDATION) // 2) for n in array.shape[:2])
    return array[rows, columns]


validation = ([middle(images[index]) for index in real], [middle(labels[index]) for index in real])
model.train([images[i] for i in chosen], [labels[i] for i in chosen], validation_data=validation, augmenter=changed)
model.optimize_thresholds(*validation)
test_names, test_images, test_labels = read_folder(args.test)
found = []
for name, image in zip(test_names, test_images, strict=True):
    cells, _ = model.predict_instances(unit_gray(image, args.stretch))
    write_prediction(args.output, name, cells)
    found.append(cells)
own = {
    str(t): float(matching_dataset(test_labels, found, thresh=t, show_progress=False).accuracy)
    for t in (0.5, 0.75, 0.9)
}
(args.output / "own_scores.json").write_text(json.dumps({"tool": "stardist", "pooled": True, "ap": own}))
