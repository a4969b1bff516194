"""From videos and captions to shards: nothing is lost, and every rejection has its reason."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.annotations import Annotation
from vlm.data.decoding import read_frames
from vlm.data.packing import pack, summary
from vlm.data.shards.layout import check_key, make_keys
from vlm.data.shards.reader import ShardReader
from vlm.data.sources import ShardSource
from vlm.errors import InvalidInput


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, encode, encode_audio, numbered) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    frames = numbered(60)
    for number in range(6):
        encode(folder / f"clip{number}.mp4", frames[number : number + 12], preset="ultrafast")
    encode(folder / "-dash.webm", frames[:8], codec="libvpx-vp9", deadline="realtime", **{"cpu-used": "8"})
    (folder / "with space & ümlaut.mp4").write_bytes((folder / "clip1.mp4").read_bytes())
    (folder / "no extension.").write_bytes((folder / "clip2.mp4").read_bytes())
    encode_audio(folder / "sound.mp4")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("ffconcat version 1.0\nfile clip0.mp4\n")
    return folder


NAMES = [
    "clip0.mp4", "clip1", "-dash.webm", "with space & ümlaut.mp4", "no extension.", "clip3.mp4",
    "sound.mp4", "empty.mp4", "text.mp4", "missing.mp4", "../clip5.mp4",
]  # fmt: skip


def annotations() -> list[Annotation]:
    found = [
        Annotation(video=name, captions=(f"this is {name}", "a second caption"), metadata={"n": n})
        for n, name in enumerate(NAMES)
    ]
    return [*found, Annotation(video="clip4.mp4", captions=())]


def test_everything_is_packed_or_rejected_with_its_reason(tmp_path: Path, videos: Path) -> None:
    manifest = pack(annotations(), videos, tmp_path / "s", max_shard_bytes=6000)
    assert {item.item: item.reason for item in manifest.rejected} == {
        "sound.mp4": "audio_only",
        "empty.mp4": "empty",
        "text.mp4": "not_a_video",
        "missing.mp4": "missing",
        "../clip5.mp4": "unsafe_name",
        "clip4.mp4": "no_caption",
    }
    assert manifest.num_samples + len(manifest.rejected) == len(annotations())
    assert len(manifest.shards) > 1
    assert sum(shard.duration_s for shard in manifest.shards) == pytest.approx(manifest.duration_s)
    counts = summary(manifest)
    assert counts["num_rejected"] == 6
    assert counts["rejected_by_reason"]["missing"] == 1


def test_each_sample_holds_its_own_video_and_captions(tmp_path: Path, videos: Path) -> None:
    pack(annotations(), videos, tmp_path / "s", max_shard_bytes=6000)
    reader = ShardReader(tmp_path / "s")
    seen = []
    for shard, size in enumerate(reader.shard_sizes):
        for number in range(size):
            raw = reader.read(shard, number)
            facts = json.loads(raw.members["json"])
            name = facts["video"]
            seen.append(name)
            file = videos / name if (videos / name).exists() else videos / f"{name}.mp4"
            (extension,) = set(raw.members) - {"json", "txt"}
            assert raw.members[extension] == file.read_bytes()
            assert facts["captions"] == [f"this is {name}", "a second caption"]
            assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
            assert facts["metadata"] == {"n": NAMES.index(name)}
            assert raw.members["txt"].decode() == f"this is {name}"
            assert facts["width"] == 160
    assert seen == NAMES[:6]


def test_samples_are_decoded_from_the_shard(tmp_path: Path, videos: Path) -> None:
    pack(annotations(), videos, tmp_path / "s")
    source = ShardSource(tmp_path / "s")
    sample = source.load(0, 0, lambda count: np.array([0, 3, count - 1]))
    assert sample.key == "clip0"
    assert sample.captions == ("this is clip0.mp4", "a second caption")
    assert np.array_equal(sample.frames, read_frames(videos / "clip0.mp4", [0, 3, 11]))
    place = source.locate(0, 0)
    assert place["key"] == "clip0"
    assert place["shard"] == "shard-000000.tar"


@pytest.mark.parametrize("stop", [0, 2, 5, 9])
def test_a_stopped_pack_goes_on_to_the_same_bytes(
    tmp_path: Path, videos: Path, stop: int, monkeypatch
) -> None:
    from vlm.data import packing

    pack(annotations(), videos, tmp_path / "whole", max_shard_bytes=6000, workers=1)
    original, calls = packing._check, []

    def failing(item, key, **how):
        calls.append(key)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return original(item, key, **how)

    monkeypatch.setattr(packing, "_check", failing)
    with pytest.raises(KeyboardInterrupt):
        pack(annotations(), videos, tmp_path / "parts", max_shard_bytes=6000, workers=1)
    monkeypatch.setattr(packing, "_check", original)
    pack(annotations(), videos, tmp_path / "parts", max_shard_bytes=6000, workers=3)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == names
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_packing_again_changes_nothing(tmp_path: Path, videos: Path) -> None:
    first = pack(annotations(), videos, tmp_path / "s")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    assert pack(annotations(), videos, tmp_path / "s").fingerprint == first.fingerprint
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    with pytest.raises(InvalidInput, match="another input"):
        pack(annotations()[:3], videos, tmp_path / "s")


def test_files_that_were_missing_are_not_said_to_be_missing_still(tmp_path: Path, videos: Path) -> None:
    rows = [Annotation(video=f"{name}.mp4", captions=("x",)) for name in ("a", "b", "never")]
    data = (videos / "clip0.mp4").read_bytes()
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(data)
    pack(rows, folder, tmp_path / "s")
    (folder / "b.mp4").write_bytes(data)
    with pytest.raises(
        InvalidInput, match=r"1 files were missing .*'b\.mp4'; choose another --out, or remove"
    ):
        pack(rows, folder, tmp_path / "s")
    assert [item.item for item in pack(rows, folder, tmp_path / "t").rejected] == ["never.mp4"]


def test_nothing_usable(tmp_path: Path, videos: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none of 1 items could be packed \(missing\)"):
        pack([Annotation(video="missing.mp4", captions=("x",))], videos, tmp_path / "s")
    with pytest.raises(InvalidInput, match="no annotated video"):
        pack([], videos, tmp_path / "t")


def test_keys_by_hand() -> None:
    names = ["a/b.mp4", "c.mp4", "c.avi", "-x.mp4", "1004_a_00.01.02.avi", "with space.mp4"]
    keys = make_keys(names)
    assert keys[0] == "a/b"
    assert keys[3] == "-x"
    assert keys[1] != keys[2]
    assert keys[1].startswith("c_")
    assert keys[4].startswith("1004_a_00_01_02_")
    assert keys[5].startswith("with_space_")


@given(st.lists(st.text(min_size=1, max_size=300), unique=True, max_size=8))
def test_every_name_has_a_safe_key_of_its_own(names: list[str]) -> None:
    keys = make_keys(names)
    for key in keys:
        check_key(key)
        assert "." not in key
    assert len(set(keys)) == len(names)
