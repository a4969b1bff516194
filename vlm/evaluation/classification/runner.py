"""A classifier on labelled videos: every view scored, the views of a video averaged, one card."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm.config import to_dict
from vlm.data.annotations.labels import LabelledSet
from vlm.data.preprocessing import normalise
from vlm.errors import DataError, InvalidInput
from vlm.evaluation.benchmarks.description import describe_published
from vlm.evaluation.card import FORMAT, Card, as_json, counts_as_json, sections
from vlm.evaluation.card.leakage import Overlap, leakage_section
from vlm.evaluation.classification.protocol import ClassificationProtocol
from vlm.evaluation.dataset import refuse_missing
from vlm.metrics import RankCounts
from vlm.metrics.classification import average_views, class_accuracy, confusion, top_hits
from vlm.metrics.matrices import Floats
from vlm.models.classifier import Classifier
from vlm.models.video_model import VideoModel
from vlm.progress import progress_bar
from vlm.types import Preprocessing

ViewLoader = Callable[[Path, Preprocessing, ClassificationProtocol], Tensor]
_MOST_CONFUSIONS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoClasses:
    """Labelled videos to test with.

    Attributes:
        data: The videos and their classes.
        groups: Joins those that are resampled together, a clip and its twin.
        annotations_sha256: Of the file of labels.
        overlap: What was found of them in the model's training set; None if nobody looked.
    """

    data: LabelledSet
    groups: tuple[int, ...]
    annotations_sha256: str
    overlap: Overlap | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringOptions:
    """How to run, without influence on what is measured.

    Attributes:
        batch_size: Views scored at once.
        workers: Threads that decode ahead.
        allow_missing: Leave unreadable videos out, and list them; a number allows so many.
        autocast: Matrix products in bf16.
    """

    batch_size: int = 16
    workers: int = 2
    allow_missing: bool | int = False
    autocast: bool = False


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores (videos, classes) over all views and of the middle one, whose they are, and what is missing.

    ``precision`` is what they were computed in, empty where the weights say it.
    """

    scores: Floats
    middle: Floats
    kept: list[int]
    missing: list[tuple[str, str]]
    seconds: float
    precision: str = ""


def evaluate_classifier(
    model: VideoModel,
    test: VideoClasses,
    protocol: ClassificationProtocol,
    load: ViewLoader,
    *,
    source: str = "",
    options: ScoringOptions | None = None,
) -> Card:
    """Test a classifier and make its card.

    Args:
        model: The model under test.
        test: Videos and their classes.
        protocol: Which views, which measures.
        load: File, preprocessing and protocol → (views, t, 3, s, s) uint8; raises DataError.
        source: How the model was named by the caller, for the card.
        options: How to run.

    Raises:
        CapabilityError: The model is no classifier.
        InvalidInput: Its classes are others than the videos', a video cannot be read and ``allow_missing`` is
            off, or a logit is not finite.
    """
    model.require("classify")
    assert isinstance(model, Classifier), "no other kind can classify"
    options = options or ScoringOptions()
    labels, names = match_classes(test.data, model)
    scored = score_videos(model, model, mean_softmax, test.data, protocol, load, options)
    return make_card(model, test, protocol, scored, labels, names, source=source)


def make_card(
    model: VideoModel,
    test: VideoClasses,
    protocol: ClassificationProtocol,
    scored: Scored,
    labels: NDArray[np.int64],
    names: Sequence[str],
    *,
    source: str = "",
    kind: str = "mean softmax",
    pinned: Mapping[str, Any] | None = None,
) -> Card:
    """Return the card of videos whose classes were scored.

    Args:
        model: The model under test.
        test: The videos.
        protocol: Which measures.
        scored: What came out.
        labels: The right class of each video, those that could not be read too; (videos,).
        names: Of the classes.
        source: How the model was named by the caller.
        kind: What the scores are.
        pinned: What two cards must share beyond the protocol, such as how classes were told apart.
    """
    kept, missing, seconds = scored.kept, scored.missing, scored.seconds
    paths = (test.data.paths[number] for number in kept)
    outcome = _Outcome(scored.scores, labels[kept], np.asarray(test.groups, np.int64)[kept], names, protocol)
    return {
        "format": FORMAT,
        "protocol": _protocol_section(protocol, test, kept, model, len(names)) | dict(pinned or {}),
        "model": sections.model_section(model, source, scored.precision),
        "results": {
            "classification": outcome.measures(),
            "single_view": replace(outcome, scores=scored.middle).measures(),
        },
        "chance": outcome.chance(),
        "classes": outcome.classes(),
        "confusions": outcome.confusions(),
        "data": {
            "videos_expected": len(labels),
            "videos_decoded": len(kept),
            "missing": [{"clip": name, "reason": reason} for name, reason in missing],
        },
        "leakage": leakage_section(test.overlap, [path for path in paths if path is not None]),
        "deviations": [] if protocol.input is None else protocol.input.deviations(model.preprocessing),
        "published": [describe_published(entry, protocol.num_trials) for entry in protocol.published],
        "environment": sections.environment(str(model.device), torch.get_num_threads()),
        "cost": {"total_s": round(seconds, 4), "ms_per_video": round(1000 * seconds / len(kept), 4)},
        "per_query": {"video_to_class": {kind: outcome.per_video()}},
    }


def match_classes(data: LabelledSet, model: Classifier) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return each video's class by the model's numbers, and the classes' names; names decide where both know.

    Raises:
        InvalidInput: The model has other classes, or too few.
    """
    own, given = model.config.class_names, data.classes
    labels = np.asarray(data.labels, np.int64)
    size = model.config.num_classes
    if given == tuple(map(str, range(len(given)))):  # numbers alone
        if len(given) > size:
            raise InvalidInput(
                f"a video is labelled {len(given) - 1}, model {model.name!r} has {size} classes"
            )
        return labels, own or tuple(map(str, range(size)))
    if own and set(own) != set(given):
        other = sorted(set(given) - set(own)) or sorted(set(own) - set(given))
        raise InvalidInput(
            f"model {model.name!r} knows other classes than the labels name, such as {other[0]!r}; "
            "--classes FILE gives their names"
        )
    if len(given) != size:
        raise InvalidInput(
            f"model {model.name!r} has {size} classes, the labels name {len(given)}; --classes FILE lists all"
        )
    place = {name: number for number, name in enumerate(own or given)}
    return np.asarray([place[name] for name in given])[labels], own or given


def score_videos(
    model: VideoModel,
    head: Callable[[Tensor], Tensor],
    average: Callable[[Floats], Floats],
    data: LabelledSet,
    protocol: ClassificationProtocol,
    load: ViewLoader,
    options: ScoringOptions,
) -> Scored:
    """Score every view of every video that can be read, and average the views of each.

    Args:
        model: The model, put into evaluation for the time.
        head: Preprocessed video (b, t, 3, s, s) → scores (b, classes).
        average: Scores (views, classes) → (classes,); raises ValueError for what is not finite.
        data: The videos.
        protocol: Which views.
        load: As ``evaluate_classifier``.
        options: How to run.

    Raises:
        InvalidInput: A video cannot be read and ``allow_missing`` is off, none can be read, or a score is not
            finite.
    """
    absent = [(name, reason) for name, reason in zip(data.names, data.reasons, strict=True) if reason]
    refuse_missing(absent, len(data.names), options.allow_missing, "videos")
    began = time.perf_counter()
    was_training = model.training
    model.eval()
    middle = protocol.clips // 2 * protocol.crops + protocol.crops // 2
    scores, singles, kept, missing = [], [], [], []
    with progress_bar(len(data.names), "videos", "video") as bar, torch.inference_mode():
        for number, views in _load_ahead(model.preprocessing, data, protocol, load, options.workers):
            bar.update()
            if isinstance(views, DataError):
                missing.append((data.names[number], f"{views.reason}: {views}"))
                continue
            parts = []
            for start in range(0, len(views), options.batch_size):
                part = views[start : start + options.batch_size]
                video = normalise(part.to(model.device), model.preprocessing)
                with torch.autocast(model.device.type, torch.bfloat16, enabled=options.autocast):
                    parts.append(head(video).float().cpu())
            rows_of_video = torch.cat(parts).numpy()
            try:
                scores.append(average(rows_of_video))
                singles.append(average(rows_of_video[middle : middle + 1]))
            except ValueError as error:
                raise InvalidInput(f"model {model.name!r}, {data.names[number]}: {error}") from error
            kept.append(number)
    model.train(was_training)
    refuse_missing(missing, len(data.names), options.allow_missing, "videos")
    if not kept:
        raise InvalidInput("no video can be read, so there is nothing to measure")
    seconds = time.perf_counter() - began
    precision = "bfloat16, by autocast" if options.autocast else ""
    return Scored(np.asarray(scores), np.asarray(singles), kept, missing, seconds, precision)


def mean_softmax(logits: Floats) -> Floats:
    """Return the mean over views of the softmax of logits (views, classes): (classes,) float64.

    Raises:
        ValueError: A logit is not finite.
    """
    return np.asarray(average_views(logits[None])[0])


def _load_ahead(
    p: Preprocessing, data: LabelledSet, protocol: ClassificationProtocol, load: ViewLoader, workers: int
) -> Iterator[tuple[int, Tensor | DataError]]:
    """Yield every video's views in order, decoded by threads a few videos ahead."""

    def views_of(number: int) -> Tensor | DataError:
        path = data.paths[number]
        if path is None:
            return DataError(f"{data.names[number]}: no such video", data.reasons[number])
        try:
            return load(path, p, protocol)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = deque(pool.submit(views_of, number) for number in range(min(2 * workers, len(data.names))))
        for number in range(len(data.names)):
            following = number + len(waiting)
            if following < len(data.names):
                waiting.append(pool.submit(views_of, following))
            yield number, waiting.popleft().result()


@dataclass(frozen=True, slots=True)
class _Outcome:
    scores: Floats
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    names: Sequence[str]
    protocol: ClassificationProtocol

    def _tops(self) -> list[int]:
        return [k for k in self.protocol.top if k <= self.scores.shape[1]]

    def measures(self) -> dict[str, Any]:
        """Return top-k accuracy and the mean over classes of top-1, each with its interval."""
        mean = self.protocol.bootstrap.mean
        block = {
            f"top{k}": as_json(mean(top_hits(self.scores, self.labels, k), self.groups)) for k in self._tops()
        }
        hits = top_hits(self.scores, self.labels, 1)
        block["mean_class"] = as_json(self.protocol.bootstrap.class_mean(hits, self.labels, self.groups))
        return block

    def chance(self) -> dict[str, Any]:
        """Return what guessing reaches, and always naming the class that is most frequent in these videos."""
        size = len(self.names)
        block = {f"top{k}": {"value": k / size} for k in self._tops()}
        frequent = float(np.bincount(self.labels).max() / len(self.labels))
        return {**block, "mean_class": {"value": 1 / size}, "most_frequent_class": {"value": frequent}}

    def classes(self) -> dict[str, Any]:
        """Return the accuracy of each class that occurs."""
        hits = top_hits(self.scores, self.labels, 1)
        present, counts = np.unique(self.labels, return_counts=True)
        rows = zip(present, counts, class_accuracy(hits, self.labels), strict=True)
        return {self.names[c]: {"num_videos": int(n), "top1": float(value)} for c, n, value in rows}

    def confusions(self) -> list[dict[str, Any]]:
        """Return which class is taken for which other one, the most frequent first."""
        table = confusion(self.scores.argmax(axis=1), self.labels, len(self.names))
        np.fill_diagonal(table, 0)
        order = np.argsort(-table, axis=None, kind="stable")[:_MOST_CONFUSIONS]
        cells = [divmod(int(cell), len(self.names)) for cell in order]
        return [
            {"class": self.names[row], "taken_for": self.names[column], "num_videos": int(table[row, column])}
            for row, column in cells
            if table[row, column]
        ]

    def per_video(self) -> dict[str, Any]:
        """Return where the right class stands for each video, as retrieval's cards do for each query."""
        own = self.scores[np.arange(len(self.labels)), self.labels][:, None]
        above, tied = (self.scores > own).sum(axis=1), (self.scores == own).sum(axis=1)
        size = self.scores.shape[1]
        return counts_as_json(RankCounts(above, tied, np.ones_like(tied), size, size), self.groups)


def _protocol_section(
    protocol: ClassificationProtocol,
    test: VideoClasses,
    kept: list[int],
    model: VideoModel,
    num_classes: int,
) -> dict[str, Any]:
    pinned = to_dict(protocol)
    for name in ("summary", "origin", "published", "prompts", "probe", "expected", "known", "input"):
        del pinned[name]
    names = "\n".join(sorted(test.data.names[number] for number in kept)).encode()
    return {
        **pinned,
        "task": "classification",
        "recall_at": [k for k in protocol.top if k <= num_classes],
        "frames": model.preprocessing.num_frames,
        "image_size": model.preprocessing.image_size,
        "views": protocol.clips * protocol.crops,
        "annotations_sha256": test.annotations_sha256,
        "gallery_sha256": hashlib.sha256(names).hexdigest(),
        "num_items": len(kept),
        "num_classes": num_classes,
    }
