"""From packed videos to batches: the right frames with their own captions, and rot named by its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vlm.data import Loader, LoaderConfig
from vlm.data.annotations import Annotation
from vlm.data.packing import pack
from vlm.data.shards.reader import ShardReader
from vlm.data.sources import ShardSource
from vlm.types import Preprocessing


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, encode, numbered) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    frames = numbered(60)
    names = [f"clip{number}.mp4" for number in range(9)]
    for number, name in enumerate(names):
        encode(folder / name, frames[number * 6 : number * 6 + 6], preset="ultrafast")
    entries = [Annotation(video=name, captions=(f"it shows {name}",)) for name in names]
    pack(entries, folder, folder / "shards", max_shard_bytes=25_000)
    return folder / "shards"


def test_from_shards_to_frames(packed: Path, read_number) -> None:
    p = Preprocessing(num_frames=3, image_size=160)
    loader = Loader(ShardSource(packed), p, LoaderConfig(batch_size=7, workers=2, random_frames=False))
    seen = []
    for batch in loader.batches(num_epochs=1):
        assert batch.video().dtype == torch.float32
        for clip in batch.clips:
            number = int(clip.key.removeprefix("clip"))
            # 6 frames in 3 spans of 2: the earlier of each
            shown = [read_number(frame.transpose(1, 2, 0)) for frame in clip.pixels]
            assert shown == [number * 6, number * 6 + 2, number * 6 + 4]
            assert clip.caption == f"it shows {clip.key}.mp4"
            seen.append(clip.key)
    assert sorted(seen) == sorted(f"clip{number}" for number in range(9))


def test_rot_in_a_shard_is_quarantined_with_its_place(packed: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "rotten"
    shutil.copytree(packed, folder)
    entry = ShardReader(folder).entry(0, 1)
    video = next(member for member in entry.members if member.name.endswith(".mp4"))
    tar = folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[video.offset + video.size // 2] ^= 16
    tar.write_bytes(bytes(data))
    settings = LoaderConfig(batch_size=7, max_bad_fraction=0.2)
    loader = Loader(
        ShardSource(folder),
        Preprocessing(num_frames=2, image_size=8),
        settings,
        quarantine=tmp_path / "bad.jsonl",
    )
    keys = [key for batch in loader.batches(num_epochs=1) for key in batch.keys]
    assert len(keys) == 8
    assert entry.key not in keys
    (line,) = [json.loads(text) for text in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert (line["shard"], line["key"], line["reason"]) == (tar.name, entry.key, "checksum")
    assert line["offset"] == entry.members[0].offset
    assert "blake2b" in line
