"""The official implementation's numbers: every backend gives its outputs and gradients."""

from __future__ import annotations

import json

import pytest
import torch.nn.functional as F
from safetensors import safe_open

from vlm.ops import Branch, bidirectional_mamba, selective_scan

OUTPUTS, GRADIENTS = 2e-5, 1e-4
SCANS = [f"selective_scan_{name}" for name in ("L1", "L7", "L64", "L130", "L393", "fp64")]


def load(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}, json.loads(
            file.metadata()["config"]
        )


def scan_arguments(tensors, case):
    inputs = {role: tensors[f"input/{name}"].clone() for role, name in case["inputs"].items()}
    if case["BC"] == "g1":
        inputs |= {"B": inputs["B"].unsqueeze(1), "C": inputs["C"].unsqueeze(1)}
    for value in inputs.values():
        value.requires_grad_()
    flags = {"delta_softplus": bool(case["softplus"]), "return_last_state": True}
    return inputs, flags


@pytest.mark.parametrize("name", SCANS)
def test_selective_scan_gives_the_official_numbers(name, fixtures, scan_backend, assert_close):
    tensors, config = load(fixtures / f"{name}.safetensors")
    judged = 0
    for label, case in config["cases"].items():
        if case["BC"] == "const":
            continue
        inputs, flags = scan_arguments(tensors, case)
        out, last = selective_scan(**inputs, **flags)
        out.backward(tensors["input/dout"])
        assert not last.requires_grad
        tight = name.endswith("fp64")
        assert_close(f"{label}/out", out, tensors[f"case/{label}/out"], 1e-12 if tight else OUTPUTS)
        assert_close(f"{label}/last", last, tensors[f"case/{label}/last_state"], 1e-12 if tight else OUTPUTS)
        for role, value in inputs.items():
            expected = tensors[f"case/{label}/grad_{role}"]
            assert_close(f"{label}/grad_{role}", value.grad, expected, 1e-12 if tight else GRADIENTS)
            judged += 1
    assert judged == sum(
        1 for key in tensors if "/grad_" in key and "const_BC" not in key and key.startswith("case/")
    )


def test_constant_b_and_c_are_refused_by_name(fixtures):
    tensors, config = load(fixtures / "selective_scan_L7.safetensors")
    inputs, flags = scan_arguments(tensors, config["cases"]["const_BC"])
    with pytest.raises(ValueError, match="B must depend on time"):
        selective_scan(**inputs, **flags)


def branch(p, suffix, log, as_module):
    dt_weight, dt_bias = p[f"dt_proj{suffix}.weight"], p[f"dt_proj{suffix}.bias"]
    x_weight = p[f"x_proj{suffix}.weight"]
    x_proj, dt_proj, own_bias = x_weight, dt_weight, dt_bias
    if as_module:
        # a module's own bias and an adapter around it both look like this to the operator
        x_proj, dt_proj = (lambda u: u @ x_weight.T), (lambda dt: F.linear(dt, dt_weight, dt_bias))
        own_bias = None
    return Branch(
        conv_weight=p[f"conv1d{suffix}.weight"],
        conv_bias=p[f"conv1d{suffix}.bias"],
        x_proj=x_proj,
        dt_proj=dt_proj,
        dt_bias=own_bias,
        A_log=p[log],
        D=p[f"D{suffix}"],
    )


@pytest.mark.parametrize("as_module", [False, True], ids=["weights", "modules"])
@pytest.mark.parametrize("case", ["bi", "bi_len1", "bi_len2", "uni"])
def test_block_gives_the_official_numbers(case, as_module, fixtures, scan_backend, assert_close):
    tensors, config = load(fixtures / "bimamba_block.safetensors")
    prefix = f"{case}/state_dict/"
    p = {
        k.removeprefix(prefix): v.clone().requires_grad_() for k, v in tensors.items() if k.startswith(prefix)
    }
    x = tensors[f"{case}/input"].clone().requires_grad_()
    forward = branch(p, "", "A_log", as_module)
    backward = branch(p, "_b", "A_b_log", as_module) if config[case]["bimamba"] else None
    mixed = bidirectional_mamba(F.linear(x, p["in_proj.weight"]), forward, backward)
    if backward is not None:
        both = tensors[f"{case}/branch_forward"] + tensors[f"{case}/branch_backward"]
        assert_close("branches", mixed, both.transpose(1, 2), OUTPUTS)
    out = F.linear(mixed, p["out_proj.weight"])
    assert_close("output", out, tensors[f"{case}/output"], OUTPUTS)
    out.backward(tensors[f"{case}/dout"])
    assert_close("grad_input", x.grad, tensors[f"{case}/grad_input"], GRADIENTS)
    for name, value in p.items():
        assert_close(name, value.grad, tensors[f"{case}/grad/{name}"], GRADIENTS)
