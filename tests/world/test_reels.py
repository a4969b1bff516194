"""Reels: what few frames miss, what a bag cannot know, and claims that say nothing by themselves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from vlm.text import build_tokenizer
from vlm.world import vocabulary
from vlm.world.chapters.claims import AskedReel, ClaimPair, asked_groups, ceiling, claims_of, stream, truth_of
from vlm.world.chapters.reels import ATOMS, Atom, Reel, render_reel, sample_reels, sampled
from vlm.world.digits import BLOCKS, load_digits
from vlm.world.motion import motion
from vlm.world.scene import COLOURS
from vlm.world.splits import is_held_pair


@pytest.fixture(scope="module")
def reels() -> list[Reel]:
    return [reel for index in range(30) for reel in sample_reels("train", 0, index)]


def short(order: str, lengths: tuple[int, ...]) -> Reel:
    """A reel with a scene for each letter, a = the first of all atoms, and so on."""
    (reel, _) = sample_reels("val", 0, 0, 2)
    scenes = []
    for letter in order:
        pairs = zip(reel.scenes[0].things, atom(letter), strict=True)
        things = tuple(replace(thing, colour=colour) for thing, colour in pairs)
        scenes.append(replace(reel.scenes[0], things=things))
    return replace(reel, scenes=tuple(scenes), lengths=lengths)


def atom(letter: str) -> Atom:
    return ATOMS[ord(letter) - ord("a")]


def test_a_reel_keeps_its_rules(reels: list[Reel]) -> None:
    assert len(set(ATOMS)) == 21
    for one, other in pairwise(reels):
        if one.index % 2 == 0:  # as few in common as 21 atoms allow
            assert len(set(one.atoms) & set(other.atoms)) == 11
    assert not set.intersection(*(set(reel.atoms) for reel in sample_reels("train", 0, 0, 10)))
    labels = load_digits()[1]
    for reel in reels:
        assert len(set(reel.atoms)) == 16 and set(reel.atoms) <= set(ATOMS)
        assert reel.num_frames == 320 and min(reel.lengths) >= 10 and max(reel.lengths) <= 40
        for scene in reel.scenes:
            assert not any(is_held_pair(thing.digit, thing.colour) for thing in scene.things)
            assert all(labels[thing.image] == thing.digit for thing in scene.things)
            paths = motion(scene, np.arange(40))
            apart = []
            for path in (paths.x, paths.y):  # no edge cuts a thing, no thing covers the other
                halves = [thing.size / 2 for thing in scene.things]
                for half, places in zip(halves, path, strict=True):
                    assert half - 0.01 <= places.min() and places.max() <= 64 - half + 0.01
                apart.append(np.abs(path[0] - path[1]).min() >= sum(halves) - 0.01)
            assert any(apart)
    moving = np.mean([bool(scene.events) for reel in reels for scene in reel.scenes])
    assert 0.4 < moving < 0.6


def test_a_stream_is_a_pure_function_and_splits_share_no_writer() -> None:
    assert sample_reels("val", 3, 5) == sample_reels("val", 3, 5)
    assert sample_reels("val", 3, 5) != sample_reels("val", 4, 5)
    images: dict[str, set[int]] = {}
    for split in ("train", "val", "test"):
        found = {
            thing.image
            for index in range(10)
            for reel in sample_reels(split, 0, index)
            for scene in reel.scenes
            for thing in scene.things
        }
        first, last = BLOCKS[split]
        assert all(first <= image < last for image in found)
        images[split] = found
    assert not images["train"] & images["val"] and not images["test"] & (images["train"] | images["val"])
    for arguments, message in (
        (("combo", 0, 0), "train, val or test"),
        (("val", -1, 0), "seed >= 0"),
        (("val", 0, 0, 21), "2 to 20 scenes"),
        (("val", 0, 0, 1), "2 to 20 scenes"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_reels(*arguments)


def test_what_a_number_of_frames_sees(reels: list[Reel]) -> None:
    for reel in reels:
        assert len(np.unique(sampled(reel, 8)[0])) == 8
        counts = Counter(sampled(reel, 32)[0].tolist())
        assert len(counts) == 16 and sum(counts.values()) == 32
        assert min(Counter(sampled(reel, 64)[0].tolist()).values()) >= 2
    reel = short("abcd", (10, 30, 10, 10))  # middles of 15 frames each: 7, 22, 37, 52
    scenes, frames = sampled(reel, 4)
    assert scenes.tolist() == [0, 1, 1, 3] and frames.tolist() == [7, 12, 27, 2]
    assert sampled(reel.mirror(), 4)[0].tolist() == [0, 2, 2, 3]
    with pytest.raises(ValueError, match="at least 1 frame"):
        sampled(reel, 0)


def test_the_frames_show_what_the_reel_says() -> None:
    """The two colours that most pixels of a frame are near to, against the scene to be shown."""
    table = np.array(list(COLOURS.values()), dtype=np.float64)
    right = []
    for index in range(4):
        (reel, _) = sample_reels("test", 2, index)
        frames = render_reel(reel, 32).astype(np.float64)
        assert frames.shape == (32, 64, 64, 3)
        for number, place in enumerate(sampled(reel, 32)[0].tolist()):
            distance = np.abs(frames[number].reshape(-1, 1, 3) - table).sum(-1)
            near = distance.argmin(-1)[distance.min(-1) < 120]
            most = np.argsort(np.bincount(near, minlength=len(table)))[-2:]
            right.append({list(COLOURS)[colour] for colour in most} == set(reel.atoms[place]))
    assert np.mean(right) > 0.85


def test_claims_alone_say_nothing() -> None:
    """In every group each claim is as often true as false, so that any rule on texts is right in half."""
    known = build_tokenizer(vocabulary())
    for group in asked_groups("test", 1, 5):
        assert [item.reel.mirrored for item in group] == [False, True, False, True]
        true = Counter(pair.texts[0] for item in group for pair in item.pairs)
        false = Counter(pair.texts[1] for item in group for pair in item.pairs)
        assert true == false
        for item in group:
            order = {shown: place for place, shown in enumerate(item.reel.atoms)}
            kinds = Counter(pair.kind for pair in item.pairs)
            assert kinds == {"presence": 8, "order": 8} and len(set(item.pairs)) == 16
            for kind, first, second in item.pairs:
                if kind == "presence":
                    assert first in order and second not in order
                else:
                    assert order[first] < order[second]
            for pair in item.pairs:
                assert not any(known.unknown_words(text) for text in pair.texts)
    pair = ClaimPair("order", Atom("red", "blue"), Atom("orange", "pink"))
    texts = ("a red and a blue", "an orange and a pink")
    assert pair.texts == (" then ".join(texts), " then ".join(texts[::-1]))
    assert pair._replace(kind="presence").texts == texts


def test_who_comes_first_is_no_habit_of_the_stream() -> None:
    """Over many reels an atom is as often early as late, and long scenes are nowhere more frequent."""
    places: dict[Atom, list[int]] = {}
    lengths = []
    for index in range(150):
        for reel in sample_reels("train", 5, index):
            lengths.append(reel.lengths)
            for place, shown in enumerate(reel.atoms):
                places.setdefault(shown, []).append(place)
    means = np.array([np.mean(found) for found in places.values()])
    assert np.abs(means - 7.5).max() < 4 * 4.6 / np.sqrt(300 * 16 / 21)
    assert np.abs(np.mean(lengths, axis=0) - 20).max() < 4 * np.std(lengths) / np.sqrt(300)


def test_the_truth_of_other_reels() -> None:
    asked = [
        AskedReel(short("abc", (10, 10, 10)), (ClaimPair("presence", atom("a"), atom("d")),)),
        AskedReel(short("dca", (10, 10, 10)), (ClaimPair("order", atom("c"), atom("a")),)),
    ]
    assert truth_of(asked).tolist() == [[True, False, False, True], [True, True, True, False]]


def test_ceilings_by_hand() -> None:
    """Of a, b, c, d with 10 frames each, two frames fall on b and d (frames 10 and 30)."""
    reel = short("abcd", (10, 10, 10, 10))
    assert sampled(reel, 2)[0].tolist() == [1, 3]
    pairs = tuple(
        ClaimPair(kind, atom(first), atom(second))  # type: ignore[arg-type]
        for kind, first, second in (
            ("presence", "b", "e"),  # seen
            ("presence", "a", "e"),  # not seen: a guess
            ("order", "b", "d"),  # both seen
            ("order", "a", "b"),  # one hidden scene on either side of b: a guess
            ("order", "a", "d"),  # both hidden scenes before d: known
            ("order", "a", "c"),  # neither seen
        )
    )
    asked = AskedReel(reel, pairs)
    assert ceiling(asked, 2).tolist() == [1, 0.5, 1, 0.5, 1, 0.5]
    assert ceiling(asked, 2, ordered=False).tolist() == [1, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert ceiling(asked, 4).tolist() == [1] * 6
    late = short("abcde", (10, 10, 10, 10, 40))  # frames 13, 40, 67: b, and e twice; a, c, d hidden
    wrong = AskedReel(late, (ClaimPair("order", atom("a"), atom("b")),))
    assert sampled(late, 3)[0].tolist() == [1, 4, 4] and ceiling(wrong, 3).tolist() == [0]
    groups = asked_groups("test", 1, 30)
    eight, bag, all_seen = (
        np.array([ceiling(item, n, ordered=o) for group in groups for item in group])
        for n, o in ((8, True), (32, False), (32, True))
    )
    assert all_seen.min() == 1 and bag[:, :8].min() == 1 and (bag[:, 8:] == 0.5).all()
    # half of the scenes are seen: 1/2 + 1/4; 7/30 of the couples whole, 8/15 half, of which 3/4 are told
    assert abs(eight[:, :8].mean() - 0.75) < 0.03 and abs(eight[:, 8:].mean() - 0.75) < 0.05


def test_short_reels_repeat_what_can_be_asked() -> None:
    one, other = sample_reels("train", 0, 1, 2)
    pairs = claims_of(one, other, 5, stream("train", 0, 1))
    assert [pair.kind for pair in pairs] == ["presence"] * 5 + ["order"] * 5
    assert {pair.texts[0] for pair in pairs[5:]} == {" then ".join(shown.words for shown in one.atoms)}
