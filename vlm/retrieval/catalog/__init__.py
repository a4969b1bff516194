"""What an index holds, and since when: one SQLite file whose transactions are the only commit point."""

from vlm.retrieval.catalog.database import Catalog
from vlm.retrieval.catalog.rows import Changes, Generation, Rejection, Span, VideoRow

__all__ = ["Catalog", "Changes", "Generation", "Rejection", "Span", "VideoRow"]
