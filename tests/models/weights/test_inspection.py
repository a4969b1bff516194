import resource

import pytest
import torch
from safetensors.torch import save_file

from vlm.errors import CheckpointError
from vlm.models import save_model
from vlm.models.weights.inspection import inspect

RETRIEVAL = "umt_videomamba_tiny"


def test_a_published_file_is_described(official, tmp_path):
    torch.save({k: v.bfloat16() for k, v in official(RETRIEVAL).state_dict.items()}, tmp_path / "m.pth")
    found = inspect(tmp_path / "m.pth")
    assert (found["form"], found["kind"], found["dtype"], found["problem"]) == (
        "retrieval",
        "video-text",
        "bfloat16",
        None,
    )
    assert found["config"]["vision"]["depth"] == 4 and found["config"]["text"]["fusion_layer"] == 2
    assert found["num_parameters"] == 328_883 and found["missing"] == found["unexpected"] == []
    assert any(name.startswith("clip_teacher.") for name in found["ignored"])


def test_a_safetensors_file_and_a_folder_are_described(official, free_models, tmp_path):
    save_file(dict(official("videomamba_image_tiny").state_dict), tmp_path / "i.safetensors")
    found = inspect(tmp_path / "i.safetensors")
    assert (found["form"], found["kind"], found["problem"]) == ("image", "classifier", None)
    save_model(free_models["video-text"], tmp_path / "run" / "model")
    found = inspect(tmp_path / "run")
    assert (found["form"], found["name"], found["domain"]) == ("model-folder", "small", "digit-world")
    assert found["num_parameters"] == free_models["video-text"].num_parameters and found["problem"] is None


def test_what_does_not_fit_is_listed(official, tmp_path):
    state = dict(official("videomamba_cls_tiny").state_dict)
    del state["layers.1.norm.weight"]
    state["extra"] = torch.zeros(2)
    state["head.bias"] = torch.zeros(9)
    torch.save(state, tmp_path / "x.pth")
    found = inspect(tmp_path / "x.pth")
    assert found["missing"] == ["layers.1.norm.weight"]
    assert found["unexpected"] == ["extra"]
    assert found["misshaped"] == ["head.bias is (9,) instead of (10,)"]
    assert "1 missing" in found["problem"] and found["form"] == "classifier"
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "y.pth")
    assert inspect(tmp_path / "y.pth")["form"] == "unknown"


def test_a_folder_that_does_not_fit_is_described(free_models, tmp_path):
    folder = save_model(free_models["encoder"], tmp_path / "m")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("depth: 2", "depth: 1"))
    assert len(inspect(folder)["unexpected"]) == 17


def test_a_lying_file_is_refused_cheaply(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1000, 1000, 1000)}, tmp_path / "lie.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="claims 4000000000 bytes"):
        inspect(tmp_path / "lie.pth")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 50
