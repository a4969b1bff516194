"""Pieces of files for several decoders: one order whatever they do, bounded bytes, no endless waits."""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from vlm.retrieval.ingest import pool
from vlm.retrieval.ingest.events import DecodedSegment, DecodeSettings, Failed, Finished, Opened
from vlm.retrieval.ingest.pool import decode_files
from vlm.retrieval.ingest.schedule import Schedule
from vlm.types import Preprocessing

FLAT = Preprocessing(num_frames=2, image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def wait_until(is_true) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def bounds(count: int) -> list[tuple[float, float]]:
    return [(4.0 * number, 4.0 * number + 8.0) for number in range(count)]


def decoder(schedule: Schedule[tuple[int, int]], lengths: list[int], work=lambda piece, number: None):
    """A thread that decodes what it is given: a segment is (file, number), of 10 bytes."""

    def decode() -> None:
        while (piece := schedule.take()) is not None:
            length = lengths[piece.file]
            if piece.first == 0:
                schedule.opened(piece, bounds(length))
            last = length if schedule._piece_segments is None else piece.first + schedule._piece_segments
            for number in range(piece.first, min(last, length)):
                work(piece, number)
                if not schedule.put(piece, (piece.file, number), 10):
                    return
            schedule.end(piece)

    thread = threading.Thread(target=decode, daemon=True)
    thread.start()
    return thread


def ended(threads) -> bool:
    for thread in threads:
        thread.join(60)
    return not any(thread.is_alive() for thread in threads)


def test_a_decoder_is_ahead_by_bytes_and_what_has_no_frames_hardly_counts() -> None:
    schedule: Schedule[str] = Schedule(1, 100, None, 1)
    sent = []

    def send() -> None:
        piece = schedule.take()
        schedule.opened(piece, bounds(1))
        for name, size in [("huge", 500), ("a", 60), ("facts", 1), ("b", 39), ("c", 1)]:
            if schedule.put(piece, name, size):
                sent.append(name)
        schedule.fail(ValueError("the sender's"))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    # one thing always has room; then 60 + 1 + 39 bytes fill it to the brim, and one more does not fit
    items = schedule.read(0)
    assert next(items) == "huge"
    wait_until(lambda: sent == ["huge", "a", "facts", "b"])
    assert thread.is_alive()
    assert [next(items) for _ in range(4)] == ["a", "facts", "b", "c"]
    with pytest.raises(ValueError, match="the sender's"):
        next(items)
    assert ended([thread])


def test_nobody_waits_when_it_was_closed() -> None:
    schedule: Schedule[int] = Schedule(2, 10, 4, 1)
    piece = schedule.take()
    assert schedule.put(piece, 1, 10)
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(schedule.put(piece, 2, 10)), daemon=True),
        threading.Thread(target=lambda: answers.append(schedule.take()), daemon=True),
    ]
    for thread in threads:
        thread.start()
    schedule.close()
    assert ended(threads) and sorted(answers, key=str) == [False, None]


def test_an_error_reaches_a_reader_whose_file_nobody_began() -> None:
    schedule: Schedule[int] = Schedule(2, 10, 4, 1)
    schedule.fail(OSError("no more processes"))
    with pytest.raises(OSError, match="no more processes"):
        next(schedule.read(0))
    assert schedule.take() is None


def test_all_decoders_work_on_one_long_file() -> None:
    together = threading.Barrier(4)  # broken, and the work with it, unless four are in the same file at once
    schedule: Schedule[tuple[int, int]] = Schedule(1, 10_000, 16, 2)

    def work(piece, number) -> None:
        if number == piece.first < 64:
            together.wait(60)

    threads = [decoder(schedule, [100], work) for _ in range(4)]
    assert list(schedule.read(0)) == [(0, number) for number in range(100)]
    assert ended(threads)


@pytest.mark.parametrize("seed", range(12))
def test_the_order_is_that_of_one_decoder_whatever_the_lengths_and_the_room(seed) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice((1, 2, 15, 16, 17, 33, 70)) for _ in range(rng.randint(1, 25))]
    num_decoders, room = rng.randint(1, 6), rng.choice((1, 10, 25, 200, 10_000))
    schedule: Schedule[tuple[int, int]] = Schedule(
        len(lengths), room, rng.choice((None, 1, 16)), rng.randint(1, num_decoders)
    )
    slow = random.Random(seed)
    threads = [
        decoder(schedule, lengths, lambda piece, number: time.sleep(slow.choice((0, 0, 0, 0.001))))
        for _ in range(num_decoders)
    ]
    left = {file: rng.randint(1, length) for file, length in enumerate(lengths) if rng.random() < 0.2}
    for file, length in enumerate(lengths):
        with closing(schedule.read(file)) as items:
            found = []
            for item in items:
                found.append(item)
                if len(found) == left.get(file):  # as after a failure: the rest of the file is let go of
                    break
        assert found == [(file, number) for number in range(left.get(file, length))]
    assert ended(threads) and schedule._held_bytes == 0


def test_what_is_read_last_takes_no_room_from_what_is_read_first() -> None:
    schedule: Schedule[tuple[int, int]] = Schedule(3, 80, 4, 3)
    early, late = schedule.take(), schedule.take()
    answers = []

    def send() -> None:
        for number in range(5):
            answers.append(schedule.put(late, (1, number), 10))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    wait_until(lambda: schedule._held_bytes == 40)  # half of it
    assert all(schedule.put(early, (0, n), 10) for n in range(4))
    items = schedule.read(0)
    assert [next(items) for _ in range(4)] == [(0, n) for n in range(4)]
    assert answers == [True] * 4  # the fifth still waits: the file before it is being read
    schedule.close()
    assert ended([thread]) and answers == [True] * 4 + [False]


@pytest.fixture(scope="module")
def film(tmp_path_factory, clip_writer):
    """Five minutes that change, and two short clips around them."""
    folder = tmp_path_factory.mktemp("films")
    colours = [tuple(np.random.default_rng(n).integers(0, 255, 3).tolist()) for n in range(25)]
    clip_writer(folder / "0.mp4", [(colours[0], 9)])
    clip_writer(folder / "1.mp4", [(colour, 12) for colour in colours])
    clip_writer(folder / "2.mp4", [(colours[3], 5)])
    return folder


def events_of(folder, **values):
    settings = DecodeSettings(preprocessing=FLAT, **values)
    return list(decode_files(sorted(folder.iterdir()), settings))


@pytest.mark.parametrize("values", [{}, {"grid_step_s": 1.0}, {"segmentation": "shots"}, {"only_open": True}])
def test_three_decoders_find_what_one_finds(values, film, monkeypatch) -> None:
    alone = events_of(film, **values)
    decode, pieces = pool._Worker.decode, []

    def noted(worker, piece, path, segments):
        pieces.append((piece.file, piece.first, id(worker)))
        return decode(worker, piece, path, segments)

    monkeypatch.setattr(pool._Worker, "decode", noted)
    together = events_of(film, num_workers=3, **values)
    assert [type(event) for event in together] == [type(event) for event in alone]
    for one, other in zip(alone, together, strict=True):
        if not isinstance(one, DecodedSegment):
            assert one == other
            continue
        assert (one.file, one.number) == (other.file, other.number)
        np.testing.assert_array_equal(one.video, other.video)
        np.testing.assert_array_equal(one.hashes, other.hashes)
        assert (one.shown is None) == (other.shown is None)
        assert one.shown is None or one.shown.tolist() == other.shown.tolist()
    film_pieces = [(first, worker) for file, first, worker in pieces if file == 1]
    num_segments = sum(isinstance(event, DecodedSegment) and event.file == 1 for event in alone)
    assert sorted(first for first, _ in film_pieces) == list(range(0, max(num_segments, 1), 16))
    assert len({worker for _, worker in film_pieces}) > 1 or num_segments <= 16


def test_a_piece_whose_decoder_dies_costs_its_file_and_no_other(film, monkeypatch) -> None:
    attempt = pool._Worker._attempt

    def dying(worker, piece, path, segments, on_device):
        for number, event in enumerate(attempt(worker, piece, path, segments, on_device)):
            if piece.first == 32 and number == 3:
                worker._process.kill()
                raise pool._WorkerDied
            yield event

    monkeypatch.setattr(pool._Worker, "_attempt", dying)
    events = events_of(film, num_workers=2)
    last = [event for event in events if isinstance(event, (Finished, Failed))]
    assert [type(event) for event in last] == [Finished, Failed, Finished]
    assert last[1].reason == "decoder_crashed"
    given = [event.number for event in events if isinstance(event, DecodedSegment) and event.file == 1]
    assert given == list(range(35))


def test_a_file_that_changes_between_its_pieces_is_rejected(film, tmp_path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes((film / "1.mp4").read_bytes())
    # room for nothing ahead: later pieces are opened while the first are read
    settings = replace(DecodeSettings(preprocessing=FLAT), num_workers=2, ahead_bytes=1)
    found = []
    for event in decode_files([path], settings):
        found.append(event)
        if isinstance(event, DecodedSegment) and event.number == 15:
            os.utime(path, ns=(1, 1))
    assert isinstance(found[0], Opened) and isinstance(found[-1], Failed) and found[-1].reason == "changed"
