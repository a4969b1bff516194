"""VideoMamba: video in, one token per patch and frame out, in time linear in their number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.models.mamba_block import BidirectionalMixer, MambaBlock, RMSNorm, drop_path, initialise_mixer
from vlm.models.masking import is_tube, keep_visible
from vlm.models.patch_embedding import ConvolutionalStem, PatchEmbedding, sinusoid_table

Pool = Literal["cls", "avg", "cls+avg", "cls_cat_avg"]
ScanOrder = Literal["spatial", "temporal", "alternating"]

# name: (width, depth)
SIZES = {"tiny": (192, 24), "small": (384, 24), "middle": (576, 32), "base": (768, 24)}


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoMambaConfig:
    """Sizes of the encoder; the defaults are the published ``middle`` model.

    Attributes:
        width: Channels of a token.
        depth: Blocks.
        num_frames: Frames of a clip; 1 makes an image model, without a table of times.
        image_size: Side of the square input in pixels.
        patch_size: Side of a patch in pixels.
        tubelet: Frames that share a token.
        channels: Colour channels.
        state_size: Scan state per channel.
        conv_width: Taps of the causal convolution.
        expand: Inner width over width.
        dt_rank: Rank of the step projection; 0 = a sixteenth of the width, rounded up.
        bidirectional: Scan backwards as well.
        drop_path: Rate of the last block's stochastic depth; it rises linearly from 0.
        pool: How tokens become a feature: the class token, their mean, the sum, or both side by side.
        pool_norm: Normalise that feature (the retrieval models do).
        norm_epsilon: Added under the root of every RMS norm.
        alignment_width: Width of the token-alignment heads; 0 = none.
        alignment_layers: How many blocks the alignment reads, the last one first.
        alignment_interval: Blocks between two that it reads.
        init: ``reference`` or ``mamba``, see ``initialise_mixer``.
        position_std: Spread of the table of places at the start; what a token shows has a spread near 1.
        time_std: Spread of the table of times at the start; the published models start it at zero.
        activation_checkpointing: Recompute blocks in the backward pass instead of storing them.
        stem: ``patch``: one linear map of each patch, as published; or ``convolutional``, see
            ``ConvolutionalStem``.
        scan_order: ``spatial``: frame by frame, as published; ``temporal``: place by place, each through all
            frames; ``alternating``: odd blocks spatial, the first and all even ones temporal.
        independent_frames: Encode each frame as a picture of its own: a bag of frames, a control that is
            blind to motion.
    """

    width: int = 576
    depth: int = 32
    num_frames: int = 8
    image_size: int = 224
    patch_size: int = 16
    tubelet: int = 1
    channels: int = 3
    state_size: int = 16
    conv_width: int = 4
    expand: int = 2
    dt_rank: int = 0
    bidirectional: bool = True
    drop_path: float = 0.0
    pool: Pool = "cls+avg"
    pool_norm: bool = True
    norm_epsilon: float = 1e-5
    alignment_width: int = 0
    alignment_layers: int = 1
    alignment_interval: int = 1
    init: Literal["reference", "mamba"] = "reference"
    position_std: float = 0.02
    time_std: float = 0.0
    activation_checkpointing: bool = False
    stem: Literal["patch", "convolutional"] = "patch"
    scan_order: ScanOrder = "spatial"
    independent_frames: bool = False

    def __post_init__(self) -> None:
        counts = ("width", "depth", "num_frames", "image_size", "patch_size", "tubelet", "channels")
        for name in (*counts, "state_size", "conv_width", "expand", "alignment_layers", "alignment_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.independent_frames and self.tubelet > 1:
            raise ValueError("independent_frames needs tubelet 1")
        if self.stem == "convolutional" and (
            self.tubelet > 1 or self.patch_size < 4 or self.patch_size.bit_count() != 1
        ):
            raise ValueError(
                "a convolutional stem needs tubelet 1 and a patch_size that is a power of two from 4, "
                f"got {self.tubelet} and {self.patch_size}"
            )
        if self.num_frames > 1 and self.num_frames % self.tubelet:
            raise ValueError(f"num_frames {self.num_frames} is not a multiple of tubelet {self.tubelet}")
        if self.position_std <= 0.0 or self.time_std < 0.0:
            raise ValueError(
                f"position_std must be above 0 and time_std at least 0, got {self.position_std} "
                f"and {self.time_std}"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def num_steps(self) -> int:
        """Time steps, which are tubelets."""
        return max(1, self.num_frames // self.tubelet)

    @property
    def rank(self) -> int:
        """Rank of the step projection."""
        return self.dt_rank or math.ceil(self.width / 16)


def sized(size: str, **settings: object) -> VideoMambaConfig:
    """Return the configuration of a published size: tiny, small, middle or base.

    Raises:
        ValueError: There is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    width, depth = SIZES[size]
    return VideoMambaConfig(**{"width": width, "depth": depth, **settings})  # type: ignore[arg-type]


class EncoderOutput(NamedTuple):
    """What the encoder returns.

    ``tokens`` (b, 1 + visible, d), normalised, the class token first; ``alignment``: one (b, 1 + visible, d)
    for each block that the token-alignment branch reads, ascending.
    """

    tokens: Tensor
    alignment: tuple[Tensor, ...]


class AlignmentHead(nn.Module):
    """Project tokens to a teacher's width and normalise them."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, teacher_width)
        self.norm = nn.LayerNorm(teacher_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (..., teacher width)."""
        projected: Tensor = self.norm(self.head(tokens).float())
        return projected


class VideoMamba(nn.Module):
    """The encoder. Parameters carry the names of the published files (there ``norm_f`` is ``norm`` here).

    Attributes:
        config: Its sizes.
        recompute: Whether training recomputes blocks in the backward pass; at first as the config says.

    Source: Li et al. 2024, VideoMamba: State Space Model for Efficient Video Understanding, section 3.2.
    """

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed: nn.Module = (
            PatchEmbedding(width, config.patch_size, config.tubelet, config.channels)
            if config.stem == "patch"
            else ConvolutionalStem(width, config.patch_size, config.channels)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, width))
        self.temporal_pos_embedding = (
            nn.Parameter(torch.zeros(1, config.num_steps, width)) if config.num_frames > 1 else None
        )
        rates = [0.0, *torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()]
        self.layers = nn.ModuleList(
            MambaBlock(self._mixer(), width, config.norm_epsilon, rates[index])
            for index in range(config.depth)
        )
        self.norm = RMSNorm(width, config.norm_epsilon)
        self.pool_norm = nn.LayerNorm(width) if config.pool_norm else None
        self.clip_decoder = nn.ModuleList(
            AlignmentHead(width, config.alignment_width)
            for _ in range(config.alignment_layers if config.alignment_width else 0)
        )
        self.recompute = config.activation_checkpointing
        self._initialise()

    def _mixer(self) -> BidirectionalMixer:
        config = self.config
        return BidirectionalMixer(
            config.width,
            state_size=config.state_size,
            conv_width=config.conv_width,
            expand=config.expand,
            dt_rank=config.rank,
            bidirectional=config.bidirectional,
        )

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=self.config.position_std)
        if self.temporal_pos_embedding is not None and self.config.time_std > 0.0:
            nn.init.normal_(self.temporal_pos_embedding, std=self.config.time_std)
        for block in self.layers:
            assert isinstance(block, MambaBlock)
            initialise_mixer(block.mixer, self.config.depth, self.config.init)
        for head in self.clip_decoder:
            assert isinstance(head, AlignmentHead)
            nn.init.trunc_normal_(head.head.weight, std=0.02)
            nn.init.zeros_(head.head.bias)

    def embed(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the tokens (b, 1 + visible, d) that enter the first block.

        Args:
            video: (b, t, channels, h, w), preprocessed.
            mask: (b, steps * patches) bool, True = dropped, the same number in every sample.

        Raises:
            ValueError: Frames, size or channels are not what the model was made for, or samples of the mask
                drop unequal numbers.
        """
        self._check(video)
        patches: Tensor = self.patch_embed(video)
        tokens = patches + self.pos_embed[:, 1:]
        if self.temporal_pos_embedding is not None and video.shape[1] > 1:
            tokens = tokens + rearrange(self.temporal_pos_embedding, "1 t d -> 1 t 1 d")
        tokens = rearrange(tokens, "b t n d -> b (t n) d")
        if mask is not None:
            tokens = keep_visible(tokens, mask)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        return torch.cat([first, tokens], dim=1).to(patches.dtype)

    def forward(self, video: Tensor, mask: Tensor | None = None) -> EncoderOutput:
        """Encode a video (b, t, channels, h, w); see ``embed`` for the mask and the errors."""
        if self.config.independent_frames and video.ndim == 5 and video.shape[1] > 1:
            return self._encode_frames(video, mask)
        if mask is not None:
            self._check_order(mask, video.shape[1])
        hidden: Tensor = self.embed(video, mask)
        residual: Tensor | None = None
        last = self.config.depth - 1
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        # the alignment of block j reads the residual stream after j, which block j + 1 is the first to know
        wanted = {min(index + 1, last) for index in self.alignment_blocks}
        streams: dict[int, Tensor] = {}
        for index, block in enumerate(self.layers):
            steps = self._scanned_steps(index, video.shape[1])
            if recompute:
                hidden, residual = checkpoint(block, hidden, residual, steps, use_reentrant=False)
            else:
                hidden, residual = block(hidden, residual, steps)
            assert residual is not None
            if index in wanted:
                streams[index] = residual
        hidden = drop_path(hidden, self.config.drop_path, self.training)
        tokens, _ = self.norm(hidden, residual)
        # the last as the published models were trained: before that block's output is added, not normalised
        alignment = tuple(
            streams[last] if index == last else self.norm(streams[index + 1])[0]
            for index in self.alignment_blocks
        )
        return EncoderOutput(tokens, alignment)

    def _check_order(self, mask: Tensor, num_frames: int) -> None:
        steps = self.config.num_steps if num_frames > 1 else 1
        if self.config.scan_order != "spatial" and not is_tube(mask, steps):
            raise ValueError(
                f"scan_order {self.config.scan_order!r} goes along time and needs the same places at all "
                "times: masks of kind 'tube'; others need scan_order 'spatial'"
            )

    def _scanned_steps(self, block: int, num_frames: int) -> int:
        """Return how many time steps the block visits at each place in a row; 1 = it goes frame by frame."""
        order = self.config.scan_order
        along_time = order == "temporal" or (order == "alternating" and block % 2 == 0)
        return self.config.num_steps if along_time and num_frames > 1 else 1

    def _encode_frames(self, video: Tensor, mask: Tensor | None) -> EncoderOutput:
        """Encode every frame by itself; the class token is the mean of theirs."""
        self._check(video)
        num_frames = video.shape[1]
        if mask is not None:
            if not is_tube(mask, num_frames):
                raise ValueError("a bag of frames drops the same places of all frames: masks of kind 'tube'")
            mask = rearrange(mask, "b (t n) -> (b t) n", t=num_frames)
        output = self(rearrange(video, "b t c h w -> (b t) 1 c h w"), mask)

        def joined(tokens: Tensor) -> Tensor:
            first = reduce(tokens[:, :1], "(b t) 1 d -> b 1 d", "mean", t=num_frames)
            patches = rearrange(tokens[:, 1:], "(b t) n d -> b (t n) d", t=num_frames)
            return torch.cat([first, patches], dim=1)

        return EncoderOutput(joined(output.tokens), tuple(map(joined, output.alignment)))

    @property
    def alignment_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that the token-alignment branch reads, ascending; empty without it."""
        config = self.config
        if not config.alignment_width:
            return ()
        blocks = (config.depth - 1 - k * config.alignment_interval for k in range(config.alignment_layers))
        return tuple(sorted(blocks))

    def align(self, output: EncoderOutput, mask: Tensor | None, num_frames: int) -> Tensor:
        """Project the alignment inputs to the teacher's width: (blocks, b, 1 + visible, teacher width).

        Args:
            output: What ``forward`` returned.
            mask: The mask it was given.
            num_frames: Frames of the input; one frame uses the table of a picture.

        Raises:
            ValueError: The model has no alignment heads.
        """
        if not output.alignment:
            raise ValueError("this encoder has no alignment heads; set alignment_width in its configuration")
        config = self.config
        num_positions = (config.num_steps if num_frames > 1 else 1) * config.grid**2 + 1
        tokens = output.tokens
        table = sinusoid_table(num_positions, config.width, tokens.device).expand(len(tokens), -1, -1)
        if mask is not None:
            table = torch.cat([table[:, :1], keep_visible(table[:, 1:], mask)], dim=1)
        heads = zip(self.clip_decoder, output.alignment, strict=True)
        return torch.stack([head(entry + table) for head, entry in heads])

    def pool(self, tokens: Tensor, num_steps: int | None = None) -> Tensor:
        """Pool normalised tokens (b, 1 + n, d) as configured, and normalise; see ``pool_tokens``."""
        pooled = pool_tokens(tokens, self.config.pool, num_steps)
        if self.pool_norm is None:
            return pooled
        normed: Tensor = self.pool_norm(pooled.to(self.pool_norm.weight.dtype))
        return normed.to(tokens.dtype)

    def _check(self, video: Tensor) -> None:
        config = self.config
        if video.ndim != 5:
            raise ValueError(
                f"expected video of shape (batch, frames, {config.channels}, {config.image_size}, "
                f"{config.image_size}), got {tuple(video.shape)}"
            )
        if video.shape[1] not in (1, config.num_frames):
            raise ValueError(
                f"this model takes {config.num_frames} frames (or 1, a picture), got {video.shape[1]}; "
                f"sample {config.num_frames} frames or load the model with num_frames={video.shape[1]}"
            )
        expected = (config.channels, config.image_size, config.image_size)
        if tuple(video.shape[2:]) != expected:
            raise ValueError(
                f"expected frames of shape {expected}, got {tuple(video.shape[2:])}; preprocess to that size "
                f"or load the model with image_size={video.shape[-1]}"
            )


def pool_tokens(tokens: Tensor, pool: Pool, num_steps: int | None = None) -> Tensor:
    """Pool tokens (b, 1 + n, d), the class token first.

    Args:
        tokens: Normalised tokens.
        pool: ``cls``: the class token, (b, 1, d) always; ``avg``: the mean of the patch tokens; ``cls+avg``:
            the sum of the two; ``cls_cat_avg``: the two side by side, (b, 2, d), but their sum where time is
            kept, as in the reference.
        num_steps: Keep time: pool that many consecutive runs of equal length, (b, steps, d). None pools the
            clip as a whole, (b, 1, d).

    Raises:
        ValueError: The patch tokens do not divide into the steps.
    """
    first, patches = tokens[:, :1], tokens[:, 1:]
    if pool == "cls":
        return first
    if patches.shape[1] % (num_steps or 1):
        raise ValueError(
            f"{patches.shape[1]} tokens do not divide into {num_steps} equal steps; pool the clip as a whole"
        )
    mean: Tensor = reduce(patches, "b (t n) d -> b t d", "mean", t=num_steps or 1)
    if pool == "avg":
        return mean
    if pool == "cls_cat_avg" and num_steps is None:
        return torch.cat([first, mean], dim=1)
    return first + mean
