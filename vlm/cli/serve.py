"""Serve an index: a web page to search and watch, and a REST interface for programs."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
from pathlib import Path

from vlm.errors import InvalidInput, MissingExtra, UsageError

EXAMPLE = "vlm serve my-index --ingest holidays=~/Videos/holidays"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "index", metavar="INDEX", help="an index folder; what vlm index publish wrote, for lance"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (8000)")
    parser.add_argument(
        "--token-file", metavar="FILE", help="a file with the token that clients must present"
    )
    parser.add_argument(
        "--allow-no-token", action="store_true", help="listen beyond this machine without a token"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name of this server, besides its addresses; may be given several times",
    )
    parser.add_argument(
        "--ingest",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="a folder that clients may have indexed; may be given several times",
    )
    parser.add_argument(
        "--queries",
        metavar="FILE.csv",
        help="let clients star hits, which become rows of this file for vlm index check --queries",
    )
    parser.add_argument("--model", metavar="SOURCE", help="where the index's model lies now")
    parser.add_argument(
        "--backend",
        choices=("auto", "exact", "faiss", "lance"),
        default="auto",
        help="how to search; lance: a store, by any number of servers",
    )
    parser.add_argument("--cache", metavar="FOLDER", help="where pictures and clips are kept")
    parser.add_argument("--cache-mb", type=int, default=1024, metavar="N", help="how much of them (1024)")
    parser.add_argument("--max-upload-mb", type=int, default=512, metavar="N", help="largest video (512)")
    parser.add_argument(
        "--allow-demo-model",
        action="store_true",
        help="let clients index ordinary videos with a model that does not know them",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    if not 0 <= arguments.port <= 65535 or arguments.cache_mb < 1 or arguments.max_upload_mb < 1:
        raise UsageError("--port must be from 0 to 65535, --cache-mb and --max-upload-mb at least 1")
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "serve", "vlm serve")
    from vlm.cli.index import load
    from vlm.serving.settings import Limits, ServeSettings

    is_store = arguments.backend == "lance"
    place = arguments.index if is_store else os.path.abspath(arguments.index)
    settings = ServeSettings(
        host=arguments.host,
        port=arguments.port,
        token=None if arguments.token_file is None else read_token(Path(arguments.token_file)),
        allow_no_token=arguments.allow_no_token,
        allowed_hosts=tuple(arguments.allow_host),
        ingest_folders=_folders(arguments.ingest),
        queries_file=_queries(arguments.queries),
        allow_narrow_model=arguments.allow_demo_model,
        cache_folder=Path(arguments.cache) if arguments.cache else _cache_folder(place),
        cache_bytes=arguments.cache_mb << 20,
        limits=Limits(max_video_bytes=arguments.max_upload_mb << 20),
    )
    from vlm.serving.server import serve
    from vlm.serving.state import check_for_store, open_state

    if is_store:
        check_for_store(place, settings)
    usual_source = _source_of(place, is_store)
    model, source = load(arguments.model or usual_source)
    state = open_state(place, model, source, settings, arguments.backend)
    try:
        serve(state, lambda address: print(f"serving {place} at {address}", flush=True))
    finally:
        state.close()
    return 0


def read_token(path: Path) -> str:
    """Return the token that a file holds, without the space around it.

    Raises:
        InvalidInput: The file cannot be read, is empty, or holds more than a line.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read as a token file ({error})") from error
    if not token or not token.isprintable() or not token.isascii() or " " in token:
        raise InvalidInput(f"{path}: expected one line with a token, of letters, digits and signs")
    return token


def _folders(words: list[str]) -> dict[str, Path]:
    """Read ``NAME=FOLDER`` or ``FOLDER``, whose last part is then its name."""
    folders: dict[str, Path] = {}
    for word in words:
        name, sign, place = word.partition("=")
        path = Path(os.path.abspath(os.path.expanduser(place if sign else word)))
        name = name if sign else path.name
        if not path.is_dir():
            raise InvalidInput(f"{path}: no such folder to index")
        if not name or name in folders:
            raise UsageError(f"--ingest {word}: expected a name of its own: --ingest NAME=FOLDER")
        folders[name] = path
    return folders


def _queries(word: str | None) -> Path | None:
    """Return the file of known items, after reading it: better now than when the first star is lost."""
    if word is None:
        return None
    from vlm.retrieval.quality.starring import KnownItemFile

    path = Path(os.path.abspath(os.path.expanduser(word)))
    if not path.parent.is_dir():
        raise InvalidInput(f"{path.parent}: no such folder to keep {path.name} in")
    KnownItemFile(path, 0).read()
    return path


def _source_of(place: str, is_store: bool) -> str:
    """Return where the model of an index or store is found."""
    if is_store:
        from vlm.retrieval.store.searcher import source_of

        return source_of(place)
    from vlm.retrieval.index import VideoIndex

    return VideoIndex.open(place).manifest.model.source


def _cache_folder(place: str) -> Path:
    from vlm.assets import user_folder

    whole = place if "://" in place else os.path.realpath(place)
    name = hashlib.sha256(os.fsencode(whole)).hexdigest()[:16]
    return user_folder() / "serving" / name
