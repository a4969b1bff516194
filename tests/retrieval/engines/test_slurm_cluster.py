"""A build on two real slurmd of this machine, one of whose elements is killed; skipped without Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlm.retrieval.engines.tasks import read_tasks
from vlm.retrieval.ingest.scanning import tasks_folder

CONFIGURATION = """
ClusterName=local
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1 RealMemory=1000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def is_here() -> bool:
    """Whether Slurm is installed, may be started, and its messages can be signed."""
    programs = ("slurmctld", "slurmd", "sbatch", "squeue", "munge")
    if os.geteuid() or not all(shutil.which(name) for name in programs):
        return False
    return subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0


def free_ports() -> list[int]:
    """Return three that follow one another."""
    for first in range(26817, 27817, 3):
        ports = list(range(first, first + 3))
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                for sock, port in zip((one, two, three), ports, strict=True):
                    sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return ports
    raise AssertionError("no free ports")


@pytest.fixture
def cluster(tmp_path, monkeypatch, root) -> Iterator[None]:
    if not is_here():
        pytest.skip("no Slurm that root may start, or no munge that runs")
    folder = tmp_path / "slurm"
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir(parents=True)
    path = folder / "slurm.conf"
    path.write_text(CONFIGURATION.format(folder=folder, ports=free_ports()))
    for name, value in {"SLURM_CONF": str(path), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    commands = [["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    daemons = [subprocess.Popen(command, **quiet) for command in commands]
    try:
        for _ in range(300):
            state = ["sinfo", "--noheader", "--format=%D %t"]
            if subprocess.run(state, capture_output=True, text=True, check=False).stdout == "2 idle\n":
                break
            time.sleep(0.2)
        else:
            pytest.skip("Slurm does not start here")
        yield
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], check=False, **quiet)
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def element(tasks: Path) -> int | None:
    """Return a process that does tasks of a list."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"task" in words and os.fsencode(tasks) in words:
                return int(entry.name)
    return None


@pytest.mark.slow
def test_an_element_killed(films, tmp_path, saved_model, cluster, state, local) -> None:
    from vlm.models import load_model

    index = tmp_path / "an index"
    command = [sys.executable, "-m", "vlm", "index", "build", str(films), "--out", str(index)]
    command += ["--model", str(saved_model), "--engine", "slurm", "--wait", "--slurm-option=partition=main"]
    command += ["--files-per-task", "4", "--batch-size", "1", "--workers", "1", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    driver = subprocess.Popen(command, **pipes)
    while (process := element(tasks_folder(index))) is None:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    _, errors = driver.communicate(timeout=200)
    assert driver.returncode == 75 and "1 of 2 tasks are done; Slurm's job" in errors
    assert len(read_tasks(tasks_folder(index)).missing()) == 1
    again = subprocess.run(command, check=False, timeout=200, **pipes)
    assert again.returncode == 3, again.stderr
    report = json.loads(again.stdout)
    assert report["num_added"] == 7 and len(report["rejected"]) == 1
    model = load_model(str(saved_model))
    assert state(index) == local(tmp_path / "local", [films], model, batch_size=1)
