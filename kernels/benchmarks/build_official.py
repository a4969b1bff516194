"""Build the rival's extensions for one GPU: python kernels/benchmarks/build_official.py SOURCES INTO.

SOURCES holds the unpacked source releases ``mamba_ssm-*`` and ``causal_conv1d-*`` from PyPI (2.3.2.post1 and
1.7.0 were tried). Only what a comparison in bf16 runs is compiled, which takes some two minutes of processor
time. Everything else that the dispatchers name is a stub that raises. Needs nvcc, a C++ compiler and the
headers of PyTorch.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

SCAN, CONV = "selective_scan_cuda", "causal_conv1d_cuda"
HALF, BFLOAT, FLOAT = "at::Half", "at::BFloat16", "float"
COMPLEX = "c10::complex<float>"
_EXPLICIT = re.compile(r"^template void (\w+)<([\w:]+), ([\w:<>]+)>\(.*;\s*$", re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    """Build both extensions; say why if it fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", type=Path, help="folder of the unpacked releases")
    parser.add_argument("into", type=Path, help="where the two modules go")
    parser.add_argument("--seconds", type=float, default=180.0, help="give up after that long")
    parser.add_argument("--arch", default="sm_90", help="what to compile for")
    arguments = parser.parse_args(argv)
    reason = build(arguments.sources, arguments.into, seconds=arguments.seconds, arch=arguments.arch)
    print(reason or f"built {SCAN} and {CONV} in {arguments.into}")
    return 1 if reason else 0


def build(sources: Path, into: Path, *, seconds: float = 180.0, arch: str = "sm_90", nvcc: str = "") -> str:
    """Compile the two modules into a folder, all files at once.

    Args:
        sources: Holds one ``mamba_ssm-*`` and one ``causal_conv1d-*``.
        into: For the modules and what they are made of.
        seconds: Time allowed for all of it.
        arch: The one architecture.
        nvcc: The compiler; found on the path or in /usr/local/cuda otherwise.

    Returns:
        Why there are no modules, or an empty string.
    """
    nvcc = nvcc or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        return "not built: there is no nvcc"
    found = {name: sorted(sources.glob(f"{name}-*/csrc")) for name in ("mamba_ssm", "causal_conv1d")}
    if missing := [name for name, folders in found.items() if not folders]:
        return f"not built: {sources} holds no sources of {', '.join(missing)}"
    into.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    try:
        jobs = [
            *_scan_jobs(found["mamba_ssm"][-1] / "selective_scan", into / SCAN),
            *_conv_jobs(found["causal_conv1d"][-1], into / CONV),
        ]
        _run([_compilation(source, nvcc, arch) for source in jobs], deadline)
        _run([_link(name, into) for name in (SCAN, CONV)], deadline)
    except (OSError, RuntimeError) as error:
        return f"not built: {error}"
    return ""


def _scan_jobs(folder: Path, work: Path) -> list[Path]:
    """Write the files of the scan: the dispatcher, bf16 forward and real bf16 backward, stubs."""
    shutil.copytree(folder, work, dirs_exist_ok=True)
    kept = {(name, BFLOAT, FLOAT) for name in ("selective_scan_fwd_cuda", "selective_scan_bwd_cuda")}
    everything = itertools.product(
        ("selective_scan_fwd_cuda", "selective_scan_bwd_cuda"), (FLOAT, HALF, BFLOAT), (FLOAT, COMPLEX)
    )
    arguments = {"selective_scan_fwd_cuda": "SSMParamsBase &", "selective_scan_bwd_cuda": "SSMParamsBwd &"}
    stubs = _stubs("selective_scan.h", arguments, [each for each in everything if each not in kept])
    (work / "stubs.cpp").write_text(stubs)
    for name in ("selective_scan_fwd_bf16.cu", "selective_scan_bwd_bf16_real.cu"):
        _keep(work / name, kept)
    names = ("selective_scan.cpp", "selective_scan_fwd_bf16.cu", "selective_scan_bwd_bf16_real.cu")
    return [work / name for name in (*names, "stubs.cpp")]


def _conv_jobs(folder: Path, work: Path) -> list[Path]:
    """Write the files of the convolution: the dispatcher, bf16 with fp32 and bf16 weights, stubs."""
    shutil.copytree(folder, work, dirs_exist_ok=True)
    arguments = {
        **{f"causal_conv1d{kind}_fwd_cuda": "ConvParamsBase &" for kind in ("", "_channellast")},
        **{f"causal_conv1d{kind}_bwd_cuda": "ConvParamsBwd &" for kind in ("", "_channellast")},
        "causal_conv1d_update_cuda": "ConvParamsBase &",
    }
    kept = {
        (f"causal_conv1d_{way}_cuda", BFLOAT, weight) for way in ("fwd", "bwd") for weight in (FLOAT, BFLOAT)
    }
    types = (FLOAT, HALF, BFLOAT)
    wanted = [each for each in itertools.product(arguments, types, types) if each not in kept]
    (work / "stubs.cpp").write_text(_stubs("causal_conv1d.h", arguments, wanted))
    for name in ("causal_conv1d_fwd.cu", "causal_conv1d_bwd.cu"):
        _keep(work / name, kept)
    names = ("causal_conv1d.cpp", "causal_conv1d_fwd.cu", "causal_conv1d_bwd.cu", "stubs.cpp")
    return [work / name for name in names]


def _keep(path: Path, kept: set[tuple[str, str, str]]) -> None:
    """Remove the explicit instantiations that are not wanted."""
    text = path.read_text()
    path.write_text(_EXPLICIT.sub(lambda found: found[0] if found.groups() in kept else "", text))


def _stubs(header: str, arguments: dict[str, str], wanted: Sequence[tuple[str, str, str]]) -> str:
    """Return definitions of what is not built."""
    lines = [
        "#include <torch/types.h>",
        "#include <c10/cuda/CUDAStream.h>",
        f'#include "{header}"',
        *(
            f"template <typename input_t, typename weight_t> void {name}({argument}, cudaStream_t);"
            for name, argument in arguments.items()
        ),
        *(
            f"template <> void {name}<{kind}, {weight}>({arguments[name]}, cudaStream_t)"
            f' {{ TORCH_CHECK(false, "{name} was not built for these types"); }}'
            for name, kind, weight in wanted
        ),
    ]
    return "\n".join(lines) + "\n"


def _compilation(source: Path, nvcc: str, arch: str) -> list[str]:
    """Return the command that compiles one file."""
    from torch.utils.cpp_extension import include_paths

    folders = [*include_paths(), sysconfig.get_path("include"), str(source.parent)]
    includes = [f"-I{folder}" for folder in folders]
    name = source.parent.name
    common = ["-O3", "-std=c++17", f"-DTORCH_EXTENSION_NAME={name}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    target = ["-c", str(source), "-o", str(source.with_suffix(f"{source.suffix}.o"))]
    if source.suffix == ".cpp":
        toolkit = Path(nvcc).resolve().parents[1] / "include"
        return [os.environ.get("CXX", "c++"), *common, "-fPIC", "-w", *includes, f"-I{toolkit}", *target]
    halves = [
        f"-U__CUDA_NO_{kind}_{what}__"
        for kind in ("HALF", "BFLOAT16", "BFLOAT162")
        for what in ("OPERATORS", "CONVERSIONS")
    ]
    # the flags of the releases' own setup.py
    flags = ["--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", "-w"]
    return [nvcc, *common, f"-arch={arch}", *halves, *flags, "-Xcompiler=-fPIC", *includes, *target]


def _link(name: str, into: Path) -> list[str]:
    """Return the command that links one module."""
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    present = [each for each in ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python")]
    flags = [f"-l{each}" for each in present if (libraries / f"lib{each}.so").exists()]
    objects = sorted(map(str, (into / name).glob("*.o")))
    output = ["-o", str(into / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}")]
    return [os.environ.get("CXX", "c++"), "-shared", *objects, f"-L{libraries}", *flags, *output]


def _run(commands: list[list[str]], deadline: float) -> None:
    """Run commands side by side.

    Raises:
        RuntimeError: One failed, or time is up.
    """
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        for command, process in zip(commands, running, strict=True):
            output, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            if process.returncode:
                raise RuntimeError(f"{' '.join(command[:1] + command[-4:])} failed: {output[-2000:]}")
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("time is up") from error
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()


if __name__ == "__main__":
    sys.exit(main())
