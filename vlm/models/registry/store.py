"""Models on this machine: what was pulled or imported, with the hashes it had then."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.assets import asset, user_folder
from vlm.errors import IntegrityError, InvalidInput, NoSpaceError
from vlm.models.registry.entries import ModelEntry, ModelFile, load_registry, lookup

_RECORD = "record.json"
_PINS = "pins.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ROUNDING = 0.01  # published sizes are rounded to three digits
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalModel:
    """A model whose files are on this machine.

    Attributes:
        name: The name to load it by.
        kind: ``folder``, ``official``, ``open_clip`` or ``imported``.
        licence: SPDX identifier, or ``unknown`` for imported files.
        domain: ``open``, a narrow world, or ``unknown``.
        files: Role → path; a model folder has the role ``folder``.
        sha256: Role → hash when it came in.
    """

    name: str
    kind: str
    licence: str
    domain: str
    files: dict[str, Path]
    sha256: dict[str, str]


def store_folder() -> Path:
    """Return the folder of this user's models, ``VLM_HOME/models``; it may not exist yet."""
    return user_folder() / "models"


def list_local() -> dict[str, LocalModel]:
    """Return name → model of everything that can be loaded by name now; damaged records are left out."""
    names = list(load_registry())
    if store_folder().is_dir():
        names += sorted(folder.name for folder in store_folder().iterdir() if folder.is_dir())
    found = {name: find_local(name) for name in dict.fromkeys(names)}
    return {name: model for name, model in found.items() if model is not None}


def find_local(name: str) -> LocalModel | None:
    """Return a model of this machine, or None if it is not here as it was when it came in."""
    try:
        return local_model(name)
    except (InvalidInput, IntegrityError):
        return None


def local_model(name: str) -> LocalModel:
    """Return a model of this machine.

    Raises:
        InvalidInput: No such name, or it was not pulled yet; the message has the command that does.
        IntegrityError: A file has changed its size or vanished since it came in.
    """
    entry = load_registry().get(name)
    if entry is not None and entry.path is not None:
        return LocalModel(
            name=name,
            kind=entry.kind,
            licence=entry.licence,
            domain=entry.domain,
            files={"folder": asset(entry.path)},
            sha256={},
        )
    record = read_record(name)
    if record is None or "weights" not in record["files"]:
        if entry is None:
            lookup(name)  # raises, and names the nearest
            raise AssertionError(name)
        raise InvalidInput(
            f"{name} is not on this machine ({entry.size_mb:.0f} MB, {entry.licence}): vlm models pull {name}"
        )
    files = {role: Path(item["path"]) for role, item in record["files"].items()}
    for role, path in files.items():
        _check_unchanged(name, path, record["files"][role]["size_bytes"])
    return LocalModel(
        name=name,
        kind=record["kind"],
        licence=record["licence"],
        domain=record["domain"],
        files=files,
        sha256={role: item["sha256"] for role, item in record["files"].items()},
    )


def import_model(path: Path, name: str, *, licence: str = "unknown", domain: str = "unknown") -> LocalModel:
    """Register a local weights file under a name of its own, or hand in a file of a model of the registry.

    A file with a name of its own stays where it is; a file of the registry is verified and copied.

    Args:
        path: A safetensors or .pth file.
        name: Lower-case letters, digits, dots, dashes.
        licence: What the file's owner says.
        domain: What the model knows.

    Raises:
        InvalidInput: The name or the file cannot be used.
        IntegrityError: The file is not the one that the registry pins.
        NoSpaceError: The disk is full.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"a name has lower-case letters, digits, '.', '-' and '_', got {name!r}")
    if not path.is_file():
        raise InvalidInput(f"{path}: no such file")
    entry = load_registry().get(name)
    if entry is not None:
        return _hand_in(path.resolve(), name, entry)
    _check_weights(path)
    item = {"path": str(path.resolve()), "sha256": sha256_of(path), "size_bytes": path.stat().st_size}
    _write_json(
        store_folder() / name / _RECORD,
        {"kind": "imported", "licence": licence, "domain": domain, "files": {"weights": item}},
    )
    return local_model(name)


def remove_model(name: str) -> int:
    """Delete what was pulled or registered under a name; files that were only registered stay.

    Returns:
        How many bytes that freed.

    Raises:
        InvalidInput: Nothing is stored under that name.
    """
    folder = store_folder() / name
    if not _NAME.fullmatch(name) or not folder.is_dir():
        is_known = name in load_registry()
        hint = "it was not pulled, or is part of the installation" if is_known else "see: vlm models list"
        raise InvalidInput(f"nothing is stored under {name!r}; {hint}")
    freed = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    return freed


def read_record(name: str) -> dict[str, Any] | None:
    """Return what was written when a model came in, or None.

    Raises:
        IntegrityError: The record cannot be read.
    """
    path = store_folder() / name / _RECORD
    if not _NAME.fullmatch(name) or not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["kind"] and record["licence"] and record["domain"] and isinstance(record["files"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise IntegrityError(
            f"{path}: damaged; vlm models remove {name}, then pull or import it again"
        ) from error
    return dict(record)


def add_file(name: str, entry: ModelEntry, file: ModelFile, path: Path, sha256: str) -> None:
    """Note that a file of a registry's model is here and verified."""
    record = read_record(name) or {"files": {}}
    item = {"path": str(path), "sha256": sha256, "size_bytes": path.stat().st_size}
    files = {**record["files"], file.role: item}
    _write_json(
        store_folder() / name / _RECORD,
        {"kind": entry.kind, "licence": entry.licence, "domain": entry.domain, "files": files},
    )


def verify(path: Path, file: ModelFile, sha256: str | None) -> str:
    """Return the hash of a file if it is what the registry says.

    Args:
        path: The file at hand.
        file: What is expected.
        sha256: The hash to compare with, or None if nobody published one.

    Raises:
        IntegrityError: Size or hash differ.
    """
    check_size(file, path.stat().st_size)
    found = sha256_of(path)
    if sha256 is not None and found != sha256:
        raise IntegrityError(f"{file.name}: expected sha256 {sha256}, got {found}")
    return found


def check_size(file: ModelFile, size_bytes: int) -> None:
    """Compare a size with the published one, exact or rounded.

    Raises:
        IntegrityError: They differ.
    """
    if file.size_bytes is not None:
        if size_bytes != file.size_bytes:
            raise IntegrityError(f"{file.name}: expected {file.size_bytes} bytes, got {size_bytes}")
    elif abs(size_bytes / 1e6 - file.size_mb) > _ROUNDING * file.size_mb:
        raise IntegrityError(f"{file.name}: expected about {file.size_mb} MB, got {size_bytes / 1e6:.3f} MB")


def pinned_sha256(file: ModelFile) -> str | None:
    """Return the registry's hash, else the one that the first download of this file had, else None."""
    return file.sha256 or _read_pins().get(_pin_key(file))


def pin(file: ModelFile, sha256: str) -> bool:
    """Keep the hash of a first download for later ones; return whether it was the first."""
    pins = _read_pins()
    if file.sha256 is not None or _pin_key(file) in pins:
        return False
    _write_json(store_folder() / _PINS, {**pins, _pin_key(file): sha256})
    return True


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hand_in(path: Path, name: str, entry: ModelEntry) -> LocalModel:
    """Verify and copy a file that belongs to a model of the registry."""
    file = next((file for file in entry.files if file.name == path.name), None)
    if file is None:
        expected = ", ".join(file.name for file in entry.files) or "nothing: it is part of the installation"
        raise InvalidInput(f"{name} consists of {expected}; got {path.name}")
    sha256 = verify(path, file, pinned_sha256(file))
    target = store_folder() / name / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.copy")
    try:
        shutil.copyfile(path, partial)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{target}: no space left; free {file.size_mb:.0f} MB and run again"
            ) from error
        raise
    pin(file, sha256)
    add_file(name, entry, file, target, sha256)
    return local_model(name)


def _check_weights(path: Path) -> None:
    """Refuse what the loader would refuse, before a name stands for it."""
    from vlm.models.weights.files import read_state_dict

    read_state_dict(path)


def _check_unchanged(name: str, path: Path, size_bytes: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size_bytes:
        what = "is gone" if found is None else f"had {size_bytes} bytes when it came in, now {found}"
        raise IntegrityError(f"{path} {what}: vlm models remove {name}, then pull or import it again")


def _pin_key(file: ModelFile) -> str:
    return f"{file.repo}@{file.revision}/{file.file}"


def _read_pins() -> dict[str, str]:
    try:
        pins = json.loads((store_folder() / _PINS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise IntegrityError(f"{store_folder() / _PINS}: damaged; delete it to start afresh") from error
    return dict(pins)


def _write_json(path: Path, value: object) -> None:
    """Replace a small file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
