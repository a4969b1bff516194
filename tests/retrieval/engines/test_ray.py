"""Tasks on a Ray cluster of two nodes, with a driver, a worker and a node killed; and without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.cli import main
from vlm.retrieval.engines.tasks import LIST_NAME, read_tasks
from vlm.retrieval.ingest.scanning import tasks_folder


def test_without_ray(films, tmp_path, saved_model, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    out = str(tmp_path / "index")
    code = main(["index", "build", str(films), "--out", out, "--model", str(saved_model), "--engine", "ray"])
    assert code == 4
    assert "--engine ray needs ray, which is not installed: pip install 'videomamba-vlm[ray]'" in (
        capsys.readouterr().err
    )


def until(condition: Callable[[], object], driver: subprocess.Popen[str]) -> object:
    """Wait until something holds while a driver runs."""
    for _ in range(1200):
        if found := condition():
            return found
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.1)
    raise AssertionError("nothing happened")


def workers() -> list[int]:
    """Return the processes that are doing a task."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if words.startswith(b"ray::embed_task"):
                found.append(int(entry.name))
    return found


def kill_a_worker() -> bool:
    """Kill a process that is doing a task, if there is one; it may end its task meanwhile."""
    for process in workers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            return True
    return False


@pytest.mark.slow
def test_driver_worker_and_node_killed(films, tmp_path, saved_model, monkeypatch, state, local, root) -> None:
    pytest.importorskip("ray")
    from vlm.models import load_model

    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        options = {"num_cpus": 1, "object_store_memory": 80_000_000}
        cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
        second = cluster.add_node(**options)
    index = tmp_path / "index"
    command = [sys.executable, "-m", "vlm", "index", "build", str(films), "--out", str(index)]
    command += ["--model", str(saved_model), "--engine", "ray", "--ray-address", cluster.address]
    command += ["--files-per-task", "1", "--batch-size", "1", "--workers", "1", "--json"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def num_done() -> int:
        folder = tasks_folder(index)
        if not (folder / LIST_NAME).exists():
            return 0
        listing = read_tasks(folder)
        return len(listing.tasks) - len(listing.missing())

    try:
        first = start()
        until(lambda: num_done() >= 1, first)
        first.kill()
        first.communicate()
        before = num_done()
        assert 1 <= before < 8
        driver = start()
        until(kill_a_worker, driver)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cluster.remove_node(second, allow_graceful=False)
        output, errors = driver.communicate(timeout=200)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cluster.shutdown()
    assert driver.returncode == 3, errors
    report = json.loads(output)
    assert report["num_added"] == 7 and len(report["rejected"]) == 1
    model = load_model(str(saved_model))
    assert state(index) == local(tmp_path / "local", [films], model, batch_size=1)
