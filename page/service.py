"""The page over HTTP, on this machine only: its files, and JSON for all that it asks of the model.

No request names a path, nothing is written outside a temporary folder, and every size is bounded before it is used. A
browser that starts another drawing closes the connection of the running one, which then ends at the next network call.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import select
import socket
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import numpy as np
from torch import Tensor

from common.errors import InputError, one_line
from common.faults import fault_of_machine
from common.pictures import as_rgb, class_color, mask_picture, to_uint8
from common.plain import parse_json
from dataset.files import encode_image, image_suffix
from dataset.masks import MASK_TYPES
from page.drawing import (
    METHODS,
    MOST_BLUR,
    MOST_GUIDANCE,
    MOST_IMAGES,
    MOST_STEPS,
    Drawer,
    DrawRequest,
    TooManyRequests,
)
from page.labels import MOST_SIDE, cells_of_classes, pack, random_label, read_label, unpack
from page.looks import LONGEST_NAME, measure_reference, read_look
from page.masks import StartMasks
from page.tasks import Cancelled, Task, Tasks

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")  # of this machine, in a Host header; the port may be that of a tunnel
MOST_BYTES = 32 * 2**20  # of a request's body
MOST_FRAMES = 16
SECONDS_TO_SEND = 30  # a browser that is slower loses its connection
STATIC = Path(__file__).parent / "static"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/draw.js": ("draw.js", "text/javascript; charset=utf-8"),
    "/files.js": ("files.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refusal(Exception):
    """A request that is not served: its HTTP status and one line."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Service(ThreadingHTTPServer):
    """The page of one model.

    Args:
        port: to listen on; 0 takes a free one. Or a socket that listens already.
        drawer: of the model.
    """

    daemon_threads = True

    def __init__(self, port: int | socket.socket, drawer: Drawer) -> None:
        self.drawer = drawer
        self.is_ending = False
        self.tasks = Tasks()
        self.files = {url: ((STATIC / name).read_bytes(), kind) for url, (name, kind) in FILES.items()}
        listener = socket.create_server((ADDRESS, port)) if isinstance(port, int) else port
        super().__init__(listener.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_name, self.server_port = listener.getsockname()

    def server_close(self) -> None:
        """Stop listening, and end what is drawn now before its next network call."""
        self.is_ending = True
        self.drawer.end()
        super().server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that broke is no fault of ours; all else is, and the page goes on."""
        if isinstance(sys.exception(), OSError):
            logger.debug("a connection broke", exc_info=True)
        else:
            logger.exception("this is a bug of ours")

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0: every request has a connection of its own, which its end closes."""

    server: Service
    task: Task
    timeout = SECONDS_TO_SEND
    server_version, sys_version = "page", ""

    def do_GET(self) -> None:  # noqa: N802 - name of the base class
        """The page's files and what the page must know of the model."""
        calls = {
            "/api/model": lambda query: describe(self.server.drawer),
            "/api/progress": lambda query: self.server.tasks.progress(query.get("of", "")),
        }
        self._answer(calls, self.server.files)

    def do_POST(self) -> None:  # noqa: N802 - name of the base class
        """All that takes time. A ticket in the address names the request for questions about its progress."""
        self._answer(
            {
                "/api/draw": lambda query: self._draw(self._json()),
                "/api/trajectory": lambda query: self._trajectory(self._json()),
                "/api/layout": lambda query: self._layout(self._json()),
                "/api/cells": lambda query: self._cells(self._json()),
                "/api/mask": self._mask,
                "/api/masks": lambda query: self._masks(self._json()),
                "/api/start": lambda query: self._start(self._json()),
                "/api/look": self._look,
                "/api/looks": lambda query: self._looks(self._json()),
            },
            {},
        )

    def _answer(
        self, calls: dict[str, Callable[[dict[str, str]], dict[str, Any]]], files: dict[str, tuple[bytes, str]]
    ) -> None:
        """Answer with a file, or with what a call makes of the query. Errors become a status and one line."""
        try:
            self._check_origin()
            try:
                url = urlsplit(self.path)
            except ValueError as error:
                raise Refusal(HTTPStatus.BAD_REQUEST, "The address of the request cannot be read.") from error
            if url.path in files:
                return self._send(HTTPStatus.OK, *files[url.path])
            if url.path not in calls:
                raise Refusal(HTTPStatus.NOT_FOUND, "There is no such page.")
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            self.task = Task(lambda: self.server.is_ending or self._has_left())
            with self.server.tasks.known_by(query.get("ticket", "")[:LONGEST_NAME], self.task):
                values = calls[url.path](query)
            return self._send_json(HTTPStatus.OK, values)
        except Cancelled:
            logger.debug("a drawing was cancelled")
        except Refusal as error:
            self._send_json(error.status, {"error": str(error)})
        except TooManyRequests as error:
            self._send_json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(error)})
        except InputError as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": " ".join(str(error).split())})
        except (OSError, FloatingPointError) as error:
            self._send_json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": one_line(error)})
        except Exception as error:  # noqa: BLE001 - the page goes on, whatever one drawing met
            fault = fault_of_machine(error, {})
            if fault is None:
                logger.exception("this is a bug of ours")
            message = fault or "This is a bug of ours. The terminal shows where."
            self._send_json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": message})
        return None

    # ------------------------------------------------------------------------------------------------------ requests

    def _check_origin(self) -> None:
        """Refuse other names of this machine and pages of other places: they could use a visitor's browser."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in NAMES and host not in NAMES:
            raise Refusal(HTTPStatus.FORBIDDEN, f"Open the page as {self.server.url}.")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise Refusal(HTTPStatus.FORBIDDEN, "Another page may not ask this one.")

    def _body(self) -> bytes:
        """All of the request's body, if it is not too large."""
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal():
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "The request does not say how long it is.")
        if len(length) > 12 or int(length) > MOST_BYTES:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"That is too large: the page takes {MOST_BYTES // 2**20} MiB."
            )
        return self.rfile.read(int(length))

    def _json(self) -> dict[str, Any]:
        try:
            values = parse_json(self._body())
        except ValueError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, "The request is no JSON.") from error
        if not isinstance(values, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, "The request is no JSON object.")
        return values

    def _has_left(self) -> bool:
        """Whether the browser has closed the connection."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    # -------------------------------------------------------------------------------------------------------- answers

    def _in_turn(self, work: Callable[[], Result]) -> Result:
        return self.server.drawer.in_turn(work, self.task)

    def _draw(self, values: dict[str, Any]) -> dict[str, Any]:
        start, drawer = time.monotonic(), self.server.drawer
        request = read_request(values, drawer)
        drawing = self._in_turn(lambda: drawer.draw(request, self.task))
        colours = drawer.trained.data.window_channels != "separate"
        return {
            "images": [files_of(image, colours) for image in drawing.images],
            "verdicts": [
                {"dice": verdict.dice, **pack(verdict.found.astype(np.uint16))} for verdict in drawing.verdicts
            ],
            "mask_picture": picture(mask_picture(drawing.mask.prob_map)),
            "mask": {"name": drawing.mask.name, "content": encode64(drawing.mask.content)},
            "sheet": encode64(drawing.sheet()),
            "command": drawing.command,
            "nfe": drawing.nfe,
            "seconds": time.monotonic() - start,
        }

    def _trajectory(self, values: dict[str, Any]) -> dict[str, Any]:
        drawer, index = self.server.drawer, integer(values, "index")
        request = read_request(values, drawer)
        frames = self._in_turn(lambda: drawer.trajectory(request, index, MOST_FRAMES, self.task))
        return {"frames": [picture(frame) for frame in frames]}

    def _looks(self, values: dict[str, Any]) -> dict[str, Any]:
        drawer = self.server.drawer
        request = read_request(values, drawer)
        found = self._in_turn(lambda: drawer.look_pictures(request, self.task))
        return {"looks": [{"index": index, "name": name, "picture": picture(image)} for index, name, image in found]}

    def _look(self, query: dict[str, str]) -> dict[str, Any]:
        content, name, trained = self._body(), file_name(query), self.server.drawer.trained
        return self._in_turn(lambda: measure_reference(content, name, trained))

    def _layout(self, values: dict[str, Any]) -> dict[str, Any]:
        height, width, seed = (integer(values, name) for name in ("height", "width", "seed"))
        if seed < 0:
            raise InputError(f"seed {seed}: give 0 or more.")
        size, density, drawer = number(values, "cell_size"), number(values, "density"), self.server.drawer
        kind, num_classes = kind_of(values, drawer), drawer.trained.data.num_classes
        reach = self.task.reach
        return pack(self._in_turn(lambda: random_label(height, width, size, density, seed, kind, num_classes, reach)))

    def _cells(self, values: dict[str, Any]) -> dict[str, Any]:
        classes = label_of(values)
        return pack(self._in_turn(lambda: cells_of_classes(classes)))

    def _masks(self, values: dict[str, Any]) -> dict[str, Any]:
        masks, contains, first = self._start_masks(), text(values, "contains"), integer(values, "first")
        if first < 0:
            raise InputError(f"first {first}: give 0 or more.")
        total, numbers = masks.find(contains, first)
        thumbnails = self._in_turn(lambda: [picture(masks.thumbnail(number)) for number in numbers])
        shown = zip(numbers, thumbnails, strict=True)
        return {"total": total, "masks": [{"index": n, "name": masks.names[n], "picture": png} for n, png in shown]}

    def _start(self, values: dict[str, Any]) -> dict[str, Any]:
        masks, index, kind = self._start_masks(), integer(values, "index"), kind_of(values, self.server.drawer)
        whole = values.get("whole", False)
        if not isinstance(whole, bool):
            raise InputError("whole: give true or false.")
        return pack(self._in_turn(lambda: masks.label(index, kind, whole)))

    def _start_masks(self) -> StartMasks:
        masks = self.server.drawer.masks
        if masks is None:
            raise InputError("The page was started without a folder of masks.")
        return masks

    def _mask(self, query: dict[str, str]) -> dict[str, Any]:
        content, name, drawer = self._body(), file_name(query), self.server.drawer
        kind = kind_of({"kind": drawer.kinds[0], **query}, drawer)
        mask_type, whole = query.get("mask_type", "auto"), query.get("whole", "0")
        if whole not in ("0", "1"):
            raise InputError(f"whole {whole!r}: give 0 or 1.")
        trained = drawer.trained
        how = (trained.data, kind, mask_type, whole == "1", trained.normalize_masks, trained.mask_type)
        return pack(self._in_turn(lambda: read_label(content, name, *how)))

    def _send_json(self, status: HTTPStatus, values: dict[str, Any]) -> None:
        self._send(status, json.dumps(values).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        try:
            self.send_response(status)
            own = {"Content-Type": kind, "Content-Length": str(len(content))}
            own["X-Checkpoint"] = self.server.drawer.trained.sha256  # a page of an earlier service finds out
            for name, value in {**HEADERS, **own}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            logger.debug("a browser left before it had its answer")

    def log_message(self, format: str, *values: Any) -> None:  # noqa: A002 - name of the base class
        """Requests are no news; errors are logged where they are met."""
        logger.debug(format, *values)


def describe(drawer: Drawer) -> dict[str, Any]:
    """What the page must know of the model."""
    trained = drawer.trained
    return {
        "model": trained.config["model"].get("name", "SiT"),
        "step": trained.step,
        "checkpoint": trained.sha256,
        "image_size": trained.data.image_size,
        "num_classes": trained.data.num_classes,
        "channels": trained.data.channels,
        "kinds": drawer.kinds,
        "has_guidance": drawer.has_guidance,
        "has_soft_masks": drawer.has_soft_masks,
        "masks": None if drawer.masks is None else {"name": drawer.masks.name, "count": len(drawer.masks.names)},
        "looks": 0 if trained.looks is None else len(trained.looks.names),
        "methods": METHODS,
        "mask_types": MASK_TYPES,
        "class_colors": [class_color(k) for k in range(trained.data.num_classes)],
        "most": {
            "side": MOST_SIDE,
            "bytes": MOST_BYTES,
            "steps": MOST_STEPS,
            "images": MOST_IMAGES,
            "guidance": MOST_GUIDANCE,
            "blur": MOST_BLUR,
        },
    }


def read_request(values: dict[str, Any], drawer: Drawer) -> DrawRequest:
    """The JSON of a drawing, every value checked."""
    return DrawRequest(
        label=label_of(values),
        kind=kind_of(values, drawer),
        blur=number(values, "blur"),
        seed=integer(values, "seed"),
        count=integer(values, "count"),
        method=text(values, "method"),
        num_steps=integer(values, "num_steps"),
        cfg_scale=number(values, "cfg_scale"),
        look=read_look(values.get("look"), drawer.trained.looks, drawer.trained.data),
        only=None if values.get("only") is None else integer(values, "only"),
    )


def integer(values: dict[str, Any], name: str) -> int:
    """A whole number of a request, or an InputError."""
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name}: give a whole number.")
    return value


def number(values: dict[str, Any], name: str) -> float:
    """A finite number of a request, or an InputError."""
    value = values.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name}: give a number.")
    return float(value)


def text(values: dict[str, Any], name: str) -> str:
    """A text of a request, or an InputError."""
    value = values.get(name)
    if not isinstance(value, str):
        raise InputError(f"{name}: give a text.")
    return value


def label_of(values: dict[str, Any]) -> np.ndarray:
    """The label map (H, W) uint16 of a request, or an InputError."""
    return unpack(integer(values, "height"), integer(values, "width"), text(values, "label"))


def kind_of(values: dict[str, Any], drawer: Drawer) -> str:
    """What the label of a request holds, ``cells`` or ``classes``, or an InputError."""
    kind = text(values, "kind")
    if kind not in drawer.kinds:
        raise InputError(f"kind {kind!r} does not fit this model; choose one of {', '.join(drawer.kinds)}.")
    return kind


def file_name(query: dict[str, str]) -> str:
    """Name of an uploaded file, for messages and commands: printable and not long."""
    return "".join(letter for letter in query.get("name", "") if letter.isprintable())[-LONGEST_NAME:]


def files_of(image: Tensor, colours: bool) -> dict[str, str]:
    """An image (C, H, W) as the page shows it, and as a file to keep. ``colours``: three channels are RGB."""
    return {
        "picture": picture(image),
        "file": encode64(encode_image(to_uint8(image), colours)),
        "suffix": image_suffix(len(image), np.uint8, colours),
    }


def picture(image: Tensor) -> str:
    """An image (C, H, W) in [-1, 1] as a PNG for display, in base64."""
    return encode64(encode_image(as_rgb(to_uint8(image))))


def encode64(content: bytes) -> str:
    """Bytes as base64, which JSON can hold."""
    return base64.b64encode(content).decode()
