"""The encoder's launches, recorded once for a shape and replayed: small batches would wait for the host."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.models.video_mamba import EncoderOutput, VideoMamba

# elements of the residual stream up to which the host is slower than the GPU; modelled, not measured
LARGEST_STREAM = 4 << 20
MOST_SHAPES = 8
_WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded run of the encoder.

    Attributes:
        video: What it reads; new frames are copied here.
        output: What it writes.
        replay: Queues the run on the present stream.
    """

    video: Tensor
    output: EncoderOutput
    replay: Callable[[], None]


class GraphedEncoder:
    """Encodes like the encoder itself; small inference batches on CUDA by replaying a graph of their shape.

    A graph knows the addresses that it was recorded with. So it is recorded anew when a module was replaced
    or weights moved, and left aside where hooks must run. Weights changed in place are seen. The graphs share
    their memory, so calls from several threads or streams wait for one another.

    Args:
        encoder: Any of its modes; gradients, training and masks go to it directly.
        largest_stream: Elements (batch x tokens x width) of the largest batch that is recorded.
        most_shapes: Graphs that are kept; the one unused for longest goes.
    """

    def __init__(
        self, encoder: VideoMamba, *, largest_stream: int = LARGEST_STREAM, most_shapes: int = MOST_SHAPES
    ) -> None:
        self.encoder = encoder
        self.largest_stream = largest_stream
        self.most_shapes = most_shapes
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._state: Hashable = None
        self._lock = threading.Lock()
        self._idle: torch.cuda.Event | None = None
        self._pool: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without what was recorded."""
        return _remade, (self.encoder, self.largest_stream, self.most_shapes)

    def __call__(self, video: Tensor, mask: Tensor | None = None) -> EncoderOutput:
        """Encode; arguments, results and errors as of ``VideoMamba.forward``."""
        state = _state_of(self.encoder) if mask is None and self._suits(video) else None
        if state is None:
            output: EncoderOutput = self.encoder(video, mask)
            return output
        with self._lock, torch.cuda.device(video.device):
            return self._replay(video, state)

    def _suits(self, video: Tensor) -> bool:
        """Return whether this is a small inference batch on a GPU that nobody records already."""
        if not video.is_cuda or video.ndim != 5 or torch.is_grad_enabled() or self.encoder.training:
            return False
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return False
        config = self.encoder.config
        steps = config.num_steps if video.shape[1] > 1 else 1
        return video.shape[0] * (steps * config.grid**2 + 1) * config.width <= self.largest_stream

    def _replay(self, video: Tensor, state: Hashable) -> EncoderOutput:
        if state != self._state:
            self._recordings.clear()
            self._state, self._pool = state, torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        if self._idle is not None:
            stream.wait_event(self._idle)
        key = (tuple(video.shape), video.dtype, video.device, _autocast_dtype())
        recording = self._recordings.get(key)
        if recording is None:
            recording = record(self.encoder, video, self._pool)
            self._recordings[key] = recording
            if len(self._recordings) > self.most_shapes:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording.video.copy_(video)
        recording.replay()
        tokens, alignment = recording.output
        copied = EncoderOutput(tokens.clone(), tuple(each.clone() for each in alignment))
        self._idle = stream.record_event()
        return copied


def record(encoder: VideoMamba, video: Tensor, pool: Any) -> Recording:
    """Record a run on frames like ``video`` in a pool of memory, after runs that choose the kernels."""
    frames = video.clone()
    # weights that autocast has cast would be forgotten when it ends, and the graph would read freed memory
    with torch.autocast("cuda", _autocast_dtype(), torch.is_autocast_enabled("cuda"), cache_enabled=False):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                encoder(frames)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = encoder(frames)
    return Recording(frames, output, graph.replay)


def _remade(encoder: VideoMamba, largest_stream: int, most_shapes: int) -> GraphedEncoder:
    return GraphedEncoder(encoder, largest_stream=largest_stream, most_shapes=most_shapes)


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def _state_of(encoder: VideoMamba) -> Hashable | None:
    """Return what a graph relies on: modules, and where weights lie. None if hooks must run."""
    state: list[int] = []
    for module in encoder.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        state.append(id(module))
        for table in (module._parameters, module._buffers):
            state += [each.data_ptr() for each in table.values() if each is not None]
    return tuple(state)
