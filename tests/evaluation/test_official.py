"""The way from clips to reranked scores and recalls, equal to the official code's on its own tiny model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vlm.errors import CheckpointError
from vlm.evaluation import render_card
from vlm.evaluation.dataset import EvaluationSet
from vlm.evaluation.features import encode_texts, encode_videos, similarity
from vlm.evaluation.page import render_page
from vlm.evaluation.protocol import BootstrapSettings, Protocol
from vlm.evaluation.rerank import score_pairs
from vlm.evaluation.runner import RunOptions, evaluate_model
from vlm.metrics import Positives, top_candidates
from vlm.models import TokenBatch, from_official, load_model


class Numbered:
    """The official model, for captions given as rows of token ids: caption "3" is row 3."""

    def __init__(self, model, ids, mask):
        self._model, self._ids, self._mask = model, ids, mask

    def __getattr__(self, name):
        return getattr(self._model, name)

    def encode_text(self, texts):
        rows = [int(text) for text in texts]
        return self._model.encode_text(TokenBatch(self._ids[rows], self._mask[rows]))

    def unknown_words(self, _text):
        return []


@pytest.fixture(scope="module")
def official(fixtures):
    weights = load_file(fixtures / "umt_videomamba_tiny.safetensors")
    state = {
        key.removeprefix("state_dict/"): value
        for key, value in weights.items()
        if key.startswith("state_dict/")
    }
    model, _ = from_official(state, overrides={"num_attention_heads": 4})
    with safe_open(fixtures / "umt_retrieval.safetensors", "pt") as file:
        metrics = json.loads(file.metadata()["config"])["metrics"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    numbered = Numbered(model.eval(), tensors["input/input_ids"], tensors["input/attention_mask"])
    return numbered, tensors, metrics


@pytest.fixture(scope="module")
def data():
    six = np.arange(6)
    return EvaluationSet(
        clip_ids=tuple(map(str, six)),
        paths=tuple(Path(str(i)) for i in six),
        queries=tuple(map(str, six)),
        query_clip=six,
        positives=Positives.from_lists([[i] for i in range(6)], 6),
        groups=six,
        twin_of=np.full(6, -1),
    )


@pytest.fixture(scope="module")
def load(official):
    return lambda path, _preprocessing: official[1]["input/video"][int(path.name)]


def _close(found, expected):
    """Within the project's tolerance: 2e-5 of the largest magnitude."""
    torch.testing.assert_close(
        torch.as_tensor(found), expected, rtol=0, atol=2e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("batch_size", [2, 6])
def test_scores(official, data, load, batch_size):
    model, tensors, _ = official
    videos = encode_videos(model, data.paths, load, batch_size=batch_size, keep_tokens=True)
    texts = encode_texts(model, data.queries, batch_size=batch_size)
    scores = similarity(texts.embeddings, videos.embeddings[""])
    _close(scores, tensors["t2v_scores_dual"])
    _close(scores.T.copy(), tensors["v2t_scores_dual"])
    rows, columns = np.divmod(np.arange(36), 6)
    pairs = score_pairs(model, texts, videos.tokens, (rows, columns), batch_size=7)
    found = pairs.look_up(rows, columns).reshape(6, 6)
    _close(found, tensors["k128/t2v_scores_rerank"])
    _close(found.T.copy(), tensors["k128/v2t_scores_rerank"])


@pytest.mark.parametrize("k", [1, 3, 128])
def test_scores_of_the_candidates_alone(official, data, load, k):
    """The official matrices after k candidates: its scores inside, its fill of -100 outside."""
    model, tensors, _ = official
    videos = encode_videos(model, data.paths, load, keep_tokens=True)
    texts = encode_texts(model, data.queries)
    scores = similarity(texts.embeddings, videos.embeddings[""])
    queries = np.arange(6)[:, None]
    for side, matrix in (("t2v", scores), ("v2t", np.ascontiguousarray(scores.T))):
        chosen, _ = top_candidates(matrix, k)
        texts_of, videos_of = np.broadcast_arrays(
            *((queries, chosen) if side == "t2v" else (chosen, queries))
        )
        pairs = score_pairs(model, texts, videos.tokens, (texts_of.ravel(), videos_of.ravel()))
        filled = np.full((6, 6), -100, np.float32)
        np.put_along_axis(filled, chosen, pairs.look_up(texts_of, videos_of), axis=1)
        released = tensors[f"k{3 if k < 6 else 128}/{side}_scores_rerank"].numpy().copy()
        if k == 1:  # not released by itself: the best candidate of the three
            rest = np.setdiff1d(np.arange(36), (queries * 6 + chosen).ravel())
            released.ravel()[rest] = -100
        _close(filled, torch.from_numpy(released))


@pytest.mark.parametrize(("k", "row"), [(128, "k128/rerank"), (3, "k3/rerank")])
def test_recalls(official, data, load, k, row):
    model, _, metrics = official
    protocol = Protocol(
        name="official",
        version=1,
        summary="six clips",
        layout="world",
        recall_at=(1, 5),
        rerank_k=k,
        bootstrap=BootstrapSettings(resamples=100),
    )
    options = RunOptions(test_time_controls=False)
    card = evaluate_model(model, data, protocol, load, options=options)
    for kind, name, depths in (("itc", "dual", (1, 5)), (f"itm@{k}", row, (1, 5) if k > 5 else (1,))):
        for direction, side in (("query_to_item", "img"), ("item_to_query", "txt")):
            for depth in depths:
                value = card["results"][direction][kind][f"recall@{depth}"]["value"]
                assert round(100 * value, 2) == metrics[name][f"{side}_r{depth}"]
    if k == 3:  # the official recall at five after scoring three counts its fill values; ours does not exist
        assert "recall@5" not in card["results"]["query_to_item"]["itm@3"]


def test_the_card_says_what_is_known_of_official_weights(official, data, load, tmp_path):
    """Its file, how its names matched, its precision, and that nobody here ran the released files."""
    _, tensors, _ = official
    state = load_file(Path(__file__).parents[1] / "fixtures" / "umt_videomamba_tiny.safetensors")
    prefix = "state_dict/"
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    torch.save({"model": weights}, tmp_path / "released.pth")
    heads = {"num_attention_heads": 4}
    protocol = Protocol(name="official", version=1, summary="six clips", layout="world", rerank_k=6)
    quick = RunOptions(test_time_controls=False)

    def card_of(**settings):
        model = load_model(tmp_path / "released.pth", device="cpu", overrides=heads, **settings)
        numbered = Numbered(model, tensors["input/input_ids"], tensors["input/attention_mask"])
        return evaluate_model(numbered, data, protocol, load, options=quick)

    card = card_of()
    found = card["model"]["weights"]
    assert found["sha256"] == hashlib.sha256((tmp_path / "released.pth").read_bytes()).hexdigest()
    assert (found["file"], found["form"]) == ("released.pth", "official retrieval")
    assert found["num_matched"] + found["num_ignored"] == len(weights)
    assert (found["missing"], found["unexpected"], found["resized"]) == ([], [], [])
    assert card["model"]["precision"] == "float32"
    text = render_card(card)
    assert "equals the official code on random tiny models" in text
    assert "released files themselves were not run by this project" in text
    assert "released files themselves were not run" in render_page(card)
    for dtype, near in (("float64", 1e-4), ("bfloat16", 0.2)):
        other = card_of(dtype=dtype)
        assert other["model"]["precision"] == dtype
        for kind in ("itc", "itm@6"):  # both are scored in it, from features kept in fp32
            wanted = card["results"]["query_to_item"][kind]["mean_rank"]["value"]
            assert other["results"]["query_to_item"][kind]["mean_rank"]["value"] == pytest.approx(
                wanted, rel=near
            )
    weights["vision_encoder.norm.weights"] = weights.pop("vision_encoder.norm.weight")
    torch.save({"model": weights}, tmp_path / "released.pth")
    with pytest.raises(CheckpointError, match=r"vision_encoder\.norm\.weight") as raised:
        card_of()
    assert raised.value.missing and raised.value.unexpected
