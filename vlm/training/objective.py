"""One update's losses: the model forward, the pairs to match, the words to guess, and their weighted sum.

Every random choice is a pure function of (seed, step) over the global batch, so neither the number of
processes nor an interruption changes what is learned from.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm import distributed
from vlm.losses.claims import finding_loss, telling_loss
from vlm.losses.contrastive import GatherMode, embedding_contrastive_loss
from vlm.losses.masked_language import (
    IGNORED,
    MaskingRule,
    mask_tokens,
    masked_language_loss,
    masking_draws,
)
from vlm.losses.matching import matching_loss, matching_pairs
from vlm.models.video_mamba import EncoderOutput
from vlm.training.schedule import Curve, check_curve, first_without, is_ever_positive, value_at
from vlm.training.teaching.alignment import Alignment, AlignmentConfig, View
from vlm.training.teaching.distillation import Distillation, DistillationConfig
from vlm.types import Batch, TextFeatures, TokenBatch, VideoFeatures

TEMPERATURE_LIMITS = (0.001, 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig:
    """Video-text contrastive loss.

    Attributes:
        weight: Factor, a number or a curve over steps.
        mode: ``gradient`` (true over processes), ``local_gradient`` (as published), ``none`` (no gather).
    """

    weight: Curve = 1.0
    mode: GatherMode = "gradient"

    def __post_init__(self) -> None:
        check_curve("losses.contrastive.weight", self.weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchingConfig:
    """Video-text matching loss.

    Attributes:
        weight: Factor, a number or a curve over steps; while it is 0 the fusion layers do not run.
        num_negatives: Negatives for each video and each text, drawn by the model's own similarity.
        num_siblings: Further negatives drawn from the clip's minimal-pair group.
        candidates: ``global``: negatives from all processes' clips; ``local``: from one's own, as published.
        detach_video: Whether the matching loss leaves the video encoder alone.
    """

    weight: Curve = 1.0
    num_negatives: int = 1
    num_siblings: int = 0
    candidates: Literal["global", "local"] = "global"
    detach_video: bool = False

    def __post_init__(self) -> None:
        check_curve("losses.matching.weight", self.weight)
        if self.num_negatives < 0 or self.num_siblings < 0:
            raise ValueError("num_negatives and num_siblings must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedLanguageConfig:
    """Masked language loss, with the video in view.

    Attributes:
        weight: Factor, a number or a curve over steps.
        probability: Share of the words that are hidden.
        words: Words that are hidden by preference; all alike if empty.
        other_words: Factor on ``probability`` for all other words when ``words`` are given.
    """

    weight: Curve = 0.0
    probability: float = 0.5
    words: tuple[str, ...] = ()
    other_words: float = 0.0

    def __post_init__(self) -> None:
        check_curve("losses.masked_language.weight", self.weight)
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must be in (0, 1], got {self.probability}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossesConfig:
    """The parts of the training loss."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    masked_language: MaskedLanguageConfig = field(default_factory=MaskedLanguageConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    @property
    def weights(self) -> tuple[Curve, ...]:
        """The curve of each part's weight."""
        parts = (self.contrastive, self.matching, self.masked_language, self.alignment, self.distillation)
        return tuple(part.weight for part in parts)

    def check(self, max_steps: int) -> None:
        """Raise ValueError unless every one of ``max_steps`` updates has a weight above 0."""
        if not (self.use_text or self.use_video):
            raise ValueError("losses: at least one weight must be above 0")
        idle = first_without(self.weights, max_steps)
        if idle is not None:
            raise ValueError(
                f"losses: at least one weight must be above 0 at every step, none is at step {idle} (the "
                "first is step 0); let one rise before the others end"
            )

    def check_pictures(self, max_steps: int) -> None:
        """Raise ValueError unless pictures have something to learn at every step."""
        if self.alignment.picture_ratio is not None:
            return
        rest = replace(self, alignment=AlignmentConfig())
        idle = first_without(rest.weights, max_steps)
        if idle is not None:
            raise ValueError(
                "losses.alignment.picture_ratio is null, which leaves pictures to the other losses, but none "
                f"of them is above 0 at step {idle}; set a ratio, such as 0.5"
            )

    @property
    def use_text(self) -> bool:
        """Whether any part reads text; without, the model to train is an encoder alone."""
        return any(
            is_ever_positive(part.weight) for part in (self.contrastive, self.matching, self.masked_language)
        )

    @property
    def use_video(self) -> bool:
        """Whether any part needs no text."""
        return any(is_ever_positive(part.weight) for part in (self.alignment, self.distillation))


def step_seed(*counters: int) -> int:
    """Return 63 bits that depend on every counter, such as (seed, step, purpose)."""
    state = np.random.SeedSequence(counters).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def step_generator(*counters: int) -> torch.Generator:
    """Return a CPU generator seeded with ``step_seed``."""
    return torch.Generator().manual_seed(step_seed(*counters))


class Objective(nn.Module):
    """Wraps the model so that an engine sees one call from batch to loss.

    Args:
        model: A ``VideoTextModel``; an ``EncoderModel`` will do if no loss reads text.
        config: Weights and rules of the losses.
        seed: The run's seed.
        masking: How words are hidden; needed if the masked-language loss is used.
        alignment: Masks videos and knows the teacher's tokens; needed if that loss is used.
        distillation: Knows the smaller encoder's tokens; needed if that loss is used.
        autocast: Whether matrix products run in bf16 (weights stay fp32).
        parts: Batches of an update; each has its own random draws, and pairs within itself alone.
    """

    def __init__(
        self,
        model: Any,
        config: LossesConfig,
        *,
        seed: int,
        masking: MaskingRule | None = None,
        alignment: Alignment | None = None,
        distillation: Distillation | None = None,
        autocast: bool = False,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.seed = seed
        self.parts = parts
        self.masking = masking
        self.alignment = alignment
        self.distillation = distillation
        self.autocast = autocast

    def forward(self, batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss of this process's part of batch ``number``, from 0, and its terms.

        The terms are detached and unweighted. Batch ``number`` belongs to update ``number // parts``.
        """
        seed = step_seed(self.seed, number, 1, distributed.rank())
        torch.manual_seed(seed)  # dropout, if the model has any
        frames = batch.video.shape[1]
        with torch.autocast(batch.video.device.type, torch.bfloat16, enabled=self.autocast):
            view = self._view(batch, number)
            mask = None if view is None else view.mask
            output: EncoderOutput = self.model.vision_encoder(batch.video, mask)
            parts = {
                "alignment": self._alignment(output, view, frames, number),
                "distillation": self._distillation(output, batch.video, mask, number),
            }
            if self.config.use_text:
                videos = self.model.video_features(output, frames, mask, self._keeps_time(view))
                parts |= self._text_losses(videos, batch, number)
        weighted = [weight * loss for weight, loss in parts.values() if loss is not None]
        total = torch.stack(weighted).sum()
        return total, {name: loss.detach() for name, (_, loss) in parts.items() if loss is not None}

    def _view(self, batch: Batch, number: int) -> View | None:
        """Return what the student may see of the batch, None for all."""
        if self.alignment is None or self._weight(self.config.alignment.weight, number) <= 0:
            return None
        rows = range(batch.offset, batch.offset + len(batch.video))
        return self.alignment.view(batch.video, [step_generator(self.seed, number, 4, row) for row in rows])

    def _weight(self, curve: Curve, number: int) -> float:
        return value_at(curve, number // self.parts)

    def _keeps_time(self, view: View | None) -> bool:
        return view is None or self.alignment is None or self.alignment.keeps_time

    def _alignment(
        self, output: EncoderOutput, view: View | None, num_frames: int, number: int
    ) -> tuple[float, Tensor | None]:
        weight = self._weight(self.config.alignment.weight, number)
        if self.alignment is None or view is None:
            return weight, None
        return weight, self.alignment.loss(output, view, num_frames)

    def _distillation(
        self, output: EncoderOutput, video: Tensor, mask: Tensor | None, number: int
    ) -> tuple[float, Tensor | None]:
        weight = self._weight(self.config.distillation.weight, number)
        if self.distillation is None or weight <= 0:
            return weight, None
        return weight, self.distillation(video, output.tokens, mask)

    def _text_losses(
        self, videos: VideoFeatures, batch: Batch, number: int
    ) -> dict[str, tuple[float, Tensor | None]]:
        with torch.no_grad():
            self.model.temp.clamp_(*TEMPERATURE_LIMITS)
        texts = self.model.encode_text(_equal_length(batch.text))
        return {
            "contrastive": self._contrastive(videos, texts, batch, number),
            "matching": self._matching(videos, texts, batch, number),
            "masked_language": self._masked_language(videos, batch.text, number),
        }

    def _contrastive(
        self, videos: VideoFeatures, texts: TextFeatures, batch: Batch, number: int
    ) -> tuple[float, Tensor | None]:
        weight = self._weight(self.config.contrastive.weight, number)
        if weight <= 0:
            return weight, None
        if batch.claims:
            embeddings = videos.embedding.float(), texts.embedding.float()
            return weight, finding_loss(*embeddings, self.model.temp, batch.positives)
        loss = embedding_contrastive_loss(
            videos.embedding.float(),
            texts.embedding.float(),
            self.model.temp,
            batch.positives,
            mode=self.config.contrastive.mode,
        )
        return weight, loss

    def _matching(
        self, videos: VideoFeatures, texts: TextFeatures, batch: Batch, number: int
    ) -> tuple[float, Tensor | None]:
        config = self.config.matching
        weight = self._weight(config.weight, number)
        if weight <= 0:
            return weight, None
        if batch.claims:
            tokens = videos.tokens.detach() if config.detach_video else videos.tokens
            return weight, telling_loss(self._logits(tokens, texts.tokens, texts.mask))
        everywhere = config.candidates == "global"
        share = distributed.gather if everywhere else _keep
        window = slice(None) if everywhere else slice(batch.offset, batch.offset + len(batch.video))
        with torch.no_grad():
            similarity = share(videos.embedding.float()) @ share(texts.embedding.float()).T / self.model.temp
        pairs = matching_pairs(
            similarity,
            batch.positives[window, window],
            num_negatives=config.num_negatives,
            siblings=None if batch.siblings is None else batch.siblings[window, window],
            num_siblings=config.num_siblings,
            generator=step_generator(self.seed, number, 2, 0 if everywhere else distributed.rank()),
        )
        total = len(pairs.label)
        if everywhere:  # each process scores its share of the one list of pairs
            turn = torch.arange(total, device=pairs.label.device) % distributed.world_size()
            pairs = pairs.select(turn == distributed.rank())
        video_tokens = videos.tokens.detach() if config.detach_video else videos.tokens
        logits = self._logits(
            share(video_tokens)[pairs.video], share(texts.tokens)[pairs.text], share(texts.mask)[pairs.text]
        )
        return weight, matching_loss(
            logits, pairs.label, total / distributed.world_size() if everywhere else None
        )

    def _logits(self, video_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        # not match: a model that is still to learn it does not say yet that it can
        logits: Tensor = self.model.matching_logits(video_tokens.float(), text_tokens.float(), mask)
        return logits

    def _masked_language(
        self, videos: VideoFeatures, text: TokenBatch, number: int
    ) -> tuple[float, Tensor | None]:
        weight = self._weight(self.config.masked_language.weight, number)
        if weight <= 0:
            return weight, None
        assert self.masking is not None
        rows, length = text.input_ids.shape
        draws = masking_draws(rows * distributed.world_size(), length, step_generator(self.seed, number, 3))
        own = draws[distributed.rank() * rows :][:rows].to(text.input_ids.device)
        masked = mask_tokens(text.input_ids, self.masking, own)
        logits = self.model.masked_language_logits(masked.input_ids, text.attention_mask, videos.tokens)
        hidden = distributed.all_sum((masked.labels != IGNORED).sum()).clamp_min(1)
        return weight, masked_language_loss(logits, masked.labels, hidden / distributed.world_size())


def _keep(tensor: Tensor) -> Tensor:
    return tensor


def _equal_length(text: TokenBatch) -> TokenBatch:
    """Pad to the longest text of all processes, so that token features can be gathered."""
    if distributed.world_size() == 1:
        return text
    more = distributed.all_max(text.input_ids.shape[1]) - text.input_ids.shape[1]
    return TokenBatch(F.pad(text.input_ids, (0, more)), F.pad(text.attention_mask, (0, more)))
