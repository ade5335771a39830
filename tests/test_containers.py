"""The recipes of containers, as far as they can be tried without Docker and Apptainer."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest
from script_helpers import ROOT

DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
DEFINITION = (ROOT / "cluster" / "sit.def").read_text()
NOT_OURS = [
    ".git/config", ".venv/bin/python", ".venv-latest/x", "data/images/a.png", "key.txt", ".netrc", "wandb/run/x.json",
    "results/000/checkpoints/0000001.pt", "samples.png", "bug_report_1.txt", "quickstart/train/masks/a.png",
    "common/__pycache__/disk.pyc", "tests/__pycache__/x.pyc", "pretrained_models/x.pt", "model.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone: the files of the project are those that git knows")
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern of .dockerignore names the path or a folder around it. ``**/`` stands for any folders."""
    name = PurePosixPath(path)
    around = [str(one) for one in (name, *name.parents[:-1])]
    if pattern.startswith("**/"):
        return any(fnmatch.fnmatchcase(part, pattern[3:]) for part in name.parts)
    return any(one.count("/") == pattern.count("/") and fnmatch.fnmatchcase(one, pattern) for one in around)


def is_sent(path: str) -> bool:
    """Whether ``docker build`` sees a file. The last pattern that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and matches(path, line.removeprefix("!")):
            sent = line.startswith("!")
    return sent


def test_docker_sees_the_files_of_the_project_and_no_others(tracked):
    assert [path for path in tracked if not is_sent(path)] == []
    assert [path for path in NOT_OURS if is_sent(path)] == []


def test_docker_copies_all_that_the_installation_reads():
    (copied,) = (line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY req"))
    assert all((ROOT / name).is_file() for name in copied)
    read = set(re.findall(r"-[rc] (\S+)", DOCKERFILE))
    read |= {name for one in read for name in re.findall(r"^-[rc] (\S+)", (ROOT / one).read_text(), re.MULTILINE)}
    assert read == set(copied)


def test_both_recipes_install_the_same_on_the_same_base():
    for pattern in (r"apt-get install (.+?)(?: \\)?$", r"pip install (.+)$", r"^F(?i:rom:?) (.+)$"):
        one, other = (re.findall(pattern, text, re.MULTILINE) for text in (DOCKERFILE, DEFINITION))
        assert one == other and len(one) == 1


def section(name: str) -> str:
    found = re.search(rf"^%{name}\n((?: .*\n|\n)+)", DEFINITION, re.MULTILINE)
    assert found is not None, name
    return found[1]


def as_apptainer(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a section of the definition file in /bin/sh, which is no bash in the image; it ends at the first error."""
    script = section(name).replace("/app", environment.pop("app", "/app"))
    return subprocess.run(
        ["sh", "-ec", script], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


def test_apptainer_gets_the_committed_files(tracked, tmp_path):
    as_apptainer("setup", APPTAINER_ROOTFS=str(tmp_path))
    found = [path for path in (tmp_path / "app").rglob("*") if path.is_file()]
    committed = ["git", "ls-tree", "-r", "--name-only", "HEAD"]
    names = subprocess.run(committed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(str(path.relative_to(tmp_path / "app")) for path in found) == sorted(names)


def test_apptainer_tests_a_copy_that_may_be_written(tmp_path):
    """``make`` is a stand-in that tells where it runs."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "Makefile").touch()
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "make").write_text('#!/bin/sh\necho "$PWD" "$@"\nls\n')
    (tmp_path / "tools" / "make").chmod(0o755)
    (tmp_path / "temporary").mkdir()
    places = {"PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "temporary")}
    folder, *words = as_apptainer("test", **places, app=str(tmp_path / "app")).stdout.split()
    assert Path(folder).is_relative_to(tmp_path / "temporary") and words == ["test", "PYTHON=python", "Makefile"]
