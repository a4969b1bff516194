"""See the whole thing work: videos made, indexed, searched and questioned on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import InvalidInput

if TYPE_CHECKING:
    from vlm.answering import Choices
    from vlm.retrieval import Searcher
    from vlm.types import Hit
    from vlm.world import Scene

EXAMPLE = "vlm demo --out demo-output"
CLIPS_PER_REEL = 4
CLIP_S = 5.0
_SHOWN_QUERIES = 4
_SHOWN_HITS = 3
_RERANKED = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a scene is shown: a reel's file name, and from when on, in seconds."""

    reel: str
    start_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One query: what was asked, what came, and whether each hit shows a scene of which it is true."""

    query: str
    hits: tuple[Hit, ...]
    is_true: tuple[bool, ...]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--out", default="demo-output", metavar="DIR", help="where it works (demo-output)")
    parser.add_argument(
        "--model", default="demo", metavar="SOURCE", help="a model that knows the digit world (demo)"
    )
    parser.add_argument("--reels", type=int, default=10, metavar="N", help="videos of four clips each (10)")
    parser.add_argument("--seed", type=int, default=2026, help="which scenes (2026)")


def run(arguments: argparse.Namespace) -> int:
    """Make, index, search, ask, draw; print what was found and how much of it is right."""
    if arguments.reels < 2:
        raise InvalidInput(f"--reels must be at least 2, got {arguments.reels}")
    from vlm.cli.index import load
    from vlm.retrieval import Searcher, VideoIndex

    started = time.perf_counter()
    out = Path(arguments.out)
    videos = out / f"videos-{arguments.seed}-{arguments.reels}"
    model, source = load(arguments.model)
    _say(f"model: {model.name}, which knows the {model.domain} only")
    scenes = _scenes(arguments.seed, arguments.reels * CLIPS_PER_REEL)
    places = _write_reels(scenes, videos)
    _say(f"made {arguments.reels} videos of {CLIPS_PER_REEL * CLIP_S:.0f} s in {videos}")
    index_folder = out / f"index-{arguments.seed}-{arguments.reels}-{model.fingerprint[:8]}"
    if (index_folder / "manifest.json").exists():
        index = VideoIndex.open(index_folder)
    else:
        index = VideoIndex.create(index_folder, model, source=source, segment_s=CLIP_S, stride_s=CLIP_S)
    report = index.add([str(videos)], model=model)
    _say(f"indexed {report.num_segments + report.num_unchanged * CLIPS_PER_REEL} moments in {index_folder}")
    searcher = Searcher(index, model)
    outcomes = _search_all(searcher, scenes, places)
    for outcome in outcomes[:_SHOWN_QUERIES]:
        _print_outcome(outcome, index_folder)
    _print_score(outcomes, scenes)
    _ask(searcher, scenes, places, index_folder)
    sheet = out / "contact-sheet.png"
    from vlm.cli.demo.contact_sheet import draw_contact_sheet

    draw_contact_sheet(outcomes[:_SHOWN_QUERIES], sheet)
    _say(f"\nlook at {sheet}; all of it took {time.perf_counter() - started:.0f} s")
    return 0


def _scenes(seed: int, count: int) -> list[Scene]:
    """Return test scenes, then the reversed twins of the same, so that no single frame tells them apart."""
    from vlm.world import gallery

    pairs = list(gallery("test", seed, count // 2, twins=True))
    return pairs[0::2] + pairs[1::2]


def _write_reels(scenes: list[Scene], folder: Path) -> list[Place]:
    """Write the scenes one after the other, four to a file; return each one's place."""
    import numpy as np

    from vlm.world import render
    from vlm.world.clips import encode

    folder.mkdir(parents=True, exist_ok=True)
    places = []
    for first in range(0, len(scenes), CLIPS_PER_REEL):
        name = f"reel-{first // CLIPS_PER_REEL:02}.mp4"
        shown = scenes[first : first + CLIPS_PER_REEL]
        encode(np.concatenate([render(scene) for scene in shown]), folder / name)
        places += [Place(reel=name, start_s=number * CLIP_S) for number in range(len(shown))]
    return places


def _search_all(searcher: Searcher, scenes: list[Scene], places: list[Place]) -> list[Outcome]:
    """Search for every scene's caption; a hit is right if the caption is true of what it shows."""
    from vlm.world import caption, truth_matrix

    truth = truth_matrix(scenes, scenes)
    shown = {(place.reel, round(place.start_s)): number for number, place in enumerate(places)}
    rerank = _RERANKED if "rerank" in searcher.model.capabilities else 0
    outcomes = []
    for number, scene in enumerate(scenes):
        query = caption(scene)
        hits = searcher.search(query, top_k=_SHOWN_HITS, rerank=rerank)
        is_true = tuple(bool(truth[number, shown[Path(hit.path).name, round(hit.start_s)]]) for hit in hits)
        outcomes.append(Outcome(query=query, hits=tuple(hits), is_true=is_true))
    return outcomes


def _print_outcome(outcome: Outcome, index: Path) -> None:
    print(f"\n$ vlm search {index} {shlex.quote(outcome.query)} --rerank {_RERANKED}")
    for hit, is_true in zip(outcome.hits, outcome.is_true, strict=True):
        mark = "right" if is_true else "wrong"
        place = f"{Path(hit.path).name} {hit.start_s:4.1f}-{hit.end_s:4.1f} s"
        print(f"  {hit.rank}  {place}  {hit.score_kind} {hit.score:7.3f}  {mark}")


def _print_score(outcomes: list[Outcome], scenes: list[Scene]) -> None:
    from vlm.world import truth_matrix

    chance = truth_matrix(scenes, scenes).mean()
    first = sum(bool(outcome.is_true) and outcome.is_true[0] for outcome in outcomes)
    print(
        f"\nthe first hit is right for {first} of {len(outcomes)} captions ({first / len(outcomes):.0%}); "
        f"by chance {chance:.1%}"
    )


def _ask(searcher: Searcher, scenes: list[Scene], places: list[Place], index: Path) -> None:
    """Put one question about a direction, and print the answer with its evidence."""
    from vlm.answering import choose
    from vlm.world import questions

    if "choose" not in searcher.model.capabilities:
        return
    ids = {Path(hit.path).name: hit.video_id for hit in searcher.search("the", top_k=len(places))}
    for scene, place in zip(scenes, places, strict=True):
        about = [item for item in questions(scene) if item.kind.startswith("direction-move")]
        if not about:
            continue
        question = about[0]
        result: Choices = choose(searcher, "", question.statements, video=ids[place.reel])
        choices = shlex.quote("|".join(question.statements))
        print(f"\n{question.text}?")
        print(f"$ vlm ask {index} '' --video {ids[place.reel]} --choices {choices}")
        for answer in result.answers:
            print(f"  {answer.score:5.3f}  {answer.text}")
        hit = result.evidence
        is_right = result.answers[0].text == question.statements[question.answer_index]
        print(
            f"  seen in {Path(hit.path).name} {hit.start_s:.1f}-{hit.end_s:.1f} s; "
            f"the first answer is {'true' if is_right else 'false'}"
        )
        return


def _say(text: str) -> None:
    print(text, file=sys.stderr)
