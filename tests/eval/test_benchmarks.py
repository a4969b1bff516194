"""`vlm eval check` and `vlm eval prepare` on cut-down annotations, by exit code and by what they print."""

from __future__ import annotations

import json
import shlex

import pytest

from vlm.cli import main
from vlm.errors import InvalidInput
from vlm.evaluation import compare_cards, load_protocol, protocol_files, read_card
from vlm.evaluation.benchmarks.description import Counts, share_interval
from vlm.evaluation.classification.protocol import (
    classification_protocol_files,
    load_classification_protocol,
)

ONLY_THREE = ("--set", "expected.videos=3", "--set", "expected.queries=3")


@pytest.fixture
def didemo(fixtures):
    return fixtures / "annotations" / "didemo"


@pytest.mark.parametrize("name", sorted({*protocol_files(), *classification_protocol_files()}))
def test_every_protocol_says_where_its_files_come_from(name, capsys):
    code = main(["eval", "check", name])
    out = capsys.readouterr().out
    assert code == 0 and out.startswith(f"{name} v")
    if not name.startswith("world"):
        for part in ("annotations: ", "videos: ", "terms: "):
            assert part in out
        assert "published: " not in out or "not measured by this project" in out


def test_published_numbers_carry_the_noise_of_their_size(capsys):
    assert main(["eval", "check", "msrvtt-1ka"]) == 0
    out = capsys.readouterr().out
    assert "VideoMamba-M 25M (itm@128, 8 frames): text to video R@1 35.6 [32.6, 38.6]" in out
    assert share_interval(100.0, 10) == (100.0, 100.0)
    assert load_protocol("msvd").num_trials == 670  # captions of a clip succeed and fail together
    assert load_protocol("ssv2-template").num_trials == 174


def test_check_names_every_difference(didemo, tmp_path, capsys):
    assert main(["eval", "check", "didemo", "--annotations", str(didemo)]) == 4
    out, err = capsys.readouterr()
    assert "differs: videos: expected 1004, found 3" in out
    assert "queries: expected 1004, found 3" in err
    names = [line for line in (didemo / "test_list.txt").read_text().split()]
    for name in names[:2]:
        (tmp_path / name).write_bytes(b"no video")
    asked = ["eval", "check", "didemo", "--annotations", str(didemo), *ONLY_THREE, "--videos", str(tmp_path)]
    assert main(asked) == 3
    out, err = capsys.readouterr()
    assert f"missing: {names[2]} (missing)" in out
    assert "1 of 3 videos of didemo cannot be used" in err
    assert main([*asked, "--decode", "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert {name for name, _ in report["undecodable"]} == set(names[:2])
    (tmp_path / names[2]).touch()
    assert main(asked) == 0
    assert "nothing differs" in capsys.readouterr().out


def test_check_of_labels(tmp_path, capsys):
    """Counts, hashes and missing videos of a classification benchmark, before hours are spent."""
    labels = tmp_path / "test.csv"
    labels.write_text("class_id class_name youtube_id imdb_id\n0 friend 0IWdfqsImMU tt1\n1 wife -x tt2\n")
    (tmp_path / "-x.mp4").write_bytes(b"no video")
    asked = ["eval", "check", "lvu", "--annotations", str(labels)]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "not one of the files that the counts were confirmed on" in out and "2 videos of 2 classes" in out
    assert main([*asked, "--videos", str(tmp_path)]) == 3
    out, err = capsys.readouterr()
    assert "missing: 0IWdfqsImMU (missing)" in out and "1 of 2 videos of lvu cannot be used" in err
    assert main([*asked, "--videos", str(tmp_path), "--decode", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["undecodable"][0][0] == "-x"
    assert main([*asked, "--set", "expected.videos=42"]) == 4
    assert "videos: expected 42, found 2" in capsys.readouterr().err
    lines = tmp_path / "list.txt"
    lines.write_text("P47/cam01/P47_cereals.avi\n")
    assert main(["eval", "check", "breakfast", "--annotations", str(lines)]) == 4
    assert "videos: expected 355, found 1; classes: expected 10, found 1" in capsys.readouterr().err
    assert main(["eval", "check", "lvu", "--videos", str(tmp_path)]) == 2
    assert main(["eval", "check", "world-action", "--annotations", str(labels)]) == 4
    assert main(["eval", "prepare", "lvu", "--annotations", str(labels), "--out", "x.json"]) == 4
    assert "need no preparing" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted({*protocol_files(), *classification_protocol_files()}))
def test_every_public_protocol_says_how_it_is_measured(name):
    """Split, counts, frames, resolution and its kernel, length of texts: what two numbers must share."""
    if name.startswith("world") or name == "own":
        return
    if name in classification_protocol_files():
        labels = load_classification_protocol(name)
        assert labels.split and labels.input is not None and labels.clips * labels.crops > 1
        assert labels.expected is not None or labels.known  # LVU's tasks are of different sizes
        return
    protocol = load_protocol(name)
    assert protocol.split and protocol.expected is not None and protocol.expected.named()
    assert protocol.frames and protocol.input is not None and protocol.text_tokens and protocol.positives


def test_check_of_what_is_not_there(tmp_path, didemo, capsys):
    assert main(["eval", "check", "didemo", "--annotations", str(tmp_path / "none")]) == 4
    assert "no such annotation file" in capsys.readouterr().err
    assert main(["eval", "check", "didemo", "--annotations", str(tmp_path)]) == 4
    assert "test_data.json" in capsys.readouterr().err
    assert (
        main(["eval", "check", "didemo", "--annotations", str(didemo), "--videos", str(tmp_path / "none")])
        == 4
    )
    assert main(["eval", "check", "dideno"]) == 4
    assert "did you mean 'didemo'" in capsys.readouterr().err
    assert main(["eval", "check", "world", "--annotations", str(didemo)]) == 4


def test_prepare_writes_what_its_command_then_reads(didemo, tmp_path, capsys):
    out = tmp_path / "o'ne folder" / "didemo.json"
    asked = ["eval", "prepare", "didemo", "--annotations", str(didemo), "--out", str(out)]
    assert main(asked) == 4
    assert not out.exists()
    assert main([*asked, *ONLY_THREE]) == 0
    command, *published = capsys.readouterr().out.splitlines()
    words = shlex.split(command)
    assert words[:3] == ["vlm", "eval", "retrieval"]
    assert words[words.index("--annotations") + 1] == str(out)
    assert published[0].startswith("# VideoMamba-M 25M (itm@128, 8 frames): text to video R@1 43.1 [")
    assert main(["eval", "check", "didemo", "--annotations", str(out), *ONLY_THREE]) == 0


def test_open_questions_from_prepare_to_card(fixtures, tmp_path, capsys):
    """ActivityNet-QA as published, two files: counted, prepared, answered; both forms give one protocol."""
    folder, out = fixtures / "annotations" / "questions", tmp_path / "own.json"
    few = ("--set", "expected=null")
    named = ("--protocol", "activitynet-qa", "--annotations", str(folder / "test_q.json"))
    asked = json.loads((folder / "test_q.json").read_text())
    right = {row["question_id"]: row["answer"] for row in json.loads((folder / "test_a.json").read_text())}
    given = tmp_path / "p.jsonl"
    rows = [{"question_id": row["question_id"], "answer": right[row["question_id"]]} for row in asked]
    rows[0]["answer"] = "nothing of the kind"
    given.write_text("\n".join(map(json.dumps, rows)))
    predicted = ("--predictions", str(given))
    assert main(["eval", "qa", *named, *predicted]) == 4  # a part of the test set is not the test set
    assert f"questions: expected 8000, found {len(asked)}" in capsys.readouterr().err
    prepared = ["eval", "prepare", "activitynet-qa", "--annotations", str(folder / "test_q.json")]
    assert main([*prepared, "--out", str(out), *few]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert command[1:5] == ["eval", "qa", "--protocol", "activitynet-qa"] and "--predictions" in command
    cards = [tmp_path / name for name in ("a.json", "b.json")]
    assert main(["eval", "qa", *named, *predicted, *few, "--out", str(cards[0])]) == 0
    text = capsys.readouterr().out
    assert "protocol activitynet-qa v1, exact match" in text and "leakage: unchecked" in text
    assert "published: UMT-B 25M (answer list, 12 frames, fine-tuned): accuracy 44.8" in text
    own = ("--protocol", "activitynet-qa", "--annotations", str(out))
    assert main(["eval", "qa", *own, *predicted, *few, "--out", str(cards[1])]) == 0
    first, second = (read_card(path) for path in cards)
    assert first["results"] == second["results"] and first["protocol"] == second["protocol"]
    accuracy = first["results"]["answers"]["all"]["accuracy"]["value"]
    assert accuracy == pytest.approx(1 - 1 / len(asked))


def test_a_benchmarks_answer_list_is_found_beside_it(fixtures, tmp_path):
    folder = fixtures / "annotations" / "questions"
    rows = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()]
    given, out = tmp_path / "p.json", tmp_path / "card.json"
    given.write_text(json.dumps([{"answer": row["answer"]} for row in rows]))
    asked = ["eval", "qa", "--protocol", "msrvtt-qa", "--annotations", str(folder / "val.jsonl")]
    assert main([*asked, "--predictions", str(given), "--set", "expected=null", "--out", str(out)]) == 0
    card = read_card(out)
    known = json.loads((folder / "train_ans2label.json").read_text())
    assert card["data"]["answer_list"]["num_answers"] == len(known)
    covered = sum(row["answer"] in known for row in rows) / len(rows)
    assert card["results"]["answers"]["all"]["answer_coverage"]["value"] == pytest.approx(covered)
    assert set(card["results"]["answers"]) == {"all", *(row["answer_type"] for row in rows)}


def test_prepare_names_the_program_for_moments(fixtures, tmp_path, capsys):
    path = fixtures / "annotations" / "moments" / "charades_sta_test.txt"
    asked = ["eval", "prepare", "charades-sta", "--annotations", str(path), "--out", str(tmp_path / "c.json")]
    assert main([*asked, "--set", "expected=null"]) == 0
    assert shlex.split(capsys.readouterr().out)[:5] == [
        "vlm",
        "eval",
        "moments",
        "--protocol",
        "charades-sta",
    ]


def test_other_tasks_are_refused(fixtures, tmp_path, capsys):
    """A retrieval program given a question protocol says so before it looks at anything."""
    asked = ["--annotations", str(tmp_path), "--videos", str(tmp_path), "--model", "none"]
    assert main(["eval", "retrieval", "--protocol", "msrvtt-qa", *asked]) == 4
    assert "measures open-ended" in capsys.readouterr().err
    assert main(["eval", "qa", "--protocol", "msrvtt-1ka", *asked]) == 4
    assert "measures retrieval" in capsys.readouterr().err


def test_counts_that_are_not_expected_are_not_compared():
    assert Counts(videos=2).differences(Counts(videos=2, queries=7)) == []
    assert Counts(queries=3).differences(Counts(videos=2)) == ["queries: expected 3, found None"]


def test_multiple_choice_from_files_to_card(world_folder, model_folder, tmp_path, capsys):
    """Clips of the digit world in the layout of MSRVTT-MC are counted, then asked about one by one."""
    from vlm.evaluation.benchmarks.reading import read_choice_set
    from vlm.evaluation.launch import load_clip
    from vlm.evaluation.questions import evaluate_choices
    from vlm.models import load_model

    rows = [json.loads(line) for line in (world_folder / "manifest.jsonl").read_text().splitlines()][:6]
    texts = [row["caption"] for row in rows]
    asked = [
        {"video": row["file"], "caption": texts[place:] + texts[:place], "answer": 0}
        for place, row in enumerate(rows)
    ]
    path = tmp_path / "mc.json"
    path.write_text(json.dumps(asked))
    arguments = ["eval", "qa", "--protocol", "msrvtt-mc", "--annotations", str(path)]
    assert main([*arguments, "--videos", str(world_folder), "--model", str(model_folder)]) == 4
    assert "questions: expected 2990, found 6" in capsys.readouterr().err
    protocol = load_protocol("msrvtt-mc", ("expected=null",))
    data = read_choice_set(protocol, path, world_folder)
    card = evaluate_choices(load_model(model_folder, device="cpu"), data, protocol, load_clip)
    table = card["results"]["multiple_choice"]["all"]
    assert table["num_questions"] == 6
    assert table["chance"]["value"] == pytest.approx(1 / 6)
    assert table["accuracy"]["low"] <= 1 / 6 <= table["accuracy"]["high"]
    assert card["leakage"] == {"status": "unchecked"}
    assert "image_size: 64 instead of 224" in card["deviations"]
    assert any(
        "UMT-B 25M (five choices, 12 frames, fine-tuned): accuracy 96.3" in row for row in card["published"]
    )
    assert card["protocol"]["text_tokens"] == 32 and card["data"]["statements_truncated"] == 0
    cut = load_protocol("msrvtt-mc", ("expected=null", "text_tokens=3"))
    blind = evaluate_choices(load_model(model_folder, device="cpu"), data, cut, load_clip)
    assert blind["data"]["statements_truncated"] == 36
    assert len({row["caption"].split()[0] for row in rows}) > 1  # one word of each is left to choose by
    assert blind["per_query"] != card["per_query"]
    with pytest.raises(InvalidInput, match="text_tokens: 32 and 3"):
        compare_cards(card, blind)
