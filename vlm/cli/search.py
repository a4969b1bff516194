"""Find the moment: search an index by text, image or video."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vlm.errors import RejectedItems, UsageError
from vlm.progress import printable

if TYPE_CHECKING:
    from vlm.retrieval.queries.searching import SnapshotSearcher
    from vlm.retrieval.queries.values import Query, SingleQuery
    from vlm.types import Hit

_Term = TypeVar("_Term")

EXAMPLE = 'vlm search my-index "a dog jumps into the water" --top-k 5 --where "duration_s > 60"'

_BACKENDS = ("auto", "exact", "faiss", "lance")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "index", metavar="INDEX", help="an index folder; what vlm index publish wrote, for lance"
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what happens in the video")
    parser.add_argument("--image", metavar="FILE", help="search by an image instead")
    parser.add_argument("--video", metavar="FILE", help="search by a video instead")
    for flag, what in (("--plus", "look for this, too"), ("--minus", "look for less of this")):
        parser.add_argument(
            flag,
            action="append",
            default=[],
            metavar="TERM",
            help=f"{what}: [WEIGHT*]text:..., image:FILE, video:FILE or like:VIDEO@SECONDS; may be repeated",
        )
    parser.add_argument(
        "--unlike",
        action="append",
        default=[],
        metavar="VIDEO@SECONDS",
        help="not this one: leave its video out, and show what is like it later; may be repeated",
    )
    parser.add_argument("--top-k", type=int, default=10, metavar="N", help="how many videos (10)")
    parser.add_argument("--offset", type=int, default=0, metavar="N", help="skip the N best (0)")
    parser.add_argument(
        "--no-group",
        action="store_true",
        help="list copies of a hit's footage like any other video, not with the hit",
    )
    parser.add_argument(
        "--words", action="store_true", help="also look in names, tags, captions and subtitles of the videos"
    )
    parser.add_argument(
        "--rerank",
        type=int,
        default=0,
        metavar="N",
        help="score the N nearest segments again, slower and better",
    )
    parser.add_argument(
        "--aggregate",
        choices=("max", "mean"),
        default="max",
        help="a video scores as its best segment, or as the mean of all (max)",
    )
    parser.add_argument(
        "--min-strength",
        choices=("strong", "weak"),
        help="only hits that are better than what unrelated texts find",
    )
    parser.add_argument("--where", metavar="FILTER", help='only videos such as "duration_s > 60"')
    parser.add_argument(
        "--export", metavar="FILE", help="write the hits into a new .csv, .edl or .fcpxml (markers) file, too"
    )
    parser.add_argument("--cuts", metavar="DIR", help="cut the hits out as mp4 files, into a new folder")
    parser.add_argument("--model", metavar="SOURCE", help="where the index's model lies now")
    parser.add_argument("--backend", choices=_BACKENDS, default="auto", help="how to search; lance: a store")
    parser.add_argument("--json", action="store_true", help="print a JSON list of hits")


def run(arguments: argparse.Namespace) -> int:
    """Print the hits, best first."""
    query = _query(arguments)
    if arguments.top_k < 1 or arguments.rerank < 0 or arguments.offset < 0:
        raise UsageError("--top-k must be at least 1, --rerank and --offset at least 0")
    from vlm.retrieval.filters import parse_filter
    from vlm.retrieval.queries.terms import parse_moment
    from vlm.retrieval.queries.values import Mix, Part

    unlike = [parse_moment(word) for word in arguments.unlike]
    if arguments.where is not None:
        parse_filter(arguments.where)  # a slip is told before a model is loaded
    searcher = _open(arguments)
    model = searcher.model
    unlike = [_identified(moment, searcher) for moment in unlike]
    if isinstance(query, Mix):
        query = Mix(
            tuple(dataclasses.replace(part, query=_identified(part.query, searcher)) for part in query.parts)
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hits = searcher.search(
            query,
            top_k=arguments.top_k,
            rerank=arguments.rerank,
            where=arguments.where,
            aggregate=arguments.aggregate,
            min_strength=arguments.min_strength,
            unlike=unlike,
            offset=arguments.offset,
            group=not arguments.no_group,
            words=arguments.words,
        )
    for warning in caught:
        print(f"vlm: warning: {warning.message}", file=sys.stderr)
    parts = query.parts if isinstance(query, Mix) else (Part(query),)
    texts = [part.query for part in parts if isinstance(part.query, str)]
    if unknown := dict.fromkeys(word for text in texts for word in searcher.unknown_words(text)):
        print(f"vlm: not understood: {', '.join(unknown)}", file=sys.stderr)
    if arguments.json:
        print(
            json.dumps([{**dataclasses.asdict(hit), "model_domain": model.domain} for hit in hits], indent=2)
        )
    else:
        _print_hits(hits, arguments.min_strength)
    return _hand_over(hits, arguments)


def _identified(query: _Term, searcher: SnapshotSearcher) -> _Term:
    """Return a moment whose video is named by its path as one whose video is named by its identifier."""
    from vlm.retrieval.queries.values import Moment

    snapshot = searcher.snapshot
    if not isinstance(query, Moment) or query.video_id in snapshot.places:
        return query
    path = os.fsencode(os.path.abspath(query.video_id))
    return next(
        (dataclasses.replace(query, video_id=one.video_id) for one in snapshot.videos if one.path == path),
        query,
    )


def _open(arguments: argparse.Namespace) -> SnapshotSearcher:
    from vlm.cli.index import load

    if arguments.backend == "lance":
        from vlm.retrieval.store.searcher import StoreSearcher, source_of

        model, _ = load(arguments.model or source_of(arguments.index))
        return StoreSearcher(arguments.index, model)
    from vlm.retrieval.index import VideoIndex
    from vlm.retrieval.searcher import Searcher

    index = VideoIndex.open(arguments.index)
    model, _ = load(arguments.model or index.manifest.model.source)
    return Searcher(index, model, backend=arguments.backend)


def _hand_over(hits: list[Hit], arguments: argparse.Namespace) -> int:
    """Write the hits where other programs find them; 3 if some could not be cut."""
    if arguments.export is not None:
        from vlm.retrieval.exports import export_hits

        export_hits(hits, arguments.export, arguments.text or "search by example")
    if arguments.cuts is None:
        return 0
    from vlm.serving.media.cutting import cut_hits

    failures = cut_hits(hits, arguments.cuts)
    for path, reason, detail in failures:
        print(f"vlm: not cut: {printable(path)} ({reason}): {printable(detail)}", file=sys.stderr)
    return RejectedItems.exit_code if failures else 0


def _query(arguments: argparse.Namespace) -> Query:
    """Return what the flags look for: one thing, or a sum."""
    from vlm.data.decoding.image import read_image
    from vlm.retrieval.queries.terms import parse_term
    from vlm.retrieval.queries.values import Mix, Part

    mains = [word for word in (arguments.text, arguments.image, arguments.video) if word is not None]
    if len(mains) > 1 or not (mains or arguments.plus):
        raise UsageError("give one of a text, --image FILE or --video FILE; what else counts is for --plus")
    query: SingleQuery = arguments.text
    if arguments.image is not None:
        query = read_image(Path(arguments.image))
    elif arguments.video is not None:
        query = Path(arguments.video)
    if not arguments.plus and not arguments.minus:
        return query
    terms = [parse_term(word) for word in arguments.plus]
    terms += [parse_term(word, -1.0) for word in arguments.minus]
    return Mix((*([Part(query)] if mains else []), *terms))


def _print_hits(hits: list[Hit], min_strength: str | None) -> None:
    if not hits:
        said = "nothing found" if min_strength is None else f"nothing found that is at least {min_strength}"
        print(said, file=sys.stderr)
    for hit in hits:
        path, moment = printable(hit.path), f"{_clock(hit.start_s)}-{_clock(hit.end_s)}"
        doubt = f"  [{hit.warning}]" if hit.warning else ""
        grade = hit.strength or "-"
        print(f"{hit.rank:3}  {hit.score:8.4f} {hit.score_kind:8} {grade:9} {moment:>19}  {path}{doubt}")
        for copy in hit.duplicates:
            moment = f"{_clock(copy.start_s)}-{_clock(copy.end_s)}"
            print(f"{'also in':>31} {moment:>19}  {printable(copy.path)}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    clock = f"{minutes:02}:{rest:04.1f}"
    return f"{hours}:{clock}" if hours else clock
