"""Selections of few labels, the utility experiment on them, and what its report says of sets with a known answer."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_sets import Row, disk, paint, place, write_set
from PIL import Image
from script_helpers import call, run_here

import evaluate
import make_masks
from common.disk import file_sha256
from common.errors import InputError
from dataset.config import DataConfig
from dataset.groups import read_groups
from evaluation.experiments import trial
from evaluation.experiments.arms import ARMS, Arm, arm_of
from evaluation.experiments.instance_score import InstanceScore
from evaluation.experiments.label_split import SelectionSettings, choose, make_selections, read_selections
from evaluation.experiments.leaks import find_leaks
from evaluation.experiments.practice_folder import PracticeFolder
from evaluation.experiments.segmenter import train_segmenter
from evaluation.experiments.split import SplitPlan, make_split
from evaluation.experiments.stamps import Stamps
from evaluation.experiments.trial import Case, Study, TrialRow, TrialSettings, run_trial
from evaluation.experiments.trial_report import (
    Difference,
    difference,
    labels_worth,
    summarize_trial,
    trial_notes,
    trial_table,
)
from synthetic.manifest import write_column, write_manifest
from synthetic.reader import SampleSet

SIZE, CPU = 32, torch.device("cpu")
CONFIG = DataConfig(image_size=SIZE, crop="random")


def cells_at(seed: int) -> np.ndarray:
    """Two disks, sometimes one upon the other."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((SIZE, SIZE), np.uint8)
    for number in (1, 2):
        cells[disk(SIZE, *place(rng, 6, SIZE - 6), rng.uniform(4, 6))] = number
    return cells


def noisy(cells: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(1000 + seed).normal(0, 12, (*cells.shape, 1))
    return np.clip(paint(cells > 0) + noise, 0, 255).astype(np.uint8)


def write_pair(folder: Path, name: str, seed: int) -> None:
    cells = cells_at(seed)
    arrays = {"images": noisy(cells, seed), "masks": np.where(cells, 255, 0).astype(np.uint8), "instances": cells}
    for kind, array in arrays.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / kind / f"{name}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sixteen training and six test pairs with instances, in two looks."""
    folder = tmp_path_factory.mktemp("data")
    for seed in range(16):
        write_pair(folder / "train", f"{'a' if seed < 12 else 'b'}_{seed:02d}", seed)
    for seed in range(6):
        write_pair(folder / "val", f"{'ab'[seed % 2]}_{seed:02d}", 100 + seed)
    rows = [f"{path.name},{path.name[0]}" for part in ("train", "val") for path in (folder / part / "images").iterdir()]
    (folder / "index.csv").write_text("\n".join(["name,look", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def split(data, tmp_path_factory) -> Path:
    """Three selections of 2 and 4 labels."""
    output = tmp_path_factory.mktemp("plan") / "split"
    train, val = data / "train", data / "val"
    call(evaluate, "split", "--data-path", train / "images", "--mask-path", train / "masks", "--instances",
         train / "instances", "--test-data-path", val / "images", "--test-mask-path", val / "masks", "--test-instances",
         val / "instances", "--labels", 4, 2, "--selections", 3, "--groups", data / "index.csv",
         "--group-column", "look", "--output", output)  # fmt: skip
    return output


def seen(plan: SplitPlan, labels: int) -> list[str]:
    return [file_sha256(path) for path in sorted((plan.part(labels) / "images").iterdir())]


def make_set(folder: Path, plan: SplitPlan, labels: int, shuffled: bool = False, count: int = 12) -> SampleSet:
    """A set from recombined cells of a selection: images that follow their labels, or those of other labels."""
    masks = folder.parent / f"{folder.name}_masks"
    call(make_masks, "recombine", "--instances", plan.part(labels) / "instances", "--count", count, "--output", masks)
    paths = sorted((masks / "instances").iterdir())
    labels_ = [np.array(Image.open(path)) for path in paths]
    images = [noisy(label, 500 + number) for number, label in enumerate(labels_)]
    images = images[1:] + images[:1] if shuffled else images
    rows = [Row(label, image, mask_type="instances") for label, image in zip(labels_, images, strict=True)]
    rule = {"mask_type": "instances", "num_classes": 2, "maximum": 1.0, "reason": "drawn"}
    write_set(folder, rows, CONFIG, trained_on=seen(plan, labels), mask_rule=rule)
    samples = SampleSet(folder)
    write_manifest(folder, [
        sample.columns | {"source_mask": str(path), "source_mask_sha256": file_sha256(path), "ckpt_sha256": "c"}
        for sample, path in zip(samples.samples, paths, strict=True)
    ])  # fmt: skip
    return SampleSet(folder)


def sets_of(split: Path, folder: Path, labels: int, shuffled: bool = False) -> Path:
    for plan in read_selections(split):
        place = folder / plan.folder.name / plan.part(labels).name
        place.parent.mkdir(parents=True)
        make_set(place, plan, labels, shuffled)
    return folder


# --- selections ------------------------------------------------------------------------------------------------------


def test_selections_are_nested_stratified_and_differ(split):
    plans = read_selections(split)
    assert len(plans) == 3 and len({tuple(plan.shares[4]) for plan in plans}) == 3
    for plan in plans:
        assert set(plan.shares[2]) < set(plan.shares[4]) and len(plan.test) == 6
        assert sorted(name[0] for name in plan.shares[2]) == ["a", "b"]
        assert sorted(name[0] for name in plan.shares[4]) == ["a", "a", "b", "b"]
        assert len(plan.unlabelled[2]) == 14 and not set(plan.unlabelled[2]) & set(plan.shares[2])
        assert plan.groups[plan.test[0]] == plan.test[0].removeprefix("test/")[0]


def test_folders_of_a_selection_hold_its_files_and_no_other_label(split):
    plan = read_selections(split)[1]
    for kind in ("images", "masks", "instances"):
        assert [path.stem for path in sorted((plan.part(2) / kind).iterdir())] == plan.shares[2]
        assert len(list((plan.part(None) / kind).iterdir())) == 6
    assert sorted(path.stem for path in (plan.part(2) / "unlabelled" / "images").iterdir()) == plan.unlabelled[2]
    assert not (plan.part(2) / "unlabelled" / "masks").exists()


def test_patients_are_labelled_and_tested_as_a_whole():
    groups = {f"p{patient}_{number}": str(patient) for patient in range(6) for number in range(2 + patient)}
    settings = SelectionSettings([2, 3], selections=2, whole_groups=True, test_groups=2)
    for selection in range(2):
        test, labels = choose(groups, settings, selection)
        of = {count: {groups[name] for name in names} for count, names in labels.items()}
        assert len(of[2]) == 2 and of[2] < of[3] and len({groups[name] for name in test}) == 2
        assert not {groups[name] for name in test} & of[3]
        assert sorted(test + labels[3]) == sorted(
            name for name in groups if groups[name] in of[3] | {groups[n] for n in test}
        )
    with pytest.raises(InputError, match="5 labels are asked for, and 4 groups"):
        choose(groups, SelectionSettings([5], whole_groups=True, test_groups=2), 0)


def test_test_groups_that_show_the_images_of_other_groups_are_refused(data, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for path in (data / "train" / kind).iterdir():
            (tmp_path / kind / path.name).write_bytes(path.read_bytes())
        (tmp_path / kind / "copy.png").write_bytes((data / "train" / kind / "a_03.png").read_bytes())
    folders, settings = (tmp_path / "images", tmp_path / "masks"), SelectionSettings([2], 4, test_groups=1)
    groups = {path.stem: str(int(path.stem[2:]) // 4) for path in folders[0].iterdir() if path.stem != "copy"}
    with pytest.raises(InputError, match="1 images of the test_groups .* leak: (a_03|copy). Give .* group, of 0, 2"):
        make_selections(tmp_path / "split", folders, settings, groups=groups | {"copy": "2"})
    plans = make_selections(tmp_path / "split", folders, settings, groups=groups | {"copy": "0"})
    assert {("copy" in plan.test, "a_03" in plan.test) for plan in plans} == {(True, True), (False, False)}


def test_bad_group_tables_and_test_images_among_the_training_images_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="no column stain; it has name, look"):
        read_groups(data / "index.csv", "stain")
    folders = (data / "train" / "images", data / "train" / "masks")
    with pytest.raises(InputError, match="16 images have no group"):
        make_selections(tmp_path / "a", folders, SelectionSettings([2]), groups={"x": "y"})
    with pytest.raises(InputError, match="a leak"):
        make_selections(tmp_path / "a", folders, SelectionSettings([2]), test_folders=folders)
    plans = make_selections(tmp_path / "b", folders, SelectionSettings([3], selections=1, test_share=0.25))
    assert len(plans[0].test) == 4 and len(plans[0].unlabelled[3]) == 9


# --- arms and numbers ------------------------------------------------------------------------------------------------


def test_arms_are_four_without_and_sixteen_with_synthetic_images():
    assert sum(arm.is_synthetic for arm in ARMS.values()) == 16 and len(ARMS) == 20
    assert arm_of("synthetic then real, both rules") == Arm("synthetic then real", "both rules")
    assert Arm("80 % synthetic", "ignore").ignores and not Arm("80 % synthetic", "ignore").practises
    with pytest.raises(InputError, match="choose from real; real, longer; copy-paste"):
        arm_of("reel")


def score(ap50: float) -> InstanceScore:
    return InstanceScore(ap50, ap50 / 2, ap50 / 4, None, ap50, ap50, [ap50])


def rows_of(values: dict[tuple[int, str], list[float]]) -> list[TrialRow]:
    return [
        TrialRow(selection, labels, arm, 0, labels, 9, score(value), {"a": score(value), "b": score(value / 2)})
        for (labels, arm), found in values.items()
        for selection, value in enumerate(found)
    ]


def test_gain_is_paired_over_selections_and_has_an_interval():
    found = difference({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.5, 2: 0.6, 3: 0.1})
    assert found.mean == pytest.approx(0.2) and found.count == 3
    assert found.error == pytest.approx(0.1 / np.sqrt(3))
    assert found.high - found.mean == pytest.approx(4.302653 * 0.1 / np.sqrt(3))  # Student's t, two degrees of freedom
    assert [Difference(mean, 0.1, 0, 0, 3).verdict for mean in (0.21, 0.19, -0.09, -0.11)] == [
        "helps", "no clear difference", "no clear difference", "harms"
    ]  # fmt: skip
    assert found.verdict == "helps" and difference({0: 0.1}, {0: 0.2}).verdict == "one selection: not known"
    assert difference({0: 0.1}, {1: 0.2}) is None


def test_labels_worth_are_read_off_the_real_curve():
    curve = {3: 0.3, 10: 0.5, 30: 0.7}
    assert labels_worth(curve, 0.5) == (pytest.approx(10), "10")
    assert labels_worth(curve, 0.6)[0] == pytest.approx(np.sqrt(300))
    assert labels_worth(curve, 0.2)[1] == "fewer than 3" and labels_worth(curve, 0.8)[1] == "more than 30"


def test_report_recommends_what_helps_and_warns_of_what_harms():
    values = {
        (5, "real"): [0.40, 0.50, 0.60], (5, "copy-paste"): [0.42, 0.51, 0.62],
        (5, "real + synthetic"): [0.50, 0.61, 0.70], (5, "80 % synthetic"): [0.30, 0.41, 0.50],
        (30, "real"): [0.70, 0.72, 0.71], (30, "real + synthetic"): [0.71, 0.70, 0.71],
    }  # fmt: skip
    content = json.loads(json.dumps(summarize_trial(rows_of(values), 7)))
    table = {row[0]: row for row in trial_table(content).rows}
    assert table["5 labels, real + synthetic"][-3:-1] == ["helps", "12"]  # 5 * 6 ** (0.1033 / 0.21)
    assert table["5 labels, 80 % synthetic"][-3:-1] == ["harms", "fewer than 5"]
    assert table["30 labels, real + synthetic"][-3] == "no clear difference"
    text = "\n".join(trial_notes(content))
    assert "5 labels: the best arm with synthetic images (real + synthetic) minus the best without (copy-paste)" in text
    assert "Use synthetic images: real + synthetic." in text
    assert "5 labels: 80 % synthetic is harmful" in text
    assert "Do not use synthetic images here: they are not clearly better than real." in text
    assert "5 labels, the same difference by group: a +0.0867 ± 0.0067, b +0.0433 ± 0.0033" in text
    assert "by group, 5 labels, real: a 0.5000, b 0.2500" in text
    gains = next(one["gains"] for one in content["summary"] if one["arm"] == "80 % synthetic")
    assert gains == {"0": pytest.approx(-0.1), "1": pytest.approx(-0.09), "2": pytest.approx(-0.1)}


def test_arms_are_ranked_and_worth_labels_in_the_selections_that_they_share():
    values = {
        (5, "real"): [0.60, 0.40, 0.40, 0.40], (30, "real"): [0.90, 0.60, 0.60, 0.60],
        (5, "real + synthetic"): [0.65, 0.50, 0.50, 0.52], (5, "80 % synthetic"): [0.64], (5, "copy-paste"): [0.70],
    }  # fmt: skip
    content = summarize_trial(rows_of(values), 7)
    (found,) = content["comparisons"]
    assert (found["synthetic"], found["other"], found["count"]) == ("real + synthetic", "real", 4)
    assert found["mean"] == pytest.approx(0.37 / 4) and found["verdict"] == "helps"
    assert found["left_out"] == ["copy-paste", "80 % synthetic"]
    text = "\n".join(trial_notes(content))
    assert "5 labels: not compared, because selections are missing: copy-paste; 80 % synthetic." in text
    worth = {one["arm"]: one["worth"] for one in content["summary"] if one["labels"] == 5}
    assert worth["80 % synthetic"] == f"{5 * 6 ** (0.04 / 0.3):.0f}" == "6"  # in selection 0; "14" if over all
    first = {key: found[:1] for key, found in values.items()}
    (found,) = summarize_trial(rows_of(first), 7)["comparisons"]
    assert (found["synthetic"], found["other"], found["left_out"]) == ("real + synthetic", "copy-paste", [])
    arms = {(5, "real"): [0.4, 0.5, 0.6], (5, "real + synthetic"): [0.5, 0.6], (5, "80 % synthetic"): [0.4, 0.6]}
    (found,) = summarize_trial(rows_of(arms), 7)["comparisons"]  # selection 2 is still running
    assert (found["count"], found["left_out"]) == (2, []) and found["mean"] == pytest.approx(0.1)


def test_report_says_whether_the_segmenters_are_trained_out():
    alone, made = {(5, "real"): [0.40, 0.50]}, {(5, "real + synthetic"): [0.45, 0.56]}
    risen = summarize_trial(rows_of(alone | made | {(5, "real, longer"): [0.48, 0.60]}), 7)
    text = "\n".join(trial_notes(risen))
    assert (
        "3 times the steps change the AP of real images alone by +0.0900 ± 0.010. The segmenters are not trained"
        in text
    )
    assert "Do not use synthetic images here: real, longer is better." in text
    fallen = trial_notes(summarize_trial(rows_of(alone | made | {(5, "real, longer"): [0.40, 0.49]}), 7))
    assert "5 labels: 3 times the steps change the AP of real images alone by -0.00500 ± 0.0050." in fallen
    assert not any("harmful" in line for line in fallen)


def test_longer_training_has_three_times_the_steps(split):
    case = Case(read_selections(split)[0], 0, 2, None, TrialSettings((), (2,), steps=5, config=CONFIG))
    factors = [ARMS[name].step_factor for name in ("real", "real, longer", "self-training")]
    assert [case.segmenter(0, factor).steps for factor in factors] == [5, 15, 5]


# --- the experiment --------------------------------------------------------------------------------------------------


def test_planted_leaks_are_refused_before_any_training(split, tmp_path):
    settings = TrialSettings((ARMS["real"], ARMS["real + synthetic"]), (2,), steps=10**9, config=CONFIG)
    plans = read_selections(split)
    sets = tmp_path / "sets"
    for plan in plans:
        place = sets / plan.folder.name / "labels_002"
        place.parent.mkdir(parents=True)
        make_set(place, plan, 4)
    with pytest.raises(
        InputError, match=r"leaks at 2 labels: .*recombined from other cells.*trained on 2 images outside"
    ):
        run_trial(Study(plans, sets, settings, {}), tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="^labels 3: .* has no such part; it has 2, 4"):
        run_trial(Study(plans, None, TrialSettings((ARMS["real"],), (3,), config=CONFIG), {}), tmp_path / "out", CPU)


def test_a_run_that_is_interrupted_as_it_makes_its_folders_continues(data, monkeypatch, tmp_path):
    make_split(tmp_path / "shares", (data / "train" / "images", data / "train" / "masks"), [50], seed=0)
    words = ["utility", tmp_path / "shares", "--shares", 50, "--arms", "real", "--image-size", SIZE, "--steps", 2]
    words += ["--square", 16, "--seeds", 1, "--mask-type", "binary", "--output", tmp_path / "out", "--device", "cpu"]
    made, mkdir = [], Path.mkdir

    def interrupted(folder: Path, *rest: object, **flags: object) -> None:
        mkdir(folder, *rest, **flags)
        made.append(folder)
        if folder == tmp_path / "out" / "results":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(evaluate, *words)
    assert tmp_path / "out" / "results" in made
    call(evaluate, *words)
    assert (tmp_path / "out" / "utility.csv").is_file()


def test_messages_name_flags_that_the_split_takes(data, split, tmp_path):
    def said(*words: object) -> str:
        code, lines = run_here(evaluate, "utility", *words, "--image-size", SIZE, "--output", tmp_path / "out")
        assert code == 2
        return lines[-1].partition("error: ")[2]

    assert said(split, "--arms", "real + synthetic") == (
        "arms with synthetic images need --sets: a folder with selection_00/labels_NNN"
    )
    assert said(split, "--labels", 3).startswith("--labels 3: ")
    assert said(split, "--arms", "x").startswith("--arms 'x': unknown; ")
    make_split(tmp_path / "shares", (data / "train" / "images", data / "train" / "masks"), [50], seed=0)
    words = (tmp_path / "shares", "--shares", 50)
    assert said(*words, "--arms", "synthetic") == "arms with synthetic images need --synthetic: SHARE=SAMPLE_DIR"
    assert said(*words[:2], 30).startswith("--shares 30: ")

    plan = read_selections(split)[0]
    samples = make_set(tmp_path / "set", plan, 2, count=2)
    (samples.folder / "settings.json").write_text(json.dumps(samples.settings | {"trained_on": None}))
    (leak,) = find_leaks(plan, 2, SampleSet(samples.folder))
    assert "not known: train its generator again" in leak


def test_unlabelled_images_are_no_leak_if_the_generator_has_not_learned_their_masks(split, tmp_path):
    plan = read_selections(split)[0]
    own, more = seen(plan, 2), seen(plan, 4)
    test = file_sha256(next((plan.part(None) / "images").iterdir()))
    samples = make_set(tmp_path / "set", plan, 2, count=2)

    def leaks(trained_on: list[str], **note: list[str]) -> str:
        settings = samples.settings | {"trained_on": trained_on} | note
        (samples.folder / "settings.json").write_text(json.dumps(settings))
        return "; ".join(find_leaks(plan, 2, SampleSet(samples.folder)))

    assert leaks(more, labelled_on=own) == ""
    assert "learned the masks of 2 images outside" in leaks(more, labelled_on=more)
    assert "trained on 2 images outside" in leaks(more)
    assert "trained on 1 images of the test set" in leaks([*own, test], labelled_on=own)


def test_real_masks_may_store_classes_as_other_values(split):
    settings = TrialSettings((ARMS["real"],), (2,), mask_values=(0, 255), config=CONFIG)
    case = Case(read_selections(split)[0], 0, 2, None, settings)
    assert case.config.mask_values == (0, 255) and {*np.unique(case.real[0].item.classes)} == {0, 1}
    assert evaluate.parse_args(["utility", str(split), "--mask-values", "0", "255"]).mask_values == [0, 255]


@pytest.mark.parametrize(("mask_type", "classes"), [("instances", 2), ("classes", 3)])
def test_without_a_set_the_masks_say_whether_the_third_class_is_a_boundary(data, tmp_path, mask_type, classes):
    folders = (data / "train" / "images", data / "train" / "instances")
    (plan,) = make_selections(tmp_path / "split", folders, SelectionSettings([2], selections=1))
    settings = TrialSettings((ARMS["real"],), (2,), mask_type=mask_type, config=replace(CONFIG, num_classes=3))
    case = Case(plan, 0, 2, None, settings)
    assert case.num_classes == case.segmenter(0).num_classes == classes
    assert {value for one in case.test for value in np.unique(one.item.classes)} == set(range(classes))


def test_training_images_may_begin_as_the_files_of_test_images_do(data, tmp_path):
    for seed, name in enumerate(("test__p", "test__q", "r", "s")):
        write_pair(tmp_path / "train", name, seed)
    write_pair(tmp_path / "val", "v", 100)
    folders = [(tmp_path / part / "images", tmp_path / part / "masks") for part in ("train", "val")]
    groups = {"test__p": "1", "test__q": "2", "r": "1", "s": "2", "v": "2"}
    settings = SelectionSettings([4], selections=1)
    (plan,) = make_selections(tmp_path / "split", folders[0], settings, folders[1], groups=groups)
    case = Case(plan, 0, 4, None, TrialSettings((ARMS["real"],), (4,), config=CONFIG))
    del groups["v"]
    assert {one.name: case.group(one.name) for one in case.real} == groups
    assert [case.group(one.name) for one in case.test] == ["2"]
    write_pair(tmp_path / "val", "p", 101)
    with pytest.raises(InputError, match="test__p and test/p would get one file name: rename the training image"):
        make_selections(tmp_path / "again", folders[0], settings, folders[1], groups=groups | {"v": "2", "p": "1"})


def test_command_runs_all_arms_resumes_and_writes_its_report(split, tmp_path, capsys):
    sets, out = sets_of(split, tmp_path / "sets", 2), tmp_path / "out"
    words = ["utility", split, "--sets", sets, "--labels", 2, "--steps", 2, "--square", 16, "--pseudo-images", 2]
    arms = [
        "--arms",
        "real",
        "copy-paste",
        "self-training",
        "copy-paste + synthetic",
        "synthetic then real",
        "80 % synthetic",
    ]
    call(evaluate, *words, *arms, "--selections", 0, "--output", out, "--device", "cpu")
    first = {path.name: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert len(first) == 6
    call(evaluate, *words, *arms[:2], arms[4], "--selections", 0, 1, "--output", out, "--device", "cpu")
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert len(kept) == 8 and first.items() <= kept.items()
    printed = capsys.readouterr().out
    assert "2 labels, synthetic then real" in printed and "AP 0.5, touching" in printed
    rows = list(csv.DictReader((out / "utility.csv").open()))
    counts = {(row["real_images"], row["synthetic_images"], row["pseudo_images"]) for row in rows}
    assert counts == {("2", "0", "0"), ("2", "12", "0"), ("2", "0", "2")}
    page = (out / "utility.html").read_text()
    assert "Does it help?" in page and "data:image/png" in page
    with pytest.raises(InputError, match="other settings"):
        call(evaluate, *words, *arms, "--steps", 3, "--output", out, "--device", "cpu")


# --- results of other images -----------------------------------------------------------------------------------------

ALONE = tuple(ARMS[name] for name in ("real", "copy-paste", "self-training"))


@pytest.fixture
def warned():
    """The warnings of the experiment."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("evaluation.experiments.trial").addHandler(handler)
    yield lines
    logging.getLogger("evaluation.experiments.trial").removeHandler(handler)


def split_of(folder: Path, data: Path, seed: int = 0) -> list[SplitPlan]:
    """One selection of two labels, with instances, test instances, looks and unlabelled images."""
    train, val = data / "train", data / "val"
    settings = SelectionSettings([2], selections=1, seed=seed)
    return make_selections(
        folder, (train / "images", train / "masks"), settings, (val / "images", val / "masks"), train / "instances",
        val / "instances", read_groups(data / "index.csv", "look"),
    )  # fmt: skip


def try_out(
    plans: list[SplitPlan], output: Path, sets: Path | None = None, arms: Sequence[Arm] = ALONE
) -> list[TrialRow]:
    settings = TrialSettings(tuple(arms), (2,), steps=2, crop=16, pseudo_images=2, config=CONFIG)
    return run_trial(Study(plans, sets, settings, {}), output, CPU)


def test_a_second_split_in_the_same_output_takes_no_result_of_the_first(data, tmp_path, warned):
    first, second = (split_of(tmp_path / f"split_{seed}", data, seed) for seed in (0, 1))
    assert first[0].shares != second[0].shares
    of_first = try_out(first, tmp_path / "both")
    of_second = try_out(second, tmp_path / "both")
    (line,) = warned
    assert line.startswith("3 results in") and "computed again. The old ones go to" in line
    assert of_second == try_out(second, tmp_path / "alone") != of_first
    kept = [json.loads(path.read_text())["row"] for path in (tmp_path / "both" / "replaced").iterdir()]
    assert {row["arm"]: row["score"]["dice"] for row in kept} == {row.arm: row.score.dice for row in of_first}
    assert len(list((tmp_path / "both" / "segmenters").iterdir())) == 2  # each has a teacher of its own
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "both" / "results").iterdir()}
    assert try_out(second, tmp_path / "both") == of_second
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "both" / "results").iterdir()}


@pytest.mark.parametrize("kind", ["images", "masks", "instances"])
@pytest.mark.parametrize("part", ["labels_002", "test", "labels_002/unlabelled", "groups"])
def test_a_stamp_knows_every_file_that_an_arm_uses(data, tmp_path, part, kind):
    (plan,) = split_of(tmp_path / "split", data)
    before = {arm.name: Stamps().of(plan, 2, arm, None, {}) for arm in ALONE}
    assert before == {arm.name: Stamps().of(plan, 2, arm, None, {}) for arm in ALONE}
    if part == "groups":
        plan = replace(plan, groups=plan.groups | {plan.shares[2][0]: "other"})
    else:
        folder = plan.folder / part / ("images" if "unlabelled" in part else kind)
        path = sorted(folder.iterdir())[0]
        array = np.array(Image.open(path))
        array[0, 0] = 1 - np.minimum(array[0, 0], 1)
        path.unlink()
        Image.fromarray(array).save(path)
    changed = {arm.name for arm in ALONE if Stamps().of(plan, 2, arm, None, {}) != before[arm.name]}
    assert changed == ({"self-training"} if "unlabelled" in part else {arm.name for arm in ALONE})


def test_rows_that_are_out_of_date_are_left_out_and_counted(data, tmp_path, warned):
    plans, out = split_of(tmp_path / "split", data), tmp_path / "out"
    rows = try_out(plans, out)
    names = {row.arm: path for path in (out / "results").iterdir() for row in rows if slug(row.arm) in path.name}
    for arm, change in (("copy-paste", {"files": {"labelled": "x"}}), ("self-training", {"files": None})):
        content = json.loads(names[arm].read_text())
        content["stamp"] |= change
        content["stamp"] = {name: value for name, value in content["stamp"].items() if value is not None}
        names[arm].write_text(json.dumps(content))
    assert [row.arm for row in try_out(plans, out, arms=ALONE[:1])] == ["real"]
    assert "left out: 1 results in" in "\n".join(warned) and "are of other images or sets" in "\n".join(warned)
    assert "are of an earlier version, which noted no images" in "\n".join(warned)
    assert len(list((out / "results").iterdir())) == 3
    assert sorted(row.arm for row in try_out(plans, out)) == sorted(arm.name for arm in ALONE)
    assert len(list((out / "replaced").iterdir())) == 2


def slug(arm: str) -> str:
    return f"_{arm.replace('-', '_')}_seed_0"


def test_a_result_of_another_set_is_left_out_and_one_whose_set_is_not_named_stays(data, tmp_path, warned):
    plans, out = split_of(tmp_path / "split", data), tmp_path / "out"
    place = tmp_path / "sets" / "selection_00" / "labels_002"
    place.parent.mkdir(parents=True)
    samples = make_set(place, plans[0], 2, count=4)
    arms = (ARMS["real"], ARMS["real + synthetic"])
    first = try_out(plans, out, tmp_path / "sets", arms=arms)
    assert try_out(plans, out, arms=arms[:1]) == first and not warned  # no set is named
    shutil.copyfile(samples.samples[1].image_path, samples.samples[0].image_path)
    assert [row.arm for row in try_out(plans, out, tmp_path / "sets", arms=arms[:1])] == ["real"]
    assert "left out: 1 results" in "\n".join(warned)
    second = try_out(plans, out, tmp_path / "sets", arms=arms)
    assert second[0] == first[0] and second[1].arm == first[1].arm and len(list((out / "replaced").iterdir())) == 1


def test_a_measure_of_a_set_leaves_its_results_and_another_reading_does_not(data, tmp_path):
    (plan,) = split_of(tmp_path / "split", data)
    samples = make_set(tmp_path / "set", plan, 2, count=3)

    def stamp() -> dict:
        return Stamps().of(plan, 2, ARMS["real + synthetic"], PracticeFolder(tmp_path / "set"), {})

    before = stamp()
    samples.write_fidelity([0.1, 0.2, 0.3])
    write_column(samples.folder, "my notes", ["a", "b", "c"])
    assert stamp() == before
    stamps = [before]
    for column, value in (("mask_type", "classes"), ("intensity", "x"), ("window_high", "200")):
        write_column(samples.folder, column, [value] * 3)
        stamps.append(stamp())
    assert len({json.dumps(one) for one in stamps}) == 4


def test_arms_and_labels_that_are_named_twice_are_trained_once(data, monkeypatch, tmp_path):
    split_of(tmp_path / "split", data)
    trained = []
    monkeypatch.setattr(trial, "train_segmenter", lambda *given: trained.append(given) or train_segmenter(*given))
    words = ["--steps", 2, "--image-size", SIZE, "--square", 16, "--arms", "copy-paste", "real", "copy-paste", "real"]
    call(evaluate, "utility", tmp_path / "split", "--labels", 2, 2, *words, "--output", tmp_path / "out",
         "--device", "cpu")  # fmt: skip
    assert len(trained) == 2


def test_unknown_selections_are_refused(data, tmp_path):
    words = ["--steps", 2, "--image-size", SIZE, "--arms", "real", "--output", tmp_path / "out", "--device", "cpu"]
    split_of(tmp_path / "split", data)
    code, lines = run_here(evaluate, "utility", tmp_path / "split", "--selections", 0, 7, *words)
    assert code == 2 and "--selections 7: there are 1, from 0 to 0" in lines[-1]


def test_pixels_to_ignore_belong_to_the_stamp_of_arms_that_ignore(data, tmp_path):
    (plan,) = split_of(tmp_path / "split", data)
    samples = make_set(tmp_path / "made" / "round_0" / "samples", plan, 2, count=2)
    (tmp_path / "made" / "practice.json").write_text(json.dumps({"rounds": [{"round": 0}], "results": {}}))
    (tmp_path / "made" / "round_0" / "ignore").mkdir()

    def stamps() -> list[dict]:
        made = PracticeFolder(tmp_path / "made")
        return [Stamps().of(plan, 2, ARMS[f"real + synthetic{rule}"], made, {}) for rule in ("", ", ignore")]

    found = []
    for value in (0, 255):
        for one in samples.samples:
            wrong = np.full((SIZE, SIZE), value, np.uint8)
            Image.fromarray(wrong).save(tmp_path / "made" / "round_0" / "ignore" / f"{one.name}.png")
        found.append(stamps())
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


@pytest.mark.slow
def test_shuffled_pairs_are_reported_as_harmful_and_faithful_ones_are_not(split, tmp_path):
    settings = TrialSettings((ARMS["real"], ARMS["80 % synthetic"]), (4,), steps=100, crop=32, config=CONFIG)
    verdicts = {}
    for name, shuffled in (("faithful", False), ("shuffled", True)):
        sets = sets_of(split, tmp_path / name, 4, shuffled)
        rows = run_trial(Study(read_selections(split), sets, settings, {}), tmp_path / f"out_{name}", CPU)
        content = summarize_trial(rows, settings.steps)
        entry = next(one for one in content["summary"] if one["arm"] == "80 % synthetic")
        verdicts[name] = entry["gain"]["verdict"], "\n".join(trial_notes(content))
    assert verdicts["shuffled"][0] == "harms" and "Do not use synthetic images" in verdicts["shuffled"][1]
    assert "is harmful" in verdicts["shuffled"][1]
    assert verdicts["faithful"][0] != "harms"
