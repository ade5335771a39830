"""evaluate.py report: one page with every number of the results, nothing loaded from elsewhere, everything escaped."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from drawn_sets import five_rows, write_set
from PIL import Image

import evaluate
from common.errors import InputError
from evaluation import output, report
from evaluation.fidelity import AgreementScore, FidelityReport, write_fidelity_report
from evaluation.filter import filter_set, write_filter_report
from evaluation.memorisation import score_memorisation, write_memorisation_report
from evaluation.output import Table, with_spread
from evaluation.population import score_population, write_population_report
from evaluation.realism import score_realism, write_realism_report
from evaluation.report import TEMPLATE, write_report
from evaluation.threshold import score_by_threshold, write_threshold_report
from synthetic.reader import SampleSet

SIZE = 40
# What measure_all has run, in the order of the page; grid and looks have their own tests.
MEASURED = ["fidelity", "threshold", "realism", "population", "memorisation", "filter"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A set of five images with real ones, in a folder whose name needs escaping."""
    return write_set(tmp_path / "a <b> & c", five_rows(SIZE))


def measure_all(folder: Path) -> SampleSet:
    """Every measure on a set, fidelity with given numbers."""
    real = folder.parent / f"{folder.name}_real"
    samples = SampleSet(folder)
    score = AgreementScore(5, 0.8123, [0.9, 0.7], {"0.5": 0.6, "0.75": None}, 0.5, 0.4, 0.2, [0.9, 0.1, 0.5, 0.7, 0.3])
    ceiling = AgreementScore(5, 0.9456, [0.95, 0.85], {"0.5": 0.8, "0.75": 0.5}, 0.7, 0.6, 0.1)
    write_fidelity_report(samples, FidelityReport(score, ceiling, "held-out", 9, "key", False, 0, {}))
    samples = SampleSet(folder)
    write_threshold_report(samples, score_by_threshold(samples))
    write_filter_report(samples, filter_set(samples, keep_share=0.6))
    write_population_report(samples, *score_population(samples))
    write_memorisation_report(samples, *score_memorisation(samples, real))

    def features(images):
        return np.array([[image.mean(), image.std()] for image in images])

    write_realism_report(samples, score_realism(samples, real, features, "known", False, splits=3))
    return samples


class Page(HTMLParser):
    """Collects tables, headings and sources of a page, and checks that tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        assert tag not in ("script", "link", "iframe")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_holds_every_measure_and_loads_nothing(folder):
    page, found, missing = write_report(measure_all(folder), images=2)
    text = page.read_text()
    parsed = Page(text)
    assert found == MEASURED and missing == ["grid", "looks"] and parsed.open == []
    assert parsed.sources and all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert not re.search(r"https?://|@import|url\(", text)
    words = " ".join(parsed.text)
    for number in ("0.8123", "0.9456", "a <b> & c", "Wasserstein"):
        assert number in words
    assert "<b>" not in text


def test_worst_and_best_images_are_in_the_page_in_that_order(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "draw_grid", lambda samples, chosen: shown.append(chosen) or b"")
    write_report(measure_all(folder), images=2)
    names = [[(sample.name, value) for sample, value in chosen] for chosen in shown]
    assert names == [[("cells_01", 0.1), ("cells_04", 0.3)], [("cells_00", 0.9), ("cells_03", 0.7)]]


def test_an_empty_mask_is_not_shown_among_the_best_images(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "draw_grid", lambda samples, chosen: shown.append(chosen) or b"")
    samples = measure_all(folder)
    for number, best in (("00", ["cells_03", "cells_02"]), ("03", ["cells_02", "cells_04"])):
        Image.new("L", (SIZE, SIZE)).save(folder / "masks" / f"cells_{number}.png")
        write_report(samples, images=2)
        assert [sample.name for sample, _ in shown[-1]] == best


def test_pictures_decode_and_the_grid_shows_synthetic_over_real(folder):
    page, _, _ = write_report(measure_all(folder), images=2)
    images = [
        np.array(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB"))
        for source in Page(page.read_text()).sources
    ]
    assert len(images) == 6 and all(image.std() > 5 for image in images)
    worst = images[0]
    assert worst.shape[0] > worst.shape[1] * 0.8  # two columns, two rows


def test_json_holds_what_the_page_shows(folder):
    page, _, _ = write_report(measure_all(folder))
    content = json.loads(page.with_suffix(".json").read_text())
    assert content["images"] == 5 and content["measures"]["fidelity"]["synthetic"]["dice"] == 0.8123
    assert set(content["measures"]) == set(MEASURED)


def test_results_of_utility_and_sweep_are_included_from_their_folders(folder, tmp_path):
    from engine.sampling import SamplingSettings
    from evaluation.experiments.instance_score import InstanceScore
    from evaluation.experiments.trial import TrialRow
    from evaluation.experiments.trial_report import write_trial
    from evaluation.sweep import SweepReport, SweepRow, write_sweep_report

    scores = {
        arm: InstanceScore(ap50, 0.5, 0.4, None, 0.5, 0.5, []) for arm, ap50 in (("real", 0.711), ("synthetic", 0.633))
    }
    rows = [TrialRow(0, 10, arm, 0, 4, 9, score, {}) for arm, score in scores.items()]
    (tmp_path / "u").mkdir()
    write_trial(rows, 5, tmp_path / "u", "percent")
    row = SweepRow(SamplingSettings(), 0.9, 1.5, 0.2, 0.1, 50, 0.1)
    write_sweep_report(SweepReport([row], 0, 0.95, 1.1, 0.1, 0.2, 0.1, 8), tmp_path / "s")
    samples = SampleSet(folder)
    page, found, _ = write_report(samples, others={"utility": tmp_path / "u", "sweep": tmp_path / "s"})
    words = " ".join(Page(page.read_text()).text)
    assert found == ["utility", "sweep"] and "0.711" in words and "0.711 ±" not in words and "-0.078" in words
    assert "sample with: ODE --sampling-method ab2" in words
    with pytest.raises(InputError, match="holds no sweep.json"):
        write_report(samples, others={"sweep": tmp_path / "u"})
    written = json.loads((tmp_path / "u" / "utility.json").read_text())
    (tmp_path / "u" / "utility.json").write_text(json.dumps({key: written[key] for key in ("steps", "summary")}))
    with pytest.raises(InputError, match="written by another version .* run evaluate.py utility again"):
        write_report(samples, others={"utility": tmp_path / "u"})


def test_set_without_results_is_refused_and_a_damaged_or_old_one_named(folder):
    samples = SampleSet(folder)
    with pytest.raises(InputError, match="holds no results"):
        write_report(samples)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "realism.json").write_text("{")
    with pytest.raises(InputError, match=r"realism.json is not readable JSON .*run the measure again"):
        write_report(samples)
    (folder / "evaluation" / "realism.json").write_text("{}")
    with pytest.raises(InputError, match="run evaluate.py realism again"):
        write_report(samples)


def test_table_shows_dashes_and_escapes():
    text = str(TEMPLATE.module.table(Table(["", "a<b"], [["x & y", None], ["z", 0.123456], ["n", 7]])))
    assert (
        "a&lt;b" in text and "x &amp; y" in text and "<td>-</td>" in text and "0.1235" in text and "<td>7</td>" in text
    )


def test_signs_of_formulas_in_file_names_are_only_characters_in_every_picture(folder):
    manifest = folder / "manifest.csv"
    for number in range(5):
        name = f"images/cells_0{number}.png"
        (folder / name).rename(folder / f"images/c$_{{{number}$^.png")
        manifest.write_text(manifest.read_text().replace(name, f"images/c$_{{{number}$^.png"))
    page, _, _ = write_report(measure_all(folder), images=2)
    assert len(Page(page.read_text()).sources) == 6


def test_numbers_have_four_digits_spreads_two_and_the_unknown_a_dash():
    assert [output.number(value) for value in (0.81234, 12345.6, 0.00123456, 0.0, 7, None, "x")] == [
        "0.8123", "12346", "0.001235", "0.000", "7", "-", "x",
    ]  # fmt: skip
    assert with_spread(0.71, 0.0123) == "0.710 ± 0.012" and with_spread(0.15, None, "+") == "+0.150"
    assert with_spread(None, None) == "-" and output.number(float("nan")) == "nan"


def test_table_of_the_terminal_is_aligned():
    lines = Table(["", "synthetic", "real"], [["Dice", 0.5, None], ["a longer name", 12, 0.25]]).lines()
    assert lines == [
        "               synthetic    real",
        "Dice              0.5000       -",
        "a longer name         12  0.2500",
    ]


def test_command_names_what_is_missing(folder, capsys):
    samples = SampleSet(folder)
    write_threshold_report(samples, score_by_threshold(samples))
    evaluate.main(evaluate.parse_args(["report", str(folder)]))
    printed = capsys.readouterr().out
    assert (folder / "evaluation" / "gallery.html").read_text().count("<figure") == len(SampleSet(folder))
    assert "measures in the report: threshold" in printed and "not measured yet: fidelity, grid, realism" in printed
    assert list(csv.DictReader((folder / "manifest.csv").open()))
