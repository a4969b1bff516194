"""`vlm eval index_sizes` counts what a segment takes, by hand: its numbers, its hashes, its times."""

from __future__ import annotations

import json

import pytest

from vlm.cli import main


def test_the_sizes_by_hand(capsys) -> None:
    assert main(["eval", "index_sizes", "--segments", "6000", "--dim", "32", "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["bytes_per_segment"]
    # 32 half floats and a part's header of 128 bytes for 500 rows
    assert sizes["vectors"] == pytest.approx(32 * 2 + 128 / 500, rel=0.01)
    # a position of 4 bytes, two times of 8, eight hashes of 8
    assert sizes["reader_memory"] == 4 + 16 + 64
    assert 80 < sizes["catalogue"] < 130  # times and hashes, and a twentieth of a video's row
    assert main(["eval", "index_sizes", "--segments", "600", "--dim", "32"]) == 0
    assert "reader memory      84.0 bytes a segment" in capsys.readouterr().out
