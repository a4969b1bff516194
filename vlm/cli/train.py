"""Train a model from a configuration file, or continue a run that was stopped."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.training.config import TrainingConfig

EXAMPLE = "vlm train configs/train/digits.yaml --set train.max_steps=50 --out runs/digits"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", type=Path, help="YAML file, see configs/train/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a value, as in --set optimizer.learning_rate=1e-4; repeatable",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run; default: runs/NAME")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue this run from its last checkpoint"
    )
    parser.add_argument(
        "--or-resume",
        action="store_true",
        help="continue the run that --out holds, if it does: for launchers, which repeat one command",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the whole config, every file needed, sizes, memory, disk and hours; write nothing",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train; the model's folder is the result."""
    from vlm import distributed
    from vlm.config import load_config
    from vlm.errors import RejectedItems, UsageError
    from vlm.training.config import TrainingConfig

    if arguments.resume and (arguments.out or arguments.or_resume):
        raise UsageError("--resume RUN names the folder already; leave --out and --or-resume away")
    config = load_config(TrainingConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        return _print_plan(config)
    from vlm.training.loop import train

    folder = arguments.resume or arguments.out or Path("runs") / config.name
    resume = None if arguments.or_resume else arguments.resume is not None
    try:
        model = train(config, folder, resume=resume)
        if distributed.is_main():
            print(model)
        alone = distributed.world_size() == 1
    finally:
        distributed.shut_down()
    rejected = _rejected(folder)
    if rejected:
        reasons = ", ".join(f"{why} {count}" for why, count in sorted(rejected.items()))
        print(
            f"vlm: {rejected.total()} samples were rejected; {folder}/rejected-*.jsonl says which and why "
            f"({reasons})",
            file=sys.stderr,
        )
    # a launcher of several processes would take any other code for a failure
    return RejectedItems.exit_code if rejected and alone else 0


def _print_plan(config: TrainingConfig) -> int:
    from vlm import distributed
    from vlm.training.planning.estimate import estimate

    try:
        told = estimate(config)
        if distributed.is_main():
            print(json.dumps(told, indent=1))
    finally:
        distributed.shut_down()
    return 0


def _rejected(run: Path) -> Counter[str]:
    """Return how many different samples of each corpus a run could not use, by reason.

    Each is listed anew in every epoch.
    """
    places = {}
    for file in run.glob("rejected-*.jsonl"):
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            places[line["corpus"], *line["place"]] = f"{line['corpus']} {line['reason']}".strip()
    return Counter(places.values())
