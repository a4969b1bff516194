"""What a folder of shards is made of: lengths, sizes, codecs, captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.shards.reader import ShardReader
from vlm.data.sources import parse_facts


def describe_shards(folder: Path | str, on_shard: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Read the facts of every sample and sum them up, ready for JSON.

    Args:
        folder: What `pack` or `index_foreign` made; a path or a URL.
        on_shard: Called after each shard, for progress.

    Raises:
        DataError, IntegrityError: The manifest or a sample cannot be read.
    """
    reader = ShardReader(folder)
    numbers: dict[str, list[float]] = {name: [] for name in ("duration_s", "fps", "width", "height")}
    codecs: Counter[str] = Counter()
    captions: list[int] = []
    words: list[int] = []
    vocabulary: Counter[str] = Counter()
    for shard, size in enumerate(reader.shard_sizes):
        for number in range(size):
            facts = parse_facts(reader.read(shard, number))
            for name, values in numbers.items():
                if isinstance(facts.get(name), int | float):  # shards of other makers need not say it
                    values.append(float(facts[name]))
            codecs[str(facts.get("codec", "unknown"))] += 1
            captions.append(len(facts["captions"]))
            for caption in facts["captions"]:
                split = caption.lower().split()
                words.append(len(split))
                vocabulary.update(split)
        on_shard()
    return {
        "num_samples": len(reader),
        "num_bytes": reader.manifest.num_bytes,
        "total_duration_s": round(float(np.sum(numbers["duration_s"])), 3),
        **{name: _spread(values) for name, values in numbers.items()},
        "codecs": dict(codecs.most_common()),
        "captions_per_video": _spread(captions),
        "words_per_caption": _spread(words),
        "num_captions": int(np.sum(captions)),
        "num_words": len(vocabulary),
        "frequent_words": dict(vocabulary.most_common(20)),
        "num_odd": len(reader.manifest.odd),
        "num_rejected": len(reader.manifest.rejected),
        "rejected_by_reason": dict(Counter(item.reason for item in reader.manifest.rejected).most_common()),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    low, middle, high = np.percentile(np.asarray(values, np.float64), [0, 50, 100]).tolist()
    return {"min": round(low, 3), "median": round(middle, 3), "max": round(high, 3)}
