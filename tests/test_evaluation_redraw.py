"""sample_ddp.py --min-fidelity: which images are sampled again, and which attempt stays."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_sets import disk, paint
from PIL import Image
from script_helpers import run, run_here, train_arguments, write_pairs
from test_engine_peers import launch, together

import sample_ddp
import train
from common.disk import file_sha256
from common.errors import with_flags
from common.randomness import derived_seed
from engine import peers
from engine.machine import Machine
from engine.sampling import image_seed
from evaluation.fidelity import fidelity_of
from evaluation.judge import Judge, build_network
from evaluation.redraw import Redraw, weights_sha256
from settings import sampling_settings
from synthetic.writer import Attempt

SIZE = 18


class BrightIsCell:
    """Judge for which a bright pixel is a cell."""

    def class_maps(self, images: list[np.ndarray]) -> np.ndarray:
        return np.stack([image.mean(axis=-1) > 120 for image in images]).astype(np.uint8)


CELLS = disk(SIZE, 8, 9, 5)
MASK = np.stack([~CELLS, CELLS]).astype(np.float32)
RIGHT, NEAR, FAR = (paint(np.roll(CELLS, shift, axis=1)) for shift in (0, 1, 6))
SCORES = [fidelity_of(np.roll(CELLS, shift, axis=1), CELLS) for shift in (0, 1, 6)]


def test_an_image_that_follows_its_mask_stays_at_once():
    redraw = Redraw(BrightIsCell(), 0.8, 3)
    attempt = redraw(None, MASK, NEAR, 1)
    assert attempt.columns() == {"attempt": "1", "attempt_fidelity": f"{SCORES[1]:.4f}", "fidelity_reached": "yes"}
    assert redraw.is_done(attempt) and 0.8 < SCORES[1] < 1


def test_an_image_is_drawn_until_it_reaches_the_threshold():
    redraw = Redraw(BrightIsCell(), 0.95, 5)
    first = redraw(None, MASK, NEAR, 1)
    assert not redraw.is_done(first)
    assert not redraw.is_done(redraw(None, MASK, FAR, 1))  # another image of the set in between
    attempt = redraw(first, MASK, RIGHT, 2)
    assert attempt == Attempt(2, 1, True, tried=2) and redraw.is_done(attempt)


def test_the_best_attempt_stays_when_none_reaches_the_threshold():
    redraw, attempt = Redraw(BrightIsCell(), 0.999, 3), None
    for number, image in enumerate((FAR, NEAR, FAR), start=1):
        attempt = redraw(attempt, MASK, image, number)
        assert redraw.is_done(attempt) == (number == 3)
    assert attempt == Attempt(2, SCORES[1], False, tried=3)
    assert attempt.columns()["fidelity_reached"] == "no"
    assert redraw(None, MASK, FAR, 1).number == 1  # nothing is remembered of a finished image
    assert redraw(Attempt(1, SCORES[1], False, 1), MASK, NEAR, 2).number == 1  # of equal ones the first


def test_notes_of_earlier_versions_say_that_the_image_is_finished():
    old = {"attempt": "2", "attempt_fidelity": "0.8125", "fidelity_reached": "no"}
    attempt = Attempt.from_plain(old)
    assert attempt.columns() == old and Redraw(BrightIsCell(), 0.9, 10**6).is_done(attempt)
    now = Attempt(2, 1 / 3, False, 3)
    assert Attempt.from_plain(json.loads(json.dumps(asdict(now)))) == now


def test_the_log_counts_the_images_that_were_drawn_again_and_no_others(caplog):
    once = [Attempt(1, 0.5, False, tried=1), Attempt(1, 0.95, True, tried=1)]  # the first with --max-attempts 1
    old = {"attempt": "1", "attempt_fidelity": "0.95", "fidelity_reached": "yes"}
    again = [Attempt(2, 0.95, True, tried=2), Attempt(1, 0.5, False, tried=3)]
    caplog.set_level("INFO")
    sample_ddp.log_attempts(0.9, [*once, Attempt.from_plain(old), *again], 6)
    assert "--min-fidelity 0.9: 2 of 6 images were drawn again; 2 did not reach it" in caplog.text


def test_every_attempt_has_its_own_noise_and_the_first_is_the_plain_image():
    assert image_seed(3, 7) == image_seed(3, 7, 1) == derived_seed(3, 7)
    seeds = [image_seed(seed, index, attempt) for seed in (0, 3) for index in range(6) for attempt in range(1, 7)]
    windows = [derived_seed(seed, index, 1) for seed in (0, 3) for index in range(6)]  # of random crops
    assert len({*seeds, *windows}) == len(seeds) + len(windows)


def test_hash_of_weights_sees_a_single_number():
    weights = build_network(2).state_dict()
    before = weights_sha256(weights)
    next(iter(weights.values())).view(-1)[0] += 1e-6
    assert weights_sha256(weights) != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-attempts", "3"], "--max-attempts has no effect without --min-fidelity"),
        (["--judge-mask-type", "auto"], "--judge-mask-type has no effect without --min-fidelity"),
        (["--min-fidelity", "0.8", "--judge-images", "a"], "needs --judge-images IMAGES and --judge-masks MASKS"),
        (["--min-fidelity", "0"], "0 is not above 0 and up to 1"),
    ],
)
def test_flags_without_effect_or_pairs_are_refused(words, message):
    code, lines = run_here(sample_ddp, "ODE", "--ckpt", "a.pt", "--mask-path", "masks", *words)
    assert code == 2 and message in lines[-1]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folder with images/, masks/ and a checkpoint, run.pt, of a hardly trained generator."""
    folder = tmp_path_factory.mktemp("redraw")
    images, masks = write_pairs(folder)
    train.main(train.parse_args(train_arguments(images, masks, folder, "run", 4)[1:]))
    (folder / "run" / "checkpoints" / "0000004.pt").rename(folder / "run.pt")
    return folder


def arguments(made: Path, folder: Path, *more: object) -> list[str]:
    words = ["ODE", "--ckpt", made / "run.pt", "--mask-path", made / "masks", "--sample-dir", folder, "--device", "cpu"]
    words += ["--precision", "float32", "--num-sampling-steps", 2, "--per-proc-batch-size", 4]
    return [str(word) for word in (*words, *more)]


def judged(made: Path, *more: object) -> list[object]:
    pairs = ["--judge-images", made / "images", "--judge-masks", made / "masks", "--judge-steps", 20]
    return [*pairs, "--judge-cache", made / "judges", *more]


def make(made: Path, folder: Path, *more: object) -> list[dict[str, str]]:
    """Run the command in this process; rows of the manifest."""
    sample_ddp.main(sample_ddp.parse_args(arguments(made, folder, *more)))
    with (folder / "manifest.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


@pytest.fixture(scope="module")
def hopeless(made) -> tuple[Path, list[dict[str, str]]]:
    """A set whose images are drawn three times each, since no image reaches a Dice of 1."""
    folder = made / "hopeless"
    return folder, make(made, folder, *judged(made, "--min-fidelity", 1, "--max-attempts", 3))


def test_manifest_and_settings_say_which_attempt_stayed_and_who_judged(hopeless, made):
    folder, rows = hopeless
    assert {row["fidelity_reached"] for row in rows} == {"no"} and {row["attempt"] for row in rows} <= {"1", "2", "3"}
    note = json.loads((folder / "settings.json").read_text())["redraw"]
    assert (note["min_fidelity"], note["max_attempts"]) == (1, 3)
    assert note["judge_images_sha256"] == sorted(file_sha256(path) for path in (made / "images").iterdir())
    (cached,) = (made / "judges").glob("*.pt")
    assert note["judge_key"].startswith(cached.stem.removeprefix("judge-"))


def test_noted_fidelity_is_what_the_judge_says_of_the_file(hopeless, made):
    folder, rows = hopeless
    network = build_network(2)
    (cached,) = (made / "judges").glob("*.pt")
    network.load_state_dict(torch.load(cached, weights_only=True))
    judge = Judge(network, torch.device("cpu"), 64)  # no image is larger
    for row in rows:
        image, label = (np.array(Image.open(folder / row[name])) for name in ("image", "label"))
        fidelity = fidelity_of(judge.class_maps([image])[0] > 0, label > 0)
        assert row["attempt_fidelity"] == f"{fidelity:.4f}"


def test_first_attempts_are_the_images_of_a_set_without_threshold(hopeless, made, tmp_path):
    folder, rows = hopeless
    make(made, tmp_path / "plain")
    for row in rows:
        kept, first = (np.array(Image.open(place / row["image"])) for place in (folder, tmp_path / "plain"))
        assert np.array_equal(kept, first) == (row["attempt"] == "1")


def test_a_reachable_threshold_keeps_the_first_attempt_that_reaches_it(hopeless, made):
    _, best = hopeless
    scores = sorted(float(row["attempt_fidelity"]) for row in best)
    threshold = scores[len(scores) // 2]
    rows = make(made, made / "half", *judged(made, "--min-fidelity", threshold - 1e-4, "--max-attempts", 3))
    assert {"yes", "no"} == {row["fidelity_reached"] for row in rows}
    for row, other in zip(rows, best, strict=True):
        reached = float(other["attempt_fidelity"]) >= threshold - 1e-4
        assert row["fidelity_reached"] == ("yes" if reached else "no")
        assert int(row["attempt"]) <= int(other["attempt"]) if reached else row["attempt"] == other["attempt"]


@pytest.mark.parametrize("flag", ["--min-fidelity", "--max-attempts"])
def test_a_flag_of_the_judge_that_only_one_machine_has_is_named_before_it_is_trained(made, tmp_path, monkeypatch, flag):
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 2.0)
    words = judged(made, "--judge-cache", tmp_path / "judges", "--min-fidelity", 0.9)
    given = [words, []] if flag == "--min-fidelity" else [[*words, flag, 3], words]
    every = [sample_ddp.parse_args(arguments(made, tmp_path / "set", *words)) for words in given]
    with launch("nodea", "nodeb") as both:
        machines = [Machine(one.rank, 2, torch.device("cpu"), "float32", one) for one in both]
        work = [
            lambda machine=machine, args=args: sample_ddp.sample(args, sampling_settings(args), machine)
            for machine, args in zip(machines, every, strict=True)
        ]
        said = [with_flags(getattr(error, "marked", str(error))) for error in together(*work)]
    value = {"--min-fidelity": 0.9, "--max-attempts": 3}[flag]
    assert said[0] == said[1] and "Give the same command" in said[0]
    assert said[0].startswith(f"{flag}: process 0 on nodea has {value}, process 1 on nodeb has nothing.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ranks_do_not_change_a_byte(hopeless, made):
    words = judged(made, "--min-fidelity", 1, "--max-attempts", 3)
    run("sample_ddp.py", *arguments(made, made / "two", *words), ranks=2)  # beside the other: equal relative paths
    assert files_of(made / "two") == files_of(hopeless[0])


def test_restarts_do_not_change_a_byte(hopeless, made):
    folder, _ = hopeless
    files = files_of(folder)
    words = judged(made, "--min-fidelity", 1, "--max-attempts", 3)
    for name in ("cell_0", "cell_4"):
        (folder / "images" / f"{name}.png").unlink()
    (folder / "attempts" / "cell_2.json").write_text("{")  # a whole image, but nothing says which attempt it is
    (folder / "manifest.csv").unlink()
    make(made, folder, *words)
    assert files_of(folder) == files


def test_a_set_is_not_finished_with_another_threshold_or_judge(hopeless, made):
    folder, _ = hopeless
    for words in (["--min-fidelity", 0.9, "--max-attempts", 3], ["--min-fidelity", 1, "--max-attempts", 2]):
        with pytest.raises(ValueError, match="made with other settings .redraw"):
            make(made, folder, *judged(made, *words))
    with pytest.raises(ValueError, match="made with other settings .redraw"):
        make(made, folder)
