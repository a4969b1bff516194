"""The truth of an index: immutable, numbered parts of vectors and token features, each file with its hash.

A part holds the segments of one or more videos: `vectors/NNNNNN.npy` float16 (segments, dim), and, if the
index stores tokens, `tokens/NNNNNN.npy` int8 or float16 (segments, tokens, width) with, for int8,
`tokens/NNNNNN.scale.npy` float16 (segments, tokens). Nothing here commits: the catalogue does.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vlm.crashes import crash_point
from vlm.errors import IntegrityError
from vlm.retrieval.durability import HashingWriter, hash_file, write_durably

NumpyArray = np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class LogFile:
    """One immutable file of the log: its place in the index folder, its part, hash, size and rows."""

    name: str
    part: int
    sha256: str
    size_bytes: int
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBlock:
    """Stored token features: `values` (segments, tokens, width); `scale` (segments, tokens) if int8."""

    values: NumpyArray
    scale: NumpyArray | None = None

    def restore(self) -> NumpyArray:
        """Return the features as float32."""
        values = self.values.astype(np.float32)
        return values if self.scale is None else values * self.scale[..., None].astype(np.float32)

    def take(self, rows: Sequence[int]) -> TokenBlock:
        """Return the features of some segments."""
        scale = None if self.scale is None else self.scale[list(rows)]
        return TokenBlock(values=self.values[list(rows)], scale=scale)

    @classmethod
    def join(cls, blocks: Sequence[TokenBlock]) -> TokenBlock:
        """Return the features of all segments of some blocks, in order."""
        scales = [block.scale for block in blocks if block.scale is not None]
        return cls(
            values=np.concatenate([block.values for block in blocks]),
            scale=np.concatenate(scales) if scales else None,
        )


def quantise(tokens: NumpyArray) -> TokenBlock:
    """Round float features (segments, tokens, width) to int8, with one scale a token."""
    largest = np.abs(tokens).max(axis=-1)
    # the rounded scale must be the one that divides, else restoring it would be off by its rounding
    scale = np.maximum(largest / 127.0, 1e-7).astype(np.float16)
    scale = np.where(
        scale.astype(np.float32) * 127.0 < largest, np.nextafter(scale, np.float16(np.inf)), scale
    )
    values = np.rint(tokens / scale[..., None].astype(np.float32))
    return TokenBlock(values=np.clip(values, -127, 127).astype(np.int8), scale=scale)


class VectorLog:
    """The numbered part files under an index folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_part(self, part: int, vectors: NumpyArray, tokens: TokenBlock | None) -> list[LogFile]:
        """Write one part durably; it belongs to nothing until the catalogue commits it.

        Args:
            part: Its number.
            vectors: float16 (segments, dim).
            tokens: Features of the same segments, or None.

        Raises:
            NoSpaceError: The disk is full; no part of the index has changed.
        """
        arrays = {f"vectors/{part:06d}.npy": vectors}
        if tokens is not None:
            arrays[f"tokens/{part:06d}.npy"] = tokens.values
            if tokens.scale is not None:
                arrays[f"tokens/{part:06d}.scale.npy"] = tokens.scale
        files = []
        for name, array in arrays.items():
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            sha256, size = write_durably(path, partial(_write_npy, array))
            files.append(LogFile(name=name, part=part, sha256=sha256, size_bytes=size, num_rows=len(vectors)))
        crash_point("after-part")
        return files

    def read(self, name: str, rows: Sequence[int] | None = None) -> NumpyArray:
        """Return a file's array, memory-mapped, or copies of some of its rows.

        Raises:
            IntegrityError: The file is missing or is not the array that was written.
        """
        path = self.folder / name
        try:
            array: NumpyArray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise IntegrityError(f"{path}: cannot be read ({error}); run vlm index verify") from error
        return array if rows is None else np.array(array[list(rows)])

    def tokens(self, part: int, rows: Sequence[int], quantised: bool) -> TokenBlock:
        """Return the stored token features of some rows of a part."""
        values = self.read(f"tokens/{part:06d}.npy", rows)
        scale = self.read(f"tokens/{part:06d}.scale.npy", rows) if quantised else None
        return TokenBlock(values=values, scale=scale)

    def damaged(self, files: Iterable[LogFile]) -> Iterator[tuple[str, str]]:
        """Yield (name, what is wrong) for every file that is not what was written."""
        for file in files:
            path = self.folder / file.name
            try:
                size = path.stat().st_size
                if size != file.size_bytes:
                    yield file.name, f"has {size} bytes, expected {file.size_bytes}"
                elif hash_file(path) != file.sha256:
                    yield file.name, "its content changed (checksum mismatch)"
            except OSError as error:
                yield file.name, f"cannot be read: {error.strerror}"

    def check(self, files: Iterable[LogFile]) -> None:
        """Raise IntegrityError unless files are what was written; before their content is copied anywhere."""
        for name, problem in self.damaged(files):
            raise IntegrityError(
                f"{self.folder / name}: {problem}; run vlm index verify {self.folder} --repair"
            )

    def strays(self, known: set[str]) -> list[Path]:
        """Return the files that no commit knows: a writer was killed before it, or is at work."""
        paths = [path for kind in ("vectors", "tokens") for path in sorted((self.folder / kind).glob("*"))]
        return [path for path in paths if f"{path.parent.name}/{path.name}" not in known]

    def sweep(self, known: set[str]) -> None:
        """Remove the strays; only the holder of the lock may call this, with a catalogue that is whole."""
        for path in self.strays(known):
            path.unlink()


class LogVectors:
    """The vectors of some parts as one sequence of rows, read from the files as needed.

    Attributes:
        num_rows: Segments in all parts, those of removed videos included.
        dim: Length of a vector.
        key: Hash that changes whenever the vectors do.
    """

    def __init__(
        self, log: VectorLog, files: Sequence[LogFile], dim: int, known: LogVectors | None = None
    ) -> None:
        self._log, self.dim = log, dim
        self._files = [file for file in files if file.name.startswith("vectors/")]
        # mapped at once: what is mapped stays readable when compaction removes the file
        there: dict[LogFile, NumpyArray] = {}
        if known is not None:
            there.update(zip(known._files, known._arrays, strict=True))
        self._arrays: list[NumpyArray] = [
            there[file] if file in there else self._map(file) for file in self._files
        ]
        self._firsts = np.cumsum([0, *(file.num_rows for file in self._files)])
        self.num_rows = int(self._firsts[-1])
        self.key = key_of(self._files)

    def prefix_key(self, num_rows: int) -> str | None:
        """Return the key that the first rows alone would have; None where they end within a part."""
        return prefix_key(self._files, num_rows)

    def blocks(self, max_rows: int, first: int = 0) -> Iterator[tuple[int, NumpyArray]]:
        """Yield (first row, float16 (at most max_rows, dim)) from the part that begins at row `first` on."""
        # a builder writes parts of a few hundred rows, and a block should be worth its overhead
        waiting: list[NumpyArray] = []
        for start_row, array in zip(self._firsts[:-1].tolist(), self._arrays, strict=True):
            if start_row < first:
                continue
            if waiting and sum(map(len, waiting)) + len(array) > max_rows:
                yield first, _joined(waiting)
                waiting = []
            if not waiting:
                first = start_row
            if len(array) <= max_rows:
                waiting.append(array)
                continue
            for start in range(0, len(array), max_rows):
                yield start_row + start, array[start : start + max_rows]
        if waiting:
            yield first, _joined(waiting)

    def gather(self, rows: NumpyArray) -> NumpyArray:
        """Return float16 (len(rows), dim), in the order of `rows`."""
        result = np.empty((len(rows), self.dim), np.float16)
        owners = np.searchsorted(self._firsts, rows, side="right") - 1
        inner = rows - self._firsts[owners]
        borders = np.flatnonzero(np.diff(owners)) + 1
        # rows from all over the log, in no order
        if 2 * len(borders) >= len(rows):
            for place, (position, row) in enumerate(zip(owners.tolist(), inner.tolist(), strict=True)):
                result[place] = self._arrays[position][row]
            return result
        # runs of rows of one part: all of them in one go, as rows that ascend come
        for start, end in pairwise([0, *borders.tolist(), len(rows)]):
            self._arrays[owners[start]].take(inner[start:end], 0, result[start:end], "clip")
        return result

    def _map(self, file: LogFile) -> NumpyArray:
        array = self._log.read(file.name)
        if array.shape != (file.num_rows, self.dim) or array.dtype != np.float16:
            raise IntegrityError(
                f"{self._log.folder / file.name}: expected float16 {(file.num_rows, self.dim)}, got "
                f"{array.dtype} {array.shape}; run vlm index verify"
            )
        # every row taken from a np.memmap becomes one, which takes longer than copying it
        return array.view(np.ndarray)


def key_of(files: Sequence[LogFile]) -> str:
    """Return the key of the vectors that some parts hold."""
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()


def prefix_key(files: Sequence[LogFile], num_rows: int) -> str | None:
    """Return the key of the first rows of some parts; None where they end within a part."""
    firsts = list(accumulate((file.num_rows for file in files), initial=0))
    count = bisect_left(firsts, num_rows)
    is_border = count < len(firsts) and firsts[count] == num_rows
    return key_of(files[:count]) if is_border else None


def _joined(arrays: list[NumpyArray]) -> NumpyArray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def write_npy_header(stream: HashingWriter, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Write what stands before the numbers in an npy file of version 1.0."""
    # by hand: np.save would call tofile on real files and bypass the hash
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def _write_npy(array: NumpyArray, stream: HashingWriter) -> None:
    contiguous = np.ascontiguousarray(array)
    write_npy_header(stream, contiguous.shape, contiguous.dtype)
    if contiguous.size:
        stream.write(contiguous.data.cast("B"))
