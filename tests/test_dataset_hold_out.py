"""What `make quickstart DATA=FOLDER` trains on and holds out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from script_helpers import ROOT, write_pairs

from common.errors import InputError
from dataset.files import find_files, pair_files
from dataset.hold_out import hold_out

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def link(folder: Path, data: Path) -> subprocess.CompletedProcess[str]:
    """The data step of the quickstart, in a folder that holds the Makefile only."""
    shutil.copy(ROOT / "Makefile", folder)
    command = ["make", "quickstart-data", f"DATA={data}", f"PYTHON={sys.executable}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def linked(folder: Path) -> dict[str, set[str]]:
    """Names of the images of both parts, of the only data set."""
    (name,) = (folder / "quickstart").iterdir()
    return {part: {path.name for path in (name / part / "images").iterdir()} for part in ("train", "heldout")}


def test_the_last_fifth_by_name_is_held_out(tmp_path):
    write_pairs(tmp_path / "my cells", count=10)
    assert link(tmp_path, tmp_path / "my cells").returncode == 0
    parts = linked(tmp_path)
    assert parts["heldout"] == {"cell_8.png", "cell_9.png"} and len(parts["train"]) == 8


def test_two_folders_of_one_name_are_two_data_sets(tmp_path):
    for lab in ("one", "two"):
        write_pairs(tmp_path / lab / "set", count=5)
        assert link(tmp_path, tmp_path / lab / "set").returncode == 0
    assert len(list((tmp_path / "quickstart").iterdir())) == 2


def test_a_set_that_has_grown_never_trains_on_what_it_holds_out(tmp_path):
    images, _ = write_pairs(tmp_path / "set", count=10)
    assert link(tmp_path, tmp_path / "set").returncode == 0
    assert link(tmp_path, tmp_path / "set").returncode == 0  # the same again
    for number in range(10, 15):
        for kind in ("images", "masks"):
            shutil.copy(tmp_path / "set" / kind / "cell_0.png", tmp_path / "set" / kind / f"cell_{number}.png")
    done = link(tmp_path, tmp_path / "set")
    assert done.returncode == 2 and "holds other images than before" in done.stderr
    parts = linked(tmp_path)
    assert not parts["train"] & parts["heldout"]


def test_a_folder_name_never_runs_as_a_command(tmp_path):
    data = tmp_path / "it's `touch ran` set"
    write_pairs(data, count=5)
    done = link(tmp_path, data)
    assert done.returncode == 0 and "5 pairs" in done.stdout
    assert not (tmp_path / "ran").exists()


def names_of(output: Path) -> dict[str, list[str]]:
    """Names of the pairs of both parts, paired as training pairs them; none is left without partner."""
    return {
        part: [pair.name for pair in pair_files(output / part / "images", output / part / "masks")]
        for part in ("train", "heldout")
    }


@pytest.mark.parametrize("layout", ["cp_masks", "mask", "ome", "one folder", "nuclei", "nested"])
def test_every_layout_of_training_is_linked_in_pairs(tmp_path, layout):
    images, masks = write_pairs(tmp_path / "set", count=10)
    for number in range(10):
        image, mask = images / f"cell_{number}.png", masks / f"cell_{number}.png"
        if layout in ("cp_masks", "mask"):
            mask.rename(masks / f"cell_{number}_{layout}.png")
        elif layout == "ome":
            image.rename(images / f"cell_{number}.ome.tif")
        elif layout == "one folder":
            image.rename(tmp_path / "set" / f"cell_{number}_img.png")
            mask.rename(tmp_path / "set" / f"cell_{number}_masks.png")
        elif layout == "nuclei":
            (masks / f"cell_{number}").mkdir()
            mask.rename(masks / f"cell_{number}" / "1.png")
        else:
            for kind, path in (("images", image), ("masks", mask)):
                (tmp_path / "set" / f"cell_{number}" / kind).mkdir(parents=True)
                path.rename(tmp_path / "set" / f"cell_{number}" / kind / "1.png")
    if layout in ("one folder", "nested"):
        images.rmdir()
        masks.rmdir()
    hold_out(tmp_path / "set", tmp_path / "out")
    expected = {"train": [f"cell_{n}" for n in range(8)], "heldout": ["cell_8", "cell_9"]}
    assert names_of(tmp_path / "out") == expected


def test_held_out_images_of_a_single_nucleus_keep_their_folders(tmp_path):
    _, masks = write_pairs(tmp_path / "set", count=10)
    for number in range(10):
        folder = masks / f"cell_{number}"
        folder.mkdir()
        (masks / f"cell_{number}.png").rename(folder / "1.png")
    shutil.copy(masks / "cell_0" / "1.png", masks / "cell_0" / "2.png")
    for _ in range(2):
        hold_out(tmp_path / "set", tmp_path / "out")
        for part in ("train", "heldout"):
            assert all(path.is_dir() for path in find_files(tmp_path / "out" / part / "masks", "mask").values())


def test_tiles_of_dotted_names_stay_with_their_own_mask(tmp_path):
    images, masks = write_pairs(tmp_path / "set", count=6)
    for folder in (images, masks):
        for number in range(1, 6):
            (folder / f"cell_{number}.png").rename(folder / f"tile.{number}.png")
        (folder / "cell_0.png").rename(folder / "tile.png")
    hold_out(tmp_path / "set", tmp_path / "out")
    names = names_of(tmp_path / "out")
    assert names == {"train": ["tile", "tile.1", "tile.2", "tile.3", "tile.4"], "heldout": ["tile.5"]}


def test_what_found_no_partner_is_named(tmp_path):
    images, masks = write_pairs(tmp_path / "set", count=6)
    (masks / "cell_2.png").rename(masks / "other.png")
    lines = hold_out(tmp_path / "set", tmp_path / "out")
    assert any("1 images have no mask" in line and "cell_2" in line for line in lines)
    assert any("1 masks have no image" in line and "other" in line for line in lines)
    assert sum(map(len, names_of(tmp_path / "out").values())) == 5
    (masks / "cell_3.png").unlink()
    with pytest.raises(InputError, match="4 pairs.*5 is the least.*2 images found no partner"):
        hold_out(tmp_path / "set", tmp_path / "new")
