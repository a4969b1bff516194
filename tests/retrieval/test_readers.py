"""Readers in other processes while a writer works: none waits, each sees whole generations."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

READER = """
import json, sys, time, pathlib
import index as soak
from vlm.errors import BusyError
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.upkeep.verification import verify_folder
folder, stop = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
model, seen, slowest = soak.Encoder(), [], 0.0
searcher = Searcher(VideoIndex.open(folder), model, backend="exact")
print("ready", flush=True)
while not stop.exists():
    began = time.monotonic()
    try:
        searcher.refresh()
        hits = searcher.search("anything", top_k=1000)
        held = soak.contents(searcher.index)
        assert sorted(hit.path for hit in hits) == sorted(held), "a torn generation"
        assert verify_folder(folder) == [], "a writer at work is taken for damage"
        seen.append([searcher.index.snapshot.generation.id, held])
    except BusyError:
        pass
    slowest = max(slowest, time.monotonic() - began)
print(json.dumps({"seen": seen, "slowest": slowest}), flush=True)
"""

WRITER = """
import json, sys, time, pathlib, random
import index as soak
world, states = soak.World(pathlib.Path(sys.argv[1]), random.Random(5)), []
for kind in ("build", "add", "remove", "compact", "update", "merge", "remove", "compact", "add"):
    # killed once on the way: readers must not notice
    row = soak.disturbed(world, kind, 0.1, [] if kind == "build" else [""])
    assert not row["wrong"], row
    states.append(world.held)
    print("done", flush=True)
    sys.stdin.readline() if kind == "build" else time.sleep(0.1)
print(json.dumps(states), flush=True)
"""


@pytest.mark.slow
def test_readers_see_whole_generations_and_never_wait(tmp_path, root) -> None:
    folder, stop = tmp_path / "world", tmp_path / "stop"
    paths = os.pathsep.join((str(root), str(root / "tests" / "soak")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    writer = start(WRITER, folder)
    readers = []
    try:
        assert writer.stdout.readline() == "done\n", writer.communicate()
        readers = [start(READER, folder / "index", stop) for _ in range(2)]
        for reader in readers:
            assert reader.stdout.readline() == "ready\n", reader.communicate()
        written, errors = writer.communicate("go\n", timeout=200)
        assert writer.returncode == 0, errors
    finally:
        stop.touch()
        outputs = [reader.communicate(timeout=60) for reader in readers]
        writer.kill()
        writer.communicate()
    states = json.loads(written.splitlines()[-1])
    allowed = {(path, data) for state in states for path, data in state.items()}
    for output, errors in outputs:
        assert output, errors
        values = json.loads(output)
        seen = values["seen"]
        generations = [generation for generation, _ in seen]
        assert generations == sorted(generations) and len(set(generations)) > 3
        # one generation is always the same, and nothing is in it that was never meant to be
        whole = {(generation, json.dumps(held, sort_keys=True)) for generation, held in seen}
        assert len(whole) == len(set(generations))
        assert all((path, data) in allowed for _, held in seen for path, data in held.items())
        assert values["slowest"] < 5
