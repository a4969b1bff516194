"""The command line: a literal table of commands, one module each, and the exit codes of the contract."""

from __future__ import annotations

import argparse
import errno
import importlib
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType, ModuleType

from vlm import __version__
from vlm.errors import Interrupted, NoSpaceError, VlmError

# command: (module with `configure(parser)` and `run(arguments) -> int`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "checkpoint": ("vlm.cli.checkpoint", "inspect a weights file without running it"),
    "data": ("vlm.cli.data", "make, pack, check and describe data sets"),
    "doctor": ("vlm.cli.doctor", "say what this machine can do, and what is wrong"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (`errors.py` lists them)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(argv)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code: int = arguments.run(arguments)
    except VlmError as error:
        return _report(error, error.exit_code, arguments.debug)
    except KeyboardInterrupt as error:
        return _report(error, 130, arguments.debug, "interrupted; run the same command again to go on")
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left: nothing more to say
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            full = NoSpaceError(
                f"no space left while writing {error.filename or 'a file'}; free some and run again"
            )
            return _report(full, full.exit_code, arguments.debug)
        return _report(error, 1, arguments.debug)
    except Exception as error:  # the last resort: one sentence instead of a traceback
        return _report(error, 1, arguments.debug)
    return code


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
        )
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if module is not None:
            module.configure(sub)
            sub.set_defaults(run=module.run)
    return parser


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise Interrupted("terminated; run the same command again to go on", number)


def _report(error: BaseException, code: int, debug: bool, message: str | None = None) -> int:
    if debug:
        traceback.print_exception(error)
    name = "" if isinstance(error, (VlmError, KeyboardInterrupt)) else f"{type(error).__name__}: "
    print(f"vlm: {name}{message or error}", file=sys.stderr)
    return code
