"""Train a model from a configuration file, or continue a run that was stopped."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EXAMPLE = "vlm train configs/train/demo.yaml --set train.max_steps=50 --out runs/demo"


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
        "--dry-run",
        action="store_true",
        help="build everything, time two updates, print the cost, write nothing",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train; the model's folder is the result."""
    from vlm.config import load_config
    from vlm.errors import UsageError
    from vlm.training.config import TrainingConfig

    if arguments.out and arguments.resume:
        raise UsageError("--resume RUN names the folder already; leave --out away")
    config = load_config(TrainingConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        from vlm.training.estimate import estimate

        print(json.dumps(estimate(config), indent=1))
        return 0
    from vlm import distributed
    from vlm.training.loop import train

    folder = arguments.resume or arguments.out or Path("runs") / config.name
    try:
        model = train(config, folder, resume=arguments.resume is not None)
        if distributed.is_main():
            print(model)
    finally:
        distributed.shut_down()
    return 0
