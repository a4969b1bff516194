"""Decoding by a device: the CPU's frames bit by bit, or its failure by name. The device is played by the CPU.

Its codec contexts are made as for a device, frames come in a device's layout, and they fail when told to.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import av
import numpy as np
import pytest

from vlm.data.decoding import hardware, open_video
from vlm.data.decoding.hardware import Device, offered_devices
from vlm.errors import InvalidInput

LAYOUTS = {"yuv420p": "nv12", "yuvj420p": "nv12", "yuv420p10le": "p010le"}
# what the packets of these containers do not tell, and what no device decodes exactly
FALLBACKS = {
    "avi-b-frames": "no_times",
    "avi-mpeg4": "no_times",
    "programme": "no_times",
    "raw": "no_times",
    "flash": "codec_unsupported",
    "gif": "codec_unsupported",
    "odd-size": "layout_unsupported",
}
X265 = {"codec": "libx265", "preset": "ultrafast"}
OTHERS = {
    "10-bit": ("a.mp4", {"pix_fmt": "yuv420p10le", "preset": "ultrafast", "g": "10", "bf": "2"}),
    "full-range": ("a.mp4", {"pix_fmt": "yuvj420p", "preset": "ultrafast", "g": "10"}),
    "hevc-10-bit": ("a.mkv", {**X265, "pix_fmt": "yuv420p10le", "x265-params": "log-level=none:pools=none"}),
    "av1": ("a.mp4", {"codec": "libsvtav1", "preset": "12", "g": "10"}),
    "vp8": ("a.webm", {"codec": "libvpx", "b": "1M", "g": "10", "deadline": "realtime", "cpu-used": "8"}),
    "turned": ("a.mp4", {"preset": "ultrafast", "rotation": 90}),
}


class Played:
    """A codec context on the CPU that behaves as one on a device; counts, and fails at its nth packet."""

    def __init__(self, context, orders) -> None:
        object.__setattr__(self, "context", context)
        object.__setattr__(self, "orders", orders)

    def __getattr__(self, name):
        return getattr(self.context, name)

    def __setattr__(self, name, value) -> None:
        setattr(self.context, name, value)

    def decode(self, packet):
        self.orders.num_packets += 1
        if self.orders.num_packets == self.orders.fail_at:
            raise av.error.ExternalError(-542398533, "Generic error in an external library")
        frames = self.context.decode(packet)
        if self.orders.num_packets == self.orders.lose_at:
            frames = []
        self.orders.num_frames += len(frames)
        return [
            frame.reformat(format=self.orders.layout or LAYOUTS[frame.format.name], threads=1)
            for frame in frames
        ]


@pytest.fixture
def device(monkeypatch):
    """``device(fail_at=N, ...)``: a device, and what it was told and did."""

    def make(**told):
        orders = SimpleNamespace(**{"fail_at": 0, "lose_at": 0, "layout": "", **told})
        orders.num_packets = orders.num_frames = orders.num_decoders = 0

        def create(codec, mode, settings):
            assert settings == "settings"
            orders.num_decoders += 1
            name = {"av1": "libdav1d"}.get(codec.name, codec.name)  # FFmpeg's own knows devices only
            return Played(av.CodecContext.create(name, mode), orders)

        monkeypatch.setattr(hardware, "CodecContext", SimpleNamespace(create=create))
        monkeypatch.setattr(hardware, "HWAccel", lambda *_, **__: "settings")
        monkeypatch.setattr(hardware, "_opened", lambda settings, codec: settings)
        return Device("cuda"), orders

    return make


def same_frames(path, device) -> str:
    """Compare all frames and times, then some in pieces; return why the CPU was asked, if it was."""
    cpu, other = open_video(path), open_video(path, device=device)
    everything = range(cpu.info.num_frames)
    assert other.info == cpu.info
    np.testing.assert_array_equal(other.times_s, cpu.times_s)
    np.testing.assert_array_equal(other.read(everything), cpu.read(everything))
    generator = np.random.default_rng(0)
    for _ in range(4):
        some = generator.choice(cpu.info.num_frames, min(5, cpu.info.num_frames), replace=False)
        np.testing.assert_array_equal(other.read(some), cpu.read(some))
    return other.fallback


def test_frames_of_every_kind_are_the_cpus(kind, device) -> None:
    name, path, _ = kind
    played, orders = device()
    assert same_frames(path, played) == FALLBACKS.get(name, "")
    assert bool(orders.num_frames) == (name not in FALLBACKS)


@pytest.mark.parametrize("name", OTHERS)
def test_layouts_and_codecs_of_devices(name, tmp_path, encode, device) -> None:
    file, how = OTHERS[name]
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (24, 34, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    encode(tmp_path / file, [np.roll(noise, 3 * number, axis=1) for number in range(30)], **how)
    played, orders = device()
    assert same_frames(tmp_path / file, played) == "" and orders.num_frames >= 30


def test_straight_to_rgb_would_give_other_colours(tmp_path, encode) -> None:
    # why frames take the way through the CPU's layout
    noise = np.random.default_rng(0).integers(0, 256, (96, 136, 3), np.uint8)
    encode(tmp_path / "a.mp4", [noise], preset="ultrafast", qp="10")
    with av.open(tmp_path / "a.mp4") as container:
        frame = next(container.decode(video=0))
    mine = frame.to_ndarray(format="rgb24").astype(int)
    assert np.abs(frame.reformat(format="nv12").to_ndarray(format="rgb24") - mine).max() > 8


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"fail_at": 1}, "device_refused"),
        ({"fail_at": 17}, "device_failed"),
        ({"lose_at": 9}, "frames_missing"),
        ({"layout": "yuv444p"}, "layout_unsupported"),
    ],
)
def test_the_cpu_goes_on_where_the_device_broke_off(told, reason, clip, device) -> None:
    played, orders = device(**told)
    assert same_frames(clip, played) == reason
    assert orders.num_decoders == 1  # that device is not asked again for this file


def test_a_device_that_is_gone_by_the_next_file(clip, device, monkeypatch) -> None:
    played, _ = device()

    def refuse(*_):
        raise av.error.ExternalError(-542398533, "no device")

    monkeypatch.setattr(hardware, "CodecContext", SimpleNamespace(create=refuse))
    assert same_frames(clip, played) == "device_refused"


def test_segments_come_from_the_device(clip, device) -> None:
    played, orders = device()
    segments = [(0.0, 0.8), (0.4, 1.2), (0.8, 1.6)]
    mine = list(open_video(clip).iter_segments(segments, 4))
    theirs = list(open_video(clip, device=played).iter_segments(segments, 4))
    for cpu, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(other.frames, cpu.frames)
        np.testing.assert_array_equal(other.times_s, cpu.times_s)
    assert orders.num_decoders == 1


def test_damage_is_left_to_the_cpu(clip, tmp_path, device) -> None:
    content = bytearray(clip.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 300] = bytes(300)
    (tmp_path / "a.mp4").write_bytes(content)
    played, _ = device()
    assert same_frames(tmp_path / "a.mp4", played) == "device_failed"


def test_what_pyav_offers_has_exact_codecs_only() -> None:
    for kind, codecs in offered_devices().items():
        assert kind != "none" and set(codecs) <= {"h264", "hevc", "vp8", "vp9", "av1"} and codecs


@pytest.mark.parametrize("name", ["nonsense", "cpu", "", ":1", "none"])
def test_a_kind_that_pyav_does_not_know_is_refused(name) -> None:
    # PyAV itself takes an unknown kind for any
    with pytest.raises(
        InvalidInput, match=rf"cannot decode with '{name}': PyAV \S+ offers cpu.* here; choose"
    ):
        Device(name)


def test_an_older_pyav_offers_nothing(monkeypatch) -> None:
    monkeypatch.setattr(hardware, "av", SimpleNamespace(__version__="14.0.0", VideoFrame=object))
    with pytest.raises(InvalidInput, match=r"PyAV 14.0.0 offers cpu here"):
        Device("cuda")


@pytest.mark.skipif("cuda" not in offered_devices(), reason="PyAV's FFmpeg was built without CUDA")
def test_a_device_that_is_not_here_is_refused_with_ffmpegs_words() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has a driver")
    with pytest.raises(InvalidInput, match=r"cannot decode with 'cuda:0': .*load CUDA.*; install its driver"):
        Device("cuda:0")


def test_a_container_without_the_video_library_is_told_what_lacks(monkeypatch) -> None:
    if "cuda" not in offered_devices():
        pytest.skip("PyAV's FFmpeg was built without CUDA")
    settings = SimpleNamespace(options={"primary_ctx": "1"}, create=lambda codec: object())
    monkeypatch.setattr(hardware, "HWAccel", lambda *_, **__: settings)
    monkeypatch.setattr(hardware.sys, "platform", "linux")

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(hardware.ctypes, "CDLL", missing)
    with pytest.raises(
        InvalidInput, match=r"libnvcuvid.so.1: .*NVIDIA_DRIVER_CAPABILITIES has to name video"
    ):
        Device("cuda")
