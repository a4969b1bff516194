"""An index folder: created for one model, added to, removed from, read at one generation, verified."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import build, to_dict
from vlm.errors import ConfigError, IntegrityError, InvalidInput, VlmError
from vlm.retrieval.backends.cache import stated
from vlm.retrieval.catalog import Catalog, Changes, VideoRow
from vlm.retrieval.durability import WriterLock, is_leftover, sweep_temporaries, write_bytes_durably
from vlm.retrieval.embedding import StoreTokens, choose_grid, choose_layout
from vlm.retrieval.ingest.adding import add_files
from vlm.retrieval.ingest.scanning import scan_paths
from vlm.retrieval.manifest import (
    FORMAT,
    Manifest,
    Snapshot,
    check_model,
    describe,
    go_on,
    identify,
    load_snapshot,
)
from vlm.retrieval.reports import Finding, Report, report_of
from vlm.retrieval.segments import Segmentation, check_lengths
from vlm.retrieval.upkeep.verification import verify_folder
from vlm.retrieval.vector_log import LogFile, LogVectors, VectorLog
from vlm.types import VideoTextEncoder


class VideoIndex:
    """An index folder. Reading holds the generation that was newest at `open` or `refresh`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.log = VectorLog(folder)
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
            is_store = (folder / "manifest.lance").exists()
            advice = "it is a published store: add --backend lance" if is_store else "run vlm index build"
            raise InvalidInput(
                f"{folder}: no index there ({file.name}: {error.strerror}); {advice}"
            ) from error
        with Catalog.open(folder / "catalog.sqlite") as catalog:
            expected = catalog.manifest_sha256()
        if hashlib.sha256(content).hexdigest() != expected:
            raise IntegrityError(
                f"{file}: its content changed (checksum mismatch); run vlm index verify {folder} --repair"
            )
        try:
            manifest = build(Manifest, json.loads(content), where=str(file))
        except (ValueError, ConfigError) as error:
            raise InvalidInput(f"{file}: not the manifest of a {FORMAT} index ({error})") from error
        if manifest.format != FORMAT:
            raise InvalidInput(
                f"{file}: expected format {FORMAT}, got {manifest.format!r}; rebuild the index"
            )
        return cls(folder, manifest)

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
        segmentation: Segmentation = "even",
    ) -> VideoIndex:
        """Make an empty index for a model.

        Args:
            path: A folder that does not exist or is empty.
            model: What will embed the videos and the queries.
            source: How `load_model` finds it again; its name if None.
            segment_s: Length of a segment, in seconds.
            stride_s: From one segment's start to the next, in seconds.
            store_tokens: Which features to keep for reranking; see `choose_layout`.
            segmentation: ``shots`` lets no segment cross from one shot into another.

        Raises:
            InvalidInput: The folder holds something else, or the stride leaves gaps.
            CapabilityError: The model cannot search, or cannot use stored tokens.
        """
        check_lengths(segment_s, stride_s)
        features = choose_layout(model, store_tokens, stride_s)
        manifest = Manifest(
            format=FORMAT,
            model=identify(model, source),
            preprocessing=model.preprocessing,
            features=features,
            segment_s=float(segment_s),
            stride_s=float(stride_s),
            segmentation=segmentation,
            grid_step_s=choose_grid(model, features, segment_s, stride_s),
        )
        return cls.create_for(path, manifest)

    @classmethod
    def create_for(cls, path: Path | str, manifest: Manifest) -> VideoIndex:
        """Make an empty index with a given manifest.

        Raises:
            InvalidInput: The folder holds something else.
        """
        folder = Path(os.path.abspath(path))
        if folder.exists() and (
            not folder.is_dir() or any(not is_leftover(entry) for entry in folder.iterdir())
        ):
            is_index = (folder / "manifest.json").exists()
            what = "is an index already; open it, or" if is_index else "exists and is no index;"
            raise InvalidInput(f"{folder}: {what} choose another place")
        folder.mkdir(parents=True, exist_ok=True)
        with WriterLock(folder):
            sweep_temporaries(folder)
            # the manifest comes last: with it the index exists, and a crash before is simply started over
            for leftover in folder.glob("catalog.*"):
                leftover.unlink()
            content = json.dumps(to_dict(manifest), indent=2).encode() + b"\n"
            Catalog.create(folder / "catalog.sqlite", content)
            write_bytes_durably(folder / "manifest.json", content)
        return cls.open(folder)

    def discard_if_empty(self) -> None:
        """Remove the folder's files if nothing was ever committed."""
        if self.refresh().generation.id:
            return
        with WriterLock(self.folder) as lock:
            for path in (self.folder / "manifest.json", *self.folder.glob("catalog.*")):
                path.unlink(missing_ok=True)
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
        """Go on to the newest generation; only what is new is read, unless the index was compacted."""
        with self._catalog() as catalog:
            catalog.query("BEGIN")  # a compaction must not come between two readings
            generation = catalog.latest()
            if self._snapshot is None:
                self._snapshot = load_snapshot(catalog, generation)
            elif self._snapshot.generation != generation:
                self._snapshot = go_on(catalog, generation, self._snapshot)
        return self._snapshot

    def fork(self) -> VideoIndex:
        """Return another reader that holds the same generation, and goes on by itself."""
        return copy.copy(self)

    def is_newest(self) -> bool:
        """Whether nothing was committed since."""
        with self._catalog() as catalog:
            return catalog.latest().id == self.snapshot.generation.id

    def roots(self) -> tuple[Path, ...]:
        """Return the files and folders that were ever indexed, all links followed."""
        with self._catalog() as catalog:
            return tuple(Path(os.path.realpath(os.fsdecode(root))) for root in catalog.roots())

    def check_model(self, model: VideoTextEncoder) -> None:
        """Raise InvalidInput unless `model` is the one that made this index."""
        check_model(self.manifest, model, self.folder)

    def add(
        self,
        paths: Iterable[Path | str],
        *,
        model: VideoTextEncoder | None = None,
        batch_size: int = 8,
        num_workers: int = 1,
        patience_s: float = 60.0,
        decode_with: str = "cpu",
        allow_narrow_model: bool = False,
        rehash: bool = False,
        drop_gone: bool = False,
        first: str | None = None,
    ) -> Report:
        """Index the videos among files and folders; what is there and unchanged is not embedded again.

        Every video file is added, unchanged, renamed, or rejected with a reason. Work is committed as it
        goes: run it again after an interruption and it continues.

        Args:
            paths: Files (taken whatever their names) and folders (searched for video files).
            model: The index's model; loaded by its recorded source if None.
            batch_size: Segments encoded at once.
            num_workers: Processes that decode.
            patience_s: Longest time that opening a file, or decoding one segment, may take.
            decode_with: ``cpu``, or a device (``cuda``, ``cuda:1``, ``vaapi``); the frames are the same.
            allow_narrow_model: Index videos that are not of the model's domain.
            rehash: Compare contents even where size and modification time are as they were.
            drop_gone: Remove the videos whose files are gone.
            first: Which files come first, see `scan_paths`.

        Raises:
            InvalidInput: A path does not exist; the model is another one, or does not fit the videos.
            BusyError: Somebody else is writing this index.
            NoSpaceError: The disk is full; what was committed before stands.
        """
        scan = scan_paths(paths := list(paths), self.folder, first)
        model, started = self._usable(model), time.monotonic()
        with self.writing() as catalog:
            outcome, plan = add_files(
                catalog,
                self.log,
                self.manifest,
                model,
                scan.files,
                roots=[os.fsencode(os.path.abspath(path)) for path in paths],
                batch_size=batch_size,
                num_workers=num_workers,
                patience_s=patience_s,
                decode_with=decode_with,
                allow_narrow_model=allow_narrow_model,
                rehash=rehash,
                drop_gone=drop_gone,
            )
        self.refresh()
        return report_of(outcome, plan, scan.other_files, time.monotonic() - started)

    def update(self, *, model: VideoTextEncoder | None = None, **options: Any) -> Report:
        """Bring the index in line with the files and folders that were ever added: new, changed, moved, gone.

        Raises:
            InvalidInput: One of those folders is gone as a whole, with files that are known (an unmounted
                disk looks like this).
        """
        with self._catalog() as catalog:
            roots = [Path(os.fsdecode(root)) for root in catalog.roots()]
            rejected = catalog.rejections(catalog.latest().id)
        known = [one.path for one in self.snapshot.videos] + [one.path for one in rejected]
        inhabited = {folder for path in known for folder in Path(os.fsdecode(path)).parents}
        missing = [root for root in roots if root in inhabited and not root.exists()]
        if missing:
            raise InvalidInput(
                f"{missing[0]}: this folder is gone as a whole; if that is meant, remove its videos with "
                "vlm index remove"
            )
        present = [root for root in roots if root.exists()]
        return self.add(present, model=model, drop_gone=True, **options)

    def remove(self, ids: Iterable[str]) -> Report:
        """Take videos out of the index, by identifier or path; their files are not touched.

        Raises:
            InvalidInput: One of them is not in the index; then nothing is removed.
            BusyError: Somebody else is writing this index.
        """
        started = time.monotonic()
        with self.writing() as catalog:
            videos = catalog.videos(catalog.latest().id)
            by_name: dict[str | bytes, VideoRow] = {video.path: video for video in videos}
            by_name.update({video.video_id: video for video in videos})
            roots, rows, removed_roots = catalog.roots(), set(), set()
            for name in ids:
                video = by_name.get(name) or by_name.get(os.fsencode(os.path.abspath(name)))
                if video is None:
                    raise InvalidInput(f"{self.folder}: holds no video {name!r}; see vlm index info --videos")
                rows.add(video.row)
                if video.path in roots:
                    removed_roots.add(roots[video.path])
            if rows:
                catalog.commit(Changes(removed_videos=sorted(rows), removed_roots=sorted(removed_roots)))
        self.refresh()
        return Report(num_removed=len(rows), duration_s=time.monotonic() - started)

    def info(self) -> dict[str, Any]:
        """Return counts, the rejected files, and what the index was made with and for; JSON-ready."""
        snapshot, manifest = self.snapshot, self.manifest
        with self.held() as catalog:
            rejections = catalog.rejections(snapshot.generation.id)
        return {
            "path": str(self.folder),
            **describe(manifest, snapshot),
            "rejected": [
                {"path": os.fsdecode(r.path), "reason": r.reason, "detail": r.detail} for r in rejections
            ],
            "store_tokens": manifest.features.store_tokens,
            "token_bytes_per_segment": manifest.features.token_bytes,
            "size_bytes": sum(file.size_bytes for file in snapshot.files),
            "num_dead_segments": int(np.count_nonzero(~snapshot.alive)),
            "structure": stated(self.folder / "ann"),
        }

    def rows_where(self, condition: str, values: Sequence[object]) -> np.ndarray:
        """Return the keys of videos that satisfy a condition of `vlm.retrieval.filters`."""
        with self.held() as catalog:
            rows = catalog.query(f"SELECT id FROM videos WHERE {condition}", list(values))
        return np.array([row for (row,) in rows], np.int64)

    def verify(self) -> list[Finding]:
        """Compare every file with its hash, and the catalogue with its own chain of hashes.

        Returns:
            What is wrong, by file; empty if nothing is.
        """
        return verify_folder(self.folder)

    def files(self) -> list[LogFile]:
        """Return the files of the vector log that this reader's generation consists of."""
        self.check_held()
        return list(self.snapshot.files)

    def vectors(self, known: LogVectors | None = None) -> LogVectors:
        """Return all vectors of this reader's generation; files that `known` ones hold are not opened again.

        Raises:
            BusyError: It was compacted away; `refresh` goes on.
            IntegrityError: A file is missing or not the array that was written.
        """
        try:
            return LogVectors(self.log, self.files(), self.manifest.features.dim, known)
        except IntegrityError:
            self.check_held()
            raise

    def check_held(self) -> None:
        """Raise BusyError if the generation that this reader holds was compacted away."""
        with self.held():
            pass

    @contextmanager
    def writing(self) -> Iterator[Catalog]:
        """Give the catalogue to the only writer, swept of what a killed one left; seal it afterwards.

        Raises:
            BusyError: Somebody else is writing this index.
        """
        with WriterLock(self.folder), self._catalog(write=True) as catalog:
            sweep_temporaries(self.folder)
            self._sweep(catalog)
            try:
                yield catalog
            except BaseException:
                # what was committed stands; without a seal it is vouched for by its chain of digests
                with suppress(VlmError, OSError):
                    catalog.seal()
                raise
            catalog.seal()

    def _sweep(self, catalog: Catalog) -> None:
        known = {file.name for file in catalog.files(catalog.latest().id)}
        # a damaged catalogue may not know its own parts, and what it does not know would be gone for good
        if self.log.strays(known) and (problems := catalog.damaged(catalog.manifest_sha256())):
            raise IntegrityError(f"{catalog.path}: {problems[0]}; run vlm index verify {self.folder}")
        self.log.sweep(known)

    @contextmanager
    def held(self) -> Iterator[Catalog]:
        """Give a catalogue in which this reader's generation is there."""
        with self._catalog() as catalog:
            catalog.hold(self.snapshot.generation)
            yield catalog

    def _catalog(self, write: bool = False) -> Catalog:
        return Catalog.open(self.folder / "catalog.sqlite", write)

    def _usable(self, model: VideoTextEncoder | None) -> VideoTextEncoder:
        if model is None:
            from vlm.retrieval.words.no_model import load_encoder

            model = load_encoder(self.manifest.model.source)
        self.check_model(model)
        return model
