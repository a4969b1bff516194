"""Texts, pictures and video files through the model, to be compared with what is indexed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm.data.decoding.image import read_image
from vlm.errors import InvalidInput
from vlm.retrieval.duplicates.hashing import grey_of, hash_frames
from vlm.retrieval.filters import check_text
from vlm.retrieval.ingest.events import DecodeSettings
from vlm.retrieval.ingest.pool import decode_one
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.retrieval.queries.values import Clip
from vlm.retrieval.words.search import NO_MODEL
from vlm.text import TruncationWarning
from vlm.types import TextFeatures, VideoTextEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_QUERY_CHARACTERS = 20_000
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class QueryEncoder:
    """Encodes queries that come from outside the index.

    Args:
        model: The index's model.
    """

    def __init__(self, model: VideoTextEncoder) -> None:
        self.model = model

    def decode(self, path: Path) -> Clip:
        """Return what `encode` makes of an image or video file first; this needs no model, only its measures.

        Raises:
            DataError: The file cannot be read.
        """
        is_image = path.suffix.lower() in IMAGE_SUFFIXES
        return Clip(self._image_clip(read_image(path)) if is_image else self._video_clip(path))

    def encode(self, query: str | os.PathLike[str] | Image | np.ndarray | Clip) -> EncodedQuery:
        """Return a text, image or file as a vector.

        Raises:
            InvalidInput: The query is empty, or an array that is no picture.
            DataError: The image or video file cannot be read.
        """
        import torch

        if isinstance(query, str):
            text = self._encode_text(query)
            vector = text.embedding[0].float().cpu().numpy()
            return EncodedQuery(vector=vector, text=None if self._has_no_model else text, words=query)
        if isinstance(query, os.PathLike):
            query = self.decode(Path(query))
        if isinstance(query, Clip):
            clip = query.frames
        else:
            clip = self._image_clip(
                np.asarray(query if isinstance(query, np.ndarray) else query.convert("RGB"))
            )
        with torch.inference_mode():
            features = self.model.encode_video(torch.from_numpy(clip[None]).to(device=self.model.device))
        vector = features.embedding[0].float().cpu().numpy()
        if not self._has_no_model:
            return EncodedQuery(vector=vector)
        # of a clip, the frame in its middle stands for it
        look = hash_frames(clip[len(clip) // 2 :][:1], grey_of(self.model.preprocessing))[0]
        return EncodedQuery(vector=vector, look=int(look))

    @property
    def _has_no_model(self) -> bool:
        return self.model.kind == NO_MODEL

    def unknown_words(self, query: str) -> list[str]:
        """Return the words of a text that the model cannot understand."""
        return self.model.unknown_words(query[:MAX_QUERY_CHARACTERS])

    def _encode_text(self, query: str) -> TextFeatures:
        import torch

        if not query.strip():
            raise InvalidInput("the query is empty; say what should happen in the video")
        check_text(query, "query")
        if len(query) > MAX_QUERY_CHARACTERS:
            warnings.warn(
                f"the query has {len(query)} characters; only the first {MAX_QUERY_CHARACTERS} are read",
                TruncationWarning,
                stacklevel=4,
            )
        # a text is then the same vector on every machine, and nobody waits for threads of a busy one
        with torch.inference_mode(), _one_thread():
            return self.model.encode_text([query[:MAX_QUERY_CHARACTERS]])

    def _image_clip(self, pixels: np.ndarray) -> np.ndarray:
        from vlm.data.preprocessing import preprocess

        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
            raise InvalidInput(
                f"an image must be uint8 (height, width, 3), got {pixels.dtype} {pixels.shape}"
            )
        clip: np.ndarray = preprocess(pixels[None], self.model.preprocessing).numpy()
        return clip

    def _video_clip(self, path: Path) -> np.ndarray:
        # one clip over the whole file, however long: its gist, not one of its moments
        settings = DecodeSettings(preprocessing=self.model.preprocessing, segment_s=1e9, stride_s=1e9)
        return decode_one(path, settings)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep tensor operations in the calling thread.

    A text is too little work to wait for other threads, and its sums then do not depend on their number.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
