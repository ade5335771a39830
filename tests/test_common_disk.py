"""common/disk.py: tables safe for spreadsheets, folder locks, removal of our own temporary files only."""

from __future__ import annotations

import csv
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.disk import LOCK_FILE, check_folder, lock_folder, new_folder, read_csv, write_atomically, write_csv
from common.errors import InputError

ROOT = Path(__file__).parents[1]
FORMULAS = ["=cmd|' /C calc'!A0.png", "+1+1.png", "-3.png", "@SUM(A1).png", "\t=1+1", "'=1+1", "''-2+3"]


def cells_as_a_spreadsheet_sees_them(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as stream:
        return [row[0] for row in csv.reader(stream)][1:]


@pytest.mark.parametrize("name", FORMULAS)
def test_no_text_of_a_table_is_a_formula_and_every_text_comes_back(tmp_path, name):
    write_csv(tmp_path / "a.csv", ["image", "n"], [[name, 1]])
    assert not cells_as_a_spreadsheet_sees_them(tmp_path / "a.csv")[0].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert read_csv(tmp_path / "a.csv") == (["image", "n"], [{"image": name, "n": "1"}])


@pytest.mark.parametrize("cell", [-1.5, "-1.5", "+3", "-1e-05", "-inf", "-", "a-b", "'quoted'", "", 'say "=1"'])
def test_numbers_and_harmless_texts_stand_as_they_are(tmp_path, cell):
    write_csv(tmp_path / "a.csv", ["value", "n"], [[cell, 1]])
    assert cells_as_a_spreadsheet_sees_them(tmp_path / "a.csv") == [str(cell)]
    assert read_csv(tmp_path / "a.csv")[1] == [{"value": str(cell), "n": "1"}]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(text=st.text(alphabet="'=+-@\t\r\n,\"x1", max_size=8))
def test_any_text_comes_back(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("table") / "a.csv"
    write_csv(path, ["a", "b"], [[text, "end"]])
    assert read_csv(path)[1] == [{"a": text, "b": "end"}]


def test_a_table_that_a_spreadsheet_saved_as_utf_8_has_the_names_of_its_columns(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffname,größe\r\nf1,2\r\n".encode())
    assert read_csv(tmp_path / "a.csv") == (["name", "größe"], [{"name": "f1", "größe": "2"}])


def test_a_name_that_is_not_utf_8_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"a\.csv cannot name '\.\./p\\udce4/f1\.png', .*not UTF-8, so rename the"):
        write_csv(tmp_path / "a.csv", ["image", "mask"], [["é.png", os.fsdecode(b"../p\xe4/f1.png")]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b'a,b\n"torn', b"\xff\xfe\x00"])
def test_a_table_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.csv is not a readable CSV file"):
        read_csv(tmp_path / "a.csv")


def test_locking_removes_our_temporary_files_and_no_other(tmp_path):
    for folder in ("masks", "foreign", "masks/below"):
        (tmp_path / folder).mkdir()
    ours = [tmp_path / ".sit-0123abcd.tmp", tmp_path / "masks" / ".0123456789abcdef.tmp"]
    others = [
        tmp_path / ".notes.tmp",
        tmp_path / "masks" / ".sit-0123abcd.tmp.png",
        tmp_path / "masks" / "below" / ".sit-0123abcd.tmp",
        tmp_path / "foreign" / ".sit-0123abcd.tmp",
    ]
    for file in ours + others:
        file.write_bytes(b"half")
    lock_folder(tmp_path, "wait", ["masks", "absent"]).close()
    assert [file for file in ours if file.exists()] == []
    assert [file for file in others if not file.exists()] == []


def test_locking_removes_a_folder_that_was_not_finished(tmp_path):
    half = tmp_path / ".sit-0123abcd.tmp"
    (half / "images").mkdir(parents=True)
    (half / "images" / "a.png").write_bytes(b"half")
    lock_folder(tmp_path, "wait").close()
    assert not half.exists()


def test_a_linked_folder_is_not_cleared(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere" / ".sit-0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "set" / "masks").symlink_to(tmp_path / "elsewhere")
    lock_folder(tmp_path / "set", "wait", ["masks"]).close()
    assert (tmp_path / "elsewhere" / ".sit-0123abcd.tmp").exists()


def test_the_name_of_a_half_written_file_is_one_that_locking_removes(tmp_path):
    names = []
    write_atomically(tmp_path / "a", lambda file: names.append(Path(file.name)))
    names[0].write_bytes(b"half")
    lock_folder(tmp_path, "wait").close()
    assert not names[0].exists()


NO_LOCK_SERVICE = """if True:
    import fcntl, os, sys
    from pathlib import Path

    def refuse(*arguments):
        raise OSError({code}, os.strerror({code}))

    fcntl.lockf = refuse
    from common.disk import lock_folder
    for _ in range(2):
        lock_folder(Path({folder!r}), "wait")
"""


def lock_with(code: int, folder: Path) -> subprocess.CompletedProcess:
    program = NO_LOCK_SERVICE.format(code=code, folder=str(folder))
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_work_goes_on_and_one_warning_says_so(tmp_path, code):
    (tmp_path / ".sit-0123abcd.tmp").write_bytes(b"half")
    done = lock_with(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr and "has no locks" in done.stderr
    assert (tmp_path / ".sit-0123abcd.tmp").exists()  # another process may be writing it


def test_other_faults_of_a_lock_name_the_file(tmp_path):
    done = lock_with(errno.EIO, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"Input/output error: '{tmp_path / '.lock'}'")


def test_a_folder_with_a_lock_and_a_half_written_file_of_ours_counts_as_empty(tmp_path):
    (tmp_path / LOCK_FILE).touch()
    (tmp_path / ".sit-0a1b2c3d.tmp").touch()
    assert not check_folder(tmp_path, {"seed": 0})
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"is not empty \(it holds notes\.txt\) and has no settings\.json"):
        check_folder(tmp_path, {"seed": 0})


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "lost+found", "System Volume Information", "__MACOSX"])
def test_a_folder_that_looks_empty_counts_as_empty(tmp_path, name):
    (tmp_path / name).mkdir()
    check_folder(tmp_path)
    with new_folder(tmp_path) as folder:
        (folder / "a.png").touch()
    with pytest.raises(InputError, match=r"is not empty \(it holds a\.png\); name"):
        check_folder(tmp_path)


HOLDER = """if True:
    import sys, time
    from pathlib import Path
    from common.disk import lock_folder, sign_lock
    lock = lock_folder(Path(sys.argv[1]), "wait")
    sign_lock(lock)
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holding(folder: Path, seconds: float) -> subprocess.Popen:
    words = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_held_lock_names_its_process_and_what_to_do_if_its_machine_is_dead(tmp_path):
    with holding(tmp_path, 60) as process:
        with pytest.raises(InputError, match=rf"works in this folder \({process.pid}\)\. .*or use another name\.$"):
            lock_folder(tmp_path, "use another name")
        (tmp_path / LOCK_FILE).write_text("node7 4711")
        with pytest.raises(
            InputError, match=r"works in this folder \(4711 on node7\)\. .* If node7 is dead, .*remove .*\.lock if"
        ):
            lock_folder(tmp_path, "use another name")
        process.kill()


def test_a_lock_is_waited_for_as_long_as_asked(tmp_path, caplog):
    with holding(tmp_path, 1.0) as process:
        lock_folder(tmp_path, "wait", wait_seconds=30).close()
    assert f"waiting up to 30 s for another process ({process.pid})" in caplog.text


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_filled_whole_or_not_at_all(tmp_path):
    for folder in (tmp_path / "new" / "out", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        with pytest.raises(OSError, match="No space left") as failed, new_folder(folder) as inner:
            (inner / "a.tif").write_bytes(b"1")
            raise OSError(errno.ENOSPC, "No space left on device", str(inner / "b.tif"))
        assert failed.value.filename == str(folder / "b.tif")  # as the user knows it
        assert folder.exists() == (folder.name == "empty") and not list(folder.glob("*"))
        with new_folder(folder) as inner:
            (inner / "a.tif").write_bytes(b"1")
            assert not (folder / "a.tif").exists()
        assert [path.name for path in folder.iterdir()] == ["a.tif"]
        with pytest.raises(InputError, match="is not empty"), new_folder(folder):
            pass


def test_a_fault_names_the_new_folder_and_not_the_one_within(tmp_path):
    with pytest.raises(InputError) as failed, new_folder(tmp_path / "new") as inner:
        raise InputError(f"`images`: {inner / 'a.png'} is empty")
    assert failed.value.marked == f"`images`: {tmp_path / 'new' / 'a.png'} is empty"
    assert str(failed.value) == f"images: {tmp_path / 'new' / 'a.png'} is empty"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error", "b")])
def test_files_that_were_moved_into_a_new_folder_go_if_another_cannot_be_moved(tmp_path, monkeypatch, error):
    def fill() -> None:
        with new_folder(tmp_path / "out") as inner:
            (inner / "a").mkdir()
            for name in ("a/1.tif", "b.tif", "c.tif"):
                (inner / name).touch()

    def replace(path: Path, target: Path) -> None:
        if path.name == "c.tif":
            raise error
        os.replace(path, target)  # noqa: PTH105 - the method is replaced

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(Path, "replace", replace)
        fill()
    assert not (tmp_path / "out").exists()
    fill()
    assert names_in(tmp_path / "out") == ["a", "b.tif", "c.tif"]


FILLER = """if True:
    import sys
    from pathlib import Path
    from common.disk import new_folder
    with new_folder(Path(sys.argv[1])) as inner:
        (inner / "half.tif").touch()
        print("begun", flush=True)
        sys.stdin.read()
"""


def test_two_processes_do_not_fill_one_folder_and_what_a_killed_one_left_is_removed(tmp_path):
    words, pipes = [sys.executable, "-c", FILLER, str(tmp_path / "out")], {"stdin": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        with pytest.raises(InputError, match="another process works in this folder"), new_folder(tmp_path / "out"):
            pass
        process.kill()
    assert len(names_in(tmp_path / "out")) == 2  # the lock and the unfinished folder
    with new_folder(tmp_path / "out") as inner:
        (inner / "a.tif").touch()
    assert names_in(tmp_path / "out") == ["a.tif"]


def test_a_lock_file_that_new_folder_removed_meanwhile_locks_nothing(tmp_path, monkeypatch):
    opened = []

    def wait(lock, *rest):
        opened.append(lock)
        if len(opened) == 1:
            (tmp_path / LOCK_FILE).unlink()

    monkeypatch.setattr("common.disk._wait_for_lock", wait)
    with lock_folder(tmp_path, "wait") as lock:
        assert os.fstat(lock.fileno()).st_ino == (tmp_path / LOCK_FILE).stat().st_ino and len(opened) == 2
