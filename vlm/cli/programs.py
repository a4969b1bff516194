"""Run the programs that lie outside the package: every ``X.py`` of a shipped folder with a ``main(argv)``."""

from __future__ import annotations

import argparse
import ast
import difflib
import runpy
from pathlib import Path

from vlm.assets import asset
from vlm.errors import UsageError


def configure_programs(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add the program's name and everything after it, with a list of the folder's programs as help."""
    programs = find_programs(folder)
    width = max((len(name) for name in programs), default=0)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    listing = "\n".join(f"  {name:<{width}}  {_summary(path)}" for name, path in programs.items())
    parser.description = f"{parser.description}\n\nprograms:\n{listing}"
    parser.add_argument("program", nargs="?", metavar="PROGRAM", help="one of the programs above")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments; try --help")


def run_program(folder: str, name: str | None, argv: list[str]) -> int:
    """Run ``<folder>/<name>.py`` and return what its ``main`` returns.

    Raises:
        UsageError: No name was given or no such program exists; the nearest is named.
    """
    programs = find_programs(folder)
    if name not in programs:
        near = difflib.get_close_matches(name or "", programs, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(programs)}"
        raise UsageError(f"no program {name!r}; {hint}" if name else f"a program is needed; {hint}")
    try:
        code: int = runpy.run_path(str(programs[name]))["main"](argv)
    except SystemExit as leaving:  # 0 after --help, 2 after a wrong flag
        return leaving.code if isinstance(leaving.code, int) else 2
    return code


def find_programs(folder: str) -> dict[str, Path]:
    """Return name → path of the programs of a shipped folder, sorted by name."""
    return {path.stem: path for path in sorted(asset(folder).glob("*.py"))}


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
