"""Tars of other makers: what is usable is used as it is, and whatever is not has its reason."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from vlm.cli import main
from vlm.data.foreign import index_foreign
from vlm.data.loader import Loader, LoaderConfig
from vlm.data.shards.layout import Manifest
from vlm.data.shards.reader import ShardReader
from vlm.data.shards.tar_index import scan_tar
from vlm.data.shards.verification import verify_shards
from vlm.data.sources import ShardSource, parse_facts
from vlm.errors import InvalidInput
from vlm.types import Preprocessing


@pytest.fixture(scope="module")
def video(encode, numbered) -> bytes:
    target = io.BytesIO()
    encode(target, numbered(6), container="mp4", preset="ultrafast")
    return target.getvalue()


def tar_of(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def triple(key: str, video: bytes) -> list[tuple[str, bytes]]:
    """A sample as video2dataset writes it."""
    facts = {"caption": f"about {key}", "url": "https://example.org", "status": "success"}
    return [
        (f"{key}.mp4", video), (f"{key}.json", json.dumps(facts).encode()),
        (f"{key}.txt", f"about {key}".encode()),
    ]  # fmt: skip


def many(count: int, video: bytes) -> list[tuple[str, bytes]]:
    return [member for number in range(count) for member in triple(f"{number:05d}", video)]


def reasons(manifest: Manifest) -> Counter[str]:
    return Counter(item.reason for item in manifest.rejected)


def everything(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Key → video and caption, checked to belong together by the reader."""
    reader = ShardReader(folder)
    found = {}
    for shard, size in enumerate(reader.shard_sizes):
        for number in range(size):
            raw = reader.read(shard, number)
            found[raw.key] = (raw.members["mp4"], parse_facts(raw)["captions"][0])
    return found


def test_shards_that_webdataset_wrote(tmp_path: Path, video: bytes) -> None:
    (tmp_path / "f").mkdir()
    with webdataset.TarWriter(str(tmp_path / "f" / "a.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": f"{number:03d}", "mp4": video, "txt": f"about {number}", "cls": 3})
    manifest = index_foreign(tmp_path / "f")
    assert manifest.num_samples == 4
    assert manifest.duration_s == pytest.approx(4 * 6 / 25, abs=0.01)
    assert reasons(manifest) == {}
    assert Counter(item.reason for item in manifest.odd) == {"ignored_member": 4}
    assert everything(tmp_path / "f") == {f"{n:03d}": (video, f"about {n}") for n in range(4)}
    assert verify_shards(tmp_path / "f") == []
    loader = Loader(ShardSource(tmp_path / "f"), Preprocessing(num_frames=2, image_size=8), LoaderConfig())
    (batch,) = loader.batches(num_epochs=1)
    assert sorted(batch.captions) == [f"about {number}" for number in range(4)]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_with_long_and_odd_names(tmp_path: Path, video: bytes, kind: int) -> None:
    """Each name keeps its bytes; the key is spelt safely and stays unique."""
    keys = ["./plain", "folder/with space", "26292851@N04_42"]
    keys += [] if kind == tarfile.USTAR_FORMAT else ["ümlaut/" + "x" * 150, "y" * 120]
    tar_of(tmp_path / "f" / "a.tar", [member for key in keys for member in triple(key, video)], kind)
    index_foreign(tmp_path / "f", tmp_path / "out", decode=False)
    found = everything(tmp_path / "out")
    assert sorted(caption for _, caption in found.values()) == sorted(f"about {key}" for key in keys)
    assert len(found) == len(keys)
    assert "plain" in found
    assert not list((tmp_path / "f").glob("*.jsonl")), "the source is left untouched"


def test_names_of_other_tars_do_not_mix(tmp_path: Path, video: bytes) -> None:
    tar_of(tmp_path / "f" / "a.tar", many(2, video))
    tar_of(tmp_path / "f" / "b.tar", many(2, video))
    index_foreign(tmp_path / "f", decode=False)
    assert sorted(everything(tmp_path / "f")) == ["a/00000", "a/00001", "b/00000", "b/00001"]


def test_each_fault_has_its_reason(tmp_path: Path, video: bytes) -> None:
    text = [("c.mp4", video), ("c.txt", b"  ")]
    members = [
        *triple("good", video),
        ("a.json", b'{"caption": "no video"}'),
        ("b.mp4", video), *text,
        ("d.mp4", video), ("d.json", b"{"),
        ("e.mp4", video), ("e.webm", video), ("e.txt", b"two videos"),
        ("f.mp4", video), ("f.mp4", video), ("f.txt", b"twice"),
        ("g.mp4", video), ("h.mp4", video), ("h.txt", b"fine"), ("g.txt", b"torn apart"),
        ("../up.mp4", video), ("../up.txt", b"x"), ("/etc/x.mp4", video), ("a/../../x.mp4", video),
        ("no_extension", b"x"), ("._good.mp4", b"x"), ("nul\x1b.mp4", b"x"),
        ("i.mp4", b"not a video"), ("i.txt", b"x"),
        ("j.mp4", video), ("j.txt", b"\xff\xfe"),
        ("k.mp4", video), ("k.json", b'{"captions": [1]}'),
        ("l.mp4", video), ("l.json", b"[]"),
    ]  # fmt: skip
    tar_of(tmp_path / "f" / "a.tar", members)
    (tmp_path / "f" / "b.tar.gz").write_bytes(b"\x1f\x8b")
    manifest = index_foreign(tmp_path / "f")
    assert set(everything(tmp_path / "f")) == {"good", "h"}
    assert {item.item.removeprefix("a.tar:"): item.reason for item in manifest.rejected} == {
        "b.tar.gz": "compressed", "a": "no_video_member", "b": "no_caption", "c": "no_caption",
        "d": "bad_metadata", "e": "no_video_member", "f": "duplicate_member", "g": "torn_apart",
        "../up.mp4": "unsafe_key", "../up.txt": "unsafe_key", "/etc/x.mp4": "unsafe_key",
        "a/../../x.mp4": "unsafe_key", "no_extension": "unsafe_key", "._good.mp4": "unsafe_key",
        "nul\x1b.mp4": "unsafe_key", "i": "not_a_video", "j": "bad_metadata", "k": "bad_metadata",
        "l": "bad_metadata",
    }  # fmt: skip


def test_what_only_some_samples_lack_is_odd(tmp_path: Path, video: bytes) -> None:
    tar_of(tmp_path / "f" / "a.tar", [*many(3, video), ("h.mp4", video), ("h.txt", b"fine")])
    manifest = index_foreign(tmp_path / "f")
    assert manifest.num_samples == 4
    (odd,) = manifest.odd
    assert (odd.item, odd.reason, odd.detail) == ("a.tar:h", "missing_member", "lacks json")


def test_links_devices_and_sparse_files_are_not_followed(tmp_path: Path, video: bytes) -> None:
    path = tar_of(tmp_path / "f" / "a.tar", many(2, video))
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
             tarfile.GNUTYPE_SPARSE, b"Z"]  # fmt: skip
    with tarfile.open(path, "a") as tar:
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"x{number}.mp4")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in triple("last", video):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = index_foreign(tmp_path / "f", decode=False)
    assert reasons(manifest) == {"not_a_file": 6, "sparse": 1}
    assert set(everything(tmp_path / "f")) == {"00000", "00001", "last"}


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, 10_000_000])
def test_huge_claims_cost_nothing_and_hide_nothing(tmp_path: Path, video: bytes, size: int) -> None:
    path = tar_of(tmp_path / "f" / "a.tar", many(3, video))
    whole = path.read_bytes()
    place = scan_tar(path).members[3].offset - 512
    path.write_bytes(whole[:place] + header("huge.mp4", size) + whole[place:])
    manifest = index_foreign(tmp_path / "f", decode=False)
    assert reasons(manifest) == {"beyond_end": 1}
    assert len(everything(tmp_path / "f")) == 3


def test_a_member_above_the_limit_is_passed_over(tmp_path: Path, video: bytes) -> None:
    """A file with a hole of 2 GiB: passed over without being read."""
    path = tar_of(tmp_path / "f" / "a.tar", many(1, video))
    size = (2 << 30) + 512
    end = scan_tar(path).members[-1]
    place = end.offset + -(-end.size // 512) * 512
    with path.open("r+b") as stream:
        stream.truncate(place)
        stream.seek(place)
        stream.write(header("large.mp4", size))
        stream.seek(size, 1)
        last = io.BytesIO()
        with tarfile.open(fileobj=last, mode="w") as tar:
            info = tarfile.TarInfo("z.txt")
            tar.addfile(info)
        stream.write(last.getvalue())
    scan = scan_tar(path)
    assert [oddity.reason for oddity in scan.oddities] == ["too_large"]
    assert [member.name for member in scan.members][-1] == "z.txt"


def test_one_flipped_bit_in_a_header_costs_one_sample(tmp_path: Path, video: bytes) -> None:
    """WebDataset loses everything after it, without a word."""
    path = tar_of(tmp_path / "f" / "a.tar", many(40, video))
    data = bytearray(path.read_bytes())
    data[scan_tar(path).members[60].offset - 512 + 2] ^= 1
    path.write_bytes(bytes(data))
    manifest = index_foreign(tmp_path / "f", decode=False)
    assert manifest.num_samples == 39
    assert reasons(manifest)["damaged_header"] == 1
    assert "00020" not in everything(tmp_path / "f")


def test_whatever_is_flipped_no_sample_gets_anothers_caption(tmp_path: Path, encode, numbered) -> None:
    """Every sample has a video of its own here; a pair that comes out must be one that went in."""
    truth = {}
    members = []
    for number in range(6):
        target = io.BytesIO()
        encode(target, numbered(20)[number : number + 3], container="mp4", preset="ultrafast")
        members += triple(f"{number:05d}", target.getvalue())
        truth[target.getvalue()] = f"about {number:05d}"
    path = tar_of(tmp_path / "f" / "a.tar", members)
    whole = path.read_bytes()
    heads = [member.offset - 512 for member in scan_tar(path).members]
    rng = np.random.default_rng(3)
    places = [int(rng.choice(heads)) + int(rng.integers(160)) for _ in range(60)]
    places += rng.integers(len(whole), size=20).tolist()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        (tmp_path / "f" / "manifest.json").unlink(missing_ok=True)
        manifest = index_foreign(tmp_path / "f", decode=False)
        pairs = list(everything(tmp_path / "f").values())
        is_data = not any(head <= place < head + 512 for head in heads)
        assert len(pairs) >= 5
        if not is_data:
            assert all(truth[data] == caption for data, caption in pairs)
            assert len(pairs) == 6 or manifest.rejected, f"byte {place} lost a sample without a word"


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.77, 0.999])
def test_every_cut_is_reported_and_what_is_whole_is_used(tmp_path: Path, video: bytes, share: float) -> None:
    path = tar_of(tmp_path / "f" / "a.tar", many(10, video))
    whole = path.read_bytes()
    end = scan_tar(path).members[-1]
    length = int((end.offset + 512) * share)
    path.write_bytes(whole[:length])
    complete = sum(
        member.name.endswith(".txt") and member.offset + member.size <= length
        for member in scan_tar(path).members
    )
    if not complete:
        with pytest.raises(InvalidInput, match="no usable sample in 1 tars"):
            index_foreign(tmp_path / "f", decode=False)
        return
    manifest = index_foreign(tmp_path / "f", decode=False)
    assert manifest.num_samples == complete
    assert reasons(manifest)["cut"] == 1


def test_zeros_in_the_middle_and_archives_end_to_end(tmp_path: Path, video: bytes) -> None:
    first = tar_of(tmp_path / "x" / "a.tar", many(3, video)).read_bytes()
    second = tar_of(tmp_path / "x" / "b.tar", triple("other", video)).read_bytes()
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.tar").write_bytes(first + second)
    manifest = index_foreign(tmp_path / "f", decode=False)
    assert reasons(manifest) == {"damaged_header": 1}
    assert "other" in everything(tmp_path / "f")


def test_damage_after_indexing_is_found(tmp_path: Path, video: bytes) -> None:
    path = tar_of(tmp_path / "f" / "a.tar", many(3, video))
    index_foreign(tmp_path / "f", decode=False)
    data = bytearray(path.read_bytes())
    data[scan_tar(path).members[4].offset] ^= 1
    path.write_bytes(bytes(data))
    (finding,) = verify_shards(tmp_path / "f")
    assert (finding.key, finding.reason) == ("00001", "checksum")


def test_as_a_user_runs_it(tmp_path: Path, video: bytes, capsys) -> None:
    tar_of(tmp_path / "f" / "a.tar", [*many(3, video), ("bad\x1b.mp4", b"x")])
    assert main(["data", "index", str(tmp_path / "f"), "--out", str(tmp_path / "o"), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["num_samples"], report["rejected_by_reason"]) == (3, {"unsafe_key": 1})
    assert main(["data", "describe", str(tmp_path / "o"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_captions"] == 3
    assert main(["data", "verify", str(tmp_path / "o")]) == 0
    assert main(["data", "index", str(tmp_path / "f"), "--out", str(tmp_path / "o")]) == 4
    assert "already indexed" in capsys.readouterr().err
    assert main(["data", "index", str(tmp_path / "none")]) == 4
    assert main(["data", "index", str(tmp_path / "f"), "--no-decode"]) == 3
    assert "rejected 'a.tar:bad\\x1b.mp4': unsafe_key" in capsys.readouterr().out
