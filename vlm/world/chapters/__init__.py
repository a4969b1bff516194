"""Long videos of the digit world: scenes one after another; the stretch of each, or which came first."""

from vlm.world.chapters.videos import LongVideo, sample_long, write_long

__all__ = ["LongVideo", "sample_long", "write_long"]
