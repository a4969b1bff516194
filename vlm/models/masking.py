"""Which tokens a masked model does not see: True = dropped. The class token is never part of a mask.

Counts truncate towards zero, as in the published recipes: 80 % of 8 x 14 x 14 leaves 320 tokens where each
frame is counted alone, 314 where the clip is.

Source: Li et al. 2024, VideoMamba, section 3.4 and figure 5.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

Kind = Literal["random", "tube", "clip_row", "frame_row", "attention"]


def make_mask(
    kind: Kind,
    ratio: float,
    *,
    batch: int,
    num_steps: int,
    grid: tuple[int, int],
    attention: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one mask for each sample of a batch.

    Args:
        kind: ``random`` patches of the clip; ``tube``: one pattern for all steps; ``clip_row``: rows drawn
            over the whole clip; ``frame_row``: rows drawn in each step; ``attention``: in each step, patches
            are kept with a probability that follows a teacher's attention.
        ratio: Share that is dropped, in [0, 1).
        batch: Samples.
        num_steps: Time steps, which are tubelets.
        grid: Patches along height and width.
        attention: (b, steps, patches), at least 0, for ``attention`` only.
        generator: Source of randomness, on the CPU (of the attention's device for ``attention``).

    Returns:
        (b, steps * patches) bool, True = dropped.

    Raises:
        ValueError: The kind is unknown, the ratio impossible, or the attention missing or of another shape.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")
    rows, columns = grid
    patches = rows * columns
    if kind == "random":
        total = num_steps * patches  # first: float products do not associate, and the counts truncate
        return _choose(batch, total, int(ratio * total), generator)
    if kind == "tube":
        pattern = _choose(batch, patches, int(ratio * patches), generator)
        tube: Tensor = repeat(pattern, "b n -> b (t n)", t=num_steps)
        return tube
    if kind == "clip_row":
        rows_of_clip = _choose(batch, num_steps * rows, num_steps * int(ratio * rows), generator)
        return rows_of_clip.repeat_interleave(columns, dim=1)
    if kind == "frame_row":
        rows_of_steps = _choose(batch * num_steps, rows, int(ratio * rows), generator)
        return rows_of_steps.reshape(batch, -1).repeat_interleave(columns, dim=1)
    if kind == "attention":
        expected = (batch, num_steps, patches)
        if attention is None or tuple(attention.shape) != expected:
            got = None if attention is None else tuple(attention.shape)
            raise ValueError(f"mask kind 'attention' needs attention of shape {expected}, got {got}")
        return _follow(attention, patches - int(patches * ratio), generator)
    raise ValueError(f"mask kind must be random, tube, clip_row, frame_row or attention, got {kind!r}")


def is_even(mask: Tensor, num_steps: int) -> bool:
    """Return whether every time step of every sample keeps the same number of tokens."""
    kept = rearrange(~mask, "b (t n) -> b t n", t=num_steps).sum(dim=2)
    return bool((kept == kept.flatten()[0]).all())


def is_tube(mask: Tensor, num_steps: int) -> bool:
    """Return whether the same places are dropped at every time step of a sample."""
    steps = rearrange(mask, "b (t n) -> b t n", t=num_steps)
    return bool((steps == steps[:, :1]).all())


def keep_visible(tokens: Tensor, mask: Tensor) -> Tensor:
    """Drop the masked ones (True) of (b, n, d), keeping the order: (b, visible, d).

    Raises:
        ValueError: The mask does not fit, or samples drop unequal numbers.
    """
    if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"expected a bool mask of shape {tuple(tokens.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
        )
    counts = (~mask).sum(dim=1)
    if int(counts.min()) != int(counts.max()):
        raise ValueError(
            "every sample must keep the same number of tokens, "
            f"got {int(counts.min())} to {int(counts.max())}"
        )
    return tokens[~mask].reshape(len(tokens), -1, tokens.shape[-1])


def _choose(batch: int, total: int, masked: int, generator: torch.Generator | None) -> Tensor:
    """Choose ``masked`` of ``total`` places at random in each row."""
    order = torch.rand(batch, total, generator=generator).argsort(dim=1)
    mask = torch.zeros(batch, total, dtype=torch.bool)
    return mask.scatter_(1, order[:, :masked], True)


def _follow(attention: Tensor, visible: int, generator: torch.Generator | None) -> Tensor:
    """Keep ``visible`` patches of each step, drawn without replacement in proportion to the attention."""
    weights = rearrange(attention, "b t n -> (b t) n").double()
    # the largest of log(weight) + Gumbel noise are such a draw, also where weights are zero
    noise = torch.rand(weights.shape, generator=generator, dtype=torch.float64, device=weights.device)
    keys = weights.clamp_min(1e-300).log() - (-noise.clamp_min(1e-300).log()).log()
    kept = keys.topk(visible, dim=1).indices
    mask = torch.ones_like(weights, dtype=torch.bool).scatter_(1, kept, False)
    return mask.reshape(attention.shape[0], -1)
