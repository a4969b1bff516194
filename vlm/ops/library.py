"""The one ``torch.library`` namespace that every operator of this package is registered in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = torch.library.Library("vlm", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Define ``vlm::<schema>`` with one implementation for CPU and CUDA and its shape function.

    The implementation chooses the backend itself (``vlm.ops.backends``), so that the choice is made at run
    time and never traced. ``Library.define`` and ``impl`` cost a third of ``custom_op`` per call. Autocast
    does not reach into it: what it gets in fp32 it multiplies in fp32.
    """
    name = schema.partition("(")[0]
    NAMESPACE.define(schema)  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        serve = _without_autocast(implementation, key.lower())
        NAMESPACE.impl(name, serve, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"vlm::{name}", fake, lib=NAMESPACE)


def _without_autocast(implementation: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Return the implementation as it is outside of autocast."""

    def run(*arguments: Any) -> Any:
        if not torch.is_autocast_enabled(device_type):
            return implementation(*arguments)
        with torch.autocast(device_type, enabled=False):
            return implementation(*arguments)

    return run


def register_autograd(
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Give ``vlm::<name>`` its gradient, and make ``vlm::<name>_backward`` refuse a second derivative."""
    torch.library.register_autograd(f"vlm::{name}", backward, setup_context=setup_context, lib=NAMESPACE)

    def refuse(_ctx: Any, *_gradients: Any) -> None:
        raise NotImplementedError(
            f"vlm::{name} is differentiable once, got a second derivative; "
            "write it in plain PyTorch where you need one"
        )

    torch.library.register_autograd(f"vlm::{name}_backward", refuse, lib=NAMESPACE)
