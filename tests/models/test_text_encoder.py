"""Attention keeps fp32 between its bf16 products on the CPU, also where autocast would undo it."""

import torch

from vlm.models.text_encoder import PADDING_SCORE, Projections, TextEncoderConfig


def test_attention_on_the_cpu_is_fp32_under_autocast():
    torch.manual_seed(0)
    config = TextEncoderConfig(
        vocabulary_size=10, width=32, num_layers=2, fusion_layer=1, num_heads=4, dropout=0.0
    )
    layer = Projections(config, 16)
    tokens, context = torch.randn(3, 5, 32), torch.randn(3, 7, 16)
    bias = torch.zeros(3, 1, 1, 7).masked_fill_(torch.rand(3, 1, 1, 7) < 0.3, PADDING_SCORE)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(tokens, context, bias)
        parts = layer.query(tokens), layer.key(context), layer.value(context)
    assert parts[0].dtype == torch.bfloat16
    query, key, value = (part.float().unflatten(2, (4, 8)).transpose(1, 2) for part in parts)
    scores = query @ key.transpose(2, 3) / 8**0.5 + bias
    expected = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    rounded = expected.bfloat16()
    assert found.dtype == torch.bfloat16
    # sums in another order may fall on the other side of a bf16 step now and then; bf16 attention, everywhere
    assert (found == rounded).float().mean() > 0.97
    torch.testing.assert_close(found, rounded, rtol=1e-2, atol=1e-3)
