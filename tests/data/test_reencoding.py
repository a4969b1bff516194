"""Videos encoded anew: every frame, at its time, upright, and a keyframe exactly where one is promised."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest

from vlm.data.annotations import Annotation
from vlm.data.decoding import open_video
from vlm.data.packing import pack
from vlm.data.reencoding import Reencoding, reencode
from vlm.data.shards.reader import ShardReader
from vlm.errors import DataError, InvalidInput


def keyframes(data: bytes) -> list[int]:
    """Numbers of the frames that decode to keyframes, found by decoding all of them."""
    with av.open(io.BytesIO(data)) as container:
        return [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]


def test_every_kind_of_video_keeps_its_frames_and_times(kind, read_number) -> None:
    name, path, frames = kind
    video = open_video(path)
    data = reencode(video, Reencoding(short_side=64, keyframe_every=7, quality=15))
    made = open_video(data)
    assert made.info.num_frames == len(frames)
    assert (made.info.codec, made.info.pixel_format, made.info.has_audio) == ("h264", "yuv420p", False)
    assert np.abs(made.times_s - video.times_s).max() < 1e-4, name
    shown = made.read(range(len(frames)))
    assert [read_number(frame) for frame in shown] == list(range(len(frames)))
    assert keyframes(data) == list(range(0, len(frames), 7))
    assert reencode(open_video(path), Reencoding(short_side=64, keyframe_every=7, quality=15)) == data


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1920, 1080), (456, 256)), ((1080, 1920), (256, 456)), ((320, 240), (320, 240)), ((161, 67), (160, 68)),
     ((256, 256), (256, 256)), ((1, 3), (2, 4)), ((8000, 257), (7968, 256))],
)  # fmt: skip
def test_sizes_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert Reencoding().size(*size) == expected


def test_pictures_are_turned_upright_and_shrunk(tmp_path: Path, encode) -> None:
    picture = np.zeros((120, 200, 3), np.uint8)
    picture[:60, :100], picture[60:, 100:] = (200, 40, 40), (40, 40, 200)
    encode(tmp_path / "a.mp4", [picture] * 4, rotation=90, preset="ultrafast")
    video = open_video(tmp_path / "a.mp4")
    made = open_video(reencode(video, Reencoding(short_side=60)))
    assert (made.info.width, made.info.height, made.info.rotation) == (60, 100, 0)
    before, after = video.read([0])[0].astype(int), made.read([0])[0].astype(int)
    for x in (0.25, 0.75):
        for y in (0.25, 0.75):
            old = before[int(y * 200), int(x * 120)]
            assert np.abs(after[int(y * 100), int(x * 60)] - old).max() < 12


def test_a_packed_folder_of_them(tmp_path: Path, encode, numbered, read_number) -> None:
    """A stop in between gives the same bytes; the facts name the original; a broken video is counted."""
    names = [f"clip{number}.mp4" for number in range(4)]
    for number, name in enumerate(names):
        encode(tmp_path / name, numbered(70, 640, 480)[number : number + 65], preset="ultrafast", g="250")
    broken = (tmp_path / "clip2.mp4").read_bytes()
    (tmp_path / "clip2.mp4").write_bytes(broken[: len(broken) // 2])
    entries = [Annotation(video=name, captions=(name,)) for name in names]
    how = Reencoding(short_side=64)

    def run(out: str, count: int = 4, workers: int = 1) -> object:
        return pack(
            entries[:count], tmp_path, tmp_path / out, max_shard_bytes=1, workers=workers, reencoding=how
        )

    manifest = run("whole")
    assert [item.item for item in manifest.rejected] == ["clip2.mp4"]
    reader = ShardReader(tmp_path / "whole")
    assert reader.shard_sizes == (1, 1, 1)
    for shard in range(3):
        raw = reader.read(shard, 0)
        assert keyframes(raw.members["mp4"]) == [0, 30, 60]
        facts = json.loads(raw.members["json"])
        assert (facts["width"], facts["height"], facts["num_frames"]) == (86, 64, 65)
        assert facts["original"]["width"] == 640
    assert reader.read(0, 0).members["mp4"] != (tmp_path / "clip0.mp4").read_bytes()
    with pytest.raises(InvalidInput, match="another input"):
        pack(entries, tmp_path, tmp_path / "whole", max_shard_bytes=1)
    run("again", workers=3)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_an_encoder_that_fails_is_a_reason(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ValueError("no such encoder")

    monkeypatch.setattr("vlm.data.reencoding._add_stream", failing)
    with pytest.raises(DataError, match="no such encoder") as caught:
        reencode(open_video(clip), Reencoding())
    assert caught.value.reason == "reencode_failed"


@pytest.mark.parametrize("wrong", [{"short_side": 8}, {"keyframe_every": 0}, {"quality": 52}])
def test_impossible_settings(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected short_side"):
        Reencoding(**wrong)
