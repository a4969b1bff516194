import json

import pytest
import torch

from vlm.models.masking import is_even, make_mask

OUR_NAMES = {
    "tube": "tube",
    "random": "random",
    "tube_row": "frame_row",
    "random_row": "clip_row",
    "attention": "attention",
}
DRAWS = 8


def cases(fixtures):
    return json.loads((fixtures / "masking.json").read_text())


def test_every_official_case_keeps_its_invariants(fixtures):
    checked = 0
    for case in cases(fixtures)["cases"]:
        steps, rows, columns = case["window"]
        kind = OUR_NAMES[case["generator"]]
        attention = torch.rand(DRAWS, steps, rows * columns) if kind == "attention" else None
        mask = make_mask(
            kind,
            case["ratio"],
            batch=DRAWS,
            num_steps=steps,
            grid=(rows, columns),
            attention=attention,
        )
        frames = mask.reshape(DRAWS, steps, rows, columns)
        counts = mask.sum(1)
        label = f"{case}"
        assert (counts == case["masked"]).all(), label
        assert mask.shape[1] - int(counts[0]) == case["visible"], label
        if case["same_count_every_frame"]:
            assert is_even(mask, steps), label
            assert int(frames[0, 0].sum()) == case["masked_per_frame"], label
        if case["same_pattern_every_frame"]:
            assert (frames == frames[:, :1]).all(), label
        if case["whole_rows_only"]:
            assert (frames.all(-1) | (~frames).all(-1)).all(), label
        checked += 1
    assert checked > 300


def test_attention_keeps_what_the_teacher_looks_at_as_often_as_officially(fixtures):
    bias = cases(fixtures)["attention_bias"]
    weights = torch.ones(1000, 4, bias["N"])
    weights[:, :, :20] = 9.0
    mask = make_mask(
        "attention", bias["ratio"], batch=1000, num_steps=4, grid=(14, 14), attention=weights
    ).reshape(-1, bias["N"])
    visible = (~mask).float().mean(0)
    assert visible[:20].mean().item() == pytest.approx(bias["p_visible_high"], abs=0.02)
    assert visible[20:].mean().item() == pytest.approx(bias["p_visible_low"], abs=0.005)


def test_patches_without_attention_are_kept_last():
    attention = torch.zeros(2, 1, 9)
    attention[:, :, :4] = 1.0
    mask = make_mask("attention", 0.5, batch=2, num_steps=1, grid=(3, 3), attention=attention)
    assert (~mask[:, :4]).all() and int((~mask).sum()) == 2 * 5


def test_random_kinds_differ_between_samples_and_follow_the_generator():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return make_mask("random", 0.5, batch=4, num_steps=2, grid=(6, 6), generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1)[0], draw(1)[1])


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\)"):
        make_mask("tube", ratio, batch=1, num_steps=1, grid=(2, 2))


def test_unknown_kind_and_wrong_attention_are_refused():
    with pytest.raises(ValueError, match="got 'blocks'"):
        make_mask("blocks", 0.5, batch=1, num_steps=1, grid=(2, 2))
    with pytest.raises(ValueError, match=r"shape \(1, 2, 4\), got None"):
        make_mask("attention", 0.5, batch=1, num_steps=2, grid=(2, 2))
