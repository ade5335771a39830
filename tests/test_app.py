"""The page of app.py: what is drawn equals what sample.py writes, and no request can do harm."""

from __future__ import annotations

import base64
import contextlib
import gc
import http.client
import io
import json
import shlex
import socket
import struct
import threading
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from script_helpers import call, run_here, write_pairs
from tiny_sit import write_checkpoint

import app
import sample
from common.errors import InputError
from dataset.config import DataConfig
from dataset.looks import Looks, look_count
from dataset.masks import MaskRule
from engine.sampling import ImageSampler
from evaluation.instances import dice
from page.labels import label_kinds, pack, random_label, read_label, unpack
from page.service import MOST_BYTES, Service
from page.tasks import Task

SIDE = 16
FLAGS = ["--device", "cpu", "--precision", "float32"]
LAYOUT = {"height": 24, "width": 40, "kind": "cells", "cell_size": 6, "density": 0.3, "seed": 1}


def checkpoint_of(path: Path, num_classes: int, looks: int = 0, **data: Any) -> Path:
    """A small model of 16 gray pixels. With ``looks``, it knows those of so many images."""
    config, sizes, known = DataConfig(SIDE, num_classes, channels=1, **data), {"num_heads": 2}, None
    if looks:
        sizes["look_numbers"] = look_count(1)
        windows = np.random.default_rng(0).normal(size=(looks, 3, look_count(1))).astype(np.float32)
        known = Looks.of([f"image_{number}" for number in range(looks)], list(windows)).to_dict()
    return write_checkpoint(path, config, step=7, looks=known, **sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@contextlib.contextmanager
def serving(checkpoint: Path, *flags: object) -> Iterator[Service]:
    """The page of a checkpoint on a free port."""
    with app.start_service(
        app.parse_args(["--ckpt", str(checkpoint), "--port", "0", *FLAGS, *map(str, flags)])
    ) as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        yield service
        service.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def two(folder) -> Iterator[Service]:
    """Cells and background, trained on squares at native scale."""
    with serving(checkpoint_of(folder / "two.pt", 2, crop="random")) as service:
        yield service


@pytest.fixture(scope="module")
def three(folder) -> Iterator[Service]:
    """Cells with a boundary where they touch."""
    with serving(checkpoint_of(folder / "three.pt", 3)) as service:
        yield service


@pytest.fixture(scope="module")
def valued(folder) -> Iterator[Service]:
    """Classes that are stored as other gray values."""
    with serving(checkpoint_of(folder / "valued.pt", 3, mask_values=(0, 2, 1))) as service:
        yield service


@pytest.fixture(scope="module")
def looking(folder) -> Iterator[Service]:
    """A model that knows the looks of five training images."""
    with serving(checkpoint_of(folder / "looking.pt", 2, looks=5)) as service:
        yield service


@pytest.fixture(scope="module")
def large_valued(folder) -> Iterator[Service]:
    """Classes that are stored as numbers beyond 16 bits."""
    with serving(checkpoint_of(folder / "large_valued.pt", 3, mask_values=(0, 70_000, 2**33))) as service:
        yield service


def cells(height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Two cells that touch, and one alone."""
    label = np.zeros((height, width), np.uint16)
    label[2:9, 3:8], label[4:10, 8:13], label[11:14, 2:6] = 1, 2, 300
    return label


def order(cells_drawn: np.ndarray, **changes: object) -> dict[str, object]:
    content = base64.b64encode(cells_drawn.astype("<u2").tobytes()).decode()
    settings = {"kind": "cells", "blur": 0, "seed": 5, "count": 2, "method": "heun", "num_steps": 2, "cfg_scale": 1.5}
    return {"height": cells_drawn.shape[0], "width": cells_drawn.shape[1], "label": content, **settings, **changes}


def ask(service: Service, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
    """Status and JSON of a request."""
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(service.url + path, content, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


# ----------------------------------------------------------------------------------------------- the same as sample.py


@pytest.mark.parametrize(
    ("name", "label", "changes"),
    [
        ("two", cells(), {}),
        ("two", cells(), {"blur": 1.5}),
        ("two", cells(), {"cfg_scale": 1.500005, "count": 16}),
        ("two", cells(17, 30), {"count": 1}),
        ("two", cells()[3:7, :9], {"count": 1}),
        ("two", np.zeros((SIDE, SIDE), np.uint16), {"cfg_scale": 1}),
        ("three", cells(), {"method": "ab2"}),
        ("three", cells(), {"blur": 0.75}),
        ("three", cells() % 3, {"kind": "classes"}),
        ("valued", cells() % 3, {"kind": "classes"}),
        ("large_valued", cells() % 3, {"kind": "classes"}),
        ("looking", cells(), {}),
        ("looking", cells(17, 30), {"look": 3}),
        ("looking", cells(), {"look": "none", "count": 1}),
    ],
)
def test_what_the_page_draws_equals_sample_with_the_command_shown(name, label, changes, request, tmp_path, monkeypatch):
    asked = order(label, **changes)
    status, reply = ask(request.getfixturevalue(name), "/api/draw", asked)
    assert status == 200, reply
    monkeypatch.chdir(tmp_path)
    Path(reply["mask"]["name"]).write_bytes(base64.b64decode(reply["mask"]["content"]))
    words = shlex.split(reply["command"])
    assert words[:2] == ["python", "sample.py"]
    assert float(words[words.index("--cfg-scale") + 1]) == asked["cfg_scale"]
    call(sample, *words[2:])
    assert Path("samples.png").read_bytes() == base64.b64decode(reply["sheet"])


def test_a_reference_image_gives_the_look_that_sample_takes_from_its_file(looking, tmp_path, monkeypatch):
    reference = png(np.random.default_rng(0).integers(0, 90, (40, 30), np.uint8))
    status, measured = ask(looking, "/api/look?name=reference.png", reference)
    assert status == 200, measured
    _, reply = ask(looking, "/api/draw", order(cells(), look=measured))
    _, other = ask(looking, "/api/draw", order(cells(), look="none"))
    assert reply["sheet"] != other["sheet"]
    monkeypatch.chdir(tmp_path)
    Path("reference.png").write_bytes(reference)
    Path("mask.png").write_bytes(base64.b64decode(reply["mask"]["content"]))
    call(sample, *shlex.split(reply["command"])[2:])
    assert Path("samples.png").read_bytes() == base64.b64decode(reply["sheet"])


def test_looks_to_choose_from_are_what_their_numbers_give(looking):
    status, reply = ask(looking, "/api/looks", order(cells(), count=1))
    assert status == 200, reply
    assert [look["name"] for look in reply["looks"]] == [f"image_{number}" for number in range(5)]
    _, third = ask(looking, "/api/draw", order(cells(), count=1, look=3))
    shown, drawn = (base64.b64decode(one["picture"]) for one in (reply["looks"][3], third["images"][0]))
    difference = np.asarray(Image.open(io.BytesIO(shown))).astype(int) - np.asarray(Image.open(io.BytesIO(drawn)))
    assert np.abs(difference).max() <= 1  # of another batch size


@pytest.mark.parametrize("look", [5, -1, True, "same", [], {"name": "a.png"}, {"name": "a.png", "numbers": [1]}])
def test_an_unknown_look_is_refused(looking, look):
    status, reply = ask(looking, "/api/draw", order(cells(), look=look))
    assert (status, "look" in reply["error"]) == (400, True)


def test_a_reference_image_is_bounded_as_a_mask_is(looking):
    status, reply = ask(looking, "/api/look?name=large.tif", large_label())
    assert (status, "at most 64 MiB are read" in reply["error"]) == (400, True)


def test_a_model_without_looks_takes_none(two):
    for status, reply in (
        ask(two, "/api/draw", order(cells(), look="training")),
        ask(two, "/api/looks", order(cells())),
        ask(two, "/api/look?name=a.png", png(np.zeros((20, 20), np.uint8))),
    ):
        assert (status, "without looks" in reply["error"]) == (400, True)


@pytest.fixture(scope="module")
def judged(folder) -> Iterator[Service]:
    """Cells and background, and a segmenter that learned a little from drawn pairs."""
    images, masks = write_pairs(folder / "real")
    checkpoint = checkpoint_of(folder / "judged.pt", 2)
    flags = ["--judge-images", images, "--judge-masks", masks, "--judge-steps", 2, "--judge-cache", folder / "judges"]
    with serving(checkpoint, *flags) as service:
        yield service


def test_the_judge_says_what_it_finds_in_every_image(judged):
    _, reply = ask(judged, "/api/draw", order(cells()))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["images"][1]["file"]))))
    verdict = judged.drawer.judge(image[:, :, None], cells() > 0)
    assert len(reply["verdicts"]) == 2
    found = unpack(*(reply["verdicts"][1][name] for name in ("height", "width", "label")))
    assert np.array_equal(found > 0, verdict.found)
    assert reply["verdicts"][1]["dice"] == verdict.dice == dice(verdict.found, cells() > 0)


@pytest.mark.parametrize("flags", [["--judge-images", "here"], ["--judge-masks", "here"], ["--judge-steps", "5"]])
def test_half_a_judge_is_refused(folder, flags):
    code, lines = run_here(app, "--ckpt", folder / "none.pt", *flags)
    assert code == 2
    assert "--judge-" in lines[-1]


def test_the_image_beside_the_sheet_is_the_same_image(two):
    _, reply = ask(two, "/api/draw", order(cells()))
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["sheet"]))))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["images"][1]["file"]))))
    assert image.shape == (SIDE, SIDE)
    assert np.array_equal(image, sheet[2:18, 2 + 2 * 18 : 18 + 2 * 18, 0])


@pytest.mark.parametrize(("name", "label"), [("two", cells(17, 30)), ("looking", cells())])
def test_one_image_alone_is_that_of_all(name, label, request):
    service = request.getfixturevalue(name)
    _, all_of_them = ask(service, "/api/draw", order(label, count=3, method="ab2"))
    status, alone = ask(service, "/api/draw", order(label, count=3, method="ab2", only=2))
    assert (status, len(alone["images"])) == (200, 1)
    drawn = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(one["file"])))).astype(int)
        for one in (all_of_them["images"][2], alone["images"][0])
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1  # of another batch size
    assert all_of_them["images"][1]["file"] != alone["images"][0]["file"]


def test_the_boundary_is_that_of_training(three):
    _, reply = ask(three, "/api/draw", order(cells(), count=1))
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["mask_picture"]))))
    colours = {tuple(color) for color in seen.reshape(-1, 3)}
    assert colours == {(0, 0, 0), (255, 255, 255), (230, 80, 60)}
    assert tuple(seen[5, 7]) == tuple(seen[5, 8]) == (230, 80, 60)


def test_the_way_leads_from_noise_to_the_image(two):
    values = order(cells(), num_steps=3)
    _, reply = ask(two, "/api/draw", {**values, "count": 1})
    status, way = ask(two, "/api/trajectory", {**values, "count": 1, "index": 0})
    assert status == 200
    assert len(way["frames"]) == 4
    last = np.asarray(Image.open(io.BytesIO(base64.b64decode(way["frames"][-1]))))
    assert np.array_equal(last, np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["images"][0]["picture"])))))


# ---------------------------------------------------------------------------------------------------------- mask files


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def tiff(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array)
    return buffer.getvalue()


def claims_to_be_large() -> bytes:
    """A PNG of a few bytes whose header says 60,000 x 60,000 pixels."""
    size, large = struct.pack(">II", 1, 1), struct.pack(">II", 60000, 60000)
    return png(np.zeros((1, 1), np.uint8)).replace(size, large)


def large_label() -> bytes:
    """A label TIFF of 70 KB that fills 72 MB."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((6000, 6000), np.uint16), compression="zlib")
    return buffer.getvalue()


def poisoned_array() -> bytes:
    """A .npy file that would run code if it were unpickled."""

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (Path("poisoned_by_the_page"),)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_a_large_mask_gives_a_square_with_cells(two):
    mask = np.zeros((200, 300), np.uint8)
    mask[10:20, 30:40] = 255  # far from the middle
    _, reply = ask(two, "/api/mask?name=mask.png", png(mask))
    assert np.count_nonzero(unpack(reply["height"], reply["width"], reply["label"])) == 80  # nearest to 0.3 of 256


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_label_file_keeps_its_cells(two, dtype):
    status, reply = ask(two, "/api/mask?name=label.tif&mask_type=instances", tiff(cells().astype(dtype)))
    assert status == 200, reply
    label = unpack(reply["height"], reply["width"], reply["label"])
    expected = cells()
    expected[expected == 300] = 3
    assert np.array_equal(label, expected)


def test_a_binary_mask_becomes_connected_cells(two):
    mask = np.zeros((40, 30), np.uint8)
    mask[2:9, 3:8] = mask[20:30, 10:20] = 255
    _, reply = ask(two, "/api/mask?name=mask.png&whole=1", png(mask))
    label = unpack(reply["height"], reply["width"], reply["label"])
    assert label.shape == mask.shape
    assert label.max() == 2
    assert np.array_equal(label > 0, mask > 0)


def test_an_uploaded_mask_is_read_as_training_read_its_masks():
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:2, :2], mask[4:6, 4:6] = 1, 2
    config = DataConfig(SIDE, num_classes=3)
    assert np.array_equal(read_label(png(mask), "m.png", config, "cells", learned="instances"), mask)


def test_a_large_mask_gives_the_square_that_sample_takes():
    mask = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((16, 16), np.uint8))
    assert read_label(png(mask), "m.png", DataConfig(SIDE), "cells").shape == (SIDE, SIDE)


@pytest.mark.parametrize(
    ("content", "name", "part"),
    [
        (b"no picture", "cells.png", "cells.png"),
        (png(np.zeros((8, 8), np.uint8)), "cells.exe", "kinds .png"),
        (png(np.arange(400, dtype=np.uint8).reshape(20, 20)), "ramp.png", "unclear"),
        (png(np.zeros((2000, 20), np.uint8)), "long.png&whole=1", "20 x 2000 pixels, and a canvas at most 1024"),
        (png(np.zeros((3, 20), np.uint8)), "low.png&whole=1", "4 to 1024 pixels"),
        (large_label(), "slide.tif", "at most 64 MiB are read"),
        (b"PK\x03\x04 broken", "../../etc/passwd.npz", "passwd.npz"),
        (b"", "empty.tif", "empty.tif"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "cells.png", "cells.png"),
        (b"<!doctype html><script>alert(1)</script>", "cells.png", "cells.png"),
        (poisoned_array(), "cells.npy", "cells.npy"),
        (
            png(np.zeros((1, 1), bool)).replace(struct.pack(">II", 1, 1), struct.pack(">II", 60000, 60000)),
            "a.png",
            "a.png",
        ),
        (png(np.zeros((16, 16), np.uint8)), "%2e%2e%2f%00%0a<b>.exe", "kinds .png"),
    ],
)
def test_a_bad_file_ends_as_a_message(two, content, name, part):
    status, reply = ask(two, f"/api/mask?name={name}", content)
    assert status == 400
    assert part in reply["error"]
    assert "sit-page-" not in reply["error"]
    assert reply["error"].isprintable()
    assert not Path("poisoned_by_the_page").exists()


def test_files_from_the_browser_leave_nothing_behind(two, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for content in (b"broken", png(cells())):
        ask(two, "/api/mask?name=m.png", content)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"width": 4096, "height": 4096}, "4 to 1024"),
        ({"width": True}, "whole number"),
        ({"label": "AAAA"}, "512"),
        ({"label": "***"}, "base64"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**53}, "seed 9007199254740992: give 0 to 9007199254740991."),
        ({"count": 17}, "count"),
        ({"num_steps": 10**9}, "num_steps"),
        ({"cfg_scale": "x"}, "cfg_scale"),
        ({"blur": 1e9}, "blur"),
        ({"method": "dopri5"}, "method"),
        ({"kind": "classes"}, "kind"),
        ({"only": 2}, "only"),
        ({"only": "0"}, "only"),
    ],
)
def test_a_wrong_value_is_named(two, changes, part):
    status, reply = ask(two, "/api/draw", order(cells(), **changes))
    assert status == 400
    assert part in reply["error"]


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        ("/api/mask?name=m.png&kind=bogus", png(cells()), "kind 'bogus'"),
        ("/api/mask?name=m.png&kind=classes", png(cells()), "kind 'classes' does not fit this model"),
        ("/api/mask?name=m.png&whole=yes", png(cells()), "whole 'yes': give 0 or 1"),
        ("/api/layout", LAYOUT | {"kind": "bogus"}, "kind 'bogus'"),
        ("/api/layout", LAYOUT | {"kind": "classes"}, "kind 'classes' does not fit this model"),
    ],
)
def test_a_word_that_means_nothing_is_named(two, path, body, part):
    status, reply = ask(two, path, body)
    assert (status, part in reply["error"]) == (400, True)


@pytest.mark.parametrize(("method", "address"), [("GET", "http://["), ("POST", "http://]/api/draw")])
def test_an_address_that_cannot_be_read_is_refused_without_a_traceback(two, caplog, method, address):
    connection = http.client.HTTPConnection("127.0.0.1", two.server_port, timeout=60)
    connection.putrequest(method, address, skip_host=True)  # else the client reads the address, and refuses it, too
    connection.putheader("Host", "localhost")
    connection.endheaders()
    reply = connection.getresponse()
    assert (reply.status, "address" in json.load(reply)["error"]) == (400, True)
    connection.close()
    assert caplog.text == ""


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"seed": NaN}', b"\xff", b"[" * 10**5])
def test_what_is_no_json_object_is_refused(two, body):
    assert ask(two, "/api/draw", body)[0] == 400


def test_unknown_classes_are_refused(valued):
    status, reply = ask(valued, "/api/draw", order(cells(), kind="classes"))
    assert (status, "class 300" in reply["error"]) == (400, True)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:7860"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/draw"])
def test_other_hosts_and_origins_are_refused(two, headers, path):
    assert ask(two, path, order(cells()) if path != "/" else None, **headers)[0] == 403


def test_the_page_is_served_to_its_own_name_and_through_a_tunnel(two):
    for host in (two.url.removeprefix("http://"), "localhost:9000"):
        request = urllib.request.Request(two.url, headers={"Host": host, "Origin": f"http://{host}"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = reply.read().decode()
            assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    assert "http" not in text.replace("http-equiv", "")


def test_only_this_machine_can_connect(two):
    assert two.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/../app.py", "/static/page.js", "//etc/passwd", "/%2e%2e/app.py", "/api/none"])
def test_no_other_file_is_served(two, path):
    assert ask(two, path)[0] == 404


@pytest.mark.parametrize(("length", "status"), [(str(MOST_BYTES + 1), 413), ("9" * 5000, 413), ("-1", 411), ("x", 411)])
def test_a_large_body_is_refused_before_it_is_read(two, length, status):
    connection = http.client.HTTPConnection(*two.server_address, timeout=60)
    connection.putrequest("POST", "/api/draw")
    connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


# ---------------------------------------------------------------------------------------------------- one after another


def post_and_leave(service: Service, body: dict) -> http.client.HTTPConnection:
    """Send a request without waiting for its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", service.server_port, timeout=60)
    connection.request("POST", "/api/draw", json.dumps(body))
    return connection


class HeldCalls:
    """Network calls that wait until they are let go. Counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.begun, self.let_go = 0, threading.Event(), threading.Event()
        predict = ImageSampler._predict

        def held(sampler: ImageSampler, *values: Any, **named: Any) -> Any:
            self.count += 1
            self.begun.set()
            assert self.let_go.wait(30)
            return predict(sampler, *values, **named)

        monkeypatch.setattr(ImageSampler, "_predict", held)


def test_a_drawing_ends_when_the_browser_leaves(two, monkeypatch):
    """It would take 250 steps, each of which waits until the connection is closed."""
    with monkeypatch.context() as patch:
        calls = HeldCalls(patch)
        connection = post_and_leave(two, order(cells(), num_steps=250))
        assert calls.begun.wait(30)
        connection.close()
        calls.let_go.set()
        two.drawer.in_turn(lambda: None, Task(lambda: False))  # the worker is free again
    assert calls.count < 5
    assert ask(two, "/api/draw", order(cells()))[0] == 200


def test_the_line_is_bounded_and_two_visitors_get_their_own_images(two, monkeypatch):
    monkeypatch.setattr(two.drawer, "_line", threading.BoundedSemaphore(2))
    free = threading.Event()
    two.drawer._worker.submit(free.wait, 30)
    waiting = [post_and_leave(two, order(cells(), seed=seed, count=1)) for seed in (1, 2)]
    while two.drawer._line._value:
        pass
    status, reply = ask(two, "/api/draw", order(cells()))
    assert (status, "Try again" in reply["error"]) == (503, True)
    free.set()
    sheets = [json.load(connection.getresponse())["sheet"] for connection in waiting]
    monkeypatch.undo()
    assert sheets == [ask(two, "/api/draw", order(cells(), seed=seed, count=1))[1]["sheet"] for seed in (1, 2)]


def test_an_error_keeps_nothing_of_the_work(two):
    """Such as a large mask, until the garbage collection."""

    class Large:
        pass

    kept: list[weakref.ref] = []

    def work() -> None:
        large = Large()
        kept.append(weakref.ref(large))
        raise InputError("of no use")

    gc.disable()
    try:
        with contextlib.suppress(InputError):
            two.drawer.in_turn(work, Task(lambda: False))
        two.drawer.in_turn(lambda: None, Task(lambda: False))  # the worker has let go of it, too
        assert kept[0]() is None
    finally:
        gc.enable()


def test_who_leaves_the_line_makes_room(two):
    free = threading.Event()
    two.drawer._worker.submit(free.wait, 30)
    room = two.drawer._line._value
    connection = post_and_leave(two, order(cells()))
    while two.drawer._line._value == room:
        pass
    connection.close()
    while two.drawer._line._value < room:
        pass
    free.set()


def test_a_drawing_ends_with_the_page(folder, monkeypatch):
    """Ctrl-C in the terminal. The drawing would take 250 steps, each of which waits until the page is closed."""
    calls = HeldCalls(monkeypatch)
    with serving(checkpoint_of(folder / "ending.pt", 2)) as service:
        connection = post_and_leave(service, order(cells(), num_steps=250))
        assert calls.begun.wait(30)
    calls.let_go.set()
    service.drawer._worker.shutdown(wait=True)
    assert calls.count < 5
    connection.close()


def test_a_connection_that_breaks_leaves_no_traceback(two, capfd, caplog):
    """Such as a tab that is closed, or a scan of the ports."""
    for _ in range(3):
        connection = socket.create_connection(("127.0.0.1", two.server_port))
        connection.sendall(b"GET")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset
        connection.close()
    assert ask(two, "/api/draw", order(cells()))[0] == 200
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_samples_that_are_not_finite_are_said_and_no_bug_of_ours(two, monkeypatch):
    def explode(self, *values, **named):
        raise FloatingPointError("the ODE gave values that are not finite")

    monkeypatch.setattr(ImageSampler, "_predict", explode)
    status, reply = ask(two, "/api/draw", order(cells()))
    assert (status, "not finite" in reply["error"], "bug" in reply["error"]) == (500, True, False)


# -------------------------------------------------------------------------------------------------------------- layouts


def test_a_random_layout_has_the_asked_size_and_classes(two):
    status, reply = ask(two, "/api/layout", LAYOUT)
    assert status == 200
    label = unpack(reply["height"], reply["width"], reply["label"])
    assert label.shape == (24, 40)
    assert 0.15 < np.mean(label > 0) < 0.5
    classes = random_label(64, 64, 8, 0.4, 1, "classes", 4)
    assert set(np.unique(classes)) == {0, 1, 2, 3}


@pytest.mark.parametrize(("side", "patch"), [(1032, 8), (2, 2)])
def test_a_model_whose_images_fit_no_canvas_is_refused_at_the_start(tmp_path, side, patch):
    sizes = {"name": f"SiT-Ti/{patch}", "num_heads": 2}
    checkpoint = write_checkpoint(tmp_path / "model.pt", DataConfig(side, channels=1), step=1, **sizes)
    code, lines = run_here(app, "--ckpt", checkpoint, "--port", "0", *FLAGS)
    assert code == 2 and f"squares of {side} pixels a side, and the page 4 to 1024: use sample.py" in lines[-1]


def test_connected_areas_of_class_1_become_cells(three):
    classes = MaskRule("instances", 3, 1.0, "drawn").class_map(cells())
    assert set(np.unique(classes)) == {0, 1, 2}
    status, reply = ask(three, "/api/cells", pack(classes))
    assert status == 200, reply
    expected = np.where(classes == 1, cells(), 0)
    expected[expected == 300] = 3
    assert np.array_equal(unpack(reply["height"], reply["width"], reply["label"]), expected)
    crowded = np.zeros((1024, 1024), np.uint16)
    crowded[::3, ::3] = 1
    status, reply = ask(three, "/api/cells", pack(crowded))
    assert (status, "more than 16 bits can number" in reply["error"]) == (400, True)


@pytest.mark.parametrize(("size", "density"), [(3, 0.2), (500, 0.2), (8, 0), (8, 0.9)])
def test_a_layout_that_cannot_be_is_refused(size, density):
    with pytest.raises(InputError, match="give"):
        random_label(64, 64, size, density, 0, "cells", 2)


def test_the_pen_draws_what_the_model_was_trained_on():
    assert label_kinds(DataConfig(64, 2), "auto") == ("cells",)
    assert label_kinds(DataConfig(64, 3), "auto") == ("cells", "classes")
    assert label_kinds(DataConfig(64, 3), "classes") == ("classes", "cells")
    assert label_kinds(DataConfig(64, 5), "auto") == ("classes",)


def test_a_taken_port_ends_in_one_line_before_the_judge_is_trained(two, folder, tmp_path):
    images, masks = write_pairs(tmp_path / "real")
    judge = ["--judge-images", images, "--judge-masks", masks, "--judge-steps", 1, "--judge-cache", tmp_path / "judges"]
    code, lines = run_here(app, "--ckpt", folder / "two.pt", "--port", two.server_address[1], *FLAGS, *judge)
    assert code == 2
    assert "--port" in lines[-1]
    assert "Give another one" in lines[-1]
    assert not (tmp_path / "judges").exists()


def test_a_page_that_does_not_start_gives_its_port_back(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for _ in range(2):
        code, lines = run_here(app, "--ckpt", folder / "none.pt", "--port", port, *FLAGS)
        assert code == 2 and "none.pt" in lines[-1]
