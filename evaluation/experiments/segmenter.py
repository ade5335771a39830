"""The instance segmenter of the utility experiment: a small U-Net, then a watershed, at an image's full size.

The U-Net gives the class of every pixel and the interior of every cell. With two classes these are the usual three:
background, border, interior (Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7). Each top of the interior seeds one
cell, if it stands out enough from those around it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from scipy import ndimage
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import find_boundaries, watershed
from torch import Tensor, nn
from tqdm import tqdm

from common.cells import connected_cells, without_gaps
from common.log import Pace
from common.pictures import from_uint8
from common.randomness import derived_seed
from evaluation.experiments.augmentation import augment
from evaluation.judge import build_network, predict

logger = logging.getLogger(__name__)
IGNORE = 255  # class of pixels that no loss sees
BORDER = 2  # pixels: width of a cell's border, at most half of the cell's depth
WINDOW, WINDOW_OVERLAP, WINDOW_BATCH = 256, 0.125, 4  # of large images
LEAST_AREA = 10  # pixels; smaller finds are no cells
SMOOTHING = 1.0  # pixels: blur of the interior before it is cut into seeds
SEED_LEVEL = 0.4  # least probability of an interior that seeds a cell
SADDLE = 0.25  # two tops of the interior are one cell if the way between them falls by less than this
INTERIOR_WEIGHT = 1.0  # of the interior's loss beside that of the classes
FINETUNE_RATE = 0.5  # factor on the learning rate of phases after the first
LOG_EVERY = 100


@dataclass(frozen=True)
class SegmenterConfig:
    """How a segmenter is trained. ``steps`` is the budget, the same in every arm.

    Attributes:
        num_classes: K, background included.
        channels: of the images; gray counts as 3.
        crop: side of the training squares, pixels at native scale.
        steps: training steps.
        batch_size: squares per step.
        learning_rate: largest one of the schedule.
        seed: of the weights and of every draw.
    """

    num_classes: int = 2
    channels: int = 3
    crop: int = 64
    steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 2e-3
    seed: int = 0


class Square(NamedTuple):
    """A training example: uint8 image (S, S, C) and uint8 target (2, S, S), see :func:`target_of`."""

    image: np.ndarray
    target: np.ndarray


class Source(Protocol):
    """Where squares come from."""

    def draw(self, rng: np.random.Generator, side: int) -> Square:
        """One square of this side."""


class Phase(NamedTuple):
    """A part of a training.

    Attributes:
        share: of the steps.
        sources: each with its share of the examples.
    """

    share: float
    sources: Sequence[tuple[Source, float]]


# --- targets ---------------------------------------------------------------------------------------------------------


def interior_of(cells: np.ndarray) -> np.ndarray:
    """Pixels of a cell that are further than ``BORDER`` from its outside, or than half of its depth if that is less.

    Args:
        cells: (H, W) int, 0 background. The image's edge is no outside.

    Returns:
        (H, W) bool. Every cell has an interior.
    """
    outside = find_boundaries(cells, connectivity=2, mode="inner") | (cells == 0)
    if not outside.any():
        return np.ones(cells.shape, bool)
    depth = np.where(cells > 0, ndimage.distance_transform_edt(~outside) + 1, 0)
    numbered = without_gaps(cells)
    deepest = np.zeros(int(numbered.max()) + 1)
    np.maximum.at(deepest, numbered.ravel(), depth.ravel())
    return (cells > 0) & (depth > np.minimum(BORDER, deepest / 2)[numbered])


def target_of(classes: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """What a segmenter learns of a labelled image.

    Args:
        classes: (H, W) class ids in 0..K-1, or ``IGNORE``.
        cells: (H, W) int instance map.

    Returns:
        (2, H, W) uint8: the classes, and 1 in the interior of cells.
    """
    return np.stack([classes, interior_of(cells)]).astype(np.uint8)


# --- the loss --------------------------------------------------------------------------------------------------------


def segmenter_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy and Dice of the classes, and binary cross-entropy of the interior; ignored pixels count nowhere.

    Args:
        logits: (B, K + 1, S, S), the last channel is the interior's.
        targets: (B, 2, S, S) uint8.

    Returns:
        A scalar.
    """
    classes, interior = targets[:, 0].long(), targets[:, 1].float()
    known = (classes != IGNORE).float()
    if not known.any():
        return logits.sum() * 0
    cross_entropy = pixel_loss(logits, classes).sum() / known.sum()
    binary = F.binary_cross_entropy_with_logits(logits[:, -1], interior, known, reduction="sum") / known.sum()
    return cross_entropy + _dice_loss(logits[:, :-1], classes, known) + INTERIOR_WEIGHT * binary


def pixel_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of every pixel's class, 0 where it is ``IGNORE``: (B, K + 1, H, W), (B, H, W) -> (B, H, W)."""
    return F.cross_entropy(logits[:, :-1], classes.long(), ignore_index=IGNORE, reduction="none")


def _dice_loss(logits: Tensor, classes: Tensor, known: Tensor) -> Tensor:
    """1 - soft Dice over the batch, mean over the classes (Milletari et al. 2016, arXiv 1606.04797)."""
    count = logits.shape[1]
    found = logits.softmax(1) * known[:, None]
    truth = F.one_hot(classes.clamp(max=count - 1), count).permute(0, 3, 1, 2) * known[:, None]
    overlap = (found * truth).sum((0, 2, 3))
    total = found.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


# --- training --------------------------------------------------------------------------------------------------------


def train_segmenter(phases: Sequence[Phase], config: SegmenterConfig, device: torch.device) -> nn.Module:
    """Train a U-Net on squares of several sources; equal arguments give equal weights on the same machine.

    Args:
        phases: one after the other; their shares of the steps sum to 1.

    Returns:
        The network, on ``device``: (B, C, H, W) in [-1, 1] -> (B, K + 1, H, W) logits.
    """
    network = build_network(config.num_classes + 1, config.seed, config.channels).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    step, pace = 0, Pace(config.steps, "steps")
    with tqdm(total=config.steps, desc="training a segmenter", disable=None, leave=False) as bar:
        for number, phase in enumerate(phases):
            last = config.steps if number + 1 == len(phases) else step + round(phase.share * config.steps)
            rate = config.learning_rate * (FINETUNE_RATE if number else 1)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(2, last - step))
            while step < last:
                images, targets = draw_batch(phase, config, step)
                loss = segmenter_loss(predict(network, images.to(device)), targets.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                bar.update()
                if step % LOG_EVERY == 0 or step == config.steps:
                    logger.info("segmenter: step %d of %d, loss %.4f, %s", step, config.steps, loss.item(), pace(step))
    return network.eval()


def draw_batch(phase: Phase, config: SegmenterConfig, step: int) -> tuple[Tensor, Tensor]:
    """Augmented examples of one step, (B, C, S, S) in [-1, 1] and (B, 2, S, S); a function of the seed and the step."""
    rng = np.random.default_rng([config.seed, step])
    sources, shares = zip(*phase.sources, strict=True)
    weights = np.array(shares, float)
    chosen = rng.choice(len(sources), config.batch_size, p=weights / weights.sum())
    squares = [sources[number].draw(rng, config.crop) for number in chosen]
    images = torch.stack([from_uint8(square.image) for square in squares])
    targets = torch.from_numpy(np.stack([square.target for square in squares]))
    generator = torch.Generator().manual_seed(derived_seed(config.seed, step))
    return augment(images.expand(-1, config.channels, -1, -1), targets, generator)


# --- inference -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a segmenter finds in an image.

    Attributes:
        classes: (H, W) uint8, the most probable class.
        cells: (H, W) int32 instance map.
        confidence: (H, W) float32, probability of the most probable class.
    """

    classes: np.ndarray
    cells: np.ndarray
    confidence: np.ndarray


class Segmenter:
    """Trained networks of one kind; several vote by their mean probability."""

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        self.networks = [network.to(device).eval() for network in networks]
        self.device = device

    def __call__(self, image: np.ndarray) -> Found:
        """Segment a whole image, uint8 (H, W, C)."""
        classes, interior = self.probabilities(image)
        best = classes.argmax(0).astype(np.uint8)
        return Found(best, split_cells(best > 0, interior), classes.max(0))

    @torch.inference_mode()
    def probabilities(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(K, H, W) float32 of the classes, and (H, W) float32 of the interior."""
        logits = [self._logits(network, image) for network in self.networks]
        classes = torch.stack([one[0, :-1].softmax(0) for one in logits]).mean(0)
        interior = torch.stack([one[0, -1].sigmoid() for one in logits]).mean(0)
        return classes.cpu().numpy(), interior.cpu().numpy()

    @torch.inference_mode()
    def pixel_losses(self, image: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """(H, W) float32 cross-entropy of the given classes, mean over the networks; 0 where they are ``IGNORE``."""
        truth = torch.from_numpy(classes.astype(np.int64))[None].to(self.device)
        losses = [pixel_loss(self._logits(network, image), truth)[0] for network in self.networks]
        return torch.stack(losses).mean(0).cpu().numpy()

    def _logits(self, network: nn.Module, image: np.ndarray) -> Tensor:
        """(1, K + 1, H, W); images larger than a window in overlapping windows."""
        batch = from_uint8(image)[None].to(self.device)
        if max(batch.shape[2:]) <= WINDOW:
            return predict(network, batch)
        return sliding_window_inference(
            batch, (WINDOW, WINDOW), WINDOW_BATCH, partial(predict, network), overlap=WINDOW_OVERLAP, mode="gaussian",
            padding_mode="replicate",
        )  # fmt: skip


def split_cells(foreground: np.ndarray, interior: np.ndarray) -> np.ndarray:
    """Cells of a foreground: a watershed from the seeds of the interior; a part without a seed is one cell.

    Args:
        foreground: (H, W) bool.
        interior: (H, W) float, probability of a cell's interior.

    Returns:
        (H, W) int32 instance map without gaps; cells below ``LEAST_AREA`` pixels are dropped.
    """
    interior = ndimage.gaussian_filter(interior, SMOOTHING)
    return grow_cells(foreground, interior, find_seeds(interior))


def find_seeds(interior: np.ndarray, saddle: float = SADDLE) -> np.ndarray:
    """One seed for each top of the interior; tops with a shallow saddle between them share one.

    Without the sharing, texture breaks large cells into pieces. Saddles are filled by reconstruction (Vincent 1993,
    doi:10.1109/83.217222).

    Args:
        interior: (H, W) float, probability of a cell's interior.
        saddle: see ``SADDLE``.

    Returns:
        (H, W) int ids, 0 between the seeds.
    """
    filled = reconstruction(interior - saddle, interior)
    seeds = ndimage.label(local_maxima(filled), np.ones((3, 3)))[0]
    return np.where(interior > SEED_LEVEL, seeds, 0)


def grow_cells(foreground: np.ndarray, interior: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The watershed of :func:`split_cells`, from seeds that are given.

    Args:
        foreground: (H, W) bool.
        interior: (H, W) float, smoothed.
        seeds: (H, W) ids, 0 between them. Seeds outside of the foreground have no cell.

    Returns:
        as :func:`split_cells`.
    """
    seeds = without_gaps(np.where(foreground, seeds, 0))
    parts = connected_cells(foreground)
    seeded = np.zeros(int(parts.max()) + 1, bool)
    seeded[parts[seeds > 0]] = True
    without = (parts > 0) & ~seeded[parts]
    markers = np.where(without, parts + int(seeds.max()), seeds)
    cells = watershed(-interior, markers, mask=foreground)
    small = np.bincount(cells.ravel()) < LEAST_AREA
    return without_gaps(np.where(small[cells], 0, cells))
