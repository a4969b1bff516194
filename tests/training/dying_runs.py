"""Runs of the tiny training in forked processes that die; prints what became of them as JSON.

Importing PyTorch takes longer than a tiny run: it is done once, and each life is a fork.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  # every optimiser imports it

from vlm.cli import main as vlm
from vlm.config import load_config
from vlm.training.config import TrainingConfig
from vlm.training.loop import train
from vlm.training.sources import shards, world  # noqa: F401

sys.modules["matplotlib"] = None  # type: ignore[assignment]  # curves are not what is looked at here
CONFIG, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
POINT_OF_SWAP = "model-in-swap"
TWO_RANKS = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def start(run: Path, environment: dict[str, str]) -> int:
    """Fork a process that starts the run, or resumes it if it has begun."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ.update(environment)
        train(load_config(TrainingConfig, CONFIG), run, resume=(run / "config.yaml").exists())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def end(pid: int, after_s: float = 60.0) -> int:
    """Wait for a process and kill it when the time is over; return its exit code or minus the signal."""
    limit = time.monotonic() + after_s
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def pair(run: Path) -> list[int]:
    """Fork both ranks of a run of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(run, {**TWO_RANKS, "MASTER_PORT": port, "RANK": str(rank)}) for rank in (0, 1)]


def at_point(point: str) -> dict[str, Any]:
    """Die at a named point, then finish."""
    run = FOLDER / point
    return {"killed": end(start(run, {"CRASH_AT": point})), "resumed": end(start(run, {})), "run": str(run)}


def at_random(number: int, rng: random.Random, whole_s: float) -> list[dict[str, Any]]:
    """Die at random times, over as many runs as it takes for a number of kills."""
    runs: list[dict[str, Any]] = []
    while sum(len(row["killed"]) for row in runs) < number:
        run, killed = FOLDER / f"random-{len(runs)}", []
        while (code := end(start(run, {}), rng.uniform(0.05, 0.8) * whole_s)) == -signal.SIGKILL:
            killed.append(code)
        runs.append({"killed": killed, "resumed": code, "run": str(run)})
        whole_s *= 0.8 if not killed else 1.0
    return runs


def of_two(rng: random.Random, whole_s: float) -> dict[str, Any]:
    """Kill one of two ranks, then let both finish."""
    run, victim = FOLDER / "two-killed", rng.randrange(2)
    ranks = pair(run)
    killed = end(ranks[victim], rng.uniform(0.4, 0.7) * whole_s)
    begin = time.monotonic()
    survivor = end(ranks[1 - victim])
    survived_s = time.monotonic() - begin
    resumed = [end(pid) for pid in pair(run)]
    return {
        "killed": killed, "survivor": survivor, "survived_s": survived_s, "resumed": resumed, "run": str(run),
    }  # fmt: skip


def on_full_disk(begun: Path, size: int) -> dict[str, Any]:
    """Resume a run where no file may grow beyond a size, as the command line does; then with space again."""
    run = FOLDER / f"full-{size}"
    shutil.copytree(begun, run)
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        os._exit(vlm(["train", str(CONFIG), "--resume", str(run)]))
    code = end(pid)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    return {"code": code, "left": left, "resumed": end(start(run, {})), "run": str(run)}


def timed(pids: list[int]) -> float:
    """Wait for processes that nothing disturbs; return the seconds that it took."""
    begin = time.monotonic()
    assert [end(pid) for pid in pids] == [0] * len(pids)
    return time.monotonic() - begin


def main() -> None:
    rng = random.Random(7)
    found: dict[str, Any] = {}
    alone_s = timed([start(FOLDER / "unbroken", {})])
    found["random"] = at_random(8, rng, alone_s)
    found["points"] = {point: at_point(point) for point in sys.argv[3:]}
    begun, size = FOLDER / "begun", (FOLDER / "unbroken/checkpoints/step-00000006/engine.pt").stat().st_size
    assert end(start(begun, {"CRASH_AT": "checkpoint-begun:3"})) == -signal.SIGKILL
    found["full"] = [on_full_disk(begun, limit) for limit in (500, size // 50, size // 3, size - 1)]
    two_s = timed(pair(FOLDER / "two-unbroken"))
    found["two"] = of_two(rng, two_s)
    # a finished run whose model is being written again
    run = FOLDER / POINT_OF_SWAP
    found["again"] = {
        "killed": end(start(run, {"CRASH_AT": POINT_OF_SWAP})),
        "resumed": end(start(run, {})),
        "run": str(run),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
