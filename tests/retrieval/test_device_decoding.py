"""An index built with a device that decodes: the CPU's vectors, fallbacks counted, refusals at the start.

The device is played by the CPU, in worker processes of the real kind: only what PyAV would give is replaced.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from vlm.data.decoding.hardware import offered_devices
from vlm.errors import InvalidInput
from vlm.retrieval import VideoIndex
from vlm.retrieval.engines.driving import build_by_tasks
from vlm.retrieval.engines.tasks import EmbedOptions
from vlm.retrieval.engines.working import do_task
from vlm.retrieval.ingest import pool
from vlm.retrieval.ingest.events import DecodedSegment, DecodeSettings, Failed, Finished
from vlm.retrieval.ingest.pool import check_device, decode_files
from vlm.types import Preprocessing

FLAT = Preprocessing(num_frames=2, image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

# a worker whose device is the CPU, in a device's layout; `happens` runs before a packet is decoded
PLAYED = """
import os, signal, sys, time
from types import SimpleNamespace
import av
from vlm.data.decoding import hardware
from vlm.retrieval.ingest import worker

class Context:
    def __init__(self, name):
        object.__setattr__(self, "inner", av.CodecContext.create(name, "r"))
    def __getattr__(self, name):
        return getattr(self.inner, name)
    def __setattr__(self, name, value):
        setattr(self.inner, name, value)
    def decode(self, packet):
        global num_packets
        num_packets += 1
        {happens}
        return [frame.reformat(format="nv12") for frame in self.inner.decode(packet)]

num_packets = 0
hardware.CodecContext = SimpleNamespace(create=lambda codec, mode, settings: Context(codec.name))
hardware.HWAccel = lambda *_, **__: None
hardware._opened = lambda settings, codec: {opens}
hardware.offered_devices = lambda: dict(cuda=("h264",))
sys.argv = ["worker", {name!r}]
sys.exit(worker.main())
"""


@pytest.fixture
def played(monkeypatch):
    """``played(happens)``: let workers decode by such a device; returns how often one was started."""
    popen = subprocess.Popen

    def install(happens: str = "pass", opens: str = "None", then: str | None = None) -> list[str]:
        started: list[str] = []

        def start(command, **options):
            started.append(command[-1])
            is_later = then is not None and len(started) > 1
            code = PLAYED.format(happens=happens, opens=then if is_later else opens, name=command[-1])
            return popen([sys.executable, "-P", "-c", code], **options)

        monkeypatch.setattr(pool.subprocess, "Popen", start)
        return started

    return install


def decoded(paths, decode_with: str, **settings) -> list:
    return list(decode_files(paths, DecodeSettings(preprocessing=FLAT, decode_with=decode_with, **settings)))


def frames(events) -> list[bytes]:
    return [event.video.tobytes() for event in events if isinstance(event, DecodedSegment)]


@pytest.fixture
def films(tmp_path, clip, colours):
    """Two videos that a device decodes, one whose codec it does not know, one that is broken."""
    folder = tmp_path / "films"
    for number, colour in enumerate((colours.red, colours.blue)):
        clip(folder / f"{number}.mp4", [(colour, 9), (colours.grey, 6)], texture=number)
    picture = np.full((32, 32, 3), colours.green, np.uint8)
    write_mpeg4(folder / "old.mkv", [picture] * 12)
    (folder / "x.mp4").write_bytes(b"no video")
    return folder


def write_mpeg4(path, pictures) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))


def test_workers_decode_the_same_with_a_device(films, played) -> None:
    paths = sorted(films.iterdir())
    truth = decoded(paths, "cpu")
    started = played()
    mine = decoded(paths, "cuda:0", num_workers=2)
    assert started == ["cuda:0"] * 2
    assert frames(mine) == frames(truth) and len(frames(mine)) > 4
    ends = [event for event in mine if isinstance(event, (Finished, Failed))]
    assert [getattr(end, "fallback", None) for end in ends] == ["", "", "codec_unsupported", None]
    assert [getattr(end, "reason", None) for end in ends] == [None, None, None, "not_a_video"]


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        ("num_packets == 40 and os.kill(os.getpid(), signal.SIGSEGV)", "decoder_crashed"),
        ("num_packets == 1 and os._exit(3)", "decoder_crashed"),
        ("num_packets == 40 and time.sleep(60)", "timeout"),
    ],
)
def test_a_device_that_takes_its_process_down_costs_no_file(happens, reason, films, played) -> None:
    paths = sorted(films.glob("*.mp4"))[:2]
    truth = decoded(paths, "cpu")
    started = played(happens)
    mine = decoded(paths, "cuda", patience_s=2.0)
    assert [type(event) for event in mine] == [type(event) for event in truth]
    assert [event.number for event in mine if isinstance(event, DecodedSegment)] == [0, 1, 2] * 2
    assert frames(mine) == frames(truth)
    assert [event.fallback for event in mine if isinstance(event, Finished)] == [reason] * 2
    assert len(started) == 3  # at the start, and after each file


def test_what_brings_the_cpu_down_too_fails_once(films, monkeypatch) -> None:
    popen = subprocess.Popen
    code = 'import sys, os; print(\'{"kind": "ready"}\', flush=True); sys.stdin.readline(); os._exit(9)'
    monkeypatch.setattr(
        pool.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", code], **options)
    )
    (event,) = decoded([films / "0.mp4"], "cuda")
    assert isinstance(event, Failed) and event.reason == "decoder_crashed"


def test_a_device_that_is_lost_with_its_process_is_named(films, played) -> None:
    happens = "num_packets == 1 and os._exit(3)"
    played(happens, then="(_ for _ in ()).throw(OSError('fell off the bus'))")
    mine = decoded(sorted(films.glob("*.mp4"))[:2], "cuda")
    assert [e.fallback for e in mine if isinstance(e, Finished)] == ["decoder_crashed", "device_lost"]


def test_a_device_that_is_not_here_ends_it_before_anything(films, tmp_path, make_encoder) -> None:
    events = decode_files([films / "0.mp4"], DecodeSettings(preprocessing=FLAT, decode_with="nonsense"))
    with pytest.raises(InvalidInput, match=r"cannot decode with 'nonsense': PyAV .* offers cpu"):
        next(events)
    with pytest.raises(InvalidInput, match="nonsense"):
        check_device("nonsense")
    check_device("cpu")
    index = VideoIndex.create(tmp_path / "index", make_encoder())
    with pytest.raises(InvalidInput, match="nonsense"):
        index.add([films], model=make_encoder(), decode_with="nonsense")
    assert index.refresh().generation.num_videos == 0


def test_a_worker_that_dies_at_its_start_is_no_device(films, played) -> None:
    played(opens="os._exit(7)")
    with pytest.raises(InvalidInput, match=r"cannot decode with cuda: the decoder died \(exit code 7\)"):
        check_device("cuda")


def test_an_index_has_the_cpus_vectors_and_the_report_counts(
    films, tmp_path, make_encoder, contents, played, call_vlm
) -> None:
    code, _, _ = call_vlm("index", "build", str(films), "--out", str(tmp_path / "cpu"), "--model", "m")
    assert code == 3
    played()
    words = ["index", "build", str(films), "--model", "m", "--decode-with", "cuda"]
    code, said, _ = call_vlm(*words, "--out", str(tmp_path / "device"))
    assert (
        code == 3 and "decoded on the device: 2 videos; 1 fell back to the CPU: 1 codec_unsupported" in said
    )
    assert contents(tmp_path / "device") == contents(tmp_path / "cpu")
    # which one decoded is written nowhere
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("cpu", "device")]
    assert manifests[0] == manifests[1]
    code, said, _ = call_vlm(*words, "--out", str(tmp_path / "again"), "--json")
    report = json.loads(said)
    assert (report["num_on_device"], report["fallbacks"]) == (2, {"codec_unsupported": 1})
    code, said, _ = call_vlm("index", "update", str(tmp_path / "again"), "--rehash", "--decode-with", "cuda")
    assert code == 3 and "device" not in said  # nothing was decoded


def test_tasks_carry_their_counts(films, tmp_path, make_encoder, contents, played) -> None:
    model = make_encoder()

    def here(listing, missing) -> str:
        for task in missing:
            do_task(listing, task, lambda: model)
        return ""

    def build(name: str, decode_with: str):
        index, options = VideoIndex.create(tmp_path / name, model), EmbedOptions(decode_with=decode_with)
        return build_by_tasks(index, [films], here, model, options=options, files_per_task=1).report

    plain = build("plain", "cpu")
    played()
    report = build("device", "cuda")
    assert (plain.num_on_device, plain.fallbacks) == (0, {})
    assert (report.num_on_device, report.fallbacks) == (2, {"codec_unsupported": 1})
    assert contents(tmp_path / "device") == contents(tmp_path / "plain")


@pytest.mark.parametrize("action", ["build", "dry-run", "add", "update", "watch"])
def test_the_command_refuses_before_a_model_is_loaded(
    action, films, built, tmp_path, monkeypatch, capsys
) -> None:
    from vlm.cli import main

    monkeypatch.setattr("vlm.cli.index.load", lambda source: pytest.fail("a model was loaded"))
    monkeypatch.setattr("os.nice", lambda by: 0)
    out = ["--out", str(tmp_path / "index"), "--model", "m"]
    words = {
        "build": ["build", str(films), *out],
        "dry-run": ["build", str(films), *out, "--dry-run"],
        "add": ["add", str(built), str(films)],
        "update": ["update", str(built)],
        "watch": ["watch", str(built)],
    }[action]
    assert main(["index", *words, "--decode-with", "vulkan:3"]) == 4
    error = capsys.readouterr().err
    kinds = ", ".join(("cpu", *offered_devices()))
    assert "cannot decode with 'vulkan:3': PyAV" in error and f"offers {kinds} here; choose" in error
    assert not (tmp_path / "index").exists()


def test_tasks_are_planned_where_there_is_no_device(films, tmp_path, call_vlm) -> None:
    words = [
        "index",
        "build",
        str(films),
        "--out",
        str(tmp_path / "index"),
        "--model",
        "m",
        "--engine",
        "tasks",
    ]
    code, _, error = call_vlm(*words, "--decode-with", "cuda:7")
    assert code == 75 and "vlm index task" in error
