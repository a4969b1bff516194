"""Blocks and whole encoders: time, memory, launches, and what a recorded graph makes of small batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from gpu.problems import Load, loads, normal, single_clips
from gpu.session import Figures, Session
from torch import Tensor

from vlm.models.graphs import GraphedEncoder
from vlm.models.mamba_block import MambaBlock
from vlm.models.video_mamba import VideoMamba, sized


def built(session: Session, load: Load, depth: int | None = None) -> VideoMamba:
    """Return an encoder of a load's size, with random weights."""
    side = 32 if session.is_small else 224
    depth = 1 if session.is_small else depth
    settings = {"num_frames": load.frames, "image_size": side} | ({"depth": depth} if depth else {})
    # drawn there, which is quicker; what does not ask where it is made is moved
    with torch.device(session.device.place):
        return VideoMamba(sized(load.size.model, **settings)).to(session.device.place)


def block(session: Session) -> Figures:
    """Time one block, its norm included, as it stands in the middle of an encoder."""
    rows: Figures = {}
    for load in session.shared_out(loads(session)):
        layer = built(session, load, depth=1).layers[0]
        assert isinstance(layer, MambaBlock)
        rows[load.key] = _timed(session, f"block {load.key}", block_jobs(session, layer, load))
    return rows


def block_jobs(session: Session, layer: MambaBlock, load: Load) -> dict[str, Callable[[], object]]:
    """Return inference, and a training step's forward and backward, in bf16."""
    shape = (load.batch, load.length, load.size.width)
    hidden = normal(session, *shape, dtype=torch.bfloat16).requires_grad_()
    residual = normal(session, *shape).requires_grad_()
    gradients = [torch.randn_like(hidden), torch.randn_like(residual)]
    leaves = [hidden, residual, *layer.parameters()]

    def forward() -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, torch.bfloat16):
            outputs: tuple[Tensor, Tensor] = layer(hidden, residual)
        return outputs

    def inference() -> object:
        with torch.inference_mode():
            return forward()

    return {
        "forward": inference,
        "forward_backward": lambda: torch.autograd.grad(forward(), leaves, gradients),
    }


def encoder(session: Session) -> Figures:
    """Time whole encoders."""
    rows: Figures = {}
    for load in session.shared_out(loads(session)):
        model = built(session, load)
        rows[load.key] = _timed(session, f"encoder {load.key}", encoder_jobs(model, _video(session, load)))
    return rows


def encoder_jobs(model: VideoMamba, video: Tensor) -> dict[str, Callable[[], object]]:
    """Return inference, and a training step's forward and backward, in bf16."""

    def forward() -> Tensor:
        with torch.autocast(video.device.type, torch.bfloat16):
            tokens: Tensor = model(video).tokens
        return tokens

    def inference() -> Tensor:
        with torch.inference_mode():
            return forward()

    def both() -> None:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(forward().float().square().mean())

    return {"forward": inference, "forward_backward": both}


def _video(session: Session, load: Load) -> Tensor:
    side = 32 if session.is_small else 224
    video: Tensor = normal(session, load.batch, load.frames, 3, side, side)
    return video


def _timed(session: Session, title: str, jobs: dict[str, Callable[[], object]]) -> Figures:
    row = {job: session.compared(f"{title} {job}", session.everybody(run)) for job, run in jobs.items()}
    session.device.release()
    return row


def memory(session: Session) -> Figures:
    """Measure the memory of a training step beyond weights and clips, for ours and for every rival."""
    rows: Figures = {}
    for load in session.shared_out([each for each in loads(session) if each.batch == 1 or each.frames > 8]):
        model = built(session, load)
        both = encoder_jobs(model, _video(session, load))["forward_backward"]
        row: Figures = {}
        for name in (session.ours, *session.rivals):
            if session.is_over or (name != session.ours and not session.left_s()):
                row[name] = {"error": "no time left"}
                continue
            try:
                with session.serving(name):
                    row[name] = {"peak_mib": session.device.peak_mib(both)}
            except torch.OutOfMemoryError:
                row[name] = {"error": "out of memory"}
        model.zero_grad(set_to_none=True)
        session.device.release()
        print(f"memory {load.key}: {row}", flush=True)
        rows[load.key] = row
    return rows


def _inferred(encode: VideoMamba | GraphedEncoder, clips: Tensor) -> Tensor:
    with torch.inference_mode(), torch.autocast(clips.device.type, torch.bfloat16):
        tokens: Tensor = encode(clips).tokens
    return tokens


def graphs(session: Session) -> Figures:
    """Replay recorded encoders of one clip beside the encoder as it is."""
    rows: Figures = {}
    for load in session.shared_out(single_clips(session)):
        model = built(session, load).eval()
        video = _video(session, load)
        graphed = GraphedEncoder(model, largest_stream=1 << 40)  # to see where it stops to pay

        with session.serving(session.ours):
            _inferred(graphed, video + 1)
            if not torch.equal(_inferred(graphed, video), _inferred(model, video)):
                session.wrong(f"graphs {load.key}: a replay does not repeat the encoder")
        row = {
            "graphed": session.measured(session.ours, partial(_inferred, graphed, video)),
            "eager": session.measured(session.ours, partial(_inferred, model, video)),
        }
        print(f"graphs {load.key}: {[each.get('median_ms') for each in row.values()]} ms", flush=True)
        rows[load.key] = row
        session.device.release()
    return rows
