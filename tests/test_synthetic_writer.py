"""Writing a set: a restart makes missing images, and interruptions change no byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from script_helpers import ROOT, write_pairs

from common.errors import InputError
from dataset.config import DataConfig
from dataset.files import read_mask
from dataset.gray import ImageFormat
from dataset.mask_folder import MaskFolder
from engine.sampling import ImageSampler, SamplingSettings
from evaluation.redraw import Redraw
from synthetic.bulk import draw_missing
from synthetic.manifest import COLUMNS, FIDELITY_COLUMN, read_manifest, write_column
from synthetic.reader import SampleSet
from synthetic.writer import MOST_SHOWN, Attempt, SetWriter, choose_pairs, label_bytes, label_is_equal, plan_jobs


class NoisyDrawings:
    """A sampler whose images show their masks, more or less: the seed decides how many pixels are wrong."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, prob_maps: torch.Tensor, seeds: list[int], batch_size: int, looks: None) -> torch.Tensor:
        images = []
        for prob_map, seed in zip(prob_maps.numpy(), seeds, strict=True):
            rng = np.random.default_rng(seed)
            cells = (prob_map[1] > 0.5) ^ (rng.random(prob_map.shape[1:]) < rng.uniform(0, 0.5))
            images.append(np.broadcast_to(np.where(cells, 0.9, -0.9), (3, *cells.shape)))
        self.drawn += len(images)
        return torch.from_numpy(np.stack(images)).float()


class BrightIsCell:
    """Judge for which a bright pixel is a cell."""

    def class_maps(self, images: list[np.ndarray]) -> np.ndarray:
        return np.stack([image.mean(axis=-1) > 120 for image in images]).astype(np.uint8)


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> MaskFolder:
    images, masks = write_pairs(tmp_path_factory.mktemp("pairs"))
    return MaskFolder(masks, DataConfig(image_size=16), image_dir=images)


def writer_of(
    folder: Path, masks: MaskFolder, redraw: Redraw | None, shared: bool = False, **changes: object
) -> SetWriter:
    note = None if redraw is None else {"min_fidelity": redraw.min_fidelity, "max_attempts": redraw.max_attempts}
    settings = {
        "seed": 3,
        "sampling": SamplingSettings().to_dict(),
        "intensity": "display",
        "weights": "ema",
        "ckpt_sha256": "c",
        "mask_rule": asdict(masks.rule),
        "data_config": masks.config.to_dict(),
        "redraw": note,
    }
    writer = SetWriter(folder, masks, ImageFormat(3), plan_jobs(masks.names, 2, None), settings | changes)
    writer.open(shared)
    return writer


def make(folder: Path, masks: MaskFolder, redraw: Redraw | None = None) -> int:
    """Make or finish a set; the number of images drawn."""
    writer, sampler = writer_of(folder, masks, redraw), NoisyDrawings()
    todo = writer.missing(writer.jobs)
    writer.forget([writer.image_name(job) for job, _ in todo])
    draw_missing(writer, cast(ImageSampler, sampler), todo, batch_size=4, judge=redraw)
    writer.write_manifest()
    writer.close()
    return sampler.drawn


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_a_set_is_complete_and_read_back(masks, tmp_path):
    assert make(tmp_path / "set", masks) == 12 and make(tmp_path / "set", masks) == 0
    samples = SampleSet(tmp_path / "set")
    assert len(samples) == 12 and samples.has_real
    known = [column.name for column in COLUMNS]
    assert samples.columns == [name for name in known if name in samples.columns]
    paths = [sample.columns[name] for sample in samples.samples for name in ("source_mask", "real_image")]
    assert not any(Path(path).is_absolute() for path in paths)
    assert samples.samples[2].source_mask.samefile(masks.paths["cell_1"])


def test_masks_that_the_manifest_cannot_name_are_refused_before_any_image_is_drawn(masks, tmp_path, monkeypatch):
    odd = tmp_path / os.fsdecode(b"p\xe4")
    write_pairs(odd)
    monkeypatch.chdir(odd)
    own = MaskFolder("masks", masks.config)
    with pytest.raises(InputError, match=r"manifest\.csv cannot name '.*udce4.*rename the"):
        writer_of(tmp_path / "set", own, None)
    assert not (tmp_path / "set").exists()
    assert make(Path("set"), own) == 12  # from here, the path to the masks has no such name


HOLD_SHARED = """if True:
    import sys
    from pathlib import Path
    from common.disk import lock_folder
    lock = lock_folder(Path(sys.argv[1]), "wait", shared=True)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_set_is_finished_by_the_launch_that_ends_last(masks, tmp_path):
    make(tmp_path / "set", masks)
    writer = writer_of(tmp_path / "set", masks, None, shared=True)
    other = [sys.executable, "-c", HOLD_SHARED, tmp_path / "set"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(other, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        assert not writer.take_over()
        with pytest.raises(InputError, match="another process works in this folder"):
            writer_of(tmp_path / "set", masks, None)
        process.stdin.close()
    assert writer.take_over()
    (tmp_path / "set" / "images" / "cell_0_0002.png").unlink()
    assert not writer.take_over()
    writer.close()


def test_a_part_that_makes_images_anew_leaves_no_manifest_with_their_scores(masks, tmp_path):
    make(tmp_path / "set", masks)
    writer = writer_of(tmp_path / "set", masks, None, shared=True)
    writer.forget([])
    assert (tmp_path / "set" / "manifest.csv").exists()
    writer.forget(["images/cell_0_0002.png"])
    assert not (tmp_path / "set" / "manifest.csv").exists()
    writer.close()


def test_a_score_goes_with_the_image_that_it_was_of(masks, tmp_path):
    make(tmp_path / "set", masks)
    write_column(tmp_path / "set", FIDELITY_COLUMN, ["0.5"] * 12)
    (tmp_path / "set" / "images" / "cell_0_0002.png").unlink()
    assert make(tmp_path / "set", masks) == 1
    _, rows = read_manifest(tmp_path / "set")
    assert [row[FIDELITY_COLUMN] for row in rows] == ["0.5", "", *["0.5"] * 10]


def test_labels_that_another_version_of_pillow_wrote_are_kept_and_others_are_not(masks, tmp_path):
    make(tmp_path / "set", masks)
    paths = sorted((tmp_path / "set" / "masks").glob("*.png"))
    for path in paths:
        before = path.read_bytes()
        Image.fromarray(read_mask(path)).save(path, compress_level=1)
        assert path.read_bytes() != before
    assert make(tmp_path / "set", masks) == 0
    label = read_mask(paths[3])
    label[0, 0] ^= 255
    Image.fromarray(label).save(paths[3])  # another value
    Image.fromarray(read_mask(paths[5]).astype(np.uint16)).save(paths[5])  # another type
    paths[7].write_bytes(paths[7].read_bytes()[:-30])  # torn
    assert make(tmp_path / "set", masks) == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_a_label_of_any_type_equals_its_file_and_no_other(tmp_path, dtype):
    label = np.arange(12).reshape(3, 4).astype(dtype)
    content, suffix = label_bytes(label)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert label_is_equal(path, label) and not label_is_equal(path, label.T) and not label_is_equal(path, label + 1)


def test_a_damaged_manifest_is_written_anew(masks, tmp_path):
    make(tmp_path / "set", masks)
    files = files_of(tmp_path / "set")
    (tmp_path / "set" / "manifest.csv").write_text("image\nimages/x.png\n")
    assert make(tmp_path / "set", masks) == 0 and files_of(tmp_path / "set") == files


def test_images_are_drawn_again_until_good_enough_or_no_draw_is_left(masks, tmp_path):
    redraw = Redraw(BrightIsCell(), 0.9, 4)
    drawn = make(tmp_path / "set", masks, redraw)
    _, rows = read_manifest(tmp_path / "set")
    assert {row["fidelity_reached"] for row in rows} == {"yes", "no"}
    assert all((float(row["attempt_fidelity"]) >= 0.9) == (row["fidelity_reached"] == "yes") for row in rows)
    tried = [json.loads(path.read_text())["tried"] for path in (tmp_path / "set" / "attempts").iterdir()]
    assert drawn == sum(tried) and max(tried) == 4 and min(tried) == 1


@pytest.mark.parametrize("last", [1, 5, 11, 14, 17])
def test_no_interruption_changes_a_byte(masks, tmp_path, monkeypatch, last):
    """Killed before the image of one write after the other, within any round; then started again."""
    redraw = Redraw(BrightIsCell(), 0.95, 3)
    drawn = make(tmp_path / "whole", masks, redraw)
    files = files_of(tmp_path / "whole")
    writes = []

    def killed(form: ImageFormat, *arguments: object) -> bytes:
        writes.append(1)
        if len(writes) >= last:
            raise KeyboardInterrupt
        return encode(form, *arguments)

    encode = ImageFormat.encode
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ImageFormat, "encode", killed)
        make(tmp_path / "torn", masks, redraw)
    assert make(tmp_path / "torn", masks, redraw) < drawn or last == 1
    assert files_of(tmp_path / "torn") == files


def test_a_set_of_other_settings_is_refused_and_its_speed_is_free(masks, tmp_path):
    writer_of(tmp_path / "set", masks, None, precision="bf16").close()
    writer_of(tmp_path / "set", masks, None, precision="float32", mask_origin={"command": "simulate"}).close()
    with pytest.raises(InputError, match="other settings .seed 3 -> 4"):
        writer_of(tmp_path / "set", masks, None, seed=4)


def test_a_set_of_equal_steps_is_continued_with_them_and_the_message_names_what_differs(masks, tmp_path):
    path, old = tmp_path / "set" / "settings.json", SamplingSettings(time_shift=1.0).to_dict()
    writer_of(path.parent, masks, None, sampling=old).close()
    settings = json.loads(path.read_text())
    del settings["sampling"]["time_shift"]  # as earlier versions wrote it
    path.write_text(json.dumps(settings))
    writer_of(path.parent, masks, None, sampling=old).close()
    with pytest.raises(InputError, match="other settings .sampling time_shift 1.0 -> 2.0.;"):
        writer_of(path.parent, masks, None)


def test_a_set_of_an_earlier_version_is_continued(masks, tmp_path):
    """Its judge stood under "filter", its notes held the manifest's columns, its paths were absolute."""
    folder, redraw = tmp_path / "set", Redraw(BrightIsCell(), 0.9, 4)
    make(folder, masks, redraw)
    files = files_of(folder)
    settings = json.loads((folder / "settings.json").read_text())
    settings["filter"] = settings.pop("redraw")
    (folder / "settings.json").write_text(json.dumps(settings))
    for path in (folder / "attempts").iterdir():
        path.write_text(json.dumps(Attempt(**json.loads(path.read_text())).columns()))
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace("../../", f"{tmp_path.parent}/"))
    assert make(folder, masks, redraw) == 0
    now = files_of(folder)
    assert {name: now[name] for name in now if not name.startswith("attempts")} == {
        name: files[name] for name in files if not name.startswith("attempts")
    }


@pytest.mark.parametrize(
    ("count", "with_cells", "chosen"),
    [
        (3, {0, 1, 2}, [0, 1, 2]),
        (10, {1, 4}, [0, 1, 2, 4, 5, 6, 8, 9]),
        (20, set(range(8, 16)), list(range(8, 16))),
        (640, set(range(640)), [0, 91, 183, 274, 365, 456, 548, 639]),
    ],
)
def test_pairs_with_cells_come_first_and_are_spread_over_the_set(count, with_cells, chosen):
    found = choose_pairs(count, with_cells.__contains__)
    assert found == chosen and len(found) <= MOST_SHOWN


def test_few_pairs_of_a_large_set_are_read():
    read = []
    choose_pairs(100_000, lambda number: read.append(number) or True)
    assert len(read) == 64


def test_a_label_of_another_type_replaces_the_old_one(tmp_path):
    """Ids beyond 16 bits are written as TIFF, others as PNG."""
    images, folder = write_pairs(tmp_path / "pairs", 1)
    path = folder / "cell_0.tif"
    for largest in (9, 70_000, 9):
        label = np.zeros((24, 20), np.int32)
        label[4:9, 4:9] = largest
        for old in folder.iterdir():
            old.unlink()
        tifffile.imwrite(path, label)
        masks = MaskFolder(folder, DataConfig(image_size=16), "instances", images)
        make(tmp_path / "set", masks)
        rows = read_manifest(tmp_path / "set")[1]
        assert {read_mask(tmp_path / "set" / row["label"]).max() for row in rows} == {largest}
        assert len(list((tmp_path / "set" / "masks").iterdir())) == 2
