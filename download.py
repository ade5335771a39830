"""Find, fetch and verify a weights file; fit published SiT weights to a mask model.

``find_model("SiT-XL-2-256x256.pt")`` fetches the ImageNet weights that the SiT authors publish (about 2.7 GB, once,
into ``pretrained_models/``), ``find_model("path/to/file.pt")`` reads a file from disk. Nothing here runs code from a
file: tensors come through ``torch.load(weights_only=True)`` or safetensors, and a stranger among the pickled classes
ends the read.

Source of the file and of its name: Ma et al. 2024, arXiv 2401.08740, https://github.com/willisma/SiT.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import nn

from common.disk import file_sha256, write_atomically
from common.errors import InputError, list_some

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
CHUNK_BYTES = 1 << 20
# (depth, width) of the named sizes, only to name a model in a message.
SIZE_NAMES = {(12, 192): "SiT-Ti", (12, 384): "SiT-S", (12, 768): "SiT-B", (24, 1024): "SiT-L", (28, 1152): "SiT-XL"}
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


PUBLISHED_SHAPES = {"SiT-XL-2-256x256.pt": SiTShape(28, 1152, 2, 4, 8, 1001)}


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
    if path.suffix == ".safetensors":
        content, config = _read_safetensors(path)
    else:
        content = _read_torch(path)
        config = content.get("config") if isinstance(content, Mapping) else None
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
    if looks_like_web_page(head):
        raise InputError(f"{path} is a web page, not weights; the download went wrong, delete it and fetch it again")


def looks_like_web_page(head: bytes) -> bool:
    """Whether the first bytes of a file are those of an HTML or XML page."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")


def _read_torch(path: Path) -> object:
    """``torch.load`` with tensors and plain types only; of foreign classes only the Namespace that SiT pickles."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on odd pickle protocols; the error below says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise any exception at all; none of them is a fault of ours
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise InputError(
                f"{path} refers to {refused.group(1)}, which is no tensor and could run code; nothing was run. "
                "Save the state dict alone with torch.save, or as .safetensors"
            ) from error
        reason = (str(error).splitlines() or [""])[0][:120]
        raise InputError(
            f"{path} is damaged or no weights file ({type(error).__name__}: {reason}); fetch or copy it again"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Tensors of a safetensors file, and the JSON under ``config`` in its metadata where there is one."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - it is no dict
        return tensors, json.loads(metadata["config"]) if "config" in metadata else None
    except Exception as error:  # the header is free bytes, so the exception can be any
        reason = (str(error).splitlines() or [""])[0][:120]
        raise InputError(f"{path} is damaged or no safetensors file ({reason}); fetch or copy it again") from error


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
    """Hold a lock beside ``path``. The system drops it when the process dies, so no stale lock can stop anyone."""
    if path.is_file() and hash_file_of(path).is_file():
        yield  # nothing will be written: a read-only folder must do
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no POSIX: at worst two processes fetch the same file, each under a name of its own
        yield
        return
    with path.with_name(path.name + ".lock").open("w") as stream:
        with contextlib.suppress(OSError):  # some network file systems have no locks: as above
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path) -> None:
    """Fetch ``url`` to ``path``: temporary name, every check, hash record, then the final name, in this order."""
    logger.info("fetching %s from %s", path.name, url)

    def fetch_and_check(file: IO[bytes]) -> None:
        digest = _stream_to(url, file)
        file.flush()
        check_published_shape(read_weights(file.name).state_dict, path.name, path)
        # The record comes before the file: were it the other way round, a kill between the two would leave a file
        # that nothing vouches for.
        _record_hash(path, digest)

    try:
        write_atomically(path, fetch_and_check)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"cannot fetch {path.name} ({reason}): download {url} on a machine with network and put the file at "
            f"{path}, or give the path of a weights file on disk"
        ) from error


def _stream_to(url: str, out: IO[bytes]) -> str:
    """Write the body of ``url`` to ``out`` and return its sha256; refuse web pages and short bodies."""
    from tqdm import tqdm

    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
    sha256 = hashlib.sha256()
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        length = int(response.headers.get("Content-Length") or 0)
        bar = tqdm(total=length or None, unit="B", unit_scale=True, desc="weights", disable=None)
        with bar:
            while chunk := response.read(CHUNK_BYTES):
                if out.tell() == 0 and looks_like_web_page(chunk[:512]):
                    raise InputError(f"{url} gave a web page instead of weights; the address may have changed")
                out.write(chunk)
                sha256.update(chunk)
                bar.update(len(chunk))
    written = out.tell()
    if written == 0 or (length and written != length):
        raise InputError(f"{url} gave {written} of {length} bytes; the connection broke, start again")
    return sha256.hexdigest()


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


# --- fitting SiT weights to a mask model ------------------------------------------------------------------------------


@dataclass
class InitReport:
    """What ``adapt_sit_weights`` took, one list of state-dict keys each."""

    kept: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as lines for the log."""
        lines = [f"kept: {len(self.kept)} tensors as they are"]
        for title, names in (
            ("converted (mean half of learn_sigma)", self.converted),
            ("new, from the model's own start", self.new),
            ("dropped from the file", self.dropped),
        ):
            lines.append(f"{title}: {', '.join(names) if names else 'none'}")
        return lines


def adapt_sit_weights(
    state_dict: Mapping[str, torch.Tensor], model: nn.Module
) -> tuple[dict[str, torch.Tensor], InitReport]:
    """Fit SiT weights to a mask model: keep what fits, convert the output rows, start the rest fresh.

    A class table with another number of rows is replaced by the model's own: a row of an ImageNet class means nothing
    for a mask class. Position embeddings of another grid are the model's own, too, and so are patch and output layers
    of another patch size or channel count.

    Args:
        state_dict: SiT keys to tensors, from ``find_model``.
        model: the freshly built model that will train.

    Returns:
        A complete state dict for ``model.load_state_dict(..., strict=True)``, and what happened to which key.

    Raises:
        InputError: depth, width or feed-forward width differ, so that nothing of the network would be kept.
    """
    own = model.state_dict()
    source = plain_keys(state_dict)
    theirs, ours = check_state_dict(source, "the weights"), sit_shape(own)
    _check_trunk(source, own, theirs, ours)
    same_patches = (theirs.patch_size, theirs.in_channels) == (ours.patch_size, ours.in_channels)
    result, report = {}, InitReport()
    for key, fresh in own.items():
        value, list_of_key = source.get(key), report.kept
        if key in FINAL_LINEAR and value is not None:
            # Equal row counts can hide another patch and channel number, where each row means another pixel.
            if not same_patches:
                value = None
            elif theirs.out_channels == 2 * theirs.in_channels and ours.out_channels == ours.in_channels:
                value, list_of_key = mean_rows(value, theirs.patch_size, theirs.in_channels), report.converted
        if value is None or value.shape != fresh.shape:
            result[key] = fresh.clone()
            report.new.append(key)
        else:
            result[key] = value.to(device=fresh.device, dtype=fresh.dtype, copy=True)
            list_of_key.append(key)
    taken = set(report.kept) | set(report.converted)
    report.dropped = [key for key in source if key not in taken]
    return result, report


def mean_rows(value: torch.Tensor, patch_size: int, channels: int) -> torch.Tensor:
    """Rows of the output layer that give the mean, out of a layer that gives mean and sigma.

    A row stands for (patch row, patch column, output channel), in this order, with the channels of the mean before
    those of sigma within each pixel: the first half of all rows would be the upper half of each patch.

    Args:
        value: (p * p * 2C, ...) weight or bias, ... free.
        patch_size: p.
        channels: C.

    Returns:
        (p * p * C, ...), contiguous.
    """
    rest = value.shape[1:]
    rows = value.reshape(patch_size**2, 2 * channels, *rest)  # (p * p, 2C, ...)
    return rows[:, :channels].reshape(patch_size**2 * channels, *rest).contiguous()  # (p * p * C, ...)


def _check_trunk(source: Mapping, own: Mapping, theirs: SiTShape, ours: SiTShape) -> None:
    """Refuse weights whose blocks or time embedding do not fit: what would remain is no start at all."""
    if (theirs.depth, theirs.hidden_size) != (ours.depth, ours.hidden_size):
        raise InputError(
            f"--init-from: the weights are {theirs}, the model is {ours}; choose the --model that has the depth and "
            "width of the weights"
        )
    trunk = [key for key in own if key.startswith(("blocks.", "t_embedder."))]
    clashing = [
        f"{key} {tuple(source[key].shape)} instead of {tuple(own[key].shape)}"
        for key in trunk
        if key in source and source[key].shape != own[key].shape
    ]
    if clashing:
        raise InputError(f"--init-from: the weights do not fit the model: {list_some(clashing)}")
