"""Values from foreign files: JSON is read safely, fields have their types, control characters are escaped."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.errors import InputError, printable
from common.log import PlainFormatter
from common.plain import build, check_fields, parse_json, read_as, read_json

DAMAGED = {
    "cut off": '{"a": ',
    "too deep": "[" * 200_000,
    "NaN": '{"a": NaN}',
    "infinite": '{"a": -Infinity}',
    "too large for a float": '{"a": 1e999}',
    "5000 digits": '{"a": ' + "1" * 5000 + "}",
    "beyond 64 bits": '{"a": 36893488147419103232}',
    "a list": "[1]",
    "text": '"x"',
    "latin-1": b'{"a": "\xe9"}',
    "zero bytes": b"\0\0\0",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_in_one_line_with_what_to_do(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"settings\.json .*; sample the set again") as refused:
        read_json(path, "sample the set again")
    assert len(str(refused.value)) < 400 and printable(refused.value) == str(refused.value)


def test_a_file_that_an_editor_saved_with_a_mark_of_utf_8_is_read(tmp_path):
    (tmp_path / "settings.json").write_bytes('\ufeff{"a": "é"}'.encode())
    assert read_json(tmp_path / "settings.json", "") == {"a": "é"}


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="does not exist; make it"):
            read_json(path, "make it")


def test_plain_json_is_read_as_it_is():
    assert parse_json('{"a": [1, -2.5, null, true, "x"], "seed": 9223372036854775807}') == {
        "a": [1, -2.5, None, True, "x"],
        "seed": 2**63 - 1,
    }


def test_content_of_the_wrong_shape_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text('{"rounds": 5}')
    for convert in (lambda one: one["names"], lambda one: list(one["rounds"]), lambda one: one["rounds"]["a"]):
        with pytest.raises(InputError, match=r"a\.json holds unexpected values .*; run it again"):
            read_as(tmp_path / "a.json", convert, "run it again")


@dataclass(frozen=True)
class Kind:
    count: int
    factor: float
    name: str | None = None
    pair: tuple[float, float] | None = None
    values: tuple[int, ...] = ()
    place: Path = Path()
    notes: dict[str, int] | None = None


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": "3"}, {"count": True}, {"count": 2.0}, {"count": 2**70}, {"count": None}, {"factor": float("nan")},
        {"factor": float("inf")}, {"factor": "1"}, {"name": 5}, {"name": ["x"]}, {"pair": [1]}, {"pair": "ab"},
        {"pair": [1, "b"]}, {"values": 5}, {"values": [1.5]}, {"place": 3}, {"notes": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_the_wrong_type_names_its_field(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} is "):
        check_fields(Kind, wrong)


def test_right_values_pass_and_names_must_be_known_only_to_build():
    right = {"count": 3, "factor": 2, "name": None, "pair": [1, 2.5], "values": (1, 2), "place": "x", "notes": {"a": 1}}
    assert check_fields(Kind, right | {"younger": 5})["younger"] == 5
    assert build(Kind, right).pair == [1, 2.5]
    for wrong in (right | {"younger": 1}, {"count": 1}, [1], None):
        with pytest.raises(ValueError, match="younger|factor|instead of a dictionary"):
            build(Kind, wrong)


HOSTILE = "a\x1b[2J\x1b]0;owned\x07\r\x00\x9b\u202e\udcff.png"


def test_control_characters_are_escaped_and_plain_text_stays():
    assert printable(HOSTILE) == r"a\x1b[2J\x1b]0;owned\x07\r\x00\x9b\u202e\udcff.png"
    assert printable("Zellen µm 細胞 é 😀 a\\b") == "Zellen µm 細胞 é 😀 a\\b"
    assert printable("a\nb\tc", keep="\n\t") == "a\nb\tc"


def test_the_log_escapes_what_names_hold():
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "reading %s\nnext line", (HOSTILE,), None)
    line = PlainFormatter("%(message)s").format(record)
    assert line == rf"reading {printable(HOSTILE)}" + "\nnext line"


def test_warnings_name_flags_and_other_lines_stay():
    said = "no mask has a pixel of class 0: give mask_values=(1, 2) num_classes=2"
    lines = [
        PlainFormatter("%(message)s").format(logging.LogRecord("dataset", level, "f.py", 1, said, None, None))
        for level in (logging.WARNING, logging.INFO)
    ]
    assert lines == ["no mask has a pixel of class 0: give --mask-values 1 2 --num-classes 2", said]
