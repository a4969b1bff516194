"""Corpora by turns: whose batch comes when, each sample once a pass, one order after any stop and split."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm.data import Corpus, Loader, LoaderConfig
from vlm.data.augmentation import AugmentationConfig
from vlm.data.mixture import GlobalOrder, Turns
from vlm.data.sources import FrameChooser, Sample
from vlm.errors import DataError
from vlm.types import Preprocessing

TINY = Preprocessing(num_frames=2, image_size=4)


class Numbered:
    """``count`` samples in shards of uneven sizes, all corpora with the same keys."""

    def __init__(self, count: int, name: str, bad: tuple[int, ...] = (), caption: str = "a cat") -> None:
        self.shard_sizes = tuple(min(4, count - first) for first in range(0, count, 4))
        self.fingerprint, self.bad, self.caption = name * 32, bad, caption

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        place = 4 * shard + number
        if place in self.bad:
            raise DataError(f"{place} is broken", "checksum")
        frames = np.zeros((len(choose(9)), 4, 4, 3), np.uint8)
        frames[:, :, :2] = 200
        return Sample(key=f"{place}", frames=frames, captions=(self.caption, f"number {place}"))

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        return {"number": 4 * shard + number}


def three(**changes: Any) -> list[Corpus]:
    """Ten pictures in fours, seven videos in threes, and five gone through one and a half times an epoch."""
    bad = changes.get("bad", ((), (), ()))
    return [
        Corpus(source=Numbered(10, "0a", bad[0]), name="pictures", media="image", batch_size=4),
        Corpus(source=Numbered(7, "0b", bad[1]), name="videos"),
        Corpus(source=Numbered(5, "0c", bad[2]), name="few", batch_size=2, weight=1.5),
    ]


def settings(**changes: Any) -> LoaderConfig:
    return LoaderConfig(**{"batch_size": 3, "seed": 11, "workers": 0, "max_bad_fraction": 1.0, **changes})


def run(corpora: list[Corpus], start: int, *, world: int = 1, epochs: int = 3, **changes: Any) -> list[list]:
    """What each global batch from ``start`` on holds, put together from all processes."""
    parts = [
        Loader(corpora, TINY, settings(**changes), rank=rank, world_size=world).batches(start, epochs)
        for rank in range(world)
    ]
    found = []
    for batch in zip(*parts, strict=True):
        assert len({(part.corpus, part.consumed, part.global_size) for part in batch}) == 1
        clips = [
            (clip.identity, clip.caption, clip.pixels.tobytes()) for part in batch for clip in part.clips
        ]
        assert len(clips) == batch[0].global_size
        found.append(clips)
    return found


# --- whose turn it is


def test_turns_worked_by_hand() -> None:
    """10 / 4, 7 / 3 and 7.5 / 2 batches an epoch: after three epochs 3, 5, 8 and 3, 5, 7 and 4, 8, 12."""
    turns = Turns(three(), 3, seed=11)
    assert [turns.before(epoch) for epoch in range(4)] == [0, 10, 18, 27]
    order = [turns[number] for number in range(27)]
    per_epoch = [Counter(turn.corpus for turn in order[a:b]) for a, b in ((0, 10), (10, 18), (18, 27))]
    assert per_epoch == [{0: 3, 1: 3, 2: 4}, {0: 2, 1: 2, 2: 4}, {0: 3, 1: 2, 2: 4}]
    for corpus, count in enumerate((8, 7, 12)):
        assert [turn.ordinal for turn in order if turn.corpus == corpus] == list(range(count))
    assert [turns.samples_before(corpus, 3) for corpus in range(3)] == [30, 21, 23]  # 22.5, rounded up
    plain = Turns(three(), 3, seed=11, shuffle=False)
    assert [plain[number].corpus for number in range(18)] == [0] * 3 + [1] * 3 + [2] * 4 + [0, 0, 1, 1] + [
        2
    ] * 4


def test_the_turns_are_the_same_in_every_version() -> None:
    """Frozen: a change here would silently restart everybody's epochs."""
    turns = Turns(three(), 3, seed=11)
    assert "".join(str(turns[number].corpus) for number in range(27)) == FROZEN


FROZEN = "212011020221102220022020211"


def test_turns_follow_from_contents_seed_and_epoch_alone() -> None:
    def drawn(corpora: list[Corpus], seed: int) -> list[int]:
        turns = Turns(corpora, 3, seed=seed)
        return [turns[number].corpus for number in range(27)]

    other = [*three()[:2], Corpus(source=Numbered(5, "0d"), name="few", batch_size=2, weight=1.5)]
    assert drawn(three(), 11) == drawn(three(), 11)
    assert len({tuple(drawn(*case)) for case in ((three(), 11), (three(), 12), (other, 11))}) == 3
    first, second = drawn(three(), 11)[:10], drawn(three(), 11)[10:18]
    assert first[:8] != second


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.001, 1.0, 30.0), (0.3, 0.7, 1.1)])
def test_counts_agree_with_a_walk_from_the_start(weights: tuple[float, ...]) -> None:
    """Whatever the weights: shares as asked, and less than a batch beyond at the end of an epoch."""
    corpora = [
        Corpus(source=Numbered(count, name), name=name, weight=weight)
        for count, name, weight in zip((40, 9, 3), ("0a", "0b", "0c"), weights, strict=True)
    ]
    turns = Turns(corpora, 4, seed=0)
    walked = [0, 0, 0]
    for number in range(turns.before(5)):
        assert turns.counts(number) == tuple(walked)
        turn = turns[number]
        assert turn.ordinal == walked[turn.corpus]
        walked[turn.corpus] += 1
    for done, corpus in zip(walked, corpora, strict=True):
        owed = 5 * Fraction(str(corpus.weight)) * corpus.num_samples / 4
        assert owed <= done < owed + 1


def test_one_corpus_is_what_a_source_alone_is() -> None:
    source = Numbered(10, "0a")
    alone = [batch.keys for batch in Loader(source, TINY, settings()).batches(num_epochs=2)]
    named = Loader([Corpus(source=source, name="x")], TINY, settings()).batches(num_epochs=2)
    assert [tuple(f"x/{key}" for key in keys) for keys in alone] == [batch.keys for batch in named]


@pytest.mark.parametrize("world", [1, 2])
def test_batches_in_parts_are_the_same_batches(world: int) -> None:
    """Whatever the parts: the same turns and samples, and any part to go on from; the last may be short."""
    whole = run(three(), 0, epochs=3, world=world)
    for parts in (2, 3, 5):
        divided = run(three(), 0, epochs=3, world=world, parts=parts)
        assert len(divided) == parts * len(whole)
        joined = [sum(divided[n : n + parts], []) for n in range(0, len(divided), parts)]
        assert joined == whole
        assert run(three(), 7, epochs=3, world=world, parts=parts) == divided[7:]


# --- exactly once, in one order


def truth() -> list[list[str]]:
    """What the batches hold, from the orders alone."""
    corpora, passes = three(), []
    for corpus in corpora:
        keys = []
        for epoch in range(5):
            order = GlobalOrder(corpus.source.shard_sizes, corpus.source.fingerprint, 11, epoch)
            keys += [f"{corpus.name}/{4 * order[p][0] + order[p][1]}" for p in range(len(order))]
        passes.append(keys)
    turns, sizes, ends = Turns(corpora, 3, seed=11), (4, 3, 2), (30, 21, 23)
    found = []
    for number in range(27):
        corpus, ordinal = turns[number]
        size = sizes[corpus]
        found.append(passes[corpus][ordinal * size : min((ordinal + 1) * size, ends[corpus])])
    return found


def test_every_sample_once_a_pass() -> None:
    batches = run(three(), 0)
    keys = [[identity for identity, _, _ in batch] for batch in batches]
    assert keys == truth()
    for name, count, passes in (("pictures", 10, 3), ("videos", 7, 3)):
        seen = [key for batch in keys for key in batch if key.startswith(name)]
        for first in range(0, passes * count, count):
            assert len(set(seen[first : first + count])) == count
        assert len(seen) == passes * count
    few = [key for batch in keys for key in batch if key.startswith("few")]
    assert [len(set(few[first : first + 5])) for first in (0, 5, 10, 15)] == [5] * 4 and len(few) == 23
    assert all(len({key.split("/")[0] for key in batch}) == 1 for batch in keys)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_any_split_from_any_point_gives_the_same_batches(world: int, workers: int) -> None:
    whole = run(three(), 0)
    for start in range(len(whole)):
        assert run(three(), start, world=world, workers=workers) == whole[start:]


# --- pictures, identities, words


def test_pictures_are_one_frame_and_videos_are_not() -> None:
    frames = {
        batch.corpus: {clip.pixels.shape for clip in batch.clips}
        for batch in Loader(three(), TINY, settings()).batches(num_epochs=1)
    }
    assert frames == {"pictures": {(1, 3, 4, 4)}, "videos": {(2, 3, 4, 4)}, "few": {(2, 3, 4, 4)}}
    sizes = {
        (batch.corpus, batch.preprocessing.num_frames, batch.global_size)
        for batch in Loader(three(), TINY, settings()).batches(num_epochs=1)
    }
    assert {size for size in sizes if size[0] == "pictures"} == {("pictures", 1, 4), ("pictures", 1, 2)}


def test_corpora_draw_apart() -> None:
    """Equal places of two corpora do not get equal crops: no draw is used twice."""
    corpora = [Corpus(source=Numbered(8, name), name=name) for name in ("0a", "0b")]
    loader = Loader(corpora, TINY, settings(shuffle=False, batch_size=8, random_frames=False))
    first, second = loader.batches(num_epochs=1)
    assert first.captions != second.captions  # one of two captions each, eight times


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("a cat", True), ("bright copyright cleft", True), ("the left", False), ("Leftmost of two", False),
        ("pull_left", False), ("right-handed", False), ("moves rightwards.", False), ("leftovers", True),
    ],
)  # fmt: skip
def test_what_names_a_side_is_not_mirrored(caption: str, mirrored: bool) -> None:
    flip = AugmentationConfig(min_scale=1.0, max_aspect=1.0, flip=1.0)
    for corpus in (three()[0], three()[1]):
        corpus = Corpus(source=Numbered(4, "0a", caption=caption), name="x", media=corpus.media)
        (batch, *_) = Loader([corpus], TINY, settings(augmentation=flip)).batches(num_epochs=1)
        for clip in batch.clips:
            assert bool(clip.pixels[..., -1].min() == 200) == mirrored


def test_templates_word_the_captions_and_leave_them_as_they_are() -> None:
    wordings = ("a photo of {}.", "{}, seen once")
    corpus = Corpus(source=Numbered(40, "0a"), name="x", templates=wordings)
    batches = list(Loader([corpus], TINY, settings()).batches(num_epochs=1))
    pairs = [(clip.caption, clip.text) for batch in batches for clip in batch.clips]
    assert all(text in {wording.format(caption) for wording in wordings} for caption, text in pairs)
    assert len({text.endswith("once") for _, text in pairs}) == 2
    plain = list(
        Loader([Corpus(source=Numbered(40, "0a"), name="x")], TINY, settings()).batches(num_epochs=1)
    )
    assert [batch.captions for batch in plain] == [batch.captions for batch in batches]
    assert all(batch.texts == batch.captions for batch in plain)


# --- what is broken is counted where it is


def test_rejections_are_counted_by_corpus_and_reason(tmp_path: Path) -> None:
    corpora = three(bad=((1, 2), (), (3,)))
    loader = Loader(corpora, TINY, settings(), quarantine=tmp_path / "bad.jsonl")
    kept = [key for batch in loader.batches(num_epochs=1) for key in batch.keys]
    assert {"pictures/1", "pictures/2", "few/3"}.isdisjoint(kept)
    assert [dict(tally.rejected) for tally in loader.tallies] == [{"checksum": 2}, {}, {"checksum": 2}]
    assert [tally.seen + tally.rejected.total() for tally in loader.tallies] == [10, 7, 8]
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert Counter((row["corpus"], row["number"]) for row in rows) == {
        ("pictures", 1): 1, ("pictures", 2): 1, ("few", 3): 2,
    }  # fmt: skip


def test_a_small_corpus_cannot_hide_behind_a_large_one(tmp_path: Path) -> None:
    corpora = [
        Corpus(source=Numbered(400, "0a"), name="large"),
        Corpus(source=Numbered(8, "0b", bad=(5,)), name="small"),
    ]
    with pytest.raises(DataError, match=r"corpus 'small': 1 of 8 samples cannot be used \(checksum 1\)"):
        list(Loader(corpora, TINY, settings(max_bad_fraction=0.1)).batches(num_epochs=1))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_stopped_run_counts_what_it_had_seen_of_each_corpus(tmp_path: Path, parts: int) -> None:
    bad, quarantine = ((1, 2), (0,), (3,)), tmp_path / "bad.jsonl"
    whole = Loader(three(bad=bad), TINY, settings(parts=parts), quarantine=quarantine)
    known = [[set(tally.bad_places) for tally in whole.tallies] for _ in whole.batches(num_epochs=2)]
    text = quarantine.read_text()
    for start, expected in enumerate(known):  # what the list holds of later batches is not known yet
        loader = Loader(three(bad=bad), TINY, settings(parts=parts), quarantine=quarantine)
        next(loader.batches(start, num_epochs=2))
        assert [tally.bad_places for tally in loader.tallies] == expected
    assert quarantine.read_text() == text
    quarantine.unlink()
    for start in range(len(known)):  # one batch a run, the next prepared and lost
        loader = Loader(three(bad=bad), TINY, settings(parts=parts), quarantine=quarantine)
        batches = loader.batches(start, num_epochs=2)
        next(batches)
        next(batches, None)
        batches.close()
    assert quarantine.read_text() == text
    assert [tally.bad_places for tally in loader.tallies] == [tally.bad_places for tally in whole.tallies]


def test_stand_ins_are_of_the_same_corpus() -> None:
    corpora = three(bad=((), tuple(range(1, 7)), ()))
    for batch in Loader(corpora, TINY, settings(fill=True)).batches(num_epochs=1):
        assert len(batch.clips) == batch.global_size
        if batch.corpus == "videos":
            assert set(batch.keys) == {"videos/0"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": 0.0}, "weight above 0"), ({"weight": float("nan")}, "weight above 0"),
        ({"weight": float("inf")}, "weight above 0"), ({"batch_size": 0}, "batch_size >= 1"),
        ({"templates": ("no place",)}, "expected one {}"), ({"templates": ("{} {}",)}, "expected one {}"),
    ],
)  # fmt: skip
def test_impossible_corpora(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Corpus(source=Numbered(3, "0a"), name="x", **wrong)


def test_empty_corpora_and_equal_names() -> None:
    empty = Corpus(source=Numbered(0, "0a"), name="void")
    with pytest.raises(DataError, match="corpus 'void': the data set holds no sample"):
        Loader([*three(), empty], TINY, settings())
    with pytest.raises(ValueError, match="name of its own"):
        Loader([*three(), *three()], TINY, settings())
    with pytest.raises(ValueError, match="at least one corpus"):
        Loader([], TINY, settings())
