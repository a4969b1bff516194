"""Annotations become galleries and queries by each protocol's rule, or are refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vlm.data.decoding import open_video
from vlm.errors import ConfigError, InvalidInput, UsageError
from vlm.evaluation import load_protocol, protocol_files
from vlm.evaluation import protocol as protocol_module
from vlm.evaluation.benchmarks.checking import check_benchmark
from vlm.evaluation.benchmarks.reading import read_choice_set, read_records, read_retrieval_set
from vlm.evaluation.features import encode_texts
from vlm.evaluation.launch import load_clip
from vlm.types import Preprocessing


@pytest.fixture
def folder(fixtures):
    return fixtures / "annotations"


def read(name, path, *overrides):
    return read_retrieval_set(load_protocol(name, ("expected=null", *overrides)), path, None)


def test_every_protocol_is_of_one_schema():
    for name in protocol_files():
        protocol = load_protocol(name)
        assert protocol.summary and protocol.version == 1
        if protocol.layout == "benchmark":
            assert protocol.files.main and protocol.origin and protocol.split
            assert protocol.expected or name == "own"
        for published in protocol.published:
            assert all(0 < value < 100 for value in published.measures().values())
            assert len(published.text_to_video) in (0, 1, 3)


def test_an_unknown_key_names_the_nearest(tmp_path, monkeypatch):
    text = "name: mine\nversion: 1\nsummary: x\norigin: {annotations: a, videos: b, terms: c, licence: d}\n"
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(protocol_module, "asset", lambda _: tmp_path)
    with pytest.raises(ConfigError, match="origin: unknown key 'licence'"):
        load_protocol("mine")
    (tmp_path / "mine.yaml").write_text("name: mine\nversion: 1\nsummary: x\ntextt_tokens: 3\n")
    with pytest.raises(ConfigError, match="unknown key 'textt_tokens'; did you mean 'text_tokens'"):
        load_protocol("mine")


@pytest.mark.parametrize(
    "override",
    ["frames=0", "trim_s=0", "text_tokens=2", "positives=all-true", "captions=each", "expected.video=3",
     'known=[{name: a, sha256: "12", source: b}]', "published=[{model: a, score: itc, source: b}]",
     "published=[{model: a, score: itc, source: b, accuracy: 101}]", "minimal_pairs=true"],
)  # fmt: skip
def test_impossible_settings(override):
    with pytest.raises(UsageError):
        load_protocol("msvd", (override,))


def test_every_caption_the_first_or_all_joined(folder):
    every = read("msvd", folder / "msvd")
    assert every.clip_ids == ("-4wsuPCjDBc_5_15", "mv89psg6zh4_33_46")
    assert every.query_clip.tolist() == [0, 0, 0, 1, 1]
    assert every.queries[:2] == ("a squirrel eats", "a squirrel eats")
    first = read("msvd-first", folder / "msvd")
    assert first.queries == ("a squirrel eats", "a bird bathes")
    joined = read("didemo", folder / "didemo")
    assert joined.queries[joined.clip_ids.index("39457011@N00_5403825464_79c0f43b72")] == (
        "dog first rolls onto its side dog rolls over onto its legs. the puppy runs away the dog runs."
    )


def test_equal_texts_share_their_clips_only_if_asked(folder):
    strict = read("msrvtt-full", folder / "msrvtt/msrvtt_mdata_test.json")
    assert strict.positives.sizes.tolist() == [1] * 8
    shared = read("msrvtt-full", folder / "msrvtt/msrvtt_mdata_test.json", "positives=same-text")
    singing = [
        number for number, text in enumerate(shared.queries) if text.lower().startswith("a man is singing")
    ]
    assert len(singing) == 2
    for number in singing:  # "A man is singing" and "a man is singing!"
        assert sorted(shared.positives[number]) == sorted(shared.query_clip[singing])
    assert strict.annotations_sha256 == shared.annotations_sha256


def test_one_text_with_several_videos(folder):
    data = read("ssv2-template", folder / "ssv2")
    assert data.clip_ids == ("1", "2", "3")
    assert [sorted(data.positives[query]) for query in range(2)] == [[0, 1], [1, 2]]


def test_the_order_of_the_file_changes_nothing(folder, tmp_path):
    rows = json.loads((folder / "msrvtt/msrvtt_ret_test1k.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(rows[::-1]))
    one, other = (
        read("msrvtt-1ka", folder / "msrvtt/MSRVTT_JSFUSION_test.csv"),
        read("msrvtt-1ka", tmp_path / "a.json"),
    )
    assert (one.queries, one.clip_ids) == (other.queries, other.clip_ids)
    assert one.annotations_sha256 == other.annotations_sha256
    rows[0]["caption"] += "."
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read("msrvtt-1ka", tmp_path / "a.json").annotations_sha256 != one.annotations_sha256


def test_wrong_counts_are_refused_with_every_difference(folder):
    with pytest.raises(InvalidInput, match=r"videos: expected 670, found 2; captions: .* expected=null"):
        read_retrieval_set(load_protocol("msvd"), folder / "msvd", None)
    with pytest.raises(InvalidInput, match="test_list.txt, looked for beside it"):
        read_retrieval_set(load_protocol("msvd"), folder / "msvd/raw-captions.json", None)


def test_videos_of_a_benchmark(folder, tmp_path):
    for name in ("-4wsuPCjDBc_5_15.avi", "deep/mv89psg6zh4_33_46.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    data = read_retrieval_set(load_protocol("msvd", ("expected=null",)), folder / "msvd", tmp_path)
    assert [path.name for path in data.paths] == ["-4wsuPCjDBc_5_15.avi", "mv89psg6zh4_33_46.mp4"]
    (tmp_path / "mv89psg6zh4_33_46.avi").touch()
    with pytest.raises(InvalidInput, match="'mv89psg6zh4_33_46' cannot be looked for: ambiguous"):
        read_retrieval_set(load_protocol("msvd", ("expected=null",)), folder / "msvd", tmp_path)
    report = check_benchmark(load_protocol("msvd", ("expected=null",)), folder / "msvd", tmp_path)
    assert report.missing == [("mv89psg6zh4_33_46", "ambiguous")]


def test_multiple_choice(folder, tmp_path):
    protocol = load_protocol("msrvtt-mc", ("expected=null",))
    data = read_choice_set(protocol, folder / "questions/msrvtt_mc_test.json", tmp_path)
    (question,) = data.questions
    assert (data.clip_ids, question.candidates[question.answer]) == (("video9770",), "four")
    with pytest.raises(InvalidInput, match="2 questions have no candidates"):
        read_choice_set(protocol, folder / "questions/val.jsonl", tmp_path)
    with pytest.raises(InvalidInput, match="questions: expected 2990, found 1"):
        read_choice_set(load_protocol("msrvtt-mc"), folder / "questions/msrvtt_mc_test.json", tmp_path)


def test_files_of_other_tasks_are_of_no_layout(folder):
    with pytest.raises(InvalidInput, match="no known layout of captions"):
        read_records(load_protocol("msvd"), folder / "questions/val.jsonl")
    with pytest.raises(InvalidInput, match="no known layout of questions"):
        read_records(load_protocol("msvd-qa"), folder / "msvd/captions_msvd.json")


def test_only_the_first_seconds_are_seen(tmp_path):
    """50 frames at 8 a second, frame n of brightness 5 n: of the first 3 s that is 24 frames."""
    from vlm.world.clips import encode

    frames = np.broadcast_to((5 * np.arange(50, dtype=np.uint8))[:, None, None, None], (50, 64, 64, 3))
    path = tmp_path / "long.mp4"
    encode(np.ascontiguousarray(frames), path)
    p = Preprocessing(num_frames=4, image_size=64, mean=(0, 0, 0), std=(1, 1, 1))

    def shown(trim_s):
        return (load_clip(path, p, trim_s)[:, 0].mean((1, 2)) * 255 / 5).round().to(torch.int64).tolist()

    with open_video(path) as video:
        assert video.info.num_frames == 50
    assert shown(None) == shown(60.0) == [5, 18, 30, 43]
    assert shown(3.0) == [2, 8, 14, 20]
    assert shown(0.01) == [0, 0, 0, 0]


def test_texts_are_cut_where_the_protocol_says_and_counted(model_folder):
    from vlm.models import load_model

    model = load_model(model_folder, device="cpu")
    texts = ["the red 3 moves left", "the red 3 moves left and stops", "a blue 5"]
    whole, cut = encode_texts(model, texts), encode_texts(model, texts, max_tokens=7)
    assert (whole.num_truncated, cut.num_truncated) == (0, 1)
    assert [len(row) for row in cut.tokens] == [7, 7, 5]
    np.testing.assert_allclose(cut.embeddings[[0, 2]], whole.embeddings[[0, 2]], atol=1e-6)
    assert np.abs(cut.embeddings[1] - whole.embeddings[1]).max() > 1e-4
