"""Kill training with signal 9 again and again; hold what comes of it against a run that nothing disturbed.

    python tests/soak/training.py --out soak.json --minutes 60

Runs of ``vlm train`` are killed at seeded random times, resumed by the command that the documentation gives,
and killed again, until they finish. Then weights, optimiser state, averages, logged losses and the lists of
rejected samples must equal those of the unbroken run, byte for byte, and nothing half written may lie about.
Run again with the same ``--out``, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm.evaluation.speed import machine

FORMAT = "vlm-soak-training/1"
CONFIG = Path(__file__).with_suffix(".yaml")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
PATIENCE_S = 60.0  # how long what is left of a run may live after one of its processes was killed
LIMIT_S = 600.0
NUM_SCENES, BROKEN = 30, 7


@dataclass(frozen=True)
class Scenario:
    """A kind of run: how many processes, and where its clips come from."""

    name: str
    processes: int
    is_packed: bool

    def command(self, run: Path, shards: Path, resume: bool) -> list[str]:
        """Return the command that starts or resumes it."""
        words = ["train", str(CONFIG)]
        if self.is_packed:  # one of the samples is broken, and is to be listed once a visit
            corpora = f"corpora: {{clips: {{folders: [{shards}]}}}}"
            settings = f"{{{corpora}, max_bad_fraction: 0.1, augmentation: {{min_scale: 0.5}}}}"
            words += ["--set", "data.source=shards", "--set", f"data.shards={settings}"]
            words += ["--set", "data.workers=2"]
        start = [sys.executable, "-m"]
        if self.processes > 1:
            start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}", "-m"]
        return [*start, "vlm", *words, "--resume" if resume else "--out", str(run)]


SCENARIOS = (
    Scenario("world, 1 process", 1, False),
    Scenario("shards, 1 process", 1, True),
    Scenario("shards, 2 processes", 2, True),
)


class Family:
    """A started command with the processes that it starts."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log.open("ab")
        self.leader = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=self._log, stderr=self._log, start_new_session=True
        )
        self.begin = time.monotonic()

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks, the leader's own if it is the only one."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.leader.pid:
                    variables = dict(
                        item.split("=", 1)
                        for item in (path / "environ").read_text().split("\0")
                        if "=" in item
                    )
                    if "RANK" in variables:
                        found[int(variables["RANK"])] = int(path.name)
            except (OSError, ValueError, IndexError):
                continue  # it has just ended
        return [found[rank] for rank in sorted(found)]

    def kill(self, victim: str) -> str:
        """Kill the named part of the family; return what was killed."""
        ranks = self.ranks()
        if victim.startswith("rank") and int(victim[5:]) < len(ranks):
            os.kill(ranks[int(victim[5:])], signal.SIGKILL)
            return victim
        if victim == "launcher" and ranks:
            self.leader.kill()
            return victim
        self.kill_all()
        return "all"

    def kill_all(self) -> None:
        """Kill everybody."""
        for pid in (*self.ranks(), self.leader.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def wait(self, limit_s: float) -> int | None:
        """Wait for the leader; return its exit code, None if it takes longer."""
        try:
            code = self.leader.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        self._log.close()
        return code


def content(run: Path) -> dict[str, str]:
    """Return name → hash of everything that must not depend on when a run was killed."""
    files = [*(run / "checkpoints").rglob("*"), *(run / "model").iterdir(), *(run / "best").iterdir()]
    files += [run / "config.yaml", run / "metrics.jsonl", *run.glob("rejected-*.jsonl")]
    found = {}
    for path in files:
        if path.is_file():
            data = path.read_bytes()
            if path.parent == run / "model" and path.name == "card.json":  # it says how long the run took
                card = json.loads(data)
                del card["training"]
                data = json.dumps(card, sort_keys=True).encode()
            found[path.relative_to(run).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def leftovers(run: Path) -> list[str]:
    """Return what a finished run must not contain."""
    odd = (".tmp", ".partial", ".old")
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.suffix in odd)


def phase(run: Path, since: float) -> str:
    """Say what a run that was started at a time is about to do, by what lies in its folder."""
    if not (run / "config.yaml").exists():
        return "before the first step"
    names = {path.name for pattern in ("checkpoints/step-*.tmp", ".*.partial", ".*.old")
             for path in run.glob(pattern) if changed_s(path) >= since}  # fmt: skip
    if any(name.startswith("step-") for name in names):
        return "saving a checkpoint"
    if names:
        return "saving a model"
    if (run / "model").exists():
        return "finishing"
    return "training" if changed_s(run / "metrics.jsonl") >= since else "starting"


def changed_s(path: Path) -> float:
    """Return when a path was changed last; 0 for one that is gone by now."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(family: Family, is_so: Callable[[], bool]) -> bool:
    """Look every millisecond; return False if the family ends before."""
    while not is_so():
        if family.leader.poll() is not None or time.monotonic() - family.begin > LIMIT_S:
            return False
        time.sleep(0.001)
    return True


def strike(
    family: Family, run: Path, rng: random.Random, whole_s: float, processes: int
) -> dict[str, Any] | None:
    """Kill at a random time: any, between two steps, or within a save; None if the run ends before."""
    manner = rng.choices(("any time", "after some steps", "while saving"), (4, 3, 3))[0]
    begin, first = family.begin, num_lines(run / "metrics.jsonl")
    if manner == "any time":
        end = begin + rng.uniform(0, whole_s)
        reached = wait_until(family, lambda: time.monotonic() >= end)
    elif manner == "after some steps":
        wanted = first + rng.randint(1, 30)
        reached = wait_until(family, lambda: not first <= num_lines(run / "metrics.jsonl") < wanted)
        time.sleep(rng.uniform(0, 0.05))
    else:
        for _ in range(rng.randint(1, 6)):
            wait_until(family, lambda: not any((run / "checkpoints").glob("step-*.tmp")))
            reached = wait_until(family, lambda: any((run / "checkpoints").glob("step-*.tmp")))
        time.sleep(rng.uniform(0, 0.03))
    victims = ("all",) if processes == 1 else ("all", "launcher", *(f"rank {n}" for n in range(processes)))
    victim = rng.choice(victims)
    if not reached or family.leader.poll() is not None:
        return None
    at = phase(run, time.time() - (time.monotonic() - begin))
    victim = family.kill(victim)
    row = {
        "manner": manner, "phase": at, "victim": victim, "after_s": round(time.monotonic() - begin, 2),
        "logged_steps": num_lines(run / "metrics.jsonl"),
    }  # fmt: skip
    ended = time.monotonic()
    if family.wait(PATIENCE_S) is None:
        family.kill_all()
        family.wait(PATIENCE_S)
        row["hung"] = True
    row["survivors_s"] = round(time.monotonic() - ended, 2)
    return row


def disturbed(
    scenario: Scenario, run: Path, shards: Path, rng: random.Random, whole_s: float
) -> dict[str, Any]:
    """Start a run, kill and resume it until it finishes; return what happened."""
    kills: list[dict[str, Any]] = []
    log, refused = run.with_suffix(".log"), 0
    most = rng.randint(3, 6)
    while True:
        resume = (run / "config.yaml").exists()
        family = Family(scenario.command(run, shards, resume), log)
        row = strike(family, run, rng, whole_s, scenario.processes) if len(kills) < most else None
        if row is not None:
            kills.append(row)
            continue
        code = family.wait(LIMIT_S)
        if code and refused < 300 and was_busy(log):  # the launcher was killed, and its ranks went on
            refused += 1
            time.sleep(1)
            continue
        if code not in (0, 3):  # 3: finished, with the broken sample listed
            family.kill_all()
            return {"scenario": scenario.name, "kills": kills, "failed": f"exit code {code}"}
        return {"scenario": scenario.name, "kills": kills, "refused_while_busy": refused}


def was_busy(log: Path) -> bool:
    """Whether the last command was refused because what is left of a run still writes it."""
    return b"is being written by another process" in log.read_bytes()[-4000:]


def make_shards(folder: Path) -> None:
    """Pack clips of the digit world, and damage one of them."""
    from vlm.data.annotations import Annotation
    from vlm.data.packing import pack
    from vlm.data.shards import ShardReader
    from vlm.world import caption, sample_scene
    from vlm.world.clips import write_clips

    scenes = [sample_scene("train", 0, index) for index in range(NUM_SCENES)]
    clips = folder.parent / "clips"
    write_clips(scenes, clips)
    rows = [Annotation(video=f"{s.clip_id}.mp4", captions=(caption(s),), metadata={}) for s in scenes]
    pack(rows, clips, folder, max_shard_bytes=100_000)
    reader = ShardReader(folder)
    shard, number = next(
        (shard, BROKEN - first)
        for shard, size in enumerate(reader.shard_sizes)
        if (first := sum(reader.shard_sizes[:shard])) <= BROKEN < first + size
    )
    with reader.shard_path(shard).open("r+b") as file:
        file.seek(reader.entry(shard, number).members[0].offset + 100)
        file.write(b"\xff\x00\xff")


def unbroken(scenario: Scenario, folder: Path, shards: Path) -> tuple[dict[str, str], float]:
    """Do the run that nothing disturbs; return its content and how long it took."""
    run = folder / "unbroken"
    family = Family(scenario.command(run, shards, False), folder / "unbroken.log")
    code = family.wait(LIMIT_S)
    if code not in (0, 3):
        raise SystemExit(
            f"{scenario.name}: the unbroken run left exit code {code}, see {folder}/unbroken.log"
        )
    return content(run), time.monotonic() - family.begin


def judge(row: dict[str, Any], run: Path, truth: dict[str, str]) -> dict[str, Any]:
    """Add how a finished run differs from the unbroken one."""
    if "failed" in row:
        return row | {"is_equal": False}
    found = content(run)
    differs = sorted(name for name in found.keys() | truth.keys() if found.get(name) != truth.get(name))
    return row | {"is_equal": not differs, "differs": differs, "leftovers": leftovers(run)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts that the promise is about."""
    kills = [kill for row in rows for kill in row["kills"]]
    survivors = [kill["survivors_s"] for kill in kills if kill["victim"].startswith("rank")]
    return {
        "kills": len(kills),
        "runs": len(rows),
        "runs_equal_to_the_bit": sum(row["is_equal"] for row in rows),
        "runs_with_leftovers": sum(bool(row.get("leftovers")) for row in rows),
        "hangs": sum(kill.get("hung", False) for kill in kills),
        "slowest_end_of_survivors_s": max(survivors, default=None),
        "refused_while_busy": sum(row.get("refused_while_busy", 0) for row in rows),
        "kills_by_phase": dict(Counter(kill["phase"] for kill in kills)),
        "kills_by_victim": dict(Counter(kill["victim"] for kill in kills)),
        "kills_by_scenario": dict(Counter(row["scenario"] for row in rows for _ in row["kills"])),
    }


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def soak(arguments: argparse.Namespace) -> int:
    """Kill and compare until enough kills are done or the time is over."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "format": FORMAT,
        "machine": machine(torch.device("cpu")),
        "seed": arguments.seed,
    }
    rows: list[dict[str, Any]] = []
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text(encoding="utf-8"))
        if (earlier["format"], earlier["seed"]) != (FORMAT, arguments.seed):
            raise SystemExit(f"{arguments.out} is of another format or seed; choose another --out")
        rows = earlier["runs"]
    work = arguments.work or arguments.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    shards = work / "shards"
    if not (shards / "manifest.json").exists():
        make_shards(shards)
    truths: dict[str, tuple[dict[str, str], float]] = {}
    begin, earlier_kills = time.monotonic(), sum(len(row["kills"]) for row in rows)
    while (done := sum(len(row["kills"]) for row in rows)) < arguments.kills:
        spent = time.monotonic() - begin
        if spent > 60 * arguments.minutes:
            break
        scenario = SCENARIOS[len(rows) % len(SCENARIOS)]
        place = work / f"{len(rows):03d}-{random.Random(time.time()).randrange(10**9)}"
        place.mkdir()
        if scenario.name not in truths:
            truths[scenario.name] = unbroken(scenario, place, shards)
        truth, whole_s = truths[scenario.name]
        rng = random.Random(f"{arguments.seed}/{len(rows)}")
        row = judge(disturbed(scenario, place / "run", shards, rng, whole_s), place / "run", truth)
        rows.append(row)
        write(arguments.out, results | {"summary": summary(rows), "runs": rows})
        each = (time.monotonic() - begin) / max(1, done + len(row["kills"]) - earlier_kills)
        left = each * max(0, arguments.kills - done - len(row["kills"])) / 60
        print(
            f"{done + len(row['kills'])} of {arguments.kills} kills, run {len(rows)} ({scenario.name}): "
            f"{'equal' if row['is_equal'] else 'NOT EQUAL'}; about {left:.0f} min left",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if row["is_equal"]:
            shutil.rmtree(place)
    print(json.dumps(summary(rows), indent=1))
    is_good = all(row["is_equal"] and not row["leftovers"] for row in rows)
    return 0 if is_good and not summary(rows)["hangs"] else 1


def main(argv: list[str]) -> int:
    """Parse the arguments and soak; 0 if every run came out as the unbroken one did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.json", help="results; kept and added to"
    )
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="how many in all; default: 100")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="M", help="stop after; default: 60")
    parser.add_argument("--seed", type=int, default=0, help="of the times and victims; default: 0")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for the runs; default: beside --out")
    return soak(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
