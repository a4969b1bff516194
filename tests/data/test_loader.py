"""Exactly once, in one order, whatever the processes, workers and stops; broken samples are never silent."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm.data import Loader, LoaderConfig, Mixture, make_batch, true_pairs
from vlm.data.augmentation import AugmentationConfig
from vlm.data.mixture import GlobalOrder
from vlm.data.sources import FrameChooser, Sample
from vlm.errors import DataError, VlmError
from vlm.types import Preprocessing, TokenBatch

SMALL = Preprocessing(num_frames=2, image_size=8)


class Painted:
    """Samples made on the spot; those named in ``bad`` cannot be read."""

    def __init__(
        self, sizes: tuple[int, ...], bad: tuple[tuple[int, int], ...] = (), name: str = "ab"
    ) -> None:
        self.shard_sizes, self.bad, self.fingerprint = sizes, bad, name * 32

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        if (shard, number) in self.bad:
            raise DataError(f"{shard}/{number}: cannot be read", "checksum")
        chosen = choose(20)
        frames = np.broadcast_to(chosen.astype(np.uint8)[:, None, None, None], (len(chosen), 8, 8, 3)).copy()
        frames[:, 0] = shard * 20 + number
        key = f"{shard}/{number}"
        return Sample(key=key, frames=frames, captions=(f"caption of {key}", f"other of {key}"))

    def locate(self, shard: int, number: int) -> dict[str, Any]:
        return {"shard": f"shard-{shard}", "number": number}


class Killer(Painted):
    """A source that takes its process down."""

    def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
        import os

        os._exit(3)


def config(**changes: Any) -> LoaderConfig:
    return LoaderConfig(**{"batch_size": 7, "workers": 0, "max_bad_fraction": 1.0, **changes})


def content(batch) -> list[tuple[str, str, bytes]]:
    return [(clip.key, clip.caption, clip.pixels.tobytes()) for clip in batch.clips]


SIZES = (5, 3, 1, 9, 5)  # 23 samples: divisible by nothing
EVERY = {f"{shard}/{number}" for shard, size in enumerate(SIZES) for number in range(size)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_split_gives_the_same_global_batches_from_any_point(world_size: int, workers: int) -> None:
    """World sizes, workers and resuming at every batch: two epochs, each sample once in each."""
    source = Painted(SIZES)
    alone = list(Loader(source, SMALL, config()).batches(num_epochs=2))
    truth = [content(batch) for batch in alone]
    keys = [clip[0] for batch in truth for clip in batch]
    assert set(keys[:23]) == set(keys[23:]) == EVERY
    assert len(keys) == 46
    assert [len(batch) for batch in truth] == [7] * 6 + [4]
    for first in range(len(truth)):
        start = alone[first - 1].consumed if first else 0
        parts = [
            list(
                Loader(source, SMALL, config(workers=workers), rank=rank, world_size=world_size).batches(
                    start, num_epochs=2
                )
            )
            for rank in range(world_size)
        ]
        assert all(len(part) == len(truth) - first for part in parts)
        for number in range(len(truth) - first):
            joined = [clip for part in parts for clip in content(part[number])]
            assert joined == truth[first + number]
            assert [part[number].offset for part in parts] == _offsets(parts, number)
            assert {part[number].consumed for part in parts} == {alone[first + number].consumed}
            assert {part[number].global_size for part in parts} == {len(truth[first + number])}


def _offsets(parts, number: int) -> list[int]:
    sizes = [len(part[number].clips) for part in parts]
    return [sum(sizes[:rank]) for rank in range(len(parts))]


@pytest.mark.slow
def test_processes_give_the_same_batches_as_threads() -> None:
    source = Painted(SIZES)
    augmentation = AugmentationConfig(flip=0.5, brightness=0.2)
    threads = Loader(source, SMALL, config(augmentation=augmentation, workers=2)).batches(num_epochs=1)
    processes = Loader(
        source, SMALL, config(augmentation=augmentation, workers=2, worker_kind="process")
    ).batches(num_epochs=1)
    assert [content(batch) for batch in processes] == [content(batch) for batch in threads]


@pytest.mark.slow
def test_a_dead_worker_process_is_an_error_not_a_wait() -> None:
    loader = Loader(Killer(SIZES), SMALL, config(workers=1, worker_kind="process"))
    with pytest.raises(VlmError, match="worker died"):
        next(loader.batches())


def test_more_processes_than_samples() -> None:
    source = Painted((2,))
    parts = [
        list(Loader(source, SMALL, config(), rank=rank, world_size=5).batches(num_epochs=1))
        for rank in range(5)
    ]
    assert [len(part) for part in parts] == [1] * 5
    assert sum(len(part[0].clips) for part in parts) == 2
    empty = next(part[0] for part in parts if not part[0].clips)
    assert empty.video().shape == (0, 2, 3, 8, 8)


def test_the_order_is_a_function_of_contents_seed_and_epoch() -> None:
    def order(**changes: Any) -> list[str]:
        seed, name, epochs = changes.get("seed", 0), changes.get("name", "ab"), changes.get("epochs", 1)
        loader = Loader(Painted(SIZES, name=name), SMALL, config(seed=seed))
        return [key for batch in loader.batches(num_epochs=epochs) for key in batch.keys][23 * (epochs - 1) :]

    first = order()
    assert order() == first
    assert sorted(first) == sorted(EVERY)
    assert first != sorted(EVERY)
    assert all(other != first for other in (order(seed=1), order(name="cd"), order(epochs=2)))


def test_the_order_is_the_same_in_every_version() -> None:
    """Frozen: a change here would silently restart everybody's epochs."""
    order = GlobalOrder((3, 2, 4), "0123456789abcdef" * 4, seed=5, epoch=2, group_size=2)
    assert [order[position] for position in range(9)] == FROZEN


FROZEN = [(0, 1), (0, 2), (1, 1), (0, 0), (1, 0), (2, 0), (2, 3), (2, 2), (2, 1)]


def test_unshuffled_order() -> None:
    order = GlobalOrder((2, 0, 3), "ab" * 32, seed=0, epoch=0, shuffle=False)
    assert [order[position] for position in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    with pytest.raises(IndexError):
        order[5]


@pytest.mark.parametrize("group_size", [1, 2, 3, 100])
def test_shuffling_stays_within_groups_of_shards(group_size: int) -> None:
    sizes = tuple(range(1, 21))
    order = GlobalOrder(sizes, "ab" * 32, seed=0, epoch=0, group_size=group_size)
    visits = [order[position] for position in range(len(order))]
    assert sorted(visits) == [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]
    runs = list(dict.fromkeys(shard for shard, _ in visits))
    places = {shard: [p for p, (s, _) in enumerate(visits) if s == shard] for shard in runs}
    open_at_once = max(
        sum(places[shard][0] <= p <= places[shard][-1] for shard in runs) for p in range(len(visits))
    )
    assert open_at_once <= group_size


def test_random_draws_depend_on_the_visit_alone() -> None:
    def visits(**changes: Any) -> dict[str, tuple[str, bytes]]:
        loader = Loader(Painted(SIZES), SMALL, config(**changes))
        return {c.key: (c.caption, c.pixels.tobytes()) for b in loader.batches(num_epochs=1) for c in b.clips}

    base = visits()
    assert visits(batch_size=3, workers=2, prefetch=5) == base
    assert visits(seed=3) != base
    assert len({caption.split()[0] for caption, _ in base.values()}) == 2
    fixed = visits(random_caption=False, random_frames=False)
    assert all(caption.startswith("caption of") for caption, _ in fixed.values())


def test_mixture_visits_each_source_once_and_tells_equal_keys_apart() -> None:
    mixture = Mixture([Painted((3, 2), name="aa"), Painted((4,), bad=((0, 1),), name="bb")])
    assert mixture.shard_sizes == (3, 2, 4)
    loader = Loader(mixture, SMALL, config())
    batches = list(loader.batches(num_epochs=1))
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) == 8
    assert Counter(key[:2] for key in keys) == {"0/": 5, "1/": 3}
    assert {"0/0/0", "1/0/0"} < set(keys)
    assert mixture.locate(2, 1)["source"] == 1
    with pytest.raises(ValueError, match="at least one source"):
        Mixture([])


# --- broken samples


def test_broken_samples_are_counted_and_listed(tmp_path: Path) -> None:
    bad = ((0, 1), (3, 4))
    quarantine = tmp_path / "bad.jsonl"
    loader = Loader(Painted(SIZES, bad), SMALL, config(max_bad_fraction=0.1), quarantine=quarantine)
    keys = [key for batch in loader.batches(num_epochs=1) for key in batch.keys]
    assert sorted(keys) == sorted(EVERY - {"0/1", "3/4"})
    assert loader.tallies[0].seen + loader.tallies[0].rejected.total() == 23
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {(line["shard"], line["number"], line["reason"]) for line in lines} == {
        ("shard-0", 1, "checksum"), ("shard-3", 4, "checksum"),
    }  # fmt: skip
    assert all(line["epoch"] == 0 for line in lines)


def test_healthy_samples_keep_their_own_captions() -> None:
    bad = tuple((3, number) for number in range(0, 9, 2))
    for batch in Loader(Painted(SIZES, bad), SMALL, config()).batches(num_epochs=1):
        for clip in batch.clips:
            shard, number = map(int, clip.key.split("/"))
            assert clip.caption.endswith(f"of {clip.key}")
            assert (clip.pixels[:, :, 0] == shard * 20 + number).all()


def test_too_many_broken_samples_stop_the_run() -> None:
    loader = Loader(Painted(SIZES, ((0, 1), (3, 4), (4, 4))), SMALL, config(max_bad_fraction=0.1))
    with pytest.raises(DataError, match=r"3 of 23 samples cannot be used \(checksum 3\)") as caught:
        list(loader.batches(num_epochs=1))
    assert caught.value.reason == "too_many_bad"


def test_the_same_broken_sample_counts_once_over_epochs() -> None:
    loader = Loader(Painted(SIZES, ((0, 1), (3, 4))), SMALL, config(max_bad_fraction=0.1))
    assert len(list(loader.batches(num_epochs=4))) == 14
    assert loader.tallies[0].rejected == {"checksum": 8}


def test_a_hundred_broken_samples_in_a_row_stop_the_run() -> None:
    bad = tuple((1, number) for number in range(150))
    loader = Loader(Painted((50, 150), bad), SMALL, config(shuffle=False, batch_size=10))
    with pytest.raises(DataError, match="100 of 200"):
        list(loader.batches(num_epochs=1))


def test_filling_repeats_healthy_samples_with_their_captions() -> None:
    bad = ((0, 1), (3, 4))
    sizes = []
    for batch in Loader(Painted(SIZES, bad), SMALL, config(fill=True)).batches(num_epochs=1):
        sizes.append(len(batch.clips))
        assert all(clip.caption.endswith(f"of {clip.key}") for clip in batch.clips)
    assert sizes == [7, 7, 7, 2]


def test_a_stopped_run_keeps_its_budget_and_lists_each_visit_once(tmp_path: Path) -> None:
    """A run that is started again and again cannot spend its budget again and again."""
    bad = ((0, 1), (3, 4), (4, 4))
    quarantine = tmp_path / "bad.jsonl"

    def loader(allowed: float) -> Loader:
        return Loader(Painted(SIZES, bad), SMALL, config(max_bad_fraction=allowed), quarantine=quarantine)

    unbroken = list(loader(0.2).batches(num_epochs=2))
    whole = quarantine.read_text()
    quarantine.unlink()
    start = 0
    for _ in unbroken:  # one batch a run; the second batch is prepared, and lost, each time
        batches = loader(0.2).batches(start, num_epochs=2)
        start = next(batches).consumed
        next(batches, None)
        batches.close()
    assert quarantine.read_text() == whole
    assert len(whole.splitlines()) == 6
    with pytest.raises(DataError, match="4 of 23"):
        resumed = Loader(
            Painted(SIZES, (*bad, (1, 0))), SMALL, config(max_bad_fraction=0.15), quarantine=quarantine
        )
        list(resumed.batches(4, num_epochs=2))
    quarantine.write_text(whole + '{"place": [0')
    assert list(loader(0.2).batches(6, num_epochs=2))
    assert quarantine.read_text() == whole


def test_the_budget_is_common_to_all_processes() -> None:
    bad = tuple((3, number) for number in range(4))
    loaders = [
        Loader(Painted(SIZES, bad), SMALL, config(max_bad_fraction=0.1), rank=rank, world_size=4)
        for rank in range(4)
    ]
    found: set[tuple[int, int]] = set()
    stopped = []
    for parts in zip(*[loader.batches(num_epochs=1) for loader in loaders], strict=True):
        found.update(place[1:] for part in parts for place in part.rejected)
        for rank, loader in enumerate(loaders):
            try:
                for part in parts:
                    loader.note_rejected(part.rejected)
            except DataError as error:
                assert error.reason == "too_many_bad"
                stopped.append(rank)
        assert all(set(loader.tallies[0].bad_places) == found for loader in loaders)
        if stopped:
            break
    assert stopped == [0, 1, 2, 3]
    assert len(found) > 2


def test_a_lone_broken_sample_is_stood_in_for() -> None:
    """A part of one sample, and that one is broken: the next of the epoch takes its place, after any stop."""
    source = Painted(SIZES, ((0, 1), (0, 2)))
    settings = config(fill=True, batch_size=1)
    batches = list(Loader(source, SMALL, settings).batches(num_epochs=1))
    assert [len(batch.clips) for batch in batches] == [1] * 23
    assert {batch.keys[0] for batch in batches} == EVERY - {"0/1", "0/2"}
    for number, batch in enumerate(batches):
        (again, *_) = Loader(source, SMALL, settings).batches(number, num_epochs=1)
        assert content(again) == content(batch)


def test_filling_needs_one_healthy_sample() -> None:
    loader = Loader(Painted((4,), tuple((0, n) for n in range(4))), SMALL, config(fill=True))
    with pytest.raises(DataError, match="4 of 4|none of 4 samples"):
        list(loader.batches(num_epochs=1))


def test_a_mistake_in_a_source_is_not_a_broken_sample() -> None:
    class Buggy(Painted):
        def load(self, shard: int, number: int, choose: FrameChooser) -> Sample:
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        next(Loader(Buggy(SIZES), SMALL, config(workers=2)).batches())


# --- batches


def test_true_pairs_by_hand() -> None:
    keys = ["a", "b", "a", "c"]
    chosen = ["a cat", "a dog", "a small cat", "a cat"]
    every = [["a cat", "a small cat"], ["a dog"], ["a cat", "a small cat"], ["a cat", "grass"]]
    expected = [[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 1], [1, 0, 0, 1]]
    assert true_pairs(keys, chosen, every).int().tolist() == expected
    assert true_pairs([], [], []).shape == (0, 0)


def test_a_batch_with_its_texts() -> None:
    batch = next(Loader(Painted(SIZES), SMALL, config()).batches())

    def tokenize(texts: list[str]) -> TokenBatch:
        ids = torch.tensor([[len(text)] for text in texts])
        return TokenBatch(ids, torch.ones_like(ids))

    made = make_batch(batch, tokenize)
    assert made.keys == batch.keys
    assert made.video.shape == (7, 2, 3, 8, 8)
    assert torch.equal(made.positives, torch.eye(7, dtype=torch.bool))
    assert made.text.input_ids[:, 0].tolist() == [len(text) for text in batch.captions]


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"workers": -1}, {"prefetch": 0}, {"max_bad_fraction": 1.5}]
)
def test_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected|max_bad_fraction"):
        LoaderConfig(**wrong)


def test_impossible_ranks_and_empty_sets() -> None:
    with pytest.raises(ValueError, match="rank < world_size"):
        Loader(Painted(SIZES), SMALL, config(), rank=2, world_size=2)
    with pytest.raises(DataError, match="no sample"):
        Loader(Painted(()), SMALL, config())


@pytest.mark.parametrize("world_size", [1, 2])
def test_repeated_samples_lie_side_by_side_with_the_same_frames_and_other_crops(world_size: int) -> None:
    changes = AugmentationConfig(min_scale=0.1)
    wanted = config(batch_size=4, repeats=3, augmentation=changes)
    once = config(batch_size=4, augmentation=changes)
    single = next(Loader(Painted(SIZES), SMALL, once).batches())
    parts = [
        next(Loader(Painted(SIZES), SMALL, wanted, rank=rank, world_size=world_size).batches())
        for rank in range(world_size)
    ]
    clips = [clip for part in parts for clip in part.clips]
    assert [clip.key for clip in clips] == [key for key in single.keys for _ in range(3)]
    assert [part.offset for part in parts] == [0, 6][:world_size]
    assert {part.global_size for part in parts} == {12} and {part.consumed for part in parts} == {1}
    for number, clip in enumerate(single.clips):
        copies = clips[3 * number : 3 * number + 3]
        assert np.array_equal(copies[0].pixels, clip.pixels)  # one copy is what it was before
        assert {copy.caption for copy in copies} == {clip.caption}
        values = [sorted(set(np.unique(copy.pixels[:, :, -1]).tolist())) for copy in copies]
        assert values[0] == values[1] == values[2]  # the frames' numbers
    distinct = {clip.pixels.tobytes() for clip in clips}
    assert len(distinct) > 8


def test_rejected_samples_are_replaced_with_all_their_repeats() -> None:
    source = Painted((4,), bad=((0, 1),))
    batch = next(Loader(source, SMALL, config(batch_size=4, repeats=2, fill=True)).batches())
    assert len(batch.clips) == 8 and "0/1" not in batch.keys
    assert max(Counter(batch.keys).values()) == 4


def test_a_stride_takes_frames_from_one_stretch() -> None:
    for random in (True, False):
        loader = Loader(Painted(SIZES), SMALL, config(stride=3, random_frames=random))
        starts = set()
        for batch in loader.batches(num_epochs=3):
            for clip in batch.clips:
                first, second = clip.pixels[:, 0, -1, 0].tolist()
                assert second - first == 3
                starts.add(first)
        assert len(starts) > 5 if random else starts == {8}  # the middle one of the starts 0 to 16
