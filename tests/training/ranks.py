"""Runs Python files in processes that begin with the heavy imports done: JSON in, exit codes out.

Importing PyTorch, DeepSpeed and the training loop takes longer than a tiny run itself. What a launcher adds
(restarts, signals) is tested in ``test_launchers.py``, under the launcher.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from typing import Any


def _become(job: dict[str, Any], rank: int, port: int) -> None:
    """Turn this fresh fork into one process of the job; it ends as a process of its own would."""
    output = os.open(job["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if job["processes"] > 1:
        os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(job["processes"]))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = job["command"]
    runpy.run_path(job["command"][0], run_name="__main__")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(running: set[int]) -> list[int]:
    """Return the exit codes; once one process fails the others, which would wait for it, are ended."""
    codes = []
    while running:
        pid, status = os.wait()
        running.discard(pid)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return codes


def main() -> None:
    """Answer jobs until standard input ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # DeepSpeed speaks to standard output when it is imported
    importlib.import_module("vlm.training.loop")
    with contextlib.suppress(ImportError):
        importlib.import_module("deepspeed")
    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        job, port, running = json.loads(line), _free_port(), set()
        for rank in range(job["processes"]):
            if pid := os.fork():
                running.add(pid)
            else:
                return _become(job, rank, port)
        os.write(answers, f"{json.dumps(_wait(running))}\n".encode())


if __name__ == "__main__":
    main()
