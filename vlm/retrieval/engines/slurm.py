"""Tasks as a Slurm array: a script beside the list, submitted where ``sbatch`` is, awaited if asked."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import IntegrityError, InvalidInput
from vlm.progress import progress_bar
from vlm.retrieval.durability import read_sealed, write_bytes_durably, write_sealed
from vlm.retrieval.engines.tasks import Task, TaskList

# Slurm's MaxArraySize is 1001 unless its administrator says otherwise; an element does every 1000th task
MAX_ELEMENTS = 1000
POLL_S = 10.0
SCRIPT_NAME = "array.sh"
_JOB_NAME = "slurm.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmEngine:
    """Submits what is missing as one array job, unless the job that was submitted before is still there.

    Attributes:
        options: More flags of ``sbatch``, each ``name=value`` or ``name``; the last of a name counts.
        is_waiting: Return when the job is over instead of at once.
    """

    options: tuple[str, ...] = ()
    is_waiting: bool = False

    def __call__(self, listing: TaskList, missing: Sequence[Task], /) -> str:
        """Submit; return what is to be said of tasks that are not done.

        Raises:
            InvalidInput: Slurm refuses the job.
        """
        step = min(len(listing.tasks), MAX_ELEMENTS)
        script = write_script(listing, step)
        job = _submitted(listing.folder)
        if job is None or not _is_queued(job):
            command = self._command(listing, missing, script, step)
            if shutil.which("sbatch") is None:
                return (
                    f"there is no sbatch here; where it is, run {shlex.join(command)}, and this again later"
                )
            job = _submit(command)
            write_sealed(listing.folder / _JOB_NAME, {"job": job})
        if not self.is_waiting:
            return f"Slurm's job {job} does the others; run the same command again when it is over"
        self._wait(listing, job)
        return (
            f"Slurm's job {job} is over, its logs are in {listing.folder}; the same command submits the rest"
        )

    def _command(self, listing: TaskList, missing: Sequence[Task], script: Path, step: int) -> list[str]:
        return [
            "sbatch",
            "--parsable",
            "--requeue",
            "--job-name=vlm-index",
            f"--output={_escaped(listing.folder)}/slurm-%A-%a.log",
            f"--cpus-per-task={listing.options.num_workers}",
            f"--array={_ranges(sorted({task.number % step for task in missing}))}",
            *(f"--{option}" for option in self.options),
            str(script),
        ]

    def _wait(self, listing: TaskList, job: str) -> None:
        def count() -> int:
            return listing.num_files - sum(task.num_files for task in listing.missing())

        done = count()
        with progress_bar(listing.num_files, "embedding", "video", initial=done) as bar:
            while done < listing.num_files:
                is_queued = _is_queued(job)
                now = count()
                bar.update(now - done)
                done = now
                if not is_queued:
                    return
                time.sleep(POLL_S)


def write_script(listing: TaskList, step: int) -> Path:
    """Write the script whose element N does the tasks N, N + step and so on; return its path."""
    words = [sys.executable, "-P", "-m", "vlm", "index", "task", str(listing.folder), "--step", str(step)]
    path = listing.folder / SCRIPT_NAME
    content = (
        f"#!/bin/sh\n# element N of the array does the tasks N, N + {step}, ...\nexec {shlex.join(words)}\n"
    )
    write_bytes_durably(path, os.fsencode(content))
    return path


def _submit(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    job = done.stdout.strip().split(";")[0]
    if done.returncode or not job:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise InvalidInput(f"sbatch refused the job: {reason[0]}; --slurm-option passes flags to sbatch")
    return job


def _submitted(folder: Path) -> str | None:
    try:
        return str(read_sealed(folder / _JOB_NAME)["job"])
    except (FileNotFoundError, IntegrityError, KeyError):
        return None


def _is_queued(job: str) -> bool:
    """Whether Slurm still holds any element of the job; True if it does not say, lest it be sent twice."""
    if shutil.which("squeue") is None:
        return True
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%i", f"--jobs={job}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return "nvalid job id" not in done.stderr
    return bool(done.stdout.strip())


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers in Slurm's form: 0-3,7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in found)


def _escaped(folder: Path) -> str:
    return str(folder).replace("%", "%%")
