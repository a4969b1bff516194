"""Kill the keeping of an index with signal 9 again and again; hold what is left against what it must be.

    python tests/soak/index.py --out soak.json --minutes 60

``vlm index build``, ``add``, ``update``, ``remove``, ``compact``, ``merge`` and ``verify --repair`` run on
an index of made-up videos and are killed at seeded random times, or at a random one of the named points.
Then the index must open, verify clean, answer a search, and hold every video that an earlier command had
finished with, exactly once and to the bit; and the command, run again, must end where an undisturbed one
ends, with no file left over. What must be there is computed from the videos, without any index. Decoding is
made up; all else is the real command line. Run again with the same ``--out``, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vlm.retrieval.ingest.run as ingest
from vlm.cli import index as commands
from vlm.cli import main as vlm_main
from vlm.errors import VlmError
from vlm.evaluation.speed import machine
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.duplicates.hashing import grey_of, hash_frames
from vlm.retrieval.ingest.events import DecodedSegment, DecodeSettings, Finished, Opened
from vlm.retrieval.segments import cut_segments
from vlm.retrieval.upkeep import compaction, merging, repair  # noqa: F401 - imported before the forks
from vlm.types import Preprocessing, TextFeatures, VideoFeatures

FORMAT = "vlm-soak-index/1"
WRITES = (
    "before-fsync", "before-rename", "after-rename", "before-commit", "after-commit", "before-seal",
    "after-seal",
)  # fmt: skip
POINTS = {
    **dict.fromkeys(("build", "add", "update"), (*WRITES, "after-encode", "after-part")),
    "remove": WRITES,
    "compact": (*WRITES, "after-part", "after-vacuum", "after-sweep"),
    "merge": (*WRITES, "after-part", "after-merged-part"),
    "repair": (*WRITES[:3], *WRITES[5:], "after-manifest", "after-restore"),
}
KINDS = tuple(POINTS)
LIMIT_S = 60.0
SIDE = 4


class Encoder:
    """Embeds a video as the mean of its pixels' colours over time; deterministic to the bit."""

    kind, name, domain, fingerprint = "video-text", "made-up", "open", "made-up-1" * 4
    capabilities = frozenset({"search", "rerank"})
    logit_scale = None
    device = torch.device("cpu")
    preprocessing = Preprocessing(num_frames=2, image_size=SIDE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def encode_video(self, video: torch.Tensor) -> VideoFeatures:
        tokens = video.permute(0, 1, 3, 4, 2).flatten(1, 3)
        return VideoFeatures(tokens, video.mean(dim=(3, 4)), video[:, :, 0].flatten(1))

    def encode_text(self, texts: list[str]) -> TextFeatures:
        vectors = torch.ones(len(texts), 2 * SIDE * SIDE)
        return TextFeatures(vectors[:, None], torch.ones(len(texts), 1, dtype=torch.int64), vectors)


def pixels(seed: int, number: int) -> np.ndarray:
    """Return a segment (frames, 3, height, width) float32 in [0, 1] of a made-up video."""
    return np.random.default_rng((seed, number)).random((2, 3, SIDE, SIDE), np.float32)


def write_video(path: Path, seed: int, seconds: int) -> None:
    """Write a file that `decode_made_up` understands."""
    path.write_text(json.dumps({"seed": seed, "seconds": seconds}))


def decode_made_up(
    paths: Sequence[Path], settings: DecodeSettings, segments: object = None
) -> Iterator[Opened | DecodedSegment | Finished]:
    """Stand in for `decode_files`."""
    for file, path in enumerate(paths):
        content = path.read_bytes()
        values, state = json.loads(content), path.stat()
        bounds = cut_segments(values["seconds"], settings.segment_s, settings.stride_s)
        facts: dict[str, Any] = {"width": SIDE, "height": SIDE, "codec": "none", "fps": 1.0, "tags": {}}
        yield Opened(file=file, duration_s=values["seconds"], segments=bounds, **facts)
        for number in range(len(bounds)):
            video = pixels(values["seed"], number)
            looks = hash_frames(video, grey_of(settings.preprocessing))
            yield DecodedSegment(file=file, number=number, video=video, hashes=looks)
        sha256 = hashlib.sha256(content).hexdigest()
        yield Finished(file=file, size_bytes=state.st_size, mtime_ns=state.st_mtime_ns, sha256=sha256)


def expected(path: Path) -> str:
    """Return the hash of what an index must hold of a video, computed without one."""
    values = json.loads(path.read_bytes())
    bounds = cut_segments(values["seconds"], 8.0, 4.0)
    clips = np.stack([pixels(values["seed"], number) for number in range(len(bounds))])
    vectors = clips[:, :, 0].reshape(len(clips), -1).astype(np.float16)
    return hashlib.sha256(np.array(bounds, np.float64).tobytes() + vectors.tobytes()).hexdigest()


def contents(index: VideoIndex) -> dict[str, str]:
    """Return path → hash of the segments' times and vectors for every video of an index."""
    vectors = index.vectors()
    snapshot, found = index.snapshot, {}
    for position, video in enumerate(snapshot.videos):
        rows = np.flatnonzero(snapshot.row_video == position)
        bounds = snapshot.row_bounds[rows]
        data = bounds.tobytes() + vectors.gather(rows).tobytes()
        path = os.fsdecode(video.path)
        if path in found or len(rows) != video.num_segments:
            raise AssertionError(f"{path} is there twice, or not whole")
        found[path] = hashlib.sha256(data).hexdigest()
    return found


def start(words: Sequence[str], log: Path, crash_at: str = "") -> int:
    """Fork a process that runs one command; return its id."""
    child = os.fork()
    if child:
        return child
    os.environ["CRASH_AT"] = crash_at
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = io.TextIOWrapper(os.fdopen(1, "wb")), io.TextIOWrapper(os.fdopen(2, "wb"))
    ingest.decode_files = decode_made_up
    ingest.PART_SEGMENTS, ingest._LONGEST_PART = 8, 6
    compaction._SMALL_BYTES = 4000
    commands.load = lambda source: (Encoder(), source)
    code = vlm_main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(child: int, until: float) -> int:
    """Return a process's exit code, negative for a signal; one that still runs at a time is killed."""
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
            until = math.inf
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(ended[1])


class World:
    """Videos in a folder, an index of them, and what it must hold."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.videos, self.index, self.other = folder / "videos", folder / "index", folder / "other"
        self.more, self.log = folder / "more", folder / "log"
        self.rng, self.number = rng, 0
        self.held: dict[str, str] = {}
        self.is_merged = False
        self.videos.mkdir(parents=True)
        self.more.mkdir()

    def make(self, folder: Path, count: int) -> None:
        """Add new videos to a folder."""
        for _ in range(count):
            self.number += 1
            seed = self.rng.randrange(10**6)
            write_video(folder / f"{self.number}.mp4", seed, self.rng.randint(3, 60))

    def truth(self, folder: Path) -> dict[str, str]:
        """Return what an index of a folder must hold."""
        return {str(path): expected(path) for path in folder.iterdir()}

    def step(self, kind: str) -> tuple[list[str], dict[str, str]]:
        """Change the world; return the command that follows it, and what the index must hold afterwards."""
        return getattr(self, kind)()

    def build(self) -> tuple[list[str], dict[str, str]]:
        self.make(self.videos, self.rng.randint(4, 12))
        words = ["build", str(self.videos), "--out", str(self.index), "--model", "made-up"]
        return words, self.held | self.truth(self.videos)

    def add(self) -> tuple[list[str], dict[str, str]]:
        self.make(self.videos, self.rng.randint(1, 8))
        return ["add", str(self.index), str(self.videos)], self.held | self.truth(self.videos)

    def update(self) -> tuple[list[str], dict[str, str]]:
        files = sorted(self.videos.iterdir())
        for path in self.rng.sample(files, min(len(files) - 1, 6)):
            match self.rng.choice(("change", "move", "delete")):
                case "change":
                    write_video(path, self.rng.randrange(10**6), self.rng.randint(3, 60))
                case "move":
                    path.rename(path.with_stem(f"{path.stem}-moved"))
                case "delete":
                    path.unlink()
        self.make(self.videos, self.rng.randint(0, 3))
        merged = self.truth(self.more) if self.is_merged else {}
        return ["update", str(self.index)], merged | self.truth(self.videos)

    def remove(self) -> tuple[list[str], dict[str, str]]:
        gone = self.rng.sample(sorted(self.held), min(len(self.held) - 1, self.rng.randint(1, 4)))
        left = {path: data for path, data in self.held.items() if path not in gone}
        return ["remove", str(self.index), "--", *gone], left

    def compact(self) -> tuple[list[str], dict[str, str]]:
        return ["compact", str(self.index)], self.held

    def merge(self) -> tuple[list[str], dict[str, str]]:
        self.make(self.more, 4)
        shutil.rmtree(self.other, ignore_errors=True)
        words = ["index", "build", str(self.more), "--out", str(self.other), "--model", "made-up"]
        if wait(start(words, self.log), time.monotonic() + LIMIT_S) != 0:
            raise SystemExit(f"the index to merge could not be built, see {self.log}")
        self.is_merged = True
        return ["merge", str(self.other), "--out", str(self.index)], self.held | self.truth(self.more)

    def repair(self) -> tuple[list[str], dict[str, str]]:
        for path in self.index.glob("ann/*"):
            path.write_bytes(path.read_bytes()[:-3])
        with closing(sqlite3.connect(self.index / "catalog.sqlite", isolation_level=None)) as catalog:
            catalog.execute("UPDATE seen SET mtime_ns = mtime_ns + 1")
        (self.index / "manifest.json").write_text("{}")
        return ["verify", str(self.index), "--repair"], self.held


def look(world: World, before: dict[str, str], after: dict[str, str], kind: str) -> tuple[str, list[str]]:
    """Return whether an index is in its old state, its new one or between, and what is wrong with it."""
    if not (world.index / "manifest.json").exists():
        return "old", ["the index is gone"] if before else []
    try:
        index = VideoIndex.open(world.index)
        wrong = [f"{finding.name}: {finding.problem}" for finding in index.verify() if kind != "repair"]
        held = contents(index)
        backend = world.rng.choice(("exact", "auto"))
        hits = Searcher(index, Encoder(), backend=backend).search("anything", top_k=1000)
    except (VlmError, AssertionError) as error:
        if kind == "repair":
            return "old", []  # still as damaged as it was
        return "broken", [f"{type(error).__name__}: {error}"]
    if sorted(hit.path for hit in hits) != sorted(held):
        wrong.append("a search does not find what is there")
    for path in before.keys() | after.keys() | held.keys():
        if held.get(path) not in (before.get(path), after.get(path)):
            wrong.append(f"{path}: neither as it was nor as it is to be")
    state = "new" if held == after else "old" if held == before else "between"
    if state == "between" and kind in ("remove", "compact", "repair"):
        wrong.append("this command must do all or nothing")
    return state, wrong


def leftovers(world: World) -> list[str]:
    """Return the files of the index that nothing refers to."""
    known = {file.name for file in VideoIndex.open(world.index).files()}
    parts = [*world.index.glob("vectors/*"), *world.index.glob("tokens/*")]
    there = {str(path.relative_to(world.index)) for path in parts}
    return sorted(there - known) + [path.name for path in world.index.glob(".tmp-*")]


def disturbed(world: World, kind: str, usual_s: float, points: Sequence[str]) -> dict[str, Any]:
    """Do one step, killing it at each of the points, or at a random time where one is empty."""
    before = world.held
    words, after = world.step(kind)
    row: dict[str, Any] = {"step": kind, "kills": [], "wrong": []}
    for point in points:
        begin = time.monotonic()
        child = start(["index", *words], world.log, point)
        code = wait(child, begin + (LIMIT_S if point else world.rng.uniform(0, 1.2 * usual_s)))
        if code != -signal.SIGKILL:
            if code:
                row["wrong"].append(f"exit code {code}")
            break
        state, wrong = look(world, before, after, kind)
        row["kills"].append({"at": point or f"{time.monotonic() - begin:.3f} s", "state": state})
        row["wrong"] += wrong
        if state == "new" and kind == "remove":  # it would say that there are no such videos
            break
    begin = time.monotonic()
    if kind == "remove" and look(world, before, after, kind)[0] == "new":
        words = ["compact", str(world.index)]  # any writer sweeps what a killed one left
    if code := wait(start(["index", *words], world.log), begin + LIMIT_S):
        row["wrong"].append(f"run again: exit code {code}")
    row["usual_s"] = time.monotonic() - begin
    state, wrong = look(world, before, after, "end")
    row["wrong"] += wrong + leftovers(world)
    if state != "new":
        row["wrong"].append(f"run again: {state}")
    world.held = after
    return row


def some_point(rng: random.Random, kind: str) -> str:
    """Return a named point of a command, or nothing for a random time."""
    return "" if rng.random() < 0.7 else f"{rng.choice(POINTS[kind])}:{rng.randint(1, 4)}"


def at_every_point(folder: Path) -> list[dict[str, Any]]:
    """Kill every command at every point that it passes."""
    rows = []
    for kind, points in POINTS.items():
        for point in points:
            world = World(folder / f"{kind}-{point}", random.Random(1))
            if kind != "build":
                disturbed(world, "build", 0.0, [])
            if kind == "compact":
                disturbed(world, "remove", 0.0, [])
            rows.append(disturbed(world, kind, 0.0, [point]) | {"point": point})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts that the promise is about."""
    kills = [(row["step"], kill) for row in rows for kill in row["kills"]]
    return {
        "kills": len(kills),
        "steps": len(rows),
        "steps_with_anything_wrong": sum(bool(row["wrong"]) for row in rows),
        "kills_at_random_times": sum(kill["at"].endswith(" s") for _, kill in kills),
        "kills_by_step": dict(Counter(step for step, _ in kills)),
        "kills_by_state": dict(Counter(kill["state"] for _, kill in kills)),
    }


def conclude(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    """Write the results, whole or not at all; return whether anything was wrong."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(head | {"summary": summary(rows), "rows": rows}, indent=1) + "\n")
    os.replace(temporary, path)
    return int(summary(rows)["steps_with_anything_wrong"] > 0)


def soak(out: Path, wanted: int, minutes: float, seed: int) -> int:
    """Kill and compare until enough kills are done or the time is over."""
    head: dict[str, Any] = {"format": FORMAT, "machine": machine(torch.device("cpu")), "seed": seed}
    rows: list[dict[str, Any]] = []
    if out.exists():
        earlier = json.loads(out.read_text())
        if (earlier["format"], earlier["seed"]) != (FORMAT, seed):
            raise SystemExit(f"{out} is of another format or seed; choose another --out")
        rows = earlier["rows"]
    begin, round_number = time.monotonic(), 1 + max((row["round"] for row in rows), default=-1)
    usual_s: dict[str, float] = defaultdict(lambda: 0.3)
    while summary(rows)["kills"] < wanted and time.monotonic() - begin < 60 * minutes:
        work = out.with_suffix(f".{round_number}-{os.getpid()}")
        world = World(work, random.Random(f"{seed}/{round_number}"))
        for kind in ["build", *world.rng.choices(KINDS[1:], k=9)]:
            kind = "add" if kind == "remove" and len(world.held) < 2 else kind
            points = [some_point(world.rng, kind) for _ in range(world.rng.randint(1, 3))]
            row = disturbed(world, kind, usual_s[kind], points)
            usual_s[kind] = (usual_s[kind] + row.pop("usual_s")) / 2
            rows.append(row | {"round": round_number})
        conclude(out, head, rows)
        print(json.dumps(summary(rows)), file=sys.stderr, flush=True)
        if not any(row["wrong"] for row in rows if row["round"] == round_number):
            shutil.rmtree(work)
        round_number += 1
    print(json.dumps(summary(rows), indent=1))
    return conclude(out, head, rows)


def main(argv: list[str]) -> int:
    """Parse the arguments and soak; 0 if nothing was ever wrong; what was is kept beside the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.json", help="results; kept and added to"
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="how many in all; default: 200")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="M", help="stop after; default: 60")
    parser.add_argument("--seed", type=int, default=0, help="of the times and steps; default: 0")
    parser.add_argument("--points", action="store_true", help="instead: every command at every named point")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # a process with threads must not be forked
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    if arguments.points:
        return conclude(out, {"format": FORMAT}, at_every_point(out.with_suffix(".points")))
    return soak(out, arguments.kills, arguments.minutes, arguments.seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
