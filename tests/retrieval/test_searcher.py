from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.errors import CapabilityError, DataError, InvalidInput
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.vector_log import LogVectors
from vlm.text import TruncationWarning


@pytest.fixture(params=["exact", "faiss"])
def searcher(request, built, make_encoder):
    if request.param == "faiss":
        pytest.importorskip("faiss")
    return Searcher(VideoIndex.open(built), make_encoder(), backend=request.param)


@pytest.mark.parametrize(
    ("word", "name", "start_s", "end_s"),
    [
        ("red", "rgb.mp4", 0, 8),
        ("green", "rgb.mp4", 8, 16),
        ("blue", "rgb.mp4", 16, 24),
        ("yellow", "yellow.mp4", 8, 16),
    ],
)
def test_the_right_moment_is_found(searcher, word, name, start_s, end_s) -> None:
    hits = searcher.search(word)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert len({hit.video_id for hit in hits}) == 3
    assert hits[0].path.endswith(name)
    assert (hits[0].start_s, hits[0].end_s) == pytest.approx((start_s, end_s))
    assert {hit.score_kind for hit in hits} == {"itc"}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all(hit.warning is None for hit in hits)


def test_the_score_is_the_inner_product(searcher) -> None:
    # red is (220, 20, 20): minus its mean, against itself, over 255 squared; coding moves it
    assert searcher.search("red")[0].score == pytest.approx((133.3 * 220 - 2 * 66.7 * 20) / 255**2, abs=0.02)


def test_backends_agree_to_the_last_bit(built, make_encoder) -> None:
    pytest.importorskip("faiss")
    exact, faiss = (
        Searcher(VideoIndex.open(built), make_encoder(), backend=name) for name in ("exact", "faiss")
    )
    for word in ("red", "green", "blue", "yellow", "grey"):
        for options in ({}, {"top_k": 1}, {"rerank": 4}, {"where": "duration_s > 7"}):
            assert exact.search(word, **options) == faiss.search(word, **options)


def test_top_k_counts_videos_however_many_segments_one_has(tmp_path, clip, colours, make_encoder) -> None:
    model = make_encoder()
    clip(tmp_path / "v" / "long.mp4", [(colours.red, 60)])
    clip(tmp_path / "v" / "short.mp4", [(colours.grey, 1)])
    index = VideoIndex.create(tmp_path / "i", model, segment_s=2, stride_s=1)
    index.add([tmp_path / "v"], model=model)
    hits = Searcher(index, model).search("red", top_k=2)
    assert [os.path.basename(hit.path) for hit in hits] == ["long.mp4", "short.mp4"]
    assert len(Searcher(index, model).search("red", top_k=10**6)) == 2


def _scores(index, model, rerank):
    hits = Searcher(index, model).search("green", rerank=rerank)
    return {hit.path: hit.score for hit in hits}


@pytest.mark.parametrize("stored", ["pooled", "full", "none"])
def test_reranking_follows_the_matching_head(tmp_path, movies, make_encoder, stored) -> None:
    model = make_encoder()
    index = VideoIndex.create(tmp_path / "i", model, store_tokens=stored)
    index.add([movies], model=model)
    searcher = Searcher(index, model)
    plain = searcher.search("yellow")
    hits = searcher.search("yellow", rerank=4)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    kinds = [hit.score_kind for hit in hits]
    assert kinds == sorted(kinds, key=["itm@4", "itc"].index) and "itm@4" in kinds
    # the toy's head is the best token's product: recompute it from the truth of the colours
    text = model.encode_text(["yellow"]).embedding[0].numpy()
    expected = float(np.dot(np.array([210, 210, 20]) / 255, text))
    assert hits[0].score / 2 == pytest.approx(expected, abs=0.02)  # log-odds: its two logits are opposites
    assert hits[0].path == plain[0].path
    # a segment that is half yellow holds the same best token as one that is all yellow
    assert hits[0].end_s > 8


def test_with_a_scale_head_and_embedding_rank_together(tmp_path, movies, make_encoder) -> None:
    """Log-odds plus scale times cosine, where the head alone and the embedding alone say something else."""
    model = make_encoder()
    index = VideoIndex.create(tmp_path / "i", model, segment_s=60, stride_s=60)
    index.add([movies], model=model)
    nearest, heads = (_scores(index, model, rerank) for rerank in (0, 3))
    assert len(nearest) == len(heads) == 3 and nearest != heads
    model.logit_scale = 30.0
    both = Searcher(index, model).search("green", rerank=3)
    assert [hit.score_kind for hit in both] == ["itm+itc@3"] * 3
    expected = {name: heads[name] + 30.0 * nearest[name] for name in heads}
    assert {hit.path: hit.score for hit in both} == pytest.approx(expected, abs=1e-4)
    assert [hit.path for hit in both] == sorted(expected, key=lambda name: -expected[name])


def test_rerank_within_one_video_moves_the_moment(tmp_path, clip, colours, make_encoder) -> None:
    """The mean prefers two pale seconds, the head the one with a single strong frame."""
    model = make_encoder()
    pale, strong = (170, 90, 90), (250, 0, 0)
    clip(tmp_path / "v.mp4", [(pale, 2), (strong, 0.5), ((0, 120, 120), 1.5)])
    index = VideoIndex.create(tmp_path / "i", model, segment_s=2, stride_s=2)
    index.add([tmp_path / "v.mp4"], model=model)
    (plain,) = Searcher(index, model).search("red")
    (reranked,) = Searcher(index, model).search("red", rerank=2)
    assert (plain.start_s, plain.score_kind) == (0, "itc")
    assert (reranked.start_s, reranked.score_kind) == (pytest.approx(2), "itm@2")


def test_reranking_without_tokens_survives_a_lost_file(tmp_path, movies, make_encoder) -> None:
    model = make_encoder()
    videos = shutil.copytree(movies, tmp_path / "v")
    index = VideoIndex.create(tmp_path / "i", model, store_tokens="none")
    index.add([videos], model=model)
    (videos / "rgb.mp4").unlink()
    hits = Searcher(index, model).search("red", rerank=9)
    kinds = {os.path.basename(hit.path): hit.score_kind for hit in hits}
    assert kinds == {"rgb.mp4": "itc", "grey.mp4": "itm@9", "yellow.mp4": "itm@9"}
    assert hits[-1].path.endswith("rgb.mp4")


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("duration_s > 10", {"rgb.mp4", "yellow.mp4"}),
        ("path like '%grey%'", {"grey.mp4"}),
        ("duration_s > 1000", set()),
        ("num_segments = 3 and not path like '%/deep/%'", set()),
    ],
)
def test_filters(searcher, where, names, top_k) -> None:
    for options in ({}, {"rerank": 5}):
        hits = searcher.search("red", top_k=top_k, where=where, **options)
        assert {os.path.basename(hit.path) for hit in hits} <= names
        assert len(hits) == min(top_k, len(names))


def test_by_image_and_by_video(searcher, movies, tmp_path, clip, colours) -> None:
    # the toy scores by brightness too: a pure colour decides
    pixels = np.zeros((50, 70, 3), np.uint8)
    pixels[..., 2] = 255
    Image.fromarray(pixels).save(tmp_path / "blue.png")
    Image.fromarray(pixels).convert("L").save(tmp_path / "grey.png")
    film = clip(tmp_path / "film.mp4", [((0, 0, 255), 20)])
    hits = [
        searcher.search(q, top_k=1)[0] for q in (pixels, Image.fromarray(pixels), tmp_path / "blue.png", film)
    ]
    assert all(hit.path.endswith("rgb.mp4") and hit.start_s == pytest.approx(16) for hit in hits)
    assert hits[0] == hits[1] == hits[2]
    assert searcher.search(tmp_path / "grey.png", top_k=1)


def test_an_encoded_query_finds_what_the_query_finds(searcher, movies) -> None:
    encoded = searcher.encode("red")
    for options in ({}, {"rerank": 4}, {"where": "duration_s > 10"}):
        assert searcher.search(encoded, **options) == searcher.search("red", **options)
    assert searcher.search(searcher.encode(movies / "grey.mp4")) == searcher.search(movies / "grey.mp4")


def test_a_segment_is_encoded_as_it_is_stored(searcher, colours) -> None:
    (green,) = searcher.search("green", top_k=1)
    assert green.start_s == 8.0
    for start_s, colour in ((8.4, colours.green), (0.0, colours.red), (99.0, colours.blue)):
        stored = searcher.encode_segment(green.video_id, start_s)
        assert stored.vector == pytest.approx(np.array(colour) / 255, abs=0.03)
    with pytest.raises(CapabilityError, match="only texts"):
        searcher.search(searcher.encode_segment(green.video_id, 0.0), rerank=2)
    with pytest.raises(InvalidInput, match="no video 'nobody'"):
        searcher.encode_segment("nobody", 0.0)


def test_queries_that_cannot_be_answered(searcher, tmp_path) -> None:
    (tmp_path / "x.png").write_text("no image")
    (tmp_path / "x.mp4").write_text("no video")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    for path, reason in (
        ("x.png", "undecodable"),
        ("x.mp4", "not_a_video"),
        ("bomb.png", "undecodable"),
        ("no.jpg", "missing"),
    ):
        with pytest.raises(DataError) as caught:
            searcher.search(tmp_path / path)
        assert caught.value.reason == reason
    for query, options, message in (
        ("", {}, "query is empty"),
        (" \n", {}, "query is empty"),
        ("caf\udce9", {}, "not text in UTF-8"),
        ("red", {"top_k": 0}, "top_k >= 1"),
        ("red", {"rerank": -1}, "rerank >= 0"),
        ("red", {"where": "1=1"}, "filter"),
        (np.zeros((4, 4), np.uint8), {}, "an image must be uint8"),
        (np.zeros((4, 4, 3)), {}, "an image must be uint8"),
    ):
        with pytest.raises(InvalidInput, match=message):
            searcher.search(query, **options)
    with pytest.raises(CapabilityError, match="only texts can be reranked"):
        searcher.search(np.zeros((4, 4, 3), np.uint8), rerank=5)


def test_a_model_that_cannot_rerank(tmp_path, movies, make_encoder) -> None:
    model = make_encoder(capabilities=["search"])
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([movies / "grey.mp4"], model=model)
    assert index.info()["store_tokens"] == "none"
    with pytest.raises(CapabilityError, match=r"'colours' \(video-text\) cannot rerank"):
        Searcher(index, model).search("red", rerank=5)


def test_an_endless_query_is_cut_with_a_warning(searcher) -> None:
    with pytest.warns(TruncationWarning, match="only the first 20000 are read"):
        hits = searcher.search("red " * 10_000)
    assert hits[0].path.endswith("rgb.mp4")
    assert searcher.unknown_words("red dog and blue beach") == ["dog", "and", "beach"]


def test_an_empty_index_has_no_hits(tmp_path, make_encoder) -> None:
    searcher = Searcher(VideoIndex.create(tmp_path / "i", make_encoder()), make_encoder())
    assert searcher.search("red") == searcher.search("red", rerank=3) == []


def test_a_searcher_holds_its_generation_until_told(tmp_path, movies, make_encoder) -> None:
    model = make_encoder()
    index = VideoIndex.create(tmp_path / "i", model)
    index.add([movies / "grey.mp4"], model=model)
    searcher = Searcher(VideoIndex.open(tmp_path / "i"), model)
    index.add([movies], model=model)
    index.remove([str(movies / "grey.mp4")])
    assert [os.path.basename(hit.path) for hit in searcher.search("red")] == ["grey.mp4"]
    searcher.refresh()
    assert [os.path.basename(hit.path) for hit in searcher.search("red")] == ["rgb.mp4", "yellow.mp4"]


def test_with_a_real_model(tmp_path, movies, real_model) -> None:
    """Vectors and logits of the index are the model's own."""
    from vlm.data import iter_segments, preprocess

    index = VideoIndex.create(tmp_path / "i", real_model, store_tokens="full")
    index.add([movies], model=real_model, batch_size=3)
    segments = list(iter_segments(movies / "rgb.mp4", [(0.0, 8.0), (16.0, 24.0)], 4))
    clips = torch.stack([preprocess(s.frames, real_model.preprocessing) for s in segments])
    with torch.inference_mode():
        text = real_model.encode_text(["a red thing"])
        features = real_model.encode_video(clips)
        score = float((features.embedding @ text.embedding.T).max())
        logits = real_model.match(features.tokens, text.tokens.expand(2, -1, -1), text.mask.expand(2, -1))
    searcher = Searcher(index, real_model)
    where = "path like '%rgb%'"
    assert searcher.search("a red thing", where=where)[0].score >= score - 2e-3
    (hit,) = searcher.search("a red thing", where=where, rerank=50)
    cosines = (features.embedding @ text.embedding.T)[:, 0]
    scale = 1 / real_model.temp.item()
    both = logits[:, 1] - logits[:, 0] + scale * cosines
    assert hit.score >= float(both.max()) - 5e-3 - scale * 2e-3
    pooled = VideoIndex.create(tmp_path / "p", real_model)
    pooled.add([movies], model=real_model, batch_size=3)
    features = pooled.manifest.features
    assert (features.store_tokens, features.token_pool) == ("pooled", 2)
    assert features.token_bytes / pooled.manifest.stride_s <= 60_000
    assert Searcher(pooled, real_model).search("a red thing", rerank=50)[0].score_kind == "itm+itc@50"
    assert Searcher(pooled, real_model).search(np.zeros((9, 9, 3), np.uint8))


def test_a_video_scores_as_its_best_segment_or_as_their_mean(built, make_encoder) -> None:
    index, model = VideoIndex.open(built), make_encoder()
    vectors = LogVectors(index.log, index.files(), index.manifest.features.dim)
    rows = np.arange(vectors.num_rows)
    query = model.encode_text(["red"]).embedding[0].numpy().astype(np.float64)
    scores = vectors.gather(rows).astype(np.float64) @ query
    owners = index.snapshot.row_video
    for aggregate, combine in (("max", np.max), ("mean", np.mean)):
        expected = {v.video_id: combine(scores[owners == i]) for i, v in enumerate(index.snapshot.videos)}
        hits = Searcher(index, model, backend="exact").search("red", aggregate=aggregate)
        assert [hit.video_id for hit in hits] == sorted(
            expected, key=lambda name: -np.float32(expected[name])
        )
        np.testing.assert_allclose(
            [hit.score for hit in hits], [expected[h.video_id] for h in hits], rtol=1e-6
        )
        assert {hit.score_kind for hit in hits} == {"itc" if aggregate == "max" else "itc_mean"}
    # either way the hit plays at the best moment
    best = {hit.video_id: hit.start_s for hit in Searcher(index, model).search("red")}
    assert {hit.video_id: hit.start_s for hit in hits} == best
    with pytest.raises(InvalidInput, match="mean without rerank"):
        Searcher(index, model).search("red", rerank=3, aggregate="mean")
