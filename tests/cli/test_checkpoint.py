import json

import pytest
import torch
from safetensors import safe_open

from vlm.cli import main


@pytest.fixture
def published(fixtures, tmp_path):
    with safe_open(fixtures / "videomamba_cls_tiny.safetensors", framework="pt") as file:
        state = {
            name.removeprefix("state_dict/"): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith("state_dict/")
        }
    torch.save({"model": state}, tmp_path / "m.pth")
    return tmp_path / "m.pth", state


def test_json_says_what_is_in_a_file(published, capsys):
    assert main(["checkpoint", "inspect", str(published[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["form"], found["dtype"]) == ("classifier", "classifier", "float32")
    assert found["num_parameters"] == 140_842 and found["config"]["num_classes"] == 10
    assert found["missing"] == found["unexpected"] == [] and found["problem"] is None


def test_lines_say_it_to_people(published, capsys):
    assert main(["checkpoint", "inspect", str(published[0])]) == 0
    text = capsys.readouterr().out
    assert "140,842" in text and "depth 4" in text and "problem" not in text


def test_a_partial_file_is_listed_and_ends_with_4(published, tmp_path, capsys):
    _, state = published
    torch.save({k: v for k, v in state.items() if k != "layers.1.mixer.D"}, tmp_path / "q.pth")
    assert main(["checkpoint", "inspect", str(tmp_path / "q.pth"), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == ["layers.1.mixer.D"] and "layers.1.mixer.D" in found["problem"]
    assert main(["checkpoint", "inspect", str(tmp_path / "q.pth")]) == 4
    assert "missing         1: layers.1.mixer.D" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00true\x85R."])
def test_other_files_end_with_4_and_one_sentence(tmp_path, capsys, content):
    (tmp_path / "x.pth").write_bytes(content)
    assert main(["checkpoint", "inspect", str(tmp_path / "x.pth"), "--json"]) == 4
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("vlm: ") and "x.pth" in output.err
    assert main(["checkpoint", "inspect", str(tmp_path / "absent.pth")]) == 4
    assert "no such file or folder" in capsys.readouterr().err
