"""An index folder: created for one model, added to, removed from, read at one generation, verified."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import build, to_dict
from vlm.errors import ConfigError, IntegrityError, InvalidInput
from vlm.retrieval.catalog import Catalog, Changes, Rejection, VideoRow
from vlm.retrieval.durability import WriterLock, hash_file, sweep_temporaries, write_bytes_durably
from vlm.retrieval.embedding import StoreTokens, choose_layout
from vlm.retrieval.ingest.pool import DecodeSettings
from vlm.retrieval.ingest.run import Ingest, Outcome
from vlm.retrieval.ingest.scanning import plan_sources, scan_paths
from vlm.retrieval.manifest import FORMAT, Manifest, Snapshot, identify, load_snapshot
from vlm.retrieval.vector_log import LogFile, VectorLog
from vlm.types import VideoTextEncoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a change of the index did.

    Attributes:
        num_added: New videos.
        num_updated: Videos whose file had changed and was embedded again.
        num_unchanged: Videos that were there already.
        num_removed: Videos taken out.
        num_segments: Segments embedded.
        rejected: Files that could not be indexed, with path, reason and detail.
        other_files: How many files of other kinds lay in the folders, by suffix.
        duration_s: How long it took.
    """

    num_added: int = 0
    num_updated: int = 0
    num_unchanged: int = 0
    num_removed: int = 0
    num_segments: int = 0
    rejected: tuple[Rejection, ...] = ()
    other_files: dict[str, int] = field(default_factory=dict)
    duration_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Damage that a verification found: a file of the index, and what is wrong with it."""

    name: str
    problem: str


class VideoIndex:
    """An index folder. Reading holds the generation that was newest at `open` or `refresh`."""

    def __init__(self, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        self.folder, self.manifest = folder, manifest
        self.log = VectorLog(folder)
        self._manifest_sha256 = manifest_sha256
        self._snapshot: Snapshot | None = None
        self.refresh()

    @classmethod
    def open(cls, path: Path | str) -> VideoIndex:
        """Open an index for reading and writing.

        Raises:
            InvalidInput: There is no index, or it has another format.
            IntegrityError: Its manifest or catalogue is damaged.
        """
        folder = Path(os.path.abspath(path))
        file = folder / "manifest.json"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InvalidInput(
                f"{folder}: no index there ({file.name}: {error.strerror}); run vlm index build"
            ) from error
        with Catalog.open(folder / "catalog.sqlite") as catalog:
            expected = str(catalog.query("SELECT digest FROM generations WHERE id = 0")[0][0])
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != expected:
            raise IntegrityError(f"{file}: its content changed (checksum mismatch); restore it from a copy")
        try:
            manifest = build(Manifest, json.loads(content), where=str(file))
        except (ValueError, ConfigError) as error:
            raise InvalidInput(f"{file}: not the manifest of a {FORMAT} index ({error})") from error
        if manifest.format != FORMAT:
            raise InvalidInput(
                f"{file}: expected format {FORMAT}, got {manifest.format!r}; rebuild the index"
            )
        return cls(folder, manifest, sha256)

    @classmethod
    def create(
        cls,
        path: Path | str,
        model: VideoTextEncoder,
        *,
        source: str | None = None,
        segment_s: float = 8.0,
        stride_s: float = 4.0,
        store_tokens: StoreTokens | None = None,
    ) -> VideoIndex:
        """Make an empty index for a model.

        Args:
            path: A folder that does not exist or is empty.
            model: What will embed the videos and the queries.
            source: How `load_model` finds it again; its name if None.
            segment_s: Length of a segment, in seconds.
            stride_s: From one segment's start to the next, in seconds.
            store_tokens: Which features to keep for reranking; see `choose_layout`.

        Raises:
            InvalidInput: The folder holds something else, or the stride leaves gaps.
            CapabilityError: The model cannot search, or cannot use stored tokens.
        """
        folder = Path(os.path.abspath(path))
        if not 0 < stride_s <= segment_s:
            raise InvalidInput(
                f"expected 0 < stride <= segment length, got a stride of {stride_s:g} s and segments of "
                f"{segment_s:g} s"
            )
        if folder.exists() and (
            not folder.is_dir() or any(not _is_ours(entry) for entry in folder.iterdir())
        ):
            raise InvalidInput(f"{folder}: exists and is no index; choose another place for --out")
        manifest = Manifest(
            format=FORMAT,
            model=identify(model, source),
            preprocessing=model.preprocessing,
            features=choose_layout(model, store_tokens, stride_s),
            segment_s=float(segment_s),
            stride_s=float(stride_s),
        )
        folder.mkdir(parents=True, exist_ok=True)
        with WriterLock(folder):
            sweep_temporaries(folder)
            # the manifest comes last: with it the index exists, and a crash before is simply started over
            for leftover in folder.glob("catalog.sqlite*"):
                leftover.unlink()
            content = json.dumps(to_dict(manifest), indent=2).encode() + b"\n"
            Catalog.create(folder / "catalog.sqlite", hashlib.sha256(content).hexdigest())
            write_bytes_durably(folder / "manifest.json", content)
        return cls.open(folder)

    def discard_if_empty(self) -> None:
        """Remove the folder's files if nothing was ever committed."""
        if self.refresh().generation.id:
            return
        with WriterLock(self.folder) as lock:
            for name in ("manifest.json", "catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
                (self.folder / name).unlink(missing_ok=True)
            self.log.sweep(set())
            lock.path.unlink()
        for folder in (self.folder / "vectors", self.folder / "tokens", self.folder):
            with suppress(OSError):
                folder.rmdir()

    @property
    def snapshot(self) -> Snapshot:
        """The generation that this reader holds."""
        assert self._snapshot is not None
        return self._snapshot

    def refresh(self) -> Snapshot:
        """Go on to the newest generation."""
        with self._catalog() as catalog:
            generation = catalog.latest()
            if self._snapshot is None or self._snapshot.generation != generation:
                self._snapshot = load_snapshot(catalog, generation)
        return self._snapshot

    def check_model(self, model: VideoTextEncoder) -> None:
        """Raise InvalidInput unless `model` is the one that made this index."""
        mine = self.manifest.model
        if model.fingerprint != mine.fingerprint or model.preprocessing != self.manifest.preprocessing:
            raise InvalidInput(
                f"{self.folder} was made by model {mine.name!r} ({mine.fingerprint[:12]}), but the model at "
                f"hand is {model.name!r} ({model.fingerprint[:12]}): their vectors cannot be compared. Use "
                f"--model {mine.source}, or build a new index: vlm index build PATH --out NEW --model MODEL"
            )

    def add(
        self,
        paths: Iterable[Path | str],
        *,
        model: VideoTextEncoder | None = None,
        batch_size: int = 8,
        num_workers: int = 1,
        patience_s: float = 60.0,
        allow_narrow_model: bool = False,
    ) -> Report:
        """Index the videos among files and folders; what is there and unchanged is not embedded again.

        Every video file is added, unchanged, or rejected with a reason. Work is committed as it goes: run it
        again after an interruption and it continues.

        Args:
            paths: Files (taken whatever their names) and folders (searched for video files).
            model: The index's model; loaded by its recorded source if None.
            batch_size: Segments encoded at once.
            num_workers: Processes that decode.
            patience_s: Longest time that opening a file, or decoding one segment, may take.
            allow_narrow_model: Index videos that are not of the model's domain.

        Raises:
            InvalidInput: A path does not exist; the model is another one, or does not fit the videos.
            BusyError: Somebody else is writing this index.
            NoSpaceError: The disk is full; what was committed before stands.
        """
        paths = list(paths)
        scan = scan_paths(paths, exclude=self.folder)
        model = self._usable(model)
        started = time.monotonic()
        with WriterLock(self.folder), self._catalog(write=True) as catalog:
            self._clean(catalog)
            new, unchanged, touched = plan_sources(catalog, scan.files)
            ingest = Ingest(
                catalog,
                self.log,
                model,
                self.manifest.features,
                self._settings(num_workers, patience_s),
                batch_size=batch_size,
                allow_narrow_model=allow_narrow_model,
                roots=[os.fsencode(os.path.abspath(path)) for path in paths],
                touched=touched,
            )
            outcome = ingest.run(new)
        self.refresh()
        return _report(outcome, unchanged, dict(scan.other_files), started)

    def update(self, *, model: VideoTextEncoder | None = None, **options: Any) -> Report:
        """Bring the index in line with the files and folders that were ever added: new, changed, gone.

        Raises:
            InvalidInput: One of those folders is gone as a whole (an unmounted disk looks like this).
        """
        with self._catalog() as catalog:
            roots = [Path(os.fsdecode(root)) for root in catalog.roots()]
        indexed = {Path(os.fsdecode(video.path)) for video in self.snapshot.videos}
        missing = [root for root in roots if not root.exists() and root not in indexed]
        if missing:
            raise InvalidInput(
                f"{missing[0]}: this folder is gone as a whole; if that is meant, remove its videos with "
                "vlm index remove"
            )
        gone = [video.video_id for video in self.snapshot.videos if not os.path.lexists(video.path)]
        removed = self.remove(gone) if gone else Report()
        report = self.add([root for root in roots if root.exists()], model=model, **options)
        return dataclasses.replace(report, num_removed=removed.num_removed)

    def remove(self, ids: Iterable[str]) -> Report:
        """Take videos out of the index, by identifier or path; their files are not touched.

        Raises:
            InvalidInput: One of them is not in the index; then nothing is removed.
            BusyError: Somebody else is writing this index.
        """
        started = time.monotonic()
        with WriterLock(self.folder), self._catalog(write=True) as catalog:
            self._clean(catalog)
            videos = catalog.videos(catalog.latest().id)
            by_name: dict[str | bytes, VideoRow] = {video.path: video for video in videos}
            by_name.update({video.video_id: video for video in videos})
            rows = set()
            for name in ids:
                video = by_name.get(name) or by_name.get(os.fsencode(os.path.abspath(name)))
                if video is None:
                    raise InvalidInput(f"{self.folder}: holds no video {name!r}; vlm index info lists them")
                rows.add(video.row)
            if rows:
                catalog.commit(Changes(removed_videos=sorted(rows)))
        self.refresh()
        return Report(num_removed=len(rows), duration_s=time.monotonic() - started)

    def info(self) -> dict[str, Any]:
        """Return counts, the rejected files, and what the index was made with and for; JSON-ready."""
        snapshot, manifest = self.snapshot, self.manifest
        with self._catalog() as catalog:
            rejections = catalog.rejections(snapshot.generation.id)
            files = catalog.files(snapshot.generation.id)
        return {
            "path": str(self.folder),
            "generation": snapshot.generation.id,
            "num_videos": snapshot.generation.num_videos,
            "num_segments": snapshot.generation.num_segments,
            "num_rejected": snapshot.generation.num_rejected,
            "rejected": [
                {"path": os.fsdecode(r.path), "reason": r.reason, "detail": r.detail} for r in rejections
            ],
            "model": manifest.model.source,
            "model_name": manifest.model.name,
            "model_domain": manifest.model.domain,
            "model_fingerprint": manifest.model.fingerprint,
            "segment_s": manifest.segment_s,
            "stride_s": manifest.stride_s,
            "dim": manifest.features.dim,
            "store_tokens": manifest.features.store_tokens,
            "token_bytes_per_segment": manifest.features.token_bytes,
            "size_bytes": sum(file.size_bytes for file in files),
            "duration_s": sum(video.duration_s for video in snapshot.videos),
        }

    def rows_where(self, condition: str, values: Sequence[object]) -> np.ndarray:
        """Return the keys of videos that satisfy a condition of `vlm.retrieval.filters`."""
        with self._catalog() as catalog:
            rows = catalog.query(f"SELECT id FROM videos WHERE {condition}", list(values))
        return np.array([row for (row,) in rows], np.int64)

    def verify(self) -> list[Finding]:
        """Compare every file with its hash, and the catalogue with its own chain of hashes.

        Returns:
            What is wrong, by file; empty if nothing is.
        """
        findings = []
        try:
            if hash_file(self.folder / "manifest.json") != self._manifest_sha256:
                findings.append(
                    Finding(name="manifest.json", problem="its content changed (checksum mismatch)")
                )
            with self._catalog() as catalog:
                findings += [
                    Finding(name="catalog.sqlite", problem=text)
                    for text in catalog.damaged(self._manifest_sha256)
                ]
                files = catalog.files(catalog.latest().id)
        except IntegrityError as error:
            return [*findings, Finding(name="catalog.sqlite", problem=str(error))]
        findings += [Finding(name=name, problem=text) for name, text in self.log.damaged(files)]
        return findings

    def files(self) -> list[LogFile]:
        """Return the files of the vector log that this reader's generation consists of."""
        with self._catalog() as catalog:
            return catalog.files(self.snapshot.generation.id)

    def _catalog(self, write: bool = False) -> Catalog:
        return Catalog.open(self.folder / "catalog.sqlite", write)

    def _settings(self, num_workers: int, patience_s: float) -> DecodeSettings:
        return DecodeSettings(
            preprocessing=self.manifest.preprocessing,
            segment_s=self.manifest.segment_s,
            stride_s=self.manifest.stride_s,
            patience_s=patience_s,
            num_workers=num_workers,
        )

    def _usable(self, model: VideoTextEncoder | None) -> VideoTextEncoder:
        if model is None:
            from vlm.models import load_model

            model = load_model(self.manifest.model.source)
        self.check_model(model)
        return model

    def _clean(self, catalog: Catalog) -> None:
        """Remove what a killed writer left behind."""
        known = {file.name for file in catalog.files(catalog.latest().id)}
        self.log.sweep(known)


def _report(outcome: Outcome, unchanged: int, other_files: dict[str, int], started: float) -> Report:
    return Report(
        num_added=outcome.num_added,
        num_updated=outcome.num_updated,
        num_unchanged=unchanged,
        num_segments=outcome.num_segments,
        rejected=tuple(outcome.rejected),
        other_files=other_files,
        duration_s=time.monotonic() - started,
    )


def _is_ours(entry: Path) -> bool:
    """Whether an entry of a folder may lie there when an index is created: leftovers of a killed creation."""
    return entry.name == "writer.lock" or entry.name.startswith((".tmp-", "catalog.sqlite"))
