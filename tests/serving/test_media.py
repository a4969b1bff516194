"""Pictures and clips: the right moment in them, whatever the format; a cache that stays within its bound."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from vlm.data.decoding import open_video
from vlm.serving.media.cache import FileCache


def mean_colour(content: bytes, cell: int = 0, cells: int = 1) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    width = pixels.shape[1] // cells
    middle = pixels[:, cell * width + width // 4 : cell * width + 3 * width // 4]
    return middle[middle.shape[0] // 4 : -middle.shape[0] // 4].mean(axis=(0, 1))


def nearest(colour: np.ndarray) -> str:
    known = {"red": (210, 20, 20), "green": (20, 190, 20), "blue": (20, 20, 220), "grey": (120, 120, 120)}
    return min(known, key=lambda name: np.abs(colour - known[name]).sum())


@pytest.mark.parametrize(
    ("clip", "at_s", "colour"),
    [
        ("red", 0, "red"),
        ("red", 9.7, "red"),
        ("red", 10.2, "green"),
        ("red", 19.9, "green"),
        ("copied", 5.5, "green"),
        ("copied", 6.5, "red"),
        ("old", 5.5, "blue"),
        ("old", 6.5, "red"),
        ("blue", 3, "blue"),
    ],
)
def test_a_thumbnail_shows_its_second(site, ids, clip, at_s, colour) -> None:
    reply = site.get(f"/api/videos/{ids[clip]}/thumbnail?at_s={at_s}&width=160")
    assert (reply.status, reply.headers["content-type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(reply.body)).size == (160, 90)
    assert nearest(mean_colour(reply.body)) == colour


def test_a_filmstrip_goes_through_its_stretch(site, ids) -> None:
    reply = site.get(f"/api/videos/{ids['red']}/filmstrip?start_s=8&end_s=12")
    assert Image.open(io.BytesIO(reply.body)).size == (8 * 320, 180)
    colours = [nearest(mean_colour(reply.body, cell, 8)) for cell in range(8)]
    assert colours == ["red"] * 4 + ["green"] * 4


def test_pixels_that_are_not_square_are_shown_as_meant(write_clip, tmp_path) -> None:
    from fractions import Fraction

    from vlm.serving.media.clips import cut
    from vlm.serving.media.pictures import save_strip

    plain = write_clip(tmp_path / "plain.avi", [("red", 1)], container="avi", codec="mpeg4")
    wide = write_clip(
        tmp_path / "wide.avi", [("red", 1)], container="avi", codec="mpeg4", pixel_shape=Fraction(2)
    )
    for path, ratio in ((plain, 1.5), (wide, 3.0)):
        cut(str(path), 0.0, 1.0, tmp_path / "clip.mp4", "transcode")
        with open_video(tmp_path / "clip.mp4") as video:
            assert video.info.width / video.info.height == pytest.approx(ratio, rel=0.05)
        save_strip(str(path), [0.5], 320, tmp_path / "still.jpg")
        pixels = np.asarray(Image.open(tmp_path / "still.jpg")).astype(int)
        bright = (pixels[90, :, 0] > 150).sum() / (pixels[:, 160, 0] > 150).sum()
        assert bright == pytest.approx(ratio, rel=0.15)


@pytest.mark.parametrize(
    "words",
    [
        "thumbnail?at_s=-1",
        "thumbnail?at_s=nan",
        "thumbnail?width=161",
        "thumbnail?at_s=x",
        "filmstrip",
        "filmstrip?start_s=5&end_s=5",
        "filmstrip?start_s=6&end_s=5",
        "filmstrip?start_s=0&end_s=inf",
        "filmstrip?start_s=0",
        "playback?start_s=30&end_s=40",
        "playback?start_s=1e999&end_s=2",
    ],
)
def test_odd_times_are_refused(site, ids, words) -> None:
    assert site.get(f"/api/videos/{ids['red']}/{words}").status == 400


def test_a_thumbnails_time_is_told_by_its_own_name(site, ids) -> None:
    address = f"/api/videos/{ids['red']}/thumbnail?at_s="
    for value, words in {
        "abc": "at_s: expected seconds from the video's start, 0 or more",
        "-1": "at_s: expected seconds from the video's start, 0 or more",
        "": "at_s: expected seconds from the video's start, 0 or more",
        "99": "at_s: the video ends after 20.000 s, got 99",
    }.items():
        reply = site.get(address + value)
        assert (reply.status, reply.json["error"]["message"]) == (400, words), value
    # the end of the last segment may lie a little behind the last frame
    assert site.get(address + "20.5").status == 200


@pytest.mark.parametrize(
    ("clip", "how", "start_s", "end_s"),
    [("copied", "remux", 4.5, 8.0), ("copied", "remux", 0.0, 3.0), ("old", "transcode", 4.5, 8.0)],
)
def test_a_clip_holds_its_stretch_at_the_promised_offset(
    site, ids, tmp_path, clip, how, start_s, end_s
) -> None:
    source = site.get(f"/api/videos/{ids[clip]}/playback?start_s={start_s}&end_s={end_s}").json
    assert source["how"] == how
    offset = source["offset_s"]
    assert max(0.0, start_s - 2.01) <= offset <= start_s
    content = site.get(source["url"]).body
    (tmp_path / "clip.mp4").write_bytes(content)
    with open_video(tmp_path / "clip.mp4") as video:
        assert video.info.codec == "h264" and video.info.pixel_format == "yuv420p"
        # a copy also holds the pictures after the end that those before it refer to
        assert -0.15 < video.info.duration_s - (end_s - offset) < (0.55 if how == "remux" else 0.15)
        for time_s in (start_s + 0.05, (start_s + end_s) / 2, end_s - 0.15):
            frame = video.read(video.frames_at([time_s - offset]))[0]
            with open_video(site.state.service.library.path(ids[clip])) as original:
                expected = original.read(original.frames_at([time_s]))[0]
            # the bar that grows tells the time to a fraction of a second
            assert np.abs(frame.astype(int) - expected.astype(int)).mean() < 6, time_s
    assert site.get(source["url"], Range="bytes=3-9").body == content[3:10]
    assert content.find(b"moov") < content.find(b"mdat")  # playing begins before all of it has come


def test_sound_comes_along(site, ids, tmp_path) -> None:
    import av

    source = site.get(f"/api/videos/{ids['copied']}/playback?start_s=4&end_s=8").json
    (tmp_path / "clip.mp4").write_bytes(site.get(source["url"]).body)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert samples / 48000 == pytest.approx(8 - source["offset_s"], abs=0.3)


def test_what_browsers_play_is_sent_as_it_is(site, ids) -> None:
    source = site.get(f"/api/videos/{ids['grey']}/playback?start_s=0&end_s=2").json
    assert source == {"url": f"/api/videos/{ids['grey']}/content", "offset_s": 0.0, "how": "direct"}
    old = site.get(f"/api/videos/{ids['old']}/content")
    assert (old.status, old.headers["content-type"]) == (200, "application/octet-stream")


def test_a_worker_that_dies_costs_one_answer(site, ids, tmp_path) -> None:
    import signal

    from vlm.errors import DataError

    site.get(f"/api/videos/{ids['blue']}/thumbnail?at_s=1.1")
    child = site.state.workers._idle[0]
    os.kill(child._process.pid, signal.SIGKILL)
    child._process.wait()
    with pytest.raises(DataError, match="died"):
        site.state.workers.run("describe", 5, path=str(tmp_path))
    assert site.get(f"/api/videos/{ids['blue']}/thumbnail?at_s=1.2").status == 200


def test_a_file_that_hangs_is_given_up(site, tmp_path) -> None:
    from vlm.errors import DataError

    os.mkfifo(tmp_path / "pipe.mp4")  # opening it waits for a writer that never comes
    started = time.monotonic()
    with pytest.raises(DataError, match="too long") as caught:
        site.state.workers.run("describe", 0.5, path=str(tmp_path / "pipe.mp4"))
    assert caught.value.reason == "timeout" and time.monotonic() - started < 8
    assert site.state.workers.run("describe", 5, path=str(site.state.service.library.path(ids_of(site)[0])))


def ids_of(site) -> list[str]:
    return list(site.state.service.library.videos)


def test_the_cache_keeps_within_its_bound(tmp_path) -> None:
    cache = FileCache(tmp_path / "cache", 150_000)

    def produce(path):
        path.write_bytes(b"x" * 10_000)
        return {"n": 1}

    names = [cache.make((n,), ".bin", produce).name for n in range(9)]
    cache.get(names[0])  # used again, so not the oldest
    os.utime(cache.folder / names[1], (1, 1))
    os.utime(cache.folder / names[0])
    for n in range(9, 12):
        cache.make((n,), ".bin", produce)
    assert sum(path.stat().st_blocks * 512 for path in cache.folder.iterdir()) <= 170_000
    assert cache.get(names[1]) is None and cache.get(names[0]) is not None
    again = FileCache(tmp_path / "cache", 100_000)
    assert again.size_bytes == sum(path.stat().st_blocks * 512 for path in cache.folder.iterdir())


def test_a_file_is_made_once_however_many_ask(tmp_path) -> None:
    cache, made = FileCache(tmp_path / "cache", 1 << 20), []
    gate = threading.Barrier(8)

    def produce(path):
        made.append(1)
        path.write_bytes(b"x")
        return {}

    def ask() -> None:
        gate.wait(10)
        cache.make(("same",), ".bin", produce)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_a_failed_making_leaves_nothing(tmp_path) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 20)

    def fail(path):
        path.write_bytes(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.make(("x",), ".bin", fail)
    assert list(cache.folder.iterdir()) == []


def test_what_another_server_is_making_is_left_alone(tmp_path) -> None:
    folder = tmp_path / "cache"
    first = FileCache(folder, 1 << 20)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f".tmp-{ended.pid}-0123abcd-x.mp4", ".tmp-old.mp4", ".tmp-new.mp4", ".tmp-1-0123abcd-x.mp4"):
        folder.joinpath(name).write_bytes(b"half")
    os.utime(folder / ".tmp-old.mp4", (1, time.time() - 3700))

    def produce(path):
        path.write_bytes(b"first")
        second = FileCache(folder, 1 << 20)
        second.make(("same",), ".bin", lambda path: {"size": path.write_bytes(b"second")})
        assert path.read_bytes() == b"first" and str(os.getpid()) in path.name
        return {"size": 5}

    entry = first.make(("same",), ".bin", produce)
    assert entry.path.read_bytes() == b"first" and first.get(entry.name) == entry
    # who made them still runs, or, without a number, may do so
    left = {path.name for path in folder.glob(".tmp-*")}
    assert left == {".tmp-new.mp4", ".tmp-1-0123abcd-x.mp4"}
