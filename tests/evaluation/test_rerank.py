"""Head and embedding together, against a truth that neither knows alone."""

import dataclasses

import numpy as np
import pytest
import torch

from vlm.evaluation.runner import evaluate_model

SCALE = 7.0


@pytest.fixture(name="told")
def told_fixture(toy):
    """A model, and log p(clip | caption): its head knows only how p differs from exp(SCALE * cosine).

    That ratio is what telling true pairs from negatives drawn by the cosine teaches.
    """
    model, rng = toy("order"), np.random.default_rng(1)
    log_p = rng.normal(size=model.truth.shape).astype(np.float32) + 1.5 * model.truth.numpy()
    model.truth = torch.from_numpy(rng.normal(size=log_p.shape).astype(np.float32) / 2)
    ratio = torch.from_numpy(log_p) - SCALE * model.truth

    def match(video_tokens, text_tokens, mask):
        texts = (text_tokens[:, :1] == model.truth[None]).all(-1).float().argmax(1)
        odds = ratio[texts, video_tokens[:, 0].argmax(1)]
        # only the difference of the two is the odds: both are shifted, pair by pair
        shift = torch.cos(1000 * odds)
        return torch.stack([shift - odds / 3, shift + 2 * odds / 3], dim=1)

    model.match, model.logit_scale = match, SCALE
    return model, log_p


def test_the_sum_ranks_as_the_truth_does(told, data, protocol, load):
    model, log_p = told
    card = evaluate_model(model, data, dataclasses.replace(protocol, rerank_k=20), load)
    right = [log_p[query].argmax() in items for query, items in enumerate(_positives(data))]
    found = card["results"]["query_to_item"]
    assert found["itm+itc@20"]["recall@1"]["value"] == pytest.approx(np.mean(right))
    assert found["itm@20"]["recall@1"]["value"] < np.mean(right) > found["itc"]["recall@1"]["value"]
    texts_of = {clip: {q for q, items in enumerate(_positives(data)) if clip in items} for clip in range(20)}
    back = [log_p[:, clip].argmax() in texts for clip, texts in texts_of.items() if texts]
    found = card["results"]["item_to_query"]["itm+itc@20"]
    assert found["recall@1"]["value"] == pytest.approx(np.mean(back))
    # a caption and its twin's, each before its own clip: half of the twins' grid, by the truth
    own, other = data.query_clip, data.twin_of[data.query_clip]
    queries = np.arange(len(own))
    turned = np.mean(log_p[queries, own] > log_p[queries, other])
    assert card["twins"]["itm+itc@20"]["direction"]["value"] == pytest.approx(turned)


def test_without_a_scale_the_head_ranks_alone(told, data, protocol, load):
    model, _ = told
    model.logit_scale = None
    card = evaluate_model(model, data, protocol, load)
    assert set(card["results"]["query_to_item"]) == {"itc", "itm@6"} == set(card["twins"])


def _positives(data):
    offsets = data.positives.offsets
    return [data.positives.items[first:last] for first, last in zip(offsets[:-1], offsets[1:], strict=True)]
