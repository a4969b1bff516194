"""Where the members of a tar lie, or an error: never a silently shorter list."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import BinaryIO

from vlm.data.shards.layout import Entry, Member, check_key, digest
from vlm.errors import DataError, IntegrityError

_MAX_MEMBER = 2 << 30


def index_tar(path: Path) -> list[Entry]:
    """Read a whole plain tar and return its samples with the checksum of every member.

    Raises:
        IntegrityError: A header or the end is damaged, a name is unsafe or doubled, a member is not a plain
            file, or a sample's members are torn apart.
    """
    groups: dict[str, list[Member]] = {}
    previous = ""
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                if not info.isreg():
                    raise IntegrityError(f"{path}: {info.name!r} is not a plain file")
                if info.issparse() or info.size > _MAX_MEMBER:
                    raise IntegrityError(
                        f"{path}: {info.name!r} is sparse or larger than {_MAX_MEMBER} bytes"
                    )
                key, extension = split_name(info.name)
                members = groups.setdefault(key, [])
                if members and key != previous:
                    raise IntegrityError(f"{path}: the members of {key!r} are not next to each other")
                if any(member.name == info.name for member in members):
                    raise IntegrityError(f"{path}: {info.name!r} is there twice")
                previous = key
                position = stream.tell()
                stream.seek(info.offset_data)
                data = stream.read(info.size)
                stream.seek(position)
                if len(data) != info.size or not extension:
                    raise IntegrityError(f"{path}: {info.name!r} is cut short or has no extension")
                members.append(Member(info.name, info.offset_data, info.size, digest(data)))
            _check_end(path, stream, tar.offset)
    except tarfile.TarError as error:
        raise IntegrityError(f"{path}: damaged: {error}") from error
    except DataError as error:
        raise IntegrityError(f"{path}: {error}") from error
    return [Entry(key, tuple(members)) for key, members in groups.items()]


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


def _check_end(path: Path, stream: BinaryIO, offset: int) -> None:
    """Python's reader takes a damaged header for the end; a true end is followed by zeros alone."""
    stream.seek(offset)
    rest = stream.read(1024)
    if len(rest) < 1024:
        raise IntegrityError(f"{path}: the archive has no end: it was cut")
    while rest:
        if rest.count(0) != len(rest):
            raise IntegrityError(f"{path}: a damaged header near byte {offset}")
        rest = stream.read(1 << 20)
