"""What of a benchmark is at hand: its files, its counts, its videos; every difference in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm.data.annotations.benchmarks import (
    AnnotationFiles,
    Captioned,
    Moment,
    Question,
    VideoFolder,
    answer_coverage,
    read_answer_list,
)
from vlm.data.decoding import open_video
from vlm.errors import DataError, InvalidInput
from vlm.evaluation.benchmarks.description import KnownFile
from vlm.evaluation.benchmarks.reading import BenchmarkRecords, read_records
from vlm.evaluation.protocol import Protocol
from vlm.progress import progress_bar
from vlm.text.cleaning import clean


@dataclass(slots=True)
class CheckReport:
    """What was found.

    Attributes:
        protocol: Its name.
        files: Name → sha256 and whether the protocol knows it, of every annotation file read.
        facts: What holds, in words.
        problems: What keeps the annotations from being used as the protocol says.
        missing: Videos that are not there, each with its reason.
        undecodable: Videos that are there and cannot be decoded, each with its reason.
        num_videos: Videos that the annotations name.
    """

    protocol: str
    files: list[dict[str, str]] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    undecodable: list[tuple[str, str]] = field(default_factory=list)
    num_videos: int = 0


def check_benchmark(
    protocol: Protocol, annotations: Path | None, videos: Path | None, *, decode: bool = False
) -> CheckReport:
    """Compare what is at hand with what a protocol needs.

    Args:
        protocol: With the layout ``benchmark``.
        annotations: The main file or the folder of all; None looks at nothing.
        videos: Folder of the videos; None looks for none.
        decode: Open every video and decode its first frame, which takes about 20 ms each.

    Raises:
        InvalidInput: The folder of videos does not exist.
    """
    report = CheckReport(protocol.name)
    if videos is not None and not videos.is_dir():
        raise InvalidInput(f"{videos}: no such folder of videos")
    if annotations is None:
        report.problems.append("no annotations given")
        return report
    try:
        found = read_records(protocol, annotations)
    except DataError as error:
        report.problems.append(str(error))
        return report
    for name, digest in found.files.items():
        report.files.append({"name": name, "sha256": digest, "state": known_state(protocol.known, digest)})
    report.problems += found.differences
    report.facts += _facts(protocol, found, annotations)
    report.num_videos = len(found.videos)
    if videos is not None:
        _look_for_videos(report, found.videos, VideoFolder(videos, protocol.prefixes), decode)
    return report


def known_state(known: Sequence[KnownFile], digest: str) -> str:
    """Return whether a protocol knows a file, by its hash, in words."""
    if digest in {entry.sha256 for entry in known}:
        return "known"
    return "not one of the files that the counts were confirmed on"


def undecodable(path: Path) -> str:
    """Return why a video cannot be decoded, as far as its first frame says; empty if it can."""
    try:
        with open_video(path):
            return ""
    except DataError as error:
        return error.reason


def _look_for_videos(report: CheckReport, names: list[str], folder: VideoFolder, decode: bool) -> None:
    with progress_bar(len(names), "videos", "video") as bar:
        for name in names:
            path, reason = folder.find(name)
            if path is None:
                report.missing.append((name, reason))
            elif decode and (reason := undecodable(path)):
                report.undecodable.append((name, reason))
            bar.update()


def _facts(protocol: Protocol, found: BenchmarkRecords, annotations: Path) -> list[str]:
    """Return what a reader of the numbers should know of the texts."""
    facts = []
    captions = [record for record in found.records if isinstance(record, Captioned)]
    questions = [record for record in found.records if isinstance(record, Question)]
    moments = [record for record in found.records if isinstance(record, Moment)]
    if captions:
        per_video = [len(record.captions) for record in captions]
        facts.append(f"captions of a video: {min(per_video)} to {max(per_video)}")
        videos_of: dict[str, set[tuple[str, ...]]] = {}
        queries: list[tuple[str, tuple[str, ...]]] = []
        for record in captions:
            joined = [" ".join(record.captions)] if protocol.captions == "joined" else record.captions
            kept = joined[:1] if protocol.captions == "first" else joined
            queries += [(clean(text), record.videos) for text in kept]
        for text, videos in queries:
            videos_of.setdefault(text, set()).add(videos)
        shared = {text for text, videos in videos_of.items() if len(videos) > 1}
        num_shared = sum(text in shared for text, _ in queries)
        facts.append(f"{len(shared)} texts stand for {num_shared} queries of different videos")
        words = [len(text.split()) for text, _ in queries]
        longer = {k: sum(count > k for count in words) / len(words) for k in (32, 64, 77)}
        facts.append(
            "queries longer than "
            + ", ".join(f"{k} words: {100 * share:.0f} %" for k, share in longer.items())
        )
    if moments:
        facts.append(
            f"{sum(moment.has_odd_window for moment in moments)} queries with an empty or too late window"
        )
    listed = AnnotationFiles(annotations).companion(protocol.files.answer_list)
    if questions and listed is not None:
        share = answer_coverage(questions, read_answer_list(listed))
        facts.append(f"{listed.name} covers the answers of {100 * share:.1f} % of the questions")
    return facts
