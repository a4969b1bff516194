"""Teachers of tokens: the official one's numbers, input statistics and sizes, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vlm.errors import InvalidInput
from vlm.models import (
    EncoderConfig,
    EncoderModel,
    VideoMambaConfig,
    VideoTextModel,
    load_model,
    save_model,
)
from vlm.models.teachers.token_teachers import InputAdapter, class_attention, load_teacher
from vlm.types import Preprocessing

STUDENT = VideoMambaConfig(width=48, depth=2, num_frames=4, image_size=64)
PREPROCESSING = Preprocessing(num_frames=4, image_size=64)
CPU = torch.device("cpu")


@pytest.fixture
def encoder(tmp_path):
    """A saved encoder with random weights, its folder and itself."""
    torch.manual_seed(1)
    config = EncoderConfig(vision=VideoMambaConfig(width=32, depth=2, num_frames=4, image_size=64))
    model = EncoderModel(config, preprocessing=PREPROCESSING, name="small")
    return save_model(model, tmp_path / "small"), model.eval()


def teach(source, student=STUDENT, preprocessing=PREPROCESSING, **settings):
    return load_teacher(str(source), student, preprocessing, device=CPU, **settings)


@pytest.mark.parametrize("run", ["attention_video", "attention_image"])
def test_clip_tokens_and_attention_equal_the_official_ones(official_clip, official, agree, run):
    numbers = official("umt_videomamba_tiny").tensors
    video = numbers["input/image" if run.endswith("image") else "input/video"]
    output = teach(official_clip, normalisation="student")(video)
    agree(output.tokens, numbers[f"pretrain_{run}/teacher_output"])
    agree(output.attention.flatten(0, 1), numbers[f"pretrain_{run}/teacher_attn"])


def test_clip_sees_its_own_statistics(official_clip):
    teacher = teach(official_clip)
    pixels = torch.rand(1, 4, 3, 64, 64)
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    found = teacher(normalised(PREPROCESSING.mean, PREPROCESSING.std))
    expected = teach(official_clip, normalisation="student")(normalised(clip_mean, clip_std))
    assert torch.allclose(found.tokens, expected.tokens, atol=1e-5)


def test_inputs_of_another_size_are_resized_as_officially(official):
    numbers = official("umt_videomamba_tiny").tensors
    video = numbers["input/video"]
    adapter = InputAdapter(Preprocessing(image_size=64), Preprocessing(image_size=48))
    frames = rearrange(video, "b t c h w -> b (c t) h w")  # as the reference's memory lies
    expected = F.interpolate(frames, (48, 48), mode="bicubic", align_corners=False)
    expected = rearrange(expected, "b (c t) h w -> b t c h w", c=3)
    assert torch.allclose(adapter(video), expected, atol=1e-6)


def test_the_last_blocks_are_read_in_order(official_clip):
    visual = load_model(official_clip, device="cpu").tower.visual
    blocks = []
    for block in visual.transformer.resblocks:
        block.register_forward_hook(lambda _, __, output: blocks.append(output))
    video = torch.randn(1, 4, 3, 64, 64)
    with torch.no_grad():
        visual(video[0])
    tokens = teach(official_clip, layers=2, interval=2, normalisation="student")(video).tokens
    assert tokens.shape == (2, 1, 65, 24)
    for found, block in zip(tokens, (blocks[0], blocks[2]), strict=True):
        expected = block @ visual.proj
        assert torch.allclose(found[0, 1:], expected[:, 1:].flatten(0, 1), atol=1e-5)
        assert torch.allclose(found[0, 0], expected[:, 0].mean(0), atol=1e-5)


def test_clip_looks_at_the_middle_frame_of_a_tubelet(official_clip):
    student = VideoMambaConfig(width=48, depth=2, num_frames=4, image_size=64, tubelet=2)
    video = torch.randn(2, 4, 3, 64, 64)
    output = teach(official_clip, student)(video)
    assert output.tokens.shape == (1, 2, 33, 24) and output.attention.shape == (2, 2, 16)
    assert torch.equal(output.tokens, teach(official_clip)(video[:, [1, 3]]).tokens)


def test_class_attention_is_that_of_the_module():
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    tokens = torch.randn(3, 7, 32)
    _, weights = attention(tokens, tokens, tokens, need_weights=True)
    assert torch.allclose(class_attention(attention, tokens), weights[:, 0, 1:], atol=1e-6)


def test_an_encoder_teaches_its_normalised_tokens(encoder):
    folder, model = encoder
    video = torch.randn(2, 4, 3, 64, 64)
    teacher = teach(folder)
    output = teacher(video)
    assert (teacher.width, teacher.has_attention, output.attention) == (32, False, None)
    with torch.no_grad():
        assert torch.equal(output.tokens[0], model.vision_encoder(video).tokens)


def test_a_model_of_the_digit_world_teaches(root):
    if not (root / "eval" / "models" / "demo-teacher").is_dir():
        pytest.skip("the demonstration model's teacher is not here")
    student = VideoMambaConfig(width=32, depth=2, num_frames=8, image_size=64)
    teacher = teach("demo-teacher", student, Preprocessing(image_size=64))
    assert teacher(torch.randn(1, 8, 3, 64, 64)).tokens.shape == (1, 1, 129, teacher.width)


def test_nothing_that_a_teacher_does_has_a_gradient(encoder, official_clip):
    video = torch.randn(1, 4, 3, 64, 64, requires_grad=True)
    for source in (encoder[0], official_clip):
        teacher = teach(source)
        assert not teacher(video).tokens.requires_grad
        assert not isinstance(teacher, nn.Module)  # or it would be saved and updated with the student


def test_bf16_is_close(encoder, official_clip):
    video = torch.randn(2, 4, 3, 64, 64)
    for source in (encoder[0], official_clip):
        teacher = teach(source)
        exact = teacher(video).tokens
        with torch.autocast("cpu", torch.bfloat16):
            rough = teacher(video).tokens
        cosine = F.cosine_similarity(exact, rough.float(), dim=-1)
        assert cosine.min() > 0.99 and not torch.equal(exact, rough.float())


def test_teachers_that_do_not_fit_are_refused(encoder, official_clip):
    finer = VideoMambaConfig(width=48, depth=2, num_frames=4, image_size=64, patch_size=8)
    with pytest.raises(
        InvalidInput, match="makes 4 x 4 x 4 tokens, the student 4 x 8 x 8; give .*image_size"
    ):
        teach(encoder[0], finer)
    with pytest.raises(InvalidInput, match="makes 4 x 4 x 4 tokens, the student 4 x 8 x 8"):
        teach(official_clip, finer)
    assert teach(official_clip, finer, image_size=128)(torch.randn(1, 4, 3, 64, 64)).tokens.shape == (
        1,
        1,
        257,
        24,
    )
    with pytest.raises(InvalidInput, match="teaches the tokens of its last block alone, not of 2"):
        teach(encoder[0], layers=2)
    with pytest.raises(InvalidInput, match="has 3 blocks: too few to read 3, 2 apart"):
        teach(official_clip, layers=3, interval=2)


def test_any_model_with_a_video_encoder_teaches(tiny_model, tmp_path):
    assert isinstance(tiny_model, VideoTextModel)
    folder = save_model(tiny_model, tmp_path / "whole")
    assert teach(folder).width == 48
