"""The process under trial: what ``vlm serve`` runs, over made-up clips and the shipped model's text encoder.

``python -m vlm.serving.trial.site INDEX --cache DIR`` says its address, then serves until told to end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vlm.errors import VlmError
from vlm.evaluation.tradeoff.stored import SyntheticModel
from vlm.evaluation.tradeoff.synthetic import Floats, SyntheticVectors
from vlm.models import load_model
from vlm.retrieval.index import VideoIndex

# clips of one segment, with as many hashed frames as models look at
SHAPE = (1, 8)
_ADDED = "added "
_ENCODER = "demo"
_NUM_DRAWN, _DRAWN_SEED = 2000, 1
_END_S = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A running server: its address and its process."""

    address: str
    process: int


class TrialModel(SyntheticModel):
    """Embeds any text as one about a stored clip, and the text ``added N`` as added clip N itself.

    What a text costs is real all the same: each goes through the text encoder of the model that is shipped.
    """

    def __init__(self, vectors: SyntheticVectors, num_rows: int) -> None:
        super().__init__(vectors, num_rows)
        self._encoder: Any = load_model(_ENCODER, device="cpu")
        self._drawn = vectors.texts(_NUM_DRAWN, num_rows, seed=_DRAWN_SEED)

    def encode_text(self, texts: list[str]) -> Any:
        """Return embeddings (texts, dim), always the same of one text."""
        import torch

        self._encoder.encode_text(texts)
        rows = self._drawn[[zlib.crc32(text.encode()) % _NUM_DRAWN for text in texts]]
        for place, text in enumerate(texts):
            if text.startswith(_ADDED):
                rows[place] = added_clip(int(text.removeprefix(_ADDED)), rows.shape[1])
        return SimpleNamespace(embedding=torch.from_numpy(rows))

    def unknown_words(self, text: str) -> list[str]:
        """Return the words that the shipped model does not know."""
        words: list[str] = self._encoder.unknown_words(text)
        return words


def added_clip(number: int, dim: int) -> Floats:
    """Return the unit vector (dim,) of the clip that is added under this number, far from all others."""
    row = np.random.default_rng([7, number]).standard_normal(dim, dtype=np.float32)
    unit: Floats = row / np.linalg.norm(row)
    return unit


def text_of(number: int) -> str:
    """Return the text that finds added clip `number`."""
    return f"{_ADDED}{number}"


@contextmanager
def serving(index: Path, cache: Path, backend: str, places: tuple[int, int] | None) -> Iterator[Served]:
    """Serve an index of made-up clips on this machine alone, in a process that ends with the context.

    Args:
        index: Its folder.
        cache: Where the server may keep pictures.
        backend: As for `Searcher`.
        places: Searches at the same time, and in line; as the server is set if None.

    Raises:
        VlmError: The process ended before it served.
    """
    command = [sys.executable, "-P", "-m", __name__, str(index), "--cache", str(cache), "--backend", backend]
    command += [] if places is None else ["--places", *map(str, places)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line:
                raise VlmError(f"the server ended before it served (exit code {process.wait(_END_S)})")
            yield Served(address=line, process=process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _say(address: str) -> None:
    sys.stdout.write(address + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--places", type=int, nargs=2)
    arguments = parser.parse_args(argv)
    from vlm.serving.server import serve
    from vlm.serving.settings import Limits, ServeSettings
    from vlm.serving.state import open_state

    index = VideoIndex.open(arguments.index)
    model: Any = TrialModel(SyntheticVectors(index.manifest.features.dim), len(index.snapshot.row_video))
    places = dict(zip(("num_searches", "max_waiting"), arguments.places or (), strict=False))
    settings = ServeSettings(port=0, cache_folder=arguments.cache, limits=Limits(**places))
    state = open_state(index.folder, model, model.name, settings, arguments.backend)
    try:
        serve(state, _say)
    finally:
        state.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
