"""Cards are written whole, never with a figure that is not finite, and read back or refused."""

from __future__ import annotations

import errno
import math
import os

import pytest

from vlm.errors import InvalidInput
from vlm.evaluation import read_card, write_card

GOOD = {"format": "vlm-card/1", "protocol": {}, "model": {}, "results": {}}


def test_round_trip_and_replacement(tmp_path):
    path = tmp_path / "new folder" / "card.json"
    write_card(GOOD, path)
    write_card({**GOOD, "model": {"name": "größer"}}, path)
    assert read_card(path)["model"]["name"] == "größer"
    assert [entry.name for entry in path.parent.iterdir()] == ["card.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_outcomes_of_single_queries_stand_on_one_line(tmp_path):
    path, outcomes = tmp_path / "card.json", {"query_to_item": {"itc": {"above": list(range(500))}}}
    for card in (GOOD, {**GOOD, "per_query": outcomes}, {"per_query": outcomes, **GOOD, "cost": {}}):
        write_card(card, path)
        assert read_card(path) == card
    lines = path.read_text().splitlines()
    assert max(map(len, lines)) > 1500 and sum(len(line) > 200 for line in lines) == 1
    assert len(lines) > len(GOOD) + 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_card_rather_than_a_nan(tmp_path, value):
    path = tmp_path / "card.json"
    write_card(GOOD, path)
    with pytest.raises(InvalidInput, match="not finite"):
        write_card({**GOOD, "results": {"x": [value]}}, path)
    assert read_card(path) == GOOD
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_old_card(tmp_path, monkeypatch):
    path = tmp_path / "card.json"
    write_card(GOOD, path)

    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_card({**GOOD, "results": {"more": 1}}, path)
    assert read_card(path) == GOOD
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[1]", "format 'vlm-card/1', got 'list'"),
        ('{"format": "vlm-card/2"}', "got 'vlm-card/2'"),
        ('{"format": "vlm-card/1", "protocol": {}, "model": {}}', "no section 'results'"),
        ("\x00\xff", "cannot be read"),
    ],
)
def test_what_is_not_a_card(tmp_path, text, message):
    path = tmp_path / "card.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInput, match=message):
        read_card(path)


def test_a_missing_card_names_the_command(tmp_path):
    with pytest.raises(InvalidInput, match="no such card.*vlm eval retrieval"):
        read_card(tmp_path / "card.json")
