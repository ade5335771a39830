"""Weights & Biases, for runs with ``--wandb``. Other runs work without the package.

Only this file imports wandb, and only when it is needed. It looks for a login in this order:

1. environment variables: ``WANDB_API_KEY`` (and ``WANDB_ENTITY``, ``WANDB_PROJECT``, ``WANDB_BASE_URL``,
   ``WANDB_MODE``);
2. ``wandb login``: wandb says whether it finds a key for its server;
3. the three constants below. They may stay as they are.

``WANDB_MODE=offline`` needs no key. ``wandb sync RUN_FOLDER/wandb/offline-*`` uploads later. This file writes no key to
any file. If no run was started, ``log``, ``log_image`` and ``finish`` do nothing, so callers need no ``if``.
"""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import logging
import os
import re
import secrets
import socket
import sys
import threading
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.disk import write_bytes
from common.errors import InputError
from common.faults import short_line

logger = logging.getLogger(__name__)
WANDB_ENTITY = "YOUR_WANDB_ENTITY"
WANDB_PROJECT = "YOUR_WANDB_PROJECT"
WANDB_API_KEY = "YOUR_WANDB_API_KEY"
PLACEHOLDER_PREFIX = "YOUR_"
DEFAULT_PROJECT = "mask-to-image"
CONNECT_SECONDS = 5
INIT_SECONDS = 30
FINISH_SECONDS = 600.0  # longest wait for the upload at the end
STOPPED_SECONDS = 10.0  # the same if a signal ends the run: torchrun kills its processes after 30 seconds
SAY_SECONDS = 10.0  # a longer wait is logged
KEYLESS_MODES = ("offline", "dryrun", "disabled")
MODES = ("online", "run", "shared", *KEYLESS_MODES)  # modes of wandb; empty means online
ID_FILE = "wandb_id.txt"
_run: Any = None  # the wandb.Run of this process; None on ranks above 0 and in runs without --wandb


def from_environment(name: str, constant: str) -> str | None:
    """Value of an environment variable. If it is not set, the constant; None if that is still a placeholder."""
    value = os.environ.get(name, "").strip()
    if value:
        return value
    constant = constant.strip()
    return constant if constant and not constant.startswith(PLACEHOLDER_PREFIX) else None


def _import_wandb() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # wandb's own, on import
        import wandb
    return wandb


def has_login() -> bool:
    """Whether wandb finds a login for its server. Only wandb knows where it keeps keys, and the address."""
    wandb = _import_wandb()
    try:
        if "prompt" in inspect.signature(wandb.login).parameters:
            return bool(wandb.login(prompt=False, verify=False))
        return bool((wandb.api.api_key or "").strip())  # versions whose login would ask on the terminal
    except Exception:  # noqa: BLE001 - a damaged file, or a key of the wrong form: wandb has many exceptions
        return False


def check_server() -> None:
    """Check within seconds that the server of wandb answers. wandb itself tries for minutes.

    Raises:
        InputError: the server cannot be reached.
    """
    proxies = urllib.request.getproxies()
    if os.environ.get("WANDB_MODE", "").strip().lower() in KEYLESS_MODES or proxies:
        return  # nothing is sent, or a proxy is used, which is not tested
    address = urlsplit(_import_wandb().setup().settings.base_url)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"wandb: {address.hostname} cannot be reached ({error.strerror or error}); check the network, or set "
            "WANDB_MODE=offline (upload later with wandb sync), or leave out `wandb`"
        ) from None


def check_wandb() -> None:
    """Check before any work that ``--wandb`` can work.

    Raises:
        InputError: wandb is not installed, its mode is unknown, or there is neither key, nor login, nor offline mode.
    """
    if importlib.util.find_spec("wandb") is None:
        raise InputError("wandb is not installed; run pip install wandb, or leave out `wandb`")
    mode = os.environ.get("WANDB_MODE", "").strip().lower()
    if mode and mode not in MODES:
        raise InputError(f"wandb: WANDB_MODE={mode} is unknown: set it to online, offline or disabled, or unset it")
    if mode in KEYLESS_MODES:
        return
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or from_environment("WANDB_API_KEY", WANDB_API_KEY) or has_login():
        return
    raise InputError(
        "wandb: no key found; set WANDB_API_KEY in the environment, or run wandb login once, or set "
        "WANDB_MODE=offline (upload later with wandb sync), or leave out `wandb`"
    )


def run_id(run_folder: str | os.PathLike) -> str:
    """Id of this run at wandb: a random text that the run folder keeps.

    It is no hash of the run's name, because two machines may use the same name.

    Raises:
        InputError: the file does not hold an id.
    """
    file = Path(run_folder) / ID_FILE
    if file.is_file():
        identity = file.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", identity):
            raise InputError(f"{file} does not hold a wandb run id; delete it to log to a new run")
        return identity
    identity = secrets.token_hex(8)
    write_bytes(file, f"{identity}\n".encode())
    return identity


def start_run(run_folder: str | os.PathLike, run_name: str, config: Mapping[str, Any]) -> None:
    """Start or continue the wandb run of a run folder. Does nothing on ranks above 0.

    Args:
        run_folder: existing folder. wandb keeps its files in ``wandb/`` there, and the id is in ``wandb_id.txt``.
        run_name: name shown at wandb.
        config: plain settings shown at wandb.

    Raises:
        InputError: there is no login (see ``check_wandb``), or wandb refused to start.
    """
    global _run
    if int(os.environ.get("RANK", "0")) != 0:
        return
    check_wandb()
    key = from_environment("WANDB_API_KEY", WANDB_API_KEY)
    if key and not os.environ.get("WANDB_API_KEY", "").strip() and not has_login():
        os.environ["WANDB_API_KEY"] = key  # not wandb.login(key=...), which writes the key to ~/.netrc
    wandb = _import_wandb()
    try:
        _run = wandb.init(
            entity=from_environment("WANDB_ENTITY", WANDB_ENTITY),
            project=from_environment("WANDB_PROJECT", WANDB_PROJECT) or DEFAULT_PROJECT,
            name=run_name,
            id=run_id(run_folder),
            resume="allow",
            dir=str(run_folder),
            config=dict(config),
            # wandb could store uncommitted changes of the repository, and with them a key in the constant above.
            settings=wandb.Settings(disable_git=True, save_code=False, init_timeout=INIT_SECONDS),
        )
    except Exception as error:  # wandb has many exceptions, of its own, of the network and of the settings
        raise InputError(
            f"wandb: the run could not start ({_reason(error)}); check the key and the network, or set "
            "WANDB_MODE=offline, or leave out `wandb`"
        ) from None  # the chained exception could show the key


def without_key(text: str) -> str:
    """The text with any API key that this process knows replaced by ***."""
    for key in (os.environ.get("WANDB_API_KEY", "").strip(), WANDB_API_KEY.strip()):
        if key and not key.startswith(PLACEHOLDER_PREFIX):
            text = text.replace(key, "***")
    return text


def _reason(error: Exception) -> str:
    """An error as one short line. A key is hidden before the line is cut."""
    return without_key(short_line(error, most=sys.maxsize))[:300]


def log(metrics: Mapping[str, float], step: int) -> None:
    """Log scalars of a training step. Skips steps that were logged before.

    A killed run repeats the steps since its last checkpoint, with the same numbers.
    """
    if _run is not None and step >= _run.step:
        _log(dict(metrics), step)


def log_image(name: str, path: str | os.PathLike, step: int) -> None:
    """Log a picture file under ``name`` at a training step."""
    if _run is not None and step >= _run.step:
        import wandb

        _log({name: wandb.Image(str(path))}, step)


def _log(values: dict[str, Any], step: int) -> None:
    """Log values. If that fails, as when the process of wandb was killed, the training goes on without wandb."""
    global _run
    assert _run is not None
    try:
        _run.log(values, step=step)
    except Exception as error:  # noqa: BLE001 - metrics.jsonl has the same numbers; wandb has many exceptions
        logger.warning("wandb: no more is logged there (%s); metrics.jsonl has all metrics", _reason(error))
        _run = None


def finish(exit_code: int = 0) -> None:
    """End the run and wait for its upload, at most ``FINISH_SECONDS``.

    A code other than 0 says that a signal ends the run: it is marked as failed, and the wait is ``STOPPED_SECONDS`` at
    most. If the upload takes longer, the files stay in the run folder, and a warning says how to upload them.
    """
    global _run
    if _run is None:
        return
    run, _run = _run, None
    most = STOPPED_SECONDS if exit_code else FINISH_SECONDS
    ending = threading.Thread(target=_finish, args=(run, exit_code), daemon=True)
    ending.start()
    ending.join(min(SAY_SECONDS, most))
    if ending.is_alive() and most > SAY_SECONDS:
        logger.info("waiting for the upload to wandb, at most %.0f seconds", most)
        ending.join(most - SAY_SECONDS)
    if ending.is_alive():
        logger.warning(
            "wandb: the upload did not end in %.0f seconds. The files are kept: run wandb sync %s",
            most, getattr(run, "dir", "RUN_FOLDER/wandb/run-*"),
        )  # fmt: skip
        atexit.register(_leave, exit_code)  # runs before wandb's own, which would wait again


def _finish(run: Any, exit_code: int) -> None:
    try:
        run.finish(exit_code=exit_code)
    except Exception as error:  # noqa: BLE001 - the training is done; wandb has many exceptions
        logger.warning("wandb: the run did not end in order (%s)", _reason(error))


def _leave(exit_code: int) -> None:
    """End this process at once."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)
