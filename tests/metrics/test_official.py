"""Recalls equal to the official evaluation's, on its own score matrices."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open

from vlm.metrics import Positives, rank_candidates, rank_scores


def _load(path):
    with safe_open(path, "numpy") as file:
        config = json.loads(file.metadata()["config"])
        return config, {key: file.get_tensor(key) for key in file.keys() if "scores" in key}  # noqa: SIM118


def _percent(counts, k):
    return round(100 * float(counts.recall(min(k, counts.num_scored)).mean()), 2)


def _positives(config, num_videos):
    texts = config["txt2img"]
    return Positives.from_lists([[texts[str(i)]] for i in range(len(texts))], num_videos)


def test_several_captions_a_video(fixtures):
    config, tensors = _load(fixtures / "losses_metrics.safetensors")
    forward = _positives(config, 12)
    backward, kept = forward.reversed()
    assert [backward[v].tolist() for v in range(12)] == [config["img2txt"][str(v)] for v in range(12)]
    found = {
        "img": rank_scores(tensors["metrics/scores_t2v"], forward),
        "txt": rank_scores(tensors["metrics/scores_v2t"], backward),
    }
    for side, counts in found.items():
        assert not counts.is_tied.any()
        for k in (1, 5, 10):
            assert _percent(counts, k) == config["metrics"][f"{side}_r{k}"]


@pytest.mark.parametrize("name", ["dual", "k128/rerank"])
def test_all_pairs_scored(fixtures, name):
    config, tensors = _load(fixtures / "umt_retrieval.safetensors")
    key = "{}_scores_dual" if name == "dual" else "k128/{}_scores_rerank"
    forward = _positives(config, 6)
    for side, direction in (("img", "t2v"), ("txt", "v2t")):
        counts = rank_scores(tensors[key.format(direction)], forward)
        for k in (1, 5, 10):
            assert _percent(counts, k) == config["metrics"][name][f"{side}_r{k}"]


def test_three_candidates_allow_recall_up_to_three_only(fixtures):
    config, tensors = _load(fixtures / "umt_retrieval.safetensors")
    forward = _positives(config, 6)
    for side, direction in (("img", "t2v"), ("txt", "v2t")):
        matrix = tensors[f"k3/{direction}_scores_rerank"]
        candidates = np.argsort(-matrix, axis=1)[:, :3]
        counts = rank_candidates(candidates, np.take_along_axis(matrix, candidates, 1), forward)
        assert _percent(counts, 1) == config["metrics"]["k3/rerank"][f"{side}_r1"]
        with pytest.raises(ValueError, match="k <= 3"):
            counts.recall(5)
    # the official figure for five places after scoring three is the order of its fill values
    assert config["metrics"]["k3/rerank"]["txt_r5"] == 100.0
    assert counts.recall(3).mean() < 1.0
