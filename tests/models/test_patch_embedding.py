import pytest
import torch

from vlm.models.patch_embedding import (
    ConvolutionalStem,
    PatchEmbedding,
    SharedBatchNorm,
    inflate_patches,
    resize_positions,
    resize_times,
    sinusoid_table,
)


@pytest.mark.parametrize("grid", [7, 14, 18, 20, 24])
def test_positions_are_resized_as_officially(official, agree, grid):
    tensors = official("interpolation").tensors
    agree(resize_positions(tensors["input/pos_embed_14x14"], grid), tensors[f"spatial/14to{grid}"])


@pytest.mark.parametrize("steps", [1, 4, 8, 12, 16, 32, 64])
def test_times_are_resized_as_officially(official, agree, steps):
    tensors = official("interpolation").tensors
    agree(resize_times(tensors["input/temporal_8"], steps), tensors[f"temporal/8to{steps}"])


def test_equal_lengths_change_nothing(official):
    tensors = official("interpolation").tensors
    space, time = tensors["input/pos_embed_14x14"], tensors["input/temporal_8"]
    assert torch.equal(resize_positions(space, 14), space)
    assert torch.equal(resize_times(time, 8), tensors["temporal/8to8_ckpt_num_frame_minus1"])
    agree_with = tensors["temporal/tubelet2_16frames_to_32frames"]
    assert torch.allclose(resize_times(time, 16), agree_with, atol=1e-6)


def test_the_class_slot_is_kept_and_a_table_that_is_no_square_is_refused():
    table = torch.randn(1, 17, 3)
    assert torch.equal(resize_positions(table, 7)[:, 0], table[:, 0])
    with pytest.raises(ValueError, match="got 18; only squares"):
        resize_positions(torch.randn(1, 18, 3), 7)


@pytest.mark.parametrize("mode", ["center", "mean"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_kernels_are_inflated_as_officially(official, agree, frames, mode):
    numbers = official("videomamba_image_tiny")
    kernel = numbers.state_dict["patch_embed.proj.weight"][:4]
    agree(inflate_patches(kernel, frames, mode=mode), numbers.tensors[f"inflate/t{frames}_{mode}"])


def test_an_unknown_inflation_is_refused():
    with pytest.raises(ValueError, match="'center' or 'mean', got 'middle'"):
        inflate_patches(torch.zeros(1, 1, 2, 2), 2, mode="middle")


@pytest.mark.parametrize(("positions", "width"), [(17, 48), (65, 48)])
def test_the_sinusoid_table_is_the_official_one(official, agree, positions, width):
    expected = official("interpolation").tensors[f"sinusoid/{positions}x{width}"]
    agree(sinusoid_table(positions, width), expected)


def test_the_wide_sinusoid_table_is_the_official_one(official, agree):
    expected = official("interpolation").tensors["sinusoid/197x576_first8"]
    agree(sinusoid_table(197, 576)[:, :8], expected)


@pytest.mark.parametrize("tubelet", [1, 2])
def test_tokens_are_tubelets_of_patches_frame_by_frame_and_row_by_row(tubelet):
    embedding = PatchEmbedding(12, 4, tubelet, 3).double()
    video = torch.randn(2, 4, 3, 8, 12, dtype=torch.float64)
    tokens = embedding(video)
    assert tokens.shape == (2, 4 // tubelet, 6, 12)
    step, row, column = 1, 1, 2
    patch = video[
        1, step * tubelet : (step + 1) * tubelet, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4
    ]
    expected = (embedding.proj.weight * patch.transpose(0, 1)).sum((1, 2, 3, 4)) + embedding.proj.bias
    assert torch.allclose(tokens[1, step, row * 3 + column], expected, atol=1e-12)


def test_a_picture_fills_the_tubelet_by_standing_still():
    embedding = PatchEmbedding(12, 4, 3, 3)
    picture = torch.randn(2, 1, 3, 8, 8)
    assert torch.allclose(embedding(picture), embedding(picture.expand(-1, 3, -1, -1, -1)), atol=1e-6)


def test_a_convolutional_stem_gives_one_token_a_patch_row_by_row_and_mixes_no_frames():
    torch.manual_seed(0)
    stem = ConvolutionalStem(32, 8, 3).eval()
    video = torch.randn(2, 3, 3, 32, 16)
    tokens = stem(video)
    assert tokens.shape == (2, 3, 8, 32)
    changed = video.clone()
    changed[1, 2, :, 24:, 8:] += 1.0  # the last patch of one frame, and what the convolutions see of it
    differs = (stem(changed) != tokens).any(dim=-1)
    assert (
        differs[1, 2, 7] and not differs[0].any() and not differs[1, :2].any() and not differs[1, 2, :4].any()
    )


def test_the_shared_batch_norm_is_the_usual_one_in_one_process():
    torch.manual_seed(0)
    shared, usual = SharedBatchNorm(4), torch.nn.BatchNorm2d(4)
    maps = torch.randn(6, 4, 5, 5)
    assert torch.equal(shared(maps), usual(maps))
    assert torch.equal(shared.running_var, usual.running_var)
    assert torch.equal(shared.eval()(maps), usual.eval()(maps))
