"""Operators: the selective scan, the two-directional mixer, their norms, and who serves them.

Importing this module compiles nothing; the C++ kernels are built or loaded at the first call that needs them.
"""

from __future__ import annotations

from vlm.ops.backends import backend
from vlm.ops.bidirectional import Branch, bidirectional_mamba
from vlm.ops.causal_conv import conv2
from vlm.ops.norm import add_rms_norm, rms_norm
from vlm.ops.patching import patch, unpatch
from vlm.ops.selective_scan import selective_scan

__all__ = [
    "Branch",
    "add_rms_norm",
    "backend",
    "bidirectional_mamba",
    "conv2",
    "patch",
    "rms_norm",
    "selective_scan",
    "unpatch",
]
