"""The assembled model: video and text into one space, the matching head, the masked-language head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from vlm.errors import InvalidInput
from vlm.models.classifier import preprocessing_of
from vlm.models.fusion import fuse
from vlm.models.graphs import GraphedEncoder
from vlm.models.masking import is_even
from vlm.models.text_encoder import TextEncoder, TextEncoderConfig
from vlm.models.video_mamba import EncoderOutput, VideoMamba, VideoMambaConfig
from vlm.models.video_model import VideoModel, mean_of_directions
from vlm.text import Tokenizer, bert_tokenizer, join_statement
from vlm.types import Answer, Preprocessing, TextFeatures, TokenBatch, VideoFeatures

# the range that the published training clamps the temperature to
COLDEST, WARMEST = 0.001, 0.5
# weights of the matching head and of the embeddings in a multiple choice
MATCHING_SHARE, EMBEDDING_SHARE = 0.7, 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoTextConfig:
    """Sizes of the whole model; the defaults are the published retrieval model.

    Attributes:
        vision: The video encoder.
        text: The text encoder with its fusion layers.
        embedding_width: Width of the space that videos and texts share.
        temperature: Where the contrastive temperature starts.
    """

    vision: VideoMambaConfig = field(default_factory=VideoMambaConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    embedding_width: int = 512
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.text.vision_width != self.vision.width:
            raise ValueError(
                f"text.vision_width must equal vision.width {self.vision.width}, got {self.text.vision_width}"
            )
        if not COLDEST <= self.temperature <= WARMEST:
            raise ValueError(f"temperature must be in [{COLDEST}, {WARMEST}], got {self.temperature}")
        if self.embedding_width < 1:
            raise ValueError(f"embedding_width must be at least 1, got {self.embedding_width}")


class VideoTextModel(VideoModel):
    """Video search, reranking and multiple choice.

    Parameters carry the names of the published files. Encoding is differentiable; wrap it in
    ``torch.inference_mode()`` when no gradient is wanted.

    Source: Li et al. 2024, VideoMamba, section 3.4; Li et al. 2023, Unmasked Teacher, section 3.3.
    """

    kind: ClassVar[str] = "video-text"
    default_capabilities: ClassVar[frozenset[str]] = frozenset({"search", "rerank", "choose"})
    config: VideoTextConfig

    def __init__(
        self,
        config: VideoTextConfig,
        *,
        tokenizer: Tokenizer | None = None,
        preprocessing: Preprocessing | None = None,
        name: str = "unnamed",
        domain: str = "open",
        capabilities: Collection[str] | None = None,
    ) -> None:
        super().__init__(
            preprocessing=preprocessing or preprocessing_of(config.vision),
            name=name,
            domain=domain,
            capabilities=capabilities,
        )
        self.config = config
        self._tokenizer: Tokenizer | None = None
        self.vision_encoder = VideoMamba(config.vision)
        self._graphed = GraphedEncoder(self.vision_encoder)
        self.text_encoder = TextEncoder(config.text)
        self.vision_proj = nn.Linear(config.vision.width, config.embedding_width)
        self.text_proj = nn.Linear(config.text.width, config.embedding_width)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.itm_head = nn.Linear(config.text.width, 2)
        if tokenizer is not None:
            self.tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Cuts texts into the ids that this model knows.

        Raises:
            InvalidInput: The model came without one, and BERT's vocabulary is nowhere to be found.
        """
        if self._tokenizer is None:
            self.tokenizer = bert_tokenizer()
        assert self._tokenizer is not None
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        if tokenizer.vocabulary_size > self.config.text.vocabulary_size:
            raise InvalidInput(
                f"the tokenizer has {tokenizer.vocabulary_size} ids, but the model knows "
                f"{self.config.text.vocabulary_size}; give the tokenizer that it was trained with"
            )
        self._tokenizer = tokenizer

    def forward(self, video: Tensor, texts: list[str] | TokenBatch) -> tuple[VideoFeatures, TextFeatures]:
        """Encode a batch of pairs; see ``encode_video`` and ``encode_text``."""
        return self.encode_video(video), self.encode_text(texts)

    def encode_video(
        self, video: Tensor, *, mask: Tensor | None = None, keep_temporal: bool = True
    ) -> VideoFeatures:
        """Encode preprocessed video.

        Args:
            video: (b, t, 3, h, w); one frame is a picture and gets no time embedding.
            mask: (b, steps * patches) bool, True = dropped.
            keep_temporal: Pool each time step by itself; else the whole clip, ``pooled`` (b, 1, d).

        Returns:
            Tokens (b, visible, d) without the class token, pooled (b, t/tubelet, d), embedding (b, e): the
            mean over time steps of the L2-normalised projections, not renormalised.

        Raises:
            ValueError: Frames or size are not what the model was made for, or the mask leaves the time steps
                unequal numbers of tokens although ``keep_temporal``.
        """
        if self._graphed.encoder is not self.vision_encoder:
            self._graphed = GraphedEncoder(self.vision_encoder)
        return self.video_features(self._graphed(video, mask), video.shape[1], mask, keep_temporal)

    def video_features(
        self, output: EncoderOutput, num_frames: int, mask: Tensor | None = None, keep_temporal: bool = True
    ) -> VideoFeatures:
        """Pool and project what the encoder returned; arguments as in ``encode_video``."""
        steps = (self.config.vision.num_steps if num_frames > 1 else 1) if keep_temporal else None
        if mask is not None and steps is not None and not is_even(mask, steps):
            raise ValueError("the mask leaves unequal numbers of tokens per step; pass keep_temporal=False")
        pooled = self.vision_encoder.pool(output.tokens, steps)
        return VideoFeatures(output.tokens[:, 1:], pooled, mean_of_directions(self.vision_proj(pooled)))

    def project_frames(self, pooled: Tensor) -> Tensor:
        """Return the unit vectors (b, t, e) of pooled features (b, t, d); the embedding is their mean."""
        return F.normalize(self.vision_proj(pooled).float(), dim=-1)

    def encode_text(self, texts: list[str] | TokenBatch, *, max_tokens: int | None = None) -> TextFeatures:
        """Encode texts, alone.

        Args:
            texts: Raw texts, which are cleaned and tokenised, or ready tokens.
            max_tokens: Where raw texts are cut, with a warning; the table of positions by default.

        Returns:
            Tokens (b, l, d) of the text layers, the mask, and the L2-normalised embedding (b, e) in fp32.

        Raises:
            InvalidInput: Raw texts were given, and there is no tokenizer.
            ValueError: Ready tokens are longer than the table of positions.
        """
        ids, mask = self.tokenize(texts, max_tokens)
        tokens: Tensor = self.text_encoder(ids, mask)
        embedding = F.normalize(self.text_proj(tokens[:, 0]).float(), dim=-1)
        return TextFeatures(tokens, mask, embedding)

    def tokenize(self, texts: list[str] | TokenBatch, max_tokens: int | None = None) -> TokenBatch:
        """Return tokens on the model's device; raw texts are cleaned and cut at ``max_tokens``."""
        if not isinstance(texts, TokenBatch):
            limit = self.config.text.max_positions
            texts = self.tokenizer(texts, max_tokens=min(max_tokens or limit, limit))
        return TokenBatch(texts.input_ids.to(self.device), texts.attention_mask.to(self.device))

    def match(self, video_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Score pairs with the matching head.

        Args:
            video_tokens: (pairs, n, d) of ``encode_video``; or of fewer videos, each of as many texts side by
                side.
            text_tokens: (pairs, l, width) of ``encode_text``.
            mask: (pairs, l), 1 = real token.

        Returns:
            (pairs, 2) fp32 logits, index 1 = match.

        Raises:
            CapabilityError: The model was not trained to match.
            ValueError: The number of texts is no multiple of that of videos.
        """
        self.require("rerank")
        # features that were kept between runs are fp32, whatever the model runs in
        dtype = self.itm_head.weight.dtype
        return self.matching_logits(video_tokens.to(dtype), text_tokens.to(dtype), mask)

    def matching_logits(self, video_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Do what ``match`` does for any model, trained to match or still to be trained."""
        fused = fuse(self.text_encoder, text_tokens, mask, video_tokens)
        logits: Tensor = self.itm_head(fused[:, 0])
        return logits.float()

    def masked_language_logits(self, input_ids: Tensor, mask: Tensor, video_tokens: Tensor) -> Tensor:
        """Predict the words at every position: (b, l, vocabulary) of ids (b, l) and video tokens (b, n, d).

        Raises:
            CapabilityError: The model has no masked-language head.
            ValueError: The numbers of videos and texts differ.
        """
        if self.text_encoder.cls is None:
            self._lacks("predict masked words")
        fused = fuse(self.text_encoder, self.text_encoder(input_ids, mask), mask, video_tokens)
        return self.text_encoder.language_logits(fused)

    @property
    def logit_scale(self) -> float | None:
        """What cosines are multiplied by beside the matching head: 1 / temperature; None without the head."""
        if "rerank" not in self.capabilities:
            return None
        return 1 / float(self.temp.detach().clamp(COLDEST, WARMEST))

    def temperature(self) -> Tensor:
        """Clamp the contrastive temperature into its range, in place, and return it."""
        with torch.no_grad():
            self.temp.clamp_(COLDEST, WARMEST)
        return self.temp

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of ``text`` that the vocabulary cannot express, in order."""
        return self.tokenizer.unknown_words(text)

    def answer(
        self,
        video: Tensor,
        questions: Sequence[str],
        candidates: Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> list[Answer]:
        """Choose the best candidate for each question.

        Args:
            video: (b, t, 3, h, w), one for each question, or a single one for all.
            questions: The questions; empty strings judge the candidates as statements.
            candidates: One list for all questions, or a list for each.

        Returns:
            One answer for each question, its score that of ``score_candidates``.

        Raises:
            CapabilityError: There are no candidates and no answer decoder, or no trained matching head.
            ValueError: Videos, questions and candidates do not fit together.
        """
        if candidates is None:
            self._lacks("answer without candidates")
        choices = [list(options) for options in _options(candidates, len(questions))]
        scores = self.score_candidates(video, questions, choices)
        best = [int(row.argmax()) for row in scores]
        return [
            Answer(text=choices[index][column], score=float(scores[index][column]))
            for index, column in enumerate(best)
        ]

    @torch.no_grad()
    def score_candidates(
        self, video: Tensor, questions: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[Tensor]:
        """Score every candidate of every question: 0.7 matching probability + 0.3 share of the embeddings.

        Args:
            video: (b, t, 3, h, w), one for each question, or a single one for all.
            questions: The questions.
            candidates: The candidates of each question, at least one.

        Returns:
            For each question the scores (candidates,) in fp32.

        Raises:
            CapabilityError: The model was not trained to match.
            ValueError: Videos, questions and candidates do not fit together.

        Source: Li et al. 2023, Unmasked Teacher, multiple choice on MSR-VTT.
        """
        parts = self.candidate_parts(video, questions, candidates)
        return [MATCHING_SHARE * matching + EMBEDDING_SHARE * shares for matching, shares in parts]

    @torch.no_grad()
    def candidate_parts(
        self,
        video: Tensor,
        questions: Sequence[str],
        candidates: Sequence[Sequence[str]],
        *,
        max_tokens: int | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return what ``score_candidates`` mixes, with the same arguments and errors.

        Args:
            video: As there.
            questions: As there.
            candidates: As there.
            max_tokens: Where a question with its candidate is cut; the model's own limit by default.

        Returns:
            For each question the probability that each candidate matches, and the candidates' softmax of
            their embeddings' cosines over the temperature; both (candidates,) in fp32.
        """
        self.require("choose")
        if len(video) not in (1, len(questions)):
            raise ValueError(f"expected 1 or {len(questions)} videos for as many questions, got {len(video)}")
        choices = _options(candidates, len(questions))
        features = self.encode_video(video)
        parts = []
        for index, (question, options) in enumerate(zip(questions, choices, strict=True)):
            row = index if len(video) > 1 else 0
            statements = [join_statement(question, option) for option in options]
            texts = self.encode_text(self.tokenize(statements, max_tokens))
            tokens = repeat(features.tokens[row], "n d -> c n d", c=len(options))
            matching = self.matching_logits(tokens, texts.tokens, texts.mask).softmax(dim=-1)[:, 1]
            cosines = texts.embedding @ features.embedding[row]
            shares = (cosines / self.temp.float().clamp(COLDEST, WARMEST)).softmax(dim=0)
            parts.append((matching, shares))
        return parts


def _options(candidates: Sequence[str] | Sequence[Sequence[str]], num_questions: int) -> list[Sequence[str]]:
    """Return one non-empty list of candidates for each question."""
    if candidates and all(isinstance(candidate, str) for candidate in candidates):
        shared = [str(candidate) for candidate in candidates]
        return [shared] * num_questions
    lists: list[Sequence[str]] = [[str(option) for option in options] for options in candidates]
    if len(lists) != num_questions or not all(lists):
        raise ValueError(
            f"expected candidates for each of {num_questions} questions, at least one each, "
            f"got {len(lists)} lists"
        )
    return lists
