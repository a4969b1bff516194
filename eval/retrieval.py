"""Measure retrieval by a pinned protocol, from a model and clips or from a score matrix; write a card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import UsageError
from vlm.evaluation import Card, MatrixFiles, evaluate_scores
from vlm.evaluation.page.program import add_card_options, measure_and_publish
from vlm.evaluation.scores.corrections import DEFAULT_SCALE, Corrections
from vlm.evaluation.scores.files import read_texts

if TYPE_CHECKING:
    from vlm.evaluation.runner import RunOptions

_EXAMPLE = (
    "vlm eval retrieval --protocol world --annotations DIR/manifest.jsonl --videos DIR "
    "--model demo --out card.json"
)


def main(argv: list[str]) -> int:
    """Evaluate, print the table, write the card."""
    arguments = _parser().parse_args(argv)
    if arguments.shard:
        return _encode_part(arguments)
    measure = _from_scores if arguments.scores else _from_model
    print(measure_and_publish(arguments, lambda: measure(arguments)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm eval retrieval", description=__doc__, epilog=f"example: {_EXAMPLE}"
    )
    add = parser.add_argument
    add("--protocol", metavar="NAME", help="a name of `vlm eval list`")
    add("--annotations", type=Path, metavar="FILE", help="the protocol's annotation file")
    add("--videos", type=Path, metavar="DIR", help="folder of the clips")
    add("--model", metavar="SOURCE", 
        help="a model folder, file or name (see: vlm models list), hf:OWNER/REPO, open_clip:ARCH/WEIGHTS, or "
        "features:FILE.npz, whose layout vlm/evaluation/encoders/stored.py describes")  # fmt: skip
    add("--control", action="append", default=[], metavar="NAME=SOURCE|CARD.json",
        help="a model trained with the same budget, or its card, to print beside; repeatable")  # fmt: skip
    add("--no-test-time-controls", action="store_true", help="skip shuffled frames and first frame only")
    add("--scores", type=Path, metavar="FILE",
        help="instead of a model: (queries, items) scores, .npy or .safetensors")  # fmt: skip
    add("--positives", type=Path, metavar="FILE.json", help="for each query a list of item columns")
    add("--kind", default="itc", metavar="KIND", help="what --scores are: itc, dsl, bank, itm@K or itm+itc@K")
    add("--cache", type=Path, metavar="DIR",
        help="keep the features of videos here; a run that was killed goes on, and models, frames and videos "
        "are told apart by their hashes")  # fmt: skip
    add("--processes", type=int, default=1, metavar="N", help="encode videos in N processes, into --cache")
    add("--shard", metavar="I/N", help="only encode part I of N into --cache, and stop")
    add("--captions", type=Path, metavar="FILE",
        help="texts of the queries of --scores (JSON list, or one a line): equal ones are also measured as "
        "sharing their positives")  # fmt: skip
    add("--frames-curve", type=int, nargs="+", default=[], metavar="N",
        help="measure again with only N different frames of each clip, for each N, such as 1 2 4 8; the card "
        "states the rule")  # fmt: skip
    add("--dsl", action="store_true", help="report dual softmax too; it uses the other test queries")
    add("--bank", type=Path, metavar="FILE",
        help="report the correction by queries not under test too: with --model their captions (JSON list or "
        "one a line), with --scores their (bank queries, items) scores")  # fmt: skip
    scale = "multiplies scores in the softmax of --dsl and --bank; %(default)g by default, for cosines"
    add("--scale", type=float, default=DEFAULT_SCALE, metavar="X", help=scale)
    add("--batch-size", type=int, default=16, metavar="N", help="clips encoded at once")
    add_card_options(parser, videos="clips")
    return parser


def _from_scores(arguments: argparse.Namespace) -> tuple[Card, dict[str, str]]:
    if arguments.model or arguments.protocol or not arguments.positives:
        raise UsageError("--scores goes with --positives, and with neither --model nor --protocol")
    if arguments.frames_curve or arguments.overlap:
        raise UsageError("--frames-curve and --overlap go with --model, not with --scores")
    files = MatrixFiles(
        kind=arguments.kind,
        captions=arguments.captions,
        dual_softmax=arguments.dsl,
        bank=arguments.bank,
        scale=arguments.scale,
    )
    return evaluate_scores(arguments.scores, arguments.positives, files), {}


def _from_model(arguments: argparse.Namespace) -> tuple[Card, dict[str, str]]:
    features = (arguments.model or "").startswith("features:") or (arguments.model or "").endswith(".npz")
    needed = (
        ("protocol", "annotations", "model") if features else ("protocol", "annotations", "videos", "model")
    )
    missing = [f"--{name}" for name in needed if not getattr(arguments, name)]
    if missing:
        raise UsageError(f"missing {', '.join(missing)} (or --scores with --positives)")
    if arguments.captions or arguments.positives or arguments.kind != "itc":
        raise UsageError("--captions, --positives and --kind go with --scores")
    if arguments.batch_size < 1:
        raise UsageError(f"--batch-size: expected at least 1, got {arguments.batch_size}")
    # they need torch, which a score matrix does not
    from vlm.evaluation.launch import evaluate_source
    from vlm.evaluation.page.pictures import example_pictures

    card, paths = evaluate_source(
        arguments.model,
        arguments.protocol,
        arguments.annotations,
        arguments.videos,
        controls=arguments.control,
        overrides=tuple(arguments.set),
        device=arguments.device,
        options=_options(arguments),
        processes=arguments.processes,
        corrections=Corrections(
            dual_softmax=arguments.dsl,
            bank_captions=tuple(read_texts(arguments.bank)) if arguments.bank else (),
            scale=arguments.scale,
        ),
        overlap=arguments.overlap,
    )
    return card, example_pictures(card, paths) if arguments.out else {}


def _options(arguments: argparse.Namespace) -> RunOptions:
    from vlm.evaluation.runner import RunOptions

    return RunOptions(
        batch_size=arguments.batch_size,
        allow_missing=arguments.allow_missing,
        test_time_controls=not arguments.no_test_time_controls,
        frames_curve=tuple(sorted(set(arguments.frames_curve))),
        cache=arguments.cache,
    )


def _encode_part(arguments: argparse.Namespace) -> int:
    from vlm.evaluation.encoders.shards import Shard, ShardTask, encode_source

    needed = ("protocol", "annotations", "videos", "model", "cache")
    missing = [f"--{name}" for name in needed if not getattr(arguments, name)]
    if missing:
        raise UsageError(f"--shard needs {', '.join(missing)} too")
    shard = Shard.parse(arguments.shard)
    task = ShardTask(
        source=arguments.model,
        protocol=arguments.protocol,
        annotations=arguments.annotations,
        videos=arguments.videos,
        overrides=tuple(arguments.set),
        device=arguments.device,
        options=_options(arguments),
    )
    print(
        f"part {arguments.shard}: {encode_source(task, shard)} videos encoded; the others were in the cache"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
