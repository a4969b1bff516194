"""Train several recipes from several seeds, measure all of them on the same clips, and compare."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

_EXAMPLE = "vlm eval study configs/studies/ablations.yaml --out studies/ablations"


def main(argv: list[str]) -> int:
    """Do what the study lacks, print its table, write ``study.json`` and ``study.png``."""
    parser = argparse.ArgumentParser(
        prog="vlm eval study", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("study", type=Path, help="YAML file, see configs/studies/")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the study, as in --set seeds=[0]",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the study; run again to go on")
    add("--plan", action="store_true", help="list what is done and what is not, with operations, and end")
    add("--report", action="store_true", help="train nothing; report the seeds that are complete")
    arguments = parser.parse_args(argv)
    from vlm.config import load_config
    from vlm.training.studies.config import StudyConfig
    from vlm.training.studies.runner import jobs, run_jobs

    study = load_config(StudyConfig, arguments.study, arguments.set)
    from vlm.training.studies.flops import operations

    if arguments.plan:
        for job in jobs(study, arguments.out):
            print("done   " if job.is_done else "missing", job.title)
        for arm, number in operations(study, arguments.out).items():
            print(f"{arm}: {number:.3g} operations")
        return 0
    if not arguments.report:
        run_jobs(study, arguments.out, lambda line: print(line, file=sys.stderr, flush=True))
    from vlm.training.studies.summary import draw_study, summarise, table

    result = {**summarise(study, arguments.out), "operations": operations(study, arguments.out)}
    (arguments.out / "study.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw_study(result, arguments.out / "study.png")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
