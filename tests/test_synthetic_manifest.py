"""The set on disk: columns and relative paths; names that point outside and folders of other work are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from drawn_sets import Row, disk, paint, write_set
from PIL import Image

from common.disk import check_folder
from common.errors import InputError
from dataset.config import DataConfig
from evaluation.filter import filter_set, write_filter_report
from evaluation.threshold import score_by_threshold
from synthetic.manifest import (
    COLUMNS,
    FIDELITY_COLUMN,
    number_or_none,
    read_manifest,
    read_settings,
    relative_to_set,
    upgrade_settings,
    write_column,
    write_manifest,
)
from synthetic.reader import SampleSet

ROOT = Path(__file__).parents[1]


def small_set(folder: Path, count: int = 2, relative: bool = True, **settings: Any) -> Path:
    """A scored set; its real images lie in a folder beside it."""
    cells = disk(24, 10, 11, 5)
    row = Row(np.where(cells, 255, 0).astype(np.uint8), paint(cells), paint(cells))
    write_set(folder, [row] * count, **settings)
    _, rows = read_manifest(folder)
    for number, line in enumerate(rows):
        if relative:
            line["real_image"] = relative_to_set(Path(line["real_image"]), folder)
        line[FIDELITY_COLUMN] = f"0.{number + 1}000"
    write_manifest(folder, rows)
    return folder


# --- columns ---------------------------------------------------------------------------------------------------------


def column_table() -> str:
    """COLUMNS as a table in Markdown: ``docs/manifest.md`` holds it."""
    lines = ["| column | meaning | written by |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{c.name}` | {c.meaning} | `{c.writer}` |" for c in COLUMNS)])


def test_documented_columns_are_those_of_the_code():
    assert column_table() in (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)


def test_columns_stand_in_the_order_of_the_table_and_unknown_ones_behind(tmp_path):
    rows = [{"mine": "x", "fidelity_dice": "1", "label": "masks/a.png", "image": "images/a.png"}]
    write_manifest(tmp_path, [*rows, {"image": "images/b.png", "label": "masks/b.png"}])
    columns, rows = read_manifest(tmp_path)
    assert columns == ["image", "label", "fidelity_dice", "mine"]
    assert rows[1] == {"image": "images/b.png", "label": "masks/b.png", "fidelity_dice": "", "mine": ""}


def test_a_column_is_added_once_and_gets_new_values(tmp_path):
    folder = small_set(tmp_path / "set")
    for values in (["a", "b"], ["c", "d"]):
        write_column(folder, "mine", values)
    columns, rows = read_manifest(folder)
    assert columns.count("mine") == 1 and [row["mine"] for row in rows] == ["c", "d"]


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_set_is_evaluated_after_it_was_moved_with_its_real_images(tmp_path):
    small_set(tmp_path / "here" / "set")
    before = score_by_threshold(SampleSet(tmp_path / "here" / "set"))
    (tmp_path / "here").rename(tmp_path / "there")
    after = score_by_threshold(SampleSet(tmp_path / "there" / "set"))
    assert after.compared and after.dice_real == before.dice_real == 1


def test_a_relative_path_is_read_from_the_set_and_not_from_where_the_command_runs(monkeypatch, tmp_path):
    folder = small_set(tmp_path / "set")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    shutil.copytree(tmp_path / "set_real", tmp_path / "elsewhere" / "set_real")
    monkeypatch.chdir(tmp_path / "elsewhere" / "deep")
    assert SampleSet(folder).samples[0].real_path.samefile(tmp_path / "set_real" / "cells_00.png")


def test_old_sets_with_absolute_paths_are_read(tmp_path):
    folder = small_set(tmp_path / "set", relative=False)
    assert Path(read_manifest(folder)[1][0]["real_image"]).is_absolute()
    assert SampleSet(folder).samples[0].real_path.is_file()


def test_a_filtered_copy_holds_no_absolute_path(tmp_path):
    samples = SampleSet(small_set(tmp_path / "set", relative=False))
    write_filter_report(samples, filter_set(samples, keep_share=0.5), tmp_path / "deeper" / "best")
    for name in ("manifest.csv", "settings.json"):
        assert str(tmp_path) not in (tmp_path / "deeper" / "best" / name).read_text()
    best = SampleSet(tmp_path / "deeper" / "best")
    assert best.samples[0].real_path.samefile(tmp_path / "set_real" / "cells_01.png")
    assert (best.folder / best.settings["filter"]["filtered_from"]).samefile(samples.folder)


@pytest.mark.parametrize("column", ["image", "label"])
@pytest.mark.parametrize(
    "name", ["../payload.png", "images/../../payload.png", "/tmp/payload.png", "..\\payload.png", ""]
)
def test_names_that_leave_the_set_are_refused(tmp_path, column, name):
    folder = small_set(tmp_path / "set")
    (tmp_path / "payload.png").write_bytes((folder / "images" / "cells_00.png").read_bytes())
    _, rows = read_manifest(folder)
    write_manifest(folder, [rows[0], rows[1] | {column: name}])
    with pytest.raises(InputError, match="outside of the set"):
        SampleSet(folder)


# --- settings --------------------------------------------------------------------------------------------------------


def test_each_note_of_a_judge_has_one_key_in_old_sets_too(tmp_path):
    redraw = {"min_fidelity": 0.8, "judge_key": "k", "judge_images_sha256": ["a"]}
    folder = small_set(tmp_path / "set", filter=redraw)
    assert read_settings(folder)["redraw"] == redraw and "filter" not in read_settings(folder)
    assert SampleSet(folder).chosen_by("k") and not SampleSet(folder).chosen_by("other")
    filtered = {"rule": "x", "before": {"rule": "y", "before": redraw}}
    assert upgrade_settings({"filter": filtered}) == {"filter": filtered, "redraw": redraw}
    assert upgrade_settings({"filter": {"rule": "x"}}) == {"filter": {"rule": "x"}}


def test_a_folder_of_other_work_is_refused_and_one_of_the_same_is_continued(tmp_path):
    settings = {"seed": 0, "size": [1, 2], "speed": "slow"}
    assert not check_folder(tmp_path / "new", settings) and not (tmp_path / "new").exists()
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert check_folder(tmp_path, settings | {"size": (1, 2), "speed": "fast"}, free=["speed"])
    with pytest.raises(InputError, match=r"other settings \(seed 0 -> 7, speed slow -> fast\)"):
        check_folder(tmp_path, settings | {"seed": 7, "speed": "fast"})
    with pytest.raises(InputError, match="is not empty"):
        check_folder(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "settings.json", settings)
    for damaged in ("{", "[]"):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(
            InputError, match=r"settings\.json (is not readable JSON|holds a list) .*name another folder"
        ):
            check_folder(tmp_path, settings)
    (tmp_path / "settings.json").rename(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="this command did not make it"):
        check_folder(tmp_path, settings)


def test_an_empty_folder_and_a_locked_one_are_free(tmp_path):
    (tmp_path / ".lock").touch()
    assert not check_folder(tmp_path) and not check_folder(tmp_path, {"seed": 0})


GOOD = {"data_config": {"image_size": 16}}
RULE = {"mask_type": "binary", "num_classes": 2, "maximum": 255.0, "reason": ""}
WRONG_SETTINGS = [
    {"data_config": [1]}, {"data_config": {"image_size": 16, "x": 1}}, {"data_config": {"image_size": "16"}},
    {"data_config": {"image_size": 16, "window": "ab"}}, {"mask_rule": {"x": 1}}, {"mask_rule": [1]}, {"filter": [1]},
    {"redraw": "x"}, {"tile_scale": "x"}, {"tile_scale": -1}, {"trained_on": [1]}, {"mask_origin": 5},
    {**GOOD, "mask_rule": RULE | {"mask_type": "foo"}},
    {**GOOD, "mask_rule": RULE | {"maximum": 0.0}},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_SETTINGS, ids=str)
def test_settings_of_the_wrong_kind_are_refused_with_the_file(tmp_path, wrong):
    folder = small_set(tmp_path / "set")
    (folder / "settings.json").write_text(json.dumps(wrong))
    with pytest.raises(InputError, match=r"settings\.json.*sample the set again"):
        SampleSet(folder)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"window_low": "abc", "window_high": "5"}, "window_low 'abc' and window_high '5'"),
        ({"window_low": "0,5", "window_high": "9"}, "window_low '0,5'"),
        ({"window_low": "0 1", "window_high": "9"}, "as many numbers are needed in both"),
        ({"window_low": "7", "window_high": "7"}, "the low ones below the high ones"),
        ({"window_low": "0", "window_high": "inf"}, "window_high 'inf'"),
        ({"window_low": "nan", "window_high": "9"}, "window_low 'nan'"),
        ({"window_low": "", "window_high": "9"}, "window_low ''"),
        ({"mask_type": "foo"}, "mask_type 'foo' instead of one of binary, classes, probability, instances"),
        ({"mask_type": "auto"}, "mask_type 'auto' instead of one of"),
        ({"crop_top": "x"}, "no whole numbers in crop_scaled_height"),
    ],
)
def test_a_row_with_wrong_cells_is_named(tmp_path, cells, words):
    folder = small_set(tmp_path / "set")
    _, rows = read_manifest(folder)
    write_manifest(folder, [rows[0], rows[1] | {"intensity": "source"} | cells])
    with pytest.raises(InputError, match=rf"manifest\.csv: row of {rows[1]['image']} .*{words}"):
        SampleSet(folder)


def test_a_gray_range_of_other_channels_than_the_image_is_named(tmp_path):
    folder = small_set(tmp_path / "set")
    _, rows = read_manifest(folder)
    write_manifest(folder, [row | {"intensity": "source", "window_low": "0 1", "window_high": "8 9"} for row in rows])
    samples = SampleSet(folder)
    with pytest.raises(InputError, match=r"cells_00\.png has 3 channels, .*hold 2 numbers; sample the set again"):
        samples.synthetic(samples.samples[0])


@pytest.mark.parametrize(("value", "words"), [(7, "the value 7"), (1, "the value 1")])
def test_a_label_with_a_value_of_no_class_is_named(tmp_path, value, words):
    rule = {"mask_type": "classes", "num_classes": 3, "maximum": 1.0, "reason": "", "values": [0, 2, 5]}
    folder = small_set(tmp_path / "set", config=DataConfig(24, num_classes=3), mask_rule=rule)
    _, rows = read_manifest(folder)
    write_manifest(folder, [row | {"mask_type": "classes"} for row in rows])
    label = np.full((24, 24), 5, np.uint8)
    label[3, 4] = value
    Image.fromarray(label).save(folder / "masks" / "cells_00.png")
    samples = SampleSet(folder)
    with pytest.raises(InputError, match=rf"cells_00\.png holds {words}, .* have \(0, 2, 5\); sample the set again"):
        samples.class_map(samples.samples[0])
    label[3, 4] = 0
    Image.fromarray(label).save(folder / "masks" / "cells_00.png")
    assert np.array_equal(samples.class_map(samples.samples[0]), np.where(label == 5, 2, 0))


def test_a_label_with_planes_of_other_classes_is_named(tmp_path):
    folder = small_set(tmp_path / "set")
    _, rows = read_manifest(folder)
    write_manifest(folder, [row | {"mask_type": "probability", "label": "masks/soft.tif"} for row in rows])
    tifffile.imwrite(folder / "masks" / "soft.tif", np.full((5, 24, 24), 0.2, np.float32))
    samples = SampleSet(folder)
    with pytest.raises(InputError, match=r"soft\.tif has 5 planes, the set has 2 classes"):
        samples.class_map(samples.samples[0])


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("-1e-3", -0.001), ("", None), (None, None), ("nan", None), ("good", None)]
)
def test_a_cell_without_a_number_is_none(text, value):
    assert number_or_none(text) == value


def test_paths_lead_out_of_a_folder_that_is_a_link(tmp_path):
    (tmp_path / "disk" / "deep" / "set").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "samples").symlink_to(tmp_path / "disk" / "deep" / "set")
    for folder in ("home", "disk/deep/set"):
        image = tmp_path / folder / "images" / "a.png"
        image.parent.mkdir()
        image.write_bytes(b"image")
        name = relative_to_set(image, tmp_path / "home" / "samples")
        assert (tmp_path / "home" / "samples" / name).samefile(image)
    assert relative_to_set(tmp_path / "home" / "a.png", tmp_path / "home" / "set") == "../a.png"  # there or not
