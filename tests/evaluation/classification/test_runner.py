"""Cards of classifiers whose answers are known beforehand, from views worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.data.annotations.labels import LabelledSet
from vlm.errors import CapabilityError, DataError, InvalidInput
from vlm.evaluation import compare_cards, render_card, render_comparison
from vlm.evaluation.card import read_card, write_card
from vlm.evaluation.classification.protocol import (
    ClassificationProtocol,
    classification_protocol_files,
    load_classification_protocol,
)
from vlm.evaluation.classification.runner import (
    ScoringOptions,
    VideoClasses,
    evaluate_classifier,
    match_classes,
)
from vlm.evaluation.classification.views import choose_frames
from vlm.models import Classifier, ClassifierConfig, EncoderConfig, EncoderModel, VideoMambaConfig
from vlm.types import Preprocessing

VISION = VideoMambaConfig(width=16, depth=1, num_frames=2, image_size=16, patch_size=16, pool_norm=False)
NAMES = ("run", "jump", "sit")
TWO_BY_TWO = ClassificationProtocol(name="t", version=1, summary="", clips=2, crops=2, top=(1, 2, 5))


class Known(Classifier):
    """Its logits are the first three pixels of a view, undone: what the loader painted."""

    def forward(self, video):
        p = self.preprocessing
        red = video[:, 0, 0, 0, :3] * p.std[0] + p.mean[0]
        return (red * 255 - 128) / 8


def known(names=NAMES):
    return Known(ClassifierConfig(vision=VISION, num_classes=3, class_names=names), name="known").eval()


def video_set(labels, classes=NAMES, groups=None):
    names = tuple(f"v{number}" for number in range(len(labels)))
    data = LabelledSet(
        names=names,
        paths=tuple(map(Path, names)),
        reasons=("",) * len(labels),
        labels=tuple(labels),
        classes=tuple(classes),
    )
    return VideoClasses(data=data, groups=groups or tuple(range(len(labels))), annotations_sha256="0")


def painted(views):
    """Return a loader that paints each video's views, (views, 3) logits in steps of 1/8."""

    def load(path, p, protocol):
        logits = np.asarray(views[path.name], np.float64)
        assert len(logits) == protocol.clips * protocol.crops
        pixels = torch.zeros(len(logits), p.num_frames, 3, p.image_size, p.image_size, dtype=torch.uint8)
        pixels[:, 0, 0, 0, :3] = torch.from_numpy(np.round(logits * 8 + 128).astype(np.uint8))
        return pixels

    return load


def softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64))
    return powers / powers.sum(axis=-1, keepdims=True)


VIEWS = {
    # three views say jump, one says run with all its might: jump by the softmax's mean, run by the logits'
    "v0": [[0, 1, 0], [0, 1, 0], [0, 1, 0], [15, 0, 0]],
    "v1": [[4, 0, 0]] * 4,
    "v2": [[0, 0, 3], [0, 2, 0], [0, 2, 0], [0, 0, 3]],
    "v3": [[2, 0, 1]] * 4,
}


def test_views_are_averaged_and_counted_by_hand():
    test = video_set([1, 0, 2, 2])
    card = evaluate_classifier(
        known(), test, TWO_BY_TWO, painted(VIEWS), options=ScoringOptions(batch_size=3)
    )
    assert softmax(VIEWS["v0"]).mean(axis=0).argmax() == 1 and np.mean(VIEWS["v0"], axis=0).argmax() == 0
    results = card["results"]["classification"]
    assert results["top1"]["value"] == 0.75 and results["top2"]["value"] == 1.0 and "top5" not in results
    # run 1 of 1, jump 1 of 1, sit 1 of 2
    assert results["mean_class"]["value"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert results["top1"]["low"] < 0.75 < results["top1"]["high"]
    # clip 1, crop 1 alone: v0 says run, v1 run, v2 sit, v3 run
    assert card["results"]["single_view"]["top1"]["value"] == 0.5
    assert card["classes"]["sit"] == {"num_videos": 2, "top1": 0.5}
    assert card["confusions"] == [{"class": "sit", "taken_for": "run", "num_videos": 1}]
    assert card["chance"]["top1"]["value"] == pytest.approx(1 / 3)
    assert card["chance"]["most_frequent_class"]["value"] == 0.5
    protocol = card["protocol"]
    wanted = {
        "task": "classification",
        "clips": 2,
        "crops": 2,
        "views": 4,
        "frames": 2,
        "sampling": "segments",
    }
    assert wanted.items() <= protocol.items() and protocol["num_items"] == 4 and protocol["num_classes"] == 3


def test_a_card_can_be_written_read_shown_and_compared(tmp_path):
    test = video_set([1, 0, 2, 2])
    card = evaluate_classifier(known(), test, TWO_BY_TWO, painted(VIEWS))
    write_card(card, tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == card
    shown = render_card(card)
    assert "4 videos of 3 classes, 2 frames, 2 clips x 2 crops; model known" in shown
    assert "4 views   75.0" in shown and "taken for another: sit for run, 1 videos" in shown
    better = evaluate_classifier(known(), test, TWO_BY_TWO, painted({**VIEWS, "v3": [[0, 0, 3]] * 4}))
    comparison = compare_cards(card, better)
    entry = comparison["differences"]["video_to_class"]["mean softmax"]["recall@1"]
    assert (entry["first"], entry["second"], entry["value"]) == (0.75, 1.0, 0.25)
    assert "video to class" in render_comparison(comparison)
    other = evaluate_classifier(
        known(), test, ClassificationProtocol(name="t", version=1, summary="", clips=4), painted(VIEWS)
    )
    with pytest.raises(InvalidInput, match="different protocols"):
        compare_cards(card, other)


def test_classes_go_by_name_where_both_know_them():
    shuffled = video_set([0, 1, 2, 2], classes=("jump", "run", "sit"))
    labels, names = match_classes(shuffled.data, known())
    assert labels.tolist() == [1, 0, 2, 2] and names == NAMES
    card = evaluate_classifier(known(), shuffled, TWO_BY_TWO, painted(VIEWS))
    assert card["results"]["classification"]["top1"]["value"] == 0.75
    by_number = video_set([1, 0, 2, 2], classes=("0", "1", "2"))
    assert match_classes(by_number.data, known())[1] == NAMES
    assert match_classes(by_number.data, known(names=()))[1] == ("0", "1", "2")
    assert match_classes(video_set([0], classes=("0",)).data, known())[0].tolist() == [0]
    assert match_classes(video_set([0]).data, known(names=()))[1] == NAMES
    with pytest.raises(InvalidInput, match="knows other classes than the labels name, such as 'swim'"):
        match_classes(video_set([0], classes=("run", "jump", "swim")).data, known())
    with pytest.raises(InvalidInput, match="a video is labelled 3, model 'known' has 3 classes"):
        match_classes(video_set([3], classes=("0", "1", "2", "3")).data, known())
    with pytest.raises(InvalidInput, match="has 3 classes, the labels name 2"):
        match_classes(video_set([0], classes=("run", "jump")).data, known(names=()))


def test_unreadable_videos_stop_the_measurement_or_are_listed():
    def load(path, p, protocol):
        if path.name == "v1":
            raise DataError("v1: torn", "truncated")
        return painted(VIEWS)(path, p, protocol)

    test = video_set([1, 0, 2, 2])
    with pytest.raises(
        InvalidInput, match="1 of 4 videos cannot be read .v1: truncated: v1: torn.; .*nothing was measured"
    ):
        evaluate_classifier(known(), test, TWO_BY_TWO, load)
    card = evaluate_classifier(known(), test, TWO_BY_TWO, load, options=ScoringOptions(allow_missing=1))
    assert card["data"]["missing"] == [{"clip": "v1", "reason": "truncated: v1: torn"}]
    assert card["protocol"]["num_items"] == 3
    assert card["results"]["classification"]["top1"]["value"] == pytest.approx(2 / 3)


def test_models_that_cannot_are_refused():
    encoder = EncoderModel(EncoderConfig(vision=VISION), name="bare")
    with pytest.raises(CapabilityError, match="model 'bare' of kind 'encoder' cannot classify"):
        evaluate_classifier(encoder, video_set([0]), TWO_BY_TWO, painted(VIEWS))

    class Broken(Known):
        def forward(self, video):
            return super().forward(video) * torch.nan

    broken = Broken(ClassifierConfig(vision=VISION, num_classes=3, class_names=NAMES), name="broken")
    with pytest.raises(InvalidInput, match="model 'broken', v0: logits are not finite"):
        evaluate_classifier(broken, video_set([0]), TWO_BY_TWO, painted(VIEWS))


@pytest.mark.parametrize("name", sorted(classification_protocol_files()))
def test_shipped_protocols(name):
    protocol = load_classification_protocol(name)
    assert protocol.name == name and protocol.summary and protocol.bootstrap.resamples >= 1000


def test_the_published_numbers_of_views():
    views = {
        name: load_classification_protocol(name) for name in ("k400", "ssv2", "breakfast", "coin", "lvu")
    }
    assert {name: (p.clips, p.crops) for name, p in views.items()} == {
        "k400": (4, 3), "ssv2": (2, 3), "breakfast": (4, 3), "coin": (10, 3), "lvu": (4, 3),
    }  # fmt: skip
    with pytest.raises(InvalidInput, match="no protocol 'k900' for classification"):
        load_classification_protocol("k900")


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ("segments", [[2, 12], [4, 14], [6, 16], [8, 18]]),
        ("shifted", [[0, 10], [2, 13], [5, 15], [7, 18]]),
        ("dense", [[0, 4], [5, 9], [10, 14], [16, 20]]),
    ],
)
def test_frames_of_each_sampling(sampling, expected):
    # 21 frames, two of each of four clips; a span is 10 frames (10.5 for shifted)
    protocol = ClassificationProtocol(name="t", version=1, summary="", clips=4, sampling=sampling)
    assert [chosen.tolist() for chosen in choose_frames(21, 2, protocol)] == expected


@pytest.mark.parametrize("num_frames", [1, 7, 16, 33, 100, 1201])
def test_frames_of_the_released_test_on_something_something(num_frames):
    """Its program lists the frames of all views, sorts them, and gives each view every second one."""
    for taken, views in ((8, 2), (16, 2), (16, 3)):
        tick = num_frames / float(taken)
        every = [int(v * tick / views + tick * x) for v in range(views) for x in range(taken)]
        released = [sorted(every)[view::views] for view in range(views)]
        protocol = ClassificationProtocol(name="t", version=1, summary="", clips=views, sampling="shifted")
        assert [chosen.tolist() for chosen in choose_frames(num_frames, taken, protocol)] == released


def test_impossible_protocols():
    for wrong in ({"clips": 0}, {"top": (2,)}, {"sampling": "middle", "clips": 2}):
        with pytest.raises(ValueError, match="clips|clip"):
            ClassificationProtocol(name="t", version=1, summary="", **wrong)


def test_a_classifier_sees_the_centre_with_its_aspect_kept():
    expected = Preprocessing(num_frames=2, image_size=16, resize="bilinear", keep_aspect=True)
    assert Classifier(ClassifierConfig(vision=VISION)).preprocessing == expected
