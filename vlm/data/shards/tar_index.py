"""Where the members of a tar lie, and everything that is odd about it: never a silently shorter list.

Python's own reader takes a damaged header for the end of the archive, so headers are walked here, and after
damage the walk goes on at the next header.
"""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vlm.data.shards.layout import Entry, Member, check_key
from vlm.errors import DataError, IntegrityError

_MAX_MEMBER = 2 << 30
_MAX_EXTENDED_HEADER = 1 << 20
_BLOCK, _CHUNK = 512, 1 << 20
_ZEROS = bytes(_BLOCK)
_BODILESS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE,
             tarfile.FIFOTYPE)  # fmt: skip


class Oddity(NamedTuple):
    """Something in a tar that is not a plain file: where, its name if it has one, a countable reason."""

    offset: int
    name: str
    reason: str
    detail: str


class Scan(NamedTuple):
    """The plain files of a tar, in order, and what else was met."""

    members: list[Member]
    oddities: list[Oddity]


def index_tar(path: Path) -> list[Entry]:
    """Read a whole plain tar and return its samples with the checksum of every member.

    Raises:
        IntegrityError: A header or the end is damaged, a name is unsafe or doubled, a member is not a plain
            file, or a sample's members are torn apart.
    """
    scan = scan_tar(path)
    if scan.oddities:
        first = scan.oddities[0]
        raise IntegrityError(f"{path}: {first.name!r} at byte {first.offset}: {first.detail}")
    groups: dict[str, list[Member]] = {}
    previous = ""
    for member in scan.members:
        try:
            key, extension = split_name(member.name)
        except DataError as error:
            raise IntegrityError(f"{path}: {error}") from error
        members = groups.setdefault(key, [])
        if members and key != previous:
            raise IntegrityError(f"{path}: the members of {key!r} are not next to each other")
        if not extension or any(other.name == member.name for other in members):
            raise IntegrityError(f"{path}: {member.name!r} is there twice or has no extension")
        previous = key
        members.append(member)
    return [Entry(key, tuple(members)) for key, members in groups.items()]


def scan_tar(path: Path) -> Scan:
    """Walk a tar's headers from start to end, whatever lies between, and hash every plain file.

    Reasons of oddities: ``damaged_header``, ``beyond_end`` (a member that claims more bytes than are left),
    ``cut`` (no end mark), ``not_a_file`` (links, devices, folders), ``sparse``, ``too_large`` (2 GiB).
    """
    walk = _Walk(path.stat().st_size)
    with path.open("rb") as stream:
        while walk.position + _BLOCK <= walk.size and not walk.has_ended:
            walk.step(stream)
    if not walk.has_ended:
        walk.note("cut", "the archive has no end: it was cut")
    return Scan(walk.members, walk.oddities)


def split_name(name: str) -> tuple[str, str]:
    """Split ``a/b.c.mp4`` into key ``a/b`` and extension ``c.mp4``, at the first dot of the last part.

    Raises:
        DataError: The key is unsafe.
    """
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    key = folder + slash + stem
    check_key(key)
    return key, extension.lower()


class _Walk:
    """Where the walk is, and what it has met."""

    def __init__(self, size: int) -> None:
        self.size, self.position, self.has_ended = size, 0, False
        self.members: list[Member] = []
        self.oddities: list[Oddity] = []
        self._extended: dict[str, str] = {}  # what an extended header says of the next member

    def note(self, reason: str, detail: str, name: str = "") -> None:
        self.oddities.append(Oddity(self.position, name, reason, detail))

    def step(self, stream: BinaryIO) -> None:
        """Take one header with what belongs to it."""
        stream.seek(self.position)
        block = stream.read(_BLOCK)
        if block == _ZEROS:
            self._zeros(stream)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = max(int(self._extended.get("size", info.size)), -1)
        except (tarfile.HeaderError, ValueError):
            self._damage(stream, "a damaged header")
            return
        size = 0 if info.type in _BODILESS else size
        name = self._extended.get("path", info.name)
        first = self.position + _BLOCK
        if size < 0 or first + size > self.size:
            self._damage(stream, f"claims {size} bytes, {self.size - first} are left", "beyond_end", name)
            return
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            self._extend(stream, info.type, size)
        else:
            self._member(stream, info, name, size)
            self._extended = {}
        self.position = first + -(-size // _BLOCK) * _BLOCK

    def _member(self, stream: BinaryIO, info: tarfile.TarInfo, name: str, size: int) -> None:
        if info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            return
        if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in self._extended):
            self.note("sparse", "a sparse file", name)
        elif not info.isreg():
            self.note("not_a_file", "not a plain file", name)
        elif size > _MAX_MEMBER:
            self.note("too_large", f"{size} bytes, the limit is {_MAX_MEMBER}", name)
        else:
            stream.seek(self.position + _BLOCK)
            self.members.append(Member(name, self.position + _BLOCK, size, _digest(stream, size)))

    def _extend(self, stream: BinaryIO, kind: bytes, size: int) -> None:
        data = stream.read(size) if size <= _MAX_EXTENDED_HEADER else b""
        if kind == tarfile.GNUTYPE_LONGNAME:
            self._extended["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            return
        while data:
            length, space, _ = data.partition(b" ")
            if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(data):
                self.note("damaged_header", "a damaged extended header")
                return
            record = data[len(length) + 1 : int(length) - 1]
            key, _, value = record.decode("utf-8", "surrogateescape").partition("=")
            self._extended[key] = value
            data = data[int(length) :]

    def _zeros(self, stream: BinaryIO) -> None:
        """Two blocks of zeros or more, up to the end of the file, are the end; other zeros are damage."""
        following, zeros = _next_header(stream, self.position, self.size, any_block=True)
        if following < self.size:
            self._damage(stream, f"{following - self.position} bytes of zeros before more data")
        elif self.size - zeros < 2 * _BLOCK:
            self.note("cut", "the archive has half an end: it was cut")
            self.has_ended = True
        else:
            self.has_ended = True

    def _damage(self, stream: BinaryIO, detail: str, reason: str = "damaged_header", name: str = "") -> None:
        following, zeros = _next_header(stream, self.position + _BLOCK, self.size)
        following = zeros if following >= self.size else following
        self.note(reason, f"{detail}; {following - self.position} bytes were skipped", name)
        self._extended = {}
        self.position = following


def _next_header(stream: BinaryIO, start: int, size: int, any_block: bool = False) -> tuple[int, int]:
    """Return where the next header (or block of anything but zeros) starts, and where trailing zeros do.

    The first is ``size`` where there is none.
    """
    zeros = position = start
    stream.seek(start)
    length = 8 * _BLOCK
    while chunk := stream.read(length):
        length = min(2 * length, _CHUNK)  # most often the next header is near
        for offset in range(0, len(chunk), _BLOCK):
            block = chunk[offset : offset + _BLOCK]
            if block.count(0) != len(block):
                if any_block or _is_header(block):
                    return position + offset, zeros
                zeros = position + offset + _BLOCK
        position += len(chunk)
    return size, min(zeros, size)


def _is_header(block: bytes) -> bool:
    if block[257:262] != b"ustar":
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _digest(stream: BinaryIO, size: int) -> str:
    """Return the checksum of the next bytes; as `vlm.data.shards.layout.digest`, a piece at a time."""
    found = hashlib.blake2b(digest_size=16)
    while size > 0 and (chunk := stream.read(min(size, _CHUNK))):
        found.update(chunk)
        size -= len(chunk)
    return found.hexdigest()
