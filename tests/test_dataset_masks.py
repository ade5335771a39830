"""What masks mean: the automatic mode accepts clear cases and refuses others; classes keep each pixel's meaning."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
import torch
from PIL import Image

from common.errors import InputError, settings_as_flags
from dataset.annotations.cells import labels_to_cells
from dataset.files import read_mask
from dataset.mask_facts import MAX_UNEQUAL_SHARE, mask_stats
from dataset.mask_warnings import mask_warnings, refuse_one_class
from dataset.masks import (
    MASK_TYPES,
    MAX_SCATTERED_SHARE,
    MaskRule,
    decide_mask_rule,
    to_prob_map,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data in ../shared/data are absent")

HEIGHT, WIDTH = 90, 120


def one_hot(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """(H, W) class ids -> (K, H, W) float32."""
    return (classes == np.arange(num_classes)[:, None, None]).astype(np.float32)


def decide(masks: list[np.ndarray], num_classes: int = 2, mask_type: str = "auto", normalize: bool = False) -> MaskRule:
    stats = [mask_stats(f"m{index}.png", mask) for index, mask in enumerate(masks)]
    return decide_mask_rule(stats, num_classes, mask_type, "masks/", normalize)


def disks(radius: float = 6, dtype: npt.DTypeLike = np.uint8) -> np.ndarray:
    """Instance map of 20 disks in a grid; from radius 10 on they touch."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    labels = np.zeros((HEIGHT, WIDTH), dtype)
    for index, (row, column) in enumerate(np.ndindex(4, 5)):
        inside = (rows - 12 - 20 * row) ** 2 + (columns - 15 - 20 * column) ** 2 <= radius**2
        labels[inside & (labels == 0)] = index + 1
    return labels


def blobs(levels: int = 255) -> np.ndarray:
    """Smooth gray bumps where the disks are."""
    distance = scipy.ndimage.distance_transform_edt(disks(8))
    return np.round(np.round(distance / distance.max() * levels) * (255 / levels)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ clear cases


@pytest.mark.parametrize(
    ("mask", "num_classes", "mask_type", "maximum"),
    [
        (np.where(disks(), 255, 0).astype(np.uint8), 2, "binary", 255),
        (np.where(disks(), 1, 0).astype(np.uint8), 2, "binary", 1),
        (np.where(disks(), 1, 0).astype(np.int64), 2, "binary", 1),
        (np.where(disks(), 255, 0).astype(np.uint16), 2, "binary", 255),
        (np.where(disks(), 65535, 0).astype(np.uint16), 2, "binary", 65535),
        (np.where(disks(), 255.0, 0.0).astype(np.float32), 2, "binary", 255),
        (np.zeros((9, 7), np.uint8), 2, "binary", 255),
        (np.full((9, 7), 255, np.uint8), 2, "binary", 255),
        (disks() % 3, 3, "classes", 1),
        (disks() % 2, 3, "classes", 1),
        (disks() % 7, 9, "classes", 1),
        (disks(), 2, "instances", 1),
        (disks(12), 3, "instances", 1),
        (disks(12, np.uint16) * 300, 2, "instances", 1),
        (disks(12, np.int32) * 70_000, 2, "instances", 1),
        (disks(12, np.float32), 2, "instances", 1),
        ((blobs() / 255).astype(np.float32), 2, "probability", 1),
        (one_hot(disks() % 3, 3), 3, "probability", 1),
        (one_hot(disks() % 3, 3).astype(np.uint8) * 255, 3, "probability", 255),
    ],
)
def test_automatic_takes_the_clear_case(mask, num_classes, mask_type, maximum):
    rule = decide([mask], num_classes)
    assert (rule.mask_type, rule.maximum, rule.num_classes) == (mask_type, maximum, num_classes)
    assert mask_type in rule.reason
    # What was said once can be said again by hand.
    assert decide([mask], num_classes, mask_type).maximum == maximum


def test_one_folder_is_decided_from_all_of_its_masks():
    empty, single = np.zeros((9, 7), np.uint8), (disks() == 1).astype(np.uint8)
    assert decide([empty, single, disks(12)]).mask_type == "instances"
    assert decide([empty, single]).mask_type == "binary"
    assert decide([empty, (disks() > 0).astype(np.uint8) * np.uint8(255)]).maximum == 255


def test_a_folder_per_nucleus_is_instances_however_few():
    stats = [mask_stats("a", (disks() == 1).astype(np.uint16), from_folder=True)]
    assert decide_mask_rule(stats, 2, "auto", "masks").mask_type == "instances"


@needs_data
@pytest.mark.parametrize("folder", ["nuclei/val/instances", "histology/val/instances", "readers/omnipose/labels"])
def test_real_label_folders_are_instances(folder):
    files = sorted((DATA / folder).iterdir())[:8]
    stats = [mask_stats(file.name, read_mask(file)) for file in files]
    assert decide_mask_rule(stats, 2, "auto", folder).mask_type == "instances"
    assert decide_mask_rule(stats, 3, "auto", folder).mask_type == "instances"


@needs_data
@pytest.mark.parametrize("folder", ["nuclei/val/instances", "histology/val/instances", "readers/omnipose/labels"])
def test_thresholds_of_automatic_have_room_on_real_labels(folder):
    stats = [mask_stats(file.name, read_mask(file)) for file in sorted((DATA / folder).iterdir())]
    assert max(one.unequal_pairs for one in stats) > 0 or "histology" in folder
    assert sum(one.unequal_pairs for one in stats) < MAX_UNEQUAL_SHARE / 4 * sum(one.pairs for one in stats)
    scattered = sum(one.area - one.main_area for one in stats)
    assert scattered < MAX_SCATTERED_SHARE / 100 * sum(one.area for one in stats)


@needs_data
def test_real_gray_images_are_never_labels():
    file = DATA / "readers" / "odd" / "ecoli_phase.tif"
    with pytest.raises(InputError, match="probability.*images instead of masks"):
        decide_mask_rule([mask_stats(file.name, read_mask(file))], 2, "auto", "masks")


# ------------------------------------------------------------------------------------------------------ unclear cases


def jpeg_like() -> np.ndarray:
    mask = np.where(disks(), 250, 3).astype(np.int64) + np.random.default_rng(0).integers(-3, 6, (HEIGHT, WIDTH))
    return np.clip(mask, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("mask", "num_classes", "words"),
    [
        (blobs(), 2, "mask_type=probability"),
        (blobs(8), 2, "unclear"),
        (jpeg_like(), 2, "binary, cut at half"),
        (np.where(disks(), 128, 0).astype(np.uint8), 2, "one class of cells .mask_type=binary"),
        (np.where(disks(), 255, 0).astype(np.uint8), 3, "mask_type=binary num_classes=2"),
        (disks() % 3, 2, "num_classes=3.*mask_type=instances"),
        (disks() % 5, 2, "the values 0, 1, 2, 3, 4 .*num_classes=5"),
        (disks(12), 5, "instances with num_classes=2 or num_classes=3"),
        (np.random.default_rng(0).integers(0, 65535, (HEIGHT, WIDTH)).astype(np.uint16), 2, "images instead of masks"),
        (np.float32(2.5) * disks(), 2, "fractions up to 50"),
        (-disks(6, np.int16), 2, "negative"),
    ],
)
def test_automatic_refuses_the_unclear_and_names_likely_types(mask, num_classes, words):
    with pytest.raises(InputError, match=words) as caught:
        decide([mask], num_classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("levels", [8, 12, 16, 32, 64, 255])
@pytest.mark.parametrize("count", [1, 20])
def test_gray_probabilities_are_never_taken_for_instances(levels, count):
    mask = blobs(levels)
    if count == 1:  # one large blob: each level is one ring, as each id is one cell
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        distance = np.clip(44 - np.hypot(rows - 45, columns - 60), 0, None) / 44
        mask = np.round(np.round(distance * levels) * (255 / levels)).astype(np.uint8)
    with pytest.raises(InputError, match="unclear"):
        decide([mask])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("radius", [2, 6, 10, 14])
def test_labels_are_never_taken_for_probabilities(dtype, radius):
    assert decide([disks(radius, dtype)]).mask_type == "instances"


# ------------------------------------------------------------------------------------------------------ type given


@pytest.mark.parametrize(
    ("mask", "num_classes", "mask_type", "words"),
    [
        (disks() % 4, 3, "classes", r"class id of 3 or more: m0.png \(3\)"),
        (np.where(disks(), 255, 0).astype(np.uint8), 2, "classes", "mask_type=binary for 0 and 255"),
        (disks(), 4, "instances", "not 4"),
        (disks(), 2, "binary", "not binary"),
        (np.where(disks(), 255, 0).astype(np.uint8), 3, "binary", "2 classes"),
        (blobs(), 3, "probability", r"\(3, H, W\)"),
        (one_hot(disks() % 3, 3), 4, "probability", "stacks of 3 planes"),
        (one_hot(disks() % 3, 3), 3, "binary", "only mask_type=probability"),
        ((blobs() / 255).astype(np.float32), 2, "instances", "fractions"),
        (blobs().astype(np.float32), 2, "probability", "above 1"),
        (disks(), 2, "depth", "choose one of auto, binary"),
    ],
)
def test_a_given_type_that_does_not_fit_is_refused(mask, num_classes, mask_type, words):
    with pytest.raises(InputError, match=words):
        decide([mask], num_classes, mask_type)


def test_all_masks_with_an_id_above_the_classes_are_counted():
    with pytest.raises(InputError, match="5 of 6 masks .* m1.png .*, m2.png .*, m3.png .* and 2 more"):
        decide([disks() % 2] + [disks() % 4] * 5, 2, "classes")


def test_binary_by_hand_cuts_at_half():
    rule = decide([jpeg_like()], 2, "binary")
    assert np.array_equal(rule.class_map(jpeg_like()), disks() > 0)
    assert rule.class_map(np.array([[127, 128]], np.uint8)).tolist() == [[0, 1]]
    assert decide([np.array([[0, 7]], np.uint8)], 2, "binary").class_map(np.array([[0, 7]], np.uint8)).tolist() == [
        [0, 1]
    ]


def test_binary_masks_of_two_scales_are_refused_and_not_read_as_empty():
    one, full = ((disks() > 0).astype(np.uint8) * value for value in (1, 255))
    with pytest.raises(InputError, match=r"1 of 3 masks .* m1.png\. Save all with the same two values"):
        decide([full, one, full], mask_type="binary")
    with pytest.raises(InputError, match="saved with different values") as caught:
        decide([full, one, full])
    assert "cut at half" not in str(caught.value)
    faint = (blobs() * 0.3).astype(np.uint8)  # soft, and nowhere above half: no cell, as it says
    assert decide([blobs(), faint], mask_type="binary").prob_map(faint)[1].max() == 0


def test_probability_by_hand_is_a_share_of_what_the_storage_offers():
    gray = np.array([[0, 51, 102]], np.uint8)
    assert decide([gray], 2, "probability").prob_map(gray)[1] == pytest.approx(np.array([[0, 0.2, 0.4]]))
    deep = np.array([[0, 13107, 65535]], np.uint16)
    assert decide([deep], 2, "probability").prob_map(deep)[1] == pytest.approx(np.array([[0, 0.2, 1]]))
    with pytest.raises(InputError, match="uint16, uint8"):
        decide([gray, deep], 2, "probability")


def test_soft_stacks_that_do_not_sum_to_one_are_refused_or_normalised():
    stack = one_hot(disks() % 3, 3) * np.float32(0.5)
    stack[:, 0, 0] = 0
    with pytest.raises(InputError, match=r"m0.png \(off by 1\).*normalize_masks=True"):
        decide([stack], 3)
    soft = decide([stack], 3, normalize=True).prob_map(stack)
    assert soft.sum(axis=0) == pytest.approx(np.ones((HEIGHT, WIDTH)))
    assert soft[:, 0, 0].tolist() == [1, 0, 0]
    assert np.array_equal(soft[:, 1:, 1:], one_hot(disks() % 3, 3)[:, 1:, 1:])


def test_flat_masks_and_stacks_in_one_folder_are_refused():
    with pytest.raises(InputError, match="flat, stacks of 3"):
        decide([disks(), one_hot(disks() % 3, 3)], 3)


# ------------------------------------------------------------------------------------------------------ classes out


def test_instances_become_cell_or_interior_and_boundary():
    labels = np.array([[1, 1, 1, 2, 2, 0, 3, 3]] * 5, dtype=np.uint16)
    assert decide([labels], 2, "instances").class_map(labels)[0].tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    three = decide([labels], 3, "instances").class_map(labels)
    assert three.dtype == np.uint8
    assert three[0].tolist() == [1, 1, 2, 2, 1, 0, 1, 1]  # 3 touches nobody: it has no boundary
    diagonal = np.array([[1, 0], [0, 2]])
    assert decide([labels], 3, "instances").class_map(diagonal).tolist() == [[2, 0], [0, 2]]


def test_training_says_whether_whole_numbers_are_cells_or_classes():
    def type_of(masks: list[np.ndarray], learned: str, num_classes: int = 3) -> str:
        stats = [mask_stats("m.png", mask) for mask in masks]
        return decide_mask_rule(stats, num_classes, "auto", "masks/", learned=learned).mask_type

    two = np.zeros((20, 20), np.uint8)
    two[2:8, 2:8], two[12:18, 12:18] = 1, 2
    assert [type_of([two], learned) for learned in ("auto", "classes", "binary")] == ["classes"] * 3
    assert type_of([two], "instances") == "instances"
    assert type_of([two > 1], "instances") == "classes"  # 0 and 1 may be several cells
    assert type_of([np.stack([1 - (two > 0), two > 0]).astype(np.float32)], "instances", 2) == "probability"
    assert type_of([disks()], "auto") == "instances"
    with pytest.raises(InputError, match="20"):
        type_of([disks()], "classes")


def test_removing_the_boundary_class_parts_touching_cells():
    labels = disks(12)
    classes = decide([labels], 3).class_map(labels)
    assert scipy.ndimage.label(labels > 0)[1] == 1
    assert scipy.ndimage.label(classes == 1)[1] == labels.max()


@pytest.mark.parametrize("mask_type", [name for name in MASK_TYPES if name != "auto"])
def test_prob_maps_sum_to_one_for_every_type(mask_type):
    masks = {"binary": np.where(disks(), 255, 0).astype(np.uint8), "classes": disks() % 2, "probability": blobs(),
             "instances": disks(12)}  # fmt: skip
    rule = decide([masks[mask_type]], 2, mask_type)
    soft = rule.prob_map(masks[mask_type])
    assert soft.shape == (2, HEIGHT, WIDTH)
    assert soft.dtype == np.float32
    assert soft.min() >= 0
    assert soft.sum(axis=0) == pytest.approx(np.ones((HEIGHT, WIDTH)))
    if rule.is_hard:
        batch = torch.from_numpy(rule.class_map(masks[mask_type]))[None]
        assert torch.equal(to_prob_map(batch, 2)[0], torch.from_numpy(soft))


def test_to_prob_map_lets_soft_maps_and_their_gradient_through():
    soft = torch.rand(2, 3, 5, 7, requires_grad=True)
    assert to_prob_map(soft, 3) is soft


@pytest.mark.parametrize(
    ("mask_type", "num_classes", "expected"),
    [("instances", 3, True), ("instances", 2, False), ("classes", 3, False), ("probability", 3, False)],
)
def test_class_2_is_the_boundary_of_instances_with_three_classes_only(mask_type, num_classes, expected):
    assert MaskRule(mask_type, num_classes, 1, "").has_boundary is expected


# ------------------------------------------------------------------------------------------- saved wrong, or to be seen


@pytest.mark.parametrize("values", [(0, 128, 255), (0, 127, 255), (0, 85, 170, 255), (255, 0, 128)])
def test_classes_saved_to_be_seen_are_read_by_their_values_and_the_message_gives_them(values):
    labels = disks() % len(values)
    mask = np.array(values, np.uint8)[labels]
    with pytest.raises(InputError) as refusal:
        decide([mask], len(values))
    listed = " ".join(map(str, sorted(values)))
    assert f"--mask-values {listed}" in settings_as_flags(str(refusal.value))
    assert "Likely: ." not in str(refusal.value)
    rule = decide_mask_rule([mask_stats("m", mask)], len(values), "auto", "masks", values=values)
    assert np.array_equal(rule.class_map(mask), labels)
    again = MaskRule(**json.loads(json.dumps(dataclasses.asdict(rule))))  # as the settings of a set keep it
    assert np.array_equal(again.class_map(mask), labels)
    plain = decide_mask_rule([mask_stats("m", labels.astype(np.uint8))], len(values), "auto", "masks", values=values)
    assert np.array_equal(plain.class_map(labels), labels)  # ids stay ids


def test_other_values_than_those_given_are_named():
    mask = np.array([0, 128, 200], np.uint8)[disks() % 3]
    with pytest.raises(InputError, match=r"1 of 1 masks .* other values .*m \(200\)"):
        decide_mask_rule([mask_stats("m", mask)], 3, "auto", "masks", values=(0, 128, 255))
    with pytest.raises(InputError, match="num_classes=2"):
        decide_mask_rule([mask_stats("m", mask)], 2, "auto", "masks", values=(0, 128, 200))


def test_the_message_for_two_classes_gives_the_number_of_classes_too():
    with pytest.raises(InputError, match=r"mask_values=\(0, 128, 255\) num_classes=3"):
        decide([np.array([0, 128, 255], np.uint8)[disks() % 3]], 2)


def test_colour_tables_of_two_kinds_in_one_folder_are_refused():
    stats = [mask_stats(kind, disks() * 1, table=kind) for kind in ("gray", "coloured")]
    with pytest.raises(InputError, match="colour tables of two kinds"):
        decide_mask_rule(stats, 2, "instances", "masks")


def facts_of(*masks: np.ndarray, num_classes: int = 2, mask_type: str = "auto") -> tuple:
    stats = [mask_stats(f"m{index}", mask) for index, mask in enumerate(masks)]
    return stats, decide_mask_rule(stats, num_classes, mask_type, "masks")


@pytest.mark.parametrize(("value", "words"), [(0, "no mask has a cell"), (255, "no mask has background")])
def test_masks_of_one_class_are_no_training_set(value, words):
    stats, rule = facts_of(*[np.full((9, 8), value, np.uint8)] * 3)
    with pytest.raises(InputError, match=words):
        refuse_one_class(stats, rule, "masks")


def test_an_absent_class_and_black_cells_on_white_are_warned_of_and_good_masks_are_not():
    cells = np.where(disks(), 255, 0).astype(np.uint8)
    assert mask_warnings(*facts_of(cells)) == []
    refuse_one_class(*facts_of(cells), "masks")
    (warning,) = mask_warnings(*facts_of(255 - cells))
    assert "black on white" in warning
    numbered = disks() + 1  # the background has an id, too
    (warning,) = mask_warnings(*facts_of(numbered, mask_type="instances"))
    assert "black on white" in warning
    (warning,) = mask_warnings(*facts_of((disks() % 3).astype(np.uint8), num_classes=4))
    assert "class 3" in warning


@pytest.mark.parametrize(
    ("mask", "num_classes", "words"),
    [
        (np.where(disks() == 3, -1, disks(6, np.int16)), 2, "-1 marks pixels to ignore"),
        (np.where(disks() > 0, 2.5, -2.5), 2, "a softmax or a sigmoid"),
        (np.where(disks() == 3, 255, disks() % 3).astype(np.uint8), 3, "255 for pixels to ignore.*write 0"),
        (np.where(disks() == 3, 255, disks() > 0).astype(np.uint8), 2, "255 for pixels to ignore.*write 0"),
        ((1 + (disks() > 0)).astype(np.uint8), 2, r"2 classes without a 0 .mask_values=.1, 2."),
        ((1 + disks() % 3).astype(np.uint8), 3, r"3 classes without a 0 .mask_values=.1, 2, 3."),
        (np.float32(0.7) * blobs(), 2, "Divide probabilities by 255, or cut them at half .mask_type=binary."),
        (np.float32(0.37) * blobs(), 2, "Divide percentages by 100"),
        (np.where(disks() > 0, 7.5, 0), 2, "nearest neighbour"),
    ],
)
def test_what_labs_keep_beside_plain_values_is_refused_with_the_mend(mask, num_classes, words):
    with pytest.raises(InputError, match=words) as caught:
        decide([mask], num_classes)
    assert "binary" not in str(caught.value) or mask.max() > 100  # no advice that loses classes


def test_a_value_to_ignore_is_never_called_soft_edges():
    with pytest.raises(InputError) as caught:
        decide([np.where(disks() == 3, 255, disks() % 3).astype(np.uint8)], 3)
    assert "soft" not in str(caught.value)
    soft = scipy.ndimage.zoom(np.where(disks(8), 255, 0).astype(np.float32), 2, order=1).round().astype(np.uint8)
    with pytest.raises(InputError, match="soft or JPEG edges .mask_type=binary"):
        decide([soft])


def test_two_classes_numbered_from_one_train_with_the_flag_of_the_message():
    mask = (1 + (disks() > 0)).astype(np.uint8)
    rule = decide_mask_rule([mask_stats("m", mask)], 2, "auto", "masks", values=(1, 2))
    assert np.array_equal(rule.class_map(mask), disks() > 0)


def test_a_background_that_is_not_zero_is_named():
    numbered = disks() + 1
    stats, rule = facts_of(numbered, mask_type="instances")
    with pytest.raises(InputError, match="If 1 is the background, write 0 there"):
        refuse_one_class(stats, rule, "masks")


def test_a_binary_mask_among_numbered_cells_is_warned_about():
    cells = (disks() > 0).astype(np.uint8)
    (warning,) = mask_warnings(*facts_of(disks(), disks(5), cells))
    assert "in 1 of 3 masks, all cells have one number (as in m2)" in warning
    one_cell = (disks() == 4).astype(np.uint8)
    assert mask_warnings(*facts_of(disks(), disks(5), one_cell)) == []
    assert mask_warnings(*facts_of(cells, (disks(5) > 0).astype(np.uint8))) == []  # all binary: no ids are lost


def test_some_inverted_masks_among_good_ones_are_warned_about():
    cells = np.where(disks(), 255, 0).astype(np.uint8)
    (warning,) = mask_warnings(*facts_of(cells, 255 - cells, np.roll(cells, 3, 0), np.roll(cells, 5, 1)))
    assert "in 1 of 4 masks" in warning and "black on white" in warning


def test_outlines_with_numbers_are_hollow_too():
    hollow = np.where(scipy.ndimage.binary_erosion(disks(8) > 0), 0, disks(8))
    (warning,) = mask_warnings(*facts_of(hollow, mask_type="instances"))
    assert "hollow" in warning
    assert mask_warnings(*facts_of(disks(11), mask_type="instances")) == []  # touching cells enclose little


def test_a_folder_of_empty_masks_is_warned_about_where_it_is_not_refused():
    assert mask_warnings(*facts_of(np.zeros((9, 8), np.uint8))) == ["no mask has a cell"]


def grid_of_cells(side: int, cell: int) -> np.ndarray:
    """(side, side) int32: squares of cells without background, each with an id of its own."""
    rows, columns = np.indices((side, side)) // cell
    return (rows * (side // cell) + columns + 1).astype(np.int32)


def test_facts_about_regions_do_not_depend_on_how_many_rows_are_looked_at_together(monkeypatch):
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 9, (40, 30)), grid_of_cells(40, 4) * (rng.random((40, 40)) < 0.8), disks() * 3]
    whole = [mask_stats("m", mask) for mask in masks]
    for pixels in (1, 100, 777):
        monkeypatch.setattr("dataset.mask_facts.BAND_PIXELS", pixels)
        assert [mask_stats("m", mask) for mask in masks] == whole
    square = np.zeros((9, 9), np.uint8)
    square[1:5, 1:5], square[1:5, 5:8], square[7, 7] = 1, 2, 1  # touching; 1 also has a crumb
    facts = mask_stats("m", square)
    assert (facts.ids, facts.pairs, facts.unequal_pairs, facts.step_pairs) == (2, 24 + 4 + 17, 4, 4)
    assert (facts.area, facts.main_area) == (28 - 4 + 1, 12 + 12)  # the column of 1 that touches 2 is cut


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_mask_of_very_many_ids_takes_a_few_times_its_size(dtype):
    mask = grid_of_cells(1023, 3).astype(dtype)
    tracemalloc.start()
    assert mask_stats("m", mask).ids == 341 * 341
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * mask.nbytes  # with the part that is looked at together, which does not grow with the mask


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_noise_is_refused_before_it_takes_memory(dtype):
    noise = np.random.default_rng(0).permutation(1024 * 1024).astype(dtype).reshape(1024, 1024)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"^m.tif: has 1048576 values in 1048576 pixels, which cannot be cells or cla"):
        mask_stats("m.tif", noise)
    assert tracemalloc.get_traced_memory()[1] < 4 * noise.nbytes
    tracemalloc.stop()
    with pytest.raises(ValueError, match="has 1048576 values in 1048576 pixels, which cannot be cells"):
        labels_to_cells(noise)
    few = np.arange(900, dtype=np.int32).reshape(30, 30)
    assert mask_stats("m.tif", few).ids == 899  # a small file fits into any memory


def drawn(levels: tuple[int, ...], smooth: float = 0.0) -> np.ndarray:
    """(96, 96) uint8: disks of the given values apart from each other, smoothed by a Gaussian."""
    rows, columns = np.mgrid[:96, :96]
    mask = np.zeros((96, 96))
    for index, level in enumerate(levels):
        row, column = 16 + 32 * (index // 3), 16 + 32 * (index % 3)
        mask[(rows - row) ** 2 + (columns - column) ** 2 <= 90] = level
    return scipy.ndimage.gaussian_filter(mask, smooth).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("mask", "words", "absent"),
    [
        (drawn((255,) * 9, 0.7), r"Likely: two values with soft or JPEG edges", "display"),
        (
            drawn((255,) * 9, 4),
            r"Likely: gray probabilities .*, or cells with very soft edges \(mask_type=binary",
            "resize",
        ),
        (drawn(tuple(range(20, 200, 20)), 0.7), "Likely: numbers of classes or cells, blurred by a resize", "binary"),
        (drawn((127, 255) * 4, 0.7), "Likely: numbers of classes or cells, blurred by a resize", "binary"),
        (drawn((1, 3)), r"Likely: 3 classes whose numbers have gaps \(mask_values=\(0, 1, 3\)", "display"),
        (
            np.where(drawn((255,) * 4) > 0, 248, 0).astype(np.uint8) + (np.arange(96) % 8).astype(np.uint8),
            "Likely: two values with soft or JPEG edges",
            "display",
        ),
    ],
)
def test_soft_edges_and_blurred_numbers_are_told_apart(mask, words, absent):
    with pytest.raises(InputError, match=words) as caught:
        decide_mask_rule([mask_stats("a.png", mask)], 3 if mask.max() == 3 else 2, "auto", "masks")
    assert absent not in str(caught.value)


def test_very_soft_edges_that_are_cut_at_half_are_warned_about():
    stats = [mask_stats("a.png", drawn((255,) * 9, 4))]
    rule = decide_mask_rule(stats, 2, "binary", "masks")
    assert any("cells may shrink or vanish" in warning for warning in mask_warnings(stats, rule))
    sharp = [mask_stats("a.png", drawn((255,) * 9, 0.7))]
    assert mask_warnings(sharp, decide_mask_rule(sharp, 2, "binary", "masks")) == []
    with pytest.raises(InputError, match="cut at half, no cell would be left. Likely: gray probabilities"):
        decide_mask_rule([mask_stats("a.png", drawn((255,) * 9, 11))], 2, "binary", "masks")


def test_colour_tables_of_different_order_are_refused_for_classes_and_not_for_numbered_cells():
    tables = (
        "coloured 0:000000 1:ff0000 2:00ff00",
        "coloured 0:ff0000 1:000000 2:00ff00",
        "coloured 0:000000 1:00ff00",
    )
    classes = [mask_stats(f"{index}.png", drawn((1, 2)), table=table) for index, table in enumerate(tables)]
    with pytest.raises(InputError, match=r"different order: the colour ff0000 is 1 in 0.png and 0 in 1.png"):
        decide_mask_rule(classes[:2], 3, "auto", "masks")
    with pytest.raises(InputError, match="the colour 00ff00 is 2 in 0.png and 1 in 2.png"):
        decide_mask_rule([classes[0], classes[2]], 3, "auto", "masks", values=(0, 1, 2))
    other = mask_stats("b.png", drawn((1, 2)), table="coloured 0:000000 1:ff0000 2:0000ff")
    with pytest.raises(InputError, match="2 is the colour 00ff00 in 0.png and 0000ff in b.png"):
        decide_mask_rule([classes[0], other], 3, "auto", "masks")
    assert decide_mask_rule(classes, 2, "instances", "masks").mask_type == "instances"
    padded = mask_stats(
        "c.png", drawn((1, 2)), table="coloured 0:000000 1:ff0000 2:000000"
    )  # a table that tells nothing
    assert decide_mask_rule([classes[0], padded], 3, "auto", "masks").mask_type == "classes"


def test_a_class_that_a_smoothing_resize_made_is_warned_about():
    smooth = np.asarray(
        Image.fromarray(drawn((2,) * 9)).resize((48, 48), Image.BILINEAR).resize((96, 96), Image.BILINEAR)
    )
    sharp = drawn((2, 1, 2, 1, 2, 1, 2, 1, 2))
    for mask, warned in ((smooth, True), (sharp, False)):
        stats = [mask_stats("a.png", mask)]
        warnings = mask_warnings(stats, decide_mask_rule(stats, 3, "auto", "masks"))
        assert any("1 only forms thin rims" in warning for warning in warnings) == warned


def test_few_cells_with_numbers_that_are_read_as_classes_are_warned_about():
    def warnings(levels):
        stats = [mask_stats(f"{seed}.png", np.roll(drawn(levels), 9 * seed)) for seed in range(3)]
        return mask_warnings(stats, decide_mask_rule(stats, 3, "auto", "masks"))

    assert any("are these numbered cells?" in warning for warning in warnings((1, 2)))
    assert warnings((1, 2, 1, 2)) == []


def test_a_missing_background_and_masks_without_one_are_warned_about():
    stats = [mask_stats("a.png", drawn((1, 2)) + 1)]
    warning = mask_warnings(stats, decide_mask_rule(stats, 4, "auto", "masks"))[0]
    assert "put it first in mask_values=(1, 2, 3) num_classes=3" in warning
    stats = [*(mask_stats(f"{n}.png", drawn((255,) * n)) for n in range(1, 10)), mask_stats("b.png", drawn(()) + 255)]
    rule = decide_mask_rule(stats, 2, "auto", "masks")
    assert mask_warnings(stats, rule) == [
        "1 of 10 masks have no background: every pixel is a cell (as in b.png). Are the cells black on white?"
    ]


def test_a_stack_with_its_classes_in_the_last_axis_is_refused_for_sampling_too(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((40, 30, 3), np.float32))
    with pytest.raises(InputError, match="classes in the last axis"):
        read_mask(tmp_path / "a.npy")


def test_a_mask_under_most_names_is_warned_about_and_repeated_layouts_are_not():
    def warnings(copies):
        masks = [drawn((255,) * 5)] * copies + [np.roll(drawn((255,) * 4), 9 * seed) for seed in range(4)]
        stats = [mask_stats(f"{index}.png", mask) for index, mask in enumerate(masks)]
        return mask_warnings(stats, decide_mask_rule(stats, 2, "auto", "masks"))

    assert any("6 of 10 masks (as 0.png) are equal" in warning for warning in warnings(6))
    assert warnings(4) == []
