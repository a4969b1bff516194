"""The split of what was never seen: frozen, exact under reversal, in words that are known."""

import av
import numpy as np
import pytest
import yaml

from vlm.assets import asset
from vlm.world import caption, gallery, sample_scene, templates, twin, vocabulary
from vlm.world.captions import choose_template
from vlm.world.clips import CODECS, codec_of, describe, encode, freeze_ood
from vlm.world.render import render, texture
from vlm.world.sampling import NUM_OOD_TEXTURES, NUM_TEXTURES


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene("ood", 7, index) for index in range(60)]


def decoded(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_it_is_the_frozen_one():
    frozen = yaml.safe_load(asset("eval/protocols/world-ood.yaml").read_text())["freeze"]
    assert freeze_ood() == frozen, "give another world another version and protocol name"


def test_looks_and_words_are_of_no_other_split(scenes):
    others = [
        sample_scene(split, 7, index) for split in ("train", "val", "test", "combo") for index in range(60)
    ]
    for pick in (
        lambda scene: {scene.background.texture},
        lambda scene: {thing.size for thing in scene.things},
        lambda scene: {choose_template(scene)},
        lambda scene: {codec_of(scene)},
    ):
        seen, unseen = (set().union(*map(pick, group)) for group in (others, scenes))
        assert not seen & unseen
    assert {choose_template(scene) for scene in scenes} == set(templates("ood"))


def test_every_word_is_known(scenes):
    known = {word for item in vocabulary() for word in item.split()}
    for scene in scenes:
        assert set(caption(scene).split()) <= known


def test_new_textures_are_periodic_and_not_flat():
    for index in range(NUM_TEXTURES, NUM_TEXTURES + NUM_OOD_TEXTURES):
        picture = texture(index, 1)
        assert picture.shape == (128, 128)
        assert picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.05
        assert (picture[:64] == picture[64:]).all() and (picture[:, :64] == picture[:, 64:]).all()


def test_decoded_twins_are_the_same_frames_backwards_in_every_codec(scenes, tmp_path):
    """Every frame is coded by itself, so that no frame tells of its neighbours."""
    for scene in scenes[:4]:
        both = []
        for each in (scene, twin(scene)):
            path = tmp_path / f"{each.clip_id}.mp4"
            encode(render(each), path, codec_of(each))
            with av.open(str(path)) as container:
                assert container.streams.video[0].codec_context.name in ("mjpeg", "vp9", "libvpx-vp9")
                packets = [packet for packet in container.demux(video=0) if packet.size]
            assert len(packets) == 40 and all(packet.is_keyframe for packet in packets)
            both.append(decoded(path))
        assert (both[0] == both[1][::-1]).all()
        assert np.abs(both[0].astype(int) - render(scene)).mean() < 4
    assert len({codec_of(scene) for scene in scenes[:4]}) == len(CODECS) - 1


def test_the_tracker_sees_what_the_captions_say(witness, scenes, tmp_path):
    sure = 0
    for scene in scenes[:16]:
        encode(render(scene), tmp_path / "clip.mp4", codec_of(scene))
        told = witness(decoded(tmp_path / "clip.mp4"))
        if told.sure:
            sure += 1
            record = describe(scene)
            assert {item["colour"] for item in record["objects"]} == set(told.things)
            wanted = sorted((event["kind"], str(event["direction"])) for event in record["events"])
            assert sorted((event["kind"], str(event.get("direction"))) for event in told.events) == wanted
    assert sure >= 8


def test_a_gallery_with_twins():
    pairs = list(gallery("ood", 3, 5, twins=True))
    assert all(one.backwards() == other for one, other in zip(pairs[::2], pairs[1::2], strict=True))
