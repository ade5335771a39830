"""Cellpose from scratch (version 3, no pretrained weights): trained, then test images predicted."""

from __future__ import annotations

import json

import numpy as np
import torch
from cellpose import metrics, models, train
from folders import half_real, parser_of, read_folder, unit_gray, write_prediction

BATCH, EPOCH = 8, 80  # images
TILE = 112  # pixels: side of the training squares; a crop of 64 px with small nuclei is enlarged to about this size
parser = parser_of(__doc__)
parser.add_argument("--bf16", action="store_true", help="compute the network in bfloat16 (CPUs with units for it)")
args = parser.parse_args()
np.random.seed(args.seed)
torch.manual_seed(args.seed)
names, images, labels = read_folder(args.train)
with_cells = [index for index, one in enumerate(labels) if one.max() > 0]
args.output.mkdir(parents=True, exist_ok=True)
epoch = min(EPOCH, BATCH * args.steps)
model = models.CellposeModel(gpu=torch.cuda.is_available(), pretrained_model=False)
model.net.mkldnn = model.net.mkldnn and not args.bf16  # its own conversion of arrays knows no bfloat16
forward = model.net.forward


def in_chosen_precision(data: torch.Tensor) -> tuple:
    """The network's outputs: flows and style as float32, and its features."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        flows, style, *features = forward(data)
    return flows.float(), style.float(), *features


model.net.forward = in_chosen_precision
# as in train_stardist.py: sets are stretched already, and a dark synthetic crop stays dark
train.train_seg(
    model.net,
    train_data=[unit_gray(images[index], stretch=False) for index in with_cells],
    train_labels=[labels[index] for index in with_cells],
    train_probs=half_real([names[index] for index in with_cells]),
    channels=[0, 0],
    normalize=False,
    bsize=TILE,
    batch_size=BATCH,
    nimg_per_epoch=epoch,
    n_epochs=max(1, args.steps * BATCH // epoch),
    min_train_masks=1,
    save_path=str(args.output),
)
diameter = float(model.net.diam_labels.item())
test_names, test_images, test_labels = read_folder(args.test)
found = []
for name, image in zip(test_names, test_images, strict=True):
    cells = model.eval(unit_gray(image, args.stretch), channels=[0, 0], normalize=False, diameter=diameter)[0]
    write_prediction(args.output, name, cells)
    found.append(cells)
table = metrics.average_precision(test_labels, found, threshold=[0.5, 0.75, 0.9])[0]
own = dict(zip(("0.5", "0.75", "0.9"), np.nanmean(table, axis=0).tolist(), strict=True))
(args.output / "own_scores.json").write_text(json.dumps({"tool": "cellpose", "pooled": False, "ap": own}))
