"""Shards: written whole or not at all, read back verified, and plain WebDataset to everybody else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset

from vlm.data.shards import ShardReader, ShardWriter
from vlm.data.shards.verification import verify_shards
from vlm.errors import DataError, IntegrityError, InvalidInput

IDENTITY = {"input": "test"}


def samples(count: int, size: int = 3000) -> list[tuple[str, dict[str, bytes]]]:
    rng = np.random.default_rng(5)
    return [
        (
            f"folder/clip_{number:03d}",
            {
                "mp4": rng.bytes(size + number),
                "json": json.dumps({"captions": [f"number {number}"]}).encode(),
                "txt": f"number {number}".encode(),
            },
        )
        for number in range(count)
    ]


def write(folder: Path, items: list[tuple[str, dict[str, bytes]]], max_bytes: int = 20_000) -> None:
    writer = ShardWriter(folder, IDENTITY, max_bytes)
    for key, members in items:
        writer.add(key, members, duration_s=1.5)
    writer.finish()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write(tmp_path / "shards", samples(20))
    return tmp_path / "shards"


def everything(folder: Path) -> dict[str, dict[str, bytes]]:
    reader = ShardReader(folder)
    return {
        raw.key: raw.members
        for shard, size in enumerate(reader.shard_sizes)
        for raw in (reader.read(shard, number) for number in range(size))
    }


def test_what_was_written_is_read(shards: Path) -> None:
    assert everything(shards) == dict(samples(20))
    reader = ShardReader(shards)
    assert len(reader) == sum(reader.shard_sizes) == 20
    assert len(reader.shard_sizes) > 3
    assert reader.manifest.duration_s == 30
    # a tar ends in up to 10 KiB of zeros
    assert all((shards / shard.file).stat().st_size <= 20_000 + 10_240 for shard in reader.manifest.shards)
    assert not list(shards.glob("*.tmp"))
    assert not list(shards.glob("*journal*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_webdataset_reads_every_byte(shards: Path) -> None:
    import gc

    urls = sorted(str(path) for path in shards.glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    found = {
        sample["__key__"]: {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in dataset
    }
    del dataset
    gc.collect()  # it leaves its files to the collector
    assert found == dict(samples(20))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", samples(20))
    write(tmp_path / "b", samples(20))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_long_keys(tmp_path: Path) -> None:
    items = [(f"{'d' * 90}/{'k' * 100}{n}", {"mp4": b"x" * n}) for n in range(1, 4)]
    write(tmp_path / "s", items)
    assert everything(tmp_path / "s") == dict(items)


def test_one_sample_larger_than_a_shard(tmp_path: Path) -> None:
    items = [("small", {"mp4": b"1"}), ("large", {"mp4": b"2" * 50_000}), ("last", {"mp4": b"3"})]
    write(tmp_path / "s", items)
    assert ShardReader(tmp_path / "s").shard_sizes == (1, 1, 1)
    assert everything(tmp_path / "s") == dict(items)


@pytest.mark.parametrize(
    "key", ["../up", "/absolute", "a/../b", "", "a b", "nul\0", "x" * 201, "ümlaut", "a//b", "a/", "line\n"]
)
def test_unsafe_keys(tmp_path: Path, key: str) -> None:
    writer = ShardWriter(tmp_path / "s", IDENTITY)
    with pytest.raises(DataError, match="sample key") as caught:
        writer.add(key, {"mp4": b"x"})
    assert caught.value.reason == "unsafe_key"


@pytest.mark.parametrize("key", ["one", "with.dot", "a/b.c"])
def test_doubled_keys_and_dots(tmp_path: Path, key: str) -> None:
    writer = ShardWriter(tmp_path / "s", IDENTITY)
    writer.add("one", {"mp4": b"x"})
    with pytest.raises(ValueError, match="expected a new key"):
        writer.add(key, {"mp4": b"x"})


# --- stopping and going on


@pytest.mark.parametrize("stop", [0, 1, 7, 8, 19, 20])
def test_a_stopped_writer_goes_on_to_the_same_bytes(tmp_path: Path, stop: int) -> None:
    items = samples(20)
    write(tmp_path / "whole", items)
    stopped = ShardWriter(tmp_path / "parts", IDENTITY, 20_000)
    for key, members in items[:stop]:
        stopped.add(key, members, duration_s=1.5)
    del stopped  # no finish: what was not committed is lost
    (tmp_path / "parts" / "shard-000009.tar.tmp").write_bytes(b"half")
    resumed = ShardWriter(tmp_path / "parts", IDENTITY, 20_000)
    assert resumed.num_done <= stop
    for key, members in items[resumed.num_done :]:
        resumed.add(key, members, duration_s=1.5)
    resumed.finish()
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == names
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_torn_journal_line_is_dropped(tmp_path: Path) -> None:
    items = samples(20)
    writer = ShardWriter(tmp_path / "s", IDENTITY, 20_000)
    for key, members in items[:15]:
        writer.add(key, members)
    done = writer.num_done
    assert done > 0
    with (tmp_path / "s" / "pack.journal.jsonl").open("a") as stream:
        stream.write('{"shard": {"file": "sha')
    assert ShardWriter(tmp_path / "s", IDENTITY, 20_000).num_done == done


def test_rejections_are_kept_over_a_stop(tmp_path: Path) -> None:
    items = samples(12)
    writer = ShardWriter(tmp_path / "s", IDENTITY, 20_000)
    writer.reject("bad one", "empty", "0 bytes")
    for key, members in items:
        writer.add(key, members)
    writer = ShardWriter(tmp_path / "s", IDENTITY, 20_000)
    assert writer.num_done >= 1
    for key, members in items[writer.num_done - 1 :]:
        writer.add(key, members)
    writer.reject("bad two", "audio_only", "no picture")
    manifest = writer.finish()
    assert [(item.item, item.reason) for item in manifest.rejected] == [
        ("bad one", "empty"), ("bad two", "audio_only"),
    ]  # fmt: skip
    text = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert text["rejected_by_reason"] == {"audio_only": 1, "empty": 1}
    assert text["num_samples"] == 12


def test_another_input_is_refused(tmp_path: Path) -> None:
    ShardWriter(tmp_path / "s", IDENTITY)
    with pytest.raises(InvalidInput, match="another input"):
        ShardWriter(tmp_path / "s", {"input": "other"})


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="expected an empty folder"):
        ShardWriter(tmp_path, IDENTITY)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_complete_folder_is_refused(shards: Path) -> None:
    with pytest.raises(InvalidInput, match="already complete"):
        ShardWriter(shards, IDENTITY, 20_000)


def test_a_vanished_shard_stops_going_on(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", IDENTITY, 20_000)
    for key, members in samples(15):
        writer.add(key, members)
    (tmp_path / "s" / "shard-000000.tar").unlink()
    with pytest.raises(IntegrityError, match=r"shard-000000\.tar"):
        ShardWriter(tmp_path / "s", IDENTITY, 20_000)


def test_nothing_to_pack(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", IDENTITY)
    writer.reject("a.mp4", "empty", "0 bytes")
    with pytest.raises(InvalidInput, match=r"none of 1 items could be packed \(empty\)"):
        writer.finish()


def test_a_disk_that_loses_bytes_is_noticed(tmp_path: Path, monkeypatch) -> None:
    import os

    original = os.fsync

    def losing(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".tar.tmp"):
            with open(name, "r+b") as stream:
                stream.seek(2000)
                stream.write(b"\xff\xff")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", losing)
    with pytest.raises(IntegrityError, match=r"shard-000000\.tar\.tmp"):
        write(tmp_path / "s", samples(2))
    assert not (tmp_path / "s" / "shard-000000.tar").exists()


# --- damage


def outcomes(folder: Path) -> tuple[dict[str, dict[str, bytes]], list[str]]:
    """What can be read, and the reasons for what cannot."""
    reader = ShardReader(folder)
    read, reasons = {}, []
    for shard, size in enumerate(reader.shard_sizes):
        for number in range(size):
            try:
                raw = reader.read(shard, number)
                read[raw.key] = raw.members
            except DataError as error:
                reasons.append(error.reason)
    return read, reasons


def test_every_flipped_bit_is_noticed_or_harmless(shards: Path) -> None:
    """Wherever a bit flips in a tar: each sample comes out exactly or as an error, and none is missed."""
    truth = dict(samples(20))
    tar = shards / "shard-000001.tar"
    data = tar.read_bytes()
    rng = np.random.default_rng(11)
    reader = ShardReader(shards)
    spans = [
        (member.offset, member.offset + member.size)
        for number in range(reader.shard_sizes[1])
        for member in reader.entry(1, number).members
    ]
    for place in [*range(0, 1536, 64), *rng.integers(len(data), size=60).tolist()]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        tar.write_bytes(bytes(damaged))
        read, reasons = outcomes(shards)
        assert len(read) + len(reasons) == 20
        assert all(truth[key] == members for key, members in read.items())
        is_data = any(first <= place < last for first, last in spans)
        assert reasons == (["checksum"] if is_data else [])
        assert verify_shards(shards), f"bit at {place} passed unseen"
    tar.write_bytes(data)
    assert verify_shards(shards) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_every_cut_is_noticed(shards: Path, share: float) -> None:
    truth = dict(samples(20))
    tar = shards / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[: int(tar.stat().st_size * share)])
    read, reasons = outcomes(shards)
    assert len(read) + len(reasons) == 20
    assert all(truth[key] == members for key, members in read.items())
    assert set(reasons) <= {"short_read"}
    assert verify_shards(shards)


def test_a_missing_shard(shards: Path) -> None:
    (shards / "shard-000002.tar").unlink()
    read, reasons = outcomes(shards)
    assert set(reasons) == {"shard_missing"}
    assert [finding.reason for finding in verify_shards(shards)] == ["shard_missing"]


def test_a_damaged_index(shards: Path) -> None:
    index = shards / "shard-000000.index.jsonl"
    index.write_text(index.read_text().replace("clip_000", "clip_999"))
    read, reasons = outcomes(shards)
    assert set(reasons) == {"index_damaged"}
    assert [finding.reason for finding in verify_shards(shards)] == ["index_damaged"]
    index.unlink()
    assert set(outcomes(shards)[1]) == {"index_damaged"}


def test_verification_names_the_damaged_sample(shards: Path) -> None:
    reader = ShardReader(shards)
    entry = reader.entry(1, 2)
    tar = shards / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[entry.members[1].offset + 10] ^= 4
    tar.write_bytes(bytes(data))
    (finding,) = verify_shards(shards)
    assert (finding.file, finding.key, finding.reason) == (tar.name, entry.key, "checksum")


def test_items_that_were_neither_packed_nor_rejected(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", {"num_items": 4})
    for key, members in samples(2):
        writer.add(key, members)
    writer.reject("bad", "empty", "0 bytes")
    writer.finish()
    (finding,) = verify_shards(tmp_path / "s")
    assert (finding.file, finding.reason) == ("manifest.json", "items_missing")
    assert "4 items went in, 2 and 1 rejected came out" in finding.detail


def test_files_that_the_manifest_does_not_know(shards: Path) -> None:
    (shards / "shard-000099.tar").write_bytes(b"")
    assert [finding.reason for finding in verify_shards(shards)] == ["unknown_file"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: m.update(format="other/1"), DataError),
        (lambda m: m.update(num_samples=19), IntegrityError),
        (lambda m: m["shards"].pop(), IntegrityError),
        (lambda m: m["shards"][0].update(file="../outside.tar"), IntegrityError),
        (lambda m: m["shards"][0].update(sha256="0" * 64), IntegrityError),
        (lambda m: m.pop("shards"), IntegrityError),
    ],
)
def test_a_damaged_manifest(shards: Path, change, error: type[Exception]) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    change(manifest)
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(error, match=r"manifest\.json"):
        ShardReader(shards)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vlm data pack"):
        ShardReader(tmp_path)


def test_a_reader_can_be_sent_to_another_process(shards: Path) -> None:
    copy = pickle.loads(pickle.dumps(ShardReader(shards)))
    assert copy.read(0, 0) == ShardReader(shards).read(0, 0)
