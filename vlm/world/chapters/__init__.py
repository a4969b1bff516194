"""Long videos of the digit world: scenes one after another, and the stretch of each in seconds."""

from vlm.world.chapters.videos import LongVideo, sample_long, write_long

__all__ = ["LongVideo", "sample_long", "write_long"]
