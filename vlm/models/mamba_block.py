"""One bidirectional Mamba block: add, normalise, mix along the sequence in both directions."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from vlm.ops import Branch, add_rms_norm, bidirectional_mamba

SMALLEST_STEP, LARGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4


class BidirectionalMixer(nn.Module):
    """Gated selective scans, forward and backward, that share the projections in and out.

    Both directions read the same projected input; their outputs are added, never halved. Parameters carry
    the names of the published files: ``_b`` marks those of the backward direction.

    Source: Li et al. 2024, VideoMamba, section 3.1; Zhu et al. 2024, Vision Mamba, section 3.2.
    """

    def __init__(
        self, width: int, *, state_size: int, conv_width: int, expand: int, dt_rank: int, bidirectional: bool
    ) -> None:
        super().__init__()
        inner = expand * width
        self.bidirectional = bidirectional
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_width, groups=inner, padding=conv_width - 1)
        self.x_proj = nn.Linear(inner, dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner)
        self.A_log = nn.Parameter(_decay_rates(inner, state_size))
        self.D = nn.Parameter(torch.ones(inner))
        if bidirectional:
            self.conv1d_b = nn.Conv1d(inner, inner, conv_width, groups=inner, padding=conv_width - 1)
            self.x_proj_b = nn.Linear(inner, dt_rank + 2 * state_size, bias=False)
            self.dt_proj_b = nn.Linear(dt_rank, inner)
            self.A_b_log = nn.Parameter(_decay_rates(inner, state_size))
            self.D_b = nn.Parameter(torch.ones(inner))

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix (b, l, width) along l; same shape and dtype."""
        forward = _branch(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        backward = (
            _branch(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
            if self.bidirectional
            else None
        )
        mixed: Tensor = self.out_proj(bidirectional_mamba(self.in_proj(tokens), forward, backward))
        return mixed


class RMSNorm(nn.Module):
    """The weight of a root-mean-square norm that adds its input to the residual stream first."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the norm of ``hidden + residual`` in hidden's dtype, and that sum in fp32."""
        normed, total = add_rms_norm(hidden, residual, self.weight, self.epsilon)
        return normed, total


class MambaBlock(nn.Module):
    """Add the previous block's output to the residual stream, normalise the sum, mix it."""

    def __init__(self, mixer: BidirectionalMixer, width: int, epsilon: float, drop_path: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, epsilon)
        self.mixer = mixer
        self.drop_path = drop_path

    def forward(self, hidden: Tensor, residual: Tensor | None, num_steps: int = 1) -> tuple[Tensor, Tensor]:
        """Return this block's output (b, l, d), not yet added, and the residual stream in fp32.

        With ``num_steps`` above 1 the block scans along time first: tokens (t n) are visited as (n t).
        """
        if residual is not None:
            hidden = drop_path(hidden, self.drop_path, self.training)
        normed, residual = self.norm(hidden, residual)
        if num_steps == 1:
            return self.mixer(normed), residual
        num_places = (normed.shape[1] - 1) // num_steps
        return _reordered(self.mixer(_reordered(normed, num_steps)), num_places), residual


def _reordered(tokens: Tensor, outer: int) -> Tensor:
    """Exchange the two loops over the tokens behind the class token; ``outer`` is the outer one's length."""
    patches = rearrange(tokens[:, 1:], "b (outer inner) d -> b (inner outer) d", outer=outer)
    return torch.cat([tokens[:, :1], patches], dim=1)


def drop_path(hidden: Tensor, rate: float, training: bool) -> Tensor:
    """Zero a whole sample's branch with probability ``rate`` while training, scaling up the others.

    Source: Huang et al. 2016, Deep Networks with Stochastic Depth, section 3.
    """
    if rate == 0.0 or not training:
        return hidden
    shape = (hidden.shape[0],) + (1,) * (hidden.ndim - 1)
    kept = torch.empty(shape, dtype=hidden.dtype, device=hidden.device).bernoulli_(1.0 - rate)
    return hidden * (kept / (1.0 - rate))


def initialise_mixer(mixer: BidirectionalMixer, depth: int, style: str) -> None:
    """Fill a mixer's weights.

    ``reference`` repeats what the published training code does in effect: its general rule for linear layers
    runs last and wipes Mamba's step sizes, so every step starts near softplus(0). ``mamba`` keeps them, in
    both directions.

    Source: Gu and Dao 2023, Mamba, section 3.6 (step sizes).
    """
    for name, module in mixer.named_modules():
        if not isinstance(module, nn.Linear) or name == "out_proj":
            continue
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
    with torch.no_grad():
        mixer.out_proj.weight /= math.sqrt(depth)
    if style == "mamba":
        _initialise_steps(mixer.dt_proj)
        if mixer.bidirectional:
            _initialise_steps(mixer.dt_proj_b)


def _initialise_steps(projection: nn.Linear) -> None:
    """Draw step sizes log-uniformly and store them through the inverse of softplus."""
    bound = projection.in_features**-0.5
    nn.init.uniform_(projection.weight, -bound, bound)
    low, high = math.log(SMALLEST_STEP), math.log(LARGEST_STEP)
    step = torch.empty_like(projection.bias).uniform_(low, high).exp().clamp(min=STEP_FLOOR)
    with torch.no_grad():
        projection.bias.copy_(step + torch.log(-torch.expm1(-step)))


def _branch(conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> Branch:
    """Collect one direction's parameters; an adapter in place of a projection is called as it is."""
    if type(dt_proj) is nn.Linear:  # its bias enters in fp32, beside the softplus
        return Branch(conv.weight, conv.bias, x_proj, dt_proj.weight, dt_proj.bias, A_log, D)
    return Branch(conv.weight, conv.bias, x_proj, dt_proj, None, A_log, D)


def _decay_rates(inner: int, state_size: int) -> Tensor:
    return torch.arange(1, state_size + 1, dtype=torch.float32).log().repeat(inner, 1)
