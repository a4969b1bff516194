"""Pixels: exact under reversal, only what is asked for, and no frame tells a direction by itself."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from vlm.world import render, sample_frames, sample_scene, twin
from vlm.world.clips import encode
from vlm.world.motion import motion
from vlm.world.scene import LAST


def first_sideways_move(scene):
    moves = [e for e in scene.timeline if e.kind == "move" and e.direction in ("left", "right")]
    return moves[0] if moves else None


def probe_accuracy(features, labels):
    """Fit a ridge classifier on one half, score the other; returns (accuracy, its 95 % half-width)."""
    features = np.concatenate([features, np.ones((len(features), 1))], 1)
    half = len(labels) // 2
    scale = features[:half].std(0) + 1e-6
    x, y = features[:half] / scale, 2.0 * labels[:half] - 1
    weights = np.linalg.solve(x.T @ x + 0.05 * half * np.eye(x.shape[1]), x.T @ y)
    right = ((features[half:] / scale @ weights) > 0) == labels[half:]
    return right.mean(), 1.96 * 0.5 / np.sqrt(len(right))


def test_reversal_is_exact_and_commutes_with_sampling():
    frames = sample_frames(8)
    assert frames.tolist() == [2, 7, 12, 17, 22, 27, 32, 37]
    assert (LAST - frames[::-1] == frames).all()
    assert sample_frames(1).tolist() == [20]  # a picture
    for index in range(40):
        scene = sample_scene("train", 2, index)
        assert (render(twin(scene), frames) == render(scene, frames)[::-1]).all()
        assert (render(twin(scene)) == render(scene)[::-1]).all()


def test_only_the_asked_frames_are_drawn_in_any_order():
    scene = sample_scene("test", 0, 1)
    whole = render(scene)
    assert whole.shape == (40, 64, 64, 3) and whole.dtype == np.uint8
    for asked in ([5], [39, 0, 5, 5], []):
        part = render(scene, asked)
        assert part.shape == (len(asked), 64, 64, 3) and (part == whole[asked]).all()


def test_larger_pictures_show_the_same_scene():
    scene = sample_scene("test", 0, 2)
    small, large = render(scene, [0, 20]), render(scene, [0, 20], size=128)
    assert large.shape == (2, 128, 128, 3)
    shrunk = large.reshape(2, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(shrunk - small).mean() < 8


@pytest.mark.parametrize(("frames", "size"), [([40], 64), ([-1], 64), ([0], 65), ([0], 0), ([[0]], 64)])
def test_wrong_frames_and_sizes_are_errors(frames, size):
    with pytest.raises(ValueError, match="expected"):
        render(sample_scene("train", 0, 0), frames, size=size)


@pytest.mark.parametrize("count", [0, 3, 4, 16, 20])
def test_asymmetric_sampling_is_refused(count):
    with pytest.raises(ValueError, match="odd"):
        sample_frames(count)


def test_noise_differs_between_frames_and_brightness_wanders():
    scene = replace(
        sample_scene("train", 0, 0), things=(), events=(), distractors=(), noise=4.0, brightness=0.0
    )
    still = replace(scene, background=replace(scene.background, vx=0.0, vy=0.0, base=60.0))
    frames = render(still).astype(float)
    noise = frames - frames.mean(0)
    assert 3.5 < noise.std() < 4.5
    correlation = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairwise(noise)]
    assert max(map(abs, correlation)) < 0.1
    bright = render(replace(still, brightness=0.04, noise=0.0)).mean((1, 2, 3))
    assert np.ptp(bright) > 1


def test_digits_stand_out_from_the_background():
    for index in range(60):
        scene = sample_scene("test", 1, index)
        frame = render(scene, [0])[0].astype(int)
        vivid = (frame.max(-1) - frame.min(-1)) > 90
        assert vivid.sum() > 25 * len(scene.things)


@pytest.fixture(scope="module")
def movers():
    found, index = [], 0
    while len(found) < 1600:
        scene = sample_scene("train", 77, index)
        index += 1
        event = first_sideways_move(scene)
        if event is not None:
            found.append((scene, event))
    return found


def colour_map(frame, colour):
    """Where in a frame a colour is: 16x16 sums and circular position, for a generous linear probe."""
    from vlm.world.scene import COLOURS

    target = np.array(COLOURS[colour], dtype=float)
    unit = target / np.linalg.norm(target)
    pixels = frame.astype(float)
    along = pixels @ unit
    off = np.linalg.norm(pixels - along[..., None] * unit, axis=-1)
    weight = np.clip(along - 2.5 * off - 40, 0, None)
    turn = np.exp(2j * np.pi * np.arange(64) / 64)
    total = weight.sum() + 1e-6
    where = (weight.sum(0) @ turn) / total, (weight.sum(1) @ turn) / total
    cells = weight.reshape(16, 4, 16, 4).sum((1, 3)).ravel() / total
    return np.array([*cells, *(part for w in where for part in (w.real, w.imag))]), where[0]


def test_the_first_frame_does_not_tell_left_from_right(movers):
    features, labels, control = [], [], []
    for scene, event in movers:
        colour = scene.things[event.subject].colour
        first, place = colour_map(render(scene, [0])[0], colour)
        features.append(first)
        labels.append(event.direction == "right")
        before = colour_map(render(scene, [event.start])[0], colour)[1]
        after = colour_map(render(scene, [event.start + 6])[0], colour)[1]
        control.append([np.angle(after / (before + 1e-9))])
    labels = np.array(labels)
    accuracy, margin = probe_accuracy(np.array(features), labels)
    assert abs(accuracy - 0.5) <= margin, accuracy
    assert probe_accuracy(np.array(control), labels)[0] > 0.9  # the same probe, given two frames, can tell


def test_one_decoded_frame_does_not_tell_left_from_right(movers, tmp_path):
    """Ghosts of other frames would show beside the digit: the coder sees the neighbours, unused."""
    import av

    shown, labels, centres = [], [], []
    for scene, event in movers[:1000]:
        middle = (event.start + event.end) // 2
        shown.append(render(scene, [middle - 1, middle, middle + 1]))
        labels.append(event.direction == "right")
        path = motion(scene, np.array([middle]))
        centres.append((path.x[event.subject, 0], path.y[event.subject, 0]))
    encode(np.concatenate(shown), tmp_path / "probe.mp4")
    with av.open(str(tmp_path / "probe.mp4")) as container:
        decoded = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert len(decoded) == 3 * len(shown)
    features = []
    for frame, (x, y) in zip(decoded[1::3], centres, strict=True):
        rows, columns = (int(y) + np.arange(-12, 12)) % 64, (int(x) + np.arange(-16, 16)) % 64
        patch = frame[np.ix_(rows, columns)].astype(float)
        features.append(np.concatenate([patch[:, 16:].mean(0) - patch[:, 15::-1].mean(0), patch.mean(0)]))
    accuracy, margin = probe_accuracy(np.array(features), np.array(labels))
    assert abs(accuracy - 0.5) <= margin, accuracy


def test_decoded_twins_are_the_same_frames_backwards(tmp_path):
    import av

    for index in range(6):
        scene = sample_scene("test", 6, index)
        both = []
        for each in (scene, twin(scene)):
            path = tmp_path / f"{each.clip_id}.mp4"
            encode(render(each), path)
            with av.open(str(path)) as container:
                packets = [p for p in container.demux(video=0) if p.size]
                assert len(packets) == 40 and all(packet.is_keyframe for packet in packets)
            with av.open(str(path)) as container:
                both.append(np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]))
        assert (both[0] == both[1][::-1]).all()
        assert np.abs(both[0].astype(int) - render(scene)).mean() < 3  # near-lossless
