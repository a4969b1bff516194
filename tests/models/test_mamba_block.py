import math

import pytest
import torch
import torch.nn.functional as F

from vlm.models.mamba_block import BidirectionalMixer, MambaBlock, drop_path, initialise_mixer

CASES = ("bi", "bi_len1", "bi_len2", "uni")


def make_mixer(config):
    return BidirectionalMixer(
        config["d_model"],
        state_size=config["d_state"],
        conv_width=config["d_conv"],
        expand=config["expand"],
        dt_rank=config["dt_rank"],
        bidirectional=config["bimamba"],
    )


@pytest.mark.parametrize("case", CASES)
def test_mixer_and_its_gradients_equal_the_official_ones(official, agree, case):
    numbers = official("bimamba_block")
    part = {k.removeprefix(f"{case}/"): v for k, v in numbers.tensors.items() if k.startswith(f"{case}/")}
    mixer = make_mixer(numbers.config[case])
    state = {k.removeprefix("state_dict/"): v for k, v in part.items() if k.startswith("state_dict/")}
    mixer.load_state_dict(state, strict=True)
    tokens = part["input"].clone().requires_grad_()
    output = mixer(tokens)
    agree(output, part["output"])
    (output * part["dout"]).sum().backward()
    agree(tokens.grad, part["grad_input"], 1e-4)
    for name, parameter in mixer.named_parameters():
        agree(parameter.grad, part[f"grad/{name}"], 1e-4)


def test_an_adapter_in_place_of_the_step_projection_is_called(official, agree):
    numbers = official("bimamba_block")
    mixer = make_mixer(numbers.config["bi"])
    prefix = "bi/state_dict/"
    mixer.load_state_dict(
        {k.removeprefix(prefix): v for k, v in numbers.tensors.items() if k.startswith(prefix)}
    )

    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    mixer.dt_proj = Adapter(mixer.dt_proj)
    agree(mixer(numbers.tensors["bi/input"]), numbers.tensors["bi/output"])
    assert mixer.dt_proj.calls == 1


def test_reference_initialisation_wipes_the_step_biases_and_mamba_keeps_them():
    width, depth = 96, 4
    kinds = {}
    for style in ("reference", "mamba"):
        mixer = BidirectionalMixer(
            width, state_size=16, conv_width=4, expand=2, dt_rank=6, bidirectional=True
        )
        initialise_mixer(mixer, depth, style)
        kinds[style] = mixer
        bound = 1 / math.sqrt(2 * width) / math.sqrt(depth)
        assert mixer.out_proj.weight.abs().max() <= bound * 1.0001
        assert mixer.out_proj.weight.abs().max() > bound * 0.9
        assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert torch.equal(mixer.A_log[3], torch.arange(1, 17.0).log())
        assert torch.equal(mixer.D_b, torch.ones(2 * width))
    for name in ("dt_proj", "dt_proj_b"):
        assert torch.equal(getattr(kinds["reference"], name).bias, torch.zeros(2 * width))
        assert getattr(kinds["reference"], name).weight.std().item() == pytest.approx(0.02, rel=0.15)
        steps = F.softplus(getattr(kinds["mamba"], name).bias)
        assert 0.99e-3 <= steps.min() < 3e-3 and 0.03 < steps.max() <= 0.101


def test_drop_path_drops_whole_samples_keeps_the_mean_and_spares_evaluation():
    hidden = torch.ones(4000, 3, 2)
    dropped = drop_path(hidden, 0.25, training=True)
    per_sample = dropped.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == per_sample.max()).all(1)).all()
    assert (per_sample[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert drop_path(hidden, 0.25, training=False) is hidden


def test_the_first_block_never_drops_the_tokens_themselves():
    mixer = BidirectionalMixer(16, state_size=4, conv_width=4, expand=2, dt_rank=1, bidirectional=True)
    block = MambaBlock(mixer, 16, 1e-5, drop_path=0.999).train()
    tokens = torch.randn(3, 5, 16)
    _, residual = block(tokens, None)
    assert torch.equal(residual, tokens)


def test_residual_stays_fp32_in_bf16():
    mixer = BidirectionalMixer(16, state_size=4, conv_width=4, expand=2, dt_rank=1, bidirectional=True)
    block = MambaBlock(mixer, 16, 1e-5, drop_path=0.0)
    from vlm.models.weights import set_dtype

    set_dtype(block, torch.bfloat16)
    hidden, residual = block(torch.randn(2, 5, 16).bfloat16(), None)
    assert hidden.dtype == torch.bfloat16 and residual.dtype == torch.float32
    assert (
        block.mixer.A_log.dtype == block.mixer.dt_proj.bias.dtype == block.norm.weight.dtype == torch.float32
    )
    assert block.mixer.in_proj.weight.dtype == block.mixer.dt_proj.weight.dtype == torch.bfloat16
