"""Find, fetch and verify a weights file of SiT.

``find_model("SiT-XL-2-256x256.pt")`` fetches the ImageNet weights that the SiT authors publish (about 2.7 GB, once,
into ``pretrained_models/``), ``find_model("path/to/file.pt")`` reads a file from disk. Nothing here runs code from a
file: tensors come through ``torch.load(weights_only=True)`` or safetensors, and a stranger among the pickled classes
ends the read.

Source of the file and of its name: Ma et al. 2024, arXiv 2401.08740, https://github.com/willisma/SiT.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
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

import filelock
import torch

from common.disk import NO_LOCKS, file_sha256, sync_folder, write_atomically
from common.errors import InputError, list_some
from common.weights import DamagedFile, WouldRunCode, read_tensor_file
from models import SIZES

logger = logging.getLogger(__name__)
DOWNLOAD_FOLDER = Path("pretrained_models")
# The address is the one in SiT's own download.py; what the file must hold is the published model: SiT-XL/2 with
# learn_sigma, 1000 ImageNet classes and the null class, 256 px images as (4, 32, 32) latents.
PUBLISHED_URLS = {
    "SiT-XL-2-256x256.pt": (
        "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
        "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
    ),
}
TIMEOUT_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 3600.0  # for another process that fetches the same file
SIZE_NAMES = {(depth, width): f"SiT-{name}" for name, (depth, width, _) in SIZES.items()}
CLASS_TABLE = "y_embedder.embedding_table.weight"
FINAL_LINEAR = ("final_layer.linear.weight", "final_layer.linear.bias")
PATCH_WEIGHT = "x_embedder.proj.weight"


@dataclass(frozen=True)
class SiTShape:
    """What the tensors of a SiT state dict say about the network (the number of heads leaves no trace in them)."""

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
        state_dict: SiT keys to CPU tensors; the EMA weights where the file has them.
        config: the ``config`` entry of a checkpoint of this project, else None.
        path: the file that was read.
        entry: which part of the file the weights are: ``ema``, ``model`` or ``""`` for a bare state dict.
    """

    state_dict: dict[str, torch.Tensor]
    config: dict | None
    path: Path
    entry: str = ""


def find_model(name_or_path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """State dict of a local file or of a published model by name; see ``find_weights`` for the config beside it."""
    return find_weights(name_or_path).state_dict


def find_weights(name_or_path: str | os.PathLike, folder: str | os.PathLike = DOWNLOAD_FOLDER) -> Weights:
    """Read weights from a local file, or fetch a published file by its name and read that.

    Args:
        name_or_path: a file (.pt, .pth, .ckpt, .safetensors), or a key of ``PUBLISHED_URLS``. A file wins over a name.
        folder: where published files are kept.

    Returns:
        The checked weights on the CPU.

    Raises:
        InputError: no such file or name, no network, or the file does not hold SiT weights.
    """
    path = Path(name_or_path)
    name = str(name_or_path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the weights file inside it (.pt or .safetensors)")
    if path.is_file():
        compare_recorded_hash(path)
        return read_weights(path)
    if name in PUBLISHED_URLS:
        weights = read_weights(fetch_published(name, Path(folder)))
        check_published_shape(weights.state_dict, name, weights.path)
        return weights
    raise InputError(
        f"no weights file {name!r}; give a path to a .pt or .safetensors file, or a published name: "
        f"{', '.join(PUBLISHED_URLS)}"
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def read_weights(path: str | os.PathLike) -> Weights:
    """Read one weights file without running anything in it, and check that it holds SiT weights.

    Takes a bare state dict, a SiT training checkpoint (``ema``, ``model``, ``opt``, ``args``) and a checkpoint of this
    project (``config`` beside them), and prefers ``ema``.

    Args:
        path: .safetensors, else anything ``torch.save`` writes.

    Returns:
        The weights with plain keys (prefixes of DDP and ``torch.compile`` are taken off).

    Raises:
        InputError: the file is absent, torn, no weights file, would run code, or holds other weights than SiT's.
    """
    path = Path(path)
    _check_file(path)
    content, config = _read_content(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict; give a SiT weights file")
    entry = next((name for name in ("ema", "model") if isinstance(content.get(name), Mapping)), "")
    state_dict = plain_keys(content[entry] if entry else content)
    check_state_dict(state_dict, path)
    return Weights(state_dict, config if isinstance(config, dict) else None, path, entry)


def _check_file(path: Path) -> None:
    """Refuse what cannot be weights by its first bytes, with a reason that says what it is instead."""
    if not path.is_file():
        raise InputError(f"no weights file {path}")
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise InputError(f"{path} is empty (0 bytes); fetch or copy it again")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):  # HTML or XML
        raise InputError(f"{path} is a web page, not weights; the download went wrong, delete it and fetch it again")


def _read_content(path: Path) -> tuple[object, object]:
    """Content of a weights file and its ``config``; of foreign classes only the Namespace that SiT pickles."""
    try:
        content, metadata = read_tensor_file(path, allowed=[argparse.Namespace])
        if path.suffix == ".safetensors":
            return content, json.loads(metadata.get("config", "null"))
    except WouldRunCode as error:
        raise InputError(
            f"{path} refers to {error}, which is no tensor and could run code; nothing was run. "
            "Save the state dict alone with torch.save, or as .safetensors"
        ) from error
    except (DamagedFile, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged or no weights file ({error}); fetch or copy it again") from error
    return content, content.get("config") if isinstance(content, Mapping) else None


def plain_keys(state_dict: Mapping) -> dict:
    """The state dict without the prefixes that DDP (``module.``) and ``torch.compile`` (``_orig_mod.``) put on."""
    return {re.sub(r"^(?:(?:module|_orig_mod)\.)+", "", str(key)): value for key, value in state_dict.items()}


def sit_shape(state_dict: Mapping[str, torch.Tensor]) -> SiTShape:
    """Depth, width, patch and channels that the tensors imply.

    Raises:
        KeyError: a tensor that every SiT has is absent.
        ValueError: such a tensor has an impossible number of dimensions.
    """
    hidden_size, in_channels, patch_size, _ = state_dict[PATCH_WEIGHT].shape
    class_rows, _ = state_dict[CLASS_TABLE].shape
    rows = state_dict[FINAL_LINEAR[0]].shape[0]
    blocks = {int(match.group(1)) for match in (re.match(r"blocks\.(\d+)\.", key) for key in state_dict) if match}
    return SiTShape(len(blocks), hidden_size, patch_size, in_channels, rows // max(patch_size**2, 1), class_rows)


def expected_shapes(state_dict: Mapping[str, torch.Tensor], shape: SiTShape) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that a SiT of this shape must have.

    The widths of the feed-forward layer and of the sinusoidal time features are read from the first tensor of their
    kind, since both are free arguments of the network.
    """
    d, p = shape.hidden_size, shape.patch_size
    time_features = state_dict["t_embedder.mlp.0.weight"].shape[-1]
    feed_forward = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    linears = {
        "t_embedder.mlp.0": (d, time_features),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (p * p * shape.out_channels, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for index in range(shape.depth):
        block = f"blocks.{index}."
        linears |= {
            block + "attn.qkv": (3 * d, d),
            block + "attn.proj": (d, d),
            block + "mlp.fc1": (feed_forward, d),
            block + "mlp.fc2": (d, feed_forward),
            block + "adaLN_modulation.1": (6 * d, d),
        }
    expected: dict[str, tuple[int, ...]] = {
        PATCH_WEIGHT: (d, shape.in_channels, p, p),
        "x_embedder.proj.bias": (d,),
        CLASS_TABLE: (shape.class_rows, d),
    }
    for name, size in linears.items():
        expected[name + ".weight"] = size
        expected[name + ".bias"] = size[:1]
    return expected


def check_state_dict(state_dict: Mapping[str, object], where: str | os.PathLike) -> SiTShape:
    """Check that a state dict is a whole SiT: keys, shapes that agree with each other, finite numbers.

    Raises:
        InputError: with the first faults and how many more there are.
    """
    strangers = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if strangers or not state_dict:
        found = f"entries that are no tensors: {list_some(strangers)}" if strangers else "no tensors"
        raise InputError(f"{where} is no SiT state dict: it holds {found}")
    try:
        shape = sit_shape(state_dict)
        expected = expected_shapes(state_dict, shape)
    except KeyError as error:
        raise InputError(f"{where} is no SiT state dict: it has no {error.args[0]}; give SiT weights") from error
    except (ValueError, IndexError) as error:
        raise InputError(f"{where} is no SiT state dict: its tensors have other dimensions than SiT's") from error
    missing = [key for key in expected if key not in state_dict]
    if missing:
        raise InputError(f"{where} is no whole SiT state dict: {len(missing)} tensors missing: {list_some(missing)}")
    misshapen = [
        f"{key} {tuple(state_dict[key].shape)} instead of {size}"
        for key, size in expected.items()
        if tuple(state_dict[key].shape) != size
    ]
    if misshapen:
        raise InputError(f"{where}: {len(misshapen)} tensors do not fit the others: {list_some(misshapen)}")
    broken = [key for key, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise InputError(f"{where} holds NaN or infinite weights: {list_some(broken)}; take an earlier checkpoint")
    return shape


def check_published_shape(state_dict: Mapping[str, torch.Tensor], name: str, path: Path) -> None:
    """Check that a file under a published name holds the published network."""
    shape, published = sit_shape(state_dict), PUBLISHED_SHAPES.get(name)
    if published is not None and shape != published:
        raise InputError(f"{path} holds {shape}, but {name} is {published}; delete it and fetch it again")


# --- fetching --------------------------------------------------------------------------------------------------------


def fetch_published(name: str, folder: Path = DOWNLOAD_FOLDER) -> Path:
    """Path of a published file, fetched when it is not there yet and compared with its recorded hash when it is.

    No hash of the published file is known in advance: the one measured at the first download is written beside it
    (``NAME.sha256``, the format of ``sha256sum``), and every later use must agree with it.

    Raises:
        InputError: unknown name, no network, a torn or wrong download, or a file that changed since.
    """
    if name not in PUBLISHED_URLS:
        raise InputError(f"unknown published model {name!r}; choose one of {', '.join(PUBLISHED_URLS)}")
    path = folder / name
    with _locked(path):  # the ranks of one machine come here together; the first fetches, the others find the file
        if path.is_file():
            compare_recorded_hash(path, record_new=True)
        else:
            _download(PUBLISHED_URLS[name], path)
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock beside ``path``. The system drops it when the process dies, so no stale lock can stop anyone.

    Raises:
        InputError: another process held it for too long.
    """
    if path.is_file() and hash_file_of(path).is_file():
        yield  # nothing will be written: a read-only folder must do
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(path.name + ".lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("waiting for another process that fetches %s (it holds %s)", path.name, lock.lock_file)
            lock.acquire(timeout=LONGEST_WAIT_SECONDS)
    except filelock.Timeout as error:
        raise InputError(
            f"waited {LONGEST_WAIT_SECONDS / 60:.0f} minutes for another process that fetches {path.name}: end it "
            f"(it holds {lock.lock_file}), and start again"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: no locks here, so another process may fetch %s as well", path.parent, path.name)
    try:
        yield
    finally:
        lock.release()


def _download(url: str, path: Path) -> None:
    """Fetch ``url`` to ``path``: temporary name, every check, hash record, then the final name, in this order."""
    logger.info("fetching %s from %s", path.name, url)
    for leftover in path.parent.glob(f".{path.name}.*"):  # of killed downloads; the lock keeps others out
        leftover.unlink(missing_ok=True)
    # the suffix says the format
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        with _socket_timeout(TIMEOUT_SECONDS):
            torch.hub.download_url_to_file(url, str(partial), progress=sys.stderr.isatty())
        _check_fetched(url, partial, path)
        # The record comes before the file: were it the other way round, a kill between the two would leave a file
        # that nothing vouches for.
        _record_hash(path, file_sha256(partial))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"cannot fetch {path.name} ({reason}): download {url} on a machine with network and put the file at "
            f"{path}, or give the path of a weights file on disk"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_fetched(url: str, partial: Path, path: Path) -> None:
    """Refuse a web page, a short body and another network, in words that name the address."""
    if partial.stat().st_size == 0:
        raise InputError(f"{url} gave 0 of 0 bytes; the connection broke, start again")
    try:
        weights = read_weights(partial)
    except InputError as error:
        reason = str(error).replace(str(partial), "the file")
        raise InputError(f"cannot fetch {path.name}: {reason}. It came from {url}") from error
    check_published_shape(weights.state_dict, path.name, path)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """The longest silence on a connection that is opened meanwhile."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def hash_file_of(path: Path) -> Path:
    """Where the hash of a weights file is recorded."""
    return path.with_name(path.name + ".sha256")


def compare_recorded_hash(path: Path, record_new: bool = False) -> None:
    """Compare a file with the hash recorded beside it; without a record do nothing, or make one.

    Args:
        path: the weights file.
        record_new: write the record where there is none (a published file that the user put there).

    Raises:
        InputError: the file is not the one that was recorded.
    """
    record = hash_file_of(path)
    if not record.is_file():
        if record_new:
            read_weights(path)  # a torn file must not become the reference
            _record_hash(path, file_sha256(path))
        return
    recorded = _recorded_hash(record)
    if recorded != (found := file_sha256(path)):
        raise InputError(
            f"{path} changed since it was recorded (sha256 {found[:16]}, in {record.name} {recorded[:16]}): "
            f"delete both and fetch again, or delete {record.name} alone if you replaced the weights yourself"
        )


def _recorded_hash(record: Path) -> str:
    words = record.read_text(encoding="utf-8", errors="replace").split()
    return words[0].lower() if words else ""


def _record_hash(path: Path, digest: str) -> None:
    """Write ``path``'s hash record atomically; a record that is there already must agree."""
    record = hash_file_of(path)
    if record.is_file() and (recorded := _recorded_hash(record)) != digest:
        raise InputError(
            f"{path.name} as fetched has sha256 {digest[:16]}, but {record} says {recorded[:16]}: the published file "
            f"changed or the download is wrong; delete {record.name} to accept the new one"
        )
    write_atomically(record, lambda file: file.write(f"{digest}  {path.name}\n".encode()))
