"""Files into an index whose writer lock is held: compare with what is there, embed the rest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from vlm.retrieval.catalog import Catalog
from vlm.retrieval.ingest.events import CPU, DecodeSettings
from vlm.retrieval.ingest.planning import Plan, plan_sources
from vlm.retrieval.ingest.run import Ingest, Outcome
from vlm.retrieval.manifest import Manifest
from vlm.retrieval.vector_log import VectorLog
from vlm.types import VideoTextEncoder


def add_files(
    catalog: Catalog,
    log: VectorLog,
    manifest: Manifest,
    model: VideoTextEncoder,
    files: Sequence[Path],
    *,
    roots: Sequence[bytes] = (),
    batch_size: int = 8,
    num_workers: int = 1,
    patience_s: float = 60.0,
    decode_with: str = CPU,
    allow_narrow_model: bool = False,
    rehash: bool = False,
    drop_gone: bool | Collection[bytes] = False,
) -> tuple[Outcome, Plan]:
    """Bring files in; on return all is committed. A file that is gone is rejected like a broken one.

    Args:
        catalog: The index's, open for writing.
        log: The index's.
        manifest: The index's.
        model: The one that `manifest` names.
        files: What to index, in order.
        roots: What was asked for, which `vlm index update` will look at again.
        batch_size: Segments encoded at once.
        num_workers: Processes that decode.
        patience_s: See `DecodeSettings`.
        decode_with: See `DecodeSettings`.
        allow_narrow_model: Index videos that are not of the model's domain.
        rehash: Compare contents even where size and modification time are as they were.
        drop_gone: Remove the videos whose files are gone; all, or those of these paths.

    Raises:
        InvalidInput: A video is not of the model's domain, which was not allowed, or no such device is there.
        NoSpaceError: The disk is full; what was committed before stands.
    """
    plan = plan_sources(catalog, files, rehash=rehash, drop_gone=drop_gone)
    if plan.changes:
        catalog.commit(plan.changes)
    settings = replace(
        _cut_as(manifest), patience_s=patience_s, num_workers=num_workers, decode_with=decode_with
    )
    ingest = Ingest(
        catalog,
        log,
        model,
        manifest.features,
        settings,
        batch_size=batch_size,
        allow_narrow_model=allow_narrow_model,
        roots=roots,
    )
    return ingest.run(plan.new), plan


def _cut_as(manifest: Manifest) -> DecodeSettings:
    return DecodeSettings(
        preprocessing=manifest.preprocessing,
        segment_s=manifest.segment_s,
        stride_s=manifest.stride_s,
        segmentation=manifest.segmentation,
        grid_step_s=manifest.grid_step_s,
    )
