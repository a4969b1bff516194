"""Multiple choice against a toy model whose scores are plain arithmetic on colours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vlm.answering import choose, find_evidence
from vlm.cli import main
from vlm.errors import CapabilityError, DataError, InvalidInput
from vlm.retrieval import Searcher, VideoIndex
from vlm.types import Preprocessing, TextFeatures, VideoFeatures

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}


def write_clip(path, scenes, fps=4):
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "preset": "ultrafast"})
        stream.width = stream.height = 32
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for colour, seconds in scenes:
            pixels = np.full((32, 32, 3), COLOURS[colour], np.uint8)
            for _ in range(seconds * fps):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    return path


class ColourModel:
    """Embeds a video as its mean colour, a text as the last colour it names; a match is their product."""

    kind, name, domain, fingerprint = "video-text", "colours", "open", "c" * 32
    device, logit_scale = torch.device("cpu"), None
    preprocessing = Preprocessing(num_frames=4, image_size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def __init__(self, capabilities=("search", "rerank", "choose")):
        self.capabilities = frozenset(capabilities)

    def encode_video(self, video):
        pooled = video.mean(dim=(3, 4))
        return VideoFeatures(pooled.repeat_interleave(4, dim=1), pooled, pooled.mean(dim=1))

    def encode_text(self, texts):
        named = [[word for word in text.split() if word in COLOURS] for text in texts]
        rows = torch.tensor([COLOURS[words[-1]] if words else (9, 9, 9) for words in named]) / 255.0
        rows = rows - rows.mean(dim=1, keepdim=True)
        return TextFeatures(rows[:, None], torch.ones(len(texts), 1, dtype=torch.int64), rows)

    def match(self, video_tokens, text_tokens, mask):
        score = (video_tokens.mean(dim=1) * text_tokens[:, 0]).sum(dim=1)
        return torch.stack([-score, score], dim=1)

    def score_candidates(self, video, questions, candidates):
        embedding = self.encode_video(video).embedding
        return [
            self.encode_text([f"{question} {option}" for option in options]).embedding @ embedding[0]
            for question, options in zip(questions, candidates, strict=True)
        ]

    def unknown_words(self, text):
        return [word for word in text.split() if word not in COLOURS]


@pytest.fixture
def index(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    write_clip(videos / "first.mp4", [("red", 8), ("blue", 8)])
    write_clip(videos / "second.mp4", [("green", 8)])
    index = VideoIndex.create(tmp_path / "index", ColourModel(), source="colours", segment_s=8, stride_s=8)
    index.add([str(videos)], model=ColourModel())
    return index


def ids(index):
    return {row.path.rsplit(b"/", 1)[-1].decode(): row.video_id for row in index.snapshot.videos}


@pytest.mark.parametrize(
    ("options", "video", "answer", "file", "start"),
    [
        (["red", "green"], "first.mp4", "red", "first.mp4", 0.0),
        (["green", "blue"], "first.mp4", "blue", "first.mp4", 8.0),
        (["red", "green"], "second.mp4", "green", "second.mp4", 0.0),
    ],
)
def test_the_right_choice_is_seen_at_its_moment(index, options, video, answer, file, start):
    result = choose(Searcher(index, ColourModel()), "which colour", options, video=ids(index)[video])
    assert result.answers[0].text == answer
    assert result.answers[0].score > result.answers[1].score
    assert {item.text for item in result.answers} == set(options)
    assert result.evidence.path.endswith(file)
    assert (result.evidence.start_s, result.answers[0].evidence[0].start_s) == (start, start)


def test_without_a_video_all_are_looked_through(index):
    hit = find_evidence(Searcher(index, ColourModel()), ["green"])
    assert hit.path.endswith("second.mp4")


def test_scores_are_the_models_own_on_the_evidence(index):
    model = ColourModel()
    result = choose(Searcher(index, model), "is it", ["red", "green", "blue"], video=ids(index)["second.mp4"])
    green = torch.tensor([20.0, 200.0, 20.0]) / 255
    for answer in result.answers:
        expected = model.encode_text([answer.text]).embedding[0] @ green
        assert answer.score == pytest.approx(float(expected), abs=0.03)  # the clip went through H.264


@pytest.mark.parametrize("options", [[], ["red"], ["red", "red"], ["red", " "], ["red", "red "]])
def test_fewer_than_two_different_choices_are_refused(index, options):
    with pytest.raises(InvalidInput, match="two or more different choices"):
        choose(Searcher(index, ColourModel()), "which", options)


def test_an_unknown_video_is_named(index):
    with pytest.raises(InvalidInput, match="no video \"x' or '1'='1\""):
        choose(Searcher(index, ColourModel()), "which", ["red", "blue"], video="x' or '1'='1")


def test_a_model_without_matching_head_cannot_choose(index):
    searcher = Searcher(index, ColourModel(capabilities=("search",)))
    with pytest.raises(CapabilityError, match="cannot choose among answers"):
        choose(searcher, "which", ["red", "blue"])


def test_evidence_that_is_gone_is_an_error(index):
    for row in index.snapshot.videos:
        with open(row.path, "wb") as file:
            file.write(b"")
    with pytest.raises(DataError):
        choose(Searcher(index, ColourModel()), "which", ["red", "blue"])


def test_the_command(index, monkeypatch, capsys):
    monkeypatch.setattr("vlm.cli.index.load", lambda source: (ColourModel(), source))
    words = ["ask", str(index.folder), "which colour", "--video", ids(index)["first.mp4"]]
    assert main([*words, "--choices", "green|blue", "--json"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["answer"] == "blue"
    assert [choice["text"] for choice in answer["choices"]] == ["blue", "green"]
    assert (answer["evidence"]["start_s"], answer["evidence"]["end_s"]) == (8.0, 16.0)
    assert answer["model_domain"] == "open"
    assert "not understood: which, colour" in printed.err
    assert main([*words, "--choices", "green|blue"]) == 0
    assert "seen in" in capsys.readouterr().out
    assert main([*words, "--choices", "blue"]) == 2
    capsys.readouterr()
    assert main(words) == 0  # without choices, the moment that fits the question
    assert "first.mp4 from" in capsys.readouterr().out
