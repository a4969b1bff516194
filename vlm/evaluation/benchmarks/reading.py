"""Annotations of a benchmark into what an evaluation takes, after their counts were compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlm.data.annotations.benchmarks import (
    AnnotationFiles,
    Captioned,
    Moment,
    Question,
    Record,
    VideoFolder,
    content_hash,
    read_captions,
    read_moments,
    read_questions,
    video_key,
)
from vlm.errors import InvalidInput
from vlm.evaluation.benchmarks.description import Counts
from vlm.evaluation.card import file_sha256
from vlm.evaluation.dataset import EvaluationSet
from vlm.evaluation.protocol import Protocol
from vlm.evaluation.questions import ChoiceQuestion, QuestionSet
from vlm.metrics import Positives
from vlm.text.cleaning import clean

_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkRecords:
    """What a protocol's annotations say.

    Attributes:
        records: All of one kind: captions, questions or moments.
        counts: Of them, as the protocol's ``expected`` counts.
        files: Name → sha256 of every file that was read.
        differences: Where the counts are not those expected, in words.
    """

    records: Sequence[Record]
    counts: Counts
    files: dict[str, str]
    differences: list[str] = field(default_factory=list)

    @property
    def videos(self) -> list[str]:
        """Names of the videos, once each, sorted by key."""
        names: dict[str, str] = {}
        for record in self.records:
            for name in record.videos if isinstance(record, Captioned) else (record.video,):
                names.setdefault(video_key(name), name)
        return [names[key] for key in sorted(names)]


def read_records(protocol: Protocol, annotations: Path) -> BenchmarkRecords:
    """Read a protocol's annotations and count them.

    Args:
        protocol: With the layout ``benchmark``.
        annotations: The main file, companions lying beside it, or the folder of all.

    Raises:
        DataError: They are missing, are a pickle, or are of no known layout.
    """
    found, names = AnnotationFiles(annotations), protocol.files
    records: Sequence[Record]
    if protocol.task == "retrieval":
        captions = read_captions(found, names.main, lists=names.lists, part=protocol.part)
        records, counts = captions, _count_captions(captions, protocol)
    elif protocol.task == "moments":
        moments = read_moments(found, names.main)
        records, counts = moments, Counts(videos=_num_videos(moments), moments=len(moments))
    else:
        questions = read_questions(
            found,
            names.main,
            answers=names.answers,
            mapping=names.mapping,
            part=protocol.part,
            numbered=protocol.numbered,
        )
        records, counts = questions, Counts(videos=_num_videos(questions), questions=len(questions))
    differences = [] if protocol.expected is None else protocol.expected.differences(counts)
    files = {path.name: file_sha256(path) for path in found.used}
    return BenchmarkRecords(records=records, counts=counts, files=files, differences=differences)


def require_counts(protocol: Protocol, found: BenchmarkRecords) -> None:
    """Raise unless the annotations hold what the protocol expects.

    Raises:
        InvalidInput: They do not; every difference is named.
    """
    if found.differences:
        lists = f"; the split's videos stand in {' or '.join(protocol.files.lists)}, looked for beside it"
        raise InvalidInput(
            f"{', '.join(found.files)}: not {protocol.name} ({protocol.split}): "
            f"{'; '.join(found.differences)}{lists if protocol.files.lists else ''}; nothing was measured "
            "(--set expected=null measures what is there, and its card compares with no full one)"
        )


def read_retrieval_set(protocol: Protocol, annotations: Path, videos: Path | None) -> EvaluationSet:
    """Read a retrieval benchmark: the gallery in order of the videos' keys, the queries in the gallery's.

    Args:
        protocol: What to measure.
        annotations: The main file or the folder of all.
        videos: Folder of the videos; None where features are at hand and no video is opened.

    Raises:
        InvalidInput: The annotations cannot be used, or do not hold what the protocol expects.
    """
    found = read_records(protocol, annotations)
    require_counts(protocol, found)
    rows = [row for row in found.records if isinstance(row, Captioned)]
    keys = [video_key(name) for name in found.videos]
    column = {key: place for place, key in enumerate(keys)}
    queries = sorted(_queries(rows, protocol, column), key=lambda query: query[1][0])
    texts = tuple(text for text, _ in queries)
    lists = [columns for _, columns in queries]
    return EvaluationSet(
        clip_ids=tuple(keys),
        paths=locate(videos, found.videos, protocol),
        queries=texts,
        query_clip=np.asarray([columns[0] for columns in lists], np.int64),
        positives=Positives.from_lists(
            _share(texts, lists) if protocol.positives == "same-text" else lists, len(keys)
        ),
        groups=np.arange(len(keys), dtype=np.int64),
        twin_of=np.full(len(keys), -1, np.int64),
        annotations_sha256=_content_hash(keys, texts, lists),
        annotation_files=found.files,
    )


def read_choice_set(protocol: Protocol, annotations: Path, videos: Path) -> QuestionSet:
    """Read a multiple-choice benchmark.

    Raises:
        InvalidInput: The annotations cannot be used, or do not hold what the protocol expects.
    """
    found = read_records(protocol, annotations)
    require_counts(protocol, found)
    keys = [video_key(name) for name in found.videos]
    column = {key: place for place, key in enumerate(keys)}
    asked = [record for record in found.records if isinstance(record, Question)]
    questions = [
        ChoiceQuestion(
            clip=column[video_key(question.video)],
            kind=question.kind or "choice",
            text=question.text,
            candidates=question.candidates,
            answer=question.answer_index,
        )
        for question in asked
        if question.answer_index is not None
    ]
    if len(questions) < len(asked):
        raise InvalidInput(f"{annotations}: {len(asked) - len(questions)} questions have no candidates")
    return QuestionSet(
        clip_ids=tuple(keys),
        paths=locate(videos, found.videos, protocol),
        groups=tuple(range(len(keys))),
        questions=tuple(questions),
        annotations_sha256=content_hash(asked),
    )


def locate(folder: Path | None, names: Sequence[str], protocol: Protocol) -> tuple[Path, ...]:
    """Return each video's file; where there is none, the place where it should lie.

    Raises:
        InvalidInput: A name leaves the folder, or could mean several files.
    """
    if folder is None:
        return tuple(Path(name) for name in names)
    known = VideoFolder(folder, protocol.prefixes)
    paths = []
    for name in names:
        path, reason = known.find(name)
        if reason in ("unsafe_name", "ambiguous"):
            raise InvalidInput(f"{folder}: the video {name!r} cannot be looked for: {reason}")
        paths.append(path if path is not None else folder / Path(name).name)
    return tuple(paths)


def _queries(
    rows: Sequence[Captioned], protocol: Protocol, column: dict[str, int]
) -> list[tuple[str, list[int]]]:
    """Return (text, columns of its videos) by the caption rule; the sort by column keeps the file's order."""
    found = []
    for row in rows:
        columns = sorted({column[video_key(name)] for name in row.videos})
        found += [(text, columns) for text in apply_rule(row.captions, protocol.captions)]
    return found


def apply_rule(captions: Sequence[str], rule: str) -> list[str]:
    """Return the queries that the captions of one row become by a protocol's ``captions``."""
    if rule == "joined":
        return [" ".join(captions)]
    return list(captions[:1]) if rule == "first" else list(captions)


def _share(texts: Sequence[str], lists: Sequence[list[int]]) -> list[list[int]]:
    """Return the positives of each query and of all others that say the same after cleaning."""
    by_text: dict[str, set[int]] = {}
    cleaned = [clean(text) for text in texts]
    for text, columns in zip(cleaned, lists, strict=True):
        by_text.setdefault(text, set()).update(columns)
    return [sorted(by_text[text]) for text in cleaned]


def _content_hash(keys: Sequence[str], texts: Sequence[str], lists: Sequence[list[int]]) -> str:
    """Return a hash of queries and gallery that layouts with the same content share."""
    content = [list(keys), *([text, columns] for text, columns in zip(texts, lists, strict=True))]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _count_captions(rows: Sequence[Captioned], protocol: Protocol) -> Counts:
    videos = {video_key(name) for row in rows for name in row.videos}
    return Counts(
        videos=len(videos),
        captions=sum(len(row.captions) for row in rows),
        queries=sum(len(apply_rule(row.captions, protocol.captions)) for row in rows),
    )


def _num_videos(records: Sequence[Question] | Sequence[Moment]) -> int:
    return len({video_key(record.video) for record in records})
