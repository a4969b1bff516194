import dataclasses

import pytest
import torch

from vlm.models import VideoMamba, VideoMambaConfig, from_official, sized
from vlm.models.masking import keep_visible, make_mask
from vlm.models.video_mamba import pool_tokens

MASKED_RUNS = {
    "video_tube": "mask_tube",
    "video_attention": "mask_attention",
    "video_random": "mask_random",
    "image_mask": "mask_image",
}
PRETRAIN = ("videomamba_pretrain_tiny", "videomamba_pretrain_tiny_k2", "videomamba_pretrain_tiny_k3i1")
POOLS = ("cls", "avg", "cls+avg", "cls_cat_avg")
SMALL = {"width": 32, "depth": 2, "num_frames": 4, "image_size": 28, "patch_size": 7, "state_size": 4}


def tiny(**settings):
    return VideoMamba(VideoMambaConfig(**{**SMALL, **settings}))


@pytest.mark.parametrize("name", ["videomamba_cls_tiny", "videomamba_cls_tiny_tubelet2"])
def test_classifier_form_equals_the_official_one_layer_by_layer(official, agree, name):
    numbers = official(name)
    model, report = from_official(numbers.state_dict)
    encoder = model.vision_encoder
    trace = {}
    for index, block in enumerate(encoder.layers):
        block.register_forward_hook(lambda _m, _i, out, index=index: trace.update({index: out}))
    video = numbers.tensors["input/video"].transpose(1, 2)
    with torch.inference_mode():
        agree(encoder.embed(video), numbers.tensors["trace/embed"])
        output = encoder(video)
        logits = model(video)
    for index, (mixed, residual) in trace.items():
        agree(mixed, numbers.tensors[f"trace/layer{index}/mixer_out"])
        agree(residual, numbers.tensors[f"trace/layer{index}/residual"])
    agree(output.tokens, numbers.tensors["output/tokens_normed"])
    agree(output.tokens[:, 0], numbers.tensors["output/features"])
    agree(logits, numbers.tensors["output/logits"])
    assert model.kind == "classifier" and report.kind == "classifier" and len(trace) == 4


def test_image_form_equals_the_official_one(official, agree):
    numbers = official("videomamba_image_tiny")
    model, report = from_official(numbers.state_dict)
    assert report.kind == "image" and model.config.vision.num_frames == 1
    image = numbers.tensors["input/image"][:, None]
    with torch.inference_mode():
        agree(model.vision_encoder(image).tokens[:, 0], numbers.tensors["output/features"])
        agree(model(image), numbers.tensors["output/logits"])


def run_inputs(numbers, run):
    """Return a run's video (b, t, c, h, w) and its mask without the class token."""
    source = "input/image" if run.startswith("image") else "input/video"
    video = numbers.tensors[source].transpose(1, 2)
    if run not in MASKED_RUNS:
        return video, None
    mask = numbers.tensors[f"input/{MASKED_RUNS[run]}"].bool()
    assert not mask[:, 0].any()
    return video, mask[:, 1:]


@pytest.mark.parametrize("name", [*PRETRAIN, "videomamba_pretrain_tiny_tubelet2"])
def test_pretraining_form_equals_the_official_one(official, agree, name):
    numbers = official(name)
    encoder = from_official(numbers.state_dict)[0].vision_encoder
    runs = sorted({key.split("/")[0] for key in numbers.tensors if key.endswith("x_vis_with_cls")})
    assert "video_nomask" in runs
    for run in runs:
        video, mask = run_inputs(numbers, run)
        with torch.inference_mode():
            output = encoder(video, mask)
            agree(output.tokens, numbers.tensors[f"{run}/x_vis_with_cls"])
            agree(torch.stack(output.alignment), numbers.tensors[f"{run}/x_clip_vis_raw"])
            if mask is not None:
                aligned = encoder.align(output, mask, video.shape[1])
                agree(aligned, numbers.tensors[f"{run}/x_clip"])
                if f"{run}/x_clip_video_sm_l2" in numbers.tensors:
                    unit = torch.nn.functional.normalize(aligned, dim=-1)
                    agree(unit, numbers.tensors[f"{run}/x_clip_video_sm_l2"])
        check_pools(numbers, agree, run, encoder, output.tokens, video.shape[1])


def check_pools(numbers, agree, run, encoder, tokens, num_frames):
    """Compare every kind of pooling; the reference cuts the tokens into runs by input frames."""
    checked = 0
    for pool in POOLS:
        for label, groups in (("no_temporal", None), ("keep_temporal", num_frames)):
            expected = numbers.tensors.get(f"{run}/pooled/{pool}/{label}")
            if expected is None:
                continue
            pooled = pool_tokens(tokens, pool, groups)
            with torch.inference_mode():
                agree(encoder.pool_norm(pooled), expected)
            checked += 1
    assert checked >= 4


def test_image_mode_ignores_the_table_of_times():
    encoder = tiny().eval()
    torch.nn.init.normal_(encoder.temporal_pos_embedding)
    picture = torch.randn(2, 1, 3, 28, 28)
    with torch.inference_mode():
        before = encoder(picture).tokens
        encoder.temporal_pos_embedding.zero_()
        assert torch.equal(encoder(picture).tokens, before)
        assert before.shape == (2, 17, 32)


def test_order_of_frames_matters():
    encoder = tiny(init="mamba").eval()
    video = torch.randn(1, 4, 3, 28, 28)
    with torch.inference_mode():
        gap = encoder(video).tokens[:, 0] - encoder(video.flip(1)).tokens[:, 0]
    assert gap.abs().max() > 1e-3


def test_free_size_trains_and_every_weight_gets_a_gradient():
    encoder = tiny(alignment_width=8, alignment_layers=2, drop_path=0.1)
    video = torch.randn(2, 4, 3, 28, 28)
    mask = torch.arange(64).expand(2, -1) % 2 == 0
    output = encoder(video, mask)
    loss = encoder.pool(output.tokens, 4).square().sum() + encoder.align(output, mask, 4).sum()
    loss.backward()
    missing = [name for name, p in encoder.named_parameters() if p.grad is None]
    # the table's columns sum to a constant behind a layer norm only in the bias-free direction
    assert missing == []
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_recomputing_activations_changes_no_gradient():
    video = torch.randn(2, 4, 3, 28, 28)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        encoder = tiny(activation_checkpointing=recompute).train()
        encoder(video).tokens.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 30
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_published_sizes_have_the_published_number_of_parameters():
    with torch.device("meta"):
        encoder = VideoMamba(sized("middle", alignment_width=512))
    assert sum(p.numel() for p in encoder.parameters()) == 73_942_656
    assert len(encoder.state_dict()) == 556
    assert (sized("tiny").width, sized("small").width, sized("base").depth) == (192, 384, 24)
    with pytest.raises(ValueError, match="one of tiny, small, middle, base, got 'huge'"):
        sized("huge")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 3, 3, 28, 28), "takes 4 frames .* got 3"),
        ((2, 8, 3, 28, 28), "num_frames=8"),
        ((2, 4, 3, 32, 32), "image_size=32"),
        ((2, 4, 1, 28, 28), r"expected frames of shape \(3, 28, 28\)"),
        ((4, 3, 28, 28), r"expected video of shape \(batch"),
    ],
)
def test_wrong_shapes_are_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        tiny()(torch.zeros(shape))


def test_wrong_masks_are_refused():
    tokens = torch.zeros(2, 6, 3)
    uneven = torch.zeros(2, 6, dtype=torch.bool)
    uneven[0, 0] = True
    with pytest.raises(ValueError, match="got 5 to 6"):
        keep_visible(tokens, uneven)
    with pytest.raises(ValueError, match="expected a bool mask"):
        keep_visible(tokens, torch.zeros(2, 6))
    with pytest.raises(ValueError, match="do not divide into 4"):
        pool_tokens(torch.zeros(1, 7, 3), "avg", 4)
    with pytest.raises(ValueError, match="no alignment heads"):
        tiny().align(tiny()(torch.zeros(1, 4, 3, 28, 28)), None, 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_size": 30}, "not a multiple of patch_size"),
        ({"tubelet": 3}, "not a multiple of tubelet"),
        ({"drop_path": 1.0}, "drop_path must be in"),
        ({"depth": 0}, "depth must be at least 1"),
    ],
)
def test_impossible_configurations_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        VideoMambaConfig(**{**SMALL, **settings})


def test_a_bag_of_frames_sees_each_frame_alone():
    bag, whole = tiny(independent_frames=True, time_std=1.0), tiny(time_std=1.0)
    whole.load_state_dict(bag.state_dict())
    video, order = torch.randn(2, 4, 3, 28, 28), torch.tensor([2, 0, 3, 1])
    with torch.inference_mode():
        tokens, shuffled = bag(video).tokens, bag(video[:, order]).tokens
        pictures = [bag(video[:, frame : frame + 1]).tokens for frame in range(4)]
        aware = whole.pool(whole(video).tokens, 4), whole.pool(whole(video[:, order]).tokens, 4)
    assert tokens.shape == (2, 1 + 4 * 16, 32)
    for frame, picture in enumerate(pictures):
        torch.testing.assert_close(tokens[:, 1 + 16 * frame : 17 + 16 * frame], picture[:, 1:])
    torch.testing.assert_close(tokens[:, 0], torch.stack([p[:, 0] for p in pictures]).mean(dim=0))
    torch.testing.assert_close(bag.pool(tokens, 4)[:, order], bag.pool(shuffled, 4))
    assert not torch.allclose(aware[0][:, order], aware[1], atol=1e-3)


def test_a_bag_of_frames_refuses_what_joins_frames():
    with pytest.raises(ValueError, match="independent_frames needs tubelet 1"):
        tiny(independent_frames=True, tubelet=2)
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 5] = True
    with pytest.raises(ValueError, match="masks of kind 'tube'"):
        tiny(independent_frames=True)(torch.randn(1, 4, 3, 28, 28), mask)


def test_a_bag_of_frames_is_aligned_frame_by_frame():
    """Also with places dropped: each frame's part is that of the picture alone."""
    bag = tiny(independent_frames=True, alignment_width=24, alignment_layers=2)
    video, places = torch.randn(2, 4, 3, 28, 28), torch.zeros(2, 16, dtype=torch.bool)
    places[0, [1, 4]] = places[1, [0, 9]] = True
    mask = places.repeat(1, 4)
    with torch.inference_mode():
        output = bag(video, mask)
        pictures = [bag(video[:, frame : frame + 1], places) for frame in range(4)]
        aligned = bag.align(output, mask, 4)
    assert aligned.shape == (2, 2, 1 + 4 * 14, 24)
    for frame, picture in enumerate(pictures):
        part = slice(1 + 14 * frame, 15 + 14 * frame)
        torch.testing.assert_close(output.tokens[:, part], picture.tokens[:, 1:])
        for mine, theirs in zip(output.alignment, picture.alignment, strict=True):
            torch.testing.assert_close(mine[:, part], theirs[:, 1:])


def test_tables_start_as_wide_as_asked():
    torch.manual_seed(0)
    published, wide = tiny(), tiny(position_std=1.0, time_std=0.5)
    assert 0.015 < published.pos_embed.std() < 0.025
    assert published.temporal_pos_embedding.abs().max() == 0
    assert 0.8 < wide.pos_embed.std() < 1.0  # a normal cut at two standard deviations has 0.88
    assert 0.4 < wide.temporal_pos_embedding.std() < 0.6
    with pytest.raises(ValueError, match="position_std must be above 0"):
        tiny(position_std=0.0)


@pytest.mark.parametrize(("order", "swapped"), [("temporal", (0, 1)), ("alternating", (0,))])
def test_blocks_that_scan_along_time_equal_blocks_over_tokens_put_in_that_order(order, swapped):
    torch.manual_seed(0)
    encoder = tiny(scan_order=order, time_std=1.0).eval()
    video = torch.randn(2, 4, 3, 28, 28)
    places = encoder.config.grid**2
    by_place = torch.tensor([0, *(1 + t * places + n for n in range(places) for t in range(4))])
    back = by_place.argsort()
    hidden, residual = encoder.embed(video), torch.zeros(())
    for index, block in enumerate(encoder.layers):
        residual = hidden + residual
        normed = block.norm(residual)[0]
        hidden = block.mixer(normed[:, by_place])[:, back] if index in swapped else block.mixer(normed)
    expected = encoder.norm(hidden + residual)[0]
    assert torch.allclose(encoder(video).tokens, expected, atol=1e-5)
    encoder.config = dataclasses.replace(encoder.config, scan_order="spatial")
    assert not torch.allclose(encoder(video).tokens, expected, atol=1e-2)


def test_a_picture_has_no_time_to_scan_along():
    torch.manual_seed(0)
    encoder = tiny(scan_order="temporal").eval()
    picture = torch.randn(2, 1, 3, 28, 28)
    found = encoder(picture).tokens
    encoder.config = dataclasses.replace(encoder.config, scan_order="spatial")
    assert torch.equal(encoder(picture).tokens, found)


@pytest.mark.parametrize(("order", "swapped"), [("temporal", (0, 1)), ("alternating", (0,))])
def test_the_visible_places_of_tubes_are_scanned_along_time(order, swapped):
    torch.manual_seed(0)
    encoder = tiny(scan_order=order, time_std=1.0).eval()
    video = torch.randn(2, 4, 3, 28, 28)
    mask = make_mask("tube", 0.5, batch=2, num_steps=4, grid=(4, 4))
    by_place = torch.tensor([0, *(1 + t * 8 + n for n in range(8) for t in range(4))])
    back = by_place.argsort()
    hidden, residual = encoder.embed(video, mask), torch.zeros(())
    for index, block in enumerate(encoder.layers):
        residual = hidden + residual
        normed = block.norm(residual)[0]
        hidden = block.mixer(normed[:, by_place])[:, back] if index in swapped else block.mixer(normed)
    expected = encoder.norm(hidden + residual)[0]
    assert torch.allclose(encoder(video, mask).tokens, expected, atol=1e-5)


def test_other_masks_need_the_published_order():
    mask = make_mask(
        "frame_row", 0.5, batch=1, num_steps=4, grid=(4, 4), generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(ValueError, match="scan_order 'temporal' goes along time and needs the same places"):
        tiny(scan_order="temporal")(torch.randn(1, 4, 3, 28, 28), mask)
    picture = torch.tensor([[True] * 5 + [False] * 11])
    assert tiny(scan_order="temporal")(torch.randn(1, 1, 3, 28, 28), picture).tokens.shape[1] == 12


@pytest.mark.parametrize("settings", [{"patch_size": 14}, {"patch_size": 2}, {"patch_size": 4, "tubelet": 2}])
def test_a_convolutional_stem_halves_and_has_no_tubelets(settings):
    with pytest.raises(ValueError, match="a convolutional stem needs tubelet 1"):
        VideoMambaConfig(**{**SMALL, "stem": "convolutional", **settings})
