"""The child process that indexes folders while the server serves: events on its standard output.

Run as ``python -m vlm.serving.ingest.worker``, with one line of JSON on standard input: ``index``, ``model``,
``paths`` and ``allow_narrow_model``. Each line that it prints is one event: ``progress``, then ``done`` or
``failed``. SIGTERM stops it; what was committed stays.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from types import FrameType
from typing import Any

from vlm.errors import Interrupted, VlmError
from vlm.progress import listening


def main() -> int:
    """Index what the first line of standard input names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    signal.signal(signal.SIGTERM, _stop)
    job = json.loads(sys.stdin.readline())
    try:
        _tell("done", **_index(job))
    except Interrupted:
        _tell("failed", code=Interrupted("").exit_code, message="stopped; what was indexed before stays")
    except VlmError as error:
        _tell("failed", code=error.exit_code, message=str(error))
    except Exception as error:
        _tell("failed", code=1, message=f"unexpected {type(error).__name__}: {error}")
    return 0


def _index(job: dict[str, Any]) -> dict[str, Any]:
    from vlm.retrieval.index import VideoIndex
    from vlm.retrieval.words.no_model import load_encoder

    _tell("progress", stage="loading the model", done=0, total=None)
    index = VideoIndex.open(job["index"])
    with listening(lambda name, done, total: _tell("progress", stage=name, done=done, total=total)):
        report = index.add(
            job["paths"],
            model=load_encoder(job["model"]),
            num_workers=1,
            allow_narrow_model=job["allow_narrow_model"],
        )
    return {
        "num_added": report.num_added,
        "num_updated": report.num_updated,
        "num_unchanged": report.num_unchanged,
        "num_segments": report.num_segments,
        "rejected": [
            {"path": os.path.basename(os.fsdecode(item.path)), "reason": item.reason}
            for item in report.rejected
        ],
        "duration_s": report.duration_s,
    }


def _tell(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)  # noqa: T201 - this is its interface


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Interrupted("stopped", number)


if __name__ == "__main__":
    sys.exit(main())
