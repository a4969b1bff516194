"""mamba-ssm and causal-conv1d, admitted as the rival once they are built and give a block's numbers."""

from __future__ import annotations

import time
from pathlib import Path

import official
import torch
from cases import relative_error
from gpu.models import built
from gpu.problems import SIZES, Load, normal
from gpu.session import Figures, Session

from vlm.models.mamba_block import MambaBlock

# It rounds delta to bf16, which ours does not, and sums of gradients magnify that. Whoever is nearer to the
# truth, this only asks whether both compute the same.
OUTPUT_LIMIT, GRADIENT_LIMIT = 2e-2, 1e-1


def admit(session: Session) -> Figures:
    """Let mamba-ssm be the rival if it was built and gives a block's numbers; else PyTorch stays it."""
    if session.build is None:
        reason = "no sources given"
    else:
        begin = time.perf_counter()
        reason = session.build.wait(session.left_s())
        print(f"official: waited {time.perf_counter() - begin:.0f} s for the build", flush=True)
        if not reason:
            reason = _reason_against(session, session.build.into)
    if reason:
        print(f"official: {reason}; compared with chunked, which is PyTorch", flush=True)
        return {"rival": "chunked", "reason": reason}
    session.rivals = {"official": official.serving}
    return {"rival": "official"}


def _reason_against(session: Session, folder: Path) -> str:
    """Return why the modules cannot be compared with, or an empty string."""
    load = Load("Ti", SIZES["Ti"], 2, 1, 5 if session.is_small else 197)
    layer = built(session, load, depth=1).layers[0]
    assert isinstance(layer, MambaBlock)
    tokens = normal(session, load.batch, load.length, load.size.width)
    found = []
    try:
        official.modules(folder)
        for name in (session.ours, "official"):
            serving = official.serving() if name == "official" else session.serving(name)
            with serving, torch.autocast(tokens.device.type, torch.bfloat16):
                out = layer.mixer(tokens)
            gradients = torch.autograd.grad(out.float().square().sum(), [*layer.mixer.parameters()])
            found.append([out.detach(), *gradients])
    except (ImportError, RuntimeError) as error:
        return f"built, but not to be used: {type(error).__name__}: {error}"
    ours = [x.double() for x in found[0]]
    output, gradient = (relative_error(found[1][part], ours[part]) for part in (slice(1), slice(1, None)))
    text = f"numbers differ from ours by {output:.1e}, gradients by {gradient:.1e}"
    print(f"official: its {text}", flush=True)
    return "" if output < OUTPUT_LIMIT and gradient < GRADIENT_LIMIT else f"built, but its {text}"
