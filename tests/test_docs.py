"""Tables of the README are what committed results say."""

from __future__ import annotations

import json
import shutil

import pytest

from vlm.cli import main
from vlm.errors import InvalidInput
from vlm.evaluation import load_protocol, report
from vlm.evaluation.benchmarks.description import describe_published
from vlm.evaluation.report import TABLES, fill_tables, stale_tables
from vlm.models.registry import lookup


def test_the_readme_is_current(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert stale_tables(text) == []
    assert all(f"<!-- table: {name} -->" in text for name in TABLES)


@pytest.mark.parametrize("table", TABLES)
def test_a_changed_number_is_stale(root, tmp_path, table, capsys):
    """The last digit of a table, one higher."""
    readme = tmp_path / "README.md"
    text = (root / "README.md").read_text(encoding="utf-8")
    begin = text.index(f"<!-- table: {table} -->")
    end = text.index("<!-- end of table -->", begin)
    place = max(place for place in range(begin, end) if text[place].isdigit())
    readme.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}")
    before = readme.read_text()
    assert main(["eval", "report", str(readme), "--check"]) == 5
    assert f"stale: {table}" in capsys.readouterr().out
    assert readme.read_text() == before
    assert main(["eval", "report", str(readme)]) == 0
    assert f"made anew: {table}" in capsys.readouterr().out
    assert readme.read_text() == text
    assert main(["eval", "report", str(readme), "--check"]) == 0


def test_a_table_by_hand(root):
    """The scan's largest ratio, computed from the file here."""
    results = json.loads((root / "kernels/benchmarks/results/cpu-xeon-avx512.json").read_text())
    times = results["cases"]["scan-L1569"]["forward"]
    ratio = times["materialised"]["ratio"]
    row = next(
        line for line in (root / "README.md").read_text().splitlines() if "| L = 1569, forward |" in line
    )
    assert row.endswith(f"| {ratio:.0f} x |")


def test_changed_results_make_the_readme_stale(root, tmp_path, monkeypatch):
    """One figure of a committed card, moved by a tenth of a point."""

    def copied(name):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(root / name, target)
        return target

    monkeypatch.setattr(report, "asset", copied)
    text = (root / "README.md").read_text(encoding="utf-8")
    assert stale_tables(text) == []
    path = tmp_path / "eval" / "results" / "world-demo.json"
    card = json.loads(path.read_text())
    card["controls"]["first-frame"]["twins"]["itc"]["direction"]["value"] += 0.001
    path.write_text(json.dumps(card))
    assert stale_tables(text) == ["world"]


def test_marks_that_cannot_be_filled(tmp_path, capsys):
    with pytest.raises(InvalidInput, match="no table 'wrld'; expected one of world, scan"):
        fill_tables("<!-- table: wrld -->\n<!-- end of table -->\n")
    with pytest.raises(InvalidInput, match="no '<!-- end of table -->' of its own"):
        fill_tables("<!-- table: world -->\n| a |\n")
    assert fill_tables("nothing here\n") == "nothing here\n"
    assert main(["eval", "report", str(tmp_path / "none.md")]) == 4
    assert "none.md" in capsys.readouterr().err


def test_the_readme_tells_how_to_check_official_weights(root, tmp_path, monkeypatch, capsys):
    """The command is one that the program takes, the figure the protocol's own, with its own noise."""
    text = (root / "README.md").read_text(encoding="utf-8").split("## Official weights")[1].split("\n## ")[0]
    pull, measure = text.split("```")[1].replace("\\\n", "").strip().splitlines()
    name = pull.split()[-1]
    assert lookup(name).published.value == 35.6
    assert f"--model {name} " in measure
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MSRVTT" / "videos").mkdir(parents=True)
    assert main(measure.split()[1:]) == 4  # past the flags and the protocol, to the file that is not here
    assert "MSRVTT_JSFUSION_test.csv" in capsys.readouterr().err
    protocol = load_protocol("msrvtt-1ka")
    line = describe_published(protocol.published[0], protocol.num_trials)
    assert "VideoMamba-M 25M (itm@128, 8 frames): text to video R@1 35.6 [32.6, 38.6]" in line
    assert "R@1 35.6 [32.6-38.6]" in text and "itm@128" in text and "not run by us" in text
