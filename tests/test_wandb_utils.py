"""wandb_utils.py: who may log in, one id per run folder, and no key in any file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import wandb_utils
from common.errors import InputError

ROOT = Path(__file__).parents[1]
KEY = "5ec2e7" + "0123456789abcdef" * 2 + "ab"  # the form of a real one: 40 hexadecimal digits


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No key, login or mode of the machine that runs the tests."""
    for name in list(os.environ):
        if name.startswith("WANDB") or name in ("NETRC", "RANK"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    return home


def test_without_key_login_or_offline_the_message_names_the_three_ways():
    with pytest.raises(InputError) as caught:
        wandb_utils.check_wandb()
    for way in ("WANDB_API_KEY", "wandb login", "WANDB_MODE=offline"):
        assert way in str(caught.value)


@pytest.mark.parametrize("mode", ["offline", "disabled", "Offline"])
def test_offline_needs_no_key(monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    wandb_utils.check_wandb()


def test_an_unknown_mode_is_named(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(InputError, match="WANDB_MODE=ofline is unknown: set it to online, offline or disabled"):
        wandb_utils.check_wandb()


def test_key_in_the_environment_is_enough(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb_utils.check_wandb()


def test_key_in_the_constant_is_enough(monkeypatch):
    monkeypatch.setattr(wandb_utils, "WANDB_API_KEY", KEY)
    wandb_utils.check_wandb()


def test_blank_key_is_no_key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "  ")
    with pytest.raises(InputError, match="no key"):
        wandb_utils.check_wandb()


@pytest.mark.slow
@pytest.mark.parametrize("host", [[], ["--host", "https://wandb.example.org"]])
def test_login_of_the_installed_wandb_is_enough(host):
    subprocess.run(["wandb", "login", "--no-verify", *host, KEY], check=True, capture_output=True, env=with_scripts())
    check = "import wandb_utils; wandb_utils.check_wandb()"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True)
    other = "import os; os.environ['WANDB_BASE_URL'] = 'https://other.example.org'; " + check
    refused = subprocess.run([sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode and "wandb: no key found" in refused.stderr


def with_scripts() -> dict[str, str]:
    """The environment, with the commands of this Python first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_a_server_that_does_not_answer_is_said_in_words_within_seconds(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)

    class Wandb:
        class settings:  # noqa: N801 - as wandb names it
            base_url = "https://127.0.0.1:9"

        @classmethod
        def setup(cls):
            return cls

    monkeypatch.setattr(wandb_utils, "_import_wandb", lambda: Wandb)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"127.0.0.1 cannot be reached \(.*WANDB_MODE=offline"):
        wandb_utils.check_server()
    assert time.monotonic() - start < 2 * wandb_utils.CONNECT_SECONDS
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb_utils.check_server()


def test_damaged_netrc_is_no_login(clean_environment):
    (clean_environment / ".netrc").write_text("machine\npassword password password")
    with pytest.raises(InputError):
        wandb_utils.check_wandb()


def test_absent_wandb_is_said_in_words(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        wandb_utils.check_wandb()


def test_environment_wins_over_constants_and_placeholders_count_as_nothing(monkeypatch):
    assert wandb_utils.from_environment("WANDB_ENTITY", wandb_utils.WANDB_ENTITY) is None
    assert wandb_utils.from_environment("WANDB_ENTITY", "lab") == "lab"
    monkeypatch.setenv("WANDB_ENTITY", "other")
    assert wandb_utils.from_environment("WANDB_ENTITY", "lab") == "other"


def test_constants_in_the_repository_are_placeholders():
    for constant in (wandb_utils.WANDB_ENTITY, wandb_utils.WANDB_PROJECT, wandb_utils.WANDB_API_KEY):
        assert constant.startswith(wandb_utils.PLACEHOLDER_PREFIX)


def test_run_id_is_random_and_kept(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first, second = (wandb_utils.run_id(folder) for folder in folders)
    assert first != second and first == wandb_utils.run_id(folders[0])
    (folders[0] / wandb_utils.ID_FILE).write_text("../../etc\n")
    with pytest.raises(InputError, match="wandb_id.txt"):
        wandb_utils.run_id(folders[0])


def test_importing_the_module_does_not_import_wandb():
    code = (
        "import sys, wandb_utils; wandb_utils.log({'a': 1}, 0); wandb_utils.finish(); assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_rank_zero_starts_a_run(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    wandb_utils.start_run(tmp_path, "name", {})
    assert wandb_utils._run is None and not (tmp_path / wandb_utils.ID_FILE).exists()


def test_error_of_wandb_is_one_input_error_without_the_key(monkeypatch, tmp_path):
    import wandb

    def refuse(**_):
        raise RuntimeError(f"the key {KEY} is not known")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError) as caught:
        wandb_utils.start_run(tmp_path, "name", {})
    assert KEY not in str(caught.value) and "***" in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_repeated_steps_of_a_continued_run_are_left_out(monkeypatch):
    class Run:
        step, lines = 10, []

        def log(self, metrics, step):
            self.lines.append((step, metrics))

    monkeypatch.setattr(wandb_utils, "_run", Run())
    for step in (9, 10, 11):
        wandb_utils.log({"train/loss": 1.0}, step)
    assert [step for step, _ in Run.lines] == [10, 11]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"mailbox of {KEY} is closed", "mailbox of *** is closed"),
        (f"{'x' * 295} {KEY}", f"{'x' * 295} ***"),  # the key is hidden before the line is cut
        ("", "Exception"),
    ],
)
def test_a_run_at_wandb_that_takes_no_more_is_a_warning_without_the_key_and_training_goes_on(
    monkeypatch, caplog, text, said
):
    """wandb logs through a process of its own, which may be killed."""

    class Run:
        step = 0

        def log(self, metrics, step):
            raise Exception(text)  # noqa: TRY002 - the error of wandb is no other one

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_utils, "_run", Run())
    for step in (1, 2):
        wandb_utils.log({"train/loss": 1.0}, step)
    wandb_utils.finish()
    assert caplog.text.count(f"no more is logged there ({said})") == 1 and KEY[:9] not in caplog.text


OFFLINE_RUN = """
import sys, wandb_utils
run_folder, picture = sys.argv[1:]
wandb_utils.start_run(run_folder, "name", {"lr": 1e-3})
assert wandb_utils._run.settings.mode == "offline"
assert wandb_utils._run.settings.disable_git, "online runs would upload uncommitted changes, a key among them"
wandb_utils.log({"train/loss": 0.5}, 1)
wandb_utils.log_image("preview", picture, 1)
wandb_utils.finish()
"""


def offline_run(script_folder: Path, run_folder: Path, **environment: str) -> None:
    """Start, log and finish an offline run in a process of its own (wandb keeps a service process)."""
    script = run_folder.parent / "offline_run.py"
    script.write_text(OFFLINE_RUN)
    picture = run_folder.parent / "picture.png"
    Image.new("RGB", (8, 4)).save(picture)
    run_folder.mkdir()
    given = {"WANDB_MODE": "offline", "PYTHONPATH": str(script_folder)} | environment
    command = [sys.executable, str(script), str(run_folder), str(picture)]
    finished = subprocess.run(command, cwd=script_folder, env=os.environ | given, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert KEY not in finished.stdout + finished.stderr


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_key_of_the_environment_is_in_no_file(tmp_path):
    offline_run(ROOT, tmp_path / "run", WANDB_API_KEY=KEY)
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert files_with(KEY, tmp_path) == []


def test_key_edited_into_the_constant_is_in_no_file_but_the_source(tmp_path):
    """A key in uncommitted changes must not travel: online, wandb stores those changes unless git is off."""
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copy(ROOT / "wandb_utils.py", repository)
    shutil.copytree(ROOT / "common", repository / "common", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "start"]):
        subprocess.run(git + command, cwd=repository, check=True, capture_output=True)
    source = repository / "wandb_utils.py"
    source.write_text(source.read_text().replace('"YOUR_WANDB_API_KEY"', f'"{KEY}"'))
    offline_run(repository, repository / "run")
    assert set(files_with(KEY, tmp_path)) - set((repository / "__pycache__").rglob("*")) == {source}


HANGING = """
import logging, sys, time, wandb_utils

class Run:
    dir = "run/wandb/run-1"
    def finish(self, exit_code):
        time.sleep(60)

logging.basicConfig()
wandb_utils._run, wandb_utils.{longest}, wandb_utils.SAY_SECONDS = Run(), 0.2, 0.1
wandb_utils.finish({exit_code})
print("done")
"""


@pytest.mark.parametrize(("exit_code", "longest"), [(0, "FINISH_SECONDS"), (143, "STOPPED_SECONDS")])
def test_an_upload_that_does_not_end_is_left_with_the_way_to_repeat_it(exit_code, longest):
    begun = time.monotonic()
    words = [sys.executable, "-c", HANGING.format(exit_code=exit_code, longest=longest)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == exit_code
    assert time.monotonic() - begun < 20
    assert done.stdout == "done\n" and "run wandb sync run/wandb/run-1" in done.stderr


def test_an_error_at_the_end_of_a_run_at_wandb_is_a_warning_without_the_key(monkeypatch, caplog):
    class Run:
        def finish(self, exit_code):
            raise RuntimeError(f"upload of {KEY} failed")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_utils, "_run", Run())
    wandb_utils.finish()
    assert "upload of *** failed" in caplog.text
