"""Decoding outside the process: order, crashes, hangs, and that nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from vlm.retrieval.ingest import pool
from vlm.retrieval.ingest.events import DecodedSegment, DecodeSettings, Failed, Finished, Opened
from vlm.retrieval.ingest.pool import decode_files
from vlm.retrieval.ingest.schedule import Schedule
from vlm.types import Preprocessing

FLAT = Preprocessing(num_frames=2, image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture
def children(monkeypatch):
    """The worker processes that a test starts."""
    started = []
    popen = subprocess.Popen

    def record(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(pool.subprocess, "Popen", record)
    yield started
    deadline = time.monotonic() + 5
    while any(t.name.startswith("decode") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(child.poll() is not None for child in started), "a worker is still running"


@pytest.fixture
def impostor(monkeypatch):
    """Put a program in the place of the first worker (later ones are real)."""

    def install(code: str, always: bool = False) -> None:
        popen, used = subprocess.Popen, []

        def start(command, **options):
            if not used or always:
                used.append(1)
                command = [sys.executable, "-c", f"import sys, os, time, signal\n{code}"]
            return popen(command, **options)

        monkeypatch.setattr(pool.subprocess, "Popen", start)

    return install


READY = 'print(\'{"kind": "ready"}\', flush=True); sys.stdin.readline()\n'


def test_order_and_content_with_several_workers(tmp_path, clip, colours, children) -> None:
    shades = [(40 * i, 10, 240 - 40 * i) for i in range(6)]
    paths = [clip(tmp_path / f"{i}.mp4", [(shade, 9)]) for i, shade in enumerate(shades)]
    paths.insert(2, tmp_path / "missing.mp4")
    shades.insert(2, None)
    events = list(decode_files(paths, DecodeSettings(preprocessing=FLAT, num_workers=3)))
    assert [event.file for event in events] == sorted(event.file for event in events)
    for file, shade in enumerate(shades):
        mine = [event for event in events if event.file == file]
        if shade is None:
            assert [(type(event), event.reason) for event in mine] == [(Failed, "missing")]
            continue
        assert [type(event) for event in mine] == [Opened, DecodedSegment, DecodedSegment, Finished]
        assert mine[0].segments == [(0.0, 8.0), (1.0, 9.0)] and mine[0].codec == "h264"
        assert [event.number for event in mine[1:3]] == [0, 1]
        for event in mine[1:3]:
            assert event.video.shape == (2, 3, 16, 16) and event.video.dtype == np.float32
            np.testing.assert_allclose(event.video.mean(axis=(0, 2, 3)) * 255, shade, atol=6)
        assert mine[3].size_bytes == paths[file].stat().st_size
    assert len(children) == 3


def test_given_segments(tmp_path, clip, colours) -> None:
    path = clip(tmp_path / "a.mp4", [(colours.red, 2), (colours.blue, 2)])
    events = list(
        decode_files(
            [path, path], DecodeSettings(preprocessing=FLAT), [[(2.0, 4.0)], [(0.0, 1.0), (3.0, 4.0)]]
        )
    )
    blue_share = [
        float(event.video[:, 2].mean()) > 0.5 for event in events if isinstance(event, DecodedSegment)
    ]
    assert blue_share == [True, False, True]


def test_only_facts(tmp_path, clip, colours) -> None:
    path = clip(tmp_path / "a.mp4", [(colours.red, 2)], tags={"title": "Ferien", "comment": "x" * 5000})
    opened, finished = decode_files([path], DecodeSettings(preprocessing=FLAT, only_open=True))
    assert opened.tags["title"] == "Ferien" and len(opened.tags["comment"]) == 1000
    assert isinstance(finished, Finished)


@pytest.mark.parametrize(
    ("code", "reason", "detail"),
    [
        (READY + "os._exit(9)", "decoder_crashed", "exit code 9"),
        (READY + "os.kill(os.getpid(), signal.SIGSEGV)", "decoder_crashed", "exit code -11"),
        (READY + 'print(\'{"kind": "opened"\', flush=True); os._exit(0)', "decoder_crashed", "died"),
        (READY + "print('not json', flush=True); time.sleep(60)", "decoder_crashed", "exit code -9"),
        ("os._exit(1)", "decoder_crashed", "exit code 1"),
        (READY + "time.sleep(60)", "timeout", "longer than 0.1 s"),
        (READY + "os.kill(os.getpid(), signal.SIGSTOP)", "timeout", "longer than 0.1 s"),
    ],
)
def test_a_worker_that_dies_or_hangs_costs_one_file(
    code, reason, detail, tmp_path, clip, colours, impostor, monkeypatch
) -> None:
    monkeypatch.setattr(pool, "_GRACE_S", 0.4)
    paths = [clip(tmp_path / f"{i}.mp4", [(colours.red, 1)]) for i in range(2)]
    impostor(code)
    events = decode_files(paths, DecodeSettings(preprocessing=FLAT, patience_s=0.1))
    first = next(events)
    assert (first.file, type(first), first.reason) == (0, Failed, reason)
    assert detail in first.detail
    events.close()
    # with ordinary patience, the next file gets a new worker and is decoded
    impostor(code)
    patient = DecodeSettings(preprocessing=FLAT, patience_s=0.1 if reason == "timeout" else 20)
    monkeypatch.setattr(pool, "_GRACE_S", 0.4 if reason == "timeout" else 15)
    events = list(decode_files(paths, patient))
    assert isinstance(events[0], Failed)
    assert isinstance(events[1], Opened) or reason == "timeout"


def test_a_codec_that_never_returns_is_ended_by_its_own_alarm(tmp_path, clip, colours) -> None:
    # ten seconds of frames cannot be decoded in a millisecond, whatever the parent does
    path = clip(tmp_path / "a.mp4", [(colours.red, 10)], fps=25, size=(640, 480))
    began = time.monotonic()
    (*_, last) = decode_files([path], DecodeSettings(preprocessing=FLAT, patience_s=0.002))
    assert isinstance(last, Failed) and last.reason == "timeout"
    assert time.monotonic() - began < 30


def test_a_file_that_changes_while_it_is_read_is_rejected(tmp_path, clip, colours) -> None:
    path = clip(tmp_path / "a.mp4", [(colours.red, 400)])
    events = decode_files([path], DecodeSettings(preprocessing=FLAT, ahead_bytes=1 << 16))
    assert isinstance(next(events), Opened)
    os.utime(path, ns=(1, 1))  # the worker is held back, far from the end
    last = list(events)[-1]
    assert isinstance(last, Failed) and last.reason == "changed"


def test_leaving_early_ends_the_workers(tmp_path, clip, colours, children) -> None:
    path = clip(tmp_path / "a.mp4", [(colours.red, 300)])
    events = decode_files([path] * 4, DecodeSettings(preprocessing=FLAT, num_workers=2))
    next(events)
    wait_until(lambda: len(children) == 2)  # the second comes to help once it is known that the file is long
    began = time.monotonic()
    events.close()
    assert time.monotonic() - began < 5
    assert [child.returncode for child in children] == [-signal.SIGKILL] * 2


def test_files_in_the_current_folder_are_not_imported(tmp_path, clip, colours, monkeypatch) -> None:
    (tmp_path / "av.py").write_text("import os; os._exit(77)")
    (tmp_path / "numpy.py").write_text("import os; os._exit(77)")
    path = clip(tmp_path / "a.mp4", [(colours.red, 1)])
    monkeypatch.chdir(tmp_path)
    assert isinstance(list(decode_files([path], DecodeSettings(preprocessing=FLAT)))[-1], Finished)


def test_a_decoder_goes_on_with_the_next_files_while_nobody_reads(
    tmp_path, clip, colours, monkeypatch
) -> None:
    paths = [clip(tmp_path / f"{i}.mp4", [(colours.red, 9)]) for i in range(3)]
    put, sent = Schedule.put, []

    def record(schedule, piece, event, num_bytes):
        sent.append(type(event))
        return put(schedule, piece, event, num_bytes)

    monkeypatch.setattr(Schedule, "put", record)
    events = decode_files(paths, DecodeSettings(preprocessing=FLAT))
    next(events)
    wait_until(lambda: sent.count(Finished) == 3)
    assert len(list(events)) == 3 * 4 - 1
    # where one event has room nothing more comes through before it is read
    sent.clear()
    events = decode_files(paths, DecodeSettings(preprocessing=FLAT, ahead_bytes=1))
    next(events)
    wait_until(lambda: len(sent) == 3)
    time.sleep(0.2)
    assert sent == [Opened, DecodedSegment, DecodedSegment]
    events.close()


def wait_until(is_true) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
