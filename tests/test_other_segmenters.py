"""Training sets and scores for StarDist and Cellpose: what the scripts of benchmarks/segmenters write and count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from drawn_sets import Row, paint, write_set
from PIL import Image

from benchmarks.segmenters import folders, make_sets, score, strong
from dataset.config import DataConfig
from evaluation.experiments import augmentation
from evaluation.experiments.practice_report import write_training_set
from evaluation.fidelity import LabelledImage

SIZE = 64


def cells() -> np.ndarray:
    """Two cells that touch."""
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[10:30, 10:20], labels[10:30, 20:30] = 1, 2
    return labels


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_training_sets_hold_the_real_and_the_synthetic_pairs_with_their_cells(tmp_path):
    labels = cells()
    bright = paint(labels > 0)
    for kind, array in {
        "images": bright // 2,
        "masks": 255 * (labels > 0).astype(np.uint8),
        "instances": labels,
    }.items():
        save(tmp_path / "labelled" / kind / "a.png", array)
    rule = {"mask_type": "instances", "num_classes": 2, "maximum": 1.0, "reason": "drawn"}
    config = DataConfig(SIZE, crop="random", window=(0, 99.8))
    dark = np.where(labels > 0, 40, 10).astype(np.uint8)
    write_set(tmp_path / "set", [Row(labels, dark, mask_type="instances")], config, mask_rule=rule)
    make_sets.main(make_sets.parse_args([str(tmp_path / name) for name in ("labelled", "set", "out")]))
    both = tmp_path / "out" / "real_and_synthetic"
    real, made = sorted(path.name for path in (both / "images").iterdir())
    assert real == "real_a.png" and made.startswith("synthetic_")
    assert [path.name for path in (tmp_path / "out" / "real" / "images").iterdir()] == [real]
    for name in (real, made):
        assert np.unique(np.array(Image.open(both / "instances" / name))).tolist() == [0, 1, 2]
    assert np.array(Image.open(both / "images" / real)).max() == 255  # stretched
    assert np.array(Image.open(both / "images" / made)).max() == 40  # and this one is not, a second time
    assert [path.name for path in (both / "cellpose").glob("copy*")] == []  # one real pair, one synthetic pair
    words = [str(tmp_path / name) for name in ("labelled", "set", "raw")]
    make_sets.main(make_sets.parse_args([*words, "--no-stretch"]))
    raw = np.array(Image.open(tmp_path / "raw" / "real" / "images" / real))
    assert raw.max() == (bright // 2).max()


def test_layouts_of_tools_that_draw_all_pairs_alike_hold_as_many_real_as_synthetic_pairs(tmp_path):
    labels = cells()
    item = LabelledImage(paint(labels > 0), (labels > 0).astype(np.uint8), labels.astype(np.int64))
    real, made = ([(f"{kind}_{n}", item) for n in range(count)] for kind, count in (("real", 2), ("made", 7)))
    for _ in range(2):  # the second time changes nothing
        write_training_set(tmp_path, real, made)
        images = sorted(path.name for path in (tmp_path / "cellpose").glob("*_img.tif"))
        assert len(images) == 8 + 7 and {name for name in images if "real" in name} == {
            f"{copy}real_{n}_img.tif" for copy in ("", "copy2_", "copy3_", "copy4_") for n in range(2)
        }
        for kind in ("images", "masks"):
            assert len(list((tmp_path / "stardist" / kind).iterdir())) == 8 + 7
    first, copy = (tmp_path / "cellpose" / f"{name}_masks.tif" for name in ("real_0", "copy4_real_0"))
    assert first.read_bytes() == copy.read_bytes()
    assert len(list((tmp_path / "images").iterdir())) == 2 + 7


def test_test_images_are_stretched_as_the_training_sets_are():
    ramp = np.repeat(np.linspace(20, 120, SIZE).astype(np.uint8)[None, :, None], 3, 2).repeat(SIZE, 0)
    plain, wide = folders.unit_gray(ramp, stretch=False), folders.unit_gray(ramp, stretch=True)
    assert plain.dtype == wide.dtype == np.float32
    assert (plain.min(), plain.max()) == (np.float32(20 / 255), np.float32(120 / 255))
    assert wide.min() == 0 and abs(wide.max() - 1) < 0.02
    assert folders.unit_gray(np.full((4, 4, 3), 7, np.uint8), stretch=True).max() == 0  # one gray value


def test_score_counts_each_group_by_itself(tmp_path):
    empty, labels = np.zeros((SIZE, SIZE), np.uint8), cells()
    for name, found in {"good": labels, "bad": empty}.items():
        save(tmp_path / "test" / "instances" / f"test__{name}.png", labels)
        save(tmp_path / "out" / "predicted" / f"test__{name}.png", found)
    own = {"tool": "stardist", "pooled": True, "ap": {"0.5": 0.5}}
    (tmp_path / "out" / "own_scores.json").write_text(json.dumps(own))
    (tmp_path / "table.csv").write_text("name,look\ngood.png,one\nbad.png,other\n")
    groups = score.read_groups(tmp_path / "table.csv", "look")
    found = score.main(tmp_path / "test", tmp_path / "out", groups)
    assert found["ap"]["0.5"] == 0.5 and found["ap50_touching"] == 0.5
    assert found["ap50_of_groups"] == {"one": 1.0, "other": 0.0}
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == found


def test_strong_augmentation_moves_image_and_cells_together_with_the_values_of_utility():
    labels = cells().astype(np.int32)
    image = np.repeat(np.where(labels > 0, 0.7, 0.2)[..., None], 3, axis=2).astype(np.float32)
    rng = np.random.default_rng(0)
    changed = [strong.augment(image, labels, rng) for _ in range(12)]
    for gray, moved in changed:
        assert gray.shape == image.shape and gray.min() >= 0 and gray.max() <= 1 and set(np.unique(moved)) <= {0, 1, 2}
        if (moved > 0).sum() > 100:
            assert gray[moved > 0].mean() - gray[moved == 0].mean() > 0.2
    assert len({moved.tobytes() for _, moved in changed}) == 12
    assert 100 < np.mean([(moved == 1).sum() for _, moved in changed]) < 300  # of 200 pixels
    names = [name for name in vars(strong) if name.isupper()]
    assert {name: getattr(strong, name) for name in names} == {name: getattr(augmentation, name) for name in names}
