"""InputError for unusable user input, and how a command ends with it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.faults import fault_of_machine, package_fault, write_bug_report

EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_LOST_PROCESS = 1
EXIT_INTERRUPTED = 130
FIRST_RANK_SPEAKS_SECONDS = 3.0
# What asks a command to end: a job's end, Ctrl-C, a closed terminal, and Slurm's warning before the time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_FULL = "Free some space and run the same command again: nothing that was finished is lost"
_CLOSED = "Give a folder that may be written to"
MENDS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "The system allows no larger file here (ulimit -f, or the kind of disk): what was made so far is kept",
    errno.EROFS: _CLOSED,
    errno.EACCES: _CLOSED.replace("that may be", "or file that may be read and"),
}


# Fields whose flag has a different name.
FLAGS = {"channels": "in_channels"}
_FIELD = re.compile("`([a-z_]+)`")
# NAME=VALUE of a setting that is also a flag of the commands, as a word: folders have such names, too.
_NAMES = (
    "crop|image_size|in_channels|intensity|look|mask_type|mask_values|normalize_masks|num_classes|vae|"
    "window(?:_[a-z]+)?"
)
_SETTING = re.compile(
    rf"""(?<![^\s('"])(?P<name>{_NAMES})=(?P<value>\([^)]*\)|-?[\w.]*\w)(?![^\s).,;:'"])(?![.,;:]\w)"""
)


class InputError(ValueError):
    """The user's input cannot be used.

    The message is the one line that the user sees: what is wrong (value), where (file or field), and how to fix it.

    Args:
        message: the line. Libraries name their fields in it, in backquotes: "`crop` 'x' is unknown". A command shows
            them as flags: "--crop 'x' is unknown". The text of the error has neither: "crop 'x' is unknown".
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def marked(self) -> str:
        """The message with its backquotes, for a message that is made from this one."""
        return self.args[0]

    def __str__(self) -> str:
        return unmarked(self.marked)


class LostProcess(RuntimeError):
    """Another process of this launch has ended, does not answer or is too slow. The message names it in one line."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text, unless there is none, the text names it or the flag takes no value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.nargs == 0 or action.default in ([], ())
        if none or "(default" in str(action.help):
            return action.help
        if isinstance(action.default, (list, tuple)):
            shown = [one if isinstance(one, str) else f"{one:g}" for one in action.default]
            return f"{action.help} (default: {' '.join(shown)})"
        return super()._get_help_string(action)


class _Given(argparse.Action):
    """Records the name of every flag on the command line in ``args.given``."""

    def __call__(self, parser: argparse.ArgumentParser, args: argparse.Namespace, *rest: Any) -> None:
        super().__call__(parser, args, *rest)
        args.given |= {self.dest}


class _Store(_Given, argparse._StoreAction):
    pass


class _StoreTrue(_Given, argparse._StoreTrueAction):
    pass


class _StoreFalse(argparse._StoreFalseAction):
    """Records the flag itself: ``--no-colour`` is ``no_colour``, though it sets ``colour``."""

    def __call__(self, parser: argparse.ArgumentParser, args: argparse.Namespace, *rest: Any) -> None:
        super().__call__(parser, args, *rest)
        args.given |= {self.option_strings[0].lstrip("-").replace("-", "_")}


class CommandParser(argparse.ArgumentParser):
    """Argument parser of all commands: no abbreviated flags, defaults in the help, one line for a wrong flag.

    The parsed arguments also hold ``given``: the names of the flags on the command line.
    """

    def __init__(self, **arguments: Any) -> None:
        own: dict[str, Any] = {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(**(own | arguments))
        self.set_defaults(given=frozenset())
        kinds = {None: _Store, "store": _Store, "store_true": _StoreTrue, "store_false": _StoreFalse}
        for name, action in kinds.items():
            self.register("action", name, action)

    def add_subparsers(self, **arguments: Any) -> Any:
        """As argparse, and the help says where the flags of a subcommand are listed."""
        name = str(arguments.get("metavar", "NAME")).partition("|")[0]
        self.epilog = f"All flags: {self.prog} {name} --help"
        return super().add_subparsers(**arguments)

    def error(self, message: str) -> NoReturn:
        """End with one line on stderr and exit code 2. Under torchrun, only the first process prints."""
        if speaks_first():
            line = f"{self.prog}: error: {message}{self._meant(message)}; see --help"
            print(printable(line), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)

    def check_value(self, name: str, value: Any) -> None:
        """Check a value that comes from a file like one on the command line. Leaves out None and switches.

        Raises:
            InputError: the flag of this name would refuse the value.
        """
        action = next((one for one in self._actions if one.dest == name and one.nargs != 0), None)
        if action is None or value is None:
            return
        for one in value if isinstance(value, (list, tuple)) else [value]:
            try:
                known = self._get_value(action, str(one))
                self._check_value(action, known)
            except argparse.ArgumentError as error:
                raise InputError(f"`{name}` {error.message}") from error

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print the help. The reader may have seen enough, as in ``--help | head``."""
        with contextlib.suppress(BrokenPipeError):
            super()._print_message(message, file)
            (file or sys.stderr).flush()
            return
        forget_stdout()

    def _meant(self, message: str) -> str:
        """Suggest the flag that a misspelt one resembles."""
        words = message.partition("unrecognized arguments: ")[2].split()
        meant = [difflib.get_close_matches(w, self._option_string_actions, 1) for w in words if w.startswith("--")]
        names = [name for match in meant for name in match]
        return f" (did you mean {', '.join(names)}?)" if names else ""


# A path of Windows, and what to do with it. The commands run in WSL there.
_WINDOWS_PATH = re.compile(r"(?<!\w)[A-Za-z]:\\")
WSL_PATH = r". In WSL, C:\data is /mnt/c/data."
# Characters that change what a terminal shows: controls, directions of writing, and bytes that are no text.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, keep: str = "") -> str:
    """Text in which control characters are escaped, so that a file name cannot change what a terminal shows.

    Args:
        keep: control characters to keep, such as line ends.
    """

    def escaped(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else match[0].encode("unicode_escape", "backslashreplace").decode()

    return _UNPRINTABLE.sub(escaped, str(text))


def list_some(items: Sequence[object], most: int = 3) -> str:
    """The first few items and how many more there are: ``a, b, c and 4 more``."""
    shown = ", ".join(str(item) for item in items[:most])
    rest = len(items) - most
    return f"{shown} and {rest} more" if rest > 0 else shown


def as_flag(name: str) -> str:
    """``tile_scale`` -> ``--tile-scale``."""
    return f"--{name.replace('_', '-')}"


def settings_as_flags(text: str) -> str:
    """Replace settings in a library's message by flags: ``mask_type=binary`` becomes ``--mask-type binary``."""

    def flag(match: re.Match[str]) -> str:
        value = match["value"].strip("()").replace(",", "")
        return as_flag(match["name"]) + ("" if value == "True" else f" {value}")

    return _SETTING.sub(flag, text)


def one_line(error: Exception) -> str:
    """An error as one line. For errors of the operating system: file, what is wrong, how to fix it.

    Fields of an :class:`InputError` stay marked.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        mend = f". {MENDS[error.errno]}." if error.errno in MENDS else "."
        return f"{error.filename2 or error.filename}: {error.strerror}{mend}"
    return settings_as_flags(" ".join((error.marked if isinstance(error, InputError) else str(error)).split()))


def unmarked(message: str) -> str:
    """The message of an :class:`InputError` without backquotes around its fields."""
    return _FIELD.sub(r"\1", message)


def with_flags(message: str, args: argparse.Namespace | None = None) -> str:
    """The message of an :class:`InputError` with its fields as flags, if the command of ``args`` has these flags."""

    def shown(match: re.Match[str]) -> str:
        names = (FLAGS.get(match[1], match[1]), match[1])
        name = next((one for one in names if args is None or one in vars(args)), None)
        return match[1] if name is None else as_flag(name)

    return _FIELD.sub(shown, message)


def speaks_first() -> bool:
    """Whether this is the first process of its machine. A LOCAL_RANK that is left over in a shell does not count."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def forget_stdout() -> None:
    """Send what is still printed nowhere, as nobody reads it. Otherwise, Python complains when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def end_at_interrupt() -> None:
    """Let Ctrl-C end this process in one line. Commands call this before their imports, which take seconds.

    A package that is missing, damaged or too old ends it in one line, too. Characters that stdout cannot show are
    escaped. It also opens the streams that the caller has closed, so that nothing else is written into a file in their
    place, and refuses a current folder that was deleted, which would end the imports without a word about it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - it takes the number of the closed stream
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python does for stderr
    sys.excepthook = _end_at_import
    try:
        Path.cwd()
    except FileNotFoundError:
        line = f"{Path(sys.argv[0]).name}: error: the current folder was deleted: change to another one with cd"
        print(line, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in the background, where it is ignored
        signal.signal(signal.SIGINT, _end_now)


def _end_at_import(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Explain a failed import; show other errors as Python does."""
    message = package_fault(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
        return
    if speaks_first():
        print(printable(f"{Path(sys.argv[0]).name}: error: {message}"), file=sys.stderr, flush=True)
    os._exit(EXIT_BAD_INPUT)


def _end_now(*_: object) -> None:
    if speaks_first():
        os.write(2, f"{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(EXIT_INTERRUPTED)


def run_command(main: Callable[[argparse.Namespace], None], parse_args: Callable[[], argparse.Namespace]) -> None:
    """Parse the command line and run ``main``. If the user's input is wrong, print one line and end with exit code 2.

    The user can also fix errors of the operating system (full disk, no write permission) and samples that are not
    finite, so they end in the same way. Under torchrun, most errors occur in every process. The first process of each
    machine prints its message at once. The others wait, and torchrun ends them meanwhile. If only one process has an
    error, it prints its message after the wait. A process that ends because another one is lost waits longest.

    Faults of the machine, such as too little memory, also end in one line and exit code 2. Every other error is a bug
    of ours: it ends with a traceback and a file for a bug report.
    """
    args = parse_args()
    if signal.getsignal(signal.SIGINT) is _end_now:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    program = Path(sys.argv[0]).name
    rank = os.environ.get("RANK", "0")
    try:
        main(args)
    except LostProcess as error:
        _let_others_speak(2 * FIRST_RANK_SPEAKS_SECONDS)  # the process with the error should print first
        line = f"{program}: process {rank} on {socket.gethostname()} ends: {error}"
        print(printable(line), file=sys.stderr, flush=True)
        os._exit(EXIT_LOST_PROCESS)  # an unfinished exchange on a GPU would block a normal exit
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - whatever it is, the user learns whose fault it is
        message = fault_of_machine(error, vars(args))
        if message is None:
            if not isinstance(error, (InputError, OSError, FloatingPointError)):
                _end_on_bug(program, error)
            message = one_line(error)
            message = with_flags(message, args) if isinstance(error, InputError) else message
            message = message.rstrip(".") + WSL_PATH if _WINDOWS_PATH.search(message) else message
        if not speaks_first():
            _let_others_speak(FIRST_RANK_SPEAKS_SECONDS)
        print(printable(f"{program}: error{_where(rank)}: {message}"), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def _end_on_bug(program: str, error: Exception) -> NoReturn:
    """Show where our own code failed, and say how to report it."""
    traceback.print_exception(error)
    file = write_bug_report(error)
    what = f", with the file {file}: it holds the command, the versions and these lines, and no key" if file else ""
    print(f"{program}: this is a bug of ours. Please report it where you got this program{what}.", file=sys.stderr)
    sys.exit(EXIT_BUG)


def _let_others_speak(seconds: float) -> None:
    """Wait before printing. If another process has failed, torchrun ends this one meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def _where(rank: str) -> str:
    """Text that names the process, if there are several, and the machine, if there are several."""
    if rank == "0":
        return ""
    several = os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1")
    return f" (process {rank} on {socket.gethostname()})" if several else f" (process {rank})"
