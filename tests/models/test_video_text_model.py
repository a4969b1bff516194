from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlm.errors import CapabilityError, InvalidInput
from vlm.models import (
    TextEncoderConfig,
    TokenBatch,
    VideoMambaConfig,
    VideoTextConfig,
    VideoTextModel,
)
from vlm.text import build_tokenizer, join_statement

NAME = "umt_videomamba_tiny"
MEDIA = ("video", "image")
WORDS = ["a red blue three five moves left right then stops"]


@pytest.fixture(scope="module")
def numbers(official):
    return official(NAME).tensors


@pytest.fixture(scope="module")
def texts(tiny_model, numbers):
    with torch.inference_mode():
        return tiny_model.encode_text(TokenBatch(numbers["input/input_ids"], numbers["input/attention_mask"]))


@pytest.fixture(scope="module")
def videos(tiny_model, numbers):
    with torch.inference_mode():
        return {media: tiny_model.encode_video(numbers[f"input/{media}"]) for media in MEDIA}


@pytest.fixture
def free_model():
    torch.manual_seed(3)
    tokenizer = build_tokenizer(WORDS)
    config = VideoTextConfig(
        vision=VideoMambaConfig(width=32, depth=2, num_frames=4, image_size=28, patch_size=7, state_size=4),
        text=TextEncoderConfig(
            vocabulary_size=tokenizer.vocabulary_size,
            width=24,
            num_layers=3,
            fusion_layer=2,
            num_heads=3,
            intermediate_width=48,
            max_positions=12,
            vision_width=32,
            dropout=0.0,
        ),
        embedding_width=16,
    )
    return VideoTextModel(config, tokenizer=tokenizer, name="free", domain="digit-world")


def pairs(count):
    rows, columns = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    return rows.flatten(), columns.flatten()


def test_texts_equal_the_official_ones(texts, numbers, agree, tiny_model):
    agree(texts.tokens, numbers["text/text_embeds"])
    agree(texts.tokens[:, 0], numbers["text/text_pooled"])
    agree(texts.embedding, F.normalize(numbers["text/text_proj"], dim=-1))
    with torch.inference_mode():
        agree(tiny_model.text_proj(texts.tokens[:, 0]), numbers["text/text_proj"])


@pytest.mark.parametrize("media", MEDIA)
def test_videos_equal_the_official_ones(media, videos, numbers, agree, tiny_model):
    features = videos[media]
    agree(features.tokens, numbers[f"test_{media}/vision_embeds"])
    agree(features.pooled, numbers[f"test_{media}/vision_pooled"])
    with torch.inference_mode():
        agree(tiny_model.vision_proj(features.pooled), numbers[f"test_{media}/vision_proj"])
        frames = tiny_model.project_frames(features.pooled)
    agree(frames, F.normalize(numbers[f"test_{media}/vision_proj"], dim=-1))
    assert torch.equal(features.embedding, frames.mean(dim=1))


@pytest.mark.parametrize("media", MEDIA)
def test_similarity_is_an_inner_product_of_embeddings_and_equals_the_official_one(
    media, videos, texts, numbers, agree, tiny_model
):
    scores = tiny_model.similarity(videos[media], texts)
    agree(scores, numbers[f"test_{media}/sim_v2t_temp1"])
    agree(scores.T, numbers[f"test_{media}/sim_t2v_temp1"])
    agree(scores / tiny_model.temp.detach(), numbers[f"test_{media}/sim_v2t_mean"])
    assert torch.equal(scores, tiny_model.similarity(videos[media].embedding, texts.embedding))
    with torch.inference_mode():
        best = (tiny_model.project_frames(videos[media].pooled) @ texts.embedding.T).amax(dim=1)
    agree(best / tiny_model.temp.detach(), numbers[f"test_{media}/sim_v2t_max"])


@pytest.mark.parametrize("media", MEDIA)
def test_matching_equals_the_official_one(media, videos, texts, numbers, agree, tiny_model):
    from vlm.models.fusion import fuse

    rows, columns = pairs(4)
    with torch.inference_mode():
        logits = tiny_model.match(videos[media].tokens[rows], texts.tokens[columns], texts.mask[columns])
        agree(logits.reshape(4, 4, 2), numbers[f"test_{media}/vtm_logits_all_pairs"])
        fused = fuse(tiny_model.text_encoder, texts.tokens, texts.mask, videos[media].tokens)
    agree(fused, numbers[f"test_{media}/fusion_hidden_matched"])
    agree(fused, numbers[f"test_{media}/multi_modal_hidden"])


@pytest.mark.parametrize("media", MEDIA)
def test_masked_language_logits_equal_the_official_ones(media, videos, numbers, agree, tiny_model):
    ids, labels, mask = numbers["mlm/input_ids"], numbers["mlm/labels"], numbers["input/attention_mask"]
    with torch.inference_mode():
        agree(tiny_model.text_encoder(ids, mask), numbers["mlm/text_embeds"])
        logits = tiny_model.masked_language_logits(ids, mask, videos[media].tokens)
    agree(logits, numbers[f"mlm_{media}/logits"])
    agree(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), numbers[f"mlm_{media}/loss"])


@pytest.mark.parametrize("run", ["attention_video", "tube_video", "random_video", "attention_image"])
def test_masked_encoding_equals_the_official_training_forward(run, numbers, agree, tiny_model):
    part = f"pretrain_{run}"
    video = numbers["input/image" if run.endswith("image") else "input/video"]
    mask = numbers[f"{part}/mask"].bool()[:, 1:]
    with torch.inference_mode():
        output = tiny_model.vision_encoder(video, mask)
        features = tiny_model.video_features(
            output, video.shape[1], mask, keep_temporal=run in ("tube_video", "attention_image")
        )
        aligned = tiny_model.vision_encoder.align(output, mask, video.shape[1])
    agree(features.tokens, numbers[f"{part}/vision_embeds"])
    agree(features.pooled, numbers[f"{part}/vision_pooled"])
    agree(aligned, numbers[f"{part}/student_output"])


def test_retrieval_scores_equal_the_official_ones(official, agree, tiny_model):
    numbers = official("umt_retrieval").tensors
    ids, mask = numbers["input/input_ids"], numbers["input/attention_mask"]
    with torch.inference_mode():
        videos = tiny_model.encode_video(numbers["input/video"])
        texts = tiny_model.encode_text(TokenBatch(ids, mask))
        scores = tiny_model.similarity(videos, texts)
        rows, columns = pairs(6)
        logits = tiny_model.match(videos.tokens[rows], texts.tokens[columns], mask[columns])
    agree(scores, numbers["v2t_scores_dual"])
    agree(scores.T, numbers["t2v_scores_dual"])
    matching = logits[:, 1].reshape(6, 6)
    agree(matching, numbers["k128/v2t_scores_rerank"])
    agree(matching.T, numbers["k128/t2v_scores_rerank"])
    for found, name in ((matching, "v2t"), (matching.T, "t2v")):
        expected = numbers[f"k3/{name}_scores_rerank"]
        ranked = expected > -99
        assert (ranked.sum(1) == 3).all()
        agree(found[ranked], expected[ranked])


def test_padding_changes_nothing(tiny_model, numbers, agree):
    ids, mask = numbers["input/input_ids"], numbers["input/attention_mask"]
    wider = TokenBatch(F.pad(ids, (0, 5)), F.pad(mask, (0, 5)))
    with torch.inference_mode():
        agree(
            tiny_model.encode_text(wider).embedding, tiny_model.encode_text(TokenBatch(ids, mask)).embedding
        )


def test_bf16_runs_and_stays_close(official):
    from vlm.models import from_official
    from vlm.models.weights import set_dtype

    numbers = official(NAME)
    model = from_official(numbers.state_dict, overrides={"num_attention_heads": 4})[0]
    batch = TokenBatch(numbers.tensors["input/input_ids"], numbers.tensors["input/attention_mask"])
    video = numbers.tensors["input/video"]
    with torch.inference_mode():
        exact = model.similarity(model.encode_video(video), model.encode_text(batch))
        set_dtype(model, torch.bfloat16)
        videos, texts = model.encode_video(video), model.encode_text(batch)
        rough = model.similarity(videos, texts)
        logits = model.match(videos.tokens, texts.tokens, texts.mask)
    assert videos.tokens.dtype == texts.tokens.dtype == torch.bfloat16
    assert videos.embedding.dtype == rough.dtype == logits.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05


def test_free_size_learns_from_every_head(free_model):
    model = free_model.train()
    video = torch.randn(3, 4, 3, 28, 28)
    videos, texts = model(video, ["a red three moves left", "blue", "a five stops"])
    loss = model.similarity(videos, texts).sum() / model.temperature()
    loss = loss + model.match(videos.tokens, texts.tokens, texts.mask).square().sum()
    tokens = model.tokenize(["a red [MASK]", "blue", "five"])
    loss = loss + model.masked_language_logits(*tokens, videos.tokens).square().sum()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_temperature_is_clamped_into_the_published_range(free_model):
    with torch.no_grad():
        free_model.temp.fill_(2.0)
    assert free_model.temperature().item() == 0.5
    with torch.no_grad():
        free_model.temp.fill_(-1.0)
    assert free_model.temperature().item() == pytest.approx(0.001)
    assert free_model.temperature() is free_model.temp


def test_multiple_choice_follows_its_formula(free_model):
    model = free_model.eval()
    video = torch.randn(2, 4, 3, 28, 28)
    options = ["moves left", "moves right", "stops"]
    with torch.inference_mode():
        scores = model.score_candidates(video, ["a red three", ""], [options, options[:2]])
        features = model.encode_video(video)
        texts = model.encode_text([join_statement("a red three", option) for option in options])
        match = model.match(features.tokens[:1].expand(3, -1, -1), texts.tokens, texts.mask).softmax(-1)[:, 1]
        share = (model.similarity(features, texts)[0] / model.temp).softmax(0)
    assert torch.allclose(scores[0], 0.7 * match + 0.3 * share, atol=1e-6)
    assert [len(row) for row in scores] == [3, 2]
    parts = model.candidate_parts(video, ["a red three", ""], [options, options[:2]])
    assert torch.allclose(parts[0][0], match, atol=1e-6) and torch.allclose(parts[0][1], share, atol=1e-6)
    answers = model.answer(video, ["a red three", ""], [options, options[:2]])
    assert answers[0].text == options[int(scores[0].argmax())]
    assert answers[0].score == pytest.approx(float(scores[0].max()))
    shared = model.answer(video[:1], ["a red three", "a five"], options)
    assert len(shared) == 2 and shared[0].text == answers[0].text


def test_what_the_model_cannot_is_an_error_that_names_it(free_model):
    video = torch.randn(1, 4, 3, 28, 28)
    with pytest.raises(CapabilityError, match="'free' of kind 'video-text' cannot answer without candidates"):
        free_model.answer(video, ["what"])
    free_model.capabilities = frozenset({"search"})
    features = free_model.encode_text(["a red three"])
    with pytest.raises(CapabilityError, match="cannot rerank"):
        free_model.match(torch.zeros(1, 4, 32), features.tokens, features.mask)
    with pytest.raises(CapabilityError, match="cannot choose"):
        free_model.answer(video, ["what"], ["a", "b"])
    with pytest.raises(ValueError, match=r"among \['answer', .*got \['fly'\]"):
        VideoTextModel(free_model.config, capabilities=["fly"])


@pytest.mark.parametrize(
    ("videos", "questions", "candidates", "words"),
    [
        (3, ["a", "b"], ["red", "blue"], "expected 1 or 2 videos .* got 3"),
        (1, ["a", "b"], [["red"]], "each of 2 questions"),
        (1, ["a"], [[]], "at least one each"),
    ],
)
def test_ill_fitting_choices_are_refused(free_model, videos, questions, candidates, words):
    with pytest.raises(ValueError, match=words):
        free_model.answer(torch.randn(videos, 4, 3, 28, 28), questions, candidates)


def test_long_texts_are_cut_with_a_warning_and_long_tokens_refused(free_model):
    with pytest.warns(UserWarning, match=r"1 of 2 texts are longer than 12 tokens \(longest 10002\)"):
        features = free_model.encode_text(["red " * 10_000, "blue"])
    assert features.tokens.shape[1] == 12
    with pytest.raises(ValueError, match="at most 12 text tokens, got 13"):
        free_model.encode_text(TokenBatch(torch.ones(1, 13).long(), torch.ones(1, 13).long()))


def test_words_beyond_the_vocabulary_are_named(free_model):
    assert free_model.unknown_words("A red dog, moves to the BEACH!") == ["dog", "to", "the", "beach"]


def test_a_tokenizer_that_is_too_large_is_refused(free_model):
    with pytest.raises(InvalidInput, match="the tokenizer has 45 ids, but the model knows"):
        free_model.tokenizer = build_tokenizer([f"w{index}" for index in range(40)])


def test_uneven_masks_need_whole_clip_pooling(free_model):
    video = torch.randn(1, 4, 3, 28, 28)
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, :8] = True
    with pytest.raises(ValueError, match="pass keep_temporal=False"):
        free_model.encode_video(video, mask=mask)
    assert free_model.encode_video(video, mask=mask, keep_temporal=False).pooled.shape == (1, 1, 32)


def test_fingerprint_follows_weights_config_and_preprocessing(free_model):
    first = free_model.fingerprint
    assert free_model.fingerprint == first and len(first) == 64
    bias = free_model.itm_head.bias.detach().clone()
    with torch.no_grad():
        free_model.itm_head.bias[0] += 1
    assert free_model.fingerprint != first
    with torch.no_grad():
        free_model.itm_head.bias.copy_(bias)
    assert free_model.fingerprint == first
    free_model.preprocessing = replace(free_model.preprocessing, antialias=True)
    assert free_model.fingerprint != first


def test_configurations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"text.vision_width must equal vision.width 32"):
        VideoTextConfig(vision=VideoMambaConfig(width=32, depth=1))
    with pytest.raises(ValueError, match="temperature must be in"):
        VideoTextConfig(temperature=0.9)
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        TextEncoderConfig(width=100)
    with pytest.raises(ValueError, match=r"fusion_layer must be in 0\.\.12"):
        TextEncoderConfig(fusion_layer=13)


def test_unequal_numbers_of_videos_and_texts_are_refused(free_model):
    features = free_model.encode_text(["a red three", "blue", "a cat"])
    with pytest.raises(ValueError, match="got 2 and 3"):
        free_model.match(torch.zeros(2, 4, 32), features.tokens, features.mask)


def test_texts_side_by_side_may_share_a_video(free_model):
    torch.manual_seed(0)
    features = free_model.encode_text(["a red three", "blue", "a cat", "a red cat", "three", "a"])
    videos = torch.randn(2, 4, 32)
    shared = free_model.match(videos, features.tokens, features.mask)
    each = free_model.match(videos[[0, 0, 0, 1, 1, 1]], features.tokens, features.mask)
    torch.testing.assert_close(shared, each)
