"""evaluate.py sweep: the grid, the rule of the recommendation, and drawings whose best setting is known."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_sets import disk, paint, place
from PIL import Image

import evaluate
from common.errors import InputError
from dataset.config import DataConfig
from engine.sampling import SamplingSettings
from evaluation.fidelity import LabelledImage
from evaluation.judge import JudgeRequest
from evaluation.sweep import (
    SECTION,
    SOLVERS,
    SweepRow,
    load_sweep_data,
    recommend,
    run_sweep,
    settings_grid,
    write_sweep_report,
)
from transport import TIME_SHIFT

SIZE = 24
WHOLE = (0.0, 1.0)


def row(fidelity: float, distance: float, calls: float = 10) -> SweepRow:
    return SweepRow(SamplingSettings(), fidelity, distance, 0.5, 0.1, calls, 0.1)


class DrawnJudge:
    """Sees what is bright; its features are mean and standard deviation."""

    @staticmethod
    def class_maps(images):
        return np.stack([(image[..., 0] > 128).astype(np.uint8) for image in images])

    @staticmethod
    def features(images):
        return np.array([[image.mean(), image.std()] for image in images])


@pytest.fixture
def real() -> list[LabelledImage]:
    items = []
    for seed in range(10):
        cells = disk(SIZE, *place(np.random.default_rng(seed), 7, SIZE - 7), 5)
        items.append(LabelledImage(paint(cells), cells.astype(np.uint8), cells.astype(int)))
    return items


# --- grid and rule ---------------------------------------------------------------------------------------------------


def test_grid_holds_every_combination_and_no_guidance_once():
    grid = settings_grid([1, 2, 4], [WHOLE, (0.2, 0.8)], ["heun", "sde-euler"], [5, 10])
    assert len(grid) == 2 * 2 * (1 + 2 * 2) == len(set(grid))
    assert {settings.mode for settings in grid} == {"ODE", "SDE"}
    assert all(settings.guidance_interval == WHOLE for settings in grid if settings.cfg_scale == 1)


def test_every_solver_of_the_table_makes_a_sampler():
    from engine.sampling import create_solver
    from transport import create_transport

    for name in SOLVERS:
        (settings,) = settings_grid([1], [WHOLE], [name], [3])
        assert create_solver(create_transport(), settings) is not None
    with pytest.raises(ValueError, match="dopri5.*heun"):
        settings_grid([1], [WHOLE], ["dopri5"], [3])


@pytest.mark.parametrize(
    ("rows", "best", "why"),
    [
        ([row(0.5, 1), row(0.9, 1)], 1, "higher fidelity"),
        ([row(0.9, 5), row(0.89, 1), row(0.5, 0.1)], 1, "smaller distance among equal fidelities"),
        ([row(0.9, 1.0, 50), row(0.9, 1.05, 20)], 1, "cheaper where both are as good"),
        ([row(0.99, 8), row(0.93, 1)], 1, "above the real images counts as theirs"),
        ([row(0.2, 0.0)], 0, "the only one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recommendation_follows_its_rule(rows, best, why):
    assert recommend(rows, real_fidelity=0.94) == best, why


# --- drawings --------------------------------------------------------------------------------------------------------


def draw_by_scale(real):
    """Guidance 2 draws the masks as real images are, 1 ignores them, 4 draws them too bright."""

    def draw(settings: SamplingSettings):
        images = [item.image for item in real]
        if settings.cfg_scale == 1:
            images = images[1:] + images[:1]
        if settings.cfg_scale == 4:
            images = [np.clip(image.astype(int) + 50, 0, 255).astype(np.uint8) for image in images]
        return images, 2 * settings.num_steps

    return draw


def test_faithful_and_realistic_setting_is_recommended_with_the_fewest_steps(real):
    grid = settings_grid([1, 2, 4], [WHOLE], ["heun"], [20, 5])
    report = run_sweep(draw_by_scale(real), grid, real, DrawnJudge(), 2)
    best = report.rows[report.recommended]
    assert best.settings.cfg_scale == 2 and best.settings.num_steps == 5
    assert best.fidelity == report.real_fidelity == 1
    by_scale = {row.settings.cfg_scale: row for row in report.rows}
    assert by_scale[1].fidelity < 0.7 and by_scale[1].distance < 3 * by_scale[2].distance
    assert by_scale[4].fidelity == 1 and by_scale[4].distance > 20 * by_scale[2].distance
    assert by_scale[4].mean - report.real_mean == pytest.approx(50 / 255)
    assert by_scale[1].network_calls == 10 and by_scale[2].network_calls == 20
    assert best.flags() == "ODE --sampling-method heun --num-sampling-steps 5 --cfg-scale 2"


def test_flags_of_a_setting_are_understood_by_sample_ddp():
    import sample_ddp
    from settings import sampling_settings

    for settings in settings_grid([2.5, 1.2345678], [(0.25, 0.7512345)], ["sde-heun", "ab2"], [7], [1, TIME_SHIFT]):
        flags = SweepRow(settings, 0.5, 1, 0.5, 0.1, 1, 1).flags().split()
        args = sample_ddp.parse_args([*flags, "--ckpt", "a.pt", "--mask-path", "masks"])
        assert sampling_settings(args).to_dict() == settings.to_dict()


def test_too_few_masks_are_refused(real):
    with pytest.raises(InputError, match="too few"):
        run_sweep(draw_by_scale(real[:3]), settings_grid([1], [WHOLE], ["heun"], [5]), real[:3], DrawnJudge(), 2)


def test_too_few_masks_are_refused_before_the_judge_is_trained(real, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number, item in enumerate(real):
        Image.fromarray(item.image).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(item.classes * 255).save(tmp_path / "masks" / f"{number}.png")
    cpu = torch.device("cpu")
    request = JudgeRequest(tmp_path / "images", tmp_path / "masks", tmp_path / "judges", cpu, steps=2)
    trained = SimpleNamespace(data=DataConfig(image_size=SIZE), normalize_masks=False, mask_type="auto")
    with pytest.raises(InputError, match="images 3: too few masks"):
        load_sweep_data(trained, request, 3)
    assert not (tmp_path / "judges").exists()
    assert len(load_sweep_data(trained, request, 4).items) == 4


def test_an_image_under_two_names_is_not_shown_to_the_judge_of_its_copy(real, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number, item in enumerate(real):
        for start in ("", "copy_"):
            Image.fromarray(item.image).save(tmp_path / "images" / f"{start}{number}.png")
            Image.fromarray(item.classes * 255).save(tmp_path / "masks" / f"{start}{number}.png")
    trained = SimpleNamespace(data=DataConfig(image_size=SIZE), normalize_masks=False, mask_type="auto")
    request = JudgeRequest(tmp_path / "images", tmp_path / "masks", tmp_path / "judges", torch.device("cpu"), steps=2)
    found = load_sweep_data(trained, request, 4)
    names = [item.name for item in found.items]
    assert len(names) == 4 and len({name.removeprefix("copy_") for name in names}) == 2


def test_ids_of_few_cells_are_read_as_the_model_learned_them(real, tmp_path):
    ids = np.zeros((SIZE, SIZE), np.uint8)
    ids[8:16, 4:12], ids[8:16, 12:20] = 1, 2  # two cells that touch, not the classes 1 and 2
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number, item in enumerate(real):
        Image.fromarray(item.image).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(ids).save(tmp_path / "masks" / f"{number}.png")
    request = JudgeRequest(tmp_path / "images", tmp_path / "masks", tmp_path / "judges", torch.device("cpu"), steps=2)
    config = DataConfig(image_size=SIZE, num_classes=3)
    trained = SimpleNamespace(data=config, normalize_masks=False, mask_type="instances")
    found = load_sweep_data(trained, request, 4)
    assert found.separated and all(item.cells.max() == 2 for item in found.real)


def test_files_hold_every_setting_and_the_plot(real, tmp_path):
    report = run_sweep(draw_by_scale(real), settings_grid([1, 2], [WHOLE], ["heun"], [5]), real, DrawnJudge(), 2)
    write_sweep_report(report, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [row["recommended"] for row in rows] == ["0", "1"] and float(rows[1]["fidelity"]) == 1
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert content["recommended_flags"] == report.rows[1].flags() and len(content["rows"]) == 2
    assert np.array(Image.open(tmp_path / "out" / "sweep.png")).std() > 5
    assert "<- recommended" in "\n".join(SECTION.lines(report.to_dict()))


# --- the command -----------------------------------------------------------------------------------------------------


def test_bad_intervals_and_solvers_are_refused(tmp_path, capsys):
    folders = ["--data-path", str(tmp_path), "--mask-path", str(tmp_path)]
    start = ["sweep", "--ckpt", "none.pt", *folders]
    for text in ("0.5", "0.8:0.2", "a:b", "0:2"):
        with pytest.raises(SystemExit) as end:
            evaluate.parse_args([*start, "--guidance-intervals", text])
        assert end.value.code == 2
    assert "LO:HI" in capsys.readouterr().err
    with pytest.raises(InputError, match="dopri5: unknown; choose from euler"):
        evaluate.main(evaluate.parse_args([*start, "--solvers", "dopri5"]))


@pytest.fixture
def checkpoint(tmp_path: Path, make_model) -> Path:
    """A tiny pixel model that has learned nothing, as train.py writes it."""
    import torch

    from dataset.config import DataConfig
    from engine.checkpoint import save_checkpoint
    from models import build_model

    config: dict[str, dict] = {
        "model": {
            "name": "SiT-Ti/8",
            "input_size": SIZE,
            "in_channels": 3,
            "num_classes": 2,
            "class_dropout_prob": 0.1,
            "mask_pixels": 8,
        },
        "transport": {"prediction": "data", "loss_weight": "velocity"},
        "space": {"vae": "none", "channels": 3, "fingerprint": "", "factor": 1},
        "data": DataConfig(image_size=SIZE).to_dict(),
        "train": {},
    }
    torch.manual_seed(0)
    weights = build_model(config["model"]).state_dict()
    state = {"model": weights, "ema": weights, "opt": {}, "step": 1, "config": config}
    save_checkpoint(tmp_path / "tiny.pt", state)
    return tmp_path / "tiny.pt"


def test_command_draws_with_a_checkpoint_and_leaves_the_sweeps_masks_to_no_judge(checkpoint, tmp_path, capsys):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for seed in range(10):
        cells = disk(SIZE, *place(np.random.default_rng(seed), 7, SIZE - 7), 5)
        Image.fromarray(paint(cells)).save(tmp_path / "images" / f"r{seed}.png")
        Image.fromarray(np.where(cells, 255, 0).astype(np.uint8)).save(tmp_path / "masks" / f"r{seed}.png")
    command = [
        "sweep", "--ckpt", str(checkpoint), "--data-path", str(tmp_path / "images"),
        "--mask-path", str(tmp_path / "masks"), "--images", "5", "--cfg-scales", "1", "2", "--num-steps", "2",
        "--steps", "2", "--cache-dir", str(tmp_path / "judges"), "--output", str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip
    evaluate.main(evaluate.parse_args(command))
    printed = capsys.readouterr().out
    assert "sample with: ODE --sampling-method ab2" in printed
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert content["images"] == 5 and [row["network_calls"] for row in content["rows"]] == [3, 6]
