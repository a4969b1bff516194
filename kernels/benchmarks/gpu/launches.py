"""What the host does: the time that a call takes it, and how many launches a block is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from gpu.models import block_jobs, built
from gpu.problems import (
    SIZES,
    Load,
    conv_arguments,
    norm_arguments,
    run_conv,
    run_norm,
    run_scan,
    scan_arguments,
)
from gpu.session import Figures, Session

from vlm.models.mamba_block import MambaBlock
from vlm.ops.cuda import library as cuda_library
from vlm.ops.cuda.registry import PROBE

# what the host may take for one launch
GOAL_US = 10.0
_CALLS, _ROUNDS = 100, 5


def launches(session: Session) -> Figures:
    """Measure the host's time for each call, and count a block's launches."""
    calls: dict[str, Callable[[], object]] = {}
    if session.ours == "cuda" and session.device.is_gpu:
        calls["launch"] = _bare_launch(session)
    tiny = (1, 16, 64)
    calls["bi_scan"] = partial(run_scan, scan_arguments(session, *tiny, torch.bfloat16, rank=16), None)
    calls["conv2"] = partial(run_conv, conv_arguments(session, *tiny, torch.bfloat16), None)
    calls["add_rms_norm"] = partial(run_norm, norm_arguments(session, *tiny, torch.bfloat16), None)
    costs: Figures = {}
    rounds, number = (1, 2) if session.is_small else (_ROUNDS, _CALLS)
    with session.serving(session.ours), torch.no_grad():
        for name, call in calls.items():
            costs[name] = min(session.device.host_us(call, number) for _ in range(rounds))
            print(f"launches: {name} takes the host {costs[name]:.1f} us", flush=True)
    try:
        counted = _of_a_block(session)
    except RuntimeError as error:  # not every machine lets its GPU be profiled
        session.is_broken = True
        counted = {"error": str(error)}
    return {"host_us": costs, "goal_us": GOAL_US, "block_forward": counted}


def _bare_launch(session: Session) -> Callable[[], object]:
    """Return a launch of the smallest kernel, without an operator around it."""
    kernel = cuda_library.kernel(PROBE, session.device.place)
    out = torch.zeros(1000, dtype=torch.int32, device=session.device.place)
    return partial(cuda_library.run_probe, kernel, out)


def _of_a_block(session: Session) -> Figures:
    """Count what one block launches in inference, for ours and every rival."""
    size = SIZES["Ti"]
    load = Load("Ti", size, 1, 1, 5 if session.is_small else 1569)
    layer = built(session, load, depth=1).layers[0]
    assert isinstance(layer, MambaBlock)
    forward = block_jobs(session, layer, load)["forward"]
    counted: Figures = {}
    for name in (session.ours, *session.rivals):
        with session.serving(name):
            found = Counter(session.device.launches(forward))
        counted[name] = {"launches": found.total(), "of": dict(found.most_common())}
        print(f"launches: a block's forward pass makes {found.total()} by {name}", flush=True)
    return counted
