"""The commands: interrupted runs and sets end like uninterrupted ones, for any number of processes.

A process of its own costs seconds of imports. Each command runs in one at least once; else it runs inside this process.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from script_helpers import FEW_STEPS, call, run, run_here, train_arguments, write_pairs

import evaluate
import sample
import sample_ddp
import train
from benchmarks import same_images, solver_error
from common.errors import InputError, run_command
from dataset import mask_folder
from dataset.files import read_mask, read_mask_and_table
from dataset.gray import ImageFormat
from dataset.views import center_view
from engine.checkpoint import read_checkpoint
from synthetic.reader import SampleSet
from synthetic.writer import SetWriter

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def trained(pairs: tuple[Path, Path], tmp_path_factory) -> Path:
    """Run folder of an uninterrupted run."""
    results = tmp_path_factory.mktemp("results")
    often = ["--sample-every", "4", "--ckpt-every", "3", "--export-safetensors"]
    run(*train_arguments(*pairs, results, "whole", STEPS), *often)
    return results / "whole"


@pytest.fixture(scope="module")
def checkpoint(trained) -> Path:
    return trained / "checkpoints" / f"{STEPS:07d}.pt"


def weights(path: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(path)
    return {f"{part}.{name}": value for part in ("model", "ema") for name, value in state[part].items()}


def assert_equal_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def metrics(folder: Path, of: str = "train/loss") -> list[dict[str, float]]:
    """Lines of metrics.jsonl that hold ``of``, without the speed, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if of in line]
    return [{name: value for name, value in line.items() if not name.startswith("speed")} for line in lines]


def test_run_folder_holds_config_log_metrics_checkpoints_and_previews(trained):
    assert json.loads((trained / "config.json").read_text())["model"]["name"] == "SiT-Ti/8"
    assert "command:" in (trained / "log.txt").read_text().splitlines()[0]
    assert [line["step"] for line in metrics(trained)] == [2, 4, 6]
    previews = sorted(int(path.stem) for path in (trained / "previews").iterdir())
    assert [line["step"] for line in metrics(trained, of="preview/grid")] == previews == [4, 6]
    assert sorted(path.name for path in trained.rglob("*.pt")) == ["0000003.pt", "0000006.pt"]
    with Image.open(trained / "previews" / "0000004.png") as preview:
        assert preview.size == (76 + 4 * 130 + 2, 3 * 130 + 2)  # 16 px shown eight times as large, 2 px between


def test_training_changes_the_model_and_its_ema(checkpoint):
    state = read_checkpoint(checkpoint)
    assert state["step"] == STEPS
    assert not torch.equal(state["model"]["overlap.linear.weight"], state["ema"]["overlap.linear.weight"])
    assert state["model"]["mask_detail.proj.weight"].abs().sum() > 0


def test_resume_continues_bit_for_bit(pairs, trained, checkpoint):
    call(train, *train_arguments(*pairs, trained.parent, "halves", 3)[1:])
    result = run(*train_arguments(*pairs, trained.parent, "halves", STEPS))
    assert "continuing after step 3" in result.stderr
    assert_equal_weights(trained.parent / "halves" / "checkpoints" / checkpoint.name, checkpoint)
    assert metrics(trained.parent / "halves") == [{**line} for line in metrics_with_cut(trained)]


def metrics_with_cut(folder: Path) -> list[dict[str, float]]:
    """Metrics of the whole run as the run of two halves reports them: it also logs at its own last step, 3."""
    lines = metrics(folder)
    half = metrics(folder.parent / "halves")[1]
    assert half["step"] == 3
    after = metrics(folder.parent / "halves")[2]
    both = {name: (half[name] + after[name]) / 2 for name in ("train/loss", "train/grad_norm")}
    for name, value in both.items():  # the mean over steps 3 and 4, in two lines instead of one
        assert value == pytest.approx(lines[1][name], rel=1e-12)
    return [lines[0], half, after, lines[2]]


def test_ckpt_resumes_from_a_file_into_a_new_folder(pairs, trained, checkpoint):
    start = trained / "checkpoints" / "0000003.pt"
    call(train, *train_arguments(*pairs, trained.parent, "branch", STEPS)[1:], "--ckpt", start)
    assert_equal_weights(trained.parent / "branch" / "checkpoints" / checkpoint.name, checkpoint)


def test_damaged_newest_checkpoint_falls_back_and_says_so(pairs, trained, checkpoint):
    folder = shutil.copytree(trained, trained.parent / "damaged") / "checkpoints"
    content = (folder / checkpoint.name).read_bytes()
    (folder / checkpoint.name).write_bytes(content[: len(content) // 2])
    code, lines = run_here(train, *train_arguments(*pairs, trained.parent, "damaged", STEPS)[1:], "--ckpt-every", "3")
    assert code == 0
    assert any("Falling back" in line for line in lines)
    assert any("continuing after step 3" in line for line in lines)
    assert_equal_weights(folder / checkpoint.name, checkpoint)


def test_flags_that_contradict_the_checkpoint_are_refused(monkeypatch, capsys, pairs, trained):
    arguments = [*train_arguments(*pairs, trained.parent, "whole", STEPS)[1:], "--path-type", "GVP"]
    assert "--path-type GVP (the checkpoint has Linear)" in error_line(monkeypatch, capsys, train, *arguments)


def test_init_from_starts_a_new_run_from_the_averaged_weights(pairs, trained, checkpoint):
    words = [*train_arguments(*pairs, trained.parent, "new", 1)[1:], "--init-from", checkpoint, "--lr", "1e-12"]
    code, lines = run_here(train, *words)
    said = "\n".join(lines)
    start, end = read_checkpoint(checkpoint), read_checkpoint(trained.parent / "new" / "checkpoints" / "0000001.pt")
    assert code == 0 and end["step"] == 1
    assert "kept:" in said and "warning" not in said
    name = "blocks.0.attn.qkv.weight"
    assert torch.allclose(end["model"][name], start["ema"][name], atol=1e-6)


def test_init_from_a_checkpoint_of_another_time_scale_is_warned_about(pairs, trained, checkpoint):
    words = [*train_arguments(*pairs, trained.parent, "scaled", 1)[1:], "--init-from", checkpoint, "--time-scale", "7"]
    code, lines = run_here(train, *words)
    assert code == 0 and any("trained with a time scale of 1000.0, and this run has 7.0" in line for line in lines)


def test_latent_space_and_native_crops_from_training_to_bulk_set(autoencoder_folder, pairs, tmp_path):
    words = [*train_arguments(*pairs, tmp_path, "latent", 2)[1:], "--vae", autoencoder_folder, "--model", "SiT-Ti/2"]
    call(train, *words, "--crop", "random", "--window", "1", "99")
    path = tmp_path / "latent" / "checkpoints" / "0000002.pt"
    config = read_checkpoint(path)["config"]
    assert config["transport"]["prediction"] == "velocity" and config["model"]["in_channels"] == 5
    files = sample_set(path, pairs[1], tmp_path / "set")
    assert len([name for name in files if name.startswith("images")]) == 6
    with (tmp_path / "set" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["crop_top"], row["crop_left"]) for row in rows}) > 1  # windows, not the middle of each
    for row in rows:
        top, left = int(row["crop_top"]), int(row["crop_left"])
        label, mask = (np.array(Image.open(tmp_path / "set" / row[name])) for name in ("label", "source_mask"))
        assert np.array_equal(label, mask[top : top + 16, left : left + 16])


def test_two_ranks_train_and_resume_bit_for_bit(pairs, tmp_path):
    """A run that is killed after step 2 leaves what the uninterrupted one had then."""
    name = Path("checkpoints") / "0000004.pt"
    words = [*train_arguments(*pairs, tmp_path, "whole", 4), "--ckpt-every", "2"]
    run(*words, ranks=2)
    (shutil.copytree(tmp_path / "whole", tmp_path / "halves") / name).unlink()
    words[words.index("whole")] = "halves"
    assert "continuing after step 2" in run(*words, ranks=2).stderr
    assert_equal_weights(tmp_path / "whole" / name, tmp_path / "halves" / name)


def test_sample_writes_a_grid_with_the_mask_first(pairs, checkpoint, tmp_path):
    mask = pairs[1] / "cell_0.png"
    output = tmp_path / "grid.png"
    run("sample.py", "ODE", "--ckpt", checkpoint, "--mask-path", mask, "--num-classes", 2, "--image-size", 16,
        "--num-samples", 3, "--num-sampling-steps", 2, "--output", output)  # fmt: skip
    with Image.open(output) as picture:
        tiles = np.array(picture)
    assert tiles.shape == (16 + 4, 4 * 18 + 2, 3)
    assert set(np.unique(tiles[2:18, 2:18])) == {0, 255}
    assert not np.array_equal(tiles[2:18, 20:36], tiles[2:18, 38:54])  # two seeds, two images


def sample_set(checkpoint: Path, masks: Path, folder: Path, *more: object, ranks: int = 0) -> dict[str, bytes]:
    """Make a set inside this process, or in one or more processes; its files by name."""
    words = ["ODE", "--ckpt", checkpoint, "--mask-path", masks, "--sample-dir", folder, *FEW_STEPS, *more]
    if ranks:
        run("sample_ddp.py", *words, ranks=ranks)
    else:
        call(sample_ddp, *words)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


@pytest.fixture(scope="module")
def whole_set(checkpoint, pairs, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("sets") / "whole"
    more = ("--data-path", pairs[0], "--cfg-scale", 2, "--npz", "--samples-per-mask", 2)
    return folder, sample_set(checkpoint, pairs[1], folder, *more, ranks=1)


def test_bulk_set_has_images_labels_and_a_complete_manifest(whole_set, pairs):
    folder, _ = whole_set
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows[:3]] == [f"images/cell_{n}.png" for n in ("0_0001", "0_0002", "1_0001")]
    assert len(rows) == 12
    assert [int(row["index"]) for row in rows] == list(range(12))
    for row, name in zip(rows[::2], sorted(path.name for path in pairs[0].iterdir()), strict=True):
        for column, source in (("real_image", pairs[0]), ("source_mask", pairs[1])):
            assert not Path(row[column]).is_absolute() and (folder / row[column]).samefile(source / name)
    assert {row["cfg_scale"] for row in rows} == {"2.0"}


def test_label_is_the_mask_under_the_generated_pixels(whole_set, pairs):
    folder, _ = whole_set
    with Image.open(folder / "masks" / "cell_3_0002.png") as label, Image.open(pairs[1] / "cell_3.png") as mask:
        label, mask = np.array(label), np.array(mask)
    view = center_view(*mask.shape, 16)
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in ((19, 24), (16, 20)))  # nearest neighbour
    assert (view.scaled_height, view.scaled_width) == (19, 16)  # the short side 20 became 16
    assert np.array_equal(label, mask[rows][:, columns][view.top : view.top + 16])


def test_npz_holds_the_images_in_manifest_order(whole_set):
    folder, files = whole_set
    stored = np.load(folder.with_name("whole.npz"))["arr_0"]
    assert stored.shape == (12, 16, 16, 3) and stored.dtype == np.uint8
    with Image.open(folder / "images" / "cell_1_0001.png") as image:
        assert np.array_equal(stored[2], np.array(image))


def test_two_ranks_make_the_same_bytes_as_one(whole_set, checkpoint, pairs, tmp_path):
    _, files = whole_set
    more = ("--data-path", pairs[0], "--cfg-scale", 2, "--samples-per-mask", 2)
    assert sample_set(checkpoint, pairs[1], tmp_path / "two", *more, ranks=2) == files


def test_parts_of_a_job_array_make_the_same_bytes_and_the_last_one_finishes_the_set(
    whole_set, checkpoint, pairs, tmp_path
):
    folder = tmp_path / "parts"
    words = ["ODE", "--ckpt", checkpoint, "--mask-path", pairs[1], "--sample-dir", folder, *FEW_STEPS]
    words += ["--data-path", pairs[0], "--cfg-scale", 2, "--samples-per-mask", 2]
    for number in (3, 1, 2):
        assert not (folder / "manifest.csv").exists()
        call(sample_ddp, *words, "--shard", f"{number}/3")
    assert {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))} == whole_set[1]


def test_parts_on_machines_of_their_own_are_joined_by_copying_and_the_plain_command(
    whole_set, checkpoint, pairs, tmp_path
):
    words = ["ODE", "--ckpt", checkpoint, "--mask-path", pairs[1], *FEW_STEPS]
    words += ["--data-path", pairs[0], "--cfg-scale", 2, "--samples-per-mask", 2]
    for number in (1, 2):
        call(sample_ddp, *words, "--sample-dir", tmp_path / f"node_{number}", "--shard", f"{number}/2")
        shutil.copytree(tmp_path / f"node_{number}", tmp_path / "all", dirs_exist_ok=True)
    kept = (tmp_path / "all" / "images" / "cell_1_0002.png").stat().st_mtime_ns
    call(sample_ddp, *words, "--sample-dir", tmp_path / "all")
    assert (tmp_path / "all" / "images" / "cell_1_0002.png").stat().st_mtime_ns == kept
    found = {str(path.relative_to(tmp_path / "all")): path.read_bytes() for path in (tmp_path / "all").rglob("*.*")}
    assert found == whole_set[1]


def test_restart_makes_what_is_missing_or_torn_and_nothing_else(whole_set, checkpoint, pairs):
    folder, files = whole_set
    torn, missing, kept = (folder / "images" / f"cell_{n}.png" for n in ("0_0001", "4_0002", "2_0001"))
    torn.write_bytes(torn.read_bytes()[:100])
    missing.unlink()
    before = kept.stat().st_mtime_ns
    more = ("--data-path", pairs[0], "--cfg-scale", 2, "--samples-per-mask", 2)
    assert sample_set(checkpoint, pairs[1], folder, *more) == files
    assert kept.stat().st_mtime_ns == before


def test_a_corrected_mask_gives_a_new_image_even_if_the_run_is_killed_between_its_two_files(
    monkeypatch, checkpoint, pairs, tmp_path
):
    masks, folder = shutil.copytree(pairs[1], tmp_path / "masks"), tmp_path / "set"
    words = ["ODE", "--ckpt", checkpoint, "--mask-path", masks, "--sample-dir", folder, *FEW_STEPS]
    call(sample_ddp, *words)
    path = folder / "manifest.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(f"{line},{end}" for line, end in zip(lines, ["fidelity_dice", *"123456"], strict=True)))
    first = {file.name: file.read_bytes() for file in (folder / "images").iterdir()}
    shutil.copy(masks / "cell_0.png", masks / "cell_3.png")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ImageFormat, "encode", killed)  # after the label, before the image
        call(sample_ddp, *words)
    call(sample_ddp, *words)
    changed = [name for name, content in first.items() if (folder / "images" / name).read_bytes() != content]
    assert changed == ["cell_3.png"]
    scores = {row["image"]: row["fidelity_dice"] for row in csv.DictReader(path.open())}
    assert scores["images/cell_3.png"] == ""  # the score was of the image before
    assert scores["images/cell_0.png"] == "1" and len(scores) == 6


def test_a_set_of_probability_stacks_is_read_as_its_most_probable_classes(pairs, tmp_path):
    masks, rng = tmp_path / "masks", np.random.default_rng(0)
    masks.mkdir()
    for path in pairs[1].iterdir():
        cell = np.array(Image.open(path)) > 0
        stack = np.stack([~cell, cell & (rng.random(cell.shape) < 0.5), cell]).astype(np.float32) + 0.1
        np.save(masks / f"{path.stem}.npy", stack / stack.sum(0))
    words = train_arguments(pairs[0], masks, tmp_path, "soft", 1)
    call(train, *words[1:], "--num-classes", 3)
    checkpoint = tmp_path / "soft" / "checkpoints" / "0000001.pt"
    call(sample_ddp, "ODE", "--ckpt", checkpoint, "--mask-path", masks, "--sample-dir", tmp_path / "set", *FEW_STEPS)
    samples = SampleSet(tmp_path / "set")
    for sample_of_set in samples.samples:
        stack = read_mask(sample_of_set.label_path)
        assert stack.shape == (3, 16, 16)
        assert np.array_equal(samples.class_map(sample_of_set), stack.argmax(0))
    call(evaluate, "threshold", tmp_path / "set")


def test_guidance_needs_a_model_that_was_trained_without_masks_too(monkeypatch, capsys, pairs, tmp_path):
    words = [*train_arguments(*pairs, tmp_path, "run", 1)[1:], "--mask-dropout", 0, "--sample-every", 1]
    assert "--cfg-scale has no effect on the previews with --mask-dropout 0" in error_line(
        monkeypatch, capsys, train, *words, "--cfg-scale", 2
    )
    call(train, *words)  # previews come without guidance
    assert (tmp_path / "run" / "previews" / "0000001.png").is_file()
    words = ["ODE", "--ckpt", tmp_path / "run" / "checkpoints" / "0000001.pt", "--mask-path", pairs[1] / "cell_0.png"]
    words += [*FEW_STEPS, "--num-samples", 1, "--output", tmp_path / "grid.png"]
    assert "give --cfg-scale 1" in error_line(monkeypatch, capsys, sample, *words, "--cfg-scale", 1.5)
    call(sample, *words)


def test_other_masks_are_refused_in_an_existing_set(monkeypatch, capsys, checkpoint, pairs, tmp_path):
    masks = shutil.copytree(pairs[1], tmp_path / "masks")
    words = ["ODE", "--ckpt", checkpoint, "--mask-path", masks, "--sample-dir", tmp_path / "set", *FEW_STEPS]
    call(sample_ddp, *words)
    (masks / "cell_0.png").rename(masks / "cell_9.png")
    assert "mask_names_sha256" in error_line(monkeypatch, capsys, sample_ddp, *words)


def test_every_mask_is_checked_once_and_read_once_per_run(monkeypatch, checkpoint, pairs, tmp_path):
    reads = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mask_folder, "read_mask_and_table", lambda p: reads.append(p.name) or read_mask_and_table(p))
    monkeypatch.setattr(SetWriter, "write_contact_sheet", lambda *_: None)
    arguments = ["ODE", "--ckpt", checkpoint, "--mask-path", pairs[1], "--num-sampling-steps", 1]
    arguments += ["--device", "cpu", "--precision", "float32", "--sample-dir"]
    for folder, times in (("first", 2), ("second", 1)):
        reads.clear()
        sample_ddp.main(sample_ddp.parse_args([str(word) for word in (*arguments, tmp_path / folder)]))
        assert sorted(reads) == sorted(times * [f"cell_{n}.png" for n in range(6)])


def test_a_set_made_with_other_settings_is_not_touched(monkeypatch, capsys, whole_set, checkpoint, pairs):
    folder, files = whole_set
    arguments = ["--ckpt", checkpoint, "--mask-path", pairs[1], "--sample-dir", folder, "--seed", 7]
    assert "seed 0 -> 7" in error_line(monkeypatch, capsys, sample_ddp, "ODE", *arguments)
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")} == files


def test_curve_of_error_against_network_calls_of_a_trained_network(checkpoint, pairs, tmp_path):
    arguments = [
        "--ckpt",
        checkpoint,
        "--mask-path",
        pairs[1],
        "--num-images",
        2,
        "--output",
        tmp_path / "new" / "curve",
    ]
    solver_error.main(solver_error.parse_args([str(word) for word in (*arguments, "--device", "cpu")]))
    record = json.loads((tmp_path / "new" / "curve.json").read_text())
    assert list(record["curves"]) == ["euler", "midpoint", "heun", "ab2"]
    for rows in record["curves"].values():
        assert all(
            budget - 1 <= row["calls"] <= budget for row, budget in zip(rows, solver_error.CURVE_BUDGETS, strict=True)
        )
        assert all(0 <= row["error"] <= row["largest"] < 255 for row in rows)
    assert record["curves"]["heun"][-1]["error"] == 0
    assert (tmp_path / "new" / "curve.png").is_file()


def test_batch_size_and_precision_hardly_move_an_image(checkpoint, pairs, monkeypatch, capsys):
    monkeypatch.setattr(same_images, "has_compiler", lambda: False)
    words = ["--ckpt", checkpoint, "--mask-path", pairs[1], "--num-sampling-steps", 4, "--device", "cpu"]
    same_images.main(same_images.parse_args([str(word) for word in words]))
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(("| float", "| bf"))]
    largest = {(row[1].strip(), int(row[2])): int(row[4]) for row in rows}
    assert largest[("float32", 16)] == 0 and largest[("float32", 5)] <= 2
    assert 0 < largest[("bf16", 16)] <= 4 and largest[("bf16", 5)] <= 4


def test_differences_are_those_of_gray_values():
    reference = np.zeros((1, 2, 2, 1), np.uint8)
    images = np.array([0, 3, 255, 0], np.uint8).reshape(1, 2, 2, 1)
    assert same_images.differences(images, reference) == (255, 64.5, 0.5)
    assert same_images.differences(reference, images) == (255, 64.5, 0.5)


def test_an_export_knows_what_the_checkpoint_knows(checkpoint, trained, pairs, tmp_path):
    saved, exported = read_checkpoint(checkpoint), read_checkpoint(trained / "model.safetensors")
    assert set(saved) - set(exported) == {"images_seen", "sums", "since_log"}  # of the training alone
    for part in ("step", "trained_on", "intensity"):
        assert exported[part] == saved[part] and saved[part]
    assert exported["config"] == {part: saved["config"][part] for part in exported["config"]}
    words = ["ODE", "--ckpt", trained / "model.safetensors", "--mask-path", pairs[1], "--sample-dir", tmp_path / "set"]
    call(sample_ddp, *words, *FEW_STEPS, "--intensity", "source")
    with Image.open(tmp_path / "set" / "images" / "cell_0.png") as image:
        assert image.mode == "L"  # as the training images were


def test_exported_weights_sample_like_the_checkpoint(checkpoint, trained, pairs, tmp_path):
    for name, path in (("pt", checkpoint), ("st", trained / "model.safetensors")):
        words = ["ODE", "--ckpt", path, "--mask-path", pairs[1] / "cell_0.png", "--num-sampling-steps", 1]
        words += ["--device", "cpu", "--precision", "float32", "--num-samples", 1, "--output", tmp_path / f"{name}.png"]
        sample.main(sample.parse_args([str(word) for word in words]))
    assert (tmp_path / "pt.png").read_bytes() == (tmp_path / "st.png").read_bytes()


def test_an_export_has_no_raw_weights(trained, pairs, tmp_path):
    words = ["ODE", "--ckpt", trained / "model.safetensors", "--mask-path", pairs[1], "--sample-dir", tmp_path / "set"]
    with pytest.raises(InputError, match="averaged weights only"):
        call(sample_ddp, *words, "--raw-weights")


def test_sde_makes_images_too(checkpoint, pairs, tmp_path):
    folder = tmp_path / "sde"
    call(sample_ddp, "SDE", "--ckpt", checkpoint, "--mask-path", pairs[1], "--sample-dir", folder,
         "--num-samples", 2, "--num-sampling-steps", 3)  # fmt: skip
    assert len(list((folder / "images").glob("*.png"))) == 2


@pytest.mark.parametrize("command", [train, sample, sample_ddp])
def test_help_works_without_anything_else(capsys, command):
    code, lines = run_here(command, "--help")
    assert code == 0 and lines == []
    assert f"usage: {command.__name__}.py" in capsys.readouterr().out


def error_line(monkeypatch, capsys, command: ModuleType, *words: object) -> str:
    """The one line on which a command ends with exit code 2, run inside this process."""
    monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_command(command.main, command.parse_args)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{command.__name__}.py") and ": error: " in last
    return last


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--global-batch-size", "0"], "--global-batch-size"),
        (["--image-size", "20"], "not divisible by 8"),
        (["--model", "SiT-Q/8"], "--model"),
        (["--max-stepz", "3"], "did you mean --max-steps?"),
        (["--vae", "nowhere"], "--vae nowhere"),
        (["--data-path", "nowhere"], "--data-path nowhere: no such folder"),
        (["--ckpt", "nowhere.pt"], "--ckpt nowhere.pt: no such file"),
        (["--prediction", "velocity", "--loss-weight", "velocity"], "no effect"),
        (["--window", "90", "10"], "--window"),
        (["--num-classes", "3", "--mask-type", "classes"], "255"),
    ],
)
def test_bad_training_flag_ends_with_one_line(monkeypatch, capsys, pairs, tmp_path, change, words):
    arguments = train_arguments(*pairs, tmp_path, "bad", 2)
    assert words in error_line(monkeypatch, capsys, train, *arguments[1:], *change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--num-classes", "3"], "contradicts --num-classes 3 (the checkpoint has 2)"),
        (["--image-size", "32"], "contradicts --image-size 32 (the checkpoint has 16)"),
        (["--mask-path", "nowhere"], "nowhere"),
        (["--sampling-method", "dopri6"], "--sampling-method"),
        (["--sampling-method", "heun", "--atol", "1e-3"], "--atol has no effect with heun"),
        (
            ["--sampling-method", "dopri5", "--num-sampling-steps", "9"],
            "--num-sampling-steps has no effect with dopri5",
        ),
        (["--guidance-interval", "0.2", "0.8"], "--guidance-interval has no effect with --cfg-scale 1 and --look-sc"),
        (["--look-scale", "2", "--look", "none"], "--look-scale has no effect with --look none"),
        (["--look-index", "2", "--balance-groups"], "--balance-groups has no effect with --look-index"),
        (["--intensity", "source", "--source-window", "median"], "--source-window has no effect: all training images"),
        (["--cfg-scale", "2", "--guidance-interval", "0.8", "0.2"], "the first time must be below the second"),
        (["--vae", "nowhere"], "--vae nowhere"),
        (["--seed", str(2**63)], f"is not a whole number from 0 to {2**63 - 1}"),
    ],
)
def test_bad_sampling_flag_ends_with_one_line(monkeypatch, capsys, pairs, checkpoint, tmp_path, change, words):
    arguments = ["--ckpt", checkpoint, "--mask-path", pairs[1], "--sample-dir", tmp_path / "set", "--device", "cpu"]
    assert words in error_line(monkeypatch, capsys, sample_ddp, "ODE", *arguments, *change)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("size", "words"), [("1", "--last-step-size: 1 is not strictly between 0 and 1"), ("0.9999", "leaves")]
)
def test_a_last_step_that_takes_all_the_time_is_refused(monkeypatch, capsys, pairs, checkpoint, tmp_path, size, words):
    arguments = ["--ckpt", checkpoint, "--mask-path", pairs[1], "--sample-dir", tmp_path / "set", "--device", "cpu"]
    assert words in error_line(monkeypatch, capsys, sample_ddp, "SDE", *arguments, "--last-step-size", size)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--likelihood"], "give --data-path"),
        (["--data-path", "images"], "--data-path has no effect without --likelihood"),
        (["--reverse", "--data-path", "images", "--num-samples", "2"], "--num-samples has no effect"),
        (
            ["--likelihood", "--data-path", "images", "--output", "x.png"],
            "--output x.png: the result is written as .csv",
        ),
        (["--likelihood", "--data-path", "images", "--time-shift", "3"], "--time-shift has no effect with --likeliho"),
        (["--reverse", "--data-path", "images", "--seed", "3"], "--seed has no effect with --reverse"),
        (["--output", "nowhere/x.png"], "its folder does not exist"),
    ],
)
def test_bad_preview_flag_ends_with_one_line(monkeypatch, capsys, pairs, checkpoint, change, words):
    arguments = ["ODE", "--ckpt", checkpoint, "--mask-path", pairs[1] / "cell_0.png", *change]
    assert words in error_line(monkeypatch, capsys, sample, *arguments)


def test_likelihood_and_round_trip_of_real_images(monkeypatch, pairs, checkpoint, tmp_path):
    monkeypatch.chdir(tmp_path)
    fixed = ["--ckpt", checkpoint, "--data-path", pairs[0], "--mask-path", pairs[1], "--num-sampling-steps", "4"]
    words = [str(word) for word in (*fixed, "--device", "cpu", "--precision", "float32")]
    sample.main(sample.parse_args(["ODE", "--likelihood", *words]))
    sample.main(sample.parse_args(["ODE", "--reverse", "--output", "back.png", *words]))
    with Path("likelihood.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"cell_{n}" for n in range(6)]
    assert np.isfinite([float(row["bits_per_dim"]) for row in rows]).all()
    assert np.load("back.npz")["cell_0"].shape == (3, 16, 16)
    assert Image.open("back.png").size == (3 * 18 + 2, 6 * 18 + 2)


def test_real_images_may_have_any_name(pairs, checkpoint, tmp_path):
    names = ("file", "a, b")
    for kind, source in zip(("images", "masks"), pairs, strict=True):
        (tmp_path / kind).mkdir()
        for name in names:
            shutil.copy(source / "cell_0.png", tmp_path / kind / f"{name}.png")
    words = ["--ckpt", checkpoint, "--data-path", tmp_path / "images", "--mask-path", tmp_path / "masks", *FEW_STEPS]
    call(sample, "ODE", "--likelihood", *words, "--output", tmp_path / "l.csv")
    call(sample, "ODE", "--reverse", *words, "--output", tmp_path / "r.png")
    with (tmp_path / "l.csv").open(newline="") as file:
        assert sorted(row["name"] for row in csv.DictReader(file)) == sorted(names)
    noise = np.load(tmp_path / "r.npz")
    assert all(noise[name].shape == (3, 16, 16) for name in names)


def test_npz_lies_beside_the_set_whatever_the_folder_is_called(monkeypatch, pairs, checkpoint, tmp_path):
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path / "set")
    call(sample_ddp, "ODE", "--ckpt", checkpoint, "--mask-path", pairs[1], "--sample-dir", ".", "--npz", *FEW_STEPS)
    assert np.load(tmp_path / "set.npz")["arr_0"].shape == (6, 16, 16, 3)


def test_the_noise_of_real_images_and_the_array_of_a_set_never_replace_each_other_or_an_array_of_the_user(
    monkeypatch, capsys, pairs, checkpoint, tmp_path
):
    """All by default names: samples/, samples.npz and samples.png."""
    monkeypatch.chdir(tmp_path)
    words = ["ODE", "--ckpt", checkpoint, "--mask-path", pairs[1], *FEW_STEPS]
    preview = ["ODE", "--ckpt", checkpoint, "--mask-path", pairs[1] / "cell_0.png", *FEW_STEPS, "--num-samples", 1]
    reverse = [*words, "--reverse", "--data-path", pairs[0]]
    path, refused = Path("samples.npz"), "samples.npz exists, and this command did not make it"

    call(sample_ddp, *words, "--npz")
    call(sample, *preview)
    before = path.read_bytes()
    call(sample_ddp, *words, "--npz")  # its own array is written again
    assert refused in error_line(monkeypatch, capsys, sample, *reverse)
    assert path.read_bytes() == before

    path.unlink()
    call(sample, *reverse)
    before = path.read_bytes()
    call(sample, *reverse)
    assert refused in error_line(monkeypatch, capsys, sample_ddp, *words, "--npz")
    shutil.rmtree("samples")
    assert refused in error_line(monkeypatch, capsys, sample_ddp, *words, "--npz")
    assert path.read_bytes() == before and not Path("samples").exists()

    for mine in ({"mine": np.zeros(3)}, {"arr_0": np.zeros((3, 16, 16, 3), np.uint8)}):
        np.savez(path, **mine)
        before = path.read_bytes()
        assert refused in error_line(monkeypatch, capsys, sample, *reverse)
        assert refused in error_line(monkeypatch, capsys, sample_ddp, *words, "--npz")
        assert path.read_bytes() == before


def test_all_missing_partners_are_reported_at_once(monkeypatch, capsys, tmp_path):
    images, masks = write_pairs(tmp_path)
    for number in (1, 4):
        (masks / f"cell_{number}.png").unlink()
    last = error_line(monkeypatch, capsys, train, *train_arguments(images, masks, tmp_path, "bad", 2)[1:])
    assert "cell_1" in last and "cell_4" in last


def test_checkpoint_that_would_run_code_is_refused(monkeypatch, capsys, pairs, tmp_path):
    class Poison:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it_ran",))

    torch.save({"model": Poison()}, tmp_path / "poison.pt")
    arguments = ["ODE", "--ckpt", tmp_path / "poison.pt", "--mask-path", pairs[1] / "cell_0.png"]
    assert "would run code" in error_line(monkeypatch, capsys, sample, *arguments)
    assert not (tmp_path / "it_ran").exists()
