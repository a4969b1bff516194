"""Whether what a search is asked for goes together, and with the model."""

from __future__ import annotations

from typing import Literal

from vlm.errors import CapabilityError, InvalidInput
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.types import VideoTextEncoder

Aggregate = Literal["max", "mean"]
MinStrength = Literal["strong", "weak"]


def check_wishes(
    model: VideoTextEncoder,
    encoded: EncodedQuery,
    *,
    top_k: int,
    offset: int,
    rerank: int,
    aggregate: Aggregate,
    min_strength: MinStrength | None,
    words: bool,
) -> None:
    """Raise what `Searcher.search` raises for wishes that do not go together, or with query and model."""
    if top_k < 1 or offset < 0 or rerank < 0:
        raise InvalidInput(
            f"expected top_k >= 1, offset >= 0 and rerank >= 0, got {top_k}, {offset} and {rerank}"
        )
    if rerank and encoded.text is None:
        raise CapabilityError("only texts can be reranked: the matching head compares a video and a text")
    if rerank and "rerank" not in model.capabilities:
        raise CapabilityError(f"model {model.name!r} ({model.kind}) cannot rerank; leave it out")
    if aggregate not in ("max", "mean") or (rerank and aggregate == "mean"):
        raise InvalidInput(f"expected aggregate max, or mean without rerank, got {aggregate!r}")
    if min_strength not in (None, "strong", "weak"):
        raise InvalidInput(f"expected min_strength strong or weak, got {min_strength!r}")
    if min_strength is not None and encoded.text is None:
        raise CapabilityError("only hits of a text are graded: they are compared with unrelated texts")
    if words and encoded.words is None:
        raise CapabilityError("only a text can be looked for in what is written about the videos")
    if words and aggregate == "mean":
        raise InvalidInput("expected aggregate max where words count, too")
