"""How a search is to be done, apart from what is looked for; and whether that goes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlm.errors import CapabilityError, InvalidInput
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.retrieval.queries.values import Moment
from vlm.retrieval.words.search import NO_MODEL
from vlm.types import VideoTextEncoder

Aggregate = Literal["max", "mean"]
MinStrength = Literal["strong", "weak"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """What `Searcher.search` can be asked for; each is explained there.

    Raises:
        InvalidInput: A number is out of range, or two options do not go together.
    """

    top_k: int = 10
    offset: int = 0
    rerank: int = 0
    where: str | None = None
    aggregate: Aggregate = "max"
    min_strength: MinStrength | None = None
    unlike: Sequence[Moment] = ()
    group: bool = True
    words: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.offset < 0 or self.rerank < 0:
            raise InvalidInput(
                f"expected top_k >= 1, offset >= 0 and rerank >= 0, got {self.top_k}, {self.offset} "
                f"and {self.rerank}"
            )
        if self.aggregate not in ("max", "mean") or (self.rerank and self.aggregate == "mean"):
            raise InvalidInput(f"expected aggregate max, or mean without rerank, got {self.aggregate!r}")
        if self.min_strength not in (None, "strong", "weak"):
            raise InvalidInput(f"expected min_strength strong or weak, got {self.min_strength!r}")
        if self.words and self.aggregate == "mean":
            raise InvalidInput("expected aggregate max where words count, too")

    def check(self, model: VideoTextEncoder, encoded: EncodedQuery) -> None:
        """Raise `CapabilityError` if model or query lack what is asked for."""
        if self.rerank and encoded.text is None:
            raise CapabilityError("only texts can be reranked: the matching head compares a video and a text")
        if self.rerank and "rerank" not in model.capabilities:
            raise CapabilityError(f"model {model.name!r} ({model.kind}) cannot rerank; leave it out")
        if self.aggregate == "mean" and model.kind == NO_MODEL:
            raise CapabilityError("an index without a model has no scores of segments to take the mean of")
        if self.min_strength is not None and encoded.text is None:
            raise CapabilityError("only hits of a text are graded: they are compared with unrelated texts")
        if self.words and encoded.words is None:
            raise CapabilityError("only a text can be looked for in what is written about the videos")
