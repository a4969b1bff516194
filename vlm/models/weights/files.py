"""Weights files into tensors, without running code and without believing what a file says of its size."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.errors import CheckpointError

SMALLEST_TENSOR_BYTES = 1


def read_state_dict(path: Path | str) -> dict[str, Any]:
    """Read a safetensors or PyTorch file; tensors are mapped from the file, not copied.

    PyTorch files are read with ``weights_only=True``, never otherwise.

    Raises:
        CheckpointError: There is no such file, it is of another format, holds code, or lies about its sizes.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: expected a .safetensors file or a PyTorch file (a zip archive); older PyTorch formats "
            "are not read: save it again with torch.save, or as safetensors"
        )
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises many kinds; none of them means the file is usable
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: refused or damaged: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return dict(content)


def check_storage(tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare what tensors claim with the bytes behind them, before anything is copied.

    Raises:
        CheckpointError: A tensor is larger than its storage, or all together than twice theirs.
    """
    storages: dict[int, int] = {}
    claimed = 0
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            continue
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{where}: {name} is a {tensor.layout} tensor; expected a plain one")
        needed = tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage()
        if needed > storage.nbytes():
            raise CheckpointError(
                f"{where}: {name} claims {needed} bytes of shape {tuple(tensor.shape)}, but the file holds "
                f"{storage.nbytes()}; the file is damaged or made to exhaust memory"
            )
        storages[storage.data_ptr()] = storage.nbytes()
        claimed += needed
    # tied weights are legitimately stored once and named twice; anything beyond that is not a model
    if claimed > 2 * sum(storages.values()):
        raise CheckpointError(
            f"{where}: tensors claim {claimed} bytes of {sum(storages.values())} in the file"
        )


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path, device="cpu"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error


def _check_archive(path: Path) -> None:
    """Refuse archives whose members are compressed or claim more than the file holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path}: a damaged PyTorch file: {error}") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path}: a compressed archive, which PyTorch never writes; refused")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{path}: its members claim more bytes than the file has; refused")
