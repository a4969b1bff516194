import json

import pytest
import torch

from vlm.errors import CheckpointError
from vlm.models import from_official
from vlm.models.weights.official import unwrap

CLASSIFIER = "videomamba_cls_tiny"
RETRIEVAL = "umt_videomamba_tiny"
HEADS = {"num_attention_heads": 4}
FORMS = {"video_sm": "classifier", "image_sm": "image", "video_mm": "retrieval"}


def published(fixtures):
    return json.loads((fixtures / "official_keys_middle.json").read_text())["models"]


def on_meta(model):
    integers = set(model["buffers"])
    with torch.device("meta"):
        return {
            name: torch.empty(shape, dtype=torch.int64 if name in integers else torch.float32)
            for name, shape in model["tensors"].items()
        }


@pytest.mark.parametrize(
    "name",
    [
        *(f"video_sm/videomamba_{size}" for size in ("tiny", "small", "middle", "base")),
        *(f"image_sm/videomamba_{size}" for size in ("tiny", "small", "middle", "base")),
        "video_sm/videomamba_middle_pretrain",
        "video_mm/pretrain_25m",
        "video_mm/pretrain_25m_unmasked",
        "video_mm/zs_msrvtt",
    ],
)
def test_every_published_list_of_keys_loads_strictly(fixtures, name):
    listed = published(fixtures)[name]
    model, report = from_official(on_meta(listed))
    form = "masked-pretrain" if name.endswith("_middle_pretrain") else FORMS[name.split("/")[0]]
    assert report.kind == form and report.missing == report.unexpected == report.resized[1:] == ()
    teacher = listed["parameters_by_top_module"].get("clip_teacher", 0)
    assert report.num_parameters == listed["n_parameters_unique"] - teacher == model.num_parameters
    assert sorted([*report.matched, *report.ignored]) == sorted(listed["tensors"])
    assert next(model.parameters()).device.type == "meta"
    if form == "retrieval":
        text = model.config.text
        assert (text.num_heads, text.fusion_layer, text.num_layers, text.vocabulary_size) == (
            12,
            9,
            12,
            30522,
        )
        assert model.config.vision.depth == 32 and model.config.vision.num_frames == 8


def test_no_published_list_is_left_out(fixtures):
    assert len(published(fixtures)) == 12


def test_the_tiny_published_file_is_known_in_every_wrapping(official):
    state = official(CLASSIFIER).state_dict
    plain = from_official(state)[0].state_dict()
    wrappings = [
        {"model": state, "epoch": 3, "optimizer": {}},
        {"module": state},
        {"model": {"module": state}},
        {f"module.{name}": value for name, value in state.items()},
        {f"backbone.{name}": value for name, value in state.items()},
        {"state_dict": {f"module.model.{name}": value for name, value in state.items()}},
        {(name if name.startswith("head") else f"backbone.{name}"): v for name, v in state.items()},
    ]
    for wrapping in wrappings:
        found = from_official(wrapping)[0].state_dict()
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_retrieval_file_is_known_with_prefixes(official):
    state = official(RETRIEVAL).state_dict
    model, report = from_official({f"module.{k}": v for k, v in state.items()}, overrides=HEADS)
    assert model.kind == "video-text" and len(report.matched) + len(report.ignored) == len(state)
    assert any(name.startswith("clip_teacher.") for name in report.ignored)


def test_the_fine_tuned_form_without_bert_in_its_names_gives_the_same_features(official, tiny_model):
    state = {
        name.replace("text_encoder.bert.", "text_encoder."): value
        for name, value in official(RETRIEVAL).state_dict.items()
        if not name.startswith(("text_encoder.cls.", "clip_teacher."))
    }
    model, report = from_official(state, overrides=HEADS)
    assert model.text_encoder.cls is None and report.missing == ()
    numbers = official(RETRIEVAL).tensors
    tokens = (numbers["input/input_ids"], numbers["input/attention_mask"])
    with torch.inference_mode():
        assert torch.equal(model.text_encoder(*tokens), tiny_model.text_encoder(*tokens))
    from vlm.errors import CapabilityError

    with pytest.raises(CapabilityError, match="cannot predict masked words"):
        model.masked_language_logits(*tokens, torch.zeros(4, 4, 48))


def edited(state, *, drop=(), rename=None, reshape=None, add=None):
    result = {name: value for name, value in state.items() if name not in drop}
    for old, new in (rename or {}).items():
        result[new] = result.pop(old)
    for name, shape in (reshape or {}).items():
        result[name] = torch.zeros(shape)
    return {**result, **(add or {})}


LAYER = "layers.2.mixer.x_proj_b.weight"
WRONG = {
    "partial": ({"drop": [LAYER, "norm_f.weight"]}, ["2 missing: " + LAYER, "norm_f.weight"]),
    "renamed": (
        {"rename": {LAYER: "layers.2.mixer.x_proj_back.weight"}},
        [LAYER, "x_proj_back", "unexpected"],
    ),
    "mis-shaped": (
        {"reshape": {LAYER: (35, 95)}},
        ["1 mis-shaped", f"{LAYER} is (35, 95) instead of (35, 96)"],
    ),
    "extra": ({"add": {"text_decoder.bias": torch.zeros(3)}}, ["1 unexpected", "text_decoder.bias"]),
    "no patches": (
        {"rename": {"patch_embed.proj.weight": "patches"}},
        ["patch_embed.proj.weight", "missing"],
    ),
    "no first layer": (
        {"drop": ["layers.0.mixer.A_log", "layers.0.mixer.dt_proj.weight"]},
        ["layers.0.mixer.A_log", "missing"],
    ),
    "odd positions": (
        {"reshape": {"pos_embed": (1, 19, 48)}},
        ["pos_embed", "18 positions are not a square"],
    ),
    "flat table": ({"reshape": {"pos_embed": (17, 48)}}, ["mis-shaped", "pos_embed"]),
    "no times": ({"drop": ["temporal_pos_embedding"]}, ["temporal_pos_embedding", "missing"]),
    "a million layers": (
        {"add": {"layers.999999.norm.weight": torch.zeros(48)}},
        ["count to 1000000", "only 77 tensors"],
    ),
    "both norms": ({"add": {"norm.weight": torch.zeros(48)}}, ["names a weight twice"]),
    "a number": ({"add": {"epoch": 3}}, ["'epoch'", "int"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_do_not_fit_are_refused_by_name(official, case):
    changes, words = WRONG[case]
    with pytest.raises(CheckpointError) as caught:
        from_official(edited(official(CLASSIFIER).state_dict, **changes))
    for word in words:
        assert word in str(caught.value)


def test_the_error_carries_the_names(official):
    state = edited(official(CLASSIFIER).state_dict, drop=["head.bias"], add={"odd": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        from_official(state)
    assert caught.value.missing == ("head.bias",)
    assert caught.value.unexpected == ("odd",)
    assert caught.value.misshaped == ()


@pytest.mark.parametrize("state", [{}, {"model": {}}, {"bert.weight": torch.zeros(2, 2)}])
def test_other_models_are_refused(state):
    with pytest.raises(CheckpointError, match=r"not a VideoMamba file: expected names such as patch_embed"):
        from_official(state)


def test_two_names_that_become_one_are_refused(official):
    state = official(CLASSIFIER).state_dict
    with pytest.raises(CheckpointError, match="names 'head.bias' twice, once as 'module.head.bias'"):
        unwrap({**state, "module.head.bias": state["head.bias"]})


def test_untied_decoders_are_refused(official):
    name = "text_encoder.cls.predictions.decoder.weight"
    state = official(RETRIEVAL).state_dict
    with pytest.raises(CheckpointError, match="not the same as .*word_embeddings.weight"):
        from_official({**state, name: state[name] + 1}, overrides=HEADS)


def test_a_tensor_that_claims_more_than_its_storage_is_refused(official):
    state = {**official(CLASSIFIER).state_dict, "head.weight": torch.zeros(1).expand(10, 48)}
    with pytest.raises(CheckpointError, match=r"head.weight claims 1920 bytes .* holds 4"):
        from_official(state)


def test_many_names_for_one_storage_are_refused(official):
    shared = torch.zeros(1_000_000)
    state = {**official(CLASSIFIER).state_dict, **{f"x{i}": shared for i in range(8)}}
    with pytest.raises(CheckpointError, match="tensors claim"):
        from_official(state)


def test_frames_and_size_are_resized_as_the_tables_are(official, agree):
    from vlm.models.patch_embedding import resize_positions, resize_times

    state = official(CLASSIFIER).state_dict
    model, report = from_official(state, num_frames=6, image_size=96)
    vision = model.vision_encoder
    agree(vision.pos_embed, resize_positions(state["pos_embed"], 6))
    agree(vision.temporal_pos_embedding, resize_times(state["temporal_pos_embedding"], 6))
    assert report.resized == ("pos_embed: 17 -> 37 positions", "temporal_pos_embedding: 4 -> 6 steps")
    assert (model.preprocessing.num_frames, model.preprocessing.image_size) == (6, 96)
    with torch.inference_mode():
        assert model(torch.randn(1, 6, 3, 96, 96)).shape == (1, 10)


def test_one_frame_needs_no_table_of_times(official):
    model, report = from_official(official(CLASSIFIER).state_dict, num_frames=1)
    assert model.vision_encoder.temporal_pos_embedding is None
    assert "temporal_pos_embedding" in report.ignored
    with pytest.raises(ValueError, match="takes 1 frames"):
        model(torch.zeros(1, 4, 3, 64, 64))


def test_an_image_model_becomes_a_video_model(official, agree):
    numbers = official("videomamba_image_tiny")
    image, _ = from_official(numbers.state_dict)
    video, report = from_official(numbers.state_dict, num_frames=3)
    assert report.missing == ("temporal_pos_embedding",) and video.config.vision.num_frames == 3
    picture = numbers.tensors["input/image"][:, None]
    with torch.inference_mode():
        agree(video(picture), image(picture))
        assert video(picture.expand(-1, 3, -1, -1, -1)).shape == (2, 10)


def test_half_precision_files_load_in_fp32(official):
    state = {name: value.bfloat16() for name, value in official(CLASSIFIER).state_dict.items()}
    model, report = from_official(state)
    assert report.dtype == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, state["head.weight"].float())


def test_the_model_does_not_share_memory_with_the_file(official):
    state = {name: value.clone() for name, value in official(CLASSIFIER).state_dict.items()}
    model, _ = from_official(state)
    state["head.bias"].fill_(7)
    assert not (model.head.bias == 7).any() and model.head.bias.requires_grad and not model.training


def test_unknown_and_impossible_overrides_are_refused(official):
    state = official(RETRIEVAL).state_dict
    with pytest.raises(ValueError, match="no setting 'heads' .* known: num_attention_heads"):
        from_official(state, overrides={"heads": 4})
    with pytest.raises(ValueError, match="not a multiple of num_heads 5"):
        from_official(state, overrides={"num_attention_heads": 5})
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        from_official(official(CLASSIFIER).state_dict, image_size=100)
    with pytest.raises(ValueError, match="no setting 'dropout'"):
        from_official(official(CLASSIFIER).state_dict, overrides={"dropout": 0.1})


def test_a_text_width_without_a_default_number_of_heads_asks_for_it(fixtures):
    listed = published(fixtures)["video_mm/zs_msrvtt"]
    narrow = {
        name: torch.empty([72 if size == 768 else size for size in value.shape], device="meta")
        for name, value in on_meta(listed).items()
    }
    with pytest.raises(CheckpointError, match=r"overrides=\{'num_attention_heads': n\}"):
        from_official(narrow)
    assert from_official(narrow, overrides={"num_attention_heads": 6})[0].config.text.num_heads == 6
