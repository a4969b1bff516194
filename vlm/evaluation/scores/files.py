"""Score matrices, positives and captions as users bring them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.errors import InvalidInput
from vlm.metrics import Positives

# bfloat16 as NumPy itself would load it from a .npy file: two nameless bytes
_TENSOR_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "V2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
}  # fmt: skip
_LONGEST_HEADER = 2**20


def read_scores(path: Path) -> NDArray[Any]:
    """Return a matrix (queries, items) as a memory map.

    Args:
        path: ``.npy``; or ``.safetensors`` with one tensor, or one named ``scores``. bfloat16 is the nameless
            two bytes (``V2``) that NumPy makes of it, or ``BF16`` in a ``.safetensors`` file.

    Raises:
        InvalidInput: The file is missing, cannot be read, or holds no matrix.
    """
    read = _tensor if path.suffix == ".safetensors" else _array
    try:
        matrix = read(path)
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        kind = "safetensors" if path.suffix == ".safetensors" else "NumPy .npy"
        raise InvalidInput(f"{path}: expected a {kind} file of (queries, items) scores: {error}") from error
    if matrix.ndim != 2:
        raise InvalidInput(f"{path}: expected (queries, items) scores, got shape {matrix.shape}")
    return matrix


def read_positives(path: Path, matrix: NDArray[Any]) -> Positives:
    """Read the right items of each row of a matrix.

    Args:
        path: JSON: for each query a list of item columns.
        matrix: (queries, items).

    Raises:
        InvalidInput: The file is missing, cannot be read, or does not fit the matrix: another number of
            lists, an empty list, or a column outside the matrix.
    """
    lists = parse_json(path, read_text(path), "for each query a list of columns")
    if not isinstance(lists, list) or not all(isinstance(columns, list) for columns in lists):
        raise InvalidInput(f"{path}: expected a JSON list that holds a list of columns for each query")
    if len(lists) != len(matrix):
        raise InvalidInput(
            f"{path}: expected {len(matrix)} lists, one for each row of the scores, got {len(lists)}"
        )
    try:
        return Positives.from_lists(lists, matrix.shape[1])
    except ValueError as error:
        raise InvalidInput(f"{path}: {error}") from error


def read_texts(path: Path) -> list[str]:
    """Return captions: a ``.json`` list of texts, or any other file's lines that are not blank.

    Raises:
        InvalidInput: The file is missing, cannot be read, or holds no text.
    """
    texts: Any
    if path.suffix == ".json":
        texts = parse_json(path, read_text(path), "a list of texts")
    else:
        texts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidInput(f"{path}: expected a JSON list of texts, or a text a line, and at least one")
    return texts


def parse_json(path: Path, text: str, what: str) -> Any:
    """Return what a file's JSON text holds.

    Raises:
        InvalidInput: It is not JSON; the message says that ``what`` was expected.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{path}: expected JSON, {what}: {error}") from error


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        InvalidInput: The file is missing or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read as text: {error}") from error


def _array(path: Path) -> NDArray[Any]:
    return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _tensor(path: Path) -> NDArray[Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("a header that is not an object")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    name = "scores" if "scores" in tensors else next(iter(tensors), "scores")
    if name not in tensors or (name != "scores" and len(tensors) > 1):
        raise ValueError(f"expected one tensor or one named 'scores', got {sorted(tensors)}")
    entry = tensors[name]
    if entry["dtype"] not in _TENSOR_TYPES:
        raise ValueError(f"expected one of the types {', '.join(_TENSOR_TYPES)}, got {entry['dtype']}")
    dtype, shape = np.dtype(_TENSOR_TYPES[entry["dtype"]]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{end - begin} bytes for {entry['dtype']} of shape {shape}")
    return np.memmap(path, dtype, "r", offset=8 + length + begin, shape=shape)
