"""Rules of the source code: imports, layers, lengths. Reads the source without running it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module or package imports from rows above its own only.
LAYERS = [
    {"common", "layers", "presets", "transport"},
    {"models"},
    {"dataset", "download", "wandb_utils"},
    {"layouts"},
    {"engine"},
    {"synthetic"},
    {"evaluation"},
    {"flag_rules"},
    {"cli"},
    {"settings"},
    {"experiments", "page"},
    {"app", "train", "sample", "sample_ddp", "evaluate", "make_masks"},
]
COMMANDS = LAYERS[-1]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# The numerics stand on these alone, besides the standard library.
FOREIGN = {
    "layers": {"torch", "numpy"},
    "models": {"torch", "numpy", "layers"},
    "transport": {"torch", "torchdiffeq"},
}
NO_USER_INTERFACE = {"argparse", "sys", "os", "pathlib"}  # of the standard library, not for the numerics

SOURCES = sorted([*ROOT.glob("*.py"), *(path for name in RANK for path in (ROOT / name).rglob("*.py"))])
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def owner(path: Path) -> str:
    """Module or package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(node: ast.AST, package: str) -> Iterator[str]:
    """Top-level names of all imports below a node, those inside of functions included."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield package if child.level else (child.module or "").split(".")[0]


@cache
def calls(node: ast.AST) -> list[tuple[str, ast.Call]]:
    """All calls below a node with their written name, such as torch.load."""
    return [(ast.unparse(child.func), child) for child in ast.walk(node) if isinstance(child, ast.Call)]


def places(paths: list[Path], wrong: Callable[[str, ast.Call], bool]) -> list[str]:
    """file:line of every call that ``wrong(name, call)`` is true for."""
    return [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in paths
        for name, call in calls(tree(path))
        if wrong(name, call)
    ]


# The root holds these files, so that a newcomer finds a topic in one guess.
ROOT_FILES = {"app.py", "train.py", "sample.py", "sample_ddp.py", "evaluate.py", "make_masks.py"}
ROOT_FILES |= {"cli.py", "settings.py", "flag_rules.py", "presets.py", "experiments.py", "models.py", "download.py"}
ROOT_FILES |= {"wandb_utils.py"}
MOST_LINES = 500
# A word of the left column stands in the file of the right column only.
ONE_PLACE = {"rot90": "dataset/views.py", "127.5": "common/pictures.py", "manifest.csv": "synthetic/manifest.py"}
COMMAND_LINE = COMMANDS | {"cli", "experiments", "flag_rules", "presets", "settings"}
# The parser and its argument types; `python -m dataset.hold_out`, which make calls; a class in SiT's published files.
KNOWS_ARGPARSE = {"common/errors.py", "common/arguments.py", "dataset/hold_out.py", "download.py"}
# Advice to copy into a command line; commands that are run; flags of containers and git; which command writes a column.
SPEAKS_OF_FLAGS = {
    "common/errors.py",
    "common/faults.py",
    "evaluation/data_report.py",
    "evaluation/experiments/practice_commands.py",
    "evaluation/sweep.py",
    "synthetic/manifest.py",
    "engine/machine.py",
}
# Parameters of the interface that users of SiT know: they stay, whether or not our own commands use them.
API_OF_SIT = {"SiT", "Sampler", "Transport", "create_transport", "find_model", "sample_ode", "sample_sde"}
API_OF_SIT |= {"sample_ode_likelihood", "training_losses", "forward", "forward_with_cfg"}


def test_root_holds_the_commands_and_little_else():
    assert {path.name for path in ROOT.glob("*.py")} == ROOT_FILES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES


@cache
def without_docstrings(node: ast.AST) -> list[ast.AST]:
    """All nodes but the docstrings of modules, classes and functions."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(one.body[0]) for one in ast.walk(node) if isinstance(one, documented) and ast.get_docstring(one)}
    waiting, kept = [node], []
    while waiting:
        kept.append(waiting.pop())
        waiting += [child for child in ast.iter_child_nodes(kept[-1]) if id(child) not in docstrings]
    return kept


@pytest.mark.parametrize("word", ONE_PLACE)
def test_what_has_one_owner_is_written_once(word):
    def says(node: ast.AST) -> bool:
        texts = (getattr(node, name, "") for name in ("id", "attr", "value", "name"))
        return any(word in str(text) for text in texts if isinstance(text, str | int | float))

    found = {str(path.relative_to(ROOT)) for path in SOURCES for node in without_docstrings(tree(path)) if says(node)}
    assert found == {ONE_PLACE[word]}


def test_errors_are_shortened_in_one_place():
    pattern = re.compile(r"str\(error\)[^\n]*\[(:\d+|0)\]")
    found = [path for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []  # common.faults.short_line does it


def test_folders_of_images_are_read_without_the_masks_beside_them():
    def wrong(name: str, call: ast.Call) -> bool:
        return name == "find_files" and "image" in [one.value for one in call.args if isinstance(one, ast.Constant)]

    owners = {"dataset/files.py", "dataset/annotations/convert.py"}
    assert places([path for path in SOURCES if str(path.relative_to(ROOT)) not in owners], wrong) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_argparse_is_known_to_commands_only(path):
    allowed = owner(path) in COMMAND_LINE or str(path.relative_to(ROOT)) in KNOWS_ARGPARSE
    assert allowed or "argparse" not in set(imports(tree(path), owner(path)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_do_not_speak_of_flags(path):
    """A library names its parameter; the command names the flag."""
    if owner(path) in COMMAND_LINE or str(path.relative_to(ROOT)) in SPEAKS_OF_FLAGS:
        return
    texts = [
        (node.lineno, node.value)
        for node in without_docstrings(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [(line, text) for line, text in texts if re.search(r"(^|[\s(])--[a-z]", text)] == []


def optional_parameters() -> Iterator[tuple[str, str, int | None]]:
    """(function, parameter, its position in a call) of every public parameter that has a default."""
    for path in SOURCES:
        if owner(path) in COMMANDS:
            continue
        module = tree(path)
        methods = {id(one): node for node in module.body if isinstance(node, ast.ClassDef) for one in node.body}
        for node in ast.walk(module):
            if not isinstance(node, ast.FunctionDef) or (node.name.startswith("_") and node.name != "__init__"):
                continue
            of_class = methods.get(id(node))
            name = of_class.name if node.name == "__init__" and of_class is not None else node.name
            bound = of_class is not None and "staticmethod" not in {ast.unparse(one) for one in node.decorator_list}
            first = len(node.args.args) - len(node.args.defaults)
            for position, argument in enumerate(node.args.args[first:], first):
                yield name, argument.arg, position - bound
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                if default is not None:
                    yield name, argument.arg, None


def test_every_optional_parameter_is_used_by_the_product():
    """A parameter that only tests give is a promise that nobody needs."""
    keywords, most_positional = set(), {}
    for path in SOURCES + SCRIPTS:
        for name, call in calls(tree(path)):
            short = name.split(".")[-1]
            if any(isinstance(argument, ast.Starred) for argument in call.args):
                most_positional[short] = 99
            most_positional[short] = max(most_positional.get(short, 0), len(call.args))
            keywords |= {(short, keyword.arg) for keyword in call.keywords}
    idle = {
        f"{name}({parameter})"
        for name, parameter, position in optional_parameters()
        if name not in API_OF_SIT
        and not {(name, parameter), (name, None)} & keywords
        and (position is None or most_positional.get(name, 0) <= position)
    }
    assert idle == set()


def test_every_module_has_its_row():
    found = {owner(path) for path in SOURCES}
    assert found == set(RANK), "a new top-level file needs its place in LAYERS (and a reason)"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    own = owner(path)
    upward = {name for name in imports(tree(path), own) if name in RANK and name != own and RANK[name] >= RANK[own]}
    assert upward == set()


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_one_imports_a_command(path):
    assert COMMANDS.isdisjoint(imports(tree(path), owner(path)))


@pytest.mark.parametrize("module", FOREIGN)
def test_numerics_import_numerics_only(module):
    allowed = FOREIGN[module] | (set(sys.stdlib_module_names) - NO_USER_INTERFACE) | {module}
    for path in SOURCES:
        if owner(path) == module:
            assert set(imports(tree(path), module)) <= allowed, path


def test_making_masks_starts_without_torch():
    """Seconds of start-up, for a command that draws with numpy."""
    program = "import sys, make_masks; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(loaded.stdout.split()).isdisjoint({"torch", "timm", "models", "cli"})


def test_what_transport_and_the_commands_load_by_running_them():
    """Transport reaches none of ours. Commands import slow libraries where they use them, so that `--help` is quick."""
    program = (
        "import sys, transport; print(*sys.modules); import train, sample, sample_ddp, evaluate; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    of_transport, of_commands = (set(line.split()) for line in loaded.stdout.splitlines())
    assert "transport" in of_transport
    assert of_transport.isdisjoint({"models", "dataset", "common", "PIL", "wandb", "diffusers", "timm"})
    # scikit-image 0.24 asks matplotlib for its version; figures are what takes time
    slow = {"diffusers", "matplotlib.figure", "monai", "timm", "torch._dynamo", "torchdiffeq", "torchvision", "wandb"}
    assert "evaluate" in of_commands and of_commands.isdisjoint(slow)


def test_wandb_is_imported_by_wandb_utils_alone_and_only_when_used():
    for path in SOURCES + SCRIPTS:
        if owner(path) != "wandb_utils":
            assert "wandb" not in set(imports(tree(path), owner(path))), path
    at_start = [node for node in tree(ROOT / "wandb_utils.py").body if not isinstance(node, ast.FunctionDef)]
    assert all("wandb" not in set(imports(node, "")) for node in at_start)
    assert "wandb" in set(imports(tree(ROOT / "wandb_utils.py"), ""))


def test_no_import_hides_from_this_test():
    hidden = ("__import__", "importlib.import_module", "import_module", "exec", "eval")
    assert places(SOURCES, lambda name, call: name in hidden) == []


def test_no_parser_swallows_unknown_flags():
    swallowing = ("parse_known_args", "parse_known_intermixed_args")
    assert places(SOURCES + SCRIPTS, lambda name, call: name.split(".")[-1] in swallowing) == []


def loads_code(name: str, call: ast.Call) -> bool:
    """Whether reading a file by this call could run what is in it."""
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "torch.load":
        weights_only = arguments.get("weights_only")
        return not (isinstance(weights_only, ast.Constant) and weights_only.value is True)
    pickles = arguments.get("allow_pickle")
    unpickles = name.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle", "marshal")
    return (unpickles and "load" in name) or not (pickles is None or ast.unparse(pickles) == "False")


def test_loading_a_file_never_runs_code_from_it():
    assert places(SOURCES + SCRIPTS, loads_code) == []
    assert places(SOURCES, lambda name, call: name == "torch.load"), "the guard above has nothing to guard"


UNPICKLES = Path("dataset/annotations/cellpose.py")  # with a list of what it takes


def test_one_reader_unpickles_and_takes_plain_data_only():
    users = [path for path in SOURCES + SCRIPTS if "pickle." in path.read_text(encoding="utf-8")]
    named = {ast.unparse(node) for path in users for node in ast.walk(tree(path))
             if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pickle.")}  # fmt: skip
    assert named == {"pickle.Unpickler", "pickle.UnpicklingError"}
    for path in SOURCES + SCRIPTS:
        knows = {"pickle", "_pickle", "dill", "joblib", "cloudpickle"} & set(imports(tree(path), owner(path)))
        assert not knows or path.relative_to(ROOT) == UNPICKLES, path
    reader = next(node for node in tree(ROOT / UNPICKLES).body if isinstance(node, ast.ClassDef))
    assert [ast.unparse(base) for base in reader.bases] == ["pickle.Unpickler"]
    assert [node.name for node in reader.body if isinstance(node, ast.FunctionDef)] == ["find_class"]
    (refusal,) = [node for node in ast.walk(reader) if isinstance(node, ast.If)]
    assert ast.unparse(refusal.test).endswith("not in PLAIN") and isinstance(refusal.body[0], ast.Raise)


def test_torch_load_goes_by_its_full_name():
    """So that the guard above sees it."""
    for path in SOURCES + SCRIPTS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization", "pickle"):
                assert {"load", "loads", "Unpickler"}.isdisjoint(alias.name for alias in node.names), path
            if isinstance(node, ast.Import):
                assert all(alias.asname is None for alias in node.names if alias.name in ("torch", "pickle")), path


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("torch.load(f)", True),
        ("torch.load(f, weights_only=False)", True),
        ("torch.load(f, weights_only=flag)", True),
        ("torch.load(f, weights_only=True)", False),
        ("pickle.loads(f)", True),
        ("np.load(f, allow_pickle=True)", True),
        ("np.load(f)", False),
        ("json.load(f)", False),
    ],
)
def test_guard_of_loads_knows_the_unsafe_ones(source, wrong):
    ((name, call),) = calls(ast.parse(source))
    assert loads_code(name, call) == wrong


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_parse_args_and_main_and_ends_by_run_command(command):
    module = tree(ROOT / f"{command}.py")
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    assert {"parse_args", "main", "run"} <= set(functions)
    assert [argument.arg for argument in functions["main"].args.args] == ["args"]
    assert len(functions["parse_args"].args.defaults) == len(functions["parse_args"].args.args) == 1
    assert ast.get_docstring(module)
    assert ast.unparse(functions["run"].body[-1]) == "run_command(main, parse_args)"
    assert ast.unparse(module.body[-1]).endswith("run()")


def test_results_and_errors_are_printed_in_two_modules_that_escape_control_characters():
    libraries = [path for path in SOURCES if path not in (ROOT / "common" / "errors.py", ROOT / "common" / "log.py")]
    assert places(libraries, lambda name, call: name == "print") == []


def test_json_of_others_is_read_in_one_place():
    """Exceptions: metrics of the run itself, messages between its processes, and GeoJSON, which may hold NaN."""
    allowed = {"common/plain.py", "engine/run_folder.py", "engine/peers.py", "engine/machine.py"}
    others = [
        path for path in SOURCES if str(path.relative_to(ROOT)) not in allowed | {"dataset/annotations/geojson.py"}
    ]

    def reads_a_file(name: str, call: ast.Call) -> bool:
        return name in ("json.load", "json.loads") and "json.dumps" not in ast.unparse(call)

    assert places(others, reads_a_file) == []
