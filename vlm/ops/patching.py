"""One line that gives other people's Mamba models this package's scan."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vlm.errors import KernelError
from vlm.ops.selective_scan import selective_scan

# where each package looks its scan up, and under which name
_TARGETS = (
    ("transformers.models.mamba.modeling_mamba", "mamba_selective_scan"),
    ("transformers.models.falcon_mamba.modeling_falcon_mamba", "mamba_selective_scan"),
    ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    ("mamba_ssm.modules.mamba_simple", "selective_scan_fn"),
)
_replaced: dict[str, tuple[ModuleType, str, Callable[..., Any]]] = {}


def patch() -> tuple[str, ...]:
    """Make mamba-ssm's ``selective_scan_fn`` and transformers' Mamba models run ``vlm.ops.selective_scan``.

    Models that exist already are changed too, since they look the function up at each call. What our scan
    does not cover (complex A, B or C that do not depend on time) still goes to the original. Calling it
    again changes nothing; ``unpatch`` puts the originals back.

    Returns:
        ``module.name`` of every function that is now replaced.

    Raises:
        KernelError: Nothing to replace is installed: neither mamba-ssm nor transformers 5 or later.
    """
    for module_name, name in _TARGETS:
        module = _module(module_name)
        original = getattr(module, name, None)
        if module is None or original is None or f"{module_name}.{name}" in _replaced:
            continue
        _replaced[f"{module_name}.{name}"] = (module, name, original)
        setattr(module, name, _replacement(original))
    if not _replaced:
        raise KernelError(
            "vlm.ops.patch() found nothing to replace; it needs mamba-ssm, or transformers 5 or later: "
            "pip install 'transformers>=5'"
        )
    return tuple(_replaced)


def unpatch() -> None:
    """Put back what ``patch`` replaced."""
    for module, name, original in _replaced.values():
        setattr(module, name, original)
    _replaced.clear()


def _module(name: str) -> ModuleType | None:
    """Import a module, or return None where its package is missing or broken."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def _replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the original's arguments that runs our scan wherever it can."""

    def scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **others: Any,
    ) -> Any:
        if A.is_complex() or B.dim() == 2 or C.dim() == 2:
            options = {"delta_bias": delta_bias, "delta_softplus": delta_softplus, **others}
            return original(u, delta, A, B, C, D=D, z=z, return_last_state=return_last_state, **options)
        dtype, wide = u.dtype, torch.promote_types(u.dtype, torch.float32)
        delta, B, C = (x.to(dtype) for x in (delta, B, C))
        D, delta_bias = (None if x is None else x.to(wide) for x in (D, delta_bias))
        gate = None if z is None else z.to(dtype)
        return selective_scan(
            u, delta, A.to(wide), B, C, D, gate, delta_bias, delta_softplus, return_last_state
        )

    return scan
