"""Resume: values from the checkpoint, refused changes, and missing files of killed runs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from script_helpers import run_here, train_arguments, write_pairs

import train
from engine.checkpoint import read_checkpoint, save_checkpoint
from engine.loop import save_preview
from engine.machine import resolve_precision

pytestmark = pytest.mark.usefixtures("one_block")
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def start(pairs: tuple[Path, Path], results: Path, name: str, steps: int, *more: object) -> tuple[int, str]:
    """Train in this process; exit code and stderr."""
    code, lines = run_here(train, *train_arguments(*pairs, results, name, steps)[1:], *more)
    return code, "\n".join(lines)


def newest(run: Path) -> dict:
    return read_checkpoint(max((run / "checkpoints").glob("*.pt")))


def test_resume_keeps_the_record_of_init_from(pairs, tmp_path):
    start(pairs, tmp_path, "one", 1)
    first = tmp_path / "one" / "checkpoints" / "0000001.pt"
    assert len(newest(tmp_path / "one")["trained_on"]) == 6
    start(pairs, tmp_path, "two", 1, "--init-from", first)
    code, _ = start(pairs, tmp_path, "two", 2)
    state = newest(tmp_path / "two")
    assert (code, state["step"]) == (0, 2)
    assert state["config"]["train"]["init_from"] == str(first)
    assert state["trained_on"] is None  # what the first weights have seen is not known
    code, said = start(pairs, tmp_path, "two", 3, "--init-from", "elsewhere.pt")
    assert code == 2 and f"contradicts --init-from elsewhere.pt (the checkpoint has {first})" in said


def test_resume_accepts_default_values_and_refuses_other_values(pairs, tmp_path):
    start(pairs, tmp_path, "run", 1)
    chosen = {"--time-scale": "1000", "--prediction": "velocity", "--time-sampling": "logit-normal", "--time-mean": "0"}
    by_hand = [word for flag in chosen.items() for word in flag]
    assert start(pairs, tmp_path, "run", 2, *by_hand)[0] == 0
    for flag, value in {"--time-scale": "1", "--prediction": "data", "--time-mean": "-1"}.items():
        code, said = start(pairs, tmp_path, "run", 3, flag, value)
        assert code == 2 and f"contradicts {flag} {value}" in said.replace(".0 ", " ")


def test_values_that_differ_in_a_late_digit_differ(pairs, tmp_path):
    start(pairs, tmp_path, "run", 1, "--window", "0", "99.8")
    code, said = start(pairs, tmp_path, "run", 2, "--window", "0", "99.80001")
    assert code == 2 and "contradicts --window 0 99.80001 (the checkpoint has 0 99.8)" in said


def test_preview_guidance_is_refused_if_masks_are_never_dropped(pairs, tmp_path):
    start(pairs, tmp_path, "run", 1, "--mask-dropout", 0)
    code, said = start(pairs, tmp_path, "run", 2, "--cfg-scale", 2)
    assert code == 2 and "--cfg-scale has no effect on the previews with --mask-dropout 0" in said
    assert start(pairs, tmp_path, "run", 2, "--cfg-scale", 1)[0] == 0


def test_resume_keeps_the_number_of_checkpoints_to_keep(pairs, tmp_path):
    start(pairs, tmp_path, "run", 1, "--keep", 1)
    start(pairs, tmp_path, "run", 3, "--ckpt-every", 1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000003.pt"]


def test_values_from_the_checkpoint_are_checked_like_flags(pairs, tmp_path):
    start(pairs, tmp_path, "parts", 1, "--global-batch-size", 6, "--accumulate", 3)
    code, said = start(pairs, tmp_path, "parts", 2)  # batches of 4
    assert code == 2 and "--accumulate 3 does not divide the 4 images" in said


def test_resume_keeps_precision_but_not_compile(pairs, tmp_path):
    path = tmp_path / "run" / "config.json"
    words = [str(word) for word in train_arguments(*pairs, tmp_path, "run", 1)[1:]]
    assert run_here(train, *words)[0] == 0
    state = newest(tmp_path / "run")
    state["config"]["train"]["compile"] = True
    save_checkpoint(tmp_path / "run" / "checkpoints" / "0000001.pt", state)
    at = words.index("--precision")
    code, said = run_here(train, *words[:at], *words[at + 2 :], "--max-steps", 2)
    assert code == 0, said
    config = json.loads(path.read_text())
    assert (config["machine"]["precision"], config["train"]["compile"]) == ("float32", False)


def test_epochs_given_on_resume_replace_max_steps(pairs, tmp_path):
    words = train_arguments(*pairs, tmp_path, "run", 2)[1:]
    assert run_here(train, *words)[0] == 0
    at = words.index("--max-steps")
    assert run_here(train, *words[:at], *words[at + 2 :], "--epochs", 3)[0] == 0
    assert newest(tmp_path / "run")["step"] == 5  # 18 images in batches of 4


@pytest.mark.parametrize("name", ["", ".", "..", "../run", "a/b", "/tmp/run", "a\nb"])
def test_a_run_name_that_is_not_a_plain_name_is_refused(pairs, tmp_path, name):
    code, said = start(pairs, tmp_path / "results", name, 1)
    assert code == 2 and "--run-name" in said and "--results-dir says where it lies" in said
    assert not (tmp_path / "results").exists()


def test_a_checkpoint_that_is_a_loop_of_links_is_refused(pairs, tmp_path):
    loop = tmp_path / "loop.pt"
    loop.symlink_to(loop)
    code, said = start(pairs, tmp_path, "run", 1, "--ckpt", loop)
    assert code == 2 and f"--ckpt {loop}: no such file" in said


def test_a_diverging_run_stops_with_a_message_and_saves_no_bad_checkpoint(pairs, tmp_path):
    code, said = start(pairs, tmp_path, "run", 60, "--lr", "1e30", "--ckpt-every", 3, "--log-every", 5)
    assert code == 2
    words = "train.py: error: step 3: weights have blown up at learning rate 1e+30. Start again with a lower --lr."
    assert said.splitlines()[-1] == words
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_run_that_diverges_later_names_its_last_good_checkpoint(pairs, tmp_path):
    start(pairs, tmp_path, "run", 2)
    code, said = start(pairs, tmp_path, "run", 60, "--lr", "1e30", "--ckpt-every", 3, "--log-every", 5)
    assert code == 2 and "checkpoints/0000002.pt is good: run the same command with a lower --lr." in said
    code, said = start(pairs, tmp_path, "run", 4)
    assert code == 0 and "changed on resume: --lr" not in said  # the file has the old rate
    assert all(value.isfinite().all() for value in newest(tmp_path / "run")["model"].values())


def test_the_autoencoder_of_a_run_may_move_but_not_change(pairs, tmp_path, autoencoder_folder):
    latent = ["--model", "SiT-Ti/2", "--vae"]
    moved = tmp_path / "moved"
    shutil.copytree(autoencoder_folder, moved)
    start(pairs, tmp_path, "run", 1, *latent, autoencoder_folder)
    code, said = start(pairs, tmp_path, "run", 2, *latent, moved)
    assert code == 0, said
    weights = next(moved.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    code, said = start(pairs, tmp_path, "run", 3, *latent, moved)
    assert code == 2 and "not the autoencoder that this run began with" in said


def test_another_batch_size_continues_at_the_same_epoch(pairs, tmp_path):
    words = train_arguments(*pairs, tmp_path, "run", 0)[1:]
    where = words.index("--max-steps")
    words = [*words[:where], *words[where + 2 :]]  # 6 images
    assert run_here(train, *words, "--epochs", 2)[0] == 0  # 3 steps of 4
    code, lines = run_here(train, *words, "--epochs", 4, "--global-batch-size", 6)
    assert code == 0 and any("changed on resume: --global-batch-size: 4 -> 6" in line for line in lines)
    state = newest(tmp_path / "run")
    assert (state["step"], state["images_seen"]) == (5, 24)


def test_a_finished_run_makes_the_preview_and_export_that_a_kill_prevented(pairs, tmp_path):
    start(pairs, tmp_path, "run", 2, "--export-safetensors")
    made = [tmp_path / "run" / "previews" / "0000002.png", tmp_path / "run" / "model.safetensors"]
    before, metrics = made[0].read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_text()
    for path in made:
        path.unlink()
    code, said = start(pairs, tmp_path, "run", 2, "--export-safetensors")
    assert code == 0 and "nothing left to do" in said
    assert made[0].read_bytes() == before and made[1].is_file()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics and metrics.count("preview/grid") == 1


def test_changed_images_are_logged_on_resume(pairs, tmp_path):
    start(pairs, tmp_path, "run", 1)
    others = write_pairs(tmp_path / "others", seed=1)
    code, said = start(others, tmp_path, "run", 2)
    assert code == 0 and "changed on resume: the images are others than before (6 now)" in said
    assert len(newest(tmp_path / "run")["trained_on"]) == 12


def test_a_continued_run_is_the_same_run_at_wandb_and_no_file_holds_the_key(pairs, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_" + KEY)
    for steps in (2, 4):
        code, said = start(pairs, tmp_path, "run", steps, "--wandb")
        assert code == 0 and KEY not in said
        time.sleep(1)  # wandb names its folders by the second, and adds a number to the second one of a name
    run = tmp_path / "run"
    identity = (run / "wandb_id.txt").read_text().strip()
    folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(name.endswith(f"-{identity}") for name in folders)
    assert [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4]
    assert [line["step"] for line in lines if "preview/grid" in line] == [2, 4]
    assert torch.isfinite(newest(run)["sums"]).all()


def without(words: list[str], *flags: str) -> list[str]:
    """The same command line without flags and their values."""
    places = {at + more for at, word in enumerate(words) if word in flags for more in (0, 1)}
    return [word for at, word in enumerate(words) if at not in places]


def test_the_log_of_a_continued_run_says_the_seed_and_precision_of_its_steps(pairs, tmp_path):
    cpu = torch.device("cpu")
    other = "float32" if resolve_precision("auto", cpu) == "bf16" else "bf16"  # not what the flags would give
    words = train_arguments(*pairs, tmp_path, "run", 1)[1:]
    assert run_here(train, *words, "--seed", 5, "--precision", other)[0] == 0
    (tmp_path / "run" / "log.txt").unlink()
    code, lines = run_here(train, *without(words, "--precision"), "--max-steps", 2)
    said = [line for line in lines if "] device: " in line]
    assert code == 0 and len(said) == 1 and f"precision {other}, 1 process(es), seed 5" in said[0]
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.partition("] ")[2].partition(":")[0] for line in log[:2]] == ["command", "commit"]


def test_the_folder_of_a_branch_has_the_name_of_the_model_in_the_checkpoint(pairs, tmp_path):
    start(pairs, tmp_path, "run", 1, "--path-type", "GVP")
    words = without(train_arguments(*pairs, tmp_path / "branches", "", 2)[1:], "--run-name", "--model")
    code, lines = run_here(train, *words, "--ckpt", tmp_path / "run" / "checkpoints" / "0000001.pt")
    assert code == 0, lines
    assert [path.name for path in (tmp_path / "branches").iterdir() if path.is_dir()] == ["000-SiT-Ti-8-GVP"]


def test_a_branch_with_nothing_left_to_do_holds_the_checkpoint_that_it_names(pairs, tmp_path):
    start(pairs, tmp_path, "old", 2)
    old, new = (tmp_path / name / "checkpoints" / "0000002.pt" for name in ("old", "new"))
    for restart in (False, True):
        code, said = start(pairs, tmp_path, "new", 2, "--ckpt", old)
        assert (f"--ckpt {old} is not used: the run folder has a checkpoint of its own, {new.name}" in said) is restart
        assert (
            code == 0
            and f"nothing left to do: the run is at step 2 of 2; the checkpoint to sample from is {new}" in said
        )
        states = [read_checkpoint(path) for path in (old, new)]
        for part in ("model", "ema"):
            assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[0][part])


def test_a_place_that_comes_from_the_checkpoint_and_has_moved_is_named_with_it(pairs, tmp_path):
    images, _ = write_pairs(tmp_path / "more", seed=1)
    images = images.rename(tmp_path / "more" / "others")
    for file in images.iterdir():
        file.rename(images / f"other_{file.name}")
    table = tmp_path / "groups.csv"
    names = [path.stem for folder in (pairs[0], images) for path in folder.iterdir()]
    table.write_text("name,group\n" + "".join(f"{name},{name[-1]}\n" for name in names))
    places = {"--unlabelled-path": images, "--groups": table}
    code, said = start(pairs, tmp_path, "run", 1, *[word for one in places.items() for word in one])
    assert code == 0, said
    file = tmp_path / "run" / "checkpoints" / "0000001.pt"
    for flag, place in places.items():
        moved = place.rename(tmp_path / f"moved{place.suffix}")
        code, said = start(pairs, tmp_path, "run", 2)
        line = said.splitlines()[-1]
        assert code == 2 and str(place) in line, said
        assert line.endswith(f"The checkpoint {file} names it: give {flag} if it has moved.")
        code, said = start(pairs, tmp_path, "run", 2, flag, place)  # the user gave it
        assert code == 2 and str(file) not in said.splitlines()[-1]
        moved.rename(place)


def test_a_cache_of_latents_that_comes_from_the_checkpoint_is_named_with_it(pairs, tmp_path, autoencoder_folder):
    words = ["--model", "SiT-Ti/2", "--vae", autoencoder_folder]
    cache = tmp_path / "cache"
    code, said = start(pairs, tmp_path, "run", 1, *words, "--latent-cache", cache)
    assert code == 0, said
    shutil.rmtree(cache)
    cache.write_text("a file")
    code, said = start(pairs, tmp_path, "run", 2, *words)
    file = tmp_path / "run" / "checkpoints" / "0000001.pt"
    assert code == 2 and f"--latent-cache {cache}: " in said.splitlines()[-1]
    assert said.endswith(f"The checkpoint {file} names it: give --latent-cache if it has moved.")


# --- checkpoints that somebody has edited -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("trained")
    start(pairs, folder, "run", 1)
    return newest(folder / "run")


def edited(state: dict, section: str, **values: object) -> dict:
    """The checkpoint with other values in one section of its configuration."""
    return state | {"config": state["config"] | {section: state["config"][section] | values}}


def with_bias(state: dict, part: str, change: Callable[[torch.Tensor], object]) -> dict:
    """The checkpoint with other numbers in one tensor."""
    name = "x_embedder.proj.bias"
    return state | {part: state[part] | {name: change(state[part][name])}}


def with_moments(state: dict, change: Callable[[dict], object]) -> dict:
    """The checkpoint with other moments of one parameter in the optimiser's state."""
    opt = state["opt"]
    return state | {"opt": opt | {"state": opt["state"] | {0: change(opt["state"][0])}}}


EDITS: dict[str, Callable[[dict], dict]] = {
    "no train": lambda s: s | {"config": {name: part for name, part in s["config"].items() if name != "train"}},
    "train is a list": lambda s: s | {"config": s["config"] | {"train": [1]}},
    "keep is text": lambda s: edited(s, "train", keep="x"),
    "lr is not finite": lambda s: edited(s, "optimiser", lr=float("nan")),
    "negative steps": lambda s: edited(s, "train", ckpt_every=-1),
    "unknown type of mask": lambda s: edited(s, "train", mask_type="x"),
    "seed": lambda s: edited(s, "optimiser", seed=2**63),
    "image size": lambda s: edited(s, "data", image_size=10**9),
    "channels": lambda s: edited(s, "data", channels=10**9),
    "classes": lambda s: edited(s, "data", num_classes=10**9),
    "classes of the model": lambda s: edited(s, "model", num_classes=10**9),
    "model": lambda s: edited(s, "model", name="\x1b[31mSiT\x1b[0m"),
    "path": lambda s: edited(s, "transport", path_type="os.system"),
    "autoencoder": lambda s: edited(s, "space", fingerprint="\x1b[2J"),
    "no autoencoder": lambda s: s | {"config": s["config"] | {"space": {}}},
    "more about the autoencoder": lambda s: edited(s, "space", x=1),
    "machine is text": lambda s: s | {"config": s["config"] | {"machine": "cpu"}},
    "optimiser's state": lambda s: s | {"opt": {"state": 5}},
    "moments are a number": lambda s: with_moments(s, lambda moments: 5),
    "moments are missing": lambda s: with_moments(s, lambda moments: {"step": moments["step"]}),
    "moments not finite": lambda s: with_moments(s, lambda m: m | {"exp_avg": m["exp_avg"] * float("nan")}),
    "squares not finite": lambda s: with_moments(s, lambda m: m | {"exp_avg_sq": m["exp_avg_sq"] + float("inf")}),
    "squares below 0": lambda s: with_moments(s, lambda m: m | {"exp_avg_sq": m["exp_avg_sq"] - 1}),
    "moments of another shape": lambda s: with_moments(s, lambda m: m | {"exp_avg": m["exp_avg"][:1]}),
    "moments are text": lambda s: with_moments(s, lambda m: m | {"exp_avg": "x"}),
    "their step is not finite": lambda s: with_moments(s, lambda m: m | {"step": m["step"] * float("nan")}),
    "images seen are text": lambda s: s | {"images_seen": "5"},
    "images seen are a fraction": lambda s: s | {"images_seen": 2.5},
    "images seen below 0": lambda s: s | {"images_seen": -3},
    "too many images seen": lambda s: s | {"images_seen": 10**16},
    "no images seen": lambda s: {name: part for name, part in s.items() if name != "images_seen"},
    "steps since the log are text": lambda s: s | {"since_log": "x"},
    "no steps since the log": lambda s: s | {"since_log": None},
    "more steps since the log than steps": lambda s: s | {"since_log": 2},
    "sums not finite": lambda s: s | {"sums": s["sums"] * float("nan")},
    "sums are a list": lambda s: s | {"sums": [[0.0, 0.0, 0.0]]},
    "sums of no process": lambda s: s | {"sums": s["sums"][:0]},
    "sums of another shape": lambda s: s | {"sums": s["sums"][:, :2]},
    "weights not finite": lambda s: with_bias(s, "model", lambda bias: bias * float("nan")),
    "averages not finite": lambda s: with_bias(s, "ema", lambda bias: bias * float("inf")),
    "whole numbers": lambda s: with_bias(s, "model", lambda bias: bias.to(torch.int8)),
    "text": lambda s: with_bias(s, "ema", lambda bias: "x"),
}


def test_a_fact_about_the_machine_that_this_version_does_not_know_stops_no_run(pairs, tmp_path, trained):
    file = tmp_path / "run" / "checkpoints" / "0000001.pt"
    file.parent.mkdir(parents=True)
    sums = trained["sums"].expand(3, -1)  # one row for each process
    save_checkpoint(file, edited(trained, "machine", cores=8, world_size=3) | {"sums": sums})
    code, said = start(pairs, tmp_path, "run", 2, "--sample-every", 5)
    assert code == 0 and "changed on resume: world_size: 3 -> 1" in said, said


def test_options_of_the_optimiser_are_those_of_this_start(pairs, tmp_path, trained):
    file = tmp_path / "run" / "checkpoints" / "0000001.pt"
    file.parent.mkdir(parents=True)
    (group,) = trained["opt"]["param_groups"]
    other = {"lr": "x", "betas": 5, "eps": None, "amsgrad": True, "weight_decay": "x", "fused": False}
    save_checkpoint(file, trained | {"opt": trained["opt"] | {"param_groups": [group | other]}})
    code, said = start(pairs, tmp_path, "run", 2, "--sample-every", 5)
    assert code == 0, said
    assert newest(tmp_path / "run")["opt"]["param_groups"][0] == group | {"lr": pytest.approx(1e-3)}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_checkpoint_is_not_continued_and_the_line_names_the_file(pairs, tmp_path, trained, edit):
    file = tmp_path / "run" / "checkpoints" / "0000001.pt"
    file.parent.mkdir(parents=True)
    save_checkpoint(file, edit(trained))
    before = file.read_bytes()
    code, said = start(pairs, tmp_path, "run", 2, "--sample-every", 5)
    (line,) = [line for line in said.splitlines() if "error:" in line]
    assert code == 2 and line == said.splitlines()[-1] and "Traceback" not in said
    assert str(file) in line or str(file.parent) in line  # the folder, if it holds no other checkpoint
    assert line.isprintable()
    assert [path.name.removesuffix(".damaged") for path in file.parent.iterdir()] == [file.name]
    assert next(file.parent.iterdir()).read_bytes() == before


def test_a_preview_that_is_not_finite_does_not_end_a_run(run, caplog):
    class Exploding:
        def draw(self) -> None:
            raise FloatingPointError("the ODE gave values that are not finite")

    save_preview(Exploding(), run, 7)
    assert "no preview of step 7: the ODE gave values" in caplog.text and not run.preview_path(7).exists()
