"""Files that are not what they seem: each is refused with its reason, none opens anything else."""

from __future__ import annotations

import os
import resource
import socket
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from vlm.data.decoding import open_video, probe, read_frames
from vlm.errors import DataError


def reason(source: object) -> str:
    with pytest.raises(DataError) as caught:
        open_video(source)  # type: ignore[arg-type]
    assert str(caught.value)
    return caught.value.reason


def test_missing_and_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    assert reason(tmp_path / "none.mp4") == "missing"
    assert reason(tmp_path / "empty.mp4") == "empty"
    assert reason(b"") == "empty"
    assert reason("a\0b.mp4") == "missing"


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    assert reason(tmp_path) == "not_a_file"
    assert reason(tmp_path / "pipe.mp4") == "not_a_file"
    assert reason("/dev/zero") == "not_a_file"


@pytest.mark.parametrize("data", [b"\0" * 4096, b"not a video", bytes(range(256)) * 40, b"RIFF\0\0\0\0AVI "])
def test_garbage(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.mp4").write_bytes(data)
    assert reason(tmp_path / "x.mp4") in ("not_a_video", "no_frames", "no_video")
    assert reason(data) in ("not_a_video", "no_frames", "no_video")


def test_audio_only(tmp_path: Path, encode_audio) -> None:
    encode_audio(tmp_path / "sound.mp4")
    assert reason(tmp_path / "sound.mp4") == "audio_only"


def test_a_picture_on_a_sound_file_is_no_video(tmp_path: Path, encode_audio, clip: Path) -> None:
    """Cover art is an "attached picture": a stream of video type that is not one."""
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=16000)
        cover = output.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for packet in [
            *cover.encode(picture),
            *cover.encode(None),
            *sound.encode(frame),
            *sound.encode(None),
        ]:
            output.mux(packet)
    assert reason(path) == "audio_only"


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {target}\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
    "hls-http": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}"/></svg>',
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{url}</BaseURL></MPD>',
    "edl": "# mpv EDL v0\n{target}\n",
}


class Listener:
    """Counts who connects to a loopback port."""

    def __init__(self) -> None:
        self.hits = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.hits += 1
            connection.close()


@pytest.fixture
def listener():
    found = Listener()
    yield found
    found.server.close()


@pytest.mark.parametrize("kind", sorted(PLAYLISTS))
def test_playlists_named_as_videos_open_nothing(
    tmp_path: Path, clip: Path, listener: Listener, kind: str
) -> None:
    url = f"http://127.0.0.1:{listener.port}/a.mp4"
    text = PLAYLISTS[kind].format(target=clip, url=url, port=listener.port)
    (tmp_path / "x.mp4").write_text(text)
    assert reason(tmp_path / "x.mp4") == "not_a_video"
    assert reason(text.encode()) == "not_a_video"
    assert listener.hits == 0


def test_addresses_are_names_of_files_and_nothing_else(listener: Listener, clip: Path) -> None:
    for address in (
        f"http://127.0.0.1:{listener.port}/a.mp4",
        f"tcp://127.0.0.1:{listener.port}",
        f"concat:{clip}|{clip}",
        f"file:{clip}",
        "pipe:0",
    ):
        assert reason(address) == "missing"
    assert listener.hits == 0


@pytest.mark.parametrize(
    "name",
    [
        "-dash.mp4",
        "quote'\".mp4",
        "new\nline.mp4",
        "co:lon.mp4",
        "http:.mp4",
        "ümlaut ☃.mp4",
        "%d.mp4",
        "a?.mp4",
    ],
)
def test_names_that_hurt(tmp_path: Path, clip: Path, name: str) -> None:
    (tmp_path / name).write_bytes(clip.read_bytes())
    assert probe(tmp_path / name).num_frames == 40
    old = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert probe(name).num_frames == 40
    finally:
        os.chdir(old)


def test_a_name_that_is_not_utf8(tmp_path: Path, clip: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4")
    with open(path, "wb") as stream:
        stream.write(clip.read_bytes())
    assert read_frames(os.fsdecode(path), [7]).shape == (1, 64, 160, 3)


def test_a_symbolic_link_to_a_file_is_followed(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "link.mp4").symlink_to(clip)
    assert probe(tmp_path / "link.mp4").num_frames == 40


def test_dimension_bomb(tmp_path: Path) -> None:
    """8192x8192 in 100 kB: refused without the memory that its frames would take."""
    path = tmp_path / "bomb.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=5, options={"preset": "ultrafast"})
        stream.width = stream.height = 8192
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame(8192, 8192, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)
    assert path.stat().st_size < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(path) == "too_large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 * 1024


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "avi"])
def test_every_cut_gives_frames_or_a_reason(
    tmp_path: Path, encode, numbered, read_number, container: str
) -> None:
    path = tmp_path / f"v.{container}"
    extra = {"movflags": "faststart"} if container == "mp4" else {}
    encode(path, numbered(30), preset="ultrafast", g="10", bf="2", **extra)
    data = path.read_bytes()
    outcomes = []
    for share in np.linspace(0.02, 0.98, 13):
        try:
            video = open_video(data[: int(len(data) * share)])
        except DataError as error:
            outcomes.append(error.reason)
            continue
        read = video.read(np.arange(video.info.num_frames))
        numbers = [read_number(frame) for frame in read]
        outcomes.append(len(numbers))
        # a frame torn by the cut, and the two between that refer to it, may be damaged
        assert numbers[:-3] == list(range(len(numbers)))[:-3]
    counts = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert counts and counts == sorted(counts)


@pytest.mark.parametrize("container", ["mp4", "mkv", "webm", "avi"])
def test_flipped_bytes_give_frames_or_a_reason(tmp_path: Path, encode, numbered, container: str) -> None:
    path = tmp_path / f"v.{container}"
    codec = "libvpx-vp9" if container == "webm" else "libx264"
    speed = {"deadline": "realtime", "cpu-used": "8"} if container == "webm" else {"preset": "ultrafast"}
    encode(path, numbered(16), codec=codec, g="8", **speed)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(7)
    for _ in range(40):
        damaged = data.copy()
        places = rng.integers(len(data), size=rng.integers(1, 20))
        damaged[places] ^= rng.integers(1, 256, size=len(places)).astype(np.uint8)
        try:
            video = open_video(damaged.tobytes())
            picks = np.unique(np.linspace(0, video.info.num_frames - 1, 4).astype(int))
            assert video.read(picks).shape[0] == len(picks)
        except DataError as error:
            assert error.reason in (
                "not_a_video", "no_frames", "no_video", "too_large", "truncated", "decoder_missing",
                "encrypted", "pixel_format", "audio_only",
            )  # fmt: skip
        except ValueError as error:
            assert "exceed the limit" in str(error)
