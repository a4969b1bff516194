"""Shards with every kind of damage: what comes out is a video with its caption, the rest is accounted for.

Each video is of one grey of its own, and its caption names the grey: a pair can be checked by looking at it.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vlm.data import Loader, LoaderConfig, ShardSource
from vlm.data.foreign import index_foreign
from vlm.data.shards import ShardReader, ShardWriter
from vlm.data.shards.tar_index import scan_tar
from vlm.data.shards.verification import verify_shards
from vlm.errors import DataError
from vlm.types import Preprocessing

COUNT, STEP = 9, 24
TINY = Preprocessing(num_frames=2, image_size=16)


@pytest.fixture(scope="module")
def videos(encode) -> list[bytes]:
    made = []
    for number in range(COUNT):
        target = io.BytesIO()
        frames = [np.full((32, 32, 3), 20 + STEP * number, np.uint8)] * 3
        encode(target, frames, container="mp4", preset="ultrafast", qp="4")
        made.append(target.getvalue())
    return made


def members(number: int, videos: list[bytes]) -> dict[str, bytes]:
    caption = f"grey {number}"
    return {
        "mp4": videos[number], "json": json.dumps({"captions": [caption]}).encode(), "txt": caption.encode(),
    }  # fmt: skip


def visit(folder: Path, allowed: float = 1.0) -> tuple[Counter[str], Counter[str], list[dict]]:
    """Read a whole epoch: how often each key was seen, rejections by reason, and the list of them."""
    quarantine = folder / "rejected.jsonl"
    quarantine.unlink(missing_ok=True)
    config = LoaderConfig(batch_size=4, workers=0, max_bad_fraction=allowed)
    loader = Loader(ShardSource(folder), TINY, config, quarantine=quarantine)
    seen: Counter[str] = Counter()
    for batch in loader.batches(num_epochs=1):
        for clip in batch.clips:
            shown = round((float(clip.pixels.mean()) - 20) / STEP)
            assert clip.caption == f"grey {shown}", f"{clip.key} shows grey {shown}"
            seen[clip.key] += 1
    rejected = loader.tallies[0].rejected
    assert seen.total() + rejected.total() == ShardReader(folder).manifest.num_samples
    rows = quarantine.read_text().splitlines() if quarantine.exists() else []
    return seen, rejected, [json.loads(row) for row in rows]


# --- shards of our own, damaged after they were made


@pytest.fixture
def own(tmp_path: Path, videos: list[bytes]) -> Path:
    """Three shards of three samples."""
    size = sum(-(-len(data) // 512) * 512 + 512 for data in members(0, videos).values())
    writer = ShardWriter(tmp_path / "own", {"input": "test"}, 3 * size + 2048)
    for number in range(COUNT):
        writer.add(f"clip-{number}", members(number, videos))
    assert [shard.num_samples for shard in writer.finish().shards] == [3, 3, 3]
    return tmp_path / "own"


Change = Callable[[bytearray, list[int]], bytearray]  # (a tar, where its members' headers are) -> damaged


def flipped(data: bytearray, place: int) -> bytearray:
    data[place] ^= 4
    return data


def swapped(data: bytearray, heads: list[int]) -> bytearray:
    """The captions of two samples change places."""
    first, second = (slice(heads[n] + 512, heads[n] + 1024) for n in (0, 3))
    data[first], data[second] = data[second], data[first]
    return data


# samples 3 to 5, each as json, mp4 and txt
OWN: dict[str, tuple[Change, dict[str, int]]] = {
    "a bit of a header": (lambda data, heads: flipped(data, heads[3] + 2), {}),
    "a bit of a checksum in a header": (lambda data, heads: flipped(data, heads[3] + 150), {}),
    "a bit of a video": (lambda data, heads: flipped(data, heads[4] + 512 + 99), {"checksum": 1}),
    "a bit of a caption": (lambda data, heads: flipped(data, heads[5] + 512 + 3), {"checksum": 1}),
    "cut in a header": (lambda data, heads: data[: heads[7] + 100], {"short_read": 1}),
    "cut in a video": (lambda data, heads: data[: heads[4] + 512 + 50], {"short_read": 2}),
    "captions change places": (swapped, {"checksum": 2}),
    "zeros in the middle": (
        lambda data, heads: data[: heads[3]] + bytes(heads[6] - heads[3]) + data[heads[6] :], {"checksum": 1},
    ),
    "nothing left": (lambda data, heads: bytearray(), {"short_read": 3}),
}  # fmt: skip


@pytest.mark.parametrize("damage", OWN)
def test_own_shards_damaged_later(own: Path, damage: str) -> None:
    change, expected = OWN[damage]
    tar = own / "shard-000001.tar"
    heads = [member.offset - 512 for member in scan_tar(tar).members]
    tar.write_bytes(change(bytearray(tar.read_bytes()), heads))
    seen, rejected, rows = visit(own)
    assert rejected == expected
    assert set(seen.values()) == {1}
    listed = {row["key"] for row in rows}
    assert listed.isdisjoint(seen) and listed | set(seen) == {f"clip-{n}" for n in range(COUNT)}
    assert all(row["shard"] == tar.name and row["offset"] > 0 and row["blake2b"] for row in rows)
    assert verify_shards(own), "verify must see what training passes over"
    if expected:
        with pytest.raises(DataError, match="samples cannot be used") as caught:
            visit(own, allowed=0.0)
        assert (caught.value.reason, caught.value.exit_code) == ("too_many_bad", 4)


def test_an_index_that_lies_costs_its_shard(own: Path) -> None:
    index = own / "shard-000001.index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows[0]["members"][1:], rows[1]["members"][1:] = rows[1]["members"][1:], rows[0]["members"][1:]
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen, rejected, _ = visit(own)
    assert rejected == {"index_damaged": 3} and seen.total() == 6


# --- tars of others, damaged before they were indexed


def tar_of(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


Files = list[tuple[str, bytes]]


def without(name: str) -> Callable[[Files], Files]:
    return lambda files: [file for file in files if file[0] != name]


def doubled(files: Files) -> Files:
    """Sample 3 comes once more at the end, with the caption of sample 4."""
    again = {name: data for name, data in files if name.startswith("clip-4")}
    return [*files, *((name.replace("clip-4", "clip-3"), data) for name, data in again.items())]


def interleaved(files: Files) -> Files:
    """The members of samples 3 and 4 alternate."""
    three = [file for file in files if file[0].startswith("clip-3")]
    four = [file for file in files if file[0].startswith("clip-4")]
    rest = [file for file in files if file[0][:6] not in ("clip-3", "clip-4")]
    return [*rest, *(file for pair in zip(three, four, strict=True) for file in pair)]


# what is done to the files before the tar is made, what to the tar, which samples are lost, for which reason
FOREIGN: dict[str, tuple[Callable[[Files], Files], Change, set[int], str]] = {
    "no video": (without("clip-3.mp4"), lambda data, heads: data, {3}, "no_video_member"),
    "no caption": (
        lambda files: without("clip-3.json")(without("clip-3.txt")(files)), lambda data, heads: data, {3},
        "no_caption",
    ),
    "a key twice": (doubled, lambda data, heads: data, {3}, "duplicate_member"),
    "interleaved keys": (interleaved, lambda data, heads: data, {3, 4}, "torn_apart"),
    "a bit of a video's header": (
        lambda files: files, lambda data, heads: flipped(data, heads[9] + 2), {3}, "damaged_header",
    ),
    "a bit of a caption's header": (
        lambda files: without("clip-3.txt")(files), lambda data, heads: flipped(data, heads[10] + 2), {3},
        "damaged_header",
    ),
    "cut in a header": (
        lambda files: files, lambda data, heads: data[: heads[24] + 100], {8}, "cut",
    ),
    "cut in a video": (
        lambda files: files, lambda data, heads: data[: heads[24] + 512 + 50], {8}, "cut",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", FOREIGN)
def test_tars_of_others_damaged_before(tmp_path: Path, videos: list[bytes], damage: str) -> None:
    before, after, lost, reason = FOREIGN[damage]
    files = [
        (f"clip-{number}.{extension}", data)
        for number in range(COUNT)
        for extension, data in members(number, videos).items()
    ]
    tar = tar_of(tmp_path / "f" / "a.tar", before(files))
    heads = [member.offset - 512 for member in scan_tar(tar).members]
    tar.write_bytes(after(bytearray(tar.read_bytes()), heads))
    manifest = index_foreign(tmp_path / "f")
    assert reason in {item.reason for item in manifest.rejected}
    seen, rejected, _ = visit(tmp_path / "f")
    assert not rejected
    assert seen == {f"clip-{number}": 1 for number in range(COUNT) if number not in lost}
