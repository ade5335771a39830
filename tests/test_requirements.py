"""Versions of packages: the files that name them agree."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def listed(name: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def extras() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for lines in project["optional-dependencies"].values() for line in lines]


def test_every_package_has_one_lower_bound():
    bounds = {one.name: str(one.specifier) for one in listed("requirements-dev.txt")}
    for one in [*listed("requirements.txt"), *extras()]:
        assert bounds.setdefault(one.name, str(one.specifier)) == str(one.specifier), one.name
    for name, bound in bounds.items():
        assert bound.startswith(">=") and "," not in bound, f"{name}{bound}: make test-lowest wants one bound"


def test_the_versions_that_were_tested_together_keep_to_the_lower_bounds():
    tested = {one.name.lower().replace("_", "-"): str(one.specifier) for one in listed("constraints.txt")}
    for one in [*listed("requirements.txt"), *listed("requirements-dev.txt"), *extras()]:
        name = one.name.lower().replace("_", "-")
        assert name in tested, f"{one.name} is not in constraints.txt"
        assert tested[name].removeprefix("==") in one.specifier, f"{one.name}{tested[name]}"
