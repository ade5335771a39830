"""Find, download and verify a weights file of SiT.

``find_model("SiT-XL-2-256x256.pt")`` downloads the ImageNet weights published by the SiT authors (about 2.7 GB, once,
into ``pretrained_models/``). ``find_model("path/to/file.pt")`` reads a file from disk. Neither runs code from a file:
tensors are read by ``torch.load(weights_only=True)`` or safetensors, and an unknown pickled class is an error.

Source of the file and of its name: Ma et al. 2024, arXiv 2401.08740, https://github.com/willisma/SiT.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import logging
import os
import re
import secrets
import socket
import sys
import urllib.error
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from common.disk import file_sha256, sync_folder, write_bytes
from common.errors import InputError, list_some
from common.locks import one_maker
from common.plain import parse_json
from common.weights import WouldRunCode, read_tensor_file
from models import SIZES, SiT

logger = logging.getLogger(__name__)
DOWNLOAD_FOLDER = Path("pretrained_models")
# The address is the one in SiT's own download.py. The file must hold the published model: SiT-XL/2 with learn_sigma,
# 1000 ImageNet classes and the null class, for 256 px images as (4, 32, 32) latents.
PUBLISHED_URLS = {
    "SiT-XL-2-256x256.pt": (
        "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
        "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
    ),
}
TIMEOUT_SECONDS = 30.0
SIZE_NAMES = {(depth, width): f"SiT-{name}" for name, (depth, width, _) in SIZES.items()}
CLASS_TABLE = "y_embedder.embedding_table.weight"
FINAL_LINEAR = ("final_layer.linear.weight", "final_layer.linear.bias")
PATCH_WEIGHT = "x_embedder.proj.weight"


@dataclass(frozen=True)
class SiTShape:
    """Shape of the network that a SiT state dict belongs to. (The tensors do not tell the number of heads.)"""

    depth: int
    hidden_size: int
    patch_size: int
    in_channels: int
    out_channels: int
    class_rows: int

    def __str__(self) -> str:
        name = SIZE_NAMES.get((self.depth, self.hidden_size))
        words = f"{self.depth} blocks of width {self.hidden_size}, patch {self.patch_size}, {self.in_channels} channels"
        return f"{name}/{self.patch_size} ({words})" if name else words


PUBLISHED_SHAPES = {"SiT-XL-2-256x256.pt": SiTShape(*SIZES["XL"][:2], 2, 4, 8, 1001)}


@dataclass(frozen=True)
class Weights:
    """A weights file, read and checked.

    Attributes:
        state_dict: SiT keys to CPU tensors. The EMA weights, if the file has them.
        config: the ``config`` entry of a checkpoint of this project, else None.
        path: the file that was read.
    """

    state_dict: dict[str, torch.Tensor]
    config: dict | None
    path: Path


def find_model(name_or_path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """State dict of a local file, or of a published model by its name. ``find_weights`` also gives the config."""
    return find_weights(name_or_path).state_dict


def find_weights(name_or_path: str | os.PathLike) -> Weights:
    """Read weights from a local file, or download a published file by its name and read it.

    Args:
        name_or_path: a file (.pt, .pth, .ckpt, .safetensors), or a key of ``PUBLISHED_URLS``. A local file of the same
            name takes precedence.

    Returns:
        The checked weights on the CPU.

    Raises:
        InputError: there is no such file or name, no network, or the file does not hold SiT weights.
    """
    path = Path(name_or_path)
    name = str(name_or_path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the weights file inside it (.pt or .safetensors)")
    if path.is_file():
        compare_recorded_hash(path)
        return read_weights(path)
    if name in PUBLISHED_URLS:
        weights = read_weights(fetch_published(name))
        check_published_shape(weights.state_dict, name, weights.path)
        return weights
    raise InputError(
        f"no weights file {name!r}; give a path to a .pt or .safetensors file, or a published name: "
        f"{', '.join(PUBLISHED_URLS)}"
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def read_weights(path: str | os.PathLike) -> Weights:
    """Read one weights file without running code from it, and check that it holds SiT weights.

    Accepts a bare state dict, a SiT training checkpoint (``ema``, ``model``, ``opt``, ``args``) and a checkpoint of
    this project (which also has ``config``). Uses ``ema`` if there is one.

    Args:
        path: .safetensors, or a file written by ``torch.save``.

    Returns:
        The weights with plain keys (without the prefixes of DDP and ``torch.compile``).

    Raises:
        InputError: the file is missing, damaged, not a weights file, would run code, or holds weights of another model.
    """
    path = Path(path)
    _check_file(path)
    content, config = _read_content(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict; give a SiT weights file")
    entry = next((name for name in ("ema", "model") if isinstance(content.get(name), Mapping)), "")
    state_dict = plain_keys(content[entry] if entry else content)
    check_state_dict(state_dict, path)
    return Weights(state_dict, config if isinstance(config, dict) else None, path)


def _check_file(path: Path) -> None:
    """Refuse files that cannot be weights, by their first bytes, and say what they are instead."""
    if not path.is_file():
        raise InputError(f"no weights file {path}")
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise InputError(f"{path} is empty (0 bytes); download or copy it again")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):  # HTML or XML
        raise InputError(f"{path} is a web page, not weights; the download failed, delete it and download it again")


def _read_content(path: Path) -> tuple[object, object]:
    """Content of a weights file and its ``config``. The only other class allowed is the Namespace that SiT pickles."""
    try:
        content, metadata = read_tensor_file(path, allowed=[argparse.Namespace])
        if path.suffix == ".safetensors":
            return content, parse_json(metadata.get("config", "null"))
    except WouldRunCode as error:
        raise InputError(
            f"{path} refers to {error}, which is not a tensor and could run code; nothing was run. "
            "Save the state dict alone with torch.save, or as .safetensors"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is damaged or not a weights file ({error}); download or copy it again") from error
    return content, content.get("config") if isinstance(content, Mapping) else None


def plain_keys(state_dict: Mapping) -> dict:
    """The state dict without the key prefixes of DDP (``module.``) and ``torch.compile`` (``_orig_mod.``)."""
    return {re.sub(r"^(?:(?:module|_orig_mod)\.)+", "", str(key)): value for key, value in state_dict.items()}


def sit_shape(state_dict: Mapping[str, torch.Tensor]) -> SiTShape:
    """Depth, width, patch size and channels of the network, from its tensors.

    Raises:
        KeyError: a tensor that every SiT has is missing.
        ValueError: such a tensor is empty, or has a wrong number of dimensions.
    """
    hidden_size, in_channels, patch_size, _ = state_dict[PATCH_WEIGHT].shape
    class_rows, _ = state_dict[CLASS_TABLE].shape
    if 0 in (hidden_size, in_channels, patch_size, class_rows):
        raise ValueError("a tensor of the network is empty")
    rows = state_dict[FINAL_LINEAR[0]].shape[0]
    blocks = {int(match.group(1)) for match in (re.match(r"blocks\.(\d+)\.", key) for key in state_dict) if match}
    return SiTShape(len(blocks), hidden_size, patch_size, in_channels, rows // patch_size**2, class_rows)


def expected_shapes(shape: SiTShape, feed_forward: int) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that a SiT of this shape must have. ``feed_forward`` is the width of its MLPs."""
    with torch.device("meta"):
        model = SiT(
            input_size=shape.patch_size,
            patch_size=shape.patch_size,
            in_channels=shape.in_channels,
            hidden_size=shape.hidden_size,
            depth=shape.depth,
            num_heads=1,
            mlp_ratio=(feed_forward + 0.5) / shape.hidden_size,  # SiT rounds the width down
            num_classes=shape.class_rows - 1,
            learn_sigma=shape.out_channels == 2 * shape.in_channels,
        )
    return {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}


def check_state_dict(state_dict: Mapping[str, object], where: str | os.PathLike) -> SiTShape:
    """Check that a state dict is a complete SiT: all keys, consistent shapes, finite numbers.

    Raises:
        InputError: lists the first faults and the number of others.
    """
    strangers = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if strangers or not state_dict:
        found = f"entries that are not tensors: {list_some(strangers)}" if strangers else "no tensors"
        raise InputError(f"{where} is not a SiT state dict: it holds {found}")
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
    try:
        shape = sit_shape(tensors)
        expected = expected_shapes(shape, tensors["blocks.0.mlp.fc1.weight"].shape[0])
    except KeyError as error:
        raise InputError(f"{where} is not a SiT state dict: it has no {error.args[0]}; give SiT weights") from error
    except (ValueError, IndexError) as error:
        raise InputError(f"{where} is not a SiT state dict: its tensors have other dimensions than SiT's") from error
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise InputError(
            f"{where} is not a complete SiT state dict: {len(missing)} tensors missing: {list_some(missing)}"
        )
    misshapen = [
        f"{key} {tuple(tensors[key].shape)} instead of {size}"
        for key, size in expected.items()
        if tuple(tensors[key].shape) != size
    ]
    if misshapen:
        raise InputError(f"{where}: {len(misshapen)} tensors have wrong shapes: {list_some(misshapen)}")
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise InputError(f"{where} holds NaN or infinite weights: {list_some(broken)}; use an earlier checkpoint")
    return shape


def check_published_shape(state_dict: Mapping[str, torch.Tensor], name: str, path: Path) -> None:
    """Check that a file under a published name holds the published network."""
    shape, published = sit_shape(state_dict), PUBLISHED_SHAPES.get(name)
    if published is not None and shape != published:
        raise InputError(f"{path} holds {shape}, but {name} is {published}; delete it and download it again")


# --- downloading -----------------------------------------------------------------------------------------------------


def fetch_published(name: str) -> Path:
    """Path of a file of ``PUBLISHED_URLS``. Downloads it if it is missing, else compares it with its recorded hash.

    The hash of the published file is not known in advance. The first download writes its hash beside the file
    (``NAME.sha256``, in the format of ``sha256sum``). Every later use compares the file with this record.

    Raises:
        InputError: there is no network, the download is damaged or wrong, or the file has changed.
    """
    path = DOWNLOAD_FOLDER / name
    ready = path.is_file() and hash_file_of(path).is_file()  # nothing is written then: the folder may be read-only
    with contextlib.nullcontext() if ready else one_maker(path, "downloads"):
        if path.is_file():
            compare_recorded_hash(path, record_new=True)
        else:
            _download(PUBLISHED_URLS[name], path)
    return path


def _download(url: str, path: Path) -> None:
    """Download ``url`` to ``path``. In this order: temporary file, all checks, hash record, final name."""
    logger.info("downloading %s from %s", path.name, url)
    for leftover in path.parent.glob(f".{path.name}.*"):  # left by killed downloads; the lock excludes running ones
        leftover.unlink(missing_ok=True)
    # keep the suffix, because it tells the format
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        with _socket_timeout(TIMEOUT_SECONDS):
            torch.hub.download_url_to_file(url, str(partial), progress=sys.stderr.isatty())
        _check_fetched(url, partial, path)
        # Write the record before the file. In the other order, a kill in between would leave a file without a record.
        _record_hash(path, file_sha256(partial))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"cannot download {path.name} ({reason}): download {url} on a machine with network and copy the file to "
            f"{path}, or give the path of a weights file on disk"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_fetched(url: str, partial: Path, path: Path) -> None:
    """Refuse a web page, an incomplete file and another network. The message names the address."""
    if partial.stat().st_size == 0:
        raise InputError(f"{url} gave 0 bytes; the connection broke, start again")
    try:
        weights = read_weights(partial)
    except InputError as error:
        reason = str(error).replace(str(partial), "the file")
        raise InputError(f"cannot download {path.name}: {reason}. It came from {url}") from error
    check_published_shape(weights.state_dict, path.name, path)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set the timeout of new connections within this context."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def hash_file_of(path: Path) -> Path:
    """Path of the recorded hash of a weights file."""
    return path.with_name(path.name + ".sha256")


def compare_recorded_hash(path: Path, record_new: bool = False) -> None:
    """Compare a file with the hash recorded beside it. Without a record, do nothing or write one.

    Args:
        path: the weights file.
        record_new: write a record if there is none (for a published file that the user copied there).

    Raises:
        InputError: the file has another hash.
    """
    record = hash_file_of(path)
    if not record.is_file():
        if record_new:
            read_weights(path)  # a damaged file must not become the reference
            _record_hash(path, file_sha256(path))
        return
    recorded, found = _recorded_hash(record), file_sha256(path)
    if recorded != found:
        raise InputError(
            f"{path} changed since it was recorded (sha256 {found[:16]}, in {record.name} {recorded[:16]}): "
            f"delete both and download again, or only delete {record.name} if you replaced the weights yourself"
        )


def _recorded_hash(record: Path) -> str:
    words = record.read_text(encoding="utf-8", errors="replace").split()
    return words[0].lower() if words else ""


def _record_hash(path: Path, digest: str) -> None:
    """Write the hash record of ``path`` atomically. An existing record must agree."""
    record = hash_file_of(path)
    if record.is_file() and (recorded := _recorded_hash(record)) != digest:
        raise InputError(
            f"the downloaded {path.name} has sha256 {digest[:16]}, but {record} says {recorded[:16]}: the published "
            f"file has changed or the download is wrong; delete {record.name} to accept the new one"
        )
    write_bytes(record, f"{digest}  {path.name}\n".encode())
