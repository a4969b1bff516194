"""Features are computed once, survive, belong to one model and way of looking, and give the same card."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from vlm.errors import DataError, IntegrityError, InvalidInput
from vlm.evaluation.encoders.cache import CachedTokens, FeatureCache
from vlm.evaluation.encoders.shards import Shard, encode_shard
from vlm.evaluation.features import encode_texts, encode_videos
from vlm.evaluation.rerank import score_pairs, videos_in_block
from vlm.evaluation.runner import RunOptions, evaluate_model

CHOICE = {"sampling": "middle"}


class Counting:
    """A loader that counts what is opened, by name."""

    def __init__(self, load, broken=()):
        self.load, self.broken, self.opened = load, set(broken), []

    def __call__(self, path, preprocessing):
        self.opened.append(path.name)
        if path.name in self.broken:
            raise DataError(f"{path}: torn", "truncated")
        return self.load(path, preprocessing)


def without_costs(card):
    card = json.loads(json.dumps(card))
    del card["cost"]
    return card


def test_a_second_run_opens_nothing_and_gives_the_same_card(toy, on_disk, protocol, load, tmp_path):
    model, counting = toy("order"), Counting(load)
    plain = evaluate_model(model, on_disk, protocol, load)
    options = RunOptions(cache=tmp_path / "cache", batch_size=3)
    cards = [evaluate_model(model, on_disk, protocol, counting, options=options) for _ in range(2)]
    assert sorted(counting.opened) == sorted(path.name for path in on_disk.paths)
    assert [card["cost"]["videos_encoded"] for card in cards] == [20, 0]
    assert without_costs(cards[0]) == without_costs(cards[1]) == without_costs(plain)


def test_another_model_another_preprocessing_another_choice_of_frames(toy, tmp_path):
    model = toy("order")
    folders = {
        FeatureCache(tmp_path, model, CHOICE).folder,
        FeatureCache(tmp_path, model, {"trim_s": 30}).folder,
    }
    model.preprocessing = dataclasses.replace(model.preprocessing, antialias=True)
    folders.add(FeatureCache(tmp_path, model, CHOICE).folder)
    folders.add(FeatureCache(tmp_path, toy("bag"), CHOICE).folder)
    assert len(folders) == 4
    model.fingerprint = ""
    with pytest.raises(InvalidInput, match="no fingerprint"):
        FeatureCache(tmp_path, model, CHOICE)


def test_a_video_that_changed_is_encoded_again_and_one_renamed_is_not(toy, on_disk, load, tmp_path):
    model, counting = toy("order"), Counting(load)
    cache = FeatureCache(tmp_path / "cache", model, CHOICE)
    encode_videos(model, on_disk.paths, counting, cache=cache)
    counting.opened.clear()
    on_disk.paths[3].write_text("other bytes")
    renamed = on_disk.paths[5].rename(tmp_path / "elsewhere.mp4")
    paths = [*on_disk.paths[:5], renamed, *on_disk.paths[6:]]
    found = encode_videos(model, paths, counting, cache=cache)
    assert counting.opened == [on_disk.paths[3].name]
    assert not found.rejected


def test_a_damaged_file_is_encoded_again(toy, on_disk, load, tmp_path):
    model, counting = toy("order"), Counting(load)
    cache = FeatureCache(tmp_path / "cache", model, CHOICE)
    before = encode_videos(model, on_disk.paths, counting, cache=cache, keep_tokens=True)
    files = sorted(cache.folder.rglob("*.npz"))
    flipped = bytearray(files[0].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    files[0].write_bytes(flipped)
    files[1].write_bytes(files[1].read_bytes()[:-30])
    files[2].write_bytes(b"")
    with pytest.raises(IntegrityError, match="run the same command again"):
        before.tokens[0:20]
    counting.opened.clear()
    after = encode_videos(model, on_disk.paths, counting, cache=cache, keep_tokens=True)
    assert len(counting.opened) == 3
    np.testing.assert_array_equal(after.embeddings[""], before.embeddings[""])
    assert after.tokens[0:20].shape == before.tokens.shape


def test_equal_videos_under_two_names_are_encoded_once(toy, on_disk, load, tmp_path):
    model, counting = toy("order"), Counting(load)
    on_disk.paths[1].write_bytes(on_disk.paths[0].read_bytes())
    cache = FeatureCache(tmp_path / "cache", model, CHOICE)
    found = encode_videos(model, on_disk.paths, counting, cache=cache, batch_size=8)
    assert (found.num_encoded, len(counting.opened)) == (19, 19)
    np.testing.assert_array_equal(found.embeddings[""][0], found.embeddings[""][1])


@pytest.mark.parametrize("count", [1, 3, 7, 25])
def test_parts_encode_every_video_once_whatever_their_number(toy, on_disk, protocol, load, tmp_path, count):
    model, counting = toy("order"), Counting(load)
    options = RunOptions(cache=tmp_path / "cache", batch_size=2)
    encoded = [
        encode_shard(model, on_disk, protocol, counting, Shard(number, count), options)
        for number in range(count)
    ]
    assert sum(encoded) == len(on_disk.paths)
    assert len(counting.opened) == len(set(counting.opened)) == len(on_disk.paths)
    card = evaluate_model(model, on_disk, protocol, counting, options=options)
    assert len(counting.opened) == len(on_disk.paths)
    assert card["results"]["query_to_item"]["itm@6"]["recall@1"]["value"] == 1.0


def test_broken_videos_with_a_cache(toy, on_disk, protocol, load, tmp_path):
    """They are left out as without one, in every run; reranking goes on with the others."""
    model = toy("order")
    broken = [path.name for path in on_disk.paths[:2]]
    plain = evaluate_model(
        model, on_disk, protocol, Counting(load, broken), options=RunOptions(allow_missing=2)
    )
    options = RunOptions(cache=tmp_path / "cache", allow_missing=2)
    for _ in range(2):
        card = evaluate_model(model, on_disk, protocol, Counting(load, broken), options=options)
        assert without_costs(card) == without_costs(plain)
    strict = dataclasses.replace(options, allow_missing=1)
    with pytest.raises(InvalidInput, match="2 of 20 clips cannot be read"):
        evaluate_model(model, on_disk, protocol, Counting(load, broken), options=strict)


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "0/0", "1/2/3"])
def test_a_shard_that_is_none(text):
    with pytest.raises(Exception, match="I/N"):
        Shard.parse(text)


class Watched:
    """Token features that remember the largest block that was asked for."""

    def __init__(self, tokens):
        self.tokens, self.shape, self.largest, self.asked = tokens, tokens.shape, 0, 0

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        block = self.tokens[rows]
        self.largest = max(self.largest, block.nbytes)
        self.asked += len(block)
        return block


@pytest.mark.parametrize("num_videos", [1, 3, 20])
def test_matching_keeps_to_its_memory_and_reads_each_video_once(toy, data, load, num_videos):
    model = toy("order")
    videos = encode_videos(model, data.paths, load, keep_tokens=True)
    texts = encode_texts(model, data.queries)
    pairs = tuple(np.random.default_rng(0).integers(0, 20, (2, 300)))
    whole = score_pairs(model, texts, videos.tokens, pairs)
    watched = Watched(videos.tokens)
    bound = num_videos * videos.tokens[0].nbytes
    bounded = score_pairs(model, texts, watched, pairs, batch_size=7, memory_bytes=bound)
    np.testing.assert_array_equal(bounded.logits, whole.logits)
    assert watched.largest <= bound
    assert watched.asked <= len(watched)


def test_activitynet_fits_into_16_gib():
    """4,917 videos of 8 x 196 tokens of 576 numbers: 17.8 GB on disk, 2 GiB of them at once."""
    shape = (4917, 8 * 196, 576)
    on_disk = 4 * int(np.prod(shape))
    assert on_disk == pytest.approx(17.76e9, rel=1e-3)
    block = videos_in_block(shape, RunOptions().memory_bytes)
    assert block == 594
    held = 4 * block * shape[1] * shape[2]
    batch = 4 * RunOptions().pair_batch_size * shape[1] * shape[2]
    texts = 4 * 4917 * 150 * 768  # every paragraph at its limit of 150 tokens
    scores = 4 * 4917**2 + 8 * (1024 * 4917 + 4917 * 512)
    pairs = 2 * 4917 * 128 * (8 * 6 + 4)
    assert held + batch + texts + scores + pairs < 6 * 2**30


def test_cached_tokens_of_the_kept(toy, on_disk, load, tmp_path):
    model = toy("order")
    cache = FeatureCache(tmp_path / "cache", model, CHOICE)
    videos = encode_videos(model, on_disk.paths, load, keep_tokens=True, cache=cache)
    plain = encode_videos(model, on_disk.paths, load, keep_tokens=True)
    assert isinstance(videos.tokens, CachedTokens)
    np.testing.assert_array_equal(videos.tokens[0:20], plain.tokens)
    np.testing.assert_array_equal(videos.tokens.keep([3, 17])[0:2], plain.tokens[[3, 17]])
