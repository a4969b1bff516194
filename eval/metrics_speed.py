"""Measure how fast the measures are, beside ranks by sorting, and how much memory a large matrix takes."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm.evaluation import MatrixFiles, evaluate_scores
from vlm.evaluation.card import measure
from vlm.evaluation.protocol import BootstrapSettings
from vlm.metrics import Positives, RankCounts, rank_scores

FORMAT = "vlm-metrics-speed/1"
LIMITS = {"card_s": 2.0, "ranks_s": 20.0, "memory_bytes": 4 * 2**30}
RECALL_AT = (1, 5, 10, 50)
_EXAMPLE = "vlm eval metrics_speed --out metrics-speed.json"


class Sizes(NamedTuple):
    """Sides of the matrices: of the timed card and ranks, and the queries and items of the large file."""

    card: int = 1000
    ranks: int = 10000
    queries: int = 60000
    items: int = 3000
    resamples: int = 1000


QUICK = Sizes(card=60, ranks=200, queries=400, items=20, resamples=100)


def main(argv: list[str]) -> int:
    """Time the measures, print what they took, write the figures."""
    parser = argparse.ArgumentParser(
        prog="vlm eval metrics_speed", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small matrices: does it run at all?")
    add("--out", type=Path, metavar="FILE.json", help="where to write the figures")
    add("--memory-of", nargs=2, type=Path, metavar=("SCORES", "POSITIVES"),
        help="only make a card of these files within 4 GiB of address space, and print its cost")  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.memory_of:
        print(json.dumps(_card_of_files(*arguments.memory_of)))
        return 0
    figures = _measure(QUICK if arguments.quick else Sizes())
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(_table(figures))
    return 0


def _measure(sizes: Sizes) -> dict[str, Any]:
    import torch  # for the machine's description; the measures do without

    from vlm.evaluation.speed import machine

    figures: dict[str, Any] = {
        "format": FORMAT,
        "machine": {**machine(torch.device("cpu")), "numpy": np.__version__},
        "limits": LIMITS,
        "card": _time_card(sizes),
        "ranks": _time_ranks(sizes.ranks),
    }
    with tempfile.TemporaryDirectory(prefix="vlm-metrics-") as folder:
        figures["large"] = _large(Path(folder), sizes)
    return figures


def _time_card(sizes: Sizes) -> dict[str, Any]:
    """Time every measure of both directions with its interval, from scores in memory."""
    scores, positives = _problem(sizes.card)
    bootstrap, groups = BootstrapSettings(resamples=sizes.resamples), np.arange(sizes.card)

    def run() -> None:
        for counts in _both_directions(scores, positives):
            measure(counts, groups, RECALL_AT, bootstrap)

    return {"side": sizes.card, "resamples": sizes.resamples, **_least(run, 5)}


def _time_ranks(side: int) -> dict[str, Any]:
    """Time ranks in both directions, by counting and by sorting, and check that they agree."""
    scores, positives = _problem(side)
    counted: list[RankCounts] = []
    sorted_ranks: list[NDArray[np.int64]] = []
    ours = _least(lambda: counted.extend(_both_directions(scores, positives)), 2)
    plain = _least(lambda: sorted_ranks.extend([_argsort_ranks(scores), _argsort_ranks(scores.T)]), 1)
    for counts, ranks in zip(counted, sorted_ranks, strict=False):
        clear = ~counts.is_tied
        if not np.array_equal(counts.expected_rank()[clear], ranks[clear]):
            raise AssertionError("counting and sorting disagree where nothing ties")
    return {"side": side, **ours, "argsort": plain}


def _both_directions(scores: NDArray[np.float32], positives: Positives) -> list[RankCounts]:
    backward, kept = positives.reversed()
    return [rank_scores(scores, positives), rank_scores(scores.T, backward, rows=kept)]


def _argsort_ranks(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rank the diagonal as evaluators in the field do: sort each row, find the right column."""
    return np.asarray(
        [np.flatnonzero(np.argsort(row)[::-1] == place)[0] + 1 for place, row in enumerate(scores)]
    )


def _large(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Make a card of a large file in a process of its own, and return that process's time and peak."""
    scores = np.lib.format.open_memmap(folder / "scores.npy", "w+", np.float32, (sizes.queries, sizes.items))
    random = np.random.default_rng(0)
    owners = np.arange(sizes.queries) % sizes.items
    for start in range(0, sizes.queries, 1000):
        block = random.standard_normal((min(1000, sizes.queries - start), sizes.items), dtype=np.float32)
        block[np.arange(len(block)), owners[start : start + len(block)]] += 2.0
        scores[start : start + len(block)] = block
    scores.flush()
    (folder / "positives.json").write_text(json.dumps(owners[:, None].tolist()), encoding="utf-8")
    command = [sys.executable, "-m", "vlm", "eval", "metrics_speed", "--memory-of"]
    child = subprocess.run(
        [*command, str(folder / "scores.npy"), str(folder / "positives.json")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    cost: dict[str, Any] = json.loads(child.stdout)
    return {"queries": sizes.queries, "items": sizes.items, "file_bytes": 4 * scores.size, **cost}


def _card_of_files(scores: Path, positives: Path) -> dict[str, float]:
    limit = int(LIMITS["memory_bytes"])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    begin, begin_processor = time.perf_counter(), time.process_time()
    evaluate_scores(scores, positives, MatrixFiles(dual_softmax=True))
    return {
        "wall_s": time.perf_counter() - begin,
        "processor_s": time.process_time() - begin_processor,
        "peak_resident_bytes": _peak_bytes(),
        "address_space_limit_bytes": limit,
    }


def _peak_bytes() -> int:
    """Return the most memory that was resident; ``ru_maxrss`` would count the parent's at the start too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def _problem(side: int) -> tuple[NDArray[np.float32], Positives]:
    scores = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    scores[np.arange(side), np.arange(side)] += 2.0
    return scores, Positives.from_lists([[place] for place in range(side)], side)


def _least(run: Callable[[], object], runs: int) -> dict[str, float]:
    """Return the shortest of some runs by each clock: the machine's other users only ever add."""
    wall, processor = [], []
    for _ in range(runs):
        begin, begin_processor = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - begin)
        processor.append(time.process_time() - begin_processor)
    return {"wall_s": min(wall), "processor_s": min(processor), "runs": runs}


def _table(figures: dict[str, Any]) -> str:
    card, ranks, large = figures["card"], figures["ranks"], figures["large"]
    argsort = ranks["argsort"]
    rows = [
        (f"{card['side']} x {card['side']}, all measures, {card['resamples']} resamples", card, "limit 2 s"),
        (f"{ranks['side']} x {ranks['side']}, ranks in both directions", ranks, "limit 20 s"),
        ("the same by argsort", argsort, ""),
        (f"{large['queries']} x {large['items']}, a card of a file, with dual softmax", large, ""),
    ]
    lines = [
        f"{title:<58} {entry['wall_s']:8.2f} s  processor {entry['processor_s']:8.2f} s  {limit}"
        for title, entry, limit in rows
    ]
    peak = f"{large['peak_resident_bytes'] / 2**20:.0f} MiB"
    return "\n".join([*lines, f"peak memory of that card, the file's pages included: {peak}; limit 4096 MiB"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
