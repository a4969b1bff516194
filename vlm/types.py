"""The typed values that travel between the parts: batches, features, segments, hits, answers.

Tensor shapes use these letters: b batch, t frames, l text positions, n tokens, d width, e embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TokenBatch(NamedTuple):
    """Tokenised texts. ``input_ids`` (b, l) int64; ``attention_mask`` (b, l) int64, 1 = real token."""

    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How frames become the encoder's input; part of every model, stored with every index and card.

    Attributes:
        num_frames: Frames sampled from a clip.
        image_size: Side of the square input, in pixels.
        resize: Interpolation kernel; ``bicubic`` or ``bilinear``.
        antialias: Whether the resize low-pass filters when shrinking (the reference does not).
        keep_aspect: Resize the short side and crop the centre, instead of squeezing to a square.
        mean: Per-channel mean subtracted from RGB in [0, 1].
        std: Per-channel divisor.
    """

    num_frames: int = 8
    image_size: int = 224
    resize: str = "bicubic"
    antialias: bool = False
    keep_aspect: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class VideoFeatures(NamedTuple):
    """Encoded videos: ``tokens`` (b, n, d), no CLS; ``pooled`` (b, t/tubelet, d); ``embedding`` (b, e)."""

    tokens: Tensor
    pooled: Tensor
    embedding: Tensor


class TextFeatures(NamedTuple):
    """Encoded texts: ``tokens`` (b, l, d), ``mask`` (b, l) 1 = real token, ``embedding`` (b, e)."""

    tokens: Tensor
    mask: Tensor
    embedding: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One training or evaluation batch.

    Attributes:
        video: (b, t, 3, h, w) float32, preprocessed.
        text: Tokenised captions, one for each video.
        positives: (B, B) bool over the *global* batch: ``positives[i, j]`` = text j is true of video i. Rows
            and columns of this process start at ``offset``.
        offset: Index of this process's first sample in the global batch.
        keys: Sample identifiers, length b.
        siblings: (B, B) bool, pairs whose clips differ in one thing only (minimal pairs, reversed twins);
            None where the source knows of none.
        corpus: Name of the corpus that the batch is of; empty where there is one only.
        claims: How many claims about each video ``text`` holds, those of one video side by side, a true and a
            false one in turn; ``positives`` is (B, B claims) then. 0 where each text is a caption.
    """

    video: Tensor
    text: TokenBatch
    positives: Tensor
    offset: int = 0
    keys: tuple[str, ...] = ()
    siblings: Tensor | None = None
    corpus: str = ""
    claims: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of a video, in seconds from its first frame: [start_s, end_s)."""

    video_id: str
    path: str
    start_s: float
    end_s: float


# how a hit compares with what unrelated texts find; the last is "no better than those"
Strength = Literal["strong", "weak", "unrelated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicate:
    """A video that shows the same footage as a hit's.

    Attributes:
        video_id: Its identifier.
        path: Where its file was when it was indexed.
        start_s: Where the common stretch begins in it, in seconds.
        end_s: Where that ends.
        own_start_s: Where the same stretch begins in the hit's video.
        own_end_s: Where that ends.
    """

    video_id: str
    path: str
    start_s: float
    end_s: float
    own_start_s: float
    own_end_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One search result.

    Attributes:
        rank: 1 for the best.
        video_id: Stable identifier of the video in its index.
        path: Where the file was when it was indexed.
        start_s: Where the matching segment begins, in seconds.
        end_s: Where it ends, in seconds.
        score: The score that ranked it.
        score_kind: ``itc`` (embedding), ``itc_mean`` (embedding, mean over the video's segments), ``itm@k``
            (matching head over the first k), ``itm+itc@k`` (head and embedding together), ``rrf`` (rank by
            embedding and by words), ``words``, ``look`` (likeness of a frame), ``dsl`` or ``bank``.
        warning: Set when the hit must not be trusted, for example from the demo model on real videos.
        strength: ``strong``, ``weak``, or ``unrelated``: no better than what unrelated texts find in the same
            index. None for queries that are not one text.
        duplicates: Videos left out of the hits because they show this moment, too.
    """

    rank: int
    video_id: str
    path: str
    start_s: float
    end_s: float
    score: float
    score_kind: str
    warning: str | None = None
    strength: Strength | None = None
    duplicates: tuple[Duplicate, ...] = ()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Hit:
        """Return the hit that `dataclasses.asdict` and JSON made `values` of."""
        duplicates = tuple(Duplicate(**one) for one in values["duplicates"])
        return cls(**{**values, "duplicates": duplicates})


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer to a question: its text, a score to compare candidates by, and the evidence's place."""

    text: str
    score: float
    evidence: tuple[Segment, ...] = field(default=())


class VideoTextEncoder(Protocol):
    """What evaluation, indexing and search need of a model; every model of ``load_model`` offers it.

    Attributes:
        name: Short name for reports, such as ``demo`` or ``videomamba-m-25m``.
        kind: ``video-text``, ``classifier``, ``encoder`` or ``frames``. Of the last, the embedding of a clip
            is the mean of the embeddings of its frames, each encoded as a clip of its own.
        domain: What the model knows: ``open`` or a narrow world such as ``digit-world``.
        capabilities: A subset of ``search``, ``rerank``, ``choose``, ``answer``, ``when``, ``classify``.
        fingerprint: Hash of the weights and configuration; an index or cached feature belongs to one.
        preprocessing: How its input is made.
        logit_scale: What cosines were multiplied by in the contrastive loss that the matching head's hard
            negatives were drawn by (1 / temperature); None without such a head, or if nobody knows.
    """

    @property
    def name(self) -> str:
        """Short name for reports."""

    @property
    def kind(self) -> str:
        """What sort of model it is."""

    @property
    def domain(self) -> str:
        """What the model knows."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How its input is made."""

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and configuration."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def logit_scale(self) -> float | None:
        """What cosines were multiplied by in the contrastive loss beside the matching head."""

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Encode preprocessed video (b, t, 3, h, w)."""

    def encode_text(self, texts: list[str] | TokenBatch) -> TextFeatures:
        """Encode texts."""

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of ``text`` that the model's vocabulary cannot express, in order."""

    def match(self, video_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Score pairs with the matching head: (pairs, 2) logits, index 1 = match."""
