"""``load_model``: one name or path in, one evaluating model out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from vlm.errors import CheckpointError, InvalidInput
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextModel
from vlm.models.weights.files import read_state_dict
from vlm.models.weights.folder import file_sha256, is_hub_folder, is_model_folder, load_folder
from vlm.models.weights.official import from_official
from vlm.models.weights.precision import set_dtype
from vlm.models.weights.resizing import Overrides
from vlm.text import Tokenizer

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_HUB = re.compile(r"hf:(?P<repository>[^/@\s]+/[^/@\s]+)(/(?P<file>[^@\s]+))?(@(?P<revision>[^@\s]+))?$")


def load_model(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    num_frames: int | None = None,
    image_size: int | None = None,
    overrides: Overrides | None = None,
    tokenizer: str | Path | None = None,
) -> VideoModel:
    """Load a model for use.

    Args:
        source: A model folder, a training checkpoint that contains one as ``model/``, a name that
            ``vlm models list`` shows, a published VideoMamba file, ``hf:owner/repo[/file][@revision]`` (one
            of these, or CLIP or SigLIP as transformers saves them) or ``open_clip:<arch>/<pretrained>``. A
            name goes before an equally spelt path (write ``./demo``). Nothing is downloaded: what is not on
            this machine is an error with the command that fetches it.
        device: ``auto`` takes a GPU if there is one.
        dtype: Type of matrix products and activations; None = fp32, also for files in bf16. Decay rates, skip
            weights, step biases, norms and the residual stream stay fp32.
        num_frames: Other number of frames than the model's own.
        image_size: Other input size than the model's own.
        overrides: Settings that a file does not tell, see ``vlm.models.weights.resizing.SETTINGS``.
        tokenizer: A ``tokenizer.json`` or ``vocab.txt`` for a model that comes without.

    Raises:
        InvalidInput: There is no such model, or it is not on this machine.
        CheckpointError: Its files are incomplete, damaged or of another kind.
        IntegrityError: Its files are not those that its card was written for.
        ValueError: A setting is unknown or impossible.
    """
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    settings: dict[str, Any] = {"num_frames": num_frames, "image_size": image_size, "overrides": overrides}
    model = _read(str(source), settings)
    if tokenizer is not None:
        if not isinstance(model, VideoTextModel):
            raise InvalidInput(f"a model of kind {model.kind!r} takes no tokenizer; leave it out")
        model.tokenizer = Tokenizer.from_file(tokenizer)
    if dtype is not None:
        set_dtype(model, _dtype(dtype))
    return model.to(place).eval()


def _read(source: str, settings: dict[str, Any]) -> VideoModel:
    """Read a model onto the CPU, in fp32."""
    if source.startswith("open_clip:"):
        from vlm.models.teachers.frame_encoders import load_frame_encoder

        return load_frame_encoder(source.removeprefix("open_clip:"), **settings)
    if source.startswith("hf:"):
        return _read_path(cached_file(source), settings)
    path = Path(source)
    if _NAME.fullmatch(source):
        from vlm.models.registry import find_local, load_registry

        if source in load_registry() or find_local(source) is not None:
            return _read_known(source, settings)
    if path.exists():
        return _read_path(path, settings)
    if path.suffix or path.parent != Path():
        raise InvalidInput(
            f"{path}: no such file or folder; give a model's path or a name of 'vlm models list'"
        )
    return _read_known(source, settings)


def _read_known(name: str, settings: dict[str, Any]) -> VideoModel:
    """Read a model that the registry or this machine's store knows by name."""
    from vlm.models.registry import load_registry, local_model

    local = local_model(name)
    if local.kind == "open_clip":
        from vlm.models.teachers.frame_encoders import load_frame_encoder

        entry = load_registry()[name]
        source = f"{entry.architecture}/{entry.pretrained}"
        model: VideoModel = load_frame_encoder(source, weights=local.files["weights"], **settings)
    else:
        model = _read_path(local.files["folder" if local.kind == "folder" else "weights"], settings)
    model.name = name
    if local.kind != "folder":
        model.domain = local.domain
    if isinstance(model, VideoTextModel) and "tokenizer" in local.files:
        model.tokenizer = Tokenizer.from_file(local.files["tokenizer"])
    return model


def _read_path(path: Path, settings: dict[str, Any]) -> VideoModel:
    if path.is_dir():
        if is_hub_folder(path):
            from vlm.models.teachers.hub_encoders import load_hub_encoder

            return load_hub_encoder(path, **settings)
        folder = path if is_model_folder(path) or not is_model_folder(path / "model") else path / "model"
        return load_folder(folder, **settings)
    try:
        model, report = from_official(read_state_dict(path), **settings)
    except CheckpointError as error:
        message = str(error)
        if str(path) in message:
            raise
        details = {"missing": error.missing, "unexpected": error.unexpected, "misshaped": error.misshaped}
        raise CheckpointError(f"{path}: {message}", **details) from error
    model.name = path.stem
    model.loaded = {"file": path.name, "sha256": file_sha256(path), **report.summary()}
    return model


def cached_file(source: str) -> Path:
    """Return where a file or folder of the hub lies on this machine.

    Raises:
        InvalidInput: The source is mis-spelt, or it was not fetched yet.
    """
    found = _HUB.match(source)
    if found is None:
        raise InvalidInput(f"expected hf:owner/repo[/file][@revision], got {source!r}")
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise InvalidInput(f"{source} needs huggingface_hub: pip install huggingface-hub") from error
    repository, file, revision = found["repository"], found["file"], found["revision"]
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, revision=revision, local_files_only=True))
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        command = " ".join(
            filter(None, ("hf download", repository, file, revision and f"--revision {revision}"))
        )
        raise InvalidInput(
            f"{source} is not on this machine, and models are fetched only when asked: {command}"
        ) from error


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    names = {
        "float32": "float32",
        "fp32": "float32",
        "bf16": "bfloat16",
        "fp16": "float16",
        "fp64": "float64",
    }
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, names.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype or one of {', '.join(names)}, got {dtype!r}")
    return found
