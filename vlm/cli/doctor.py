"""Say what this machine can do, and what is wrong."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vlm import __version__
from vlm.errors import IntegrityError, InvalidInput

EXAMPLE = "vlm doctor --json"

_OLDEST_PYTHON = (3, 11)
_OLDEST_TORCH = (2, 10)
_LITTLE_DISK_BYTES = 2e9
# extra: the distribution that stands for it
_EXTRAS = {
    "train": "deepspeed",
    "lora": "peft",
    "clip": "open-clip-torch",
    "world": "scikit-learn",
    "gpu": "mamba-ssm",
    "serve": "starlette",
    "hub": "transformers",
    "parquet": "pyarrow",
    "ray": "ray",
    "lance": "lancedb",
    "remote": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "wandb": "wandb",
}
_FOLDERS = ("kernels", "configs", "data_tools", "eval")
_REQUIRED = ("numpy", "einops", "safetensors", "tokenizers", "huggingface_hub", "PIL", "yaml", "tqdm")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: ``note`` tells of a limit, ``problem`` of something that must be mended."""

    name: str
    status: Literal["ok", "note", "problem"]
    text: str
    advice: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 0 if nothing is wrong, 5 otherwise."""
    findings = examine()
    problems = [finding for finding in findings if finding.status == "problem"]
    if arguments.json:
        print(
            json.dumps({"ok": not problems, "findings": [asdict(finding) for finding in findings]}, indent=1)
        )
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mark = {"ok": " ", "note": "-", "problem": "!"}[finding.status]
            print(f"{mark} {finding.name:<{width}}  {finding.text}")
            if finding.advice:
                print(f"  {'':<{width}}  -> {finding.advice}")
        print("everything works" if not problems else f"{len(problems)} to mend")
    return IntegrityError.exit_code if problems else 0


def examine() -> list[Finding]:
    """Run every check; one that breaks is itself a finding."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check()
        except Exception as error:  # a broken installation breaks in ways that nobody listed
            name = check.__name__.removeprefix("check_")
            findings.append(Finding(name, "problem", f"{type(error).__name__}: {error}", "reinstall vlm"))
    return findings


def check_python() -> Iterator[Finding]:
    """Interpreter and system."""
    system = f"{platform.system()} {platform.machine()}"
    enough = sys.version_info >= _OLDEST_PYTHON
    advice = "" if enough else f"install Python {'.'.join(map(str, _OLDEST_PYTHON))} or later"
    yield Finding("python", "ok" if enough else "problem", f"{platform.python_version()} on {system}", advice)


def check_vlm() -> Iterator[Finding]:
    """The package itself and the files it ships."""
    from vlm.assets import asset

    missing = []
    for folder in _FOLDERS:
        try:
            asset(folder)
        except InvalidInput:
            missing.append(folder)
    place = Path(__file__).resolve().parents[1]
    if missing:
        yield Finding(
            "vlm", "problem", f"{__version__} in {place} lacks {', '.join(missing)}", "reinstall vlm"
        )
    else:
        yield Finding("vlm", "ok", f"{__version__} in {place}")
    broken = [problem for name in _REQUIRED if (problem := _import_problem(name)) is not None]
    if broken:
        yield Finding(
            "required", "problem", "; ".join(broken), "pip install --force-reinstall videomamba-vlm"
        )


def check_torch() -> Iterator[Finding]:
    """PyTorch, its devices, and what is known to disagree with it."""
    problem = _import_problem("torch")
    if problem is not None:
        yield Finding("torch", "problem", problem, "pip install 'torch>=2.10'")
        return
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TORCH:
        yield Finding("torch", "problem", torch.__version__, "pip install 'torch>=2.10'")
    else:
        yield Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gigabytes = properties.total_memory / 1e9
            yield Finding(f"cuda:{index}", "ok", f"{properties.name}, {gigabytes:.0f} GB")
    elif torch.version.cuda is not None:
        yield Finding("cuda", "note", "built into torch, but no device answers", "look at nvidia-smi")
    yield from _check_torchvision()


def _check_torchvision() -> Iterator[Finding]:
    version = _version("torchvision")
    if version is None:
        return
    problem = _import_problem("torchvision")
    if problem is None:
        yield Finding("torchvision", "ok", version)
    elif "torchvision::" in problem:
        yield Finding(
            "torchvision",
            "note",
            f"{version} was built for another torch; vlm works around it, other programs will not",
            "install the torchvision that belongs to this torch, or none",
        )
    else:
        yield Finding(
            "torchvision", "problem", problem, "pip uninstall torchvision, or install a matching one"
        )


def check_scan() -> Iterator[Finding]:
    """Which implementation of the selective scan serves, and where its compiled form lies."""
    import torch

    from vlm.ops import backend, cpu_library

    start = time.perf_counter()
    serving = backend("selective_scan", "cpu", torch.float32)
    seconds = time.perf_counter() - start
    if serving == "cpu":
        yield Finding("scan on cpu", "ok", f"{cpu_library.describe()}, ready in {seconds:.1f} s")
    elif os.environ.get("VLM_SCAN_BACKEND", "auto") not in ("", "auto"):
        yield Finding("scan on cpu", "note", f"{serving}, forced by VLM_SCAN_BACKEND")
    else:
        reason = cpu_library.unavailable_reason(torch.float32)
        yield Finding(
            "scan on cpu", "note", f"{serving} (several times slower): {reason}", "install g++ or clang++"
        )
    if torch.cuda.is_available():
        yield _operators_on_cuda()


def _operators_on_cuda() -> Finding:
    """Return which operators run on CUDA kernels, and what runs the others."""
    import torch

    from vlm.errors import KernelError
    from vlm.ops.backends import OPERATORS, backend, mamba_ssm_extension

    serving: dict[str, list[str]] = {}
    for op in OPERATORS:
        serving.setdefault(backend(op, "cuda", torch.bfloat16), []).append(op)
    text = "; ".join(f"{name}: {', '.join(ops)}" for name, ops in serving.items())
    with suppress(KernelError):
        mamba_ssm_extension()
        text += "; VLM_SCAN_BACKEND=mamba_ssm can be had"
    return Finding("operators on cuda", "ok" if list(serving) == ["cuda"] else "note", text)


def check_cuda_kernels() -> Iterator[Finding]:
    """Whether the CUDA kernels can serve; where a GPU answers, all of them are made ready and timed."""
    import torch

    from vlm.errors import KernelError
    from vlm.ops.cuda import library as cuda_library

    if not torch.cuda.is_available():
        parts = ", ".join(cuda_library.describe())
        yield Finding("cuda kernels", "ok", f"not in use: no GPU answers ({parts})")
        return
    try:
        kernels = cuda_library.library()
    except KernelError as error:
        yield Finding("cuda kernels", "note", f"PyTorch serves instead: {error}")
        return
    yield Finding("cuda kernels", "ok", ", ".join(cuda_library.describe()))
    for index in range(torch.cuda.device_count()):
        name = f"kernels cuda:{index}"
        try:
            made = kernels.prepare(index)
        except KernelError as error:
            yield Finding(name, "note", f"PyTorch serves instead: {error}")
            continue
        if reason := kernels.reason(index):
            advice = "update the GPU's driver, or install a PyTorch that fits it"
            yield Finding(name, "problem", reason, advice)
            continue
        text = (
            f"{made.num_kernels} for {kernels.architecture(index)} ready in {made.seconds:.1f} s, "
            f"{made.num_compiled} of them compiled now"
        )
        yield Finding(name, "ok", text)


def check_video() -> Iterator[Finding]:
    """The decoder."""
    problem = _import_problem("av")
    if problem is not None:
        yield Finding("video", "problem", problem, "pip install --force-reinstall av")
        return
    import av

    libraries = ", ".join(
        f"{name.removeprefix('lib')} {'.'.join(map(str, av.library_versions[name]))}"
        for name in ("libavcodec", "libavformat")
    )
    yield Finding("video", "ok", f"PyAV {av.__version__}, FFmpeg {libraries}")
    yield from _check_decoding_devices()


def _check_decoding_devices() -> Iterator[Finding]:
    """Say what PyAV could decode with, and whether it is here."""
    from vlm.data.decoding.hardware import offered_devices
    from vlm.retrieval.ingest.pool import check_device

    for kind, codecs in offered_devices().items():
        name, known = f"decode with {kind}", f"{', '.join(codecs)}: vlm index build --decode-with {kind}"
        try:
            check_device(kind)
        except InvalidInput as error:
            yield Finding(name, "ok", f"not in use, the CPU decodes: {error}")
        else:
            yield Finding(name, "ok", known)


def check_search() -> Iterator[Finding]:
    """The nearest-neighbour library; two builds of it overwrite each other's files."""
    builds = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu12")
    installed = [f"{name} {version}" for name in builds if (version := _version(name)) is not None]
    if len(installed) > 1:
        advice = "pip uninstall all of them, then install one"
        yield Finding("faiss", "problem", f"{' and '.join(installed)} share one module", advice)
        return
    if not installed:
        yield Finding("faiss", "note", "not installed: the exact NumPy backend serves")
        return
    problem = _import_problem("faiss")
    if problem is not None:
        yield Finding("faiss", "problem", f"{installed[0]}: {problem}", "reinstall it")
        return
    from vlm.retrieval.backends.faiss import count_gpus

    count = count_gpus()
    if count:
        text = f"{installed[0]}, which makes search structures on the first of {count} GPUs"
        yield Finding("faiss", "ok", text)
    elif "gpu" in installed[0]:
        advice = "look at nvidia-smi, or install faiss-cpu"
        yield Finding("faiss", "note", f"{installed[0]} finds no GPU: the CPU does everything", advice)
    else:
        yield Finding("faiss", "ok", installed[0])


def check_extras() -> Iterator[Finding]:
    """Optional parts; absent ones are no fault."""
    for extra, distribution in _EXTRAS.items():
        version = _version(distribution)
        text = (
            f"{distribution} {version}"
            if version
            else f"not installed: pip install 'videomamba-vlm[{extra}]'"
        )
        yield Finding(f"extra {extra}", "ok", text)


def check_machine() -> Iterator[Finding]:
    """Cores, memory, disk."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = ""
    if "torch" in sys.modules:
        threads = f", torch uses {sys.modules['torch'].get_num_threads()} threads"
    yield Finding("cores", "ok", f"{usable} of {os.cpu_count()}{threads}")
    memory = _memory_bytes()
    if memory is not None:
        yield Finding("memory", "ok", f"{memory / 1e9:.1f} GB")
    yield _check_disk()


def _check_disk() -> Finding:
    """Look at the disk of the user's folder without making the folder."""
    from vlm.assets import user_folder

    folder = user_folder()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    text = f"{free / 1e9:.1f} GB free for {folder}"
    if not os.access(nearest, os.W_OK):
        return Finding("disk", "problem", f"{nearest} cannot be written", "set VLM_HOME to a folder that can")
    if free < _LITTLE_DISK_BYTES:
        return Finding("disk", "note", text, "free some, or set VLM_HOME to a larger disk")
    return Finding("disk", "ok", text)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_vlm,
    check_torch,
    check_scan,
    check_cuda_kernels,
    check_video,
    check_search,
    check_extras,
    check_machine,
)


def _memory_bytes() -> int | None:
    """Return the memory that this process may use: the machine's, or less in a container."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_problem(name: str) -> str | None:
    """Return why a module cannot be imported, or None if it can."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a module of another build may raise anything
        return f"{type(error).__name__}: {error}"
    return None
