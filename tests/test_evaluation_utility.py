"""evaluate.py split and utility by shares: nested shares, every planted leak refused, sets with a known answer."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_sets import Row, disk, paint, place, write_set
from PIL import Image
from script_helpers import run_here, state

import evaluate
import make_masks
from common.disk import file_sha256
from common.errors import InputError
from dataset.config import DataConfig
from dataset.mask_folder import MaskFolder
from engine.checkpoint import save_checkpoint
from evaluation.experiments.arms import SHARE_ARMS
from evaluation.experiments.instance_score import InstanceScore
from evaluation.experiments.label_split import SelectionSettings, make_selections, read_selections
from evaluation.experiments.labelled import set_pairs
from evaluation.experiments.leaks import find_leaks, refuse_leaks
from evaluation.experiments.split import SplitPlan, make_split, plan_shares, read_split
from evaluation.experiments.trial import Study, TrialRow, TrialSettings, run_trial
from evaluation.experiments.trial_report import SECTION, summarize_trial, write_trial
from synthetic.manifest import write_manifest
from synthetic.reader import SampleSet

SIZE = 32
CPU = torch.device("cpu")


def cells_at(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return disk(SIZE, *place(rng, 5, SIZE - 5), rng.uniform(4, 6)) | disk(SIZE, *place(rng, 5, SIZE - 5), 5)


def noisy(cells: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(1000 + seed).normal(0, 12, (*cells.shape, 1))
    return np.clip(paint(cells) + noise, 0, 255).astype(np.uint8)


def label_of(cells: np.ndarray) -> np.ndarray:
    return np.where(cells, 255, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Twenty real pairs."""
    folder = tmp_path_factory.mktemp("real")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for seed in range(20):
        Image.fromarray(noisy(cells_at(seed), seed)).save(folder / "images" / f"real_{seed:02d}.png")
        Image.fromarray(label_of(cells_at(seed))).save(folder / "masks" / f"real_{seed:02d}.png")
    return folder


@pytest.fixture(scope="module")
def split(real, tmp_path_factory) -> SplitPlan:
    """Four test pairs; 4 pairs at 25 %, 16 at 100 %."""
    output = tmp_path_factory.mktemp("plan") / "split"
    make_split(output, (real / "images", real / "masks"), shares=[25, 100])
    return read_split(output)


def set_of(
    folder: Path,
    masks: list[Path],
    images: list[np.ndarray] | None = None,
    trained_on: list[str] | None = None,
    **settings: Any,
) -> SampleSet:
    """A synthetic set drawn from mask files; ``images`` in place of faithful drawings."""
    labels = [np.array(Image.open(path)) for path in masks]
    images = images or [noisy(label > 0, 500 + number) for number, label in enumerate(labels)]
    known: dict[str, Any] = {} if trained_on is None else {"trained_on": trained_on}
    write_set(folder, [Row(label, image) for label, image in zip(labels, images, strict=True)], **known, **settings)
    samples = SampleSet(folder)
    rows = [
        sample.columns | {"source_mask": str(path), "source_mask_sha256": file_sha256(path), "ckpt_sha256": "c"}
        for sample, path in zip(samples.samples, masks, strict=True)
    ]
    write_manifest(folder, rows)
    return SampleSet(folder)


def files_of(split: SplitPlan, share: int | None, kind: str) -> list[Path]:
    return sorted((split.part(share) / kind).iterdir())


def seen(split: SplitPlan, share: int | None) -> list[str]:
    return [file_sha256(path) for path in files_of(split, share, "images")]


def study(split: SplitPlan, sets: dict[int, SampleSet], output: Path, **settings: Any) -> list[TrialRow]:
    """The experiment with the arms of shares."""
    config = next(iter(sets.values())).require_config()
    own = {"arms": tuple(SHARE_ARMS.values()), "labels": tuple(sets), "config": config, **settings}
    folders = {share: samples.folder for share, samples in sets.items()}
    return run_trial(Study([split], folders, TrialSettings(**own), {}), output, CPU)


# --- split -----------------------------------------------------------------------------------------------------------


def test_shares_are_nested_and_never_meet_the_test_names():
    names = [[f"n{number}"] for number in range(50)]
    test, shares = plan_shares(names, 0.2, [10, 20, 50, 100], seed=0)
    assert len(test) == 10 and [len(part) for part in shares.values()] == [4, 8, 20, 40]
    assert set(shares[10]) < set(shares[20]) < set(shares[50]) < set(shares[100])
    assert not set(test) & set(shares[100])
    hundred = [[f"n{number}"] for number in range(100)]
    counts = {share: len(part) for share, part in plan_shares(hundred, 0, range(1, 101), seed=0)[1].items()}
    assert counts == {share: share for share in range(1, 101)}
    assert len(plan_shares(names, 0, [7], seed=0)[1][7]) == 4  # 3.5, rounded up
    assert plan_shares(names[::-1], 0.2, [10], 0)[0] == test != plan_shares(names, 0.2, [10], 1)[0]


def test_folders_hold_what_the_plan_says_and_changes_are_noticed(split, real, tmp_path):
    assert len(split.test) == 4 and [len(names) for names in split.shares.values()] == [4, 16]
    assert [path.stem for path in files_of(split, 25, "masks")] == split.shares[25]
    copy = make_split(tmp_path / "again", (real / "images", real / "masks"), shares=[25, 100])
    assert copy.test == split.test and copy.images == split.images
    (copy.part(25) / "images" / f"{copy.shares[25][0]}.png").unlink()
    with pytest.raises(InputError, match="is not what"):
        read_split(tmp_path / "again")
    with pytest.raises(InputError, match="not empty"):
        make_split(tmp_path / "again", (real / "images", real / "masks"))


def test_near_duplicates_stay_on_one_side(real, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for path in (real / kind).iterdir():
            array = np.array(Image.open(path))
            Image.fromarray(array).save(tmp_path / kind / path.name)
            brighter = np.clip(array.astype(int) + 9, 0, 255).astype(np.uint8) if kind == "images" else array
            Image.fromarray(brighter).save(tmp_path / kind / f"copy_{path.name}")
    plan = make_split(tmp_path / "split", (tmp_path / "images", tmp_path / "masks"), shares=[100])
    assert len(plan.test) == 8
    assert {name.removeprefix("copy_") for name in plan.test}.isdisjoint(
        name.removeprefix("copy_") for name in plan.shares[100]
    )


def test_copies_of_one_file_name_stay_on_one_side(real, tmp_path):
    for case in range(12):
        for kind, own in (("images", "image"), ("masks", "mask")):
            (tmp_path / f"case{case}" / own).mkdir(parents=True)
            content = (real / kind / f"real_{case % 6:02d}.png").read_bytes()
            (tmp_path / f"case{case}" / own / f"{own}.png").write_bytes(content)
    for seed in range(3):
        plan = make_split(tmp_path / f"split_{seed}", (tmp_path, tmp_path), [100], test_share=0.3, seed=seed)
        tested, trained = ({int(name[4:]) % 6 for name in names} for names in (plan.test, plan.shares[100]))
        assert len(plan.test) == 4 and not tested & trained


def test_given_test_images_are_used_and_refused_where_they_are_training_images(real, split, tmp_path):
    folders = (split.part(25) / "images", split.part(25) / "masks")
    output, paths = tmp_path / "bad", (real / "images", real / "masks")
    with pytest.raises(InputError, match="4 images .* leak"):
        make_split(output, paths, test_folders=folders)
    assert not (tmp_path / "bad").exists()
    brighter = tmp_path / "brighter"
    for kind in ("images", "masks"):
        (brighter / kind).mkdir(parents=True)
    image = np.array(Image.open(real / "images" / "real_03.png"))
    Image.fromarray(np.clip(image.astype(int) + 9, 0, 255).astype(np.uint8)).save(brighter / "images" / "new.png")
    (brighter / "masks" / "new.png").write_bytes((real / "masks" / "real_03.png").read_bytes())
    with pytest.raises(InputError, match="1 images .* leak: new"):
        make_split(output, paths, test_folders=(brighter / "images", brighter / "masks"))
    test = (split.part(None) / "images", split.part(None) / "masks")
    plan = make_split(tmp_path / "good", folders, [50, 100], test_folders=test)
    assert [len(names) for names in plan.shares.values()] == [2, 4] and len(plan.test) == 4
    assert read_split(tmp_path / "good").test == plan.test


def test_test_images_of_a_split_by_shares_keep_their_cells(real, tmp_path):
    cells = tmp_path / "cells"
    cells.mkdir()
    for number, path in enumerate(sorted((real / "masks").iterdir())):
        Image.fromarray(np.array(Image.open(path)) // 255 * np.uint8(number + 1)).save(cells / path.name)
    folders = (real / "images", real / "masks")
    own = make_split(tmp_path / "own", folders, [100], instance_dir=cells)
    names = sorted(path.stem for path in (own.part(None) / "instances").iterdir())
    assert names == own.test and names
    test = (own.part(None) / "images", own.part(None) / "masks")
    rest = (own.part(100) / "images", own.part(100) / "masks")
    given = make_split(
        tmp_path / "given", rest, [100], test_folders=test, instance_dir=cells,
        test_instance_dir=own.part(None) / "instances",
    )  # fmt: skip
    for folder in (own, given):
        for path in (folder.part(None) / "instances").iterdir():
            assert path.read_bytes() == (cells / path.name).read_bytes()


def test_images_of_a_single_nucleus_stay_nuclei_in_a_split(real, tmp_path):
    for seed in range(12):
        path = real / "images" / f"real_{seed:02d}.png"
        (tmp_path / f"case{seed}" / "images").mkdir(parents=True)
        (tmp_path / f"case{seed}" / "masks").mkdir()
        (tmp_path / f"case{seed}" / "images" / "a.png").write_bytes(path.read_bytes())
        for number in range(1 + (seed == 0)):  # one image has two nuclei
            nucleus = label_of(disk(SIZE, 8 + 16 * number, 16, 5))
            Image.fromarray(nucleus).save(tmp_path / f"case{seed}" / "masks" / f"{number}.png")
    make_split(tmp_path / "shares", (tmp_path, tmp_path), [10, 100])
    make_selections(tmp_path / "labels", (tmp_path, tmp_path), SelectionSettings([2], selections=2))
    by_share = read_split(tmp_path / "shares")
    for plan in (by_share, *read_selections(tmp_path / "labels")):
        for part in (None, *plan.shares):
            masks = MaskFolder(plan.part(part) / "masks", DataConfig(image_size=SIZE), whole_scale=1.0)
            assert masks.rule.mask_type == "instances" and all(path.is_dir() for path in masks.paths.values())
            if part is not None:
                assert set(masks.names) == set(plan.shares[part])


def test_instances_of_another_size_are_refused(real, tmp_path):
    (tmp_path / "cells").mkdir()
    for path in (real / "masks").iterdir():
        Image.fromarray(np.array(Image.open(path))[:, :-2]).save(tmp_path / "cells" / path.name)
    with pytest.raises(InputError, match="real_00.png: has 30 x 32 pixels, but its image 32 x 32"):
        make_split(tmp_path / "split", (real / "images", real / "masks"), instance_dir=tmp_path / "cells")


# --- leaks -----------------------------------------------------------------------------------------------------------


def test_set_of_its_own_share_is_no_leak(split, tmp_path):
    samples = set_of(tmp_path / "set", files_of(split, 25, "masks"), trained_on=seen(split, 25))
    assert find_leaks(split, 25, samples) == [] == find_leaks(split, 100, samples)


def test_planted_test_mask_is_found(split, tmp_path):
    masks = [*files_of(split, 25, "masks"), files_of(split, None, "masks")[0]]
    leaks = find_leaks(split, 25, set_of(tmp_path / "set", masks, trained_on=seen(split, 25)))
    assert leaks[0] == "1 images are made from masks of the test set"
    assert leaks[1] == "1 labels show the cells of test masks"


def test_empty_masks_in_test_and_share_are_no_leak_but_equal_cells_are(real, tmp_path):
    """Fields without cells have equal mask files."""
    folders = tmp_path / "images", tmp_path / "masks"
    shutil.copytree(real / "images", folders[0])
    shutil.copytree(real / "masks", folders[1])
    drawn, shares = plan_shares([[f"real_{seed:02d}"] for seed in range(20)], 0.2, [25], seed=0)
    for name in (drawn[0], shares[25][0]):
        Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(folders[1] / f"{name}.png")
    shutil.copy(folders[1] / f"{drawn[1]}.png", folders[1] / f"{shares[25][1]}.png")
    split = make_split(tmp_path / "split", folders, shares=[25])
    assert (split.test, split.shares[25]) == (drawn, shares[25])
    masks = files_of(split, 25, "masks")
    without = [path for path in masks if path.stem != shares[25][1]]
    assert find_leaks(split, 25, set_of(tmp_path / "a", without, trained_on=seen(split, 25))) == []
    leaks = find_leaks(split, 25, set_of(tmp_path / "b", masks, trained_on=seen(split, 25)))
    assert leaks == ["1 labels show the cells of test masks"]


def test_test_mask_under_another_name_and_hash_is_found_by_its_pixels(split, tmp_path):
    simulated = tmp_path / "made" / "masks"
    simulated.mkdir(parents=True)
    (simulated.parent / "settings.json").write_text(json.dumps({"command": "simulate"}))
    label = np.array(Image.open(files_of(split, None, "masks")[0])) // 255  # 0 and 1: another file
    Image.fromarray(label).save(simulated / "sim_1.png")
    samples = set_of(tmp_path / "set", [simulated / "sim_1.png"], trained_on=seen(split, 25))
    assert find_leaks(split, 25, samples) == ["1 labels show the cells of test masks"]


def test_test_mask_in_a_large_field_is_found_in_its_window(tmp_path, real):
    """Under --crop random the label is a window of the test mask."""
    for kind in ("images", "masks"):
        (tmp_path / "large" / kind).mkdir(parents=True)
    large = [np.concatenate([cells_at(seed), cells_at(50 + seed)], axis=1) for seed in range(6)]
    for seed, cells in enumerate(large):
        Image.fromarray(noisy(cells, seed)).save(tmp_path / "large" / "images" / f"l{seed}.png")
        Image.fromarray(label_of(cells)).save(tmp_path / "large" / "masks" / f"l{seed}.png")
    folders = [tmp_path / "large" / kind for kind in ("images", "masks")]
    split = make_split(tmp_path / "split", tuple(folders), shares=[100])
    made = tmp_path / "made" / "masks"
    made.mkdir(parents=True)
    (made.parent / "settings.json").write_text(json.dumps({"command": "simulate"}))
    for name, leaks in ((split.test[0], 1), (split.shares[100][0], 0)):
        window = label_of(large[int(name[1:])][:, 13 : 13 + SIZE])
        Image.fromarray(window).save(made / f"{name}.png")
        samples = set_of(tmp_path / name, [made / f"{name}.png"], trained_on=seen(split, 100))
        view = {"crop_scaled_height": "32", "crop_scaled_width": "64", "crop_top": "0", "crop_left": "13"}
        write_manifest(samples.folder, [samples.samples[0].columns | view])
        assert len(find_leaks(split, 100, SampleSet(samples.folder))) == leaks


def test_mask_outside_of_the_share_is_found(split, tmp_path):
    samples = set_of(tmp_path / "set", files_of(split, 100, "masks"), trained_on=seen(split, 25))
    assert find_leaks(split, 25, samples) == ["12 images are made from masks of pairs outside of the share"]
    assert find_leaks(split, 100, samples) == []


@pytest.mark.parametrize(
    ("trained_on", "words"),
    [
        (None, "give `ckpt` 25=FILE"),
        (100, "trained on 12 images outside of the share"),
        ("test", "trained on 1 images of the test set"),
        ("other", "trained on 1 images that are not in the split"),
    ],
)
def test_generator_that_has_seen_more_is_found(split, tmp_path, trained_on, words):
    images = {
        None: None,
        100: seen(split, 100),
        "test": seen(split, 25) + seen(split, None)[:1],
        "other": [*seen(split, 25), "0" * 64],
    }[trained_on]
    samples = set_of(tmp_path / "set", files_of(split, 25, "masks"), trained_on=images)
    (leak,) = find_leaks(split, 25, samples)
    assert words in leak


def checkpoint_of(path: Path, data_path: Path, **train: object) -> Path:
    made = state(1)
    made["config"]["train"] = {"data_path": str(data_path), **train}
    save_checkpoint(path, made)
    return path


def test_checkpoint_says_what_the_generator_has_seen(split, tmp_path):
    def leaks_with(name: str, share: int, **train: object) -> list[str]:
        checkpoint = checkpoint_of(tmp_path / f"{name}.pt", split.part(share) / "images", **train)
        samples = set_of(tmp_path / name, files_of(split, 25, "masks"))
        rows = [sample.columns | {"ckpt_sha256": file_sha256(checkpoint)} for sample in samples.samples]
        write_manifest(samples.folder, rows)
        return find_leaks(split, 25, SampleSet(samples.folder), checkpoint)

    assert leaks_with("own", 25) == []
    assert "12 images outside" in leaks_with("all", 100)[0]
    assert "started from big.pt" in leaks_with("started", 25, init_from="big.pt")[0]
    assert leaks_with("published", 25, init_from="SiT-XL-2-256x256.pt") == []
    other = set_of(tmp_path / "other", files_of(split, 25, "masks"))
    assert "not the checkpoint" in find_leaks(split, 25, other, tmp_path / "own.pt")[0]


def test_simulated_masks_pass_and_unknown_ones_do_not(split, tmp_path):
    command = ["simulate", "--count", "2", "--image-size", str(SIZE), "--output", str(tmp_path / "sim")]
    make_masks.main(make_masks.parse_args(command))
    masks = sorted((tmp_path / "sim" / "masks").iterdir())
    assert find_leaks(split, 25, set_of(tmp_path / "a", masks, trained_on=seen(split, 25))) == []
    (tmp_path / "mine").mkdir()
    Image.fromarray(label_of(cells_at(77))).save(tmp_path / "mine" / "m.png")
    samples = set_of(tmp_path / "b", [tmp_path / "mine" / "m.png"], trained_on=seen(split, 25))
    assert "origin is unknown" in find_leaks(split, 25, samples)[0]
    Image.fromarray(label_of(cells_at(78))).save(masks[0])
    assert "missing or have changed" in find_leaks(split, 25, SampleSet(tmp_path / "a"))[0]


def test_recombined_masks_pass_for_the_share_that_their_cells_are_of(split, tmp_path):
    source = split.part(25) / "masks"
    command = [
        "recombine",
        "--instances",
        str(source),
        "--components",
        "--count",
        "2",
        "--output",
        str(tmp_path / "mix"),
    ]
    make_masks.main(make_masks.parse_args(command))
    masks = sorted((tmp_path / "mix" / "masks").iterdir())
    samples = set_of(tmp_path / "set", masks, trained_on=seen(split, 25))
    assert find_leaks(split, 25, samples) == []
    (leak,) = find_leaks(split, 100, samples)
    assert "recombined from other cells" in leak


def test_filter_by_a_judge_that_has_seen_more_is_found(split, tmp_path):
    masks, images = files_of(split, 25, "masks"), seen(split, 25)
    good = set_of(tmp_path / "a", masks, trained_on=images, filter={"judge_images_sha256": images[:2]})
    bad = set_of(tmp_path / "b", masks, trained_on=images, filter={"judge_images_sha256": seen(split, None)})
    unknown = set_of(tmp_path / "c", masks, trained_on=images, filter={"rule": "x"})
    assert find_leaks(split, 25, good) == []
    assert find_leaks(split, 25, bad) == ["the judge that selected its images was trained on 4 images of the test set"]
    assert "unknown training images" in find_leaks(split, 25, unknown)[0]


def test_looks_of_test_images_are_found_and_those_of_other_images_pass(split, tmp_path):
    masks, images = files_of(split, 25, "masks"), seen(split, 25)
    looks = {"none": None, "all": {"source": "path", "images_sha256": seen(split, 100)}}
    for name, look in looks.items():
        assert find_leaks(split, 25, set_of(tmp_path / name, masks, trained_on=images, look=look)) == []
    tested = {"source": "path", "images_sha256": seen(split, None)}
    bad = set_of(tmp_path / "bad", masks, trained_on=images, look=tested)
    assert find_leaks(split, 25, bad) == ["its looks are those of 4 images of the test set"]


def test_leaks_are_refused_in_one_message_before_any_training(split, tmp_path):
    samples = set_of(tmp_path / "set", files_of(split, None, "masks"), trained_on=seen(split, 100))
    with pytest.raises(InputError, match=r"leaks at 25 % .*masks of the test set.*outside of the share"):
        refuse_leaks(split, 25, samples)
    with pytest.raises(InputError, match="leaks at 25 %"):
        study(split, {25: samples}, tmp_path, steps=10**9)


# --- training --------------------------------------------------------------------------------------------------------


def test_segmenters_learn_the_images_and_labels_of_the_set(split, tmp_path):
    samples = set_of(tmp_path / "set", files_of(split, 25, "masks"), trained_on=[])
    pairs = set_pairs(samples, 2)
    assert len(pairs) == 4
    for pair in pairs:
        assert pair.item.image.shape == (SIZE, SIZE, 3) and pair.item.classes.dtype == np.uint8
        bright = pair.item.image.mean(axis=2) > 127
        assert (bright == (pair.item.classes > 0)).mean() > 0.97


def faithful_and_ignoring(split: SplitPlan, folder: Path) -> tuple[SampleSet, SampleSet]:
    """Sets of the 16 training masks: one whose images follow them, one whose images belong to other masks."""
    masks = files_of(split, 100, "masks")
    cells = [np.array(Image.open(path)) > 0 for path in masks]
    wrong = [noisy(one, 900 + number) for number, one in enumerate(cells[1:] + cells[:1])]
    images = seen(split, 100)
    return set_of(folder / "good", masks, trained_on=images), set_of(folder / "bad", masks, wrong, trained_on=images)


def summary_of(rows: list[TrialRow], steps: int = 5) -> dict[tuple[int, str], dict]:
    content = summarize_trial(rows, steps, "percent")
    return {(entry["labels"], entry["arm"]): entry for entry in content["summary"]}


@pytest.mark.slow
def test_set_that_follows_its_masks_teaches_and_one_that_ignores_them_does_not(split, tmp_path):
    good, bad = faithful_and_ignoring(split, tmp_path)
    found = {}
    for name, samples in (("good", good), ("bad", bad)):
        rows = study(split, {100: samples}, tmp_path / f"out_{name}", steps=160)
        found[name] = {arm: entry for (_, arm), entry in summary_of(rows).items()}
    assert found["good"]["real"]["dice"] == found["bad"]["real"]["dice"] > 0.85
    assert found["good"]["synthetic"]["dice"] > 0.85
    assert found["bad"]["synthetic"]["dice"] < 0.6
    assert found["bad"]["synthetic"]["gain"]["mean"] < -0.25
    assert abs(found["good"]["real + synthetic"]["gain"]["mean"]) < 0.1


def test_report_is_written_with_a_row_per_training(split, tmp_path):
    samples = set_of(tmp_path / "set", files_of(split, 25, "masks"), trained_on=seen(split, 25))
    rows = study(split, {25: samples}, tmp_path / "out", labels=(25, 100), steps=2, seeds=2, crop=16)
    write_trial(rows, 2, tmp_path / "out", "percent")
    table = list(csv.DictReader((tmp_path / "out" / "utility.csv").open()))
    arms = ["real", "real", "real + synthetic", "real + synthetic", "synthetic", "synthetic", "real", "real"]
    assert [row["arm"] for row in table] == arms and [row["share"] for row in table] == ["25"] * 6 + ["100"] * 2
    assert [row["real_images"] for row in table] == ["4", "4", "4", "4", "0", "0", "16", "16"]
    assert [row["synthetic_images"] for row in table] == ["0", "0", "4", "4", "4", "4", "0", "0"]
    assert [row["seed"] for row in table] == ["0", "1"] * 4
    assert len(json.loads((tmp_path / "out" / "utility.json").read_text())["summary"]) == 4
    assert np.array(Image.open(tmp_path / "out" / "utility.png")).std() > 5


def test_gain_is_taken_seed_by_seed_and_spreads_are_those_of_samples():
    scores = {"real": (0.5, 0.7), "synthetic": (0.6, 0.9), "real + synthetic": (0.6, None)}
    rows = [
        TrialRow(0, 10, arm, seed, 4, 9, InstanceScore(ap50, None, None, None, None, None, []), {})
        for arm, both in scores.items()
        for seed, ap50 in enumerate(both)
    ]
    content = json.loads(json.dumps(summarize_trial(rows, 5, "percent")))
    real, both, synthetic = content["summary"]
    assert real["ap50_std"] == pytest.approx(0.2 / np.sqrt(2)) and real["gain"] is None
    gain = synthetic["gain"]
    assert (gain["mean"], gain["error"]) == pytest.approx((0.15, 0.1 / np.sqrt(2) / np.sqrt(2)))
    assert both["gain"]["mean"] == pytest.approx(0.1) and both["gain"]["error"] is None and both["ap50_std"] is None
    assert gain["verdict"] is None and content["comparisons"] == []  # seeds say nothing of other labels
    lines = SECTION.lines(content)
    assert "10 % of the labels, synthetic" in lines[3] and "+0.150 [" in lines[3] and "0.600  " in lines[2]


def test_unknown_shares_and_sets_made_differently_are_refused(split, tmp_path):
    masks, images = files_of(split, 25, "masks"), seen(split, 25)
    samples = set_of(tmp_path / "a", masks, trained_on=images)
    with pytest.raises(InputError, match="^shares 10: .* has no such part"):
        study(split, {10: samples}, tmp_path / "out")
    other = set_of(tmp_path / "b", masks, trained_on=images)
    settings = json.loads((other.folder / "settings.json").read_text())
    settings["data_config"]["window"] = [1, 99]
    (other.folder / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="different sizes, classes, crops or windows"):
        study(split, {25: samples, 100: SampleSet(other.folder)}, tmp_path / "out")


def test_commands_make_the_split_and_print_the_table(real, tmp_path, capsys):
    plan = tmp_path / "plan"
    command = ["split", "--data-path", str(real / "images"), "--mask-path", str(real / "masks"), "--output", str(plan)]
    evaluate.main(evaluate.parse_args([*command, "--shares", "50"]))
    assert " 50 %: 8 pairs" in capsys.readouterr().out
    split = read_split(plan)
    samples = set_of(tmp_path / "set", files_of(split, 50, "masks"), trained_on=seen(split, 50))
    command = ["utility", str(plan), "--synthetic", f"50={samples.folder}", "--steps", "2", "--seeds", "1"]
    evaluate.main(evaluate.parse_args([*command, "--output", str(tmp_path / "out")]))
    printed = capsys.readouterr().out
    assert "50 % of the labels, real + synthetic" in printed and "2 steps in every arm" in printed
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["unit"] == "percent"  # apart from other splits
    with pytest.raises(InputError, match="--labels has no effect on a split by shares of the labels"):
        evaluate.main(evaluate.parse_args([*command, "--labels", "5"]))
    for wrong in ("50", "x=a", "0=a", "50="):
        with pytest.raises(SystemExit):
            evaluate.parse_args(["utility", str(plan), "--synthetic", wrong])


def test_a_study_with_nothing_to_train_ends_in_one_line(split, tmp_path):
    samples = set_of(tmp_path / "set", files_of(split, 25, "masks"), trained_on=seen(split, 25))
    words = ["utility", split.folder, "--steps", 2, "--device", "cpu", "--output", tmp_path / "out"]
    alone = ["--shares", 25, "--image-size", SIZE]
    faults = {
        "give --synthetic, a set for one of them, or --shares": [],
        "arms with synthetic images need --synthetic": [*alone, "--arms", "real + synthetic"],
        "no arm can run at 100 % of the labels: give --synthetic": [
            "--shares",
            25,
            100,
            "--synthetic",
            f"25={samples.folder}",
            "--arms",
            "real + synthetic",
        ],
        "--synthetic 25=... has no effect: 25 % is not among": ["--shares", 100, "--synthetic", "25=a"],
        "--synthetic 25=... is given 2 times": ["--synthetic", "25=a", "25=b"],
        "--ckpt 100=... has no effect": ["--synthetic", "25=a", "--ckpt", "100=c.pt"],
    }
    for fault, more in faults.items():
        code, lines = run_here(evaluate, *words, *more)
        assert code == 2 and fault in lines[-1], lines[-1]
    assert not (tmp_path / "out").exists()


def test_manifest_without_hashes_is_a_leak(split, tmp_path):
    label = label_of(cells_at(3))
    folder = write_set(tmp_path / "set", [Row(label, noisy(label > 0, 3))], trained_on=seen(split, 25))
    assert "no column source_mask_sha256" in find_leaks(split, 25, SampleSet(folder))[0]
    assert hashlib.sha256(b"").hexdigest() not in seen(split, 25)
