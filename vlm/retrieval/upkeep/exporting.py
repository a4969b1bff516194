"""What an index holds, for other programs: vectors as npy, segments as a table, the rest as JSON."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.config import to_dict
from vlm.errors import InvalidInput, MissingExtra
from vlm.retrieval.durability import HashingWriter, write_bytes_durably, write_durably
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.vector_log import write_npy_header

TableFormat = Literal["jsonl", "csv", "parquet"]
COLUMNS = (
    "row", "video_id", "path", "start_s", "end_s", "sha256", "duration_s", "width", "height", "codec",
    "domain",
)  # fmt: skip
_ROWS_AT_ONCE = 16384


def export(index: VideoIndex, out: Path | str, table: TableFormat = "jsonl") -> dict[str, Any]:
    """Write ``vectors.npy``, ``segments.<table>`` and ``metadata.json`` into a new folder.

    Row i of the vectors, float16 (segments, dim), is row i of the table. Bytes of a path that are no text are
    escaped with a backslash. The folder appears whole or not at all.

    Returns:
        The metadata: the index's manifest and generation, counts, and the size and hash of each file.

    Raises:
        InvalidInput: The folder exists.
        MissingExtra: Parquet was asked for and pyarrow is not installed.
        IntegrityError: The index is damaged.
        NoSpaceError: The disk is full; nothing is left behind.
    """
    place = Path(os.path.abspath(out))
    if os.path.lexists(place):
        raise InvalidInput(f"{place}: exists; choose another place for --out")
    if table == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MissingExtra("pyarrow", "parquet", "a Parquet table")
    index.log.check(index.files())
    temporary = place.with_name(f".tmp-{place.name}")
    if temporary.is_dir():  # of an export that was killed
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        metadata = _write(index, temporary, table)
        temporary.rename(place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return metadata


def _write(index: VideoIndex, folder: Path, table: TableFormat) -> dict[str, Any]:
    snapshot = index.snapshot
    vectors = index.vectors()
    rows = np.flatnonzero(snapshot.alive)

    def write_vectors(stream: HashingWriter) -> None:
        write_npy_header(stream, (len(rows), vectors.dim), np.dtype(np.float16))
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            block = vectors.gather(rows[first : first + _ROWS_AT_ONCE])
            stream.write(block.data.cast("B"))

    files = {"vectors.npy": write_durably(folder / "vectors.npy", write_vectors)}
    writer = {"jsonl": _write_jsonl, "csv": _write_csv, "parquet": _write_parquet}[table]
    name = f"segments.{table}"
    files[name] = write_durably(folder / name, lambda stream: writer(_segments(index, rows), stream))
    metadata = {
        "format": "vlm-export/1",
        "index": to_dict(index.manifest),
        "generation": snapshot.generation.id,
        "num_videos": snapshot.generation.num_videos,
        "num_segments": len(rows),
        "dtype": "float16",
        "files": {name: {"sha256": sha256, "size_bytes": size} for name, (sha256, size) in files.items()},
    }
    write_bytes_durably(folder / "metadata.json", json.dumps(metadata, indent=2).encode() + b"\n")
    return metadata


def _segments(index: VideoIndex, rows: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Yield the values of `COLUMNS` for each row."""
    snapshot = index.snapshot
    for number, row in enumerate(rows.tolist()):
        video = snapshot.videos[int(snapshot.row_video[row])]
        start_s, end_s = snapshot.row_bounds[row].tolist()
        path = video.path.decode("utf-8", "backslashreplace")
        yield (
            number, video.video_id, path, start_s, end_s, video.sha256, video.duration_s, video.width,
            video.height, video.codec, video.domain,
        )  # fmt: skip


def _write_jsonl(segments: Iterator[tuple[Any, ...]], stream: HashingWriter) -> None:
    for values in segments:
        stream.write(json.dumps(dict(zip(COLUMNS, values, strict=True))).encode() + b"\n")


class _TextLines:
    """What the csv module writes its lines to."""

    def __init__(self, stream: HashingWriter) -> None:
        self._stream = stream

    def write(self, line: str) -> int:
        return self._stream.write(line.encode())


def _write_csv(segments: Iterator[tuple[Any, ...]], stream: HashingWriter) -> None:
    writer = csv.writer(_TextLines(stream))
    writer.writerow(COLUMNS)
    writer.writerows(segments)


def _write_parquet(segments: Iterator[tuple[Any, ...]], stream: HashingWriter) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = list(zip(*segments, strict=True)) or [() for _ in COLUMNS]
    table = pyarrow.table(dict(zip(COLUMNS, columns, strict=True)))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    stream.write(sink.getvalue().to_pybytes())
