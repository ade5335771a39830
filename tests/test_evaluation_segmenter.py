"""The instance segmenter: its targets, its loss, its watershed and its scores, on drawn cells with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn_sets import disk
from scipy.optimize import linear_sum_assignment

from common.cells import connected_cells
from evaluation.experiments.augmentation import augment
from evaluation.experiments.instance_score import score_segmenter
from evaluation.experiments.segmenter import (
    IGNORE,
    Found,
    Phase,
    Segmenter,
    SegmenterConfig,
    Square,
    interior_of,
    segmenter_loss,
    split_cells,
    train_segmenter,
)
from evaluation.experiments.sources import CopyPaste, Labelled, pseudo_label
from evaluation.fidelity import LabelledImage
from evaluation.instances import InstanceCounts, overlap_table, touching_cells

CPU = torch.device("cpu")
SIDE = 48


def pair_that_touches() -> np.ndarray:
    """Two disks side by side, with a common border, and a lone one."""
    cells = np.zeros((SIDE, SIDE), np.int32)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    both = disk(SIDE, 14, 12, 9) | disk(SIDE, 14, 28, 9)
    cells[both & (columns <= 20)] = 1
    cells[both & (columns > 20)] = 2
    cells[disk(SIDE, 36, 36, 7)] = 3
    return cells


def labelled(cells: np.ndarray, seed: int = 0) -> LabelledImage:
    """Bright cells, darker at their rim, on a dark ground."""
    noise = np.random.default_rng(seed).normal(0, 8, (*cells.shape, 3))
    gray = np.where(interior_of(cells), 210, np.where(cells > 0, 130, 40))[..., None] + noise
    return LabelledImage(gray.clip(0, 255).astype(np.uint8), (cells > 0).astype(np.uint8), cells)


# --- targets, loss, watershed ----------------------------------------------------------------------------------------


def test_every_cell_has_an_interior_of_one_part_and_a_border_around_it():
    cells = pair_that_touches()
    interior = interior_of(cells)
    assert connected_cells(interior).max() == 3 and connected_cells(cells > 0).max() == 2
    assert not interior[:, 20:22][cells[:, 20:22] > 0].any()
    for size in (1, 2, 3):
        small = np.zeros((9, 11), np.int32)
        small[3 : 3 + size, 4 : 4 + size] = 7
        assert interior_of(small).any()
    assert interior_of(np.ones((5, 6), np.int32)).all()


def test_watershed_gives_back_cells_that_touch():
    cells = pair_that_touches()
    found = split_cells(cells > 0, interior_of(cells).astype(float))
    score = InstanceCounts()
    score.add(found, cells)
    assert score.ap(0.9) == 1 and found.max() == 3


@pytest.mark.parametrize(("dip", "cells"), [(0.1, 1), (0.6, 2)])
def test_a_dip_of_the_interior_splits_a_cell_only_if_it_is_deep(dip: float, cells: int):
    """Texture inside a large cell must not break it into pieces."""
    foreground = disk(64, 32, 32, 26)
    interior = np.where(foreground, 0.9, 0.0)
    interior[:, 26:38] -= np.where(foreground[:, 26:38], dip, 0)
    assert split_cells(foreground, interior).max() == cells


def test_part_without_interior_is_a_cell_and_a_speck_is_none():
    foreground = np.zeros((20, 30), bool)
    foreground[2:8, 2:8] = foreground[12:14, 20:22] = True
    found = split_cells(foreground, np.zeros((20, 30)))
    assert found.max() == 1 and (found > 0).sum() == 36


def test_loss_falls_towards_the_truth_and_does_not_see_ignored_pixels():
    targets = torch.zeros(2, 2, 8, 6, dtype=torch.uint8)
    targets[:, 0, :, :3] = 1
    right = torch.stack([1 - 2.0 * targets[:, 0], 2.0 * targets[:, 0] - 1, 2.0 * targets[:, 1] - 1], dim=1) * 6
    assert segmenter_loss(right, targets) < 0.1 < 2 < segmenter_loss(-right, targets)
    hidden, wrong = targets.clone(), right.clone()
    hidden[:, 0, :4], wrong[:, :, :4] = IGNORE, -right[:, :, :4]
    assert segmenter_loss(wrong, hidden) < 0.1 < 1 < segmenter_loss(wrong, targets)
    hidden[:, 0] = IGNORE
    assert segmenter_loss(wrong, hidden) == 0


def test_augmentation_moves_image_and_target_together_and_repeats_itself():
    cells = torch.from_numpy((pair_that_touches() > 0).astype(np.uint8))
    images = (cells.float() * 1.2 - 0.6).expand(5, 3, -1, -1)
    targets = cells.expand(5, 2, -1, -1).clone()
    moved, labels = augment(images, targets, torch.Generator().manual_seed(3))
    for image, target in zip(moved.mean(1), labels[:, 0], strict=True):
        inside, outside = image[target == 1].mean(), image[target == 0].mean()
        assert inside - outside > 0.5
    assert moved.shape == images.shape and moved.abs().max() <= 1 and set(labels.unique().tolist()) == {0, 1}
    assert not torch.equal(moved[0], moved[1])
    assert torch.equal(augment(images, targets, torch.Generator().manual_seed(3))[0], moved)


# --- sources ---------------------------------------------------------------------------------------------------------


def test_squares_hold_image_and_target_of_the_same_pixels():
    item = labelled(pair_that_touches())
    source = Labelled([item])
    for draw in range(20):
        image, target = source.draw(np.random.default_rng(draw), 24)
        assert image.shape == (24, 24, 3) and target.shape == (2, 24, 24)
        bright = image.mean(-1) > 85
        assert (bright == (target[0] == 1)).mean() > 0.98


def test_images_smaller_than_a_square_are_mirrored():
    item = labelled(pair_that_touches()[4:24, 2:40])
    image, target = Labelled([item]).draw(np.random.default_rng(0), 64)
    assert image.shape == (64, 64, 3) and ((image.mean(-1) > 85) == (target[0] == 1)).mean() > 0.98


def test_copy_paste_adds_cells_of_the_same_look_only():
    one, other = labelled(pair_that_touches()), labelled(pair_that_touches())
    green = other._replace(image=np.where(other.classes[..., None] > 0, np.uint8([0, 200, 0]), np.uint8(40)))
    apart = CopyPaste([one, green], ["a", "b"])
    together = CopyPaste([one, green], ["a", "a"])
    empty = LabelledImage(np.full((SIDE, SIDE, 3), 40, np.uint8), *np.zeros((2, SIDE, SIDE), np.int32))
    on_empty = CopyPaste([empty, one], ["a", "a"])

    def mixed(source: CopyPaste) -> int:
        found = 0
        for draw in range(40):
            image, target = source.draw(np.random.default_rng(draw), SIDE)
            cell = image[target[0] == 1].astype(int)
            is_green = cell[:, 1] - cell[:, 0] > 100
            found += is_green.any() and not is_green.all()
        return found

    assert mixed(apart) == 0 and mixed(together) > 5
    squares = [on_empty.draw(np.random.default_rng(draw), SIDE) for draw in range(30)]
    assert any(connected_cells(square.target[1]).max() > 3 for square in squares)
    assert all(((square.image.mean(-1) > 85) == (square.target[0] == 1)).mean() > 0.95 for square in squares)


def test_pseudo_labels_ignore_what_is_not_sure():
    image = np.zeros((4, 6, 3), np.uint8)
    confidence = np.full((4, 6), 0.95, np.float32)
    confidence[:, 0] = 0.6
    item = pseudo_label(image, lambda image: Found(np.ones((4, 6), np.uint8), np.ones((4, 6), int), confidence), 0.9)
    assert (item.classes[:, 0] == IGNORE).all() and (item.classes[:, 1:] == 1).all()


# --- scores ----------------------------------------------------------------------------------------------------------


def matching_of_the_tools(predicted: np.ndarray, truth: np.ndarray, threshold: float) -> float:
    """AP as StarDist and Cellpose define it: the assignment with most pairs at this IoU, then TP / (TP + FP + FN)."""
    iou = overlap_table(predicted, truth).toarray()
    least = max(1, min(iou.shape))
    rows, columns = linear_sum_assignment(-(iou >= threshold).astype(float) - iou / (2 * least))
    hits = int((iou[rows, columns] >= threshold).sum())
    return hits / (iou.shape[0] + iou.shape[1] - hits)


def test_ap_equals_the_matching_of_stardist_and_cellpose():
    rng = np.random.default_rng(1)
    for _ in range(60):
        truth = np.kron(rng.integers(0, 6, (6, 7)), np.ones((4, 4), int))
        predicted = np.where(rng.random(truth.shape) < 0.1, 0, np.roll(truth, rng.integers(0, 4), rng.integers(2)))
        predicted[:, 14:] += (predicted[:, 14:] > 0) * 10  # cells cut in two: many pairs of an IoU of one half
        score = InstanceCounts()
        score.add(predicted, truth)
        for threshold in (0.5, 0.75, 0.9):
            assert score.ap(threshold) == pytest.approx(matching_of_the_tools(predicted, truth, threshold))


def test_ap_of_touching_cells_sees_the_merged_pair_and_nothing_else():
    truth = pair_that_touches()
    merged = np.where(truth == 2, 1, truth)
    merged[44:, :5] = 9  # a false cell on background
    without_lone = np.where(merged == 3, 0, merged)
    for predicted, score in ((truth, 1), (np.where(truth == 3, 0, truth), 1), (merged, 1 / 2), (without_lone, 1 / 2)):
        counts = InstanceCounts()
        counts.add(*touching_cells(predicted, truth))
        assert counts.ap(0.5) == pytest.approx(score)
    counts = InstanceCounts()
    counts.add(*touching_cells(truth, np.where(truth == 3, 3, 0)))
    assert counts.ap(0.5) is None


def test_scores_are_given_for_all_images_and_for_each_group():
    item = labelled(pair_that_touches())
    blank = Found(np.zeros((SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), int), np.ones((SIDE, SIDE), np.float32))
    right = Found(item.classes, item.cells, blank.confidence)
    answers = iter([right, blank])
    everything, groups = score_segmenter(lambda image: next(answers), [(item, "a"), (item, "b")], 2)
    assert everything.ap50 == pytest.approx(1 / 2) and everything.dice == pytest.approx(1 / 2)
    assert groups["a"].ap90 == groups["a"].ap50_touching == groups["a"].pq == 1 and groups["b"].ap50 == 0
    assert everything.class_dice == [pytest.approx(2 / 3)]


# --- training --------------------------------------------------------------------------------------------------------


class Constant:
    """Squares of one gray value."""

    def __init__(self, value: int) -> None:
        self.value = value

    def draw(self, rng: np.random.Generator, side: int) -> Square:
        return Square(np.full((side, side, 3), self.value, np.uint8), np.zeros((2, side, side), np.uint8))


def test_phases_follow_each_other_and_sources_get_their_shares(monkeypatch):
    from evaluation.experiments import segmenter

    seen = []
    monkeypatch.setattr(segmenter, "augment", lambda images, targets, generator: (images, targets))
    whole = segmenter.draw_batch

    def noted(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = whole(*arguments)
        seen.append((images[:, 0, 0, 0] > 0).float().mean().item())
        return images, targets

    monkeypatch.setattr(segmenter, "draw_batch", noted)
    dark, bright = Constant(0), Constant(255)
    config = SegmenterConfig(steps=10, crop=8, batch_size=40)
    train_segmenter([Phase(0.6, [(bright, 1)]), Phase(0.4, [(dark, 0.2), (bright, 0.8)])], config, CPU)
    assert len(seen) == 10 and seen[:6] == [1] * 6
    assert 0.7 < np.mean(seen[6:]) < 0.9


@pytest.mark.slow
def test_segmenter_learns_cells_that_touch_and_segments_large_images():
    """Disks with a dark rim: after a short training most are found, the touching ones apart."""
    truth = [np.kron(np.ones((1, 1), int), np.roll(pair_that_touches(), shift, 1)) for shift in (0, 3)]
    items = [labelled(cells[:, 3:], seed) for seed, cells in enumerate(truth)]
    config = SegmenterConfig(steps=120, crop=32, batch_size=8)
    network = train_segmenter([Phase(1, [(Labelled(items), 1)])], config, CPU)
    again = train_segmenter([Phase(1, [(Labelled(items), 1)])], config, CPU)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), again.parameters(), strict=True))
    segmenter = Segmenter([network], CPU)
    new = labelled(np.rot90(pair_that_touches()).copy(), seed=9)
    everything, _ = score_segmenter(segmenter, [(new, "")], 2)
    assert everything.dice > 0.9 and everything.ap50 > 0.6
    tiled = labelled(np.tile(pair_that_touches(), (1, 6)), seed=10)  # 288 pixels wide: two windows
    assert segmenter(tiled.image).cells.shape == (48, 288)
    assert (
        segmenter.pixel_losses(new.image, new.classes).mean()
        < segmenter.pixel_losses(new.image, 1 - new.classes).mean()
    )
