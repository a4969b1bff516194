import json

import pytest
import torch
import yaml

from vlm.errors import CheckpointError, ConfigError, IntegrityError, InvalidInput
from vlm.models import load_model, save_model
from vlm.models.weights import read_card

VIDEO = torch.randn(2, 4, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["video-text", "classifier", "encoder"])
def test_a_saved_model_comes_back_the_same(free_models, tmp_path, kind):
    model = free_models[kind]
    model.capabilities = model.capabilities - {"rerank"}
    save_model(model, tmp_path / "m", card={"seed": 7, "command": "vlm train x.yaml"})
    found = load_model(tmp_path / "m", device="cpu")
    assert (found.kind, found.name, found.domain) == (model.kind, model.name, model.domain)
    assert found.capabilities == model.capabilities and found.preprocessing == model.preprocessing
    assert found.fingerprint == model.fingerprint and not found.training
    with torch.inference_mode():
        assert torch.equal(found.encode_video(VIDEO).embedding, model.encode_video(VIDEO).embedding)
        if kind == "video-text":
            text = ["a red three moves", "blue"]
            assert torch.equal(found.encode_text(text).embedding, model.encode_text(text).embedding)
            assert found.unknown_words("a dog") == ["dog"]
    card = read_card(tmp_path / "m")
    assert card["seed"] == 7 and card["weights_dtype"] == "float32"
    assert card["num_parameters"] == model.num_parameters and card["kind"] == kind
    expected = {"config.yaml", "model.safetensors", "card.json"} | (
        {"tokenizer.json"} if kind == "video-text" else set()
    )
    assert {path.name for path in (tmp_path / "m").iterdir()} == expected
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_half_precision_halves_the_file_and_spares_what_needs_fp32(free_models, tmp_path):
    model = free_models["video-text"]
    full = save_model(model, tmp_path / "full")
    half = save_model(model, tmp_path / "half", dtype=torch.float16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, half)]
    assert sizes[1] < 0.75 * sizes[0]
    found = load_model(half, device="cpu")
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert torch.equal(found.vision_encoder.layers[0].mixer.A_log, model.vision_encoder.layers[0].mixer.A_log)
    assert found.fingerprint != model.fingerprint
    with torch.inference_mode():
        gap = found.encode_video(VIDEO).embedding - model.encode_video(VIDEO).embedding
    assert 0 < gap.abs().max() < 5e-3


def test_a_training_checkpoint_is_read_by_the_folder_it_contains(free_models, tmp_path):
    save_model(free_models["encoder"], tmp_path / "step_10" / "model")
    assert load_model(tmp_path / "step_10", device="cpu").name == "eyes"


def test_saving_replaces_a_model_and_nothing_else(free_models, tmp_path):
    save_model(free_models["encoder"], tmp_path / "m")
    save_model(free_models["classifier"], tmp_path / "m")
    assert load_model(tmp_path / "m", device="cpu").kind == "classifier"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(InvalidInput, match="not a model folder"):
        save_model(free_models["encoder"], tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"


def test_a_failed_save_leaves_the_old_model_whole(free_models, tmp_path, monkeypatch):
    save_model(free_models["encoder"], tmp_path / "m")
    before = load_model(tmp_path / "m", device="cpu").fingerprint

    def full(*_arguments, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_model(free_models["classifier"], tmp_path / "m")
    monkeypatch.undo()
    assert load_model(tmp_path / "m", device="cpu").fingerprint == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_frames_size_and_settings_change_at_loading(free_models, tmp_path):
    save_model(free_models["video-text"], tmp_path / "m")
    model = load_model(
        tmp_path / "m",
        device="cpu",
        num_frames=8,
        image_size=42,
        overrides={"drop_path": 0.1, "dropout": 0.0},
    )
    assert model.config.vision.drop_path == 0.1 and model.config.text.dropout == 0.0
    assert (model.preprocessing.num_frames, model.preprocessing.image_size) == (8, 42)
    with torch.inference_mode():
        assert model.encode_video(torch.randn(1, 8, 3, 42, 42)).pooled.shape == (1, 8, 32)


def test_dtype_sets_products_and_spares_what_needs_fp32(free_models, tmp_path):
    save_model(free_models["video-text"], tmp_path / "m")
    model = load_model(tmp_path / "m", device="cpu", dtype="bf16")
    assert model.itm_head.weight.dtype == torch.bfloat16 and model.temp.dtype == torch.float32
    assert model.text_encoder.bert.embeddings.LayerNorm.weight.dtype == torch.float32
    with torch.inference_mode():
        assert torch.isfinite(model.encode_video(VIDEO).embedding).all()
    with pytest.raises(ValueError, match="dtype must be"):
        load_model(tmp_path / "m", device="cpu", dtype="int8")


def edit(path, change):
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))


def test_folders_that_do_not_fit_are_refused_by_name(free_models, tmp_path):
    folder = save_model(free_models["video-text"], tmp_path / "m")
    config = folder / "config.yaml"
    original = config.read_text()
    edit(config, lambda values: values["model"]["vision"].update(depth=3))
    with pytest.raises(CheckpointError, match=r"17 missing: vision_encoder.layers.2.norm.weight"):
        load_model(folder, device="cpu")
    config.write_text(original)
    edit(config, lambda values: values["model"]["vision"].update(widht=3))
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        load_model(folder, device="cpu")
    config.write_text(original)
    edit(config, lambda values: values.update(format="vlm-model/9"))
    with pytest.raises(CheckpointError, match="expected format 'vlm-model/1'"):
        load_model(folder, device="cpu")
    config.write_text(original)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected a model folder"):
        load_model(folder, device="cpu")


def test_changed_weights_and_broken_cards_are_noticed(free_models, tmp_path):
    folder = save_model(free_models["encoder"], tmp_path / "m")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="checksum differs from card.json"):
        load_model(folder, device="cpu")
    (folder / "card.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        load_model(folder, device="cpu")
