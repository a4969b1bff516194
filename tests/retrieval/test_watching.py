"""Watched folders: what is quiet comes in, what is gone leaves, and an unmounted disk empties nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm.errors import BusyError, InvalidInput
from vlm.retrieval import VideoIndex
from vlm.retrieval.durability import WriterLock
from vlm.retrieval.ingest import presence
from vlm.retrieval.ingest.watching import Watcher
from vlm.retrieval.upkeep.compaction import compact


@pytest.fixture(scope="module")
def pieces(tmp_path_factory, clip_writer) -> dict[str, bytes]:
    """The bytes of three clips, each of one colour."""
    folder = tmp_path_factory.mktemp("pieces")
    colours = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}
    return {
        name: clip_writer(folder / f"{name}.mp4", [(colour, 2)]).read_bytes()
        for name, colour in colours.items()
    }


@pytest.fixture
def world(tmp_path, pieces, make_encoder) -> SimpleNamespace:
    """A folder `v` with a red and a green video, its index, and a watcher that has looked once."""
    folder, model = tmp_path / "v", make_encoder()
    folder.mkdir()
    for name in ("red", "green"):
        (folder / f"{name}.mp4").write_bytes(pieces[name])
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([folder], model=model)
    model.num_clips = 0
    lines: list[str] = []
    loads: list[str] = []

    def watch(*paths: Path, sleep: Callable[[float], object] = lambda seconds: None) -> Watcher:
        def load():
            loads.append("load")
            return model

        return Watcher(VideoIndex.open(index.folder), load, paths, say=lines.append, sleep=sleep)

    watcher = watch()
    assert watcher.round() is None and not watcher.is_waiting
    return SimpleNamespace(
        folder=folder, index=index.folder, model=model, lines=lines, loads=loads, watch=watch, watcher=watcher
    )


def held(index: Path) -> dict[str, str]:
    """Return the identifier of each video by its file's name."""
    videos = VideoIndex.open(index).snapshot.videos
    return {os.path.basename(os.fsdecode(video.path)): video.video_id for video in videos}


def counts(report) -> tuple[int, ...]:
    """Return how many videos were added, updated, renamed and removed, and files rejected."""
    return (
        report.num_added,
        report.num_updated,
        report.num_renamed,
        report.num_removed,
        len(report.rejected),
    )


def test_a_file_is_left_alone_while_it_grows(world, pieces) -> None:
    new, data = world.folder / "blue.mp4", pieces["blue"]
    for size in (100, len(data) // 2, len(data)):
        new.write_bytes(data[:size])
        assert world.watcher.round() is None
        assert world.watcher.is_waiting and held(world.index).keys() == {"red.mp4", "green.mp4"}
    assert world.loads == []  # nor was a model needed so far
    assert counts(world.watcher.round()) == (1, 0, 0, 0, 0)
    assert not world.watcher.is_waiting and held(world.index).keys() == {"red.mp4", "green.mp4", "blue.mp4"}
    assert world.watcher.round() is None
    new.write_bytes(pieces["red"] + b"more")  # changed where it lies
    assert world.watcher.round() is None
    assert counts(world.watcher.round()) == (0, 1, 0, 0, 0)
    assert world.loads == ["load"] and VideoIndex.open(world.index).verify() == []


def test_a_file_of_the_same_size_and_another_time_is_not_quiet(world, pieces) -> None:
    new = world.folder / "blue.mp4"
    for second in range(3):
        new.write_bytes(pieces["blue"])
        os.utime(new, (second, second))
        assert world.watcher.round() is None
    assert counts(world.watcher.round()) == (1, 0, 0, 0, 0)


@pytest.mark.parametrize("how", ["missing", "empty", "unreadable"])
def test_a_folder_that_is_away_empties_nothing_and_others_go_on(world, pieces, how, monkeypatch) -> None:
    other = world.folder.with_name("other")
    other.mkdir()
    (other / "blue.mp4").write_bytes(pieces["blue"])
    watcher = world.watch(other)
    assert watcher.round() is None  # the folder is noted, its file not yet quiet
    assert counts(watcher.round()) == (1, 0, 0, 0, 0)
    before, disk = held(world.index), world.folder.with_name("unmounted")
    world.folder.rename(disk)
    if how != "missing":
        world.folder.mkdir()
        (world.folder / "lost+found").mkdir()
    if how == "unreadable":
        scan = os.scandir

        def refuse(place):
            if os.fspath(place) == str(world.folder):
                raise PermissionError(13, "Permission denied", str(place))
            return scan(place)

        monkeypatch.setattr(os, "scandir", refuse)
    (other / "blue.mp4").unlink()
    (other / "again.mp4").write_bytes(pieces["blue"] + b"x")
    reports = [watcher.round() for _ in range(4)]
    assert [report and counts(report) for report in reports] == [None, (1, 0, 0, 1, 0), None, None]
    now = held(world.index)
    assert now == {name: before[name] for name in ("red.mp4", "green.mp4")} | {"again.mp4": now["again.mp4"]}
    assert len(world.lines) == 1 and "2 files that lay there stay in the index" in world.lines[0]
    monkeypatch.undo()
    shutil.rmtree(world.folder, ignore_errors=True)
    disk.rename(world.folder)
    assert [watcher.round() for _ in range(3)] == [None, None, None]
    assert held(world.index) == now
    assert world.lines[1:] == [f"{world.folder}: there again"]


def test_a_disk_below_the_root_is_noticed(world, pieces, monkeypatch) -> None:
    disk, hidden = world.folder / "disk", world.folder.with_name("hidden")
    disk.mkdir()
    (disk / "blue.mp4").write_bytes(pieces["blue"])
    mounted, device_of = [True], presence.device_of
    monkeypatch.setattr(
        presence, "device_of", lambda place: 77 if mounted[0] and place == disk else device_of(place)
    )
    world.watcher.round()
    assert counts(world.watcher.round()) == (1, 0, 0, 0, 0)
    before = held(world.index)
    for leaves_folder in (True, False):
        disk.rename(hidden)
        mounted[0] = False
        if leaves_folder:
            disk.mkdir()
            (disk / "local.mp4").write_bytes(pieces["red"] + b"y")  # hidden while the disk is mounted
        [world.watcher.round() for _ in range(4)]
        assert before.items() <= held(world.index).items()
        assert "the disk that was there is not" in world.lines[-1]
        shutil.rmtree(disk, ignore_errors=True)
        hidden.rename(disk)
        mounted[0] = True
        [world.watcher.round() for _ in range(3)]
        assert held(world.index) == before and world.lines[-1].endswith("there again")
    (disk / "blue.mp4").unlink()  # on the mounted disk a deletion is one
    world.watcher.round()
    assert counts(world.watcher.round()) == (0, 0, 0, 1, 0)


def test_a_broken_file_is_tried_once_until_it_is_mended(world, pieces) -> None:
    broken = world.folder / "blue.mp4"
    broken.write_bytes(b"no video at all" * 50)
    world.watcher.round()
    assert counts(world.watcher.round()) == (0, 0, 0, 0, 1)
    compact(VideoIndex.open(world.index))
    again = world.watch()  # neither a restart nor a compaction forgets
    for watcher in (world.watcher, again):
        assert [watcher.round() for _ in range(2)] == [None, None]
        assert not watcher.is_waiting
    broken.write_bytes(pieces["blue"])
    again.round()
    assert counts(again.round()) == (1, 0, 0, 0, 0)
    assert VideoIndex.open(world.index).info()["rejected"] == []
    broken.write_bytes(b"broken once more" * 50)  # what was indexed under this name leaves
    again.round()
    assert counts(again.round()) == (0, 0, 0, 0, 1)
    assert "blue.mp4" not in held(world.index)
    broken.unlink()  # a rejected file that is gone is not named for ever
    again.round()
    again.round()
    assert VideoIndex.open(world.index).info()["rejected"] == []


def test_a_rename_keeps_identifier_and_vectors(world, contents) -> None:
    before, vectors = held(world.index), contents(world.index)
    (world.folder / "sub").mkdir()
    (world.folder / "red.mp4").rename(world.folder / "sub" / "scarlet.mp4")
    assert world.watcher.round() is None
    assert counts(world.watcher.round()) == (0, 0, 1, 0, 0)
    assert held(world.index) == {"scarlet.mp4": before["red.mp4"], "green.mp4": before["green.mp4"]}
    assert contents(world.index) == vectors and world.model.num_clips == 0


def test_a_deleted_file_leaves_at_the_second_look(world) -> None:
    (world.folder / "red.mp4").unlink()
    assert world.watcher.round() is None and world.watcher.is_waiting
    assert counts(world.watcher.round()) == (0, 0, 0, 1, 0)
    assert held(world.index).keys() == {"green.mp4"} and world.lines == []
    (world.folder / "green.mp4").unlink()  # the last one: the folder may as well not be mounted
    assert [world.watcher.round() for _ in range(3)] == [None] * 3
    assert held(world.index).keys() == {"green.mp4"} and "holds no videos" in world.lines[0]


def test_a_folder_that_cannot_be_looked_into_keeps_its_videos(world, pieces) -> None:
    deep, aside = world.folder / "deep", world.folder.with_name("aside")
    deep.mkdir()
    (deep / "blue.mp4").write_bytes(pieces["blue"])
    world.watcher.round()
    world.watcher.round()
    deep.rename(aside)
    deep.symlink_to(deep)  # a loop is an error to everybody, root included
    assert [world.watcher.round() for _ in range(3)] == [None] * 3
    assert VideoIndex.open(world.index).update(model=world.model).num_removed == 0
    assert "blue.mp4" in held(world.index)
    deep.unlink()
    world.watcher.round()
    assert counts(world.watcher.round()) == (0, 0, 0, 1, 0)


def test_a_file_named_outright_is_judged_by_its_folder(world, pieces) -> None:
    disk, hidden = world.folder.with_name("disk"), world.folder.with_name("hidden")
    disk.mkdir()
    (disk / "blue.mp4").write_bytes(pieces["blue"])
    watcher = world.watch(disk / "blue.mp4")
    watcher.round()
    watcher.round()
    disk.rename(hidden)
    for _ in range(2):  # without the folder, then with an empty one
        assert [watcher.round() for _ in range(3)] == [None] * 3
        disk.mkdir(exist_ok=True)
    assert "blue.mp4" in held(world.index)
    (disk / "notes.txt").touch()
    watcher.round()
    assert counts(watcher.round()) == (0, 0, 0, 1, 0)


def test_errors_end_a_round_and_not_the_watch(world, pieces) -> None:
    """Another writer, then a model that fails twice, then all is well; each is said once and counted."""
    (world.folder / "blue.mp4").write_bytes(pieces["blue"])
    lock, reports, pauses = WriterLock(world.index), [], []
    encode = world.model.encode_video

    def fail(video):
        raise RuntimeError("out of something")

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 1:
            lock.__enter__()
        elif len(pauses) == 3:
            lock.__exit__(None, None, None)
            world.model.encode_video = fail
        elif len(pauses) == 5:
            world.model.encode_video = encode
        elif len(pauses) == 7:
            raise KeyboardInterrupt

    watcher = world.watch(sleep=sleep)
    with pytest.raises(KeyboardInterrupt):
        watcher.run(reports.append, every_s=60, settle_s=5)
    assert pauses == [5, 60, 60, 60, 60, 60, 60]
    assert [counts(report) for report in reports] == [(1, 0, 0, 0, 0)]
    assert watcher.failures == {"BusyError": 2, "RuntimeError": 2} and world.loads == ["load"]
    busy, failed, fine = world.lines
    assert "BusyError" in busy and str(os.getpid()) in busy and "out of something" in failed
    assert fine.endswith("2 BusyError, 2 RuntimeError")
    with WriterLock(world.index):  # nothing holds the lock between rounds
        (world.folder / "red.mp4").unlink()
        with pytest.raises(BusyError):
            world.watch().once()
    assert counts(world.watch().once()) == (0, 0, 0, 1, 0)


def test_what_cannot_be_watched_is_said(tmp_path, world, make_encoder) -> None:
    with pytest.raises(InvalidInput, match="no such file or folder"):
        world.watch(tmp_path / "tpyo")
    empty = VideoIndex.create(tmp_path / "empty", world.model)
    with pytest.raises(InvalidInput, match="name the folders to watch"):
        Watcher(empty, make_encoder, say=print)
    other = Watcher(VideoIndex.open(world.index), lambda: make_encoder(fingerprint="other" * 4), say=print)
    with pytest.raises(InvalidInput, match="model"):
        other.load_model()


def test_once_on_the_command_line(world, pieces, call_vlm, monkeypatch) -> None:
    nicer: list[int] = []
    monkeypatch.setattr(os, "nice", nicer.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    new = world.folder.with_name("new")
    new.mkdir()
    (new / "blue.mp4").write_bytes(pieces["blue"])
    once = ("index", "watch", str(world.index), str(new), "--once", "--settle", "0")
    code, output, errors = call_vlm(*once, "--json")
    assert code == 0, errors
    report = json.loads(output)
    assert (report["num_added"], report["num_videos"]) == (1, 3) and nicer == [10]
    assert call_vlm(*once)[:2] == (0, "")  # cron has nothing to send
    (world.folder / "bad.mp4").write_bytes(b"bad" * 100)
    code, output, _ = call_vlm(*once[:3], "--once", "--settle", "0")
    assert code == 3 and "1 rejected" in output and "bad.mp4" in output
    assert call_vlm(*once)[0] == 0
    with WriterLock(world.index):
        (world.folder / "red.mp4").unlink()
        assert call_vlm(*once)[0] == 75
    for wrong in (("--every", "0"), ("--settle", "-1"), ("--threads", "0"), ("--workers", "0")):
        assert call_vlm(*once, *wrong)[0] == 2


def test_sigterm_ends_the_watch_and_keeps_what_is_committed(world, pieces, build_command) -> None:
    words = f"index watch {world.index} --every 0.2 --settle 0.2 --json"
    command, environment = build_command(world.index, COMMAND=words)
    (world.folder / "blue.mp4").write_bytes(pieces["blue"])
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while "blue.mp4" not in held(world.index) and time.monotonic() < deadline:
        time.sleep(0.1)
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors and json.loads(first)["num_added"] == 1
    assert "blue.mp4" in held(world.index) and VideoIndex.open(world.index).verify() == []
