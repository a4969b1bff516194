"""`vlm eval throughput`: the rival transformers compute what they claim, and the figures are consistent."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

from vlm.cli import main
from vlm.evaluation.speed import peak_bytes, time_ms
from vlm.evaluation.speed.rivals import Block, VideoTransformer
from vlm.models import VideoMambaConfig

CPU = torch.device("cpu")
TINY = VideoMambaConfig(width=128, depth=2, num_frames=3, image_size=8, patch_size=4)


def rival(architecture):
    torch.manual_seed(0)
    model = VideoTransformer(TINY, architecture).double().eval()
    for parameter in model.parameters():  # tables and biases that start at zero would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_fused_and_naive_attention_are_the_same_function():
    video = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    with torch.inference_mode():
        fused, naive = (rival(name)(video) for name in ("joint-fused", "joint-naive"))
    assert fused.shape == (2, 1 + 3 * 4, 128)
    torch.testing.assert_close(fused, naive, rtol=1e-10, atol=1e-10)


def attend(layer, tokens):
    """Attention over (n, d) head by head and query by query."""
    width = tokens.shape[1]
    q, k, v = (layer.qkv.weight @ tokens.T + layer.qkv.bias[:, None]).T.split(width, 1)
    out = torch.zeros_like(tokens)
    for head in range(layer.num_heads):
        channels = slice(64 * head, 64 * (head + 1))
        for query in range(len(tokens)):
            scores = torch.stack([q[query, channels] @ key[channels] / 8 for key in k])
            out[query, channels] = sum(w * x[channels] for w, x in zip(scores.softmax(0), v, strict=True))
    return out @ layer.proj.weight.T + layer.proj.bias


def test_divided_attention_equals_loops_over_places_and_frames():
    torch.manual_seed(1)
    block = Block(128, "divided").double()
    tokens = torch.randn(1, 1 + 3 * 4, 128, dtype=torch.float64)
    with torch.inference_mode():
        found = block(tokens, 3)[0]
        first, grid = tokens[0, 0].clone(), tokens[0, 1:].reshape(3, 4, 128).clone()
        for place in range(4):
            grid[:, place] += attend(block.time, block.time_norm(grid[:, place]))
        firsts = []
        for frame in range(3):
            seen = torch.cat([first[None], grid[frame]])
            seen = seen + attend(block.attention, block.norm(seen))
            firsts.append(seen[0])
            grid[frame] = seen[1:]
        expected = torch.cat([torch.stack(firsts).mean(0)[None], grid.reshape(12, 128)])
        expected = expected + block.mlp(expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_scaling_writes_consistent_figures_and_a_plot_and_can_be_resumed(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    words = ["eval", "throughput", "--scaling", "--quick", "--out", str(out)]
    few_bytes = ["--memory-gib", "1e-9"]
    assert main([*words, "--frames", "2", *few_bytes]) == 0
    printed = capsys.readouterr().out
    assert "not run: its scores alone would need" in printed and "1.00 x time" in printed
    results = json.loads(out.read_text())
    assert set(results) == {"format", "machine", "settings", "points"}
    assert results["machine"].keys() >= {"device", "cores", "threads", "torch", "commit", "load_average"}
    assert [point["architecture"] for point in results["points"]] == [
        "videomamba",
        "joint-fused",
        "divided",
        "joint-naive",
    ]
    own, *others, naive = results["points"]
    length = 1 + 2 * 4
    assert naive["predicted_bytes"] == 2 * 3 * length**2 * 4 and "ms" not in naive
    for point in (own, *others):
        clock = point["time_ms"][results["settings"]["clock"]]
        assert point["tokens"] == length and point["ms"] == clock["median"]
        assert 0 < clock["least"] <= clock["p20"] <= clock["median"] <= clock["p80"] and clock["runs"] >= 3
        assert point["ms_ratio"] == point["ms"] / own["ms"]
    with Image.open(out.with_suffix(".png")) as picture:
        picture.verify()
        assert 1000 <= picture.width <= 3000 and 400 <= picture.height <= 1500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling.json", "scaling.png"]

    before = results["points"]
    assert main([*words, "--frames", "2", "--resume", "--json", *few_bytes]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == before
    assert main([*words, "--size", "small", "--resume"]) == 4
    assert "another settings than this run" in capsys.readouterr().err
    out.write_text("{}")
    assert main([*words, "--resume"]) == 4
    assert "is not a file of --scaling" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_size_is_measured(tmp_path, capsys, dtype):
    out = tmp_path / "speed.json"
    words = ["eval", "throughput", "--quick", "--frames", "2", "--batch", "3", "--dtype", dtype]
    assert main([*words, "--threads", "1", "--device", "cpu", "--out", str(out)]) == 0
    assert f"VideoMamba tiny, 2 frames, batch 3, {dtype}, 1 threads" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["clips_per_s"] == 3000 / results["time_ms"]["wall"]["median"]
    assert results["settings"]["threads"] == results["machine"]["threads"] == 1


def test_wrong_flags_are_refused(capsys):
    assert main(["eval", "throughput", "--quick", "--frames", "2", "4"]) == 2
    assert "one number, or several with --scaling" in capsys.readouterr().err
    assert main(["eval", "throughput", "--scaling", "--quick", "--resume"]) == 2
    assert main(["eval", "throughput", "--frames", "0"]) == 2
    assert "invalid count value: '0'" in capsys.readouterr().err
    assert main(["eval", "throughput", "--training", "run.yaml", "--workers", "-1"]) == 2


def test_memory_and_clock_see_what_was_done():
    size = 48 * 2**20
    if sys.platform == "linux":
        peak = peak_bytes(lambda: torch.ones(size // 4).sum(), CPU)
        assert 0.98 * size < peak < 1.1 * size
    calls = []
    clocks = time_ms(lambda: calls.append(sum(range(20000))), CPU, 0.0)
    assert len(calls) == clocks["wall"]["runs"] == 3
    assert clocks["processor"]["least"] > 0
