"""`vlm eval strength`: what is left out of an index is in no scene of it; shares are of captions asked."""

import json
from types import SimpleNamespace

import pytest

from vlm.cli import main
from vlm.evaluation.tradeoff.absent import divide, share_strong
from vlm.world import caption, facts
from vlm.world.facts import closure


def test_what_is_absent_is_true_of_nothing_that_is_present() -> None:
    divided = divide("test", 3, 120, num_absent=15, choice=0)
    shown = {(thing.colour, thing.digit) for scene in divided.present for thing in scene.things}
    assert len(divided.present) >= 20 and len(divided.absent) >= 20
    for scene in divided.absent:
        assert not {(thing.colour, thing.digit) for thing in scene.things} <= shown
        assert not any(facts(scene) <= closure(other) for other in divided.present)
    assert divide("test", 3, 120, num_absent=15, choice=1).present != divided.present


def test_a_share_counts_captions_with_a_strong_hit_among_three() -> None:
    scenes = divide("test", 3, 40, num_absent=5, choice=0).present[:4]
    grades = (["weak", "strong", "weak"], ["weak"] * 3, [], ["strong"] * 3)
    answers = dict(zip(map(caption, scenes), grades, strict=True))

    def search(text, *, top_k, rerank):
        assert (top_k, rerank) == (3, 7)
        return [SimpleNamespace(strength=grade) for grade in answers[text]]

    assert share_strong(SimpleNamespace(search=search), scenes, 7) == 0.5


def test_the_program_measures_and_writes(tmp_path, capsys) -> None:
    out = tmp_path / "strength.json"
    words = ["--count", "40", "--left-out", "10", "--choices", "1", "--rerank", "2", "--out", str(out)]
    assert main(["eval", "strength", "--model", "demo-teacher", *words]) == 0
    (row,) = json.loads(out.read_text())["divisions"]
    divided = divide("test", 1, 40, num_absent=10, choice=0)
    assert (row["num_present"], row["num_absent"]) == (len(divided.present), len(divided.absent))
    printed = capsys.readouterr().out
    for key in (
        "present_strong_itc",
        "absent_strong_itc",
        "present_strong_reranked",
        "absent_strong_reranked",
    ):
        assert 0 <= row[key] <= 1
        asked = row["num_present"] if key.startswith("present") else row["num_absent"]
        assert row[key] * asked == pytest.approx(round(row[key] * asked))
        assert f"{100 * row[key]:.1f} %" in printed
