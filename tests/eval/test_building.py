"""`vlm eval index_build` and `vlm eval stored_tokens`: what they compute, on clips that anybody can count."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from vlm.cli import main
from vlm.evaluation.tradeoff import building
from vlm.world.clips import write_clips
from vlm.world.sampling import gallery


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(list(gallery("test", 5, 3, twins=True)), folder)
    return folder


def test_a_build_is_held_to_the_slower_of_its_parts(clips, tmp_path, capsys) -> None:
    out = tmp_path / "build.json"
    assert main(["eval", "index_build", "--videos", str(clips), "--rounds", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    rates = found["segments_per_s"]
    assert {name: len(each) for name, each in rates.items()} == dict.fromkeys(building.RATES, 2)
    shares = [
        build / min(decode, encode)
        for decode, encode, build in zip(rates["decode"], rates["encode"], rates["build"], strict=True)
    ]
    assert found["shares"] == pytest.approx(shares)
    assert found["share_of_limit"] == pytest.approx(np.median(shares))
    limits = [min(rates[name][number] for name in building.RATES[:-1]) for number in range(2)]
    of_all = [build / limit for build, limit in zip(rates["build"], limits, strict=True)]
    assert found["share_of_all_limits"] == pytest.approx(np.median(of_all))
    # every clip of the world is shorter than a segment
    assert found["files"] == found["estimate"]["segments"] == 6
    assert f"{found['share_of_limit']:.0%} of the slower limit" in capsys.readouterr().out


def test_nothing_to_decode_is_an_error(tmp_path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    assert main(["eval", "index_build", "--videos", str(tmp_path)]) == 4
    (tmp_path / "a.mp4").unlink()
    assert main(["eval", "index_build", "--videos", str(tmp_path)]) == 4
    assert main(["eval", "index_build", "--rounds", "0"]) == 2


def test_an_encoder_that_is_slower_bounds_the_build(clips, monkeypatch) -> None:
    """The encoder's limit counts what it encodes in the time, whatever a batch holds."""
    ticks = iter(range(100))
    monkeypatch.setattr(building.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(building, "encode_segments", lambda model, batch, layout: None)
    used_s = iter((10.0, 16.0))
    monkeypatch.setattr(building, "_processor_s", lambda: next(used_s))
    # begun at 0, looked at 1, 2, 3, 4 (encoding each time) and 5, read at 6
    assert building._encode(None, [np.zeros(1)] * 3, None) == pytest.approx((3 * 4 / 6, 6 / 12))


def test_cores_that_both_share_bound_the_build(clips, monkeypatch) -> None:
    """Two cores, 0.3 s of them for decoding a segment and 0.5 s for encoding one: 2.5 segments a second."""
    readings = iter((0.0, 0.3 * 6))
    model = SimpleNamespace(preprocessing=SimpleNamespace(num_frames=8))
    monkeypatch.setattr(building.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(building, "_processor_s", lambda: next(readings))
    monkeypatch.setattr(building, "choose_layout", lambda *_: None)
    cost = SimpleNamespace(hours=1 / 3600, num_segments=6)
    monkeypatch.setattr(building, "estimate_build", lambda *_, **__: SimpleNamespace(cost=cost))
    monkeypatch.setattr(building, "_decode", lambda *_: (4.0, 8.0, 6, []))
    monkeypatch.setattr(building, "_encode", lambda *_: (5.0, 0.5))
    monkeypatch.setattr(building, "_build", lambda *_: (2.0, 3.0))
    settings = SimpleNamespace(preprocessing=model.preprocessing, stride_s=4.0)
    found = building.measure_build([clips], model, settings, batch_size=8, rounds=1, show=lambda _: None)
    assert found["median"]["processor"] == pytest.approx(2 / 0.8)
    assert (found["share_of_limit"], found["share_of_all_limits"]) == pytest.approx((2 / 4, 2 / 2.5))


def test_stored_tokens_cost_what_the_layout_says(tmp_path, capsys) -> None:
    out = tmp_path / "tokens.json"
    assert main(["eval", "stored_tokens", "--clips", "2", "--rerank", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    ways = found["ways"]
    # 8 frames of 4 x 4 patches, 128 numbers of 2 bytes; pooled 2 x 2, a byte each, with a scale of 2 bytes
    assert ways["full"]["bytes_per_segment"] == 8 * 16 * 128 * 2
    assert ways["pooled"]["bytes_per_segment"] == 8 * 4 * (128 + 2)
    assert ways["none"]["bytes_per_segment"] == 0
    # without reranking the ways are one
    assert len({way["recall_at_1"] for way in ways.values()}) == 1
    # without stored tokens the files are encoded again: the same as all tokens
    assert ways["none"]["recall_at_1_reranked"] == ways["full"]["recall_at_1_reranked"]
    lost = found["pooled_minus_full"]["value"]
    assert lost == pytest.approx(
        ways["pooled"]["recall_at_1_reranked"] - ways["full"]["recall_at_1_reranked"]
    )
    assert found["settings"]["videos"] == 4 and "pooled beside full tokens" in capsys.readouterr().out
