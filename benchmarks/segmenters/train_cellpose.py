"""Cellpose from scratch (version 3, no pretrained weights): trained, then test images predicted."""

from __future__ import annotations

import json

import numpy as np
import torch
from cellpose import metrics, models, train
from folders import half_real, parse_args, read_folder, write_prediction

BATCH, EPOCH = 8, 80  # images
args = parse_args(__doc__)
np.random.seed(args.seed)
torch.manual_seed(args.seed)
names, images, labels = read_folder(args.train)
with_cells = [index for index, one in enumerate(labels) if one.max() > 0]
args.output.mkdir(parents=True, exist_ok=True)
epoch = min(EPOCH, BATCH * args.steps)
model = models.CellposeModel(gpu=torch.cuda.is_available(), pretrained_model=False)
train.train_seg(
    model.net,
    train_data=[images[index] for index in with_cells],
    train_labels=[labels[index] for index in with_cells],
    train_probs=half_real([names[index] for index in with_cells]),
    channels=[0, 0],
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
    cells = model.eval(image, channels=[0, 0], diameter=diameter)[0]
    write_prediction(args.output, name, cells)
    found.append(cells)
table = metrics.average_precision(test_labels, found, threshold=[0.5, 0.75, 0.9])[0]
own = dict(zip(("0.5", "0.75", "0.9"), np.nanmean(table, axis=0).tolist(), strict=True))
(args.output / "own_scores.json").write_text(json.dumps({"tool": "cellpose", "pooled": False, "ap": own}))
