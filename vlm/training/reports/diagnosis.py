"""Which tensor went wrong first, when a loss or a gradient is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


def first_bad_tensor(module: nn.Module, run: Callable[[], object]) -> str:
    """Return a phrase that names the first tensor with a NaN or an infinity, or an empty string.

    In the order in which one causes the other: a weight, an input or output of a submodule as ``run`` calls
    them, then a gradient, the last layer's first, as they are computed.

    Args:
        module: Whose weights, submodules and present gradients are looked at.
        run: Repeats the forward pass; its result is not used.
    """
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if _is_bad(weight):
            return f"the weight {name} {_describe(weight)}"
    found: list[str] = []
    with ExitStack() as hooks, torch.no_grad():
        for name, part in module.named_modules():
            hooks.callback(
                part.register_forward_pre_hook(_watch(found, f"an input of {_called(name, part)}")).remove
            )
            hooks.callback(
                part.register_forward_hook(_watch(found, f"the output of {_called(name, part)}")).remove
            )
        run()
    if found:
        return found[0]
    for name, weight in reversed(list(module.named_parameters())):
        if weight.grad is not None and _is_bad(weight.grad):
            return f"the gradient of {name} {_describe(weight.grad)}"
    return ""


def _watch(found: list[str], what: str) -> Callable[..., None]:
    """Return a hook that notes a bad tensor among the last of its arguments."""

    def hook(_module: nn.Module, *values: Any) -> None:
        if not found:
            bad = next((each for each in _tensors(values[-1]) if _is_bad(each)), None)
            if bad is not None:
                found.append(f"{what} {_describe(bad)}")

    return hook


def _called(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _is_bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


def _describe(tensor: Tensor) -> str:
    bad = int((~torch.isfinite(tensor)).sum())
    return f"{tuple(tensor.shape)} holds {bad} numbers that are not finite"
