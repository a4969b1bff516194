"""The manifest of `vlm data world` as an evaluation set: truth comes from the scenes, never from the text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm import world
from vlm.data.annotations.labels import LabelledSet
from vlm.errors import InvalidInput
from vlm.evaluation.card import file_sha256
from vlm.evaluation.dataset import EvaluationSet
from vlm.evaluation.pairs.minimal import world_foils
from vlm.evaluation.protocol import Protocol
from vlm.evaluation.questions import ChoiceQuestion, QuestionSet
from vlm.metrics import Positives
from vlm.metrics.matrices import Ints
from vlm.world.oracles import ORACLES, oracle_scores
from vlm.world.scene import VERSION


def read_world(manifest: Path, videos: Path, protocol: Protocol) -> EvaluationSet:
    """Read a world's manifest.

    Args:
        manifest: ``manifest.jsonl``, one clip a line.
        videos: Folder that the clips' file names are relative to.
        protocol: Which captions are queries, and what counts as a positive.

    Raises:
        InvalidInput: The manifest is missing, empty, or a line is not a clip of this world.
    """
    rows = list(read_manifest(manifest))
    scenes = [row["scene"] for row in rows]
    if protocol.positives == "all-true":
        truth = world.truth_matrix(scenes, scenes)
    else:
        truth = np.eye(len(rows), dtype=bool)
    twin_of = _twins([row["id"] for row in rows], [row["twin_id"] for row in rows], manifest)
    return EvaluationSet(
        clip_ids=tuple(row["id"] for row in rows),
        paths=tuple(videos / row["file"] for row in rows),
        queries=tuple(row["caption"] for row in rows),
        query_clip=np.arange(len(rows), dtype=np.int64),
        positives=Positives.from_matrix(truth),
        groups=_groups(twin_of),
        twin_of=twin_of,
        tiers=tuple(_tier(scene) for scene in scenes),
        oracles={name: oracle_scores(name, scenes).astype(np.int8) for name in (*ORACLES, "frame set")},
        annotations_sha256=file_sha256(manifest),
        foils=world_foils(scenes) if protocol.minimal_pairs else (),
    )


def read_world_questions(manifest: Path, videos: Path) -> QuestionSet:
    """Read a world's multiple-choice questions; candidates are full statements, as captions are worded.

    Raises:
        InvalidInput: The manifest is missing, empty, or a line is not a clip of this world.
    """
    rows = list(read_manifest(manifest))
    twin_of = _twins([row["id"] for row in rows], [row["twin_id"] for row in rows], manifest)
    try:
        questions = tuple(
            ChoiceQuestion(
                clip=clip,
                kind=item["kind"],
                text="",
                candidates=tuple(item["statements"]),
                answer=item["answer_index"],
            )
            for clip, row in enumerate(rows)
            for item in row["questions"]
        )
    except (KeyError, TypeError) as error:
        raise InvalidInput(
            f"{manifest}: a question is not as `vlm data world` writes it: {error!r}"
        ) from error
    return QuestionSet(
        clip_ids=tuple(row["id"] for row in rows),
        paths=tuple(videos / row["file"] for row in rows),
        groups=tuple(_groups(twin_of).tolist()),
        questions=questions,
        annotations_sha256=file_sha256(manifest),
    )


def read_world_labels(manifest: Path, videos: Path, choice: str) -> tuple[LabelledSet, tuple[int, ...]]:
    """Read the clips of a world that can be sorted, with their classes; see `vlm.world.action`.

    Args:
        manifest: ``manifest.jsonl``, one clip a line.
        videos: Folder that the clips' file names are relative to.
        choice: A key of ``vlm.world.ACTIONS``.

    Returns:
        The clips that have a class, and one label for each clip and its twin.

    Raises:
        InvalidInput: The manifest is missing or empty, a line is no clip of this world, or none has a class.
    """
    rows = list(read_manifest(manifest))
    groups = _groups(_twins([row["id"] for row in rows], [row["twin_id"] for row in rows], manifest))
    named = [
        (row, group, world.action(row["scene"], choice)) for row, group in zip(rows, groups, strict=True)
    ]
    kept = [(row, int(group), name) for row, group, name in named if name is not None]
    if not kept:
        raise InvalidInput(
            f"{manifest}: in no clip a single thing happens, or is to be seen, that has a {choice}"
        )
    paths = [videos / row["file"] for row, _, _ in kept]
    data = LabelledSet(
        names=tuple(row["id"] for row, _, _ in kept),
        paths=tuple(path if path.is_file() else None for path in paths),
        reasons=tuple("" if path.is_file() else "missing" for path in paths),
        labels=tuple(world.ACTIONS[choice].index(name) for _, _, name in kept),
        classes=world.ACTIONS[choice],
    )
    return data, tuple(group for _, group, _ in kept)


def read_manifest(manifest: Path) -> Iterator[dict[str, Any]]:
    """Yield each clip of a manifest: ``id, file, caption, twin_id, questions`` and ``scene`` as a Scene.

    Raises:
        InvalidInput: The file is missing or empty, or a line is not a clip of this world.
    """
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{manifest}: cannot be read as a manifest: {error}") from error
    if not any(line.strip() for line in lines):
        raise InvalidInput(f"{manifest}: the manifest is empty; make one with: vlm data world --out DIR")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row["version"] != VERSION:
                raise ValueError(f"version {row['version']!r} instead of {VERSION!r}")
            texts = {name: row[name] for name in ("id", "file", "caption")}
            if not all(isinstance(text, str) and text for text in texts.values()):
                raise ValueError(f"empty or not text: {texts}")
            scene = world.Scene.from_json(json.dumps(row["scene"]))
            yield {**texts, "twin_id": row["twin_id"], "questions": row["questions"], "scene": scene}
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(
                f"{manifest}: line {number} is not a clip of the digit world ({error}); "
                "make one with: vlm data world --out DIR"
            ) from error


def _tier(scene: world.Scene) -> str:
    return f"{_count(scene.things, 'thing')}, {_count(scene.events, 'event')}"


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}" + ("s" if len(items) != 1 else "")


def _groups(twin_of: Ints) -> Ints:
    """Return one label for a clip and its twin."""
    own = np.arange(len(twin_of), dtype=np.int64)
    return np.where(twin_of >= 0, np.minimum(own, twin_of), own)


def _twins(clip_ids: list[str], twins: list[str | None], manifest: Path) -> Ints:
    column = {clip: place for place, clip in enumerate(clip_ids)}
    if len(column) != len(clip_ids):
        raise InvalidInput(f"{manifest}: a clip is listed twice; {len(clip_ids)} lines, {len(column)} clips")
    return np.asarray([column.get(twin, -1) if twin else -1 for twin in twins], np.int64)
