"""List, fetch, register and remove models; nothing is fetched before its licence and size were shown."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import UsageError, VlmError

if TYPE_CHECKING:
    from vlm.models.registry import LocalModel, ModelEntry

EXAMPLE = "vlm models pull videomamba-m-25m"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=summary, description=summary)

    listing = add(
        "list", "show every model by name: size, licence, domain, abilities, and whether it is here"
    )
    show = add("show", "show one model in full: source, hash, published score, where it lies")
    pull = add("pull", "fetch a model after showing its licence and size")
    register = add("import", "register a weights file of your own, or hand in one that was fetched elsewhere")
    remove = add("remove", "delete a model that was pulled, or forget one that was imported")
    for action in (show, pull, remove):
        action.add_argument("name", help="a name of 'vlm models list'")
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="print JSON for programs")
    pull.add_argument("--yes", action="store_true", help="accept the licence and size without being asked")
    register.add_argument("file", type=Path, help="a .safetensors or .pth file")
    register.add_argument("--name", required=True, help="the name to load it by")
    register.add_argument("--licence", default="unknown", help="what its owner says, to be shown beside it")
    register.add_argument("--domain", default="unknown", help="what it knows: 'open', or a narrow world")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    actions = {"list": _list, "show": _show, "pull": _pull, "import": _import, "remove": _remove}
    return actions[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    from vlm.models.registry import list_local, load_registry

    registry, local = load_registry(), list_local()
    names = list(dict.fromkeys([*registry, *local]))
    rows = [_describe(name, registry.get(name), local.get(name)) for name in names]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    table = [("NAME", "MB", "LICENCE", "DOMAIN", "CAN", "HERE")]
    for row in rows:
        size = f"{row['size_mb']:.0f}" if row["files"] else "-"
        can = ",".join(row["capabilities"]) or "-"
        table.append((row["name"], size, row["licence"], row["domain"], can, "yes" if row["here"] else "no"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from vlm.models.registry import find_local, load_registry, local_model, lookup

    entry, local = load_registry().get(arguments.name), find_local(arguments.name)
    if entry is None and local is None:
        local_model(arguments.name)  # raises: damaged, or unknown with the nearest name
        lookup(arguments.name)
    described = _describe(arguments.name, entry, local)
    if arguments.json:
        print(json.dumps(described, indent=1))
        return 0
    for key, value in described.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) and key != "files" else value
        if key == "files":
            for file in value:
                print(f"{file['role']:14}{file['source']}  {file['size_mb']} MB")
                print(f"{'':14}sha256 {file['sha256'] or 'not published: the first download is pinned'}")
        else:
            print(f"{key:14}{text if text not in (None, '') else '-'}")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from vlm.models.registry import download_model, find_local, lookup, offline_reason, store_folder

    name, entry = arguments.name, lookup(arguments.name)
    if find_local(name) is not None:
        print(f"{name} is already here", file=sys.stderr)
        return 0
    print(f"{name}: {entry.summary}", file=sys.stderr)
    for file in entry.files:
        print(f"  {file.role}: {file.url}, {file.size_mb:g} MB", file=sys.stderr)
    print(f"  licence {entry.licence}; {entry.size_mb:.0f} MB into {store_folder() / name}", file=sys.stderr)
    if offline_reason() is None and not arguments.yes:
        _ask(name)
    local, pinned = download_model(name, entry)
    for file_name, sha256 in pinned.items():
        print(
            f"{file_name}: nobody has published its hash; pinned now to sha256 {sha256}: compare it with "
            "somebody else's before you trust it",
            file=sys.stderr,
        )
    print(local.files["weights"])
    return 0


def _ask(name: str) -> None:
    """Return if the user agrees.

    Raises:
        UsageError: Nobody is there to answer.
        VlmError: The answer was no.
    """
    if not sys.stdin.isatty():
        raise UsageError(f"nobody is there to agree to the licence and size: vlm models pull {name} --yes")
    print("fetch it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise VlmError("nothing was fetched")


def _import(arguments: argparse.Namespace) -> int:
    from vlm.models.registry import import_model

    local = import_model(arguments.file, arguments.name, licence=arguments.licence, domain=arguments.domain)
    print(local.files["weights"])
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    from vlm.models.registry import remove_model

    freed = remove_model(arguments.name)
    print(f"removed {arguments.name}, {freed / 1e6:.1f} MB freed", file=sys.stderr)
    return 0


def _describe(name: str, entry: ModelEntry | None, local: LocalModel | None) -> dict[str, Any]:
    """Return what is known of a model, plain enough for JSON."""
    origin = entry or local
    assert origin is not None
    files = [
        {"role": file.role, "source": file.url, "size_mb": file.size_mb, "sha256": file.sha256}
        for file in (entry.files if entry else ())
    ]
    if entry is None and local is not None:
        files = [
            {
                "role": role,
                "source": str(path),
                "size_mb": round(path.stat().st_size / 1e6, 3),
                "sha256": local.sha256[role],
            }
            for role, path in local.files.items()
        ]
    published = entry.published if entry else None
    return {
        "name": name,
        "summary": entry.summary if entry else "imported on this machine",
        "kind": origin.kind,
        "licence": origin.licence,
        "domain": origin.domain,
        "capabilities": list(entry.capabilities) if entry else [],
        "size_mb": sum(float(str(file["size_mb"])) for file in files),
        "published": f"{published.measure}: {published.value} ({published.source})" if published else None,
        "here": [str(path) for path in local.files.values()] if local else [],
        "files": files,
    }
