"""Features of a file and objects of Python, measured like models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vlm import world
from vlm.data import preprocess
from vlm.errors import InvalidInput
from vlm.evaluation.encoders.sources import open_encoder
from vlm.evaluation.encoders.stored import StoredFeatures
from vlm.evaluation.encoders.wrapped import wrap_encoder
from vlm.evaluation.features import encode_texts, encode_videos
from vlm.evaluation.runner import RunOptions, evaluate_model
from vlm.types import TextFeatures, VideoFeatures


@pytest.fixture
def features(toy, data, load):
    model = toy("order")
    return {
        "video_embeddings": encode_videos(model, data.paths, load).embeddings[""][::-1].copy(),
        "video_ids": np.asarray([f"{name}.mp4" for name in data.clip_ids[::-1]]),
        "text_embeddings": encode_texts(model, data.queries).embeddings,
        "texts": np.asarray(data.queries),
        "num_frames": np.asarray(8),
    }


def write(path, features):
    if path.suffix == ".npz":
        np.savez(path, **features)
    else:
        metadata = {name: json.dumps(features[name].tolist()) for name in ("video_ids", "texts")}
        tensors = {name: torch.from_numpy(features[name]) for name in ("video_embeddings", "text_embeddings")}
        save_file(tensors, path, {**metadata, "num_frames": str(int(features["num_frames"]))})
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_features_file_scores_as_the_model_did(features, toy, data, protocol, load, tmp_path, suffix):
    stored = open_encoder(f"features:{write(tmp_path / f'mine{suffix}', features)}", None, "cpu")
    card = evaluate_model(stored, data, protocol, load)
    model = evaluate_model(toy("order"), data, protocol, load, options=RunOptions(test_time_controls=False))
    for direction in ("query_to_item", "item_to_query"):
        assert card["results"][direction]["itc"] == model["results"][direction]["itc"]
    assert card["protocol"] == model["protocol"]
    assert (card["model"]["name"], card["model"]["kind"]) == ("mine", "features")
    assert card["model"]["preprocessing"] == {"num_frames": 8}
    assert set(card["results"]["query_to_item"]) == {"itc"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_embeddings": np.zeros((3, 4, 5), np.float32)}, "expected \\(videos, e\\)"),
        ({"text_embeddings": np.zeros((20, 3), np.float32)}, "expected \\(videos, e\\) and \\(texts, e\\)"),
        ({"video_ids": np.asarray(["a"])}, "1 names of 20 videos"),
        ({"video_ids": np.asarray(["a"] * 20)}, "the video 'a' has two rows"),
        ({"video_ids": np.asarray(["a"] * 20, object)}, "not a features file"),
        ({"text_embeddings": np.full((20, 20), np.nan, np.float32)}, "not finite"),
        ({"num_frames": np.asarray(0)}, "num_frames is below 1"),
        ({"texts": None}, "not a features file"),
    ],
)
def test_features_files_that_are_none(features, tmp_path, change, message):
    changed = {name: value for name, value in {**features, **change}.items() if value is not None}
    with pytest.raises(InvalidInput, match=message):
        StoredFeatures(write(tmp_path / "f.npz", changed))


def test_files_that_are_no_features_at_all(tmp_path):
    for name in ("f.npz", "f.safetensors"):
        with pytest.raises(InvalidInput, match="not a features file"):
            StoredFeatures(tmp_path / name)
        (tmp_path / name).write_bytes(b"PK\x03\x04 something else")
        with pytest.raises(InvalidInput, match="not a features file"):
            StoredFeatures(tmp_path / name)


def test_missing_features_are_counted_as_missing_videos(features, data, protocol, load, tmp_path):
    fewer = {
        **features,
        "video_ids": features["video_ids"][1:],
        "video_embeddings": features["video_embeddings"][1:],
    }
    stored = StoredFeatures(write(tmp_path / "f.npz", fewer))
    with pytest.raises(InvalidInput, match="1 of 20 clips cannot be read"):
        evaluate_model(stored, data, protocol, load)
    card = evaluate_model(stored, data, protocol, load, options=RunOptions(allow_missing=1))
    assert card["data"]["missing"][0]["clip"] == data.clip_ids[-1]
    fewer = {**features, **{name: features[name][1:] for name in ("texts", "text_embeddings")}}
    if len(set(data.queries)) == len(data.queries):
        with pytest.raises(InvalidInput, match="1 of 20 queries have no features"):
            evaluate_model(StoredFeatures(write(tmp_path / "g.npz", fewer)), data, protocol, load)


class Frames:
    """Somebody's model: an embedding of each frame, as arrays, of any length."""

    def __init__(self, toy):
        self.toy = toy

    def encode_video(self, video):
        return 3.0 * self.toy.encode_video(video).embedding.numpy()[:, None].repeat(4, axis=1)

    def encode_text(self, texts):
        return 7.0 * self.toy.encode_text(texts).embedding.numpy()


class WithHead(Frames):
    def encode_video(self, video):
        return VideoFeatures(*self.toy.encode_video(video))

    def encode_text(self, texts):
        return TextFeatures(*self.toy.encode_text(texts))

    def match(self, *arguments):
        return self.toy.match(*arguments)


def test_any_object_is_measured_like_a_model(toy, on_disk, protocol, load, tmp_path):
    data = on_disk
    model = toy("order")
    wanted = evaluate_model(model, data, protocol, load)
    plain = wrap_encoder(Frames(model), preprocessing=model.preprocessing, name="theirs")
    card = evaluate_model(plain, data, protocol, load)
    assert (
        card["results"]["query_to_item"]["itc"]["recall@1"]
        == wanted["results"]["query_to_item"]["itc"]["recall@1"]
    )
    assert (card["model"]["name"], set(card["results"]["query_to_item"])) == ("theirs", {"itc"})
    headed = wrap_encoder(WithHead(model), preprocessing=model.preprocessing, fingerprint="v1")
    card = evaluate_model(headed, data, protocol, load, options=RunOptions(cache=tmp_path))
    assert card["results"] == wanted["results"]
    with pytest.raises(InvalidInput, match="no fingerprint"):
        evaluate_model(plain, data, protocol, load, options=RunOptions(cache=tmp_path))


def test_objects_that_cannot_be_measured(toy):
    model = toy("order")
    with pytest.raises(ValueError, match="the method encode_video"):
        wrap_encoder(object(), preprocessing=model.preprocessing)

    class Wrong(Frames):
        def encode_text(self, texts):
            return np.zeros(3)

    with pytest.raises(ValueError, match=r"must return 2 rows, got the shape \(3,\)"):
        wrap_encoder(Wrong(model), preprocessing=model.preprocessing).encode_text(["a", "b"])


def test_the_embedding_of_frames_is_the_mean_of_their_directions(toy):
    model = toy("order")

    class Two:
        def encode_video(self, video):
            return torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])

        def encode_text(self, texts):
            return torch.tensor([[0.0, 3.0]])

    wrapped = wrap_encoder(Two(), preprocessing=model.preprocessing)
    assert wrapped.encode_video(torch.zeros(1)).embedding.tolist() == [[0.5, 0.5]]
    assert wrapped.encode_text(["x"]).embedding.tolist() == [[0.0, 1.0]]


def test_an_open_clip_tower_sees_a_bag_of_frames(official_clip, scenes, data, protocol):
    """From its name to a card: twins tie exactly, so that nothing beyond a coin decides between them."""
    frames = [world.render(scene, world.sample_frames(8)) for scene in scenes]
    model = open_encoder(official_clip, 8, "cpu")
    assert model.kind == "frames"

    def load(path, preprocessing):
        assert preprocessing.num_frames == 8
        return preprocess(frames[int(path.name)], preprocessing)

    card = evaluate_model(model, data, protocol, load, options=RunOptions(test_time_controls=False))
    twins = card["twins"]["itc"]
    assert twins["recall@1"]["value"] <= 0.5
    assert twins["direction"]["value"] == pytest.approx(0.5, abs=0.3)
    assert set(card["results"]["query_to_item"]) == {"itc"}
    assert card["data"]["queries_truncated"] == 0
    paragraph = "a red three moves up and a blue seven goes left, " * 12  # 77 pieces are read of it
    assert model.count_cut(["red", paragraph, "up " * 75, "up " * 76]) == 2
