"""Linear probes and prompts, on models whose features are painted, against formulas of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.data.annotations.labels import LabelledSet
from vlm.errors import CapabilityError, InvalidInput
from vlm.evaluation import compare_cards, render_card
from vlm.evaluation.classification.frozen import evaluate_linear_probe, evaluate_zero_shot
from vlm.evaluation.classification.probe import choose_penalty, fit_probe
from vlm.evaluation.classification.protocol import ClassificationProtocol, ProbeSettings
from vlm.evaluation.classification.runner import ScoringOptions, VideoClasses
from vlm.models import EncoderConfig, EncoderModel, VideoMambaConfig
from vlm.types import TextFeatures, VideoFeatures

VISION = VideoMambaConfig(width=16, depth=1, num_frames=2, image_size=16, patch_size=16, pool_norm=False)
NAMES = ("red_thing", "green_thing", "blue_thing")
PROTOCOL = ClassificationProtocol(name="t", version=1, summary="", prompts=("a {}", "one {}"))


class Painted(EncoderModel):
    """Its features are the colour of the first pixel; texts are the colour that they name."""

    def encode_video(self, video):
        p = self.preprocessing
        mean, std = (torch.tensor(part) for part in (p.mean, p.std))
        colours = video[:, :, :, 0, 0] * std + mean
        return VideoFeatures(colours, colours, colours.mean(dim=1))

    def encode_text(self, texts):
        rows = torch.tensor(
            [[float(name in text.split()) for name in ("red", "green", "blue")] for text in texts]
        )
        rows = rows * torch.tensor([[1.0 + 4 * text.startswith("one")] for text in texts])
        return TextFeatures(rows[:, None], torch.ones(len(texts), 1, dtype=torch.int64), rows)

    def unknown_words(self, text):
        return [word for word in text.split() if word == "one"]


def painter(**named):
    return Painted(EncoderConfig(vision=VISION), name="painter", **named).eval()


def videos(prefix, labels, classes=NAMES):
    names = tuple(f"{prefix}{number}" for number in range(len(labels)))
    data = LabelledSet(
        names=names,
        paths=tuple(map(Path, names)),
        reasons=("",) * len(names),
        labels=tuple(labels),
        classes=tuple(classes),
    )
    return VideoClasses(data=data, groups=tuple(range(len(names))), annotations_sha256=prefix)


def loader(colours):
    """Return a loader that paints every view of a video in its colour, (3,) of 0 to 255."""

    def load(path, p, protocol):
        views = protocol.clips * protocol.crops
        pixels = torch.zeros(views, p.num_frames, 3, p.image_size, p.image_size, dtype=torch.uint8)
        pixels[:, :, :, 0, 0] = torch.tensor(colours[path.name], dtype=torch.uint8)
        return pixels

    return load


def coloured(prefix, labels, random):
    """Return a colour a video: that of its class, with noise that does not hide it."""
    rows = random.integers(0, 100, (len(labels), 3))
    rows[np.arange(len(labels)), labels] += 150
    return {f"{prefix}{number}": row.tolist() for number, row in enumerate(rows)}


def test_the_probe_is_the_minimum_of_its_formula():
    """The gradient, written down by hand, is zero, and the standardisation that of NumPy."""
    random = np.random.default_rng(1)
    features = random.normal(3, 5, (40, 4))
    features[:, 3] = 7  # says nothing, and must not divide by zero
    labels = random.integers(0, 3, 40)
    probe = fit_probe(features, labels, 4, 0.01)
    rows = (features - features.mean(axis=0)) / np.where(features.std(axis=0) > 0, features.std(axis=0), 1)
    weight, bias = probe.weight.numpy(), probe.bias.numpy()
    logits = rows @ weight.T + bias
    assert probe.logits(torch.from_numpy(features)).numpy() == pytest.approx(logits)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    errors = (shares - np.eye(4)[labels]) / 40
    assert np.abs(errors.T @ rows + 0.01 * weight).max() < 1e-6
    assert np.abs(errors.sum(axis=0)[:3]).max() < 1e-6


def test_the_probe_is_that_of_another_library():
    linear = pytest.importorskip("sklearn.linear_model")
    random = np.random.default_rng(2)
    features, labels = random.normal(size=(60, 5)), random.integers(0, 3, 60)
    rows = (features - features.mean(axis=0)) / features.std(axis=0)
    other = linear.LogisticRegression(C=1 / (60 * 0.1), tol=1e-10, max_iter=2000).fit(rows, labels)
    probe = fit_probe(features, labels, 3, 0.1)
    ours = torch.softmax(probe.logits(torch.from_numpy(features)), dim=1).numpy()
    assert ours == pytest.approx(other.predict_proba(rows), abs=1e-5)


def test_the_penalty_is_chosen_on_videos_held_out():
    """One feature tells, sixty are noise, and twins stay on one side, or memory would look like knowledge."""
    random = np.random.default_rng(3)
    labels = np.repeat(random.integers(0, 2, 30), 2)
    features = np.concatenate([labels[:, None] + random.normal(0, 0.4, (60, 1)),
                               np.repeat(random.normal(size=(30, 60)), 2, axis=0)], axis=1)  # fmt: skip
    settings = ProbeSettings(penalties=(1e-6, 1e-1, 1.0), held_out=0.5)
    groups = np.repeat(np.arange(30) * 7, 2)
    chosen, accuracies = choose_penalty(features, labels, groups.tolist(), 2, settings)
    assert list(accuracies) == [1e-6, 1e-1, 1.0]
    assert accuracies[chosen] == max(accuracies.values())
    halves = set(np.random.default_rng(0).permutation(30)[:15].tolist())
    held = np.asarray([group // 7 in halves for group in groups])
    losses = {}
    for penalty, share in accuracies.items():
        probe = fit_probe(features[~held], labels[~held], 2, penalty)
        logits = probe.logits(torch.from_numpy(features[held])).numpy()
        assert share == pytest.approx((logits.argmax(axis=1) == labels[held]).mean())
        own = logits[np.arange(held.sum()), labels[held]]
        losses[penalty] = np.mean(np.log(np.exp(logits).sum(axis=1)) - own)
    best = [value for value, share in accuracies.items() if share == max(accuracies.values())]
    assert chosen == min(best, key=losses.__getitem__)
    with pytest.raises(InvalidInput, match="at least two training videos"):
        choose_penalty(features[:2], labels[:2], [5, 5], 2, settings)


def test_a_probe_learns_what_its_features_hold_and_nothing_else():
    random = np.random.default_rng(4)
    labels = random.integers(0, 3, 60)
    test_labels = random.integers(0, 3, 30)
    colours = coloured("a", labels, random) | coloured("b", test_labels, random)
    train, test = videos("a", labels.tolist()), videos("b", test_labels.tolist())
    card = evaluate_linear_probe(painter(), train, test, PROTOCOL, loader(colours))
    assert card["results"]["classification"]["top1"]["value"] == 1
    section = card["protocol"]
    assert section["method"] == "linear-probe" and section["probe"]["num_train"] == 60
    assert "linear probe on frozen features: 30 videos of 3 classes" in render_card(card)
    noise = {name: random.integers(0, 256, 3).tolist() for name in colours}
    blind = evaluate_linear_probe(painter(), train, test, PROTOCOL, loader(noise))
    assert blind["results"]["classification"]["top1"]["value"] < 0.65
    entry = compare_cards(blind, card)["differences"]["video_to_class"]["mean softmax"]["recall@1"]
    assert entry["second"] == 1
    # the labels of the test change the figures, and no choice
    turned = videos("b", ((test_labels + 1) % 3).tolist())
    wrong = evaluate_linear_probe(painter(), train, turned, PROTOCOL, loader(colours))
    assert wrong["results"]["classification"]["top1"]["value"] == 0
    assert wrong["probe"] == card["probe"]


def test_training_on_the_test_is_refused():
    both = videos("a", [0, 1, 2])
    with pytest.raises(InvalidInput, match="3 videos stand in the training set and in the test set"):
        evaluate_linear_probe(painter(), both, both, PROTOCOL, loader({}))


def test_features_that_are_not_finite_are_refused():
    class Broken(Painted):
        def encode_video(self, video):
            features = super().encode_video(video)
            return features._replace(pooled=features.pooled * torch.nan)

    model = Broken(EncoderConfig(vision=VISION), name="broken")
    colours = {f"{prefix}{number}": [9, 9, 9] for prefix in "ab" for number in range(3)}
    with pytest.raises(InvalidInput, match="model 'broken', a0: features or scores are not finite"):
        evaluate_linear_probe(model, videos("a", [0, 1, 2]), videos("b", [0]), PROTOCOL, loader(colours))


def test_prompts_tell_colours_apart():
    """A class is the mean of unit vectors, whatever their lengths; a video the mean of its views."""
    model = painter(capabilities={"search"})
    colours = {"b0": [255, 0, 0], "b1": [0, 200, 40], "b2": [0, 0, 90], "b3": [100, 90, 0]}
    card = evaluate_zero_shot(model, videos("b", [0, 1, 2, 1]), PROTOCOL, loader(colours))
    assert card["results"]["classification"]["top1"]["value"] == 0.75
    assert card["confusions"] == [{"class": "green_thing", "taken_for": "red_thing", "num_videos": 1}]
    assert card["protocol"]["method"] == "zero-shot" and card["protocol"]["prompts"] == ["a {}", "one {}"]
    assert card["data"]["unknown_words"] == ["one"]
    assert "zero-shot by prompts: 4 videos of 3 classes" in render_card(card)
    assert list(card["per_query"]["video_to_class"]) == ["itc"]


def test_what_prompts_cannot_be_made_of():
    model = painter(capabilities={"search"})
    with pytest.raises(CapabilityError, match="cannot embed videos and texts, which prompts need"):
        evaluate_zero_shot(painter(), videos("b", [0]), PROTOCOL, loader({}))
    numbers = videos("b", [0, 1], classes=("0", "1"))
    with pytest.raises(InvalidInput, match="the labels are numbers, and prompts need words"):
        evaluate_zero_shot(model, numbers, PROTOCOL, loader({}))
    bare = ClassificationProtocol(name="t", version=1, summary="")
    with pytest.raises(InvalidInput, match="protocol 't' has no prompts"):
        evaluate_zero_shot(model, videos("b", [0]), bare, loader({}))
    with pytest.raises(ValueError, match="a prompt holds {} once"):
        ClassificationProtocol(name="t", version=1, summary="", prompts=("a video",))
    with pytest.raises(ValueError, match="penalties must be positive"):
        ProbeSettings(penalties=(0.0,))


def test_missing_training_videos_are_listed():
    from vlm.errors import DataError

    random = np.random.default_rng(5)
    colours = coloured("a", [0, 1, 2, 0, 1, 2], random) | coloured("b", [0, 1, 2], random)
    paint = loader(colours)

    def load(path, p, protocol):
        if path.name == "a5":
            raise DataError("a5: torn", "truncated")
        return paint(path, p, protocol)

    train, test = videos("a", [0, 1, 2, 0, 1, 2]), videos("b", [0, 1, 2])
    with pytest.raises(InvalidInput, match="1 of 6 videos cannot be read"):
        evaluate_linear_probe(painter(), train, test, PROTOCOL, load)
    card = evaluate_linear_probe(
        painter(), train, test, PROTOCOL, load, options=ScoringOptions(allow_missing=True)
    )
    assert card["probe"]["train_missing"] == [{"clip": "a5", "reason": "truncated: a5: torn"}]
    assert card["protocol"]["probe"]["num_train"] == 5
