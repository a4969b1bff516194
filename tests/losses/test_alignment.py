"""Token alignment against the published numbers, and what the numbers do not show."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlm.losses.alignment import alignment_loss

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def published():
    return load_file(FIXTURES / "losses_metrics.safetensors")


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("distance", ["l2", "mse", "smooth_l1"])
def test_loss_and_gradient_equal_the_published_numbers(published, distance, normalise):
    student = published["input/uta_student"].clone().requires_grad_()
    teacher = published["input/uta_teacher"].clone().requires_grad_()
    loss = alignment_loss(student, teacher, distance=distance, normalise=normalise)
    loss.backward()
    where = f"uta/{'l2' if normalise else 'none'}_{distance}"
    assert relative(loss.detach(), published[f"{where}/loss"]) < 2e-5
    assert relative(student.grad, published[f"{where}/grad_student"]) < 1e-4
    assert teacher.grad is None


def test_only_directions_count_and_the_range_is_0_to_4():
    tokens = torch.randn(2, 3, 5, 8)
    scale = torch.rand(2, 3, 5, 1) + 0.1
    assert alignment_loss(tokens * scale, tokens).item() == pytest.approx(0.0, abs=1e-6)
    assert alignment_loss(-tokens * scale, tokens).item() == pytest.approx(4.0, abs=1e-6)


def test_a_token_of_zeros_has_a_finite_gradient():
    student = torch.zeros(1, 1, 2, 4, requires_grad=True)
    alignment_loss(student, torch.ones(1, 1, 2, 4)).backward()
    assert torch.isfinite(student.grad).all()


def test_bf16_tokens_are_compared_in_fp32():
    student, teacher = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    rough = alignment_loss(student.bfloat16(), teacher.bfloat16())
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(alignment_loss(student, teacher).item(), rel=1e-2)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"the teacher's shape \(1, 5, 8\), got \(1, 4, 8\)"):
        alignment_loss(torch.zeros(1, 4, 8), torch.zeros(1, 5, 8))
