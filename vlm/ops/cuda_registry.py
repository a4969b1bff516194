"""Every CUDA kernel that this package may launch: CI compiles each one and holds it to its limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Instantiation:
    """One compilation of a source file: a kernel for one kind of problem.

    Attributes:
        source: File in ``kernels/cuda``.
        entry: Name of the kernel, which has C linkage and takes one struct.
        defines: Macros and their values.
        max_registers: More in a thread mean that fewer warps fit than the kernel was designed for.
    """

    source: str
    entry: str
    defines: tuple[tuple[str, str | int], ...] = ()
    max_registers: int = 255

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's options."""
        return tuple(f"-D{name}={value}" for name, value in self.defines)

    def __str__(self) -> str:
        """Name the kernel and what it was compiled for."""
        values = ", ".join(f"{name.removeprefix('VLM_').lower()} {value}" for name, value in self.defines)
        return f"{self.entry} ({values})" if values else self.entry


PROBE = Instantiation("probe.cu", "vlm_probe", max_registers=32)

INSTANTIATIONS: tuple[Instantiation, ...] = (PROBE,)
