"""evaluate.py fidelity: known agreement, held-out pairs, the cached judge, and a generator that ignores its masks."""

from __future__ import annotations

import csv
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_sets import Row, disk, paint, place, write_set
from PIL import Image

import evaluate
from common.disk import file_sha256
from common.errors import InputError
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from evaluation.fidelity import (
    LabelledImage,
    cells_of_classes,
    class_iou,
    fidelity_of,
    prepare_judge,
    score_agreement,
    score_fidelity,
    split_pairs,
    write_fidelity_report,
)
from evaluation.instances import dice
from evaluation.judge import (
    Judge,
    JudgeConfig,
    JudgeRequest,
    build_network,
    judge_key,
    load_or_train_judge,
    predict,
    train_judge,
)
from synthetic.manifest import write_manifest
from synthetic.reader import SampleSet

SIZE = 32
CPU = torch.device("cpu")


def cells_at(seed: int) -> np.ndarray:
    """Two disks at places that follow from the seed, (SIZE, SIZE) bool."""
    rng = np.random.default_rng(seed)
    first, second = (disk(SIZE, *place(rng, 5, SIZE - 5), rng.uniform(4, 6)) for _ in range(2))
    return first | second


def noisy(cells: np.ndarray, seed: int) -> np.ndarray:
    """A microscope-like image of a mask, uint8 (SIZE, SIZE, 3)."""
    noise = np.random.default_rng(1000 + seed).normal(0, 12, (*cells.shape, 1))
    return np.clip(paint(cells) + noise, 0, 255).astype(np.uint8)


def label_of(cells: np.ndarray) -> np.ndarray:
    return np.where(cells, 255, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Twenty real pairs: folder with images/ and masks/."""
    folder = tmp_path_factory.mktemp("real")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for seed in range(20):
        cells = cells_at(seed)
        Image.fromarray(noisy(cells, seed)).save(folder / "images" / f"real_{seed:02d}.png")
        Image.fromarray(label_of(cells)).save(folder / "masks" / f"real_{seed:02d}.png")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("judges")


def make_set(folder: Path, masks: list[int], images: list[int], with_real: bool = False) -> SampleSet:
    """A synthetic set whose image i shows the cells of ``images[i]`` while its label is ``masks[i]``."""
    rows = []
    for mask, image in zip(masks, images, strict=True):
        real_image = noisy(cells_at(mask), mask) if with_real else None
        rows.append(Row(label_of(cells_at(mask)), noisy(cells_at(image), image + 500), real_image))
    write_set(folder, rows)
    path = folder / "manifest.csv"
    lines = list(csv.DictReader(path.open()))
    for line in lines:
        label = (folder / line["label"]).read_bytes()
        line["source_mask_sha256"] = hashlib.sha256(label).hexdigest()
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return SampleSet(folder)


def request_for(real: Path, cache: Path, steps: int = 400, seed: int = 0) -> JudgeRequest:
    return JudgeRequest(real / "images", real / "masks", cache, CPU, steps=steps, seed=seed)


def score(samples: SampleSet, real: Path, cache: Path, steps: int = 160):
    return score_fidelity(samples, request_for(real, cache, steps))


# --- agreement -------------------------------------------------------------------------------------------------------


def test_perfect_segmenter_scores_one_and_a_shifted_one_its_known_overlap():
    truth = np.zeros((20, 30), np.uint8)
    truth[5:15, 5:15] = 1
    item = LabelledImage(paint(truth > 0), truth, truth.astype(int))
    perfect = score_agreement(lambda images: np.stack([truth] * len(images)), iter([item] * 3), 2)
    assert perfect.dice == perfect.pq == perfect.boundary_f == perfect.ap["0.9"] == 1
    assert perfect.iou == [1, 1] and perfect.count_error == 0 and perfect.per_image == [1, 1, 1]
    shifted = np.roll(truth, 2, axis=1)
    moved = score_agreement(lambda images: np.stack([shifted] * len(images)), iter([item]), 2)
    assert moved.dice == pytest.approx(0.8)
    assert moved.iou == pytest.approx([480 / 520, 80 / 120])
    assert (moved.ap["0.5"], moved.ap["0.75"]) == (1, 0) and moved.pq == pytest.approx(2 / 3)


def test_image_without_cells_is_left_out_of_the_mean_and_scored_by_what_is_found():
    empty = np.zeros((12, 12), np.uint8)
    item = LabelledImage(paint(empty > 0), empty, empty.astype(int))
    answers = iter([empty, np.ones_like(empty)])
    found = score_agreement(lambda images: np.stack([next(answers) for _ in images]), iter([item, item]), 2)
    assert found.per_image == [1, 0] and found.dice is None and found.count_error == 0.5


def test_one_wrong_pixel_costs_an_empty_image_little_and_a_wrong_cell_everything():
    empty, found = np.zeros((50, 60), bool), np.zeros((50, 60), bool)
    assert fidelity_of(found, empty) == 1
    found[3, 4] = True
    assert fidelity_of(found, empty) == pytest.approx(1 - 1 / 60)
    found[10:20, 10:20] = True
    assert fidelity_of(found, empty) == 0
    assert fidelity_of(empty, found) == 0 and fidelity_of(found, found) == 1


def test_no_image_is_refused():
    with pytest.raises(InputError, match="no image"):
        score_agreement(lambda images: np.zeros(0), iter([]), 2)


def test_iou_of_a_class_that_is_nowhere_is_unknown():
    assert class_iou(np.array([[6, 2, 0], [0, 2, 0], [0, 0, 0]])) == [6 / 8, 2 / 4, None]


def test_border_class_separates_touching_cells():
    classes = np.zeros((10, 21), np.uint8)
    classes[2:8, 2:18] = 1
    classes[2:8, 9:11] = 2
    assert cells_of_classes(classes, separated=False).max() == 1
    cells = cells_of_classes(classes, separated=True)
    assert cells.max() == 2 and ((cells > 0) == (classes > 0)).all()
    assert (cells == 1).sum() == (cells == 2).sum() == 48


# --- the judge -------------------------------------------------------------------------------------------------------


def test_judge_takes_sides_that_are_no_multiple_of_its_stride():
    network = build_network(3)
    assert predict(network, torch.zeros(2, 3, 19, 26)).shape == (2, 3, 19, 26)


def test_judge_finds_nothing_in_the_noise_of_an_empty_window(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    nothing = np.zeros((SIZE, SIZE), bool)
    for seed in range(16):  # every second pair without a cell
        cells = cells_at(seed) if seed % 2 else nothing
        Image.fromarray(noisy(cells, seed)).save(tmp_path / "images" / f"{seed}.png")
        Image.fromarray(label_of(cells)).save(tmp_path / "masks" / f"{seed}.png")
    pairs = PairedFolder(tmp_path / "images", tmp_path / "masks", DataConfig(SIZE), "binary")
    network = train_judge(pairs, JudgeConfig(num_classes=2, steps=150, seed=1), CPU)
    found = Judge(network, CPU, SIZE).class_maps([noisy(nothing, 100 + seed) for seed in range(20)])
    assert (found > 0).any(axis=(1, 2)).sum() <= 1


def test_judge_is_deterministic_cached_and_retrained_when_torn(real, tmp_path):
    pairs = PairedFolder(real / "images", real / "masks", DataConfig(image_size=SIZE))
    config = JudgeConfig(num_classes=2, steps=3, batch_size=4)
    first, key, cached = load_or_train_judge(pairs, config, tmp_path / "a", CPU)
    again, same_key, cached_again = load_or_train_judge(pairs, config, tmp_path / "a", CPU)
    other, _, _ = load_or_train_judge(pairs, config, tmp_path / "b", CPU)
    assert (cached, cached_again) == (False, True) and key == same_key
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name])
        assert torch.equal(value, other.network.state_dict()[name])
    (file,) = (tmp_path / "a").glob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    assert load_or_train_judge(pairs, config, tmp_path / "a", CPU)[2] is False


def test_of_processes_that_start_together_one_trains_the_judge(real, tmp_path, caplog):
    """Their bits can differ, and a set takes the images of one judge only. Threads stand for the processes."""
    caplog.set_level("INFO")
    pairs = PairedFolder(real / "images", real / "masks", DataConfig(image_size=SIZE))
    config = JudgeConfig(num_classes=2, steps=20, batch_size=4)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: load_or_train_judge(pairs, config, tmp_path, CPU), range(2)))
    assert sorted(cached for *_, cached in found) == [False, True]
    assert caplog.text.count("training the judge") == 1
    one, other = (judge.network.state_dict() for judge, *_ in found)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_judge_key_follows_data_and_settings(real, tmp_path):
    pairs = PairedFolder(real / "images", real / "masks", DataConfig(image_size=SIZE))
    fewer = PairedFolder(real / "images", real / "masks", DataConfig(image_size=SIZE), names=["real_00", "real_01"])
    config = JudgeConfig(num_classes=2)
    keys = {
        judge_key(pairs, config),
        judge_key(fewer, config),
        judge_key(pairs, JudgeConfig(num_classes=2, steps=401)),
        judge_key(pairs, JudgeConfig(num_classes=2, seed=1)),
    }
    assert len(keys) == 4


def test_training_the_judge_leaves_the_random_stream_alone(real, tmp_path):
    pairs = PairedFolder(real / "images", real / "masks", DataConfig(image_size=SIZE))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_or_train_judge(pairs, JudgeConfig(num_classes=2, steps=2, batch_size=2), tmp_path, CPU)
    assert torch.equal(torch.rand(3), expected)


# --- which pairs teach -----------------------------------------------------------------------------------------------


def test_masks_of_the_set_are_kept_from_the_judge_when_their_real_images_are_known(real, tmp_path):
    samples = make_set(tmp_path / "set", [0, 1, 2], [0, 1, 2], with_real=True)
    split = split_pairs(samples, request_for(real, tmp_path))
    assert split.held_out == [] and split.masks_seen == 0
    assert split.train == [f"real_{seed:02d}" for seed in range(3, 20)]


@pytest.mark.parametrize("count", [12, 20])
def test_real_images_of_the_set_are_kept_from_the_judge_if_it_learns_from_masks_of_another_kind(real, tmp_path, count):
    """The set was sampled from instance labels, whose files differ from the binary masks of the same cells."""
    samples = make_set(tmp_path / "set", list(range(count)), list(range(count)))
    rows = [
        sample.columns | {"source_mask_sha256": f"ids {n}", "real_image": str(real / "images" / f"real_{n:02d}.png")}
        for n, sample in enumerate(samples.samples)
    ]
    write_manifest(samples.folder, rows)
    split = split_pairs(SampleSet(samples.folder), request_for(real, tmp_path))
    if count == 12:
        assert (split.train, split.held_out) == ([f"real_{n:02d}" for n in range(12, 20)], []) and split.masks_seen == 0
    else:  # too few others: a fifth is held out, and the images of the rest are known
        assert (len(split.train), len(split.held_out), split.masks_seen) == (16, 4, 16)


def test_judge_reads_ids_of_few_cells_as_the_set_does(real, tmp_path):
    ids = np.zeros((SIZE, SIZE), np.uint8)
    ids[8:16, 8:16], ids[8:16, 16:24] = 1, 2  # two cells that touch, not the classes 1 and 2
    (tmp_path / "masks").mkdir()
    for path in (real / "masks").iterdir():
        Image.fromarray(ids).save(tmp_path / "masks" / path.name)
    rows = [Row(ids, noisy(ids > 0, 1), mask_type="instances")]
    samples = SampleSet(write_set(tmp_path / "set", rows, DataConfig(SIZE, num_classes=3)))
    request = JudgeRequest(real / "images", tmp_path / "masks", tmp_path / "judges", CPU, steps=2)
    found, _ = prepare_judge(samples, request)
    assert found.pairs.rule.mask_type == "instances" and found.pairs.rule.has_boundary


def test_an_image_under_two_names_stays_on_one_side_of_the_judge(real, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for path in (real / kind).iterdir():
            for start in ("", "copy_"):
                (tmp_path / kind / f"{start}{path.name}").write_bytes(path.read_bytes())
    request = JudgeRequest(tmp_path / "images", tmp_path / "masks", tmp_path / "judges", CPU)

    def shown(names: list[str]) -> set[str]:
        return {name.removeprefix("copy_") for name in names}

    drawn = make_set(tmp_path / "drawn", [90, 91], [90, 91])
    for seed in range(3):
        split = split_pairs(drawn, replace(request, seed=seed))
        assert not shown(split.train) & shown(split.held_out) and (len(split.train), len(split.held_out)) == (32, 8)


def test_without_real_images_a_fifth_is_held_out_and_known_masks_are_counted(real, tmp_path):
    samples = make_set(tmp_path / "set", list(range(20)), list(range(20)))
    split = split_pairs(samples, request_for(real, tmp_path))
    assert len(split.held_out) == 4 and len(split.train) == 16
    assert not set(split.train) & set(split.held_out) and split.masks_seen == 16
    assert split == split_pairs(samples, request_for(real, tmp_path))
    assert split != split_pairs(samples, request_for(real, tmp_path, seed=1))


# --- the measure -----------------------------------------------------------------------------------------------------


def test_faithful_set_scores_near_real_and_shuffled_pairs_fall_to_chance(real, cache, tmp_path):
    masks = list(range(100, 116))
    shuffled = masks[1:] + masks[:1]
    faithful = score(make_set(tmp_path / "faithful", masks, masks), real, cache)
    ignoring = score(make_set(tmp_path / "ignoring", masks, shuffled), real, cache)
    chance = np.mean([dice(cells_at(image), cells_at(mask)) for mask, image in zip(masks, shuffled, strict=True)])
    assert faithful.judge_cached is False and ignoring.judge_cached is True
    assert faithful.real.dice > 0.9 and faithful.real.images == 4
    assert faithful.synthetic.dice == pytest.approx(faithful.real.dice, abs=0.06)
    assert ignoring.synthetic.dice == pytest.approx(chance, abs=0.05)
    assert ignoring.synthetic.ap["0.75"] < 0.1 < faithful.synthetic.ap["0.75"]
    assert ignoring.real.dice == faithful.real.dice


def test_fields_of_any_size_are_judged_in_windows_of_the_training_size(real, cache, tmp_path):
    rows = []
    for seed, (height, width) in enumerate([(40, 75), (90, 33), (20, 64), (20, 64)]):
        tiles = np.block([[cells_at(200 + 8 * seed + 4 * i + j) for j in range(3)] for i in range(3)])
        cells = tiles[:height, :width]
        rows.append(Row(label_of(cells), noisy(cells, seed), noisy(cells, seed + 50)))
    samples = SampleSet(write_set(tmp_path / "set", rows, DataConfig(image_size=SIZE), tile_scale=1.0))
    report = score(samples, real, cache)
    assert report.synthetic.dice > 0.9 and report.synthetic.dice == pytest.approx(report.real.dice, abs=0.03)
    assert [len(samples.squares(samples.synthetic(one))) for one in samples.samples[:2]] == [6, 6]
    with pytest.raises(InputError, match="64 x 20 pixels, smaller than the squares of 32 x 32"):
        samples.squares(samples.synthetic(samples.samples[2]))


def test_real_images_of_the_same_masks_are_the_ceiling(real, cache, tmp_path):
    samples = make_set(tmp_path / "set", [0, 1, 2], [0, 1, 2], with_real=True)
    report = score(samples, real, cache)
    assert report.real.images == 3 and "same masks" in report.real_images_are and report.judge_pairs == 17
    assert report.real.dice > 0.9


def test_report_goes_into_the_manifest_once_and_keeps_every_other_column(real, cache, tmp_path):
    samples = make_set(tmp_path / "set", [100, 101, 102], [100, 110, 102])
    before = list(csv.DictReader((samples.folder / "manifest.csv").open()))
    report = score(samples, real, cache)
    for _ in range(2):
        write_fidelity_report(SampleSet(samples.folder), report)
    after = list(csv.DictReader((samples.folder / "manifest.csv").open()))
    assert list(after[0]) == [*before[0], "fidelity_dice"]
    values = [float(row.pop("fidelity_dice")) for row in after]
    assert after == before and values == pytest.approx(report.synthetic.per_image, abs=1e-4)
    assert values[1] < min(values[0], values[2])
    summary = json.loads((samples.folder / "evaluation" / "fidelity.json").read_text())
    assert summary["synthetic"]["dice"] == report.synthetic.dice and summary["judge_key"] == report.judge_key


def test_set_without_settings_is_refused(real, cache, tmp_path):
    samples = make_set(tmp_path / "set", [100], [100])
    (samples.folder / "settings.json").unlink()
    with pytest.raises(InputError, match="no data_config"):
        score(SampleSet(samples.folder), real, cache)


def test_command_prints_the_table_with_real_beside_synthetic(real, tmp_path, capsys):
    samples = make_set(tmp_path / "set", [100, 101], [100, 101])
    command = [
        "fidelity", str(samples.folder), "--data-path", str(real / "images"), "--mask-path", str(real / "masks"),
        "--steps", "2", "--cache-dir", str(tmp_path / "judges"),
    ]  # fmt: skip
    evaluate.main(evaluate.parse_args(command))
    printed = capsys.readouterr().out
    for word in ("Dice of the cells", "AP at IoU 0.75", "panoptic quality", "16 real pairs", "held-out pairs"):
        assert word in printed
    assert "fidelity_dice" in (samples.folder / "manifest.csv").read_text()
    known = json.loads((samples.folder / "evaluation" / "fidelity.json").read_text())["judge_images_sha256"]
    assert len(known) == 16 and set(known) < {file_sha256(path) for path in (real / "images").iterdir()}
