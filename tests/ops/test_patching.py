"""Other people's Mamba models give the same numbers with our scan, and get theirs back."""

import sys
from types import ModuleType

import pytest
import torch

from vlm.errors import KernelError
from vlm.ops import patch, patching, unpatch
from vlm.ops.selective_scan import reference


@pytest.fixture(autouse=True)
def clean():
    yield
    unpatch()


@pytest.fixture
def stand_in(monkeypatch):
    """A module with mamba-ssm's function name, which records what still reaches the original."""
    module, reached = ModuleType("stand_in"), []
    module.selective_scan_fn = lambda *args, **kwargs: reached.append((args, kwargs)) or "original"
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setattr(patching, "_TARGETS", (("stand_in", "selective_scan_fn"), ("missing", "nothing")))
    return module, reached


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    u, delta, z = (torch.randn(2, 6, 11, dtype=dtype) for _ in range(3))
    B, C = (torch.randn(2, 4, 11, dtype=dtype) for _ in range(2))
    return u, delta, -torch.rand(6, 4) - 0.1, B, C, torch.randn(6), z, torch.randn(6)


def test_the_scan_is_replaced_once_and_put_back(stand_in):
    module, reached = stand_in
    original = module.selective_scan_fn
    assert patch() == patch() == ("stand_in.selective_scan_fn",)
    u, delta, A, B, C, D, z, bias = inputs()
    out, last = module.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    across = lambda x: x.transpose(1, 2)  # noqa: E731
    scan = reference.Scan(
        across(u),
        across(delta),
        A,
        across(B)[:, :, None],
        across(C)[:, :, None],
        D,
        bias,
        None,
        None,
        True,
        False,
    )
    y, state, _ = reference.forward(scan, save=False)
    torch.testing.assert_close(out, across(y) * torch.nn.functional.silu(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, state.reshape_as(last), rtol=1e-5, atol=1e-5)
    assert not reached
    unpatch()
    assert module.selective_scan_fn is original


def test_mixed_dtypes_are_brought_together(stand_in):
    """Under autocast a model hands over fp32 and bf16 side by side."""
    module, _ = stand_in
    patch()
    u, delta, A, B, C, D, z, bias = inputs()
    mixed = module.selective_scan_fn(u, delta.bfloat16(), A, B.bfloat16(), C, D.bfloat16(), z, bias, True)
    rounded = delta.bfloat16().float(), A, B.bfloat16().float(), C, D.bfloat16().float(), z, bias
    assert torch.equal(mixed, module.selective_scan_fn(u, *rounded, True))


def test_what_our_scan_does_not_cover_goes_to_the_original(stand_in):
    module, reached = stand_in
    patch()
    u, delta, A, B, C, D, z, bias = inputs()
    assert module.selective_scan_fn(u, delta, A, A, C, D, z, delta_bias=bias) == "original"
    assert module.selective_scan_fn(u, delta, A.to(torch.complex64), B, C) == "original"
    (args, kwargs) = reached[0]
    assert args[3] is A and kwargs["z"] is z and kwargs["delta_bias"] is bias


def test_nothing_to_replace_is_an_error(monkeypatch):
    monkeypatch.setattr(patching, "_TARGETS", (("missing", "nothing"),))
    with pytest.raises(KernelError, match=r"pip install 'transformers>=5'"):
        patch()


@pytest.mark.slow
def test_a_transformers_model_gives_the_same_logits_and_gradients(monkeypatch):
    try:
        import torchvision  # noqa: F401
    except Exception:  # built for another torch; transformers would import it and fail, but needs it not
        monkeypatch.setitem(sys.modules, "torchvision", None)
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, state_size=16)
    model = transformers.MambaForCausalLM(config).train()
    ids = torch.randint(0, 50, (2, 33))

    def run():
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    logits, gradients = run()
    assert any("modeling_mamba" in name for name in patch())
    found, found_gradients = run()
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    model.eval()
    prompt = ids[:1, :7]
    generated = model.generate(prompt, max_new_tokens=5, do_sample=False)
    unpatch()
    assert torch.equal(generated, model.generate(prompt, max_new_tokens=5, do_sample=False))
