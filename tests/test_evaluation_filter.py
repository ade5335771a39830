"""evaluate.py filter: threshold, best share, the kept and dropped lists, copies, and an untouched set."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from drawn_sets import Row, disk, paint, write_set

import evaluate
from common.errors import InputError
from evaluation.filter import filter_set, write_filter_report
from synthetic.manifest import write_manifest
from synthetic.reader import SampleSet

VALUES = ["0.9000", "0.2000", "0.7000", "0.7000", "0.4000"]


def scored_set(folder: Path, values: list[str] = VALUES) -> Path:
    """A set whose manifest has these fidelities."""
    cells = disk(24, 10, 11, 5)
    row = Row(np.where(cells, 255, 0).astype(np.uint8), paint(cells), paint(cells))
    write_set(folder, [row] * len(values))
    lines = list(csv.DictReader((folder / "manifest.csv").open()))
    rows = [line | {"fidelity_dice": value} for line, value in zip(lines, values, strict=True)]
    write_manifest(folder, rows)
    return folder


def names(samples) -> list[str]:
    return [sample.name for sample in samples]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_threshold_keeps_what_reaches_it(tmp_path):
    result = filter_set(SampleSet(scored_set(tmp_path / "set")), min_fidelity=0.7)
    assert names(result.kept) == ["cells_00", "cells_02", "cells_03"]
    assert [(sample.name, why) for sample, why in result.dropped] == [
        ("cells_01", "fidelity_dice below 0.7"),
        ("cells_04", "fidelity_dice below 0.7"),
    ]
    assert result.mean_before == pytest.approx(0.58) and result.mean_after == pytest.approx(2.3 / 3)


@pytest.mark.parametrize(("share", "kept"), [(0.01, [0]), (0.4, [0, 2]), (0.5, [0, 2, 3]), (1.0, [0, 1, 2, 3, 4])])
def test_share_keeps_the_best_and_the_first_of_equal_ones(tmp_path, share, kept):
    result = filter_set(SampleSet(scored_set(tmp_path / "set")), keep_share=share)
    assert names(result.kept) == [f"cells_{index:02d}" for index in kept]


def test_set_stays_as_it_is_and_the_lists_say_what_was_dropped_and_why(tmp_path):
    folder = scored_set(tmp_path / "set")
    before = content(folder)
    samples = SampleSet(folder)
    write_filter_report(samples, filter_set(samples, min_fidelity=0.5))
    after = content(folder)
    assert {name: after[name] for name in before} == before
    assert sorted(set(after) - set(before)) == [
        "evaluation/dropped.csv",
        "evaluation/filter.json",
        "evaluation/kept.csv",
    ]
    dropped = list(csv.DictReader((folder / "evaluation" / "dropped.csv").open()))
    assert [row["image"] for row in dropped] == ["images/cells_01.png", "images/cells_04.png"]
    assert dropped[0]["reason"] == "fidelity_dice below 0.5" and dropped[0]["fidelity_dice"] == "0.2000"
    summary = json.loads((folder / "evaluation" / "filter.json").read_text())
    assert (summary["kept"], summary["dropped"]) == (3, 2)


def test_filtered_copy_is_a_set_again_with_equal_files(tmp_path):
    samples = SampleSet(scored_set(tmp_path / "set"))
    write_filter_report(samples, filter_set(samples, keep_share=0.6), tmp_path / "best")
    best = SampleSet(tmp_path / "best")
    assert names(best.samples) == ["cells_00", "cells_02", "cells_03"] and best.config == samples.config
    for sample in best.samples:
        assert sample.image_path.read_bytes() == (samples.folder / sample.columns["image"]).read_bytes()
        assert (best.real(sample) == best.synthetic(sample)).all()
    assert "filtered_from" in best.settings["filter"]


def test_filtered_copy_knows_what_its_judge_has_seen(tmp_path):
    samples = SampleSet(scored_set(tmp_path / "set"))
    (samples.folder / "evaluation").mkdir()
    (samples.folder / "evaluation" / "fidelity.json").write_text(json.dumps({"judge_images_sha256": ["a", "b"]}))
    write_filter_report(samples, filter_set(samples, keep_share=0.6), tmp_path / "best")
    assert SampleSet(tmp_path / "best").settings["filter"]["judge_images_sha256"] == ["a", "b"]


def test_filtered_copy_of_a_set_that_was_drawn_again_knows_both_judges(tmp_path):
    samples = SampleSet(scored_set(tmp_path / "set"))
    for note, known in (({"judge_images_sha256": ["a", "c"]}, ["a", "b", "c"]), ({"judge_images_sha256": []}, [])):
        (samples.folder / "evaluation").mkdir(exist_ok=True)
        (samples.folder / "evaluation" / "fidelity.json").write_text(json.dumps({"judge_images_sha256": ["a", "b"]}))
        samples.settings["filter"] = note
        output = tmp_path / f"best_{len(known)}"
        write_filter_report(samples, filter_set(samples, keep_share=0.5), output)
        found = SampleSet(output).settings["filter"]
        assert found["judge_images_sha256"] == known and found["before"] == note


def test_filled_output_folder_is_refused_before_anything_is_written(tmp_path):
    samples = SampleSet(scored_set(tmp_path / "set"))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_filter_report(samples, filter_set(samples, keep_share=0.6), tmp_path / "best")
    with pytest.raises(InputError, match="inside the set"):
        write_filter_report(samples, filter_set(samples, keep_share=0.6), samples.folder / "best")
    assert not (samples.folder / "evaluation").exists()


def test_set_without_fidelity_is_sent_to_the_fidelity_command(tmp_path):
    folder = scored_set(tmp_path / "set", ["0.5", "", "nan", "inf", "-0.1", "9" * 5000])
    with pytest.raises(InputError, match=r"5 rows have no number.*cells_01"):
        filter_set(SampleSet(folder), keep_share=0.5)
    cells = disk(24, 10, 11, 5)
    plain = write_set(tmp_path / "plain", [Row(np.where(cells, 255, 0).astype(np.uint8), paint(cells))])
    with pytest.raises(InputError, match="run evaluate.py fidelity"):
        filter_set(SampleSet(plain), keep_share=0.5)


def test_threshold_that_keeps_nothing_is_refused_with_the_best_value(tmp_path):
    with pytest.raises(InputError, match="the best has 0.9000"):
        filter_set(SampleSet(scored_set(tmp_path / "set")), min_fidelity=0.95)


def test_command_needs_exactly_one_rule_and_writes_the_copy(tmp_path, capsys):
    folder = scored_set(tmp_path / "set")
    for flags in ([], ["--min-fidelity", "0.5", "--keep-share", "0.5"], ["--keep-share", "1.5"]):
        with pytest.raises(SystemExit) as end:
            evaluate.parse_args(["filter", str(folder), *flags])
        assert end.value.code == 2
    capsys.readouterr()
    evaluate.main(
        evaluate.parse_args(["filter", str(folder), "--min-fidelity", "0.5", "--output", str(tmp_path / "b")])
    )
    assert "kept 3 of 5 images" in capsys.readouterr().out
    assert len(SampleSet(tmp_path / "b")) == 3
