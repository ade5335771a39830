"""The practice loop: its two rules, its masks, its rounds and its advice, on drawn images with known faults."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_sets import Row, disk, paint, write_set
from PIL import Image
from scipy import ndimage
from script_helpers import call, state

import evaluate
import make_masks
import sample_ddp
import train
from common.cells import connected_cells, touches_border, without_gaps
from common.disk import file_sha256
from common.errors import InputError
from dataset.config import DataConfig
from dataset.files import encode_image, read_image
from dataset.mask_folder import MaskFolder
from dataset.views import center_view
from engine.checkpoint import save_checkpoint
from evaluation.experiments import cross_validation, practice_commands
from evaluation.experiments.cross_validation import Made, fold_of_mask, make_folds
from evaluation.experiments.instance_score import InstanceScore
from evaluation.experiments.label_split import SelectionSettings, make_selections
from evaluation.experiments.labelled import LabelledFolders, Named, real_pairs
from evaluation.experiments.leaks import find_leaks
from evaluation.experiments.practice import Practice
from evaluation.experiments.practice_folder import PracticeFolder
from evaluation.experiments.practice_masks import (
    LEAST_DENSITY,
    CellFiles,
    MaskPart,
    layout_statistics,
    merge_masks,
    on_whole_image,
    plan_parts,
    soft_mask,
    write_pseudo_masks,
)
from evaluation.experiments.practice_report import recommend, write_training_set
from evaluation.experiments.practice_rules import Scored, class_mean_losses, hardness, plan_draws, wrong_pixels
from evaluation.experiments.practice_settings import PracticeSettings, Unlabelled
from evaluation.experiments.segmenter import IGNORE, Segmenter, SegmenterConfig
from evaluation.experiments.sources import CopyPaste
from evaluation.experiments.trial_report import UNKNOWN
from evaluation.fidelity import LabelledImage
from layouts.recombine import read_origin, read_sources
from layouts.statistics import measure, summarize
from synthetic.manifest import write_manifest
from synthetic.reader import SampleSet

SIZE, CPU = 32, torch.device("cpu")
CONFIG = DataConfig(image_size=SIZE, crop="random")
COMMANDS = practice_commands.CommandTools


def cells_at(seed: int) -> np.ndarray:
    """Two or three disks, which do not touch."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((SIZE, SIZE), np.uint8)
    for row, column in ((8, 8), (23, 9), (15, 24))[: 2 + seed % 2]:
        cells[disk(SIZE, row + rng.uniform(-1, 1), column + rng.uniform(-1, 1), rng.uniform(3.5, 6))] = cells.max() + 1
    return cells


def noisy(cells: np.ndarray, seed: int, bright: int = 200) -> np.ndarray:
    noise = np.random.default_rng(1000 + seed).normal(0, 10, (*cells.shape, 1))
    return np.clip(paint(cells > 0, bright) + noise, 0, 255).astype(np.uint8)


class Brightness(torch.nn.Module):
    """A segmenter that knows only bright and dark: its losses can be told beforehand."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        level = images.mean(1) * 3
        return torch.stack([-level, level, level], dim=1)


# --- rules -----------------------------------------------------------------------------------------------------------


def test_ignored_are_exactly_the_pixels_that_were_drawn_wrongly():
    segmenter = Segmenter([Brightness()], CPU)

    def scored(image: np.ndarray, classes: np.ndarray) -> Scored:
        return Scored(segmenter.pixel_losses(image, classes), classes)

    real = [(cells_at(seed) > 0).astype(np.uint8) for seed in range(4)]
    means = class_mean_losses([scored(paint(classes > 0), classes) for classes in real], 2)
    cells = cells_at(9)
    image = paint(cells > 0)
    assert not wrong_pixels(scored(image, (cells > 0).astype(np.uint8)), means).any()
    missing, invented = cells == 1, disk(SIZE, 27, 27, 3)
    image[missing], image[invented] = 40, 200
    wrong = wrong_pixels(scored(image, (cells > 0).astype(np.uint8)), means)
    np.testing.assert_array_equal(wrong, missing | invented)


def test_mean_loss_is_that_of_each_class_and_nothing_is_wrong_in_a_class_without_pixels():
    losses, classes = np.array([[1.0, 3.0, 5.0, 9.0]]), np.array([[0, 0, 1, IGNORE]], np.uint8)
    means = class_mean_losses([Scored(losses, classes)], 3)
    assert means == [2.0, 5.0, float("inf")]
    image = Scored(np.array([[2.5, 2.6, 6.0, 6.5, 1e9, 1e9]]), np.array([[0, 0, 1, 1, 2, IGNORE]], np.uint8))
    assert wrong_pixels(image, means).tolist() == [[False, True, False, True, False, False]]


def test_hardest_are_exactly_the_faint_images_and_ignored_pixels_do_not_count():
    segmenter = Segmenter([Brightness()], CPU)
    found = {}
    for seed in range(8):
        classes = (cells_at(seed) > 0).astype(np.uint8)
        image = paint(classes > 0, cell=150 if seed in (2, 5) else 220)
        found[f"m{seed}"] = hardness(Scored(segmenter.pixel_losses(image, classes), classes))
    assert set(sorted(found, key=lambda name: -found[name])[:2]) == {"m2", "m5"}
    draws = plan_draws(found, most=20)
    assert max(draws.values()) == 20 and min(draws.values()) == 2 and draws["m2"] + draws["m5"] == 20 + 18
    hidden = Scored(np.array([[9.0, 1.0]]), np.array([[IGNORE, 1]], np.uint8))
    assert hardness(hidden) == 1 and hardness(Scored(hidden.losses, np.full((1, 2), IGNORE))) == 0


def test_easy_masks_are_drawn_once_and_the_hardest_most_often():
    draws = plan_draws({f"m{number:03d}": float(number) for number in range(100)}, most=20)
    assert draws["m000"] == draws["m006"] == 1 and draws["m050"] == 10 and draws["m099"] == 20
    assert set(plan_draws({"a": 1.0, "b": 1.0}, most=1).values()) == {1}


# --- cross-validation and advice -------------------------------------------------------------------------------------


def test_every_image_is_held_out_once_and_a_mask_stays_in_its_fold():
    labels = np.zeros((4, 4), np.uint8)
    pairs = [Named(f"n{number}", LabelledImage(labels[..., None], labels, labels)) for number in range(7)]
    folds = make_folds(pairs, 3, seed=0)
    held = [one.name for fold in folds for one in fold.held_out]
    assert sorted(held) == [one.name for one in pairs]
    for fold in folds:
        assert {one.name for one in fold.train} == {one.name for one in pairs} - {one.name for one in fold.held_out}
    assert len(make_folds(pairs[:2], 3, 0)) == 2 and {fold_of_mask(f"m{n}", 3, 0) for n in range(30)} == {0, 1, 2}
    with pytest.raises(InputError, match="needs two or more"):
        make_folds(pairs[:1], 3, 0)


def test_images_of_a_held_out_mask_are_held_out_with_it(monkeypatch):
    """The masks of labelled images are drawn, too. A fold once trained on images of the masks that it is scored on."""
    seen = []
    monkeypatch.setattr(cross_validation, "train_segmenter", lambda phases, *_: seen.append(phases[0].sources))
    monkeypatch.setattr(cross_validation, "score_segmenter", lambda *_: (None, None))
    monkeypatch.setattr(cross_validation, "Segmenter", lambda *_: SimpleNamespace(pixel_losses=lambda *_: None))
    monkeypatch.setattr(cross_validation, "hardness", lambda *_: 0.0)
    item = LabelledImage(*(np.zeros(shape, np.uint8) for shape in ((4, 4, 1), (4, 4), (4, 4))))
    pairs = [Named(f"n{number}", item._replace(cells=np.full((4, 4), number))) for number in range(9)]
    made = [Made(one.name, f"labelled_{one.name}", one.item) for one in pairs]
    config = SegmenterConfig(num_classes=2, channels=1, crop=4, steps=1)
    for fold in make_folds(pairs, 3, seed=0):
        _, result = cross_validation.run_fold(fold, 3, made, config, CPU)
        (real, _), (synthetic, _) = seen.pop()
        held = {f"labelled_{one.name}" for one in fold.held_out}
        assert set(result.hardness) == held
        assert len(synthetic) == len(real) == 9 - len(held)


def test_an_image_under_two_names_is_held_out_with_its_copy():
    cells = [cells_at(seed) for seed in range(6)]
    items = [LabelledImage(noisy(one, seed), (one > 0).astype(np.uint8), one) for seed, one in enumerate(cells)]
    brighter = [item._replace(image=item.image // 2 + 20) for item in items]
    pairs = [Named(f"n{number}", item) for number, item in enumerate([*items, *items[:2], *brighter[2:4]])]
    for seed in range(3):
        for fold in make_folds(pairs, 3, seed):
            shown = [{int(one.name[1:]) % 6 for one in part} for part in (fold.train, fold.held_out)]
            assert not shown[0] & shown[1] and len(fold.train) + len(fold.held_out) == 10 and fold.held_out


def results(values: list[float | None]) -> list[dict]:
    scores = [InstanceScore(value, value, value, None, value, value, [value]) for value in values]
    return [{"fold": number, "score": asdict(one), "hardness": {}} for number, one in enumerate(scores)]


def test_synthetic_images_are_recommended_only_if_they_gain_more_than_two_errors():
    real = results([0.4, 0.5, 0.6])
    good = recommend({"real": real, "round 0": results([0.45, 0.56, 0.66]), "round 1": results([0.5, 0.62, 0.7])})
    assert good["use"] and good["variant"] == "round 1" and good["gain"] == pytest.approx(0.32 / 3)
    unsure = recommend({"real": real, "round 0": results([0.44, 0.5, 0.65])})  # 0.030 ± 0.0153: 1.96 errors
    assert not unsure["use"] and "do not show a smaller one" in unsure["reason"]
    worse = recommend({"real": real, "round 0, nothing ignored": results([0.1, 0.2, 0.1])})
    assert not worse["use"] and worse["gain"] < 0 and "harm here" in worse["reason"]
    unknown = recommend({"real": results([None]), "round 0": results([None])})
    assert not unknown["use"] and unknown["verdict"] == UNKNOWN


# --- masks -----------------------------------------------------------------------------------------------------------


def test_layouts_follow_the_density_sizes_and_touching_of_what_was_counted(tmp_path):
    small = [connected_cells(cells_at(seed) > 0) for seed in range(6)]
    large = [np.kron(one, np.ones((2, 2), int)) for one in small]
    same, twice = layout_statistics(small, small, SIZE), layout_statistics(large, small, 2 * SIZE)
    assert same.scale == pytest.approx(1) and twice.scale == pytest.approx(2, rel=0.05)
    assert twice.diameter == pytest.approx(2 * same.diameter, rel=0.02) and same.touching == 0
    shares = [float((one > 0).mean()) for one in small]
    assert min(shares) <= same.densities[0] <= same.densities[-1] <= max(shares)
    parts = plan_parts(same, 10, 0.4, SIZE)
    assert sum(part.count for part in parts) == 10
    assert sum(part.count for part in parts if part.kind == "simulate") == 4
    assert not any(part.values.get("touching") for part in parts)
    assert layout_statistics([np.zeros((9, 9), int)], small, SIZE) is None
    sparse = replace(same, densities=(3.4e-5,) * len(same.densities))
    assert {part.values["density"] for part in plan_parts(sparse, 10, 0.4, SIZE)} == {3.4e-5}


def test_sizes_of_layouts_are_not_smaller_because_borders_cut_large_cells():
    rng, side, maps = np.random.default_rng(0), 48, []
    for _ in range(300):  # a window on a plane with as many large cells as small ones
        cells, placed = np.zeros((3 * side, 3 * side), int), 0
        while placed < 6:
            cell = disk(3 * side, *rng.uniform(16, 3 * side - 16, 2), (4, 14)[placed % 2])
            if not cells[cell].any():
                placed += 1
                cells[cell] = placed
        maps.append(without_gaps(cells[side : 2 * side, side : 2 * side]))
    found = layout_statistics(maps, [connected_cells(disk(48, 24, 24, 9))], side)
    assert found is not None and found.diameter == pytest.approx(18, rel=0.07)
    assert found.size_spread == pytest.approx(10 / 18, rel=0.07)


def test_cells_of_resized_images_have_the_size_that_the_generator_sees(data, tmp_path):
    for kind in ("images", "masks", "instances"):
        (tmp_path / kind).mkdir()
        for number, path in enumerate(sorted((data / kind).iterdir())):
            factor = (1, 4, 6)[number % 3]  # a microscope's images may differ in size
            ones = np.ones((factor, factor) if kind != "images" else (factor, factor, 1), np.uint8)
            large = np.kron(np.asarray(Image.open(path)), ones)
            Image.fromarray(large).save(tmp_path / kind / path.name)
    folders = LabelledFolders(tmp_path / "images", tmp_path / "masks", tmp_path / "instances")
    settings = PracticeSettings(masks=8, simulated_share=0.0, steps=2, folds=2, crop=16)
    drawing = Drawing(config=DataConfig(image_size=SIZE, crop="center"))
    (tmp_path / "out").mkdir()
    run = Practice(folders, None, settings, drawing, tmp_path / "out", CPU)
    run._train_generators()
    _, statistics = run.make_masks()
    assert statistics is not None and statistics.scale == pytest.approx(1, rel=0.05)
    made = [np.asarray(Image.open(path)) for path in (tmp_path / "out" / "masks" / "instances").iterdir()]
    summary = summarize(measure(one) for one in made)
    real = summarize(measure(connected_cells(cells_at(seed) > 0)) for seed in range(6))
    name = "cell diameter in pixels, mean"
    assert summary[name] == pytest.approx(real[name], rel=0.15)


def class_pairs(data: Path, folder: Path) -> LabelledFolders:
    """The labelled pairs, with the classes 0 background, 1 and 2 in the left and right half of each cell."""
    (folder / "classes").mkdir()
    for path in (data / "instances").iterdir():
        cells = np.asarray(Image.open(path))
        classes = np.zeros(cells.shape, np.uint8)
        for number, box in enumerate(ndimage.find_objects(cells), start=1):
            columns = np.arange(cells.shape[1])[None] - (box[1].start + box[1].stop) // 2
            classes[cells == number] = (1 + (columns > 0) * np.ones((SIZE, 1), int))[cells == number]
        Image.fromarray(classes).save(folder / "classes" / path.name)
    return LabelledFolders(data / "images", folder / "classes")


@pytest.mark.parametrize(("share", "pseudo", "simulated"), [(None, 4, None), (1.0, 4, None), (0.0, 0, 0.5)])
def test_masks_of_classes_are_recombined_with_their_classes(data, tmp_path, caplog, share, pseudo, simulated):
    folders = class_pairs(data, tmp_path)
    settings = PracticeSettings(masks=8, steps=60, folds=2, crop=16, pseudo_share=share, simulated_share=simulated)
    drawing = Drawing(config=DataConfig(image_size=SIZE, crop="center", num_classes=3))
    run = Practice(folders, data / "unlabelled", settings, drawing, tmp_path / "out", CPU)
    (tmp_path / "out").mkdir()
    run.seen = []
    run._train_generators()
    kinds, statistics = run.make_masks()
    counts = Counter(kind.partition("_")[0] for kind in kinds.values())
    layouts = 0 if share == 1 else 8 - pseudo
    assert counts == {"labelled": 6} | ({"recombine": layouts} if layouts else {}) | (
        {"pseudo": pseudo} if pseudo else {}
    )
    assert (statistics is None) == (share == 1)
    assert ("no masks are simulated" in caplog.text) == (simulated is not None)
    for path in (tmp_path / "out" / "masks" / "instances").iterdir():
        if path.name.startswith("recombine"):
            classes = np.asarray(Image.open(path))
            assert set(np.unique(classes)) <= {0, 1, 2}


@pytest.mark.parametrize("crop", ["center", "random"])
def test_masks_of_classes_without_a_background_of_0_give_no_new_layouts(data, tmp_path, caplog, crop):
    folders = class_pairs(data, tmp_path)
    for path in list(folders.masks.iterdir()):
        Image.fromarray(np.array([255, 80, 0], np.uint8)[np.asarray(Image.open(path))]).save(path)
    config = DataConfig(image_size=SIZE, crop=crop, num_classes=3, mask_values=(255, 80, 0))
    settings = PracticeSettings(masks=8, steps=2, folds=2, crop=16)
    run = Practice(folders, None, settings, Drawing(config=config), tmp_path / "out", CPU)
    (tmp_path / "out").mkdir()
    run._train_generators()
    kinds, statistics = run.make_masks()
    assert set(kinds.values()) == {"labelled"} and statistics is None
    assert "no new layouts are made: they need masks of class ids" in caplog.text


def test_new_masks_of_images_of_single_cells_hold_one_in_the_middle(tmp_path):
    for kind in ("images", "classes"):
        (tmp_path / kind).mkdir()
    for number in range(4):
        classes = np.zeros((40, 48), np.uint8)
        rows, columns = np.mgrid[:40, :48]
        distance = np.hypot(rows - 20, columns - 24)
        classes[distance < 9 + number], classes[distance < 4] = 1, 2
        Image.fromarray(classes).save(tmp_path / "classes" / f"c{number}.png")
        Image.fromarray(paint(classes > 0)).save(tmp_path / "images" / f"c{number}.png")
    drawing = Drawing(config=DataConfig(image_size=SIZE, crop="center", num_classes=3))
    folders = LabelledFolders(tmp_path / "images", tmp_path / "classes")
    run = Practice(folders, None, PracticeSettings(masks=6, steps=2, folds=2, crop=16), drawing, tmp_path / "out", CPU)
    (tmp_path / "out").mkdir()
    run._train_generators()
    kinds, _ = run.make_masks()
    assert Counter(kinds.values()) == {"labelled": 4, "recombine_0": 6}
    for path in (tmp_path / "out" / "masks" / "instances").glob("recombine*"):
        classes = np.asarray(Image.open(path))
        assert set(np.unique(classes)) == {0, 1, 2} and connected_cells(classes).max() == 1
        assert np.abs(np.array(ndimage.center_of_mass(classes > 0)) - (SIZE - 1) / 2).max() < 3
        assert not len(touches_border(classes))


def test_masks_of_classes_without_whole_cells_are_the_labelled_ones_and_segmentations(data, tmp_path, caplog):
    (tmp_path / "regions").mkdir()
    for path in (data / "masks").iterdir():
        halves = np.repeat(np.array([1, 2], np.uint8), SIZE // 2)[None].repeat(SIZE, 0)
        Image.fromarray(halves).save(tmp_path / "regions" / path.name)
    settings = PracticeSettings(masks=8, steps=2, folds=2, crop=16)
    drawing = Drawing(config=DataConfig(image_size=SIZE, crop="random", num_classes=3))
    folders = LabelledFolders(data / "images", tmp_path / "regions")
    run = Practice(folders, None, settings, drawing, tmp_path / "out", CPU)
    (tmp_path / "out").mkdir()
    run._train_generators()
    kinds, statistics = run.make_masks()
    assert set(kinds.values()) == {"labelled"} and statistics is None
    assert "too few whole cells, so no new layouts" in caplog.text


def test_layouts_of_sparse_cells_are_sparse():
    field = np.zeros((512, 512), int)
    for number in range(3):
        field[200 * number : 200 * number + 14, 100:114] = number + 1
    found = layout_statistics([field] * 7, [field], 256)
    assert found is not None and 0 < found.densities[0] <= found.densities[-1] < LEAST_DENSITY


def test_soft_masks_sum_to_one_have_boundaries_and_fit_their_image():
    rng = np.random.default_rng(0)
    odds = rng.random((3, 20, 30))
    soft = soft_mask(odds / odds.sum(0), np.zeros((20, 30)), 3)
    assert soft.dtype == np.uint8 and (soft.sum(0, dtype=int) == 255).all()
    np.testing.assert_allclose(soft / 255, odds / odds.sum(0), atol=0.009)
    cell, interior = np.zeros((20, 30)), np.zeros((20, 30))
    cell[5:15, 5:25], interior[7:13, 7:13], interior[7:13, 17:23] = 0.8, 1, 1  # two cells that touch
    soft = soft_mask(np.stack([1 - cell, cell]), interior, 3)
    touching = np.argwhere(soft[2] > 0)
    assert (soft.sum(0, dtype=int) == 255).all() and (soft[0] == np.where(cell > 0, 51, 255)).all()
    assert set(touching[:, 1]) == {14, 15} and set(touching[:, 0]) == set(range(5, 15))
    config = DataConfig(image_size=16, crop="center", num_classes=3)
    square = np.stack([255 - cell[2:18, 4:20] * 255, cell[2:18, 4:20] * 255, 0 * cell[2:18, 4:20]]).astype(np.uint8)
    whole = on_whole_image(square, (32, 48), config)
    assert whole.shape == (3, 32, 48) and (whole[0][:, :8] == 255).all() and (whole[0][:, 40:] == 255).all()
    np.testing.assert_array_equal(center_view(32, 48, 16).apply_probabilities(whole), square)
    np.testing.assert_array_equal(on_whole_image(soft, (20, 30), CONFIG), soft)


def write_pair(folder: Path, name: str, seed: int) -> None:
    cells = cells_at(seed)
    arrays = {"images": noisy(cells, seed), "masks": np.where(cells, 255, 0).astype(np.uint8), "instances": cells}
    for kind, array in arrays.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / kind / f"{name}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six labelled pairs with instances, and four images without labels."""
    folder = tmp_path_factory.mktemp("data")
    for seed in range(6):
        write_pair(folder, f"real_{seed}", seed)
    (folder / "unlabelled").mkdir()
    for seed in range(50, 54):
        Image.fromarray(noisy(cells_at(seed), seed)).save(folder / "unlabelled" / f"new_{seed}.png")
    return folder


def test_merged_masks_are_no_leak_if_every_part_knows_the_selection_only(data, tmp_path):
    settings = SelectionSettings([2], selections=1, test_share=0.2)
    folders = (data / "images", data / "masks")
    plan = make_selections(tmp_path / "split", folders, settings, instance_dir=data / "instances")[0]
    own = [file_sha256(path) for path in (plan.part(2) / "images").iterdir()]
    other = [file_sha256(path) for path in (plan.part(2) / "unlabelled" / "images").iterdir()]
    call(make_masks, "recombine", "--instances", plan.part(2) / "instances", "--count", 2, "--output", tmp_path / "mix")
    call(make_masks, "simulate", "--image-size", SIZE, "--cell-size", 8, "--count", 2, "--output", tmp_path / "sim")
    for name, seen in (("good", own), ("bad", own + other[:1])):
        write_pseudo_masks([("u", cells_at(77))], seen, SIZE, 5, tmp_path / name / "pseudo")
        kinds = merge_masks([tmp_path / "mix", tmp_path / "sim", tmp_path / name / "pseudo"], tmp_path / name / "all")
        assert sorted(set(kinds.values())) == ["mix", "pseudo", "sim"] and len(kinds) == 5
        masks = tmp_path / name / "all" / "instances"
        samples = drawn_set(tmp_path / name / "set", masks, CONFIG, own)
        leaks = find_leaks(plan, 2, samples)
        assert bool(leaks) == (name == "bad")
    assert "the segmenter of its masks was trained on 1 images outside" in leaks[0]


def test_pseudo_masks_show_cells_whatever_values_the_files_store(tmp_path):
    classes = np.zeros((16, 32), np.uint8)
    classes[4:8, 20:24], classes[10:14, 24:28] = 1, 2
    assert write_pseudo_masks([("u", classes)], [], 16, 5, tmp_path / "p", stored=(255, 0, 128)) == 1
    written = np.asarray(Image.open(tmp_path / "p" / "instances" / "u.png"))
    np.testing.assert_array_equal(written, np.array([255, 0, 128])[classes[:, 16:]])


# --- the loop --------------------------------------------------------------------------------------------------------


def drawn_set(folder: Path, masks: Path, config: DataConfig, trained_on: list[str], shift: int = 0) -> SampleSet:
    """A set of images that follow their masks, or with ``shift`` the masks of other images."""
    paths = sorted(masks.iterdir())
    labels = [np.array(Image.open(path)) for path in paths]
    images = [noisy(label, 500 + number) for number, label in enumerate(labels)]
    images = images[shift:] + images[:shift]
    rule = {"mask_type": "instances", "num_classes": 2, "maximum": 1.0, "reason": "drawn"}
    rows = [Row(label, image, mask_type="instances") for label, image in zip(labels, images, strict=True)]
    write_set(folder, rows, config, trained_on=trained_on, mask_rule=rule, mask_origin=read_origin(masks))
    renamed = []
    for sample, path in zip(SampleSet(folder).samples, paths, strict=True):
        names = {"image": f"images/{path.stem}.png", "label": f"masks/{path.stem}.png"}
        (folder / sample.columns["image"]).rename(folder / names["image"])
        (folder / sample.columns["label"]).rename(folder / names["label"])
        renamed.append(sample.columns | names | {"source_mask": str(path), "source_mask_sha256": file_sha256(path)})
    write_manifest(folder, [row | {"ckpt_sha256": "c"} for row in renamed])
    return SampleSet(folder)


class Drawing:
    """A generator that is a drawing: faithful, or with ``shift`` one that draws the masks of other images."""

    def __init__(self, shift: int = 0, config: DataConfig = CONFIG) -> None:
        self.shift, self.config = shift, config
        self.calls: list = []
        self.settings: dict = {}

    def told(self, train_flags: list[str], sample_flags: list[str], device: str) -> Drawing:
        self.settings = COMMANDS(train_flags, sample_flags, device).settings
        return self

    def train(self, folders: LabelledFolders, unlabelled: Unlabelled, run: Path, steps: int | None = None) -> Path:
        self.calls.append("train" if steps is None else f"train {steps}")
        self.unlabelled = unlabelled
        self.seen = [file_sha256(path) for path in sorted(folders.images.iterdir())]
        made = state(1)
        made["config"]["data"] = self.config.to_dict()
        path = run / "checkpoints" / "0000001.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, made)
        return path

    def make_masks(self, part: MaskPart, cells: CellFiles, side: int, seed: int, output: Path) -> None:
        self.calls.append(part.kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(practice_commands, "_run", lambda script, *words: call(make_masks, *words))
            COMMANDS([], [], "cpu").make_masks(part, cells, side, seed, output)

    def sample(self, checkpoint: Path, masks: Path, mask_type: str, seed: int, output: Path) -> None:
        self.calls.append("sample")
        if not output.exists():
            drawn_set(output, masks, CONFIG, self.seen, self.shift)


def practise(monkeypatch, data: Path, output: Path, drawing: Drawing, *words: object) -> dict:
    """``evaluate.py practise`` with a drawing in place of the generator."""
    monkeypatch.setattr(practice_commands, "CommandTools", drawing.told)
    call(evaluate, "practise", "--data-path", data / "images", "--mask-path", data / "masks", "--instances",
         data / "instances", "--unlabelled-path", data / "unlabelled", "--output", output, "--device", "cpu",
         *words)  # fmt: skip
    return json.loads((output / "practice.json").read_text())


SHORT = ["--steps", 2, "--folds", 2, "--masks", 8, "--most-rounds", 1, "--most-draws", 3, "--square", 16]


def test_command_makes_masks_rounds_reasons_sets_and_a_page_and_continues(monkeypatch, data, tmp_path, capsys):
    # two steps teach nothing: synthetic images shall be better than none, and round 1 no better than round 0
    monkeypatch.setattr("evaluation.experiments.practice._mean_ap", lambda results: float(bool(results[0].hardness)))
    output, drawing = tmp_path / "out", Drawing()
    content = practise(monkeypatch, data, output, drawing, *SHORT)
    printed = capsys.readouterr().out
    assert "Recommendation: do not use synthetic images" in printed and "--pretrained_model" in printed
    assert "--no_norm --min_train_masks 1" in printed
    assert set(content["results"]) == {"real", "round 0, nothing ignored", "round 0", "round 1"}
    assert "Rounds ended: round 1 is not better than round 0." in printed
    first, second = content["rounds"]
    assert first["images"] == 8 and set(first["draws"].values()) == {1}
    assert sorted(second["hardness"]) == sorted(first["draws"]) and second["images"] == sum(second["draws"].values())
    hardest = max(second["hardness"], key=second["hardness"].get)
    assert second["draws"][hardest] == 2  # three draws in all, one of them in round 0
    rows = list(csv.DictReader((output / "why.csv").open()))
    assert len(rows) == first["images"] + second["images"] and rows[0]["why"] == "round 0 draws every mask once"
    assert "mask 1 of 8 by loss, drawn 2 times more" in {row["why"] for row in rows}
    real, both = (output / "training_sets" / name for name in ("real", "real_and_synthetic"))
    assert len(list((real / "images").iterdir())) == 6 and len(list((real / "cellpose").iterdir())) == 12
    assert len(list((both / "images").iterdir())) > 6
    assert "data:image/png" in (output / "practice.html").read_text()
    made = PracticeFolder(output)
    assert len(made.images(2, ignore=False, practise=False)) == 8
    assert len(made.images(2, ignore=True, practise=True)) == len(rows)
    assert all(IGNORE not in item.classes for item in made.images(2, ignore=False, practise=True))
    before = {path: path.stat().st_mtime_ns for path in (output / "scores").iterdir()}
    assert practise(monkeypatch, data, output, drawing, *SHORT) == content
    assert before == {path: path.stat().st_mtime_ns for path in (output / "scores").iterdir()}
    masks = MaskFolder(drawing.unlabelled.masks, CONFIG, "probability", data / "unlabelled", whole_scale=1.0)
    assert len(masks.names) == 4 and masks.load(masks.names[0]).prob_map.shape == (2, SIZE, SIZE)
    own = sorted(file_sha256(path) for path in (data / "images").iterdir())
    assert sorted(read_origin(drawing.unlabelled.masks)["segmenter_images_sha256"]) == own
    assert drawing.calls[:2] == ["train 1", "train"]
    assert sorted(path.name for path in (output / "segmenters").iterdir()) == ["all_real.pt", "real_0.pt", "real_1.pt"]
    assert drawing.calls.count("recombine") == 4 and drawing.calls.count("simulate") == 2
    with pytest.raises(InputError, match="other settings"):
        practise(monkeypatch, data, output, drawing, *SHORT, "--masks", 9)


def test_a_stopped_run_neither_counts_as_finished_nor_spoils_a_finished_one(monkeypatch, data, tmp_path):
    words = [*SHORT[:4], "--masks", 2, "--most-rounds", 0, "--square", 16]

    def stop(practice: Practice, variant: str, made: list) -> list:
        if variant != "real":
            raise KeyboardInterrupt
        return score(practice, variant, made)

    score, content = Practice.cross_validate, {}
    for finished in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(Practice, "cross_validate", stop)
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                practise(patch, data, tmp_path / "out", Drawing(), *words)
        if finished:
            assert json.loads((tmp_path / "out" / "practice.json").read_text()) == content
        else:
            assert not (tmp_path / "out" / "practice.json").exists()
            content = practise(monkeypatch, data, tmp_path / "out", Drawing(), *words)
    earlier = {name: value for name, value in content.items() if name != "results"}
    (tmp_path / "out" / "practice.json").write_text(json.dumps(earlier))
    with pytest.raises(InputError, match="out is not finished: run the same evaluate.py practise again$"):
        PracticeFolder(tmp_path / "out")


@pytest.mark.parametrize("kind", ["images", "masks", "instances", "unlabelled"])
def test_a_folder_is_not_continued_with_corrected_files(monkeypatch, data, tmp_path, kind):
    words = [*SHORT[:4], "--masks", 2, "--most-rounds", 0, "--square", 16]
    own = tmp_path / "data"
    shutil.copytree(data, own)
    practise(monkeypatch, own, tmp_path / "out", Drawing(), *words)
    path = sorted((own / kind).iterdir())[0]
    array = np.array(Image.open(path))
    array[:2, :2] = 0 if array[0, 0].any() else 255
    Image.fromarray(array).save(path)
    what = {"images": "labelled images", "unlabelled": "unlabelled images"}.get(kind, kind)
    drawing = Drawing()
    with pytest.raises(InputError, match=f"was begun with other {what}. Its segmenters and scores do not belong"):
        practise(monkeypatch, own, tmp_path / "out", drawing, *words)
    assert drawing.calls == []


def test_a_folder_is_not_continued_with_other_flags_or_from_an_earlier_version(monkeypatch, data, tmp_path):
    words = [*SHORT[:4], "--masks", 2, "--most-rounds", 0, "--square", 16]
    out, drawing = tmp_path / "out", Drawing()
    first = practise(monkeypatch, data, out, drawing, *words)
    for flags in (["--train-flags", "--lr 1"], ["--sample-flags", "--cfg-scale 3"]):
        with pytest.raises(InputError, match=f"{flags[0][2:].replace('-', '_')} .* name another folder"):
            practise(monkeypatch, data, out, Drawing(), *words, *flags)
    assert practise(monkeypatch, data, out, drawing, *words) == first
    settings = json.loads((out / "settings.json").read_text())
    names = ("masks_sha256", "instances_sha256", "unlabelled_sha256", "train_flags", "sample_flags")
    earlier = {name: value for name, value in settings.items() if name not in names}
    (out / "settings.json").write_text(json.dumps(earlier))
    with pytest.raises(InputError, match="was begun by an earlier version. It did not note masks"):
        practise(monkeypatch, data, out, Drawing(), *words)
    assert json.loads((out / "settings.json").read_text()) == earlier
    assert len(PracticeFolder(out).images(2, ignore=False, practise=False)) == 2  # its set can be used


def test_generator_may_train_on_unlabelled_images_without_pseudo_masks(data, tmp_path):
    drawing = Drawing()
    folders, settings = LabelledFolders(data / "images", data / "masks"), PracticeSettings(pseudo_masks=False)
    Practice(folders, data / "unlabelled", settings, drawing, tmp_path, CPU)._train_generators()
    assert drawing.calls == ["train"] and drawing.unlabelled == Unlabelled(data / "unlabelled", None)
    assert not (tmp_path / "pseudo_masks").exists()


def test_next_generator_gets_the_pseudo_masks_of_a_segmenter_of_the_first_ones_images(monkeypatch, data, tmp_path):
    words = ["--steps", 2, "--folds", 2, "--masks", 4, "--most-rounds", 0, "--square", 16]
    drawing = Drawing()
    practise(monkeypatch, data, tmp_path / "out", drawing, *words, "--generators", 2)
    trained = [call for call in drawing.calls if call.startswith(("train", "sample"))]
    assert trained == ["train 1", "train", "sample", "train", "sample"]
    assert drawing.unlabelled.masks == tmp_path / "out" / "pseudo_masks_1" / "masks"
    own = sorted(file_sha256(path) for path in (data / "images").iterdir())
    assert sorted(read_origin(drawing.unlabelled.masks)["segmenter_images_sha256"]) == own
    name = sorted(path.name for path in drawing.unlabelled.masks.iterdir())[0]
    first, second = (np.load(tmp_path / "out" / folder / "masks" / name)["mask"]
                     for folder in ("pseudo_masks", "pseudo_masks_1"))  # fmt: skip
    assert first.shape == second.shape and not np.array_equal(first, second)
    with pytest.raises(InputError, match="need unlabelled images with pseudo-masks"):
        practise(monkeypatch, data, tmp_path / "no", Drawing(), *words, "--generators", 2, "--no-pseudo-masks")


def test_rounds_end_and_the_page_says_so_if_synthetic_images_do_not_help(monkeypatch, data, tmp_path, capsys):
    monkeypatch.setattr("evaluation.experiments.practice._mean_ap", lambda results: 0.5)
    content = practise(monkeypatch, data, tmp_path / "out", Drawing(), *SHORT[:4], "--masks", 2, "--square", 16)
    assert [one["round"] for one in content["rounds"]] == [0] and not content["recommended"]["use"]
    printed, page = capsys.readouterr().out, (tmp_path / "out" / "practice.html").read_text()
    for text in (printed, page):
        assert "Recommendation: do not use synthetic images" in text
        assert "Rounds ended: round 0 is not better than real images alone." in text


def test_stored_values_of_classes_reach_the_generator_and_are_refused_for_cells(monkeypatch, data, tmp_path):
    words = ["practise", "--data-path", data / "images", "--mask-path", data / "masks", "--output", tmp_path / "out"]
    given = []
    monkeypatch.setattr(practice_commands, "CommandTools", lambda *told: given.append(told[:2]) or sys.exit(0))
    with pytest.raises(SystemExit):
        call(evaluate, *words, "--mask-values", 0, 128, 255, "--train-flags", "--seed 3")
    assert given[0][0] == ["--seed", "3", "--mask-values", "0", "128", "255"]
    with pytest.raises(SystemExit):
        call(evaluate, *words, "--mask-values", 0, 128, 255)
    assert given[1][0][-6:] == ["--num-classes", "3", "--mask-values", "0", "128", "255"]
    for more in (["--mask-values", 0, 255], ["--mask-values", 0, 1, 2, "--instances", data / "instances"]):
        with pytest.raises(InputError, match="three or more classes without --instances"):
            call(evaluate, *words, *more)


def test_without_flags_the_measured_ones_fit_what_is_there(monkeypatch, data, tmp_path):
    words = ["practise", "--data-path", data / "images", "--mask-path", data / "masks", "--output", tmp_path / "out"]
    given = []
    monkeypatch.setattr(practice_commands, "CommandTools", lambda *told: given.append(told[:2]) or sys.exit(0))
    for more in ([], ["--instances", data / "instances", "--unlabelled-path", data / "unlabelled"]):
        with pytest.raises(SystemExit):
            call(evaluate, *words, *more)
    paths = ["--data-path", "images", "--mask-path", "masks"]
    plain, both = (train.parse_args([*paths, *flags, "--look", "reference"]) for flags, _ in given)
    assert (plain.vae, plain.max_steps, plain.num_classes, plain.in_channels) == ("none", 2000, 2, 3)
    assert (both.num_classes, both.unlabelled_share) == (3, 0.5)
    for few in (["utility", tmp_path], words):
        assert evaluate.parse_args([*map(str, few)]).steps == SegmenterConfig.steps
    sampling = sample_ddp.parse_args(["ODE", "--ckpt", "a.pt", "--mask-path", "masks", *given[0][1]])
    assert (sampling.cfg_scale, sampling.sampling_method, sampling.num_sampling_steps) == (1.5, "ab2", 16)


def test_masks_that_hold_an_id_per_cell_are_the_instances(monkeypatch, data, tmp_path):
    given = []
    monkeypatch.setattr(practice_commands, "CommandTools", lambda *told: given.append(told[:2]) or sys.exit(0))
    words = ["practise", "--data-path", data / "images", "--output", tmp_path / "out", "--mask-path"]
    given_type = [data / "instances", "--mask-type", "instances"]
    for more in (given_type, [data / "masks"], [*given_type, "--train-flags=--num-classes=3"]):
        with pytest.raises(SystemExit):
            call(evaluate, *words, *more)
    assert ["--num-classes" in flags for flags, _ in given] == [True, False, False]
    ids, binary = (LabelledFolders(data / "images", folder) for folder in (tmp_path / "ids", data / "masks"))
    ids.masks.mkdir()
    many = np.arange(1, 17, dtype=np.uint8).reshape(4, 4).repeat(SIZE // 4, 0).repeat(SIZE // 4, 1)
    for path in ids.images.iterdir():  # many cells: the type is clear
        Image.fromarray(many).save(ids.masks / f"{path.stem}.png")
    assert ids.with_ids_of_masks(2).instances == ids.with_ids_of_masks(3).instances == ids.masks
    assert binary.with_ids_of_masks(2) == binary
    assert binary._replace(instances=data / "instances").with_ids_of_masks(2).instances == data / "instances"


def test_labels_pair_by_the_names_that_training_takes(data, tmp_path):
    shared, cells = tmp_path / "shared", tmp_path / "cells"
    shared.mkdir(), cells.mkdir()
    for seed in range(2):
        Image.open(data / "images" / f"real_{seed}.png").save(shared / f"a{seed}.png")
        for folder in (shared, cells):
            Image.open(data / "instances" / f"real_{seed}.png").save(folder / f"a{seed}_masks.png")
    (tmp_path / "images").mkdir()
    for path in shared.glob("a?.png"):
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    kinds = [(shared, shared, None), (tmp_path / "images", cells, None), (shared, shared, cells)]
    for images, masks, instances in kinds:
        folders = LabelledFolders(images, masks, instances, "instances").with_ids_of_masks(2)
        folders.check_instances()
        found = real_pairs(folders, CONFIG, 2)
        assert [pair.name for pair in found] == ["a0", "a1"] and folders.instances in (shared, cells)
        for seed, pair in enumerate(found):
            np.testing.assert_array_equal(pair.item.cells, cells_at(seed))
        assert list(read_sources(folders.instances, components=False)) == ["a0_masks", "a1_masks"]


@pytest.mark.parametrize(
    "fault, words",
    [
        ("names", "1 images of .* have no file in .*: real_0"),
        ("size", "are its rows and columns swapped"),
        ("planes", "is no label image"),
        ("classes", r"real_0.png \(2\).*With instances, masks hold cell and background"),
    ],
)
def test_labels_are_refused_before_anything_is_trained(monkeypatch, data, tmp_path, fault, words):
    own, drawing = tmp_path / "own", Drawing()
    more = ["--mask-type", "classes"] if fault == "classes" else []
    shutil.copytree(data, own)
    cells, masks = own / "instances" / "real_0.png", own / "masks" / "real_0.png"
    if fault == "names":
        cells.rename(cells.with_name("other.png"))
    elif fault == "size":
        for kind in ("images", "masks"):
            Image.fromarray(np.array(Image.open(own / kind / "real_0.png"))[:-8]).save(own / kind / "real_0.png")
        Image.fromarray(np.array(Image.open(cells))[:, :-8]).save(cells)
    elif fault == "planes":
        cells.unlink()
        np.save(cells.with_suffix(".npy"), np.zeros((3, SIZE, SIZE), np.uint8))
    else:
        for seed, path in enumerate(sorted(masks.parent.iterdir())):
            Image.fromarray(np.minimum(cells_at(seed), 2)).save(path)
    with pytest.raises(InputError, match=words):
        practise(monkeypatch, own, tmp_path / "out", drawing, *SHORT, *more)
    assert drawing.calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("channels, suffix", [(2, ".tif"), (3, ".png"), (4, ".tif")])
def test_files_of_a_training_set_are_what_their_suffix_says(tmp_path, channels, suffix):
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, channels), dtype=np.uint8)
    cells = cells_at(0)
    for _ in range(2):
        write_training_set(tmp_path / "set", [("a.b", LabelledImage(image, (cells > 0).astype(np.uint8), cells))])
    (path,) = (tmp_path / "set" / "images").iterdir()
    assert path.name == f"a.b{suffix}" and (path.read_bytes()[:4] == b"\x89PNG") == (suffix == ".png")
    np.testing.assert_array_equal(read_image(path), image)
    assert {path.name for path in (tmp_path / "set" / "cellpose").iterdir()} == {"a.b_img.tif", "a.b_masks.tif"}


def test_images_of_two_channels_have_masks_with_ids(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    (tmp_path / "images" / "a.tif").write_bytes(encode_image(noisy(cells_at(0), 0).repeat(2, 2)[..., :2]))
    Image.fromarray(cells_at(0)).save(tmp_path / "masks" / "a.png")
    folders = LabelledFolders(tmp_path / "images", tmp_path / "masks", mask_type="instances")
    assert folders.with_ids_of_masks(2).instances == tmp_path / "masks"


def test_a_cell_of_the_largest_8_bit_id_leaves_room_for_pasted_ones(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    ids = np.zeros((SIZE, SIZE), np.uint8)
    ids[4:12, 4:12], ids[16:24, 16:24] = 254, 255
    Image.fromarray(ids).save(tmp_path / "masks" / "a.png")
    Image.fromarray(ids // 2).save(tmp_path / "images" / "a.png")
    folders = LabelledFolders(tmp_path / "images", tmp_path / "masks", mask_type="instances")
    (pair,) = real_pairs(folders, CONFIG, 2)
    assert sorted(set(pair.item.cells.ravel())) == [0, 1, 2]
    source = CopyPaste([pair.item], [""])
    for draw in range(20):
        image, target = source.draw(np.random.default_rng(draw), SIZE)
        assert ((image[..., 0] > 0) == (target[0] > 0)).all()


def test_failed_commands_and_single_images_end_with_one_line(monkeypatch, data, tmp_path):
    tools = practice_commands.CommandTools(["--no-such-flag"], [], "cpu")
    monkeypatch.setattr(practice_commands.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match=r"train\.py ended with exit code 1"):
        tools.train(LabelledFolders(data / "images", data / "masks"), Unlabelled(None), tmp_path / "run")
    write_pair(tmp_path / "one", "a", 1)
    words = ["--data-path", tmp_path / "one" / "images", "--mask-path", tmp_path / "one" / "masks"]
    with pytest.raises(InputError, match="needs two or more"):
        call(evaluate, "practise", *words, "--output", tmp_path / "out")
    shared = tmp_path / "one" / "images"
    (tmp_path / "one" / "masks" / "a.png").rename(shared / "a_masks.png")
    words = ["--data-path", shared, "--mask-path", shared]
    with pytest.raises(InputError, match="holds 1 image: cross-validation needs two or more"):
        call(evaluate, "practise", *words, "--output", tmp_path / "out")
    with pytest.raises(InputError, match="1 folds"):
        make_folds([Named("a", None), Named("b", None)], 1, 0)


def test_a_refused_number_of_generators_does_not_spoil_the_folder(data, tmp_path):
    words = ["--data-path", data / "images", "--mask-path", data / "masks", "--output", tmp_path / "out"]
    with pytest.raises(InputError, match="generators above 1"):
        call(evaluate, "practise", *words, "--generators", 2)
    assert not (tmp_path / "out").exists()


def test_pseudo_masks_that_are_not_found_are_made_up_for_by_layouts(monkeypatch, data, tmp_path):
    content = practise(monkeypatch, data, tmp_path / "out", Drawing(), *SHORT, "--pseudo-share", 1)
    kinds = list(json.loads((tmp_path / "out" / "masks" / "masks.json").read_text())["kinds"].values())
    assert content["rounds"][0]["images"] == len(kinds) == 8
    assert sum(kind != "pseudo" for kind in kinds) > 0  # four unlabelled images give four masks at most


def test_commands_get_the_flags_of_their_parts(monkeypatch, data, tmp_path):
    called = []
    monkeypatch.setattr(practice_commands, "_run", lambda script, *words: called.append([script, *map(str, words)]))
    tools = practice_commands.CommandTools(["--max-steps", "5"], ["--num-sampling-steps", "2"], "cpu")
    values = {"density": 0.2, "scale": (0.9, 1.1)}
    cells = CellFiles(data / "masks", components=True)
    tools.make_masks(MaskPart("recombine", 3, values), cells, SIZE, 7, tmp_path / "m")
    tools.make_masks(MaskPart("simulate", 3, {"cell_size": 9.0, "touching": False}), cells, SIZE, 7, tmp_path / "s")
    for words in called:
        assert words[0] == "make_masks.py"
        make_masks.check_args(make_masks.parse_args(words[1:]))
    assert "--components" in called[0] and "--no-touching" in called[1]
    tools.sample(tmp_path / "0000001.pt", data / "masks", "binary", 7, tmp_path / "set")
    args = sample_ddp.parse_args(called[2][1:])
    assert (args.device, args.num_sampling_steps) == ("cpu", 2)


def test_shells_take_the_shown_commands_if_the_path_has_a_space(tmp_path):
    folder = tmp_path / "my practice"
    for name, (cellpose, stardist) in practice_commands.segmenter_commands(folder).items():
        assert str(folder / name / "cellpose") in shlex.split(cellpose)
        assert str(folder / name) in shlex.split(stardist)


def test_generator_sees_the_unlabelled_images_and_their_looks(monkeypatch, data, tmp_path):
    called = []
    monkeypatch.setattr(practice_commands, "_run", lambda script, *words: called.append([*map(str, words)]))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "0000001.pt").touch()
    folders, new = LabelledFolders(data / "images", data / "masks"), data / "unlabelled"
    asked = [([], Unlabelled(new), 1), (["--look", "none"], Unlabelled(new, tmp_path), None), ([], Unlabelled(None), 9)]
    for flags, unlabelled, steps in asked:
        COMMANDS(["--max-steps", "7", *flags], [], "cpu").train(folders, unlabelled, tmp_path / "run", steps)
    parsed = [train.parse_args(words) for words in called]
    assert [args.look for args in parsed] == ["reference", "none", "none"]
    assert [args.unlabelled_path for args in parsed] == [[str(new)], [str(new)], ()]
    assert [args.unlabelled_mask_path for args in parsed][1] == [str(tmp_path)]
    assert [args.max_steps for args in parsed] == [1, 7, 9]
    assert {args.device for args in parsed} == {"cpu"}


@pytest.mark.slow
def test_generator_that_ignores_its_masks_is_found_out(monkeypatch, data, tmp_path):
    """Most of its cells are ignored, and its images are not recommended; a faithful one keeps its pixels."""
    words = ["--steps", 100, "--folds", 2, "--masks", 12, "--most-rounds", 0, "--square", SIZE, "--simulated-share", 0]
    ignored, advice = {}, {}
    for name, shift in (("faithful", 0), ("shuffled", 5)):
        content = practise(monkeypatch, data, tmp_path / name, Drawing(shift), *words)
        made = PracticeFolder(tmp_path / name)
        cells = [(item.classes, item.cells > 0) for item in made.images(2, ignore=True, practise=False)]
        ignored[name] = np.mean([(classes[inside] == IGNORE).mean() for classes, inside in cells if inside.any()])
        advice[name] = content["recommended"]
    assert ignored["shuffled"] > 0.5 > 0.3 > ignored["faithful"]
    assert not advice["shuffled"]["use"]
