"""BERT's weights in a text encoder: the features of another implementation, and files that do not fit."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from vlm.errors import CheckpointError
from vlm.models.teachers.frame_encoders import ensure_torchvision
from vlm.models.text_encoder import TextEncoder, TextEncoderConfig
from vlm.models.weights.bert import load_bert

SIZES = TextEncoderConfig(
    vocabulary_size=60, width=32, num_layers=3, fusion_layer=2, num_heads=4, intermediate_width=48,
    max_positions=20, vision_width=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def published():
    """A BERT with its language head and its pooler, of the implementation that publishes the weights."""
    ensure_torchvision()  # transformers imports it if it is there, which fails beside a torch without CUDA
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=20, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertForPreTraining(config).eval()
    for parameter in model.parameters():  # biases start at zero, where a lost one would not show
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def saved(state, path):
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    return path


def encoder(**changes):
    torch.manual_seed(1)
    return TextEncoder(dataclasses.replace(SIZES, **changes)).eval()


def test_text_features_and_word_guesses_are_bert_s(published, tmp_path):
    path = saved(published.state_dict(), tmp_path / "bert.safetensors")
    ids = torch.randint(0, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    text = encoder(fusion_layer=3)
    assert load_bert(text, path) == []
    with torch.inference_mode():
        expected = published(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        found = text(ids, mask)
        guesses = text.language_logits(found)
    real = mask.bool()
    assert torch.allclose(found[real], expected.hidden_states[-1][real], atol=1e-5)
    assert torch.allclose(guesses[real], expected.prediction_logits[real], atol=1e-4)


def test_attention_to_video_keeps_its_start(published, tmp_path):
    path = saved(published.state_dict(), tmp_path / "bert.safetensors")
    text, untouched = encoder(), encoder()
    kept = load_bert(text, path)
    before, after = untouched.state_dict(), text.state_dict()
    assert len(kept) == 10 and all(".layer.2.crossattention." in name for name in kept)
    assert {name for name in before if torch.equal(before[name], after[name])} == {name for name in kept}


def test_bare_and_old_names_and_longer_tables_are_understood(published, tmp_path):
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in published.bert.state_dict().items()
    }
    text = encoder(max_positions=12)
    kept = load_bert(text, saved(state, tmp_path / "bare.safetensors"))
    assert {name.split(".")[0] for name in kept} == {"bert", "cls"}
    table = text.bert.embeddings.position_embeddings.weight
    assert torch.equal(table, published.bert.embeddings.position_embeddings.weight[:12])
    assert load_bert(
        encoder(has_language_head=False), saved(published.state_dict(), tmp_path / "b.safetensors")
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 4}, "of 4 layers and width 32: 16 missing: bert.encoder.layer.3"),
        ({"num_layers": 2}, "16 unexpected: bert.encoder.layer.2"),
        ({"vocabulary_size": 61}, "2 of another shape: bert.embeddings.word_embeddings.weight"),
        ({"max_positions": 21}, "1 of another shape: bert.embeddings.position_embeddings.weight"),
    ],
)
def test_files_of_other_sizes_are_refused_and_change_nothing(published, tmp_path, changes, words):
    text, untouched = encoder(**changes), encoder(**changes)
    with pytest.raises(CheckpointError, match=words):
        load_bert(text, saved(published.state_dict(), tmp_path / "bert.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(text.parameters(), untouched.parameters(), strict=True))


def test_something_else_is_no_bert(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a BERT of 3 layers and width 32: \d+ missing"):
        load_bert(encoder(), saved({"weight": torch.zeros(2)}, tmp_path / "other.safetensors"))
