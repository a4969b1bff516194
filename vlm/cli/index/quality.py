"""Check an index with queries whose answers are known."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from vlm.errors import RejectedItems, UsageError

_MOST_NAMED = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``check``."""
    parser.add_argument("index", metavar="INDEX")
    parser.add_argument(
        "--queries",
        required=True,
        metavar="FILE.csv",
        help="columns query, video and, if wanted, start_s, end_s",
    )
    parser.add_argument(
        "--runs",
        metavar="FILE",
        help="where runs are kept and compared (QUERIES.runs.jsonl beside the queries)",
    )
    parser.add_argument("--rerank", type=int, default=0, metavar="N", help="as in vlm search (0)")
    parser.add_argument("--model", metavar="SOURCE", help="where the index's model lies now")
    parser.add_argument("--backend", choices=("auto", "exact", "faiss"), default="auto", help="how to search")
    parser.add_argument(
        "--fail-below",
        metavar="K=SHARE",
        help="end with code 3 if recall@K is below, as in 5=0.8 (otherwise a finished check ends with 0)",
    )
    parser.add_argument(
        "--fail-on-drift",
        action="store_true",
        help="end with code 3 if something became worse or moved since the run before",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run_check(arguments: argparse.Namespace) -> int:
    """Search for every known item, print recall and what changed since the run before."""
    limit = _limit(arguments.fail_below)
    if arguments.rerank < 0:
        raise UsageError("--rerank must be at least 0")
    from vlm.cli import index as command
    from vlm.retrieval.index import VideoIndex
    from vlm.retrieval.quality.check import check_index, compare_runs, keep_run, read_runs
    from vlm.retrieval.quality.drift import find_drift
    from vlm.retrieval.quality.known_items import read_known_items
    from vlm.retrieval.searcher import Searcher

    queries = Path(arguments.queries)
    kept = Path(arguments.runs) if arguments.runs else queries.with_name(f"{queries.stem}.runs.jsonl")
    items, runs = read_known_items(queries), read_runs(kept)
    index = VideoIndex.open(arguments.index)
    model, _ = command.load(arguments.model or index.manifest.model.source)
    searcher = Searcher(index, model, backend=arguments.backend)
    run = check_index(searcher, items, queries.parent, arguments.rerank)
    changes = compare_runs(runs[-1], run) if runs else None
    alarms = find_drift(runs[-1], run) if runs else []
    keep_run(kept, runs, run)
    if arguments.json:
        before = None if not runs else {name: runs[-1][name] for name in ("time", "index", "model", "recall")}
        print(json.dumps({**run, "before": before, "changes": changes, "drift": alarms}, indent=2))
    else:
        _print_run(run)
        if runs:
            _print_changes(runs[-1], changes)
        _print_alarms(alarms)
    for item in run["missing"][:_MOST_NAMED]:
        print(f"vlm: not in the index, left out: {_shown(item['video'])}", file=sys.stderr)
    if len(run["missing"]) > _MOST_NAMED:
        print(f"vlm: and {len(run['missing']) - _MOST_NAMED} more queries", file=sys.stderr)
    if limit is not None and run["recall"][limit[0]]["value"] < limit[1]:
        print(f"vlm: {limit[0]} is below {limit[1]:g}", file=sys.stderr)
        return RejectedItems.exit_code
    return RejectedItems.exit_code if alarms and arguments.fail_on_drift else 0


def _limit(text: str | None) -> tuple[str, float] | None:
    if text is None:
        return None
    from vlm.retrieval.quality.check import RECALL_AT

    found = re.fullmatch(r"(\d+)=(0?\.\d+|[01](?:\.0*)?)", text)
    if found is None or int(found[1]) not in RECALL_AT:
        ks = ", ".join(map(str, RECALL_AT))
        raise UsageError(f"--fail-below expects K=SHARE with K one of {ks} and a share of 1, got {text!r}")
    return f"recall@{found[1]}", float(found[2])


def _print_run(run: dict[str, Any]) -> None:
    rest = f", reranking {run['rerank']}" if run["rerank"] else ""
    print(f"{len(run['outcomes'])} known items, model {run['model']}{rest}")
    for name, entry in run["recall"].items():
        value, low, high = (100 * entry[part] for part in ("value", "low", "high"))
        print(f"  {name:<10} {value:5.1f} %  [{low:.1f}, {high:.1f}]")


def _print_changes(before: dict[str, Any], changes: dict[str, Any] | None) -> None:
    title = f"the run of {before['time']} (model {before['model']}, {before['index']})"
    if changes is None:
        print(f"nothing in common with {title}")
        return
    print(f"since {title}, over {changes['num_items']} items of both:")
    for name, entry in changes["differences"].items():
        value, low, high = (100 * entry[part] for part in ("value", "low", "high"))
        print(f"  {name:<10} {value:+5.1f}    [{low:+.1f}, {high:+.1f}]")
    for title in ("lost", "found"):
        for item in changes[title][:_MOST_NAMED]:
            print(f"  {title}: {_shown(item['query'])} ({_shown(item['video'])})")
        if len(changes[title]) > _MOST_NAMED:
            print(f"  {title}: {len(changes[title]) - _MOST_NAMED} more; --json lists them")


def _print_alarms(alarms: list[dict[str, Any]]) -> None:
    for alarm in alarms:
        if "items" in alarm:
            videos = list(dict.fromkeys(_shown(item["video"]) for item in alarm["items"]))
            rest = "" if len(videos) <= _MOST_NAMED else f" and {len(videos) - _MOST_NAMED} more"
            print(f"drift: {alarm['what']}: {', '.join(videos[:_MOST_NAMED])}{rest}")
        else:
            print(
                f"drift: {alarm['what']}: {alarm['value']:+.3f} [{alarm['low']:+.3f}, {alarm['high']:+.3f}]"
            )


def _shown(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
