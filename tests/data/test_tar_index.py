"""Tars are read to their true end or refused: links, devices, unsafe or doubled names, cuts, torn headers."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from vlm.data.shards import layout
from vlm.data.shards.tar_index import index_tar, split_name
from vlm.errors import IntegrityError


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def info(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    "member",
    [
        info("../up.mp4"),
        info("/etc/passwd.mp4"),
        info("a/../../b.mp4"),
        info("link.mp4", tarfile.SYMTYPE, "/etc/passwd"),
        info("link.mp4", tarfile.LNKTYPE, "ok.mp4"),
        info("device.mp4", tarfile.CHRTYPE),
        info("folder.mp4", tarfile.DIRTYPE),
        info("ok.mp4"),
        info("noextension"),
        info("sp ace.mp4"),
    ],
    ids=lambda member: f"{member.name}-{member.type.decode()}",
)
def test_members_that_no_tar_of_ours_holds(tmp_path: Path, member: tarfile.TarInfo) -> None:
    path = tar_of(tmp_path / "a.tar", (info("ok.mp4"), b"data"), (member, b"x"))
    with pytest.raises(IntegrityError, match=r"a\.tar"):
        index_tar(path)


def test_torn_apart_samples(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", (info("a.mp4"), b"1"), (info("b.mp4"), b"2"), (info("a.json"), b"{}"))
    with pytest.raises(IntegrityError, match="not next to each other"):
        index_tar(path)


def test_a_tar_that_ends_early_is_not_a_shorter_tar(tmp_path: Path) -> None:
    """Python's own reader returns the members before a damaged header without a word."""
    path = tar_of(tmp_path / "a.tar", *[(info(f"k{n}.mp4"), b"x" * 600) for n in range(5)])
    whole = index_tar(path)
    assert [entry.key for entry in whole] == ["k0", "k1", "k2", "k3", "k4"]
    data = bytearray(path.read_bytes())
    header = whole[3].members[0].offset - 512
    data[header + 3] ^= 1
    path.write_bytes(bytes(data))
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 3
    with pytest.raises(IntegrityError, match="damaged header"):
        index_tar(path)
    path.write_bytes(bytes(data[:header]))
    with pytest.raises(IntegrityError, match="cut"):
        index_tar(path)


def test_names_are_split_as_webdataset_splits_them() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ("a.mp4", "a/b.c.mp4", "x.y/z.json", "-dash.txt", "_a.MP4"):
        key, extension = split_name(name)
        assert (key, extension) == (base_plus_ext(name)[0], base_plus_ext(name)[1].lower())


def test_digest_is_128_bits_of_blake2b() -> None:
    assert layout.digest(b"abc") == hashlib.blake2b(b"abc", digest_size=16).hexdigest()
