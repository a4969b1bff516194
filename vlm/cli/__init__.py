"""The command line: a literal table of commands, one module each, and the exit codes of the contract."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any

from vlm import __version__
from vlm.errors import Interrupted, InvalidInput, NoSpaceError, VlmError

_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
# what the system, quotas, limits and SQLite say, where a library passes on only the words
_DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large (os error", "disk is full")

# command: (module with `configure(parser)` and `run(arguments) -> int`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "ask": ("vlm.cli.ask", "answer a question about indexed videos, and show where"),
    "checkpoint": ("vlm.cli.checkpoint", "inspect a weights file without running it"),
    "data": ("vlm.cli.data", "make, pack, check and describe data sets"),
    "demo": ("vlm.cli.demo", "see the whole thing work on this machine"),
    "doctor": ("vlm.cli.doctor", "say what this machine can do, and what is wrong"),
    "eval": ("vlm.cli.eval", "measure models by pinned protocols, compare the cards"),
    "index": ("vlm.cli.index", "make and keep a searchable index of videos"),
    "models": ("vlm.cli.models", "list, pull, import, show and remove models"),
    "search": ("vlm.cli.search", "find the moment, by text, image or video"),
    "serve": ("vlm.cli.serve", "serve an index: a web page and a REST interface"),
    "train": ("vlm.cli.train", "train a model from a configuration file"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`errors.py` lists them)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug, argv = _take_debug(argv)
    _never_fail_to_print()
    previous = _on_sigterm(_terminate)
    try:
        code = _run(argv)
        sys.stdout.flush()  # a full disk or a reader that left must be noticed here, not at exit
    except BaseException as error:
        return _report(error, debug)
    finally:
        _on_sigterm(previous)
    return code


def _run(argv: list[str]) -> int:
    parser = _parser(argv)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as leaving:  # 0 after --help, 2 after a wrong flag
        return leaving.code if isinstance(leaving.code, int) else 2
    if arguments.command is None:
        parser.print_help()
        return 0
    code: int = arguments.run(arguments)
    return code


def _take_debug(argv: list[str]) -> tuple[bool, list[str]]:
    """Take ``--debug`` out, wherever it stands before a ``--``: programs need not know it."""
    end = argv.index("--") if "--" in argv else len(argv)
    kept = [word for word in argv[:end] if word != "--debug"]
    return len(kept) < end, kept + argv[end:]


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser; only the command that was asked for is imported, so that help stays fast."""
    parser = argparse.ArgumentParser(
        prog="vlm",
        description="Search, question and understand videos by what happens in them.",
        epilog="example: vlm doctor",
    )
    parser.add_argument("--version", action="version", version=f"vlm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        wanted = name == asked
        module: ModuleType | None = importlib.import_module(module_name) if wanted else None
        sub = commands.add_parser(
            name,
            help=summary,
            description=(module.__doc__ or summary).split("\n")[0] if module else summary,
            epilog=f"example: {module.EXAMPLE}" if module else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module is not None:
            module.configure(sub)
            sub.set_defaults(run=module.run)
    return parser


def _report(error: BaseException, debug: bool) -> int:
    """Say what went wrong in one line on stderr and return the exit code of its class."""
    if debug:
        traceback.print_exception(error)
    code, message = _explain(error)
    if isinstance(error, OSError):
        _forget_stdout()
    if message:
        print(f"vlm: {_printable(message)}", file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the sentence for an error; no sentence if nobody is there to read it."""
    if isinstance(error, BrokenPipeError):
        return 0, ""  # whoever read our output has left: nothing more to say
    if isinstance(error, (VlmError, Interrupted)):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; run the same command again: what was saved is not done twice"
    if _is_disk_full(error):
        place = getattr(error, "filename", None) or "a file"
        return NoSpaceError.exit_code, f"no space left while writing {place}; free some and run again"
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)):
        return InvalidInput.exit_code, f"{error.filename or 'a file'}: {error.strerror or error}"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EEXIST):
        place = error.filename or "a file"
        return InvalidInput.exit_code, f"{place}: {error.strerror}; choose another place"
    return 1, f"unexpected {type(error).__name__}: {error}; --debug shows where"


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether the disk is full; libraries written in other languages say so only in their message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(error) for words in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _printable(message: str) -> str:
    """Escape control characters: a file's name must not repaint the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in message)


def _never_fail_to_print() -> None:
    """Print undecodable file names escaped, instead of failing on them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _forget_stdout() -> None:
    """Drop what stdout cannot take, or the interpreter would fail once more while it closes."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _on_sigterm(handler: _Handler) -> _Handler:
    """Set what SIGTERM does and return what it did; only the main thread may."""
    if threading.current_thread() is not threading.main_thread() or handler is None:
        return None
    return signal.signal(signal.SIGTERM, handler)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise Interrupted("terminated; run the same command again: what was saved is not done twice", number)
