"""Text tokens look at video tokens: what the matching head and the masked-language head read."""

from __future__ import annotations

from torch import Tensor

from vlm.models.text_encoder import TextEncoder, padding_bias


def fuse(encoder: TextEncoder, text_tokens: Tensor, mask: Tensor, video_tokens: Tensor) -> Tensor:
    """Run the fusion layers on encoded texts.

    Args:
        encoder: Where the fusion layers live.
        text_tokens: (pairs, l, text width) from the text layers.
        mask: (pairs, l), 1 = real token.
        video_tokens: (pairs, n, video width), without the class token; all are attended to. Or of fewer
            videos, each of as many texts side by side.

    Returns:
        (pairs, l, text width).

    Raises:
        ValueError: The number of texts is no multiple of that of videos.
    """
    if len(text_tokens) % len(video_tokens):
        raise ValueError(
            f"expected as many videos as texts, or a part of it, got {len(video_tokens)} and "
            f"{len(text_tokens)}; repeat one of them"
        )
    bias = padding_bias(mask)
    video_tokens = video_tokens.to(text_tokens.dtype)
    for layer in encoder.fusion_layers:
        text_tokens = layer(text_tokens, bias, video_tokens)
    return text_tokens
