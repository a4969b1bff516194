"""The README's tables, made from committed cards and results, so that no number in them is typed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from vlm.assets import asset
from vlm.errors import InvalidInput

_REGION = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def fill_tables(text: str) -> str:
    """Return a Markdown text with the content of every ``<!-- table: NAME -->`` made anew.

    Raises:
        InvalidInput: There is no such table, a mark lacks its end, or a result file cannot be used.
    """
    if text.count("<!-- table: ") != len(_REGION.findall(text)):
        raise InvalidInput("a mark '<!-- table: NAME -->' has no '<!-- end of table -->' of its own")
    return _REGION.sub(lambda found: f"{found[1]}{_table(found[2])}\n{found[4]}", text)


def stale_tables(text: str) -> list[str]:
    """Return the names of the tables of a text that differ from what the results say.

    Raises:
        InvalidInput: As ``fill_tables``.
    """
    made = _REGION.findall(fill_tables(text))
    return [old[1] for old, new in zip(_REGION.findall(text), made, strict=True) if old[2] != new[2]]


def _table(name: str) -> str:
    if name not in TABLES:
        raise InvalidInput(f"no table {name!r}; expected one of {', '.join(TABLES)}")
    source, make = TABLES[name]
    path = asset(source)
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise InvalidInput(f"{path}: cannot be made into the table {name!r}: {error!r}") from error


def _world(card: Mapping[str, Any]) -> str:
    """Return a card of the digit world: R@1, R@1 of the pair and direction of the model and its controls."""
    titles = {"itm": "by the matching head alone", "itm+itc": "by head and vector together"}
    reranked = [(kind, *kind.split("@")) for kind in card["twins"] if "@" in kind]
    controls = card["controls"]
    rows = [
        ["one vector a clip (itc)", *_twins(card["twins"]["itc"])],
        *(
            [f"best {depth} reranked {titles[name]} ({kind})", *_twins(card["twins"][kind])]
            for kind, name, depth in reranked
        ),
        ["chance", *_twins(card["twin_chance"])],
        # follows from the twins: a bag sees both of a pair alike
        ["most that a bag of frames can reach", "50 %", "100 %", "50 %"],
    ]
    trained = {
        "a bag of frames, trained on captions alone": "bag-of-frames",
        "a model trained on shuffled frames, captions alone": "shuffled-frames-trained",
    }
    altered = {
        "this model, shuffled frames at test time": "shuffled-frames",
        "this model, first frame at test time": "first-frame",
    }
    rows += [[title, *_twins(controls[name]["twins"]["itc"])] for title, name in trained.items()]
    for title, name in altered.items():
        values = {key: {"value": entry["value"]} for key, entry in controls[name]["twins"]["itc"].items()}
        rows.append([title, *_twins(values)])
    return _markdown(["", "R@1", "R@1 of the pair", "direction"], rows)


def _twins(block: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [_percent(block[name]) for name in ("recall@1", "pair_recall@1", "direction")]


def _percent(entry: Mapping[str, float]) -> str:
    shown = f"{100 * entry['value']:.1f}"
    if "low" not in entry:
        return f"{shown.removesuffix('.0')} %"
    return f"{shown} % [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def _scan(results: Mapping[str, Any]) -> str:
    """Return the scan's times, and how many times as long its rivals take."""
    columns = {
        "unrolled PyTorch loop": "sequential",
        "the same, compiled": "compiled",
        "chunked PyTorch": "chunked",
        "plain PyTorch loop": "reference",
        "scalar C++ -O3": "scalar",
        "in the style of mamba-ssm's reference": "materialised",
    }
    jobs = (
        ("forward", "cpu", ""),
        ("forward", "cpu-bdl", ", (batch, channels, time)"),
        ("forward_backward", "cpu", ""),
    )
    cases = {results["cases"][name]["sizes"]["length"]: results["cases"][name] for name in _lengths(results)}
    rows = []
    for length, case in cases.items():
        for job, ours, layout in jobs:
            # medians over the turns, each against the C++ kernel's time of the same turn
            against = {name: entry["ratio"] for name, entry in case[job].items() if "ratio" in entry}
            own = against.get(ours, 1.0)
            ratios = [f"{against[name] / own:.0f} x" if name in against else "" for name in columns.values()]
            title = f"L = {length}, {job.replace('_', ' and ')}{layout}"
            rows.append([title, f"{case[job][ours]['median_ms']:.1f} ms", *ratios])
    length, case = next(iter(cases.items()))
    sizes, share = case["sizes"], case["forward"]["cpu"]["share_of_bound"]
    heading = f"batch {sizes['batch']}, {sizes['channels']} channels, {sizes['states']} states"
    reached = (
        f"At L = {length} the forward pass reaches {100 * share:.0f} % of what this processor's multiply "
        "units allow."
    )
    return f"{_markdown([heading, 'C++', *columns], rows)}\n\n{reached}"


def _lengths(results: Mapping[str, Any]) -> list[str]:
    return [name for name in results["cases"] if name.startswith("scan-L")]


def _scaling(results: Mapping[str, Any]) -> str:
    """Return time and memory at the largest number of frames, as multiples of VideoMamba's."""
    titles = {
        "joint-fused": "joint attention, fused",
        "divided": "divided attention, fused",
        "joint-naive": "joint attention, naive",
    }
    frames = max(point["frames"] for point in results["points"])
    last = {point["architecture"]: point for point in results["points"] if point["frames"] == frames}
    rows = [
        [title, _times(last[name].get("ms_ratio")), _times(last[name].get("bytes_ratio"))]
        for name, title in titles.items()
    ]
    size = {"tiny": "Ti", "small": "S", "middle": "M"}[results["settings"]["size"]]
    return _markdown([f"{frames} frames, times VideoMamba-{size}'s", "time", "peak memory"], rows)


def _times(ratio: float | None) -> str:
    """Return a ratio with one decimal, two where one would not tell it from 1."""
    if ratio is None:
        return "not run"
    return f"{ratio:.{2 if 1 < ratio < 1.5 else 1}f} x"


def _metrics(results: Mapping[str, Any]) -> str:
    """Return how long the measures take."""
    card, ranks, large = (results[name] for name in ("card", "ranks", "large"))
    square, wide = f"{ranks['side']:,}", f"{large['queries']:,} x {large['items']:,}"
    rows = [
        [f"card of {card['side']:,} x {card['side']:,}, {card['resamples']:,} resamples", _cost(card), ""],
        [f"ranks of {square} x {square}", _cost(ranks), ""],
        ["the same by sorting", _cost(ranks["argsort"]), ""],
        [f"card of {wide}, from a file", _cost(large), f"{large['peak_resident_bytes'] / 2**30:.1f} GiB"],
    ]
    return _markdown(["", "processor time", "peak memory"], rows)


def _long(study: Mapping[str, Any]) -> str:
    """Return what more frames of a long clip give, mean over seeds, beside the best that they allow."""
    claims = ("presence", "order")
    rows = []
    for arm, tests in study["arms"].items():
        found = tests["test"]["itm"]
        ceilings = " and ".join(_percent({"value": found[claim]["ceiling"]}) for claim in claims)
        rows.append(
            [arm, *(_percent({**found[claim], "value": found[claim]["mean"]}) for claim in claims), ceilings]
        )
    table = _markdown(["frames of a reel", *claims, "most that they allow"], rows)
    gains = [
        f"{row['to']} less {row['from']} {100 * row['mean']:+.1f} "
        f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        for row in study["differences"]
        if row["measure"] == "order" and row["to"] in ("32 frames", "64 frames")
    ]
    return f"{table}\n\nPoints of order: {'; '.join(gains)}."


def _study(study: Mapping[str, Any]) -> str:
    """Return what each arm of a study scores, mean and spread over seeds, and the differences in R@1."""
    measures = {"recall@1": "R@1", "pair_recall@1": "R@1 of the pair", "direction": "direction"}
    rows = []
    for arm, tests in study["arms"].items():
        for test, kinds in tests.items():
            for kind, found in kinds.items():
                cells = [
                    f"{100 * found[name]['mean']:.1f} ± {100 * found[name]['spread']:.1f} %"
                    for name in measures
                ]
                title = f"{arm}, {kind}" if len(tests) == 1 else f"{test}, {kind}"
                rows.append([title, *cells, f"{study['operations'][arm]:.3g}"])
    table = _markdown(["", *measures.values(), "operations"], rows)
    if not study["differences"]:
        return f"{table}\n\nSeeds {', '.join(map(str, study['seeds']))}."
    gains = [
        f"{row['to']} less {row['from']}, {row['kind']}: {100 * row['mean']:+.1f} "
        f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        for row in study["differences"]
        if row["test"] == "test" and row["measure"] == "recall@1"
    ]
    return f"{table}\n\nPoints of R@1, seeds {', '.join(map(str, study['seeds']))}: {'; '.join(gains)}."


def _cost(entry: Mapping[str, float]) -> str:
    return f"{entry['processor_s']:.2g} s"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


# name of a table → the results that it shows, and how
TABLES: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "world": ("eval/results/world-demo.json", _world),
    "scan": ("kernels/benchmarks/results/cpu-xeon-avx512.json", _scan),
    "scaling": ("eval/results/scaling-tiny-cpu.json", _scaling),
    "long": ("eval/results/studies/long/study.json", _long),
    "stages": ("eval/results/studies/stages/study.json", _study),
    "distillation": ("eval/results/studies/distillation/study.json", _study),
    "strength": ("eval/results/studies/strength/study.json", _study),
    "metrics": ("eval/results/metrics-speed-cpu.json", _metrics),
}
