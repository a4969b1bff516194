"""Shards: plain WebDataset tars with an index and hashes of their own."""

from __future__ import annotations

from vlm.data.shards.layout import Entry, Manifest, Member, Rejection, read_manifest
from vlm.data.shards.reader import RawSample, ShardReader
from vlm.data.shards.writer import ShardWriter

__all__ = [
    "Entry",
    "Manifest",
    "Member",
    "RawSample",
    "Rejection",
    "ShardReader",
    "ShardWriter",
    "read_manifest",
]
