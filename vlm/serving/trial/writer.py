"""The process that adds clips while others search: one commit after another, each told as it is on the disk.

``python -m vlm.serving.trial.writer INDEX --clips N --every S`` prints a JSON line for every commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vlm.evaluation.tradeoff.stored import changes_of
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.ingest.run import PART_SEGMENTS
from vlm.serving.trial.site import SHAPE, added_clip


@contextmanager
def writing(index: Path, num_clips: int, every_s: float) -> Iterator[subprocess.Popen[str]]:
    """Add clips in a process that ends with the context; its output says what was committed."""
    command = [sys.executable, "-P", "-m", __name__, str(index)]
    command += ["--clips", str(num_clips), "--every", str(every_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def main(argv: list[str]) -> int:
    """Add clips of one segment each, as many a commit as ingesting does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", type=Path)
    parser.add_argument("--clips", type=int, required=True)
    parser.add_argument("--every", type=float, required=True, help="seconds from one commit to the next")
    arguments = parser.parse_args(argv)
    index = VideoIndex.open(arguments.index)
    with index.writing() as catalog:
        first = catalog.next_video_row()
        for start in range(first, first + arguments.clips, PART_SEGMENTS):
            begin = time.monotonic()
            numbers = range(start, min(start + PART_SEGMENTS, first + arguments.clips))
            rows = np.stack([added_clip(number, index.manifest.features.dim) for number in numbers])
            catalog.commit(changes_of(index.log, rows, start - 1, catalog.next_part(), SHAPE))
            told = {"clips": len(rows), "last": numbers[-1], "time": time.time()}
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()
            time.sleep(max(0.0, arguments.every - (time.monotonic() - begin)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
