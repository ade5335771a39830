"""The documentation agrees with the code: links, flags, command lines, and the length of the README."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

import app
import evaluate
import make_masks
import sample
import sample_ddp
import train
from common.errors import FLAGS, as_flag

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
RECORDS = sorted((ROOT / "benchmarks").rglob("*.md"))
TEXTS = [README, *PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
COMMANDS: dict[str, ModuleType] = {
    f"{module.__name__}.py": module for module in (app, evaluate, make_masks, sample, sample_ddp, train)
}
# Flags of other programs that the pages speak of, each with its program.
FOREIGN_FLAGS = {
    "--nproc_per_node": "torchrun",
    "--img_filter": "cellpose",
    "--mask_filter": "cellpose",
    "--no_norm": "cellpose",
    "--min_train_masks": "cellpose",
    "--shm-size": "docker",
    "--ipc": "docker",
    "--nnodes": "torchrun",
    "--nproc-per-node": "torchrun",
    "--rdzv-backend": "torchrun",
    "--rdzv-endpoint": "torchrun",
    "--rdzv-id": "torchrun",
    "--max-restarts": "torchrun",
    "--signals-to-handle": "torchrun",
    "--nv": "apptainer",
    "--signal": "sbatch",
    "--array": "sbatch",
    "--ntasks-per-node": "srun",
}
MOST_WORDS = 900
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """Markdown without code blocks and code spans: a bracket in code is no link, a # no heading."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """Anchors that a forge makes of a page's headings."""
    blocks = re.sub(r"^```.*?^```", "", text_of(path), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#{1,6} +(.*)$", blocks, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def links(path: Path) -> list[str]:
    """Targets of a page's links and pictures that lie in this repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(path)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def parser_actions(parser: argparse.ArgumentParser) -> set[str]:
    """Flags of a parser and of all its subcommands."""
    flags: set[str] = set()
    for action in parser._actions:
        flags |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                flags |= parser_actions(child)
    return flags


def benchmarks() -> list[ModuleType]:
    """Every script of ``benchmarks`` that has flags."""
    paths = sorted((ROOT / "benchmarks").glob("*.py"))
    modules = [importlib.import_module(f"benchmarks.{path.stem}") for path in paths]
    return [module for module in modules if hasattr(module, "parse_args")]


def flags_in_other_environments() -> set[str]:
    """Flags of the scripts of other segmenters, which cannot be imported here; read from their text."""
    texts = [text_of(path) for path in (ROOT / "benchmarks" / "segmenters").glob("*.py")]
    return {flag for text in texts for flag in re.findall(r'add_argument\("(--[\w-]+)"', text)}


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Flags of every command, taken from its own parser."""
    parsers: list[argparse.ArgumentParser] = []
    original = argparse.ArgumentParser.parse_args

    def remember(self, args=None, namespace=None):
        parsers.append(self)
        return original(self, args, namespace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", remember)
        for module in (*COMMANDS.values(), *benchmarks()):
            with pytest.raises(SystemExit):
                module.parse_args(["--help"])
    return flags_in_other_environments().union(*map(parser_actions, parsers))


def fields_in_messages(path: Path) -> set[str]:
    """Words in backquotes in the texts of a module, other than its docstrings."""
    tree = ast.parse(text_of(path))
    docstrings = {ast.get_docstring(one, clean=False) for one in ast.walk(tree) if isinstance(one, DOCUMENTED)}
    texts = {one.value for one in ast.walk(tree) if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return {name for text in texts - docstrings for name in re.findall("`([a-z_]+)`", text)}


def test_every_field_in_a_message_is_a_flag_of_a_command(known_flags):
    paths = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", ".venv")]
    fields = {path: fields_in_messages(path) for path in paths}
    assert len(set.union(*fields.values())) > 30
    unknown = [
        f"{path}: {name}"
        for path, names in fields.items()
        for name in names
        if not {as_flag(name), as_flag(FLAGS.get(name, name))} & known_flags
    ]
    assert not unknown


def command_lines(path: Path) -> list[str]:
    """Lines of the shell blocks of a page that call one of the commands, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text_of(path), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if any(name in line.split() for name in COMMANDS)]


def test_readme_has_at_most_900_words():
    assert len(text_of(README).split()) <= MOST_WORDS


@pytest.mark.parametrize("path", [*TEXTS, *RECORDS], ids=by_name)
def test_every_link_leads_somewhere(path):
    dead = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        goal = path.parent / name if name else path
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("path", [*TEXTS, *RECORDS], ids=by_name)
def test_every_flag_is_a_flag_of_some_command(path, known_flags):
    flags = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text_of(path)))
    assert flags - known_flags - set(FOREIGN_FLAGS) == set()


@pytest.mark.parametrize("path", [README, *PAGES], ids=by_name)
def test_every_command_line_parses(path):
    for line in command_lines(path):
        words = shlex.split(line.replace(" ...", ""), comments=True)
        start = next(number for number, word in enumerate(words) if word in COMMANDS)
        COMMANDS[words[start]].parse_args(words[start + 1 :])


def test_readme_holds_command_lines_of_the_four_steps():
    lines = " ".join(command_lines(README))
    for command in ("evaluate.py data", "train.py", "sample.py ODE", "sample_ddp.py ODE", "evaluate.py fidelity"):
        assert command in lines


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), [README]
    while new:
        path = new.pop()
        reached.add(path)
        goals = [(path.parent / target.partition("#")[0]).resolve() for target in links(path)]
        new += [goal for goal in goals if goal in PAGES and goal not in reached]
    assert set(PAGES) - reached == set()


def test_every_source_file_has_its_row_in_the_architecture():
    """By its name, or by that of its folder."""
    text = text_of(ROOT / "docs" / "architecture.md")
    named = re.findall(r"`([\w/]+(?:\.py|/))`", text[text.index("## The layers") : text.index("## Where is it?")])
    packages = {path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("tests", "benchmarks")}
    whole = {"transport/", "dataset/annotations/", "evaluation/experiments/", "page/"}  # their folders have the row
    files = [*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    unnamed = {
        name
        for name in (by_name(path) for path in files if path.name != "__init__.py")
        if name not in named and not any(name.startswith(folder) for folder in whole & set(named))
    }
    assert unnamed - {f"evaluation/{name}.py" for name in ("data_report", *evaluate.MEASURES)} == set()
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_citation_file_is_a_citation_of_the_licensed_software():
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= content.keys()
    assert content["cff-version"] == "1.2.0"
    assert content["license"] == "MIT"
    assert "MIT" in text_of(ROOT / "LICENSE.txt")
    assert all({"type", "title", "authors"} <= reference.keys() for reference in content["references"])


def test_topics_lie_where_the_architecture_says():
    """Each place is a function, a class or a constant of the file."""
    text = text_of(ROOT / "docs" / "architecture.md")
    places = re.findall(r"`([\w/]+\.py)`: `(\w+)`", text[text.index("## Where is it?") :])
    assert len(places) > 15
    lost = [
        (path, name)
        for path, name in places
        if not re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.* = ", text_of(ROOT / path), flags=re.MULTILINE)
    ]
    assert lost == []
