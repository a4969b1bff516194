"""The text side in BERT's layout: embeddings, text layers, then fusion layers that also attend to video."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# what the published models add to the score of a padding token
PADDING_SCORE = -10000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """Sizes of the text encoder; the defaults are BERT-base with its last three layers for fusion.

    Attributes:
        vocabulary_size: Number of token ids.
        width: Channels of a text token.
        num_layers: All layers, text and fusion.
        fusion_layer: Index of the first fusion layer; the layers before it are the text encoder.
        num_heads: Attention heads.
        intermediate_width: Inner width of the feed-forward part.
        max_positions: Longest text in tokens.
        token_types: Rows of the token type table, of which the first is used.
        vision_width: Width of the video tokens that fusion attends to.
        dropout: Rate of every dropout.
        norm_epsilon: Added to the variance by every layer norm.
        has_language_head: Whether there is a masked-language head.
    """

    vocabulary_size: int = 30522
    width: int = 768
    num_layers: int = 12
    fusion_layer: int = 9
    num_heads: int = 12
    intermediate_width: int = 3072
    max_positions: int = 512
    token_types: int = 2
    vision_width: int = 576
    dropout: float = 0.1
    norm_epsilon: float = 1e-12
    has_language_head: bool = True

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if not 0 <= self.fusion_layer <= self.num_layers:
            raise ValueError(f"fusion_layer must be in 0..{self.num_layers}, got {self.fusion_layer}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class LayerNorm(nn.LayerNorm):
    """A layer norm computed in fp32 that returns its input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class Embeddings(nn.Module):
    """Token ids to vectors: word, position and the first token type, normalised."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.width)
        self.LayerNorm = LayerNorm(config.width, eps=config.norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return (b, l, width).

        Raises:
            ValueError: The text is longer than the table of positions.
        """
        length = input_ids.shape[1]
        if length > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"expected at most {self.position_embeddings.num_embeddings} text tokens, got {length}; "
                "truncate the text"
            )
        total = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        embedded: Tensor = self.dropout(self.LayerNorm(total + self.position_embeddings.weight[:length]))
        return embedded


class Projections(nn.Module):
    """Queries, keys and values of several heads; keys and values may come from another width."""

    def __init__(self, config: TextEncoderConfig, context_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(context_width, config.width)
        self.value = nn.Linear(context_width, config.width)

    def forward(self, tokens: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        """Attend from (b k, l, width) to (b, n, context width); ``bias`` (b, 1, 1, n) is added to scores.

        k texts side by side look at one context, whose keys and values are made once.
        """
        heads, count = "b n (h d) -> b h n d", len(tokens) // len(context)
        query = rearrange(self.query(tokens), "(b k) l (h d) -> b h (k l) d", h=self.num_heads, k=count)
        key = rearrange(self.key(context), heads, h=self.num_heads)
        value = rearrange(self.value(context), heads, h=self.num_heads)
        rate = self.dropout if self.training else 0.0
        dtype = query.dtype
        slow = query.device.type == "cpu" and dtype == torch.bfloat16  # its backward is 2 to 7 times slower
        with torch.autocast("cpu", enabled=False) if slow else nullcontext():  # or it would be bf16 again
            if slow:
                query, key, value = query.float(), key.float(), value.float()
            bias = None if bias is None else bias.to(query.dtype)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=rate)
        joined: Tensor = rearrange(attended.to(dtype), "b h (k l) d -> (b k) l (h d)", k=count)
        return joined


class AddAndNorm(nn.Module):
    """Project, drop, add what came before, normalise."""

    def __init__(self, in_width: int, config: TextEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, config.width)
        self.LayerNorm = LayerNorm(config.width, eps=config.norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Return (b, l, width)."""
        normed: Tensor = self.LayerNorm(self.dropout(self.dense(hidden)) + before)
        return normed


class Attention(nn.Module):
    """One attention sublayer; the names ``self`` and ``output`` are those of the published files."""

    def __init__(self, config: TextEncoderConfig, context_width: int) -> None:
        super().__init__()
        self.self = Projections(config, context_width)
        self.output = AddAndNorm(config.width, config)

    def forward(self, tokens: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        """Return (b, l, width)."""
        attended: Tensor = self.output(self.self(tokens, context, bias), tokens)
        return attended


class Intermediate(nn.Module):
    """The wide half of the feed-forward part."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.intermediate_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (b, l, intermediate width)."""
        return F.gelu(self.dense(tokens))


class TextLayer(nn.Module):
    """Self-attention, attention to video tokens where ``fuses``, feed-forward; each adds and normalises."""

    def __init__(self, config: TextEncoderConfig, *, fuses: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.width)
        self.crossattention = Attention(config, config.vision_width) if fuses else None
        self.intermediate = Intermediate(config)
        self.output = AddAndNorm(config.intermediate_width, config)

    def forward(self, tokens: Tensor, bias: Tensor, video_tokens: Tensor | None = None) -> Tensor:
        """Return (b, l, width)."""
        tokens = self.attention(tokens, tokens, bias)
        if self.crossattention is not None:
            tokens = self.crossattention(tokens, video_tokens, None)
        layer: Tensor = self.output(self.intermediate(tokens), tokens)
        return layer


class Layers(nn.Module):
    """The stack; ``layer`` is the name in the published files."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            TextLayer(config, fuses=index >= config.fusion_layer) for index in range(config.num_layers)
        )


class Bert(nn.Module):
    """Embeddings and layers."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)


class Transform(nn.Module):
    """The dense layer in front of the masked-language decoder."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.LayerNorm = LayerNorm(config.width, eps=config.norm_epsilon)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (b, l, width)."""
        normed: Tensor = self.LayerNorm(F.gelu(self.dense(tokens)))
        return normed


class Predictions(nn.Module):
    """Transform, then the product with the shared word table plus a bias."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary_size))

    def forward(self, tokens: Tensor, word_table: Tensor) -> Tensor:
        """Return (b, l, vocabulary)."""
        return F.linear(self.transform(tokens), word_table, self.bias.to(word_table.dtype))


class LanguageHead(nn.Module):
    """The masked-language head; ``predictions`` is the name in the published files."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)

    def forward(self, tokens: Tensor, word_table: Tensor) -> Tensor:
        """Return logits (b, l, vocabulary) of fused tokens (b, l, width)."""
        logits: Tensor = self.predictions(tokens, word_table)
        return logits


class TextEncoder(nn.Module):
    """Text layers and fusion layers in one stack, with an optional masked-language head.

    Source: Devlin et al. 2018, BERT, section 3; Li et al. 2021, ALBEF, section 3.1 (the two halves).
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.cls = LanguageHead(config) if config.has_language_head else None
        self.apply(_initialise)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Encode texts alone.

        Args:
            input_ids: (b, l) int64.
            mask: (b, l), 1 = real token.

        Returns:
            (b, l, width), before any fusion layer.

        Raises:
            ValueError: The text is longer than the table of positions.
        """
        tokens: Tensor = self.bert.embeddings(input_ids)
        bias = padding_bias(mask)
        for layer in self.bert.encoder.layer[: self.config.fusion_layer]:
            tokens = layer(tokens, bias)
        return tokens

    def language_logits(self, fused: Tensor) -> Tensor:
        """Return masked-language logits (b, l, vocabulary) of fused tokens; the word table is shared.

        Raises:
            ValueError: The model has no such head.
        """
        if self.cls is None:
            raise ValueError("this text encoder has no masked-language head; set has_language_head")
        logits: Tensor = self.cls(fused, self.bert.embeddings.word_embeddings.weight)
        return logits

    @property
    def fusion_layers(self) -> nn.ModuleList:
        """The layers that attend to video tokens."""
        return self.bert.encoder.layer[self.config.fusion_layer :]


def padding_bias(mask: Tensor) -> Tensor:
    """Return what to add to attention scores (b, 1, 1, l) so that padding (mask 0) gets no weight."""
    return (1.0 - mask[:, None, None, :].float()) * PADDING_SCORE


def _initialise(module: nn.Module) -> None:
    """BERT's rule: normal 0.02 for matrices and tables, zero biases."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
