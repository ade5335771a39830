"""What `make quickstart DATA=FOLDER` trains on and holds out."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from script_helpers import ROOT, write_pairs

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def link(folder: Path, data: Path) -> subprocess.CompletedProcess[str]:
    """The data step of the quickstart, in a folder that holds the Makefile only."""
    shutil.copy(ROOT / "Makefile", folder)
    command = ["make", "quickstart-data", f"DATA={data}", "PYTHON=python"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


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
