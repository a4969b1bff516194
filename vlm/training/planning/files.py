"""Every file from outside that a config needs: how large, under what licence, and whether it is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm.data.shards.remote import is_remote
from vlm.errors import InvalidInput, VlmError
from vlm.models.registry import find_local, load_registry
from vlm.training.config import TrainingConfig
from vlm.training.schedule import is_ever_positive

_BERT_MEGABYTES = 0.232  # as google-bert/bert-base-uncased has its vocabulary
_BERT = "hf download google-bert/bert-base-uncased model.safetensors (440 MB, Apache-2.0) gives a BERT"
_UNKNOWN = "unknown"
_CORPORA = "data.shards.corpora"


@dataclass(frozen=True, kw_only=True, slots=True)
class NeededFile:
    """A file or folder that a run reads.

    Attributes:
        key: The key of the config that names it.
        source: As the config names it.
        present: Whether it is on this machine.
        megabytes: Its size in 10^6 bytes; None if nobody says.
        licence: As its publisher states it; ``unknown`` where the file does not tell.
        note: The command that gets it, or why it cannot be looked at; empty if there is nothing to say.
    """

    key: str
    source: str
    present: bool
    megabytes: float | None
    licence: str = _UNKNOWN
    note: str = ""


def needed_files(config: TrainingConfig) -> list[NeededFile]:
    """Return what a run reads, in the order in which it does; nothing is fetched."""
    return [*_models(config), *_data(config)]


def may_open_shards(files: list[NeededFile]) -> bool:
    """Return whether all shards are here; those behind a URL count if nothing else is missing."""
    shards = [file for file in files if file.key.startswith(_CORPORA)]
    here = all(file.present and not is_remote(file.source) for file in shards)
    return here or all(file.present for file in files)


def _models(config: TrainingConfig) -> Iterator[NeededFile]:
    reads_text = config.classification is None and config.losses.use_text
    if reads_text and config.tokenizer == "bert":
        yield _bert_vocabulary()
    elif reads_text and config.tokenizer != "world":
        yield _path("tokenizer", config.tokenizer)
    run, losses = config.train, config.losses
    if run.init_from is not None:
        yield _model("train.init_from", run.init_from)
    if run.text_from is not None:
        yield _path("train.text_from", run.text_from, _BERT)
    if config.classification is None and is_ever_positive(losses.alignment.weight):
        yield _model("losses.alignment.teacher", losses.alignment.teacher)
    if is_ever_positive(losses.distillation.weight):
        yield _model("losses.distillation.teacher", losses.distillation.teacher)
    if config.engine.file is not None:
        yield _path("engine.file", config.engine.file)


def _data(config: TrainingConfig) -> Iterator[NeededFile]:
    if config.classification is not None:
        files = config.classification.files
        if config.classification.source == "files":
            for name in ("train", "val", "classes", "videos"):
                value = getattr(files, name)
                if value:
                    yield _path(f"classification.files.{name}", value)
    elif config.data.source == "shards":
        for name, corpus in sorted(config.data.shards.corpora.items()):
            for folder in corpus.folders:
                yield _path(f"{_CORPORA}.{name}.folders", folder)


def _path(key: str, source: str, command: str = "no such path") -> NeededFile:
    if is_remote(source):
        note = "not looked at: it is fetched in the course of the run"
        return NeededFile(key=key, source=source, present=True, megabytes=None, note=note)
    path = Path(source)
    if not path.exists():
        return NeededFile(key=key, source=source, present=False, megabytes=None, note=command)
    return NeededFile(key=key, source=source, present=True, megabytes=_size(path), licence=_licence(path))


def _model(key: str, source: str) -> NeededFile:
    """Look up what ``load_model`` takes."""
    registry = load_registry()
    name = source
    if source.startswith("open_clip:"):
        tower = source.removeprefix("open_clip:")
        known = (n for n, e in registry.items() if f"{e.architecture}/{e.pretrained}" == tower)
        name = next(known, "")
        if not name or find_local(name) is None:
            return _tower(key, source, tower, name)
    local = find_local(name)
    if local is not None:
        size = round(sum(_size(path) for path in local.files.values()), 1)
        return NeededFile(key=key, source=source, present=True, megabytes=size, licence=local.licence)
    if name in registry:
        entry = registry[name]
        return NeededFile(
            key=key, source=source, present=False, megabytes=entry.size_mb, licence=entry.licence,
            note=f"vlm models pull {name}",
        )  # fmt: skip
    if source.startswith("hf:"):
        from vlm.models.weights.loading import cached_file

        return _found(key, source, lambda: cached_file(source))
    return _path(key, source)


def _tower(key: str, source: str, tower: str, name: str) -> NeededFile:
    from vlm.models.teachers.frame_encoders import find_weights

    entry = load_registry().get(name)
    found = _found(key, source, lambda: find_weights(tower))
    if entry is None:
        return found
    return NeededFile(
        key=key, source=source, present=found.present, megabytes=found.megabytes or entry.size_mb,
        licence=entry.licence, note=found.note and f"vlm models pull {name}",
    )  # fmt: skip


def _found(key: str, source: str, find: Callable[[], Path]) -> NeededFile:
    try:
        path = find()
    except VlmError as error:
        return NeededFile(key=key, source=source, present=False, megabytes=None, note=str(error))
    return NeededFile(key=key, source=source, present=True, megabytes=_size(path), licence=_licence(path))


def _bert_vocabulary() -> NeededFile:
    from vlm.text.vocabulary import FILE, REPOSITORY, cached_vocabulary

    path = cached_vocabulary()
    return NeededFile(
        key="tokenizer",
        source=f"{REPOSITORY}/{FILE}" if path is None else str(path),
        present=path is not None,
        megabytes=_BERT_MEGABYTES if path is None else _size(path),
        licence="Apache-2.0",
        note="" if path is not None else f"hf download {REPOSITORY} {FILE}; the run itself fetches it too",
    )


def _size(path: Path) -> float:
    files = [path] if path.is_file() else (each for each in path.rglob("*") if each.is_file())
    return round(sum(file.stat().st_size for file in files) / 1e6, 3)


def _licence(path: Path) -> str:
    """Return what the card of a model folder says."""
    from vlm.models.weights import read_card

    folder = path if path.is_dir() else path.parent
    for place in (folder, folder / "model"):
        if (place / "card.json").is_file():
            try:
                return str(read_card(place).get("licence", _UNKNOWN))
            except InvalidInput:
                break
    return _UNKNOWN
