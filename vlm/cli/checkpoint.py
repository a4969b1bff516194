"""Inspect a weights file or model folder without running it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLE = "vlm checkpoint inspect videomamba_m16_25M_f8_res224.pth --json"
_SHOWN = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser(
        "inspect",
        help="say what is in it: kind, sizes, parameters, type, what is missing or unexpected",
        epilog=f"example: {EXAMPLE}",
    )
    inspect.add_argument("file", type=Path, help="a .pth or .safetensors file, or a model folder")
    inspect.add_argument("--json", action="store_true", help="print a JSON object instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 4 if it would not load."""
    from vlm.errors import InvalidInput
    from vlm.models.weights.inspection import inspect

    if not arguments.file.exists():
        raise InvalidInput(f"{arguments.file}: no such file or folder")
    found = inspect(arguments.file)
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print("\n".join(_lines(found)))
    return 0 if found["problem"] is None else InvalidInput.exit_code


def _lines(found: dict[str, Any]) -> list[str]:
    """Return what was found as text."""
    lines = [f"{key:<15} {found[key]}" for key in ("file", "form", "kind") if found.get(key)]
    lines.append(f"{'size':<15} {found['size_bytes'] / 1e6:.1f} MB, {found['dtype']}")
    if found["num_parameters"] is not None:
        lines.append(f"{'parameters':<15} {found['num_parameters']:,}")
    for part, value in (found["config"] or {}).items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"{part:<15} {text}")
    for label in ("missing", "unexpected", "misshaped", "resized", "ignored"):
        names = found[label]
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{label:<15} {len(names)}: {', '.join(names[:_SHOWN])}{more}")
    if found["problem"]:
        lines.append(f"{'problem':<15} {found['problem']}")
    return lines
