"""Hits for other programs: a table, or marks in the files of editing programs."""

from vlm.retrieval.exports.writing import FORMATS, export_hits

__all__ = ["FORMATS", "export_hits"]
