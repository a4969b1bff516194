"""Broken samples are counted, listed and limited; what is seen and what is rejected make up the set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.painted import EVERY, SIZES, SMALL, Painted, config, content
from vlm.data import Loader
from vlm.data.mixture import GlobalOrder
from vlm.data.sources import FrameChooser, Sample
from vlm.errors import DataError, IntegrityError


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
    with pytest.raises(DataError, match=r"100 samples in a row cannot be used; last: 1/99") as caught:
        list(loader.batches(num_epochs=1))
    assert caught.value.reason == "too_many_bad"
    with_pauses = tuple(place for place in bad if place[1] % 100 != 50)
    loader = Loader(Painted((50, 150), with_pauses), SMALL, config(shuffle=False, batch_size=10))
    assert sum(len(batch.clips) for batch in loader.batches(num_epochs=1)) == 51


def test_a_row_of_broken_samples_goes_on_in_the_next_process() -> None:
    """Each of three processes meets fewer than a hundred in a row; together they stop at the same batch."""
    bad = tuple((1, number) for number in range(150))
    loaders = [
        Loader(Painted((50, 150), bad), SMALL, config(shuffle=False, batch_size=60), rank=rank, world_size=3)
        for rank in range(3)
    ]
    settled = 0
    with pytest.raises(DataError, match="100 samples in a row"):
        for parts in zip(*[loader.batches(num_epochs=1) for loader in loaders], strict=True):
            reports = [part.report for part in parts]
            for loader in loaders[1:]:
                try:
                    loader.settle(reports)
                except DataError:
                    settled += 1
            loaders[0].settle(reports)
    assert settled == 2


# --- seen + rejected = what the manifest counts, checked by the loader itself at the end of each pass


@pytest.mark.parametrize("start", [0, 2, 4])
def test_the_account_of_a_healthy_set_is_even_from_any_start(start: int) -> None:
    assert list(Loader(Painted(SIZES, ((0, 1),)), SMALL, config()).batches(start, num_epochs=3))


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_lost_or_doubled_sample_stops_the_run(monkeypatch, world_size: int, start: int) -> None:
    """The order is spoilt on purpose: one position shows its neighbour, or a share lacks its last sample."""

    def run() -> None:
        loaders = [
            Loader(Painted(SIZES), SMALL, config(), rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for parts in zip(*[loader.batches(start, num_epochs=2) for loader in loaders], strict=True):
            for loader in loaders:
                loader.settle([part.report for part in parts])

    run()
    healthy_item, healthy_share = GlobalOrder.__getitem__, Loader._share
    monkeypatch.setattr(GlobalOrder, "__getitem__", lambda order, p: healthy_item(order, p - (p == 20)))
    with pytest.raises(IntegrityError, match=r"epoch 0: sample \d of shard \d came twice"):
        run()
    monkeypatch.undo()
    monkeypatch.setattr(
        Loader, "_share", lambda loader, plan: healthy_share(loader, plan)[: -1 if plan.number == 2 else None]
    )
    with pytest.raises(
        IntegrityError, match=rf"epoch 0: {world_size} of 23 samples were neither seen nor rej"
    ):
        run()


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
        found.update(place[1:] for part in parts for place in part.report.bad)
        for rank, loader in enumerate(loaders):
            try:
                loader.settle([part.report for part in parts])
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
