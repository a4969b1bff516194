"""What every test starts from: fixed seeds, few threads, no network, and the optional reference material."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
SEED = 20240311

# Read when torch and huggingface_hub are imported, hence set before any test module is.
# One thread: the suite runs a process on each core, and runs in different processes must agree to the bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# In memory where there is room: hundreds of tests wait for files to be on disk, and others writing to
# the same disk hold them up for minutes. A killed process loses nothing of either.
with contextlib.suppress(OSError):
    memory = os.statvfs("/dev/shm")
    if memory.f_bavail * memory.f_frsize > 4 << 30 and not memory.f_flag & os.ST_NOEXEC:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

# A timed test says what the machine was doing, not whether the code is right; and a failure must repeat.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# A shell starts background jobs with Ctrl-C ignored, which children inherit; tests send it to children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where none answers; torch is asked only if some test wants one."""
    gpu_items = [item for item in items if item.get_closest_marker("requires_cuda")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> Iterator[None]:
    """Seed the generators that are loaded, so that a test draws the same numbers alone and in the suite."""
    random.seed(SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(SEED)
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.manual_seed(SEED)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # training switches it off for its process


@pytest.fixture(autouse=True)
def ordinary_priority() -> Iterator[None]:
    """Give up what SVT-AV1 takes where it may: real-time priority for the thread that encodes, and for good.

    All later processes would inherit it, and while two of them work, others get a twentieth of a processor.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    if os.sched_getscheduler(0) != before[0]:
        os.sched_setscheduler(0, *before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's root."""
    return ROOT


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The tracked reference numbers, ``tests/fixtures``."""
    return ROOT / "tests" / "fixtures"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional material that is too large to track: real videos and annotations.

    Found by the environment variable ``VLM_SHARED``, else beside the checkout; its tests are skipped without.
    """
    named = os.environ.get("VLM_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference material at {folder}; set VLM_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def official_clip(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name under which ``load_model`` finds the official runs' tiny CLIP teacher."""
    import json

    import torch
    from safetensors import safe_open

    from vlm.models.teachers import frame_encoders

    try:
        library = frame_encoders._import_open_clip()
    except Exception:
        pytest.skip("the clip extra is not installed")
    vision = {"image_size": 64, "layers": 3, "width": 32, "patch_size": 16, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    sizes = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-teacher.json").write_text(json.dumps(sizes))
    library.add_model_config(folder)
    state = library.create_model("tiny-teacher", pretrained=None).state_dict()
    prefix = "state_dict/clip_teacher."
    with safe_open(fixtures / "umt_videomamba_tiny.safetensors", framework="pt") as file:
        for name in [name for name in file.keys() if name.startswith(prefix)]:  # noqa: SIM118
            value = file.get_tensor(name)
            own = f"visual.{name.removeprefix(prefix)}"
            state[own] = value[:, :, 0] if own == "visual.conv1.weight" else value
    torch.save(state, folder / "tiny.pt")
    return f"open_clip:tiny-teacher/{folder / 'tiny.pt'}"
