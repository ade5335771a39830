"""evaluate.py data: counts of drawn sets, every problem found and said, near-duplicates, the contact sheet."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from drawn_sets import disk
from PIL import Image

import evaluate
from common.errors import InputError
from dataset.files import read_image
from evaluation.data_report import survey, write_data_report
from evaluation.image_facts import NEAR_DUPLICATE, Shown, group_alike, near_duplicates, shown_among

DATA = Path(__file__).parents[2] / "shared" / "data"
HEIGHT, WIDTH = 48, 64


def draw_pair(folder: Path, name: str, cells: int, seed: int = 0, value: int = 255) -> None:
    """One image of WIDTH x HEIGHT with its mask: ``cells`` disks of 21 pixels each, apart from each other."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for number in range(cells):
        mask |= disk(WIDTH, 8 + 16 * (number % 3), 8 + 16 * (number // 3), 2.4)[:HEIGHT]
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.uniform(20, 150, (6, 8)), np.ones((8, 8)))
    Image.fromarray(np.where(mask, 220, coarse).astype(np.uint8)).save(folder / "images" / f"{name}.png")
    Image.fromarray((mask * value).astype(np.uint8)).save(folder / "masks" / f"{name}.png")


@pytest.fixture
def drawn(tmp_path) -> Path:
    """Four clean pairs of 0, 1, 4 and 5 cells."""
    for number, cells in enumerate((0, 1, 4, 5)):
        draw_pair(tmp_path, f"cell_{number}", cells, seed=number)
    return tmp_path


def look(folder: Path, **settings):
    return survey(folder / "images", folder / "masks", **settings)


def test_drawn_set_is_counted_as_drawn(drawn):
    report, pairs, rule = look(drawn)
    assert (report.images, report.masks, report.pairs, len(pairs)) == (4, 4, 4, 4)
    assert report.sizes == {"64 x 48": 4} and report.dtypes == {"uint8, 1 channel": 4}
    assert report.instances == [0, 1, 4, 5] and rule.mask_type == "binary"
    share = 10 * 21 / (4 * HEIGHT * WIDTH)
    assert report.class_shares == pytest.approx([1 - share, share], abs=1e-6)
    assert report.problems == [] and report.duplicates == []
    text = "\n".join(report.lines())
    assert "cells per image: 0 to 5, median 2.5, 10 in all" in text and "no problem found: training can start" in text
    assert "1 of 4 masks have no cell" in text


def test_instance_ids_are_counted_as_ids_even_where_cells_touch(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    labels = np.zeros((40, 50), np.uint16)
    for number in range(9):
        labels[10 * (number // 3) : 10 * (number // 3) + 10, 10 * (number % 3) : 10 * (number % 3) + 10] = 10 + number
    tifffile.imwrite(tmp_path / "masks" / "a_masks.tif", labels)
    tifffile.imwrite(tmp_path / "images" / "a_img.tif", np.arange(2000, dtype=np.uint16).reshape(40, 50))
    report, _, rule = look(tmp_path)
    assert rule.mask_type == "instances" and report.instances == [9]
    assert report.ranges == {"uint16": {"minimum": 0, "maximum": 1999, "median_maximum": 1999}}


def test_every_problem_is_found_and_said(drawn):
    draw_pair(drawn, "lonely", 1, seed=7)
    (drawn / "masks" / "lonely.png").rename(drawn / "masks" / "other.png")
    draw_pair(drawn, "torn", 1, seed=8)
    torn = drawn / "images" / "torn.png"
    torn.write_bytes(torn.read_bytes()[:200])
    draw_pair(drawn, "small", 1, seed=9)
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(drawn / "masks" / "small.png")
    report, pairs, _ = look(drawn)
    assert report.without_mask == ["lonely"] and report.without_image == ["other"]
    assert len(report.unreadable) == 1 and "torn.png" in report.unreadable[0]
    (mismatched,) = report.mismatched
    assert "small.png: has 12 x 10 pixels, but its image 64 x 48" in mismatched
    assert [pair.name for pair in pairs] == [f"cell_{number}" for number in range(4)]
    assert len(report.problems) == 4


def test_unclear_masks_are_a_problem_with_the_likely_types_named(tmp_path):
    draw_pair(tmp_path, "a", 3, value=37)
    report, _, rule = look(tmp_path)
    assert rule is None and report.instances == []
    assert "--mask-type binary" in report.problems[0] and report.problems[0].endswith("Give what fits")
    assert look(tmp_path, mask_type="binary")[0].problems == []


def test_blank_images_other_files_and_losses_of_the_crop_are_remarks(drawn):
    draw_pair(drawn, "blank", 1, seed=7)
    Image.fromarray(np.full((HEIGHT, WIDTH), 90, np.uint8)).save(drawn / "images" / "blank.png")
    (drawn / "images" / "stack.nd2").write_bytes(b"?")
    (drawn / "masks" / ".hidden").write_bytes(b"?")
    report, _, _ = look(drawn, image_size=50)
    remarks = "\n".join(report.remarks)
    assert report.problems == []
    assert "1 image of a single gray value: blank.png" in remarks
    assert "1 file neither image nor mask, to be ignored: stack.nd2" in remarks
    assert "--crop center cuts 25% off a typical image" in remarks
    assert "5 images are smaller than --image-size 50 and will be enlarged" in remarks
    assert "all images are gray" in remarks
    assert "enlarged" not in "\n".join(look(drawn, image_size=48)[0].remarks)


def test_images_of_other_channels_are_told_how_to_train(drawn, tmp_path):
    for path in (drawn / "images").glob("*.png"):
        gray = np.array(Image.open(path))
        tifffile.imwrite(path.with_suffix(".tif"), np.stack([gray, gray // 2]), metadata={"axes": "CYX"})
        path.unlink()
    report, pairs, rule = look(drawn)
    assert report.problems == []
    assert "images have 2 channels: train with --vae none --in-channels 2" in report.remarks
    assert (tmp_path / "report" / "contact_sheet.png") in write_data_report(report, pairs, rule, tmp_path / "report")
    draw_pair(drawn, "gray", 1, seed=7)
    assert "4 images have neither 1 nor 3 channels" in look(drawn)[0].problems[0]


def test_images_smaller_than_a_random_crop_are_a_problem(drawn):
    assert look(drawn, image_size=64)[0].problems == []
    assert "4 images are smaller than --image-size 64" in look(drawn, image_size=64, crop="random")[0].problems[0]


def test_planted_copies_are_found_and_different_images_are_not(drawn):
    image = np.array(Image.open(drawn / "images" / "cell_2.png"))
    for name in ("copy.png", "again.jpg", "dark.png"):
        (drawn / "masks" / name).with_suffix(".png").write_bytes((drawn / "masks" / "cell_2.png").read_bytes())
    Image.fromarray(image).save(drawn / "images" / "copy.png")
    Image.fromarray(image).save(drawn / "images" / "again.jpg", quality=70)
    Image.fromarray((image * 0.6).astype(np.uint8)).save(drawn / "images" / "dark.png")
    duplicates = look(drawn)[0].duplicates
    assert {name for entry in duplicates for name in entry[:2]} == {"cell_2.png", "copy.png", "again.jpg", "dark.png"}
    assert len(duplicates) == 3  # they join the four
    assert next(entry[2] for entry in duplicates if set(entry[:2]) == {"cell_2.png", "copy.png"}) == 1.0


def test_a_series_gives_a_pair_for_each_further_image(monkeypatch):
    """Two series that one image joins late, copies, an image of one gray value, and one that shows something else."""
    monkeypatch.setattr("evaluation.image_facts.BLOCK", 7)
    first, second, other = np.linalg.qr(np.random.default_rng(0).normal(size=(1024, 3)))[0].T
    turned = 0.985 * first + np.sqrt(1 - 0.985**2) * second  # too far from the first
    between = (first + turned) / np.linalg.norm(first + turned)
    signatures = [*[first] * 300, other, *[turned] * 300, np.zeros(1024), np.zeros(1024), between]
    digests = [*"abc" * 100, *(f"d{number}" for number in range(301)), "gray", "gray", "e"]
    names = [f"n{number:03d}" for number in range(len(signatures))]
    shown = [Shown(*one) for one in zip(names, digests, np.array(signatures, np.float32), strict=True)]
    pairs = near_duplicates(shown)
    assert len(pairs) == 299 + 299 + 1 + 2
    groups = group_alike(shown)
    assert sorted(map(len, groups)) == [1, 2, 601]
    apart = near_duplicates(shown[:-1])
    assert len(apart) == 299 + 299 + 1 and {pair for pair in pairs if "n603" in pair} == set(pairs) - set(apart)
    assert shown_among(shown[301:], shown[:300]) == [False] * 302 + [True]
    assert shown_among(shown[:5], []) == [False] * 5 and shown_among([shown[601]], [shown[602]]) == [True]


def field_under_a_lamp(seed: int) -> np.ndarray:
    """A field (200, 230, 1) of weak cells of its own, 40 % darker in the corners than in the middle, with noise."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((230, 230), bool)
    for _ in range(9):
        cells |= disk(230, rng.uniform(10, 190), rng.uniform(10, 190), rng.uniform(5, 8))
    y, x = np.mgrid[-1:1:200j, -1:1:230j]
    gray = (120 + 9 * cells[:200]) * (1 - 0.2 * (x**2 + y**2)) + rng.normal(0, 1, x.shape)
    return gray.clip(0, 255).astype(np.uint8)[..., None]


def copies_of(image: np.ndarray) -> list[np.ndarray]:
    """The image saved as JPEG, darker, brighter, and at half its size."""
    picture, stream = Image.fromarray(image.squeeze()), io.BytesIO()
    picture.save(stream, "JPEG", quality=60)
    small = picture.resize((picture.width // 2, picture.height // 2))
    return [
        np.atleast_3d(one) for one in (np.array(Image.open(stream)), image * 0.6, image * 0.8 + 40, np.array(small))
    ]


def test_different_fields_under_the_same_uneven_light_are_no_copies_but_copies_are():
    fields = [field_under_a_lamp(seed) for seed in range(6)]
    shown = [Shown.of(f"f{number}", image) for number, image in enumerate(fields)]
    signatures = np.stack([one.signature for one in shown])
    assert (signatures @ signatures.T)[np.triu_indices(6, 1)].max() > NEAR_DUPLICATE  # the light decides
    assert near_duplicates(shown) == [] and shown_among(shown[:3], shown[3:]) == [False] * 3
    for number, image in enumerate(fields):
        copies = [Shown.of(f"copy {place}", one) for place, one in enumerate(copies_of(image))]
        assert shown_among(copies, shown) == [True] * 4
        assert sorted(map(len, group_alike([*shown, *copies]))) == [1] * 5 + [5], number


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the reference sets")
@pytest.mark.parametrize("name", ["nuclei", "histology", "leukocytes"])
def test_copies_of_real_images_are_found(name):
    paths = sorted((DATA / name / "train" / "images").iterdir())[:8]
    shown = [Shown.of(path.stem, read_image(path)) for path in paths]
    assert near_duplicates(shown) == []
    for path in paths[:3]:
        image = read_image(path)
        gray = image[..., :3].mean(axis=2, keepdims=True).astype(np.uint8)
        assert shown_among([Shown.of("copy", one) for one in copies_of(gray)], shown) == [True] * 4


def test_copies_of_one_file_name_are_found(tmp_path):
    draw_pair(tmp_path / "drawn", "a", 3)
    draw_pair(tmp_path / "drawn", "b", 4, seed=1)
    for case, name in ((1, "a"), (2, "b"), (3, "a")):
        for kind, own in (("images", "image"), ("masks", "mask")):
            (tmp_path / "all" / f"case{case}" / own).mkdir(parents=True)
            content = (tmp_path / "drawn" / kind / f"{name}.png").read_bytes()
            (tmp_path / "all" / f"case{case}" / own / f"{own}.png").write_bytes(content)
    report = survey(tmp_path / "all", tmp_path / "all")[0]
    assert report.duplicates == [("case1", "case3", 1.0)]


def test_images_of_one_gray_value_are_duplicates_only_where_equal(tmp_path):
    for number, gray in enumerate((10, 10, 90)):
        draw_pair(tmp_path, f"flat_{number}", 1)
        Image.fromarray(np.full((HEIGHT, WIDTH), gray, np.uint8)).save(tmp_path / "images" / f"flat_{number}.png")
    assert look(tmp_path)[0].duplicates == [("flat_0.png", "flat_1.png", 1.0)]


def test_contact_sheet_shows_the_outlines(drawn, tmp_path):
    report, pairs, rule = look(drawn)
    write_data_report(report, pairs, rule, tmp_path / "out")
    sheet = np.array(Image.open(tmp_path / "out" / "contact_sheet.png").convert("RGB")).astype(int)
    magenta = (sheet[..., 0] > 180) & (sheet[..., 1] < 140) & (sheet[..., 2] > 150)
    assert magenta.sum() > 100
    assert json.loads((tmp_path / "out" / "data.json").read_text())["instances"] == [0, 1, 4, 5]


def test_command_ends_with_zero_or_with_one_line_and_the_report_written(drawn, tmp_path, capsys):
    command = ["data", "--data-path", str(drawn / "images"), "--mask-path", str(drawn / "masks")]
    evaluate.main(evaluate.parse_args([*command, "--output", str(tmp_path / "good")]))
    assert "4 images, 4 masks, 4 pairs" in capsys.readouterr().out
    (drawn / "masks" / "cell_1.png").unlink()
    with pytest.raises(InputError, match="1 problem"):
        evaluate.main(evaluate.parse_args([*command, "--output", str(tmp_path / "bad")]))
    assert "PROBLEM: 1 image without a mask" in (tmp_path / "bad" / "data.txt").read_text()


def test_signs_of_formulas_in_file_names_are_only_characters(tmp_path, capsys):
    for name in ("cell$1_{2", r"a$b$\frac^", "100%_$x_1$"):
        draw_pair(tmp_path, name, 1, seed=len(name))
    command = ["data", "--data-path", str(tmp_path / "images"), "--mask-path", str(tmp_path / "masks")]
    evaluate.main(evaluate.parse_args([*command, "--output", str(tmp_path / "out")]))
    assert "3 images, 3 masks, 3 pairs" in capsys.readouterr().out
    assert np.array(Image.open(tmp_path / "out" / "contact_sheet.png")).std() > 5


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(("kind", "pairs"), [("nuclei/val", 69), ("histology/val", 5)])
def test_real_sets_have_no_problem_and_the_counts_of_their_index(kind, pairs):
    import csv

    folder = DATA / kind
    report, _, _ = survey(folder / "images", folder / "instances", mask_type="instances")
    rows = list(csv.DictReader((folder.parent / "index.csv").open()))
    split = [row for row in rows if row["split"] == folder.name]
    column = next(name for name in rows[0] if "instances" in name)
    assert report.problems == [] and report.pairs == pairs
    assert sum(report.instances) == sum(int(row[column]) for row in split)
