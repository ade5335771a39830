"""The gallery of a set: every picture is right, names are escaped, the size is bounded, nothing is loaded."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, DRIVER, MISSING, Browser
from drawn_sets import Row, five_rows, paint, write_set
from PIL import Image
from script_helpers import FEW_STEPS, call, write_pairs
from test_app import checkpoint_of

import sample_ddp
from common.pictures import CLASS_COLORS
from synthetic import gallery
from synthetic.gallery import GALLERY, write_gallery
from synthetic.reader import SampleSet

SIZE = 40
VALUES = [0.9, 0.1, 0.5, 0.7, 0.3]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A set of five images with real ones and a known fidelity, in a folder whose name needs escaping."""
    folder = write_set(tmp_path / '"a" <b> & c', five_rows(SIZE))
    SampleSet(folder).write_fidelity(VALUES)
    return folder


class Page(HTMLParser):
    """Figures with their attributes, sources, titles, and the kinds of tags of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.figures: list[dict[str, str]] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag == "figure":
            self.figures.append(values)

    def handle_data(self, data):
        self.words.append(data)

    def pictures(self) -> list[np.ndarray]:
        contents = [source.partition(",")[2] for source in self.sources if source.startswith("data:image/png;base64,")]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")) for content in contents]


def test_mask_image_and_real_image_of_every_pair_are_there(folder):
    samples = SampleSet(folder)
    assert write_gallery(samples, folder / GALLERY) == 5
    page = Page(folder / GALLERY)
    pictures = page.pictures()
    assert len(pictures) == 15
    for number, sample in enumerate(samples.samples):
        mask, synthetic, real = pictures[3 * number : 3 * number + 3]
        assert np.array_equal(mask, np.array(CLASS_COLORS, np.uint8)[samples.class_map(sample)])
        assert np.array_equal(synthetic, samples.synthetic(sample))
        assert np.array_equal(real, samples.real(sample))
    assert [float(figure["data-fidelity"]) for figure in page.figures] == VALUES
    assert "Dice 0.900" in " ".join(page.words)


def test_the_page_loads_nothing_and_escapes_names(folder):
    write_gallery(SampleSet(folder), folder / GALLERY)
    page = Page(folder / GALLERY)
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", page.text)
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert folder.name in page.words


def test_of_a_large_set_the_lowest_and_the_highest_fidelity_are_shown(folder, monkeypatch):
    monkeypatch.setattr(gallery, "MOST_PAIRS", 3)
    assert write_gallery(SampleSet(folder), folder / GALLERY) == 3
    page = Page(folder / GALLERY)
    assert [float(figure["data-fidelity"]) for figure in page.figures] == [0.9, 0.1, 0.5]
    assert "3 of 5 images" in " ".join(page.words)


def test_pictures_take_a_bounded_number_of_bytes(folder, monkeypatch):
    monkeypatch.setattr(gallery, "MOST_BYTES", 1)
    assert write_gallery(SampleSet(folder), folder / GALLERY) == 1
    monkeypatch.setattr(gallery, "LONGEST_SIDE", 10)
    write_gallery(SampleSet(folder), folder / GALLERY)
    assert {picture.shape for picture in Page(folder / GALLERY).pictures()} == {(10, 10, 3)}


def test_many_pictures_stay_within_the_limit_whatever_the_first_one_takes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = [np.zeros((SIZE, SIZE, 3), np.uint8)]  # a blank image takes few bytes
    images += [rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in range(30)]
    folder = write_set(tmp_path / "set", [Row(np.zeros((SIZE, SIZE), np.uint8), image) for image in images])
    monkeypatch.setattr(gallery, "MOST_BYTES", 60_000)
    count = write_gallery(SampleSet(folder), folder / GALLERY)
    page = Page(folder / GALLERY)
    assert 40_000 < sum(len(source) for source in page.sources) < 60_000 + 40 * len(page.sources)
    names = [int(re.search(r"cells_(\d+)", word)[1]) for word in page.words if "cells_" in word]
    assert len(names) == count and {0, 30, 15, 7} <= set(names)  # from all over the set


@pytest.mark.parametrize("count", range(12))
def test_every_pair_has_its_turn_once(count):
    found = list(gallery._ends_first(count))
    assert sorted(found) == list(range(count)) and found[:2] == [0, count - 1][:count]


def test_a_line_parts_touching_cells(tmp_path):
    label = np.zeros((SIZE, SIZE), np.uint16)
    label[5:20, 5:15], label[5:20, 15:30], label[20:25, 30:35] = 1, 2, 3  # the last two meet at a corner
    folder = write_set(tmp_path / "set", [Row(label, paint(label > 0), mask_type="instances")])
    write_gallery(SampleSet(folder), folder / GALLERY)
    mask = Page(folder / GALLERY).pictures()[0]
    assert mask[10, 14].tolist() == mask[10, 16].tolist() == [255, 255, 255]
    assert mask[10, 15].tolist() == mask[20, 30].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("has_real", "pictures"), [(True, 9), (False, 6)])
def test_sampling_writes_a_gallery_with_or_without_real_images(tmp_path, has_real, pictures):
    images, masks = write_pairs(tmp_path / "pairs", count=3)
    checkpoint = checkpoint_of(tmp_path / "two.pt", 2)
    data = ["--mask-path", masks, "--sample-dir", tmp_path / "set", *(["--data-path", images] if has_real else [])]
    call(sample_ddp, "ODE", "--ckpt", checkpoint, *data, "--gallery", *FEW_STEPS)
    page = Page(tmp_path / "set" / GALLERY)
    assert (len(page.figures), len(page.pictures())) == (3, pictures)


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)
def test_the_gallery_sorts_and_enlarges_from_the_file_system(folder, tmp_path):
    write_gallery(SampleSet(folder), folder / GALLERY)
    order = "return [...document.querySelectorAll('figure')].map((one) => Number(one.dataset.fidelity))"
    with Browser(tmp_path / "browser") as page:
        page.open((folder / GALLERY).as_uri())
        assert page.run(order) == VALUES
        for name, expected in (("low", sorted(VALUES)), ("high", sorted(VALUES)[::-1]), ("number", VALUES)):
            page.run(f"byId = document.getElementById('order'); byId.value = '{name}'; sort()")
            assert page.run(order) == expected
        page.click("figure")
        assert page.run("return document.querySelector('dialog').open")
        assert page.run("return document.querySelectorAll('dialog img').length") == 3
        assert page.complaints() == []
        assert {url.partition(":")[0] for url in page.requests()} <= {"file", "data"}
