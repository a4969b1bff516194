"""Matrices of every type and file that they come in, and files that are not what they say."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vlm.errors import InvalidInput
from vlm.evaluation import evaluate_scores
from vlm.evaluation.protocol import BootstrapSettings
from vlm.evaluation.scores.files import read_scores, read_texts

QUICK = BootstrapSettings(resamples=100)
TYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64,
    "int8": torch.int8, "int32": torch.int32,
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_safetensors_of_every_type(tmp_path, name):
    values = torch.from_numpy(np.random.default_rng(0).integers(-100, 100, (12, 12))).to(TYPES[name])
    save_file({"scores": values, "other": torch.zeros(2)}, tmp_path / "s.safetensors")
    (tmp_path / "p.json").write_text(json.dumps([[i] for i in range(12)]))
    card = evaluate_scores(tmp_path / "s.safetensors", tmp_path / "p.json", bootstrap=QUICK)
    np.save(tmp_path / "s.npy", values.double().numpy())
    expected = evaluate_scores(tmp_path / "s.npy", tmp_path / "p.json", bootstrap=QUICK)
    assert card["model"]["dtype"] == name
    assert card["results"] == expected["results"]


def test_bfloat16_in_an_npy_file(tmp_path):
    """As two nameless bytes, which is what NumPy writes of it; as uint16 it could be anything."""
    values = torch.randn(9, 9, dtype=torch.bfloat16)
    np.save(tmp_path / "s.npy", values.view(torch.uint16).numpy().view("V2"))
    (tmp_path / "p.json").write_text(json.dumps([[i] for i in range(9)]))
    card = evaluate_scores(tmp_path / "s.npy", tmp_path / "p.json", bootstrap=QUICK)
    assert card["model"]["dtype"] == "bfloat16"
    own = values.diagonal()[:, None]
    ranks = (values > own).sum(1) + ((values == own).sum(1) + 1) / 2
    assert card["results"]["query_to_item"]["itc"]["mean_rank"]["value"] == pytest.approx(float(ranks.mean()))
    np.save(tmp_path / "s.npy", values.view(torch.uint16).numpy())
    with pytest.raises(InvalidInput, match=r"uint16.*view\('V2'\)"):
        evaluate_scores(tmp_path / "s.npy", tmp_path / "p.json")


def test_scores_are_not_read_into_memory(tmp_path):
    save_file({"any": torch.zeros(3, 4)}, tmp_path / "s.safetensors")
    np.save(tmp_path / "s.npy", np.zeros((3, 4), np.int8))
    for name in ("s.safetensors", "s.npy"):
        assert isinstance(read_scores(tmp_path / name), np.memmap)


def _header(entries, payload=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + payload


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 40) + b"{",
        _header({"scores": ENTRY}, bytes(15)),
        _header({"scores": {**ENTRY, "shape": [2, 3]}}, bytes(16)),
        _header({"scores": {**ENTRY, "dtype": "BOOL"}}, bytes(16)),
        _header({"scores": {"dtype": "F32"}}),
        _header({"a": ENTRY, "b": ENTRY}, bytes(16)),
        _header({}),
        _header([1]),
    ],
)
def test_what_is_not_a_safetensors_file_of_scores(tmp_path, content):
    (tmp_path / "s.safetensors").write_bytes(content)
    with pytest.raises(InvalidInput, match="expected a safetensors file"):
        read_scores(tmp_path / "s.safetensors")


def test_captions_from_lines_and_from_json(tmp_path):
    (tmp_path / "a.txt").write_text("one dog\n\n  two cats \n")
    (tmp_path / "a.json").write_text('["one dog", "two cats"]')
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "a.json") == ["one dog", "two cats"]
    (tmp_path / "c.txt").write_text("a dog\u2028runs\r\na cat\x85sits\n", encoding="utf-8")
    assert read_texts(tmp_path / "c.txt") == ["a dog\u2028runs", "a cat\x85sits"]
    for name, text in (
        ("b.json", "[1]"),
        ("b.json", "[]"),
        ("b.json", "{"),
        ("b.txt", "\n"),
        ("b.json", '"x"'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidInput, match="expected"):
            read_texts(tmp_path / name)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="cannot be read as text"):
        read_texts(tmp_path / "b.txt")
