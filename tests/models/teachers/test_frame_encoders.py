import json

import pytest
import torch

from vlm.errors import CapabilityError, CheckpointError, InvalidInput
from vlm.models import load_model
from vlm.models.teachers import frame_encoders

SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory):
    try:
        library = frame_encoders._import_open_clip()
    except Exception:
        pytest.skip("the clip extra is not installed")
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "tiny-frames.json").write_text(json.dumps(SIZES))
    (folder / "tiny-words.json").write_text(
        json.dumps({**SIZES, "text_cfg": {**SIZES["text_cfg"], "hf_tokenizer_name": "someone/words"}})
    )
    library.add_model_config(folder)
    return library


@pytest.fixture(scope="module")
def weights(open_clip, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(open_clip.create_model("tiny-frames", pretrained=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model(weights):
    return load_model(f"open_clip:tiny-frames/{weights}", device="cpu")


def test_a_clip_is_the_mean_of_its_frames(model):
    video = torch.randn(2, 3, 3, 32, 32)
    with torch.inference_mode():
        features = model.encode_video(video)
        frames = torch.nn.functional.normalize(model.tower.encode_image(video.flatten(0, 1)), dim=-1)
        backwards = model.encode_video(video.flip(1))
        alone = model.encode_video(video.flatten(0, 1)[:, None]).embedding
    assert features.tokens.shape == features.pooled.shape == (2, 3, 16)
    assert torch.allclose(features.embedding, frames.reshape(2, 3, 16).mean(1), atol=1e-6)
    assert torch.allclose(features.embedding, backwards.embedding, atol=1e-6)
    # an index encodes frames alone and averages them
    assert torch.allclose(features.embedding, alone.reshape(2, 3, 16).mean(1), atol=1e-6)


def test_texts_and_similarity(model):
    with torch.inference_mode():
        texts = model.encode_text(["a red three", "a dog on a beach " * 40])
        videos = model.encode_video(torch.randn(3, 2, 3, 32, 32))
    assert texts.embedding.shape == (2, 16)
    assert torch.allclose(texts.embedding.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert model.similarity(videos, texts).shape == (3, 2)
    assert model.unknown_words("zyxqv") == []


def test_it_can_search_and_nothing_else(model):
    assert (model.kind, model.domain, model.capabilities) == ("frames", "open", frozenset({"search"}))
    with pytest.raises(CapabilityError, match="of kind 'frames' cannot match"):
        model.match(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    with pytest.raises(CapabilityError, match="of kind 'frames' cannot answer"):
        model.answer(torch.zeros(1), ["what"], ["a", "b"])
    with pytest.raises(ValueError, match=r"\(batch, frames, 3, 32, 32\)"):
        model.encode_video(torch.zeros(1, 2, 3, 64, 64))


def test_preprocessing_is_that_of_the_tower(model, open_clip):
    preprocessing = model.preprocessing
    assert (preprocessing.image_size, preprocessing.num_frames) == (32, 8)
    assert preprocessing.antialias and preprocessing.keep_aspect
    assert preprocessing.mean == open_clip.OPENAI_DATASET_MEAN


def test_two_sets_of_weights_have_two_fingerprints(open_clip, model, tmp_path):
    torch.manual_seed(1)
    torch.save(open_clip.create_model("tiny-frames", pretrained=None).state_dict(), tmp_path / "b.pt")
    other = load_model(f"open_clip:tiny-frames/{tmp_path / 'b.pt'}", device="cpu")
    assert len({model.fingerprint, other.fingerprint}) == 2


def test_a_mismatch_of_the_activation_is_an_error(open_clip):
    with pytest.raises(
        InvalidInput, match=r"trained with QuickGELU.*use open_clip:ViT-B-32-quickgelu/openai"
    ):
        load_model("open_clip:ViT-B-32/openai")


def test_weights_that_are_not_here_are_an_error_with_the_command(open_clip, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidInput, match="not on this machine.*hf download laion/CLIP-ViT-B-32-laion2B"):
        load_model("open_clip:ViT-B-32/laion2b_s34b_b79k")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("ViT-B-33/openai", "no architecture 'ViT-B-33'; near: ViT-B-32"),
        ("tiny-frames/absent", "no weights 'absent', nor is that a file"),
        ("tiny-words/absent", "needs a tokenizer from the hub"),
    ],
)
def test_unknown_names_are_refused(open_clip, source, words):
    with pytest.raises(InvalidInput, match=words):
        load_model(f"open_clip:{source}")


def test_weights_of_another_tower_and_lies_are_refused(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    torch.save({k: v for k, v in state.items() if "ln_post" not in k}, tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match=r"do not fit tiny-frames.*\n?.*ln_post"):
        load_model(f"open_clip:tiny-frames/{tmp_path / 'cut.pt'}")
    torch.save({**state, "logit_scale": torch.zeros(1).expand(10**9)}, tmp_path / "lie.pt")
    with pytest.raises(CheckpointError, match="claims 4000000000 bytes"):
        load_model(f"open_clip:tiny-frames/{tmp_path / 'lie.pt'}")
    with pytest.raises(ValueError, match="take no overrides"):
        load_model(f"open_clip:tiny-frames/{weights}", overrides={"dropout": 0.1})
