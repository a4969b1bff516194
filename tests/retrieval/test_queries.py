"""Sums of queries: against the sum written out, in Python, and as words of a command line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.errors import CapabilityError, InvalidInput, UsageError
from vlm.models import load_model
from vlm.retrieval import Mix, Moment, Part, Searcher, VideoIndex
from vlm.retrieval.queries.encoding import QueryEncoder
from vlm.retrieval.queries.terms import parse_moment, parse_term


@pytest.fixture
def searcher(built, make_encoder) -> Searcher:
    return Searcher(VideoIndex.open(built), make_encoder())


def unit(vector: np.ndarray) -> np.ndarray:
    return vector.astype(np.float64) / np.linalg.norm(vector)


def name(hit) -> str:
    return os.path.basename(hit.path)


def test_a_sum_is_the_weighted_sum_of_unit_vectors(searcher, colours) -> None:
    picture = np.full((32, 32, 3), colours.blue, np.uint8)
    video_id = searcher.search("yellow", top_k=1)[0].video_id
    mix = Mix((Part("red"), Part(picture, 0.5), Part(Moment(video_id, 8.0), -0.25)))
    expected = (
        unit(searcher.encode("red").vector)
        + 0.5 * unit(searcher.encode(picture).vector)
        - 0.25 * unit(searcher.encode_segment(video_id, 8.0).vector)
    )
    found = searcher.encode(mix)
    np.testing.assert_allclose(found.vector, unit(expected), atol=1e-6)
    assert found.text is None
    assert searcher.search(mix) == searcher.search(found)


def test_red_and_green_without_green_is_red(searcher) -> None:
    # red and green make yellow, and so the toy looks for yellow
    assert name(searcher.search(Mix((Part("red"), Part("green"))))[0]) == "yellow.mp4"
    mix = Mix((Part("red"), Part("green"), Part("green", -1.0)))
    (first, *_) = searcher.search(mix)
    assert (name(first), first.start_s) == ("rgb.mp4", 0)
    np.testing.assert_allclose(searcher.encode(mix).vector, unit(searcher.encode("red").vector), atol=1e-6)


def test_one_part_alone_is_the_query_itself(searcher) -> None:
    assert searcher.search(Mix((Part("red", 3.0),)), rerank=4) == searcher.search("red", rerank=4)


def test_a_moment_is_a_query(searcher) -> None:
    hit = searcher.search("blue", top_k=1)[0]
    assert searcher.search(Moment(hit.video_id, hit.start_s)) == searcher.search(
        searcher.encode_segment(hit.video_id, hit.start_s)
    )
    with pytest.raises(InvalidInput, match="no video 'nobody'"):
        searcher.search(Moment("nobody", 0.0))


def test_sums_that_mean_nothing_are_refused(searcher) -> None:
    with pytest.raises(InvalidInput, match="cancel"):
        searcher.search(Mix((Part("red"), Part("red", -1.0))))
    with pytest.raises(InvalidInput, match="before anything can be taken away"):
        Mix((Part("red", -1.0),))
    for parts in ((), (Part("red"),) * 17):
        with pytest.raises(InvalidInput, match="1 to 16"):
            Mix(parts)
    for weight in (0.0, 1e9, float("nan")):
        with pytest.raises(InvalidInput, match="weight"):
            Part("red", weight)
    with pytest.raises(InvalidInput, match="seconds"):
        Moment("x", float("inf"))
    with pytest.raises(CapabilityError, match="reranked"):
        searcher.search(Mix((Part("red"), Part("blue"))), rerank=2)


def test_what_was_rejected_is_left_out_and_what_is_like_it_comes_later(searcher, make_encoder) -> None:
    hits = searcher.search("red")
    rest = searcher.search("red", unlike=[Moment(hits[0].video_id, hits[0].start_s)])
    assert {hit.video_id for hit in rest} == {hit.video_id for hit in hits[1:]}
    # the direction moved: what resembled the rejected moment lost more than what did not
    lost = {name(hit): hit.score for hit in hits}
    won = {name(hit): hit.score for hit in rest}
    vector = searcher.encode("red").vector
    away = unit(vector) - 0.25 * unit(searcher.encode_segment(hits[0].video_id, hits[0].start_s).vector)
    row = searcher.encode_segment(rest[0].video_id, rest[0].start_s).vector.astype(np.float64)
    assert won[name(rest[0])] == pytest.approx(float(row @ unit(away)), abs=1e-5)
    assert set(won) < set(lost)
    assert searcher.search("red", unlike=[Moment(hit.video_id, 0.0) for hit in hits]) == []


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a dog", Part("a dog")),
        ("text:a dog: brown", Part("a dog: brown")),
        ("0.5*text:snow", Part("snow", 0.5)),
        ("2*like:ab@cd@12.5", Part(Moment("ab@cd", 12.5), 2.0)),
        ("image:a/b.png", Part(Path("a/b.png"))),
        ("video:a*b.mp4", Part(Path("a*b.mp4"))),
        ("3*x", Part("3*x")),
    ],
)
def test_terms(word, expected) -> None:
    assert parse_term(word) == expected
    assert parse_term(word, -1.0).weight == -expected.weight


@pytest.mark.parametrize(
    "word",
    ["", "  ", "like:abc", "like:@3", "like:abc@", "like:abc@x", "0*text:a", "img:dog.jpg", "x*text:red"],
)
def test_terms_that_cannot_be_read(word) -> None:
    with pytest.raises(InvalidInput):
        parse_term(word)


@pytest.mark.parametrize("word", ["", "abc", "@3", "abc@", "abc@x", "abc@nan"])
def test_moments_that_cannot_be_read(word) -> None:
    with pytest.raises(InvalidInput, match="seconds|SECONDS"):
        parse_moment(word)


def test_the_command_line_adds_and_takes_away(call_vlm, built, searcher, tmp_path, colours) -> None:
    picture = tmp_path / "blue.png"
    Image.fromarray(np.full((32, 32, 3), colours.blue, np.uint8)).save(picture)
    video_id = searcher.search("yellow", top_k=1)[0].video_id

    def first(*words: str) -> str:
        code, printed, _ = call_vlm("search", str(built), *words)
        assert code == 0
        return printed.split("\n")[0]

    assert "rgb.mp4" in first("red", "--plus", f"3*image:{picture}", "--minus", f"like:{video_id}@8")
    assert "00:16.0" in first("red", "--plus", f"3*image:{picture}")
    assert "yellow.mp4" in first("--plus", "red", "--plus", "green")
    assert video_id not in first("yellow", "--unlike", f"{video_id}@8", "--json")
    assert call_vlm("search", str(built), "--minus", "red")[0] == UsageError.exit_code
    assert call_vlm("search", str(built), "red", "--unlike", "nobody@3")[0] == InvalidInput.exit_code


def test_the_command_line_says_how_strong_hits_are_and_when_there_are_none(call_vlm, built) -> None:
    code, printed, _ = call_vlm("search", str(built), "red")
    assert code == 0 and " strong " in printed
    code, printed, said = call_vlm("search", str(built), "grey", "--min-strength", "weak")
    assert (code, printed) == (0, "") and "nothing found that is at least weak" in said


def test_a_text_is_the_same_vector_however_many_threads_there_are() -> None:
    encoder, before = QueryEncoder(load_model("demo", device="cpu")), torch.get_num_threads()
    texts = [f"a red {digit} moves left" + " and a blue one jumps" * (digit % 4) for digit in range(12)]
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(np.stack([encoder.encode(text).vector for text in texts]))
            # what is not a text keeps its threads
            assert torch.get_num_threads() == count
        with pytest.raises(InvalidInput):
            encoder.encode("  ")
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
