"""Models that were not trained for the classes: a linear probe on their features, or prompts in words."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vlm.config import to_dict
from vlm.errors import CapabilityError, InvalidInput
from vlm.evaluation.card import Card
from vlm.evaluation.classification.probe import Probe, choose_penalty, fit_probe
from vlm.evaluation.classification.protocol import ClassificationProtocol
from vlm.evaluation.classification.runner import (
    ScoringOptions,
    VideoClasses,
    ViewLoader,
    make_card,
    mean_softmax,
    score_videos,
)
from vlm.evaluation.features import encode_texts
from vlm.metrics.matrices import Floats
from vlm.models.video_model import VideoModel


def evaluate_linear_probe(
    model: VideoModel,
    train: VideoClasses,
    test: VideoClasses,
    protocol: ClassificationProtocol,
    load: ViewLoader,
    *,
    source: str = "",
    options: ScoringOptions | None = None,
) -> Card:
    """Train a linear classifier on a model's frozen features, test it, and make its card.

    A video's features are the mean over time of ``encode_video(...).pooled``; training sees one view of each
    video, from its middle. The videos of the test take no part in any choice.

    Args:
        model: Any model that encodes video.
        train: Videos to train with, of the same classes.
        test: Videos to test with.
        protocol: Which views, which penalties, which measures.
        load: As ``evaluate_classifier``.
        source: How the model was named by the caller, for the card.
        options: How to run.

    Raises:
        InvalidInput: A video stands in both sets, a video cannot be read and ``allow_missing`` is off, a
            feature is not finite, or there are too few training videos.
    """
    options = options or ScoringOptions()
    _check_apart(train, test)
    names = test.data.classes
    learnt = _learn(model, train, protocol, load, options, len(names))
    scored = score_videos(
        model,
        lambda video: learnt.probe.logits(_features(model, video)),
        mean_softmax,
        test.data,
        protocol,
        load,
        options,
    )
    right = np.asarray(test.data.labels, np.int64)
    settings = {"method": "linear-probe", "probe": learnt.settings}
    card = make_card(model, test, protocol, scored, right, names, source=source, pinned=settings)
    return card | {"probe": learnt.choice}


def evaluate_zero_shot(
    model: VideoModel,
    test: VideoClasses,
    protocol: ClassificationProtocol,
    load: ViewLoader,
    *,
    source: str = "",
    options: ScoringOptions | None = None,
) -> Card:
    """Let a model tell classes apart by their names in prompts, and make its card.

    A class is the mean of the unit vectors of its prompts, made a unit vector again, as CLIP was tested; a
    video is scored by the mean over its views of the inner product, ``itc``.

    Args:
        model: A model that embeds videos and texts.
        test: Videos and their classes, with names.
        protocol: Which views, which prompts, which measures.
        load: As ``evaluate_classifier``.
        source: How the model was named by the caller, for the card.
        options: How to run.

    Raises:
        CapabilityError: The model has no embedding that video and text share.
        InvalidInput: The protocol has no prompts, the classes no names, a video cannot be read and
            ``allow_missing`` is off, or an embedding is not finite.

    Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, 3.1.4.
    """
    if "search" not in model.capabilities:
        raise CapabilityError(
            f"model {model.name!r} (kind {model.kind}) cannot embed videos and texts, which prompts need; "
            f"it can: {', '.join(sorted(model.capabilities)) or 'nothing'}"
        )
    names = test.data.classes
    if not protocol.prompts:
        raise InvalidInput(
            f"protocol {protocol.name!r} has no prompts; give some: --set 'prompts=[\"a video of {{}}\"]'"
        )
    if names == tuple(map(str, range(len(names)))):
        raise InvalidInput("the labels are numbers, and prompts need words: --classes FILE names the classes")
    texts = [prompt.format(name.replace("_", " ")) for name in names for prompt in protocol.prompts]
    classes, num_truncated = _embed_classes(model, texts, len(names))

    def similarity(video: Tensor) -> Tensor:
        return model.encode_video(video).embedding.double() @ classes.to(video.device).T

    scored = score_videos(
        model, similarity, _mean_score, test.data, protocol, load, options or ScoringOptions()
    )
    settings: dict[str, Any] = {"method": "zero-shot", "prompts": list(protocol.prompts)}
    right = np.asarray(test.data.labels, np.int64)
    card = make_card(model, test, protocol, scored, right, names, source=source, kind="itc", pinned=settings)
    card["data"] |= {
        "prompts_truncated": num_truncated,
        "unknown_words": sorted({word for text in texts for word in model.unknown_words(text)})[:50],
    }
    return card


@dataclass(frozen=True, slots=True)
class _Learnt:
    """A probe, what two cards must share of how it was trained, what was chosen, and what was missing."""

    probe: Probe
    settings: dict[str, Any]
    choice: dict[str, Any]


def _learn(
    model: VideoModel,
    train: VideoClasses,
    protocol: ClassificationProtocol,
    load: ViewLoader,
    options: ScoringOptions,
    num_classes: int,
) -> _Learnt:
    # the single view of "shifted" would begin every span, not stand in its middle
    sampling = "segments" if protocol.sampling == "shifted" else protocol.sampling
    one_view = replace(protocol, clips=1, crops=1, sampling=sampling)
    seen = score_videos(
        model, lambda video: _features(model, video), _mean_score, train.data, one_view, load, options
    )
    labels = np.asarray(train.data.labels, np.int64)[seen.kept]
    groups = np.asarray(train.groups, np.int64)[seen.kept].tolist()
    penalty, accuracies = choose_penalty(
        seen.scores, labels, groups, num_classes, protocol.probe, model.device
    )
    trained_on = "\n".join(sorted(train.data.names[number] for number in seen.kept)).encode()
    return _Learnt(
        probe=fit_probe(seen.scores, labels, num_classes, penalty, model.device),
        settings={
            **to_dict(protocol.probe),
            "train_annotations_sha256": train.annotations_sha256,
            "train_videos_sha256": hashlib.sha256(trained_on).hexdigest(),
            "num_train": len(seen.kept),
        },
        choice={
            "features": "mean of pooled",
            "penalty": penalty,
            "held_out_accuracy": {f"{value:g}": share for value, share in accuracies.items()},
            "train_missing": [{"clip": name, "reason": reason} for name, reason in seen.missing],
        },
    )


def _features(model: VideoModel, video: Tensor) -> Tensor:
    return model.encode_video(video).pooled.float().mean(dim=1)


def _embed_classes(model: VideoModel, texts: list[str], num_classes: int) -> tuple[Tensor, int | None]:
    """Return a unit vector a class, (classes, e) float64, of its texts in turn, and how many were cut."""
    encoded = encode_texts(model, texts)
    rows = F.normalize(torch.from_numpy(encoded.embeddings).double(), dim=-1)
    by_class = rearrange(rows, "(classes prompts) e -> classes prompts e", classes=num_classes)
    return F.normalize(by_class.mean(dim=1), dim=-1), encoded.num_truncated


def _check_apart(train: VideoClasses, test: VideoClasses) -> None:
    tested = {path.resolve() for path in test.data.paths if path is not None}
    both = [path for path in train.data.paths if path is not None and path.resolve() in tested]
    if both:
        raise InvalidInput(
            f"{len(both)} videos stand in the training set and in the test set, such as {both[0]}; what is "
            "trained on cannot be tested on"
        )


def _mean_score(scores: Floats) -> Floats:
    if not np.isfinite(scores).all():
        raise ValueError("features or scores are not finite")
    return np.asarray(np.asarray(scores, np.float64).mean(axis=0))
