"""CLIP and SigLIP in the layout of transformers, with random weights, as video encoders."""

from __future__ import annotations

import json

import pytest
import torch

from vlm.data import preprocess
from vlm.errors import CheckpointError, InvalidInput
from vlm.models import load_model
from vlm.models.teachers import frame_encoders, hub_encoders

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "red", "three", "moves", "up"]


@pytest.fixture(scope="module")
def transformers():
    try:
        frame_encoders.prepare_torchvision()
        import transformers
    except Exception:
        pytest.skip("the hub extra is not installed")
    return transformers


def _save(transformers, kind, folder):
    text = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 8}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    torch.manual_seed(3)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        model = transformers.CLIPModel(config)
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    image = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_center_crop": kind == "clip"}
    image["resample"] = 3 if kind == "clip" else 2
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    engine = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, pad_token="[PAD]", eos_token="[EOS]", bos_token="[BOS]", unk_token="[UNK]"
    )
    words.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module", params=["clip", "siglip"])
def pair(request, transformers, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return _save(transformers, request.param, folder), folder


def test_a_clip_is_the_mean_of_its_frames(pair):
    original, folder = pair
    model = load_model(folder, device="cpu", num_frames=4)
    p = model.preprocessing
    assert (p.num_frames, p.image_size, p.mean, p.antialias) == (4, 32, (0.5,) * 3, True)
    assert (p.resize, p.keep_aspect) == (
        ("bicubic", True) if model.config.architecture == "clip" else ("bilinear", False)
    )
    clip = preprocess(torch.randint(0, 256, (4, 40, 60, 3), dtype=torch.uint8), p)
    with torch.inference_mode():
        features = model.encode_video(torch.stack([clip, clip.flip(0)]))
        frames = original.get_image_features(pixel_values=clip).pooler_output
        ids = torch.tensor([[1, 4, 5, 6, 2, 0, 0, 0]])
        text = torch.nn.functional.normalize(original.get_text_features(input_ids=ids).pooler_output, dim=-1)
        own = model.encode_text(["a red three"])
    wanted = torch.nn.functional.normalize(frames, dim=-1).mean(0)
    torch.testing.assert_close(features.embedding, torch.stack([wanted, wanted]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(own.embedding, text, atol=1e-6, rtol=1e-5)


def test_texts_of_any_length_do_not_depend_on_their_neighbours(pair):
    model = load_model(pair[1], device="cpu")
    with torch.inference_mode():
        alone = model.encode_text(["a red three moves up " * 9]).embedding
        beside = model.encode_text(["a", "a red three moves up " * 9]).embedding[1:]
    torch.testing.assert_close(alone, beside)
    assert model.capabilities == {"search"}
    assert model.fingerprint == load_model(pair[1], device="cpu").fingerprint


def test_by_the_name_of_its_repository(pair, tmp_path, monkeypatch):
    """What lies in the hub's cache is found as hf:owner/repo and called after the repository."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny-clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(pair[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_model("hf:someone/tiny-clip", device="cpu").name == "tiny-clip"


def test_wrong_folders(pair, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(pair[1], tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    lost = sorted(weights)[0]
    save_file(
        {name: value for name, value in weights.items() if name != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="do not fit") as caught:
        load_model(folder, device="cpu")
    assert lost in caught.value.missing
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(folder, device="cpu")
    with pytest.raises(ValueError, match="32 pixels, not of 64"):
        load_model(pair[1], device="cpu", image_size=64)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InvalidInput, match="type 'bert'; .*clip, siglip"):
        load_model(folder, device="cpu")
    (folder / "config.json").write_text("{")
    with pytest.raises(InvalidInput, match="config.json: cannot be read"):
        load_model(folder, device="cpu")
    assert hub_encoders.KINDS


def test_texts_that_are_cut_are_counted(pair):
    """Eight places, two of which are where a text begins and ends."""
    model = load_model(pair[1])
    assert model.count_cut(["a red three", "a red three moves up up", "a red three moves up up up"]) == 1
