"""Which implementation serves an operator: asked for by ``VLM_SCAN_BACKEND`` or chosen here."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from vlm.errors import KernelError
from vlm.ops import cpu_library
from vlm.ops.cuda import library as cuda_library

VARIABLE = "VLM_SCAN_BACKEND"
CHOICES = ("auto", "cuda", "cpu", "chunked", "reference", "mamba_ssm")
OPERATORS = ("selective_scan", "bi_scan", "conv2", "add_rms_norm")
_SCANS = OPERATORS[:2]


def backend(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Return the name of the implementation that serves ``op`` on ``device`` for tensors of ``dtype``.

    ``VLM_SCAN_BACKEND`` forces one of ``cuda``, ``cpu``, ``chunked``, ``reference``, ``mamba_ssm``; unset or
    ``auto``, the fastest that can serve is chosen; the CUDA kernels only after a trial on the device gave
    PyTorch's numbers. What a backend has no form of runs as ``chunked``, plain PyTorch: all but scans with
    ``mamba_ssm``, ``add_rms_norm`` with ``cpu``. The first question may compile kernels (seconds, once).

    Args:
        op: ``selective_scan``, ``bi_scan``, ``conv2`` or ``add_rms_norm``.
        device: Where the tensors are.
        dtype: Their dtype.

    Raises:
        ValueError: Unknown ``op``.
        KernelError: The forced backend cannot serve; the message says why and what to do.
    """
    if op not in OPERATORS:
        raise ValueError(f"op must be one of {', '.join(OPERATORS)}, got {op!r}")
    kind = torch.device(device).type
    wanted = os.environ.get(VARIABLE, "auto") or "auto"
    if wanted not in CHOICES:
        raise KernelError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {wanted!r}")
    if wanted == "auto":
        if kind == "cpu":
            return "cpu" if op != "add_rms_norm" and cpu_library.available(dtype) else "chunked"
        return "cuda" if kind == "cuda" and _is_trusted(op, device, dtype) else "chunked"
    if wanted == "cpu":
        _check_cpu(op, kind, dtype)
        return "chunked" if op == "add_rms_norm" else "cpu"
    if wanted == "cuda":
        _check_cuda(op, device, dtype)
    elif wanted == "mamba_ssm":
        _check_mamba_ssm(op, kind, dtype)
        return "mamba_ssm" if op in _SCANS else "chunked"
    return wanted


def _check_cpu(op: str, kind: str, dtype: torch.dtype) -> None:
    """Raise unless the C++ kernels can serve."""
    if kind != "cpu":
        raise KernelError(
            f"{VARIABLE}=cpu, but the tensors of {op} are on {kind}; move them to the CPU "
            f"or use {VARIABLE}=auto"
        )
    if not cpu_library.available(dtype):
        raise KernelError(
            f"{VARIABLE}=cpu, but the C++ kernels cannot serve {op} in {dtype}: "
            f"{cpu_library.unavailable_reason(dtype)}; use {VARIABLE}=chunked"
        )


def _is_trusted(op: str, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Return whether the CUDA kernels of ``op`` passed their trial on ``device``."""
    from vlm.ops.cuda import trial  # which needs the operators, which need this module

    if not torch.cuda.is_available():
        return False
    place = torch.device(device)
    place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
    return trial.trusted(op, place, dtype)


def _check_cuda(op: str, device: torch.device | str, dtype: torch.dtype) -> None:
    """Raise unless the CUDA kernels can serve."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(f"{VARIABLE}=cuda serves float32, bfloat16 and float16, got {dtype}; use chunked")
    if reason := cuda_library.unavailable_reason(device):
        raise KernelError(
            f"{VARIABLE}=cuda, but the CUDA kernels cannot serve {op}: {reason}; use {VARIABLE}=auto"
        )


def _check_mamba_ssm(op: str, kind: str, dtype: torch.dtype) -> None:
    """Raise unless mamba-ssm's CUDA extension can serve."""
    if kind != "cuda":
        raise KernelError(
            f"{VARIABLE}=mamba_ssm, but the tensors of {op} are on {kind} and mamba-ssm runs on CUDA only; "
            f"use {VARIABLE}=auto"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(
            f"{VARIABLE}=mamba_ssm serves float32, bfloat16 and float16, got {dtype}; use chunked"
        )
    mamba_ssm_extension()


def mamba_ssm_extension() -> Any:
    """Return mamba-ssm's compiled module.

    Raises:
        KernelError: It is not installed, or was installed without its CUDA extension.
    """
    try:
        return importlib.import_module("selective_scan_cuda")
    except ImportError as error:
        raise KernelError(
            f"{VARIABLE}=mamba_ssm, but its extension selective_scan_cuda cannot be imported ({error}); "
            "install mamba-ssm with MAMBA_KEEP_CUDA_BUILD=TRUE or use another backend"
        ) from error
