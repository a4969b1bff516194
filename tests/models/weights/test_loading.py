import pytest
import torch

from vlm.errors import CheckpointError, InvalidInput
from vlm.models import load_model, save_model

CLASSIFIER = "videomamba_cls_tiny"


def test_a_published_file_is_recognised_by_its_keys(official, tmp_path):
    torch.save({"model": official(CLASSIFIER).state_dict}, tmp_path / "videomamba_t.pth")
    model = load_model(tmp_path / "videomamba_t.pth", device="cpu")
    assert (model.kind, model.name) == ("classifier", "videomamba_t")
    again = load_model(str(tmp_path / "videomamba_t.pth"), device="cpu", num_frames=8)
    assert again.config.vision.num_frames == 8


def test_errors_of_a_published_file_name_the_file(official, tmp_path):
    state = dict(official(CLASSIFIER).state_dict)
    del state["head.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"cut.pth: .*1 missing: head.bias") as caught:
        load_model(tmp_path / "cut.pth")
    assert caught.value.missing == ("head.bias",)


def test_a_tokenizer_can_be_given(official, tmp_path, monkeypatch):
    state = official("umt_videomamba_tiny").state_dict
    torch.save(state, tmp_path / "m.pth")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "mov", "##ing"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    settings = {"device": "cpu", "overrides": {"num_attention_heads": 4}}
    model = load_model(tmp_path / "m.pth", tokenizer=tmp_path / "vocab.txt", **settings)
    with torch.inference_mode():
        features = model.encode_text(["Red, moving!"])
    assert features.tokens.shape == (1, 5, 64)
    torch.save(official(CLASSIFIER).state_dict, tmp_path / "c.pth")
    with pytest.raises(InvalidInput, match="kind 'classifier' takes no tokenizer"):
        load_model(tmp_path / "c.pth", tokenizer=tmp_path / "vocab.txt")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    bare = load_model(tmp_path / "m.pth", **settings)
    with pytest.raises(InvalidInput, match=r"--tokenizer PATH .* google-bert/bert-base-uncased"):
        bare.encode_text(["red"])


def test_names_and_paths_that_lead_nowhere_are_errors(tmp_path):
    with pytest.raises(InvalidInput, match="no such file or folder"):
        load_model(tmp_path / "absent.pth")
    with pytest.raises(InvalidInput, match="did you mean 'videomamba-m-25m'"):
        load_model("videomamba-m-25")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="expected a model folder"):
        load_model(tmp_path / "empty")


def test_what_was_not_fetched_is_an_error_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path))
    with pytest.raises(InvalidInput, match="vlm models pull videomamba-m-25m"):
        load_model("videomamba-m-25m")
    with pytest.raises(InvalidInput, match="hf download nobody/nothing weights.pth --revision v1"):
        load_model("hf:nobody/nothing/weights.pth@v1")
    with pytest.raises(InvalidInput, match="expected hf:owner/repo"):
        load_model("hf:nobody")


def test_an_imported_file_is_loaded_by_its_name(official, tmp_path, monkeypatch):
    from vlm.models.registry import import_model

    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    torch.save(official(CLASSIFIER).state_dict, tmp_path / "c.pth")
    import_model(tmp_path / "c.pth", "mine", domain="open")
    assert load_model("mine", device="cpu").name == "mine"


def test_a_folder_of_a_hub_repository_is_read_from_the_cache(free_models, tmp_path, monkeypatch):
    save_model(free_models["encoder"], tmp_path / "cached")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path / "cached"))
    assert load_model("hf:someone/model", device="cpu").kind == "encoder"
