"""`vlm eval retrieval` from files to card, and every way it refuses, by exit code."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from vlm.cli import main
from vlm.errors import InvalidInput
from vlm.evaluation import load_protocol, read_card
from vlm.evaluation.launch import load_clip
from vlm.evaluation.runner import evaluate_model
from vlm.evaluation.world_manifest import read_world
from vlm.models import load_model
from vlm.types import Preprocessing


def _arguments(world_folder, model_folder, *more):
    manifest = world_folder / "manifest.jsonl"
    named = (
        "--protocol",
        "world",
        "--annotations",
        manifest,
        "--videos",
        world_folder,
        "--model",
        model_folder,
    )
    quick = ("--set", "bootstrap.resamples=200", "--set", "rerank_k=5")
    return ["eval", "retrieval", *map(str, (*named, *quick, *more))]


def _lines(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def _write(folder, rows):
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def copied_world(world_folder, tmp_path):
    return shutil.copytree(world_folder, tmp_path / "world")


def test_a_random_model_gets_a_card_at_chance(world_folder, model_folder, tmp_path, capsys):
    out = tmp_path / "card.json"
    assert main(_arguments(world_folder, model_folder, "--out", out)) == 0
    card = read_card(out)
    assert (card["protocol"]["num_items"], card["protocol"]["num_twin_pairs"]) == (20, 10)
    assert card["data"]["videos_decoded"] == 20
    assert card["data"]["queries_with_unknown_words"] == 0
    for kind in ("itc", "itm@5", "itm+itc@5"):
        for direction in ("query_to_item", "item_to_query"):
            entry = card["results"][direction][kind]["recall@5"]
            assert entry["low"] <= card["chance"][direction]["recall@5"]["value"] <= entry["high"]
    assert card["ceilings"]["all"]["query_to_item"]["recall@1"]["value"] > 0.9
    assert card["ceilings"]["frame set"]["query_to_item"]["recall@1"]["value"] <= 0.5
    assert card["ceilings"]["colours"]["query_to_item"]["recall@1"]["value"] <= 0.5
    assert set(card["controls"]) == {"shuffled-frames", "first-frame"}
    text = capsys.readouterr().out
    for part in ("text to video, itc", "oracle frame set", "control first-frame", "chance", "direction|pair"):
        assert part in text


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_weights_give_exactly_chance(world_folder, model_folder, value):
    model = load_model(str(model_folder), device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.0)
        for bias in (model.vision_proj.bias, model.text_proj.bias, model.itm_head.bias):
            bias.fill_(value)  # at 1 every embedding is the same direction instead of none
    protocol = load_protocol("world", ("rerank_k=20", "bootstrap.resamples=100"))
    data = read_world(world_folder / "manifest.jsonl", world_folder, protocol)
    card = evaluate_model(model, data, protocol, load_clip)
    for direction in ("query_to_item", "item_to_query"):
        chance = {name: entry["value"] for name, entry in card["chance"][direction].items()}
        for kind in ("itc", "itm@20", "itm+itc@20"):
            found = {name: entry["value"] for name, entry in card["results"][direction][kind].items()}
            assert found == pytest.approx(chance)
            assert card["ties"][direction][kind] == 20
    for kind in ("itc", "itm@20", "itm+itc@20"):
        twins = {name: entry["value"] for name, entry in card["twins"][kind].items()}
        assert twins == pytest.approx({name: entry["value"] for name, entry in card["twin_chance"].items()})


def test_the_same_run_gives_the_same_card_and_no_difference(world_folder, model_folder, tmp_path, capsys):
    cards = [tmp_path / "a.json", tmp_path / "b.json"]
    for card, batch in zip(cards, ("3", "16"), strict=True):
        assert main(_arguments(world_folder, model_folder, "--out", card, "--batch-size", batch)) == 0
    capsys.readouterr()
    assert main(["eval", "compare", *map(str, cards), "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    for kinds in comparison["differences"].values():
        assert set(kinds) == {"itc", "itm@5", "itm+itc@5"}
        assert all(abs(entry["value"]) <= 0.005 for block in kinds.values() for entry in block.values())


def test_renamed_and_shuffled_files_change_nothing(world_folder, copied_world, model_folder, tmp_path):
    rows = _lines(copied_world)
    for number, row in enumerate(rows):
        (copied_world / row["file"]).rename(copied_world / f"-{number} 'x'.bin")
        row["file"] = f"-{number} 'x'.bin"
    _write(copied_world, rows[::-1])
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert main(_arguments(world_folder, model_folder, "--out", before)) == 0
    assert main(_arguments(copied_world, model_folder, "--out", after)) == 0
    for kind in ("itc", "itm@5", "itm+itc@5"):
        first, second = (read_card(path)["results"]["query_to_item"][kind] for path in (before, after))
        for name in first:
            assert second[name]["value"] == pytest.approx(first[name]["value"], abs=0.005)


def test_a_twin_is_the_same_frames_backwards_after_decoding(world_folder):
    """Sampling and coding keep the mirror symmetry on which the ceiling of 50 % rests."""
    rows = {row["id"]: row for row in _lines(world_folder)}
    p = Preprocessing(num_frames=8, image_size=64)
    for row in rows.values():
        clip, twin = (load_clip(world_folder / rows[key]["file"], p) for key in (row["id"], row["twin_id"]))
        assert clip.shape == (8, 3, 64, 64)
        torch.testing.assert_close(clip, twin.flip(0), rtol=0, atol=0)


def test_controls_from_a_card_and_from_a_model(world_folder, model_folder, tmp_path, capsys):
    card = tmp_path / "bag.json"
    assert main(_arguments(world_folder, model_folder, "--out", card)) == 0
    out = tmp_path / "card.json"
    named = ("--control", f"bag={card}", "--control", f"twin={model_folder}", "--no-test-time-controls")
    assert main(_arguments(world_folder, model_folder, "--out", out, *named)) == 0
    controls = read_card(out)["controls"]
    assert set(controls) == {"bag", "twin"}
    assert all(control["strong"] for control in controls.values())
    assert "control bag, itc" in capsys.readouterr().out


def test_scores_and_positives(tmp_path, capsys):
    np.save(tmp_path / "scores.npy", np.eye(12, dtype=np.float16))
    (tmp_path / "positives.json").write_text(json.dumps([[i] for i in range(12)]))
    files = ["--scores", str(tmp_path / "scores.npy"), "--positives", str(tmp_path / "positives.json")]
    assert main(["eval", "retrieval", *files, "--out", str(tmp_path / "card.json"), "--json"]) == 0
    card = read_card(tmp_path / "card.json")
    assert json.loads(capsys.readouterr().out) == card
    assert card["results"]["query_to_item"]["itc"]["recall@1"]["value"] == 1.0
    np.save(tmp_path / "scores.npy", np.full((12, 12), np.nan))
    assert main(["eval", "retrieval", *files, "--out", str(tmp_path / "card.json")]) == 4
    assert "144 of 144 scores are not finite" in capsys.readouterr().err
    assert read_card(tmp_path / "card.json") == card  # the old one is still there


def test_scores_with_corrections(tmp_path, capsys):
    random = np.random.default_rng(0)
    np.save(tmp_path / "scores.npy", random.standard_normal((12, 12)))
    np.save(tmp_path / "bank.npy", random.standard_normal((30, 12)))
    (tmp_path / "positives.json").write_text(json.dumps([[i] for i in range(12)]))
    (tmp_path / "captions.txt").write_text("".join(f"caption {i // 2}\n" for i in range(12)))
    named = {
        "scores": "scores.npy",
        "positives": "positives.json",
        "bank": "bank.npy",
        "captions": "captions.txt",
    }
    files = [word for name, file in named.items() for word in (f"--{name}", str(tmp_path / file))]
    assert main(["eval", "retrieval", *files, "--dsl", "--scale", "2", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert set(card["results"]["query_to_item"]) == {"itc", "dsl", "bank"}
    assert card["kinds"]["bank"]["settings"] == {"scale": 2.0, "num_queries": 30}
    assert card["duplicates"]["queries"] == 12
    assert main(["eval", "retrieval", *files, "--dsl", "--scale", "0"]) == 4
    assert main(["eval", "retrieval", *files, "--kind", "dsl"]) == 2


@pytest.mark.parametrize("positives", [[[0], []], [[0], [2]], [[0]], [[0], [-1]], [0, 1], "nothing"])
def test_positives_that_do_not_fit_are_invalid_input(tmp_path, capsys, positives):
    np.save(tmp_path / "scores.npy", np.eye(2))
    (tmp_path / "positives.json").write_text(json.dumps(positives))
    files = ["--scores", str(tmp_path / "scores.npy"), "--positives", str(tmp_path / "positives.json")]
    out = tmp_path / "card.json"
    assert main(["eval", "retrieval", *files, "--out", str(out)]) == 4
    assert "positives" in capsys.readouterr().err
    assert not out.exists()


def test_a_bank_of_captions_for_a_model(world_folder, model_folder, tmp_path):
    bank, out = tmp_path / "captions.json", tmp_path / "card.json"
    captions = [row["caption"] for row in _lines(world_folder)]
    bank.write_text(json.dumps([f"{caption} and stops" for caption in captions] + captions[:2]))
    quick = "--dsl", "--bank", bank, "--no-test-time-controls", "--out", out
    assert main(_arguments(world_folder, model_folder, *quick)) == 0
    card = read_card(out)
    assert set(card["results"]["query_to_item"]) == {"itc", "itm@5", "itm+itc@5", "dsl", "bank"}
    settings = card["kinds"]["bank"]["settings"]
    assert (settings["num_queries"], settings["left_out_as_queries"], settings["scale"]) == (20, 2, 20.0)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--scores", "s.npy"], 2, "--positives"),
        (
            ["--protocol", "p", "--annotations", "a", "--videos", "v", "--model", "m", "--captions", "c"],
            2,
            "go with",
        ),
        (["--scores", "s.npy", "--positives", "p.json", "--model", "demo"], 2, "neither"),
        (["--scores", "s.npy", "--positives", "p.json"], 4, "s.npy: expected a NumPy"),
        (["--scores", "s.npy", "--positives", "p.json", "--kind", "sim"], 2, "kind of score"),
        (["--protocol", "world"], 2, "missing --annotations, --videos, --model"),
        (["--nonsense"], 2, "unrecognized"),
        ([], 2, "missing --protocol"),
    ],
)
def test_wrong_flags(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "retrieval", *arguments]) == code
    assert message in capsys.readouterr().err


def test_wrong_input(world_folder, model_folder, tmp_path, capsys):
    good = _arguments(world_folder, model_folder)

    def swapped(flag, value):
        place = good.index(flag) + 1
        return [*good[:place], str(value), *good[place + 1 :]]

    (tmp_path / "empty.jsonl").touch()
    cases = [
        (swapped("--protocol", "wrld"), 4, "no protocol 'wrld'"),
        (swapped("--annotations", tmp_path / "none.jsonl"), 4, "none.jsonl"),
        (swapped("--annotations", tmp_path / "empty.jsonl"), 4, "empty; make one with: vlm data world"),
        (swapped("--videos", tmp_path / "none"), 4, "no such folder of videos"),
        (swapped("--videos", tmp_path), 4, "20 of 20 clips cannot be read"),
        (swapped("--model", tmp_path / "none"), 4, ""),
        ([*good, "--set", "rerank=3"], 2, "rerank"),
        ([*good, "--control", "bag"], 2, "NAME=SOURCE"),
        ([*good, "--batch-size", "0"], 2, "--batch-size"),
    ]
    for arguments, code, message in cases:
        assert main(arguments) == code, arguments
        assert message in capsys.readouterr().err


def test_torn_and_missing_clips(copied_world, model_folder, tmp_path, capsys):
    rows = _lines(copied_world)
    (copied_world / rows[0]["file"]).unlink()
    (copied_world / rows[5]["file"]).write_bytes(b"")
    out = tmp_path / "card.json"
    assert main(_arguments(copied_world, model_folder, "--out", out)) == 4
    assert f"1 of 20 clips cannot be read ({rows[0]['id']}: missing)" in capsys.readouterr().err
    assert main(_arguments(copied_world, model_folder, "--out", out, "--allow-missing", "1")) == 4
    assert "2 of 20 clips cannot be read" in capsys.readouterr().err
    assert not out.exists()
    assert main(_arguments(copied_world, model_folder, "--out", out, "--allow-missing")) == 0
    missing = read_card(out)["data"]["missing"]
    assert [entry["clip"] for entry in missing] == [rows[0]["id"], rows[5]["id"]]
    assert [entry["reason"].split(":")[0] for entry in missing] == ["missing", "empty"]


@pytest.mark.parametrize("harm", ["version", "scene", "caption", "file", "twice", "json"])
def test_damaged_manifests(copied_world, harm):
    rows = _lines(copied_world)
    if harm == "version":
        rows[3]["version"] = "world-v0"
    elif harm == "scene":
        del rows[3]["scene"]["things"]
    elif harm in ("caption", "file"):
        rows[3][harm] = ""
    elif harm == "twice":
        rows[3] = rows[2]
    _write(copied_world, rows)
    if harm == "json":
        path = copied_world / "manifest.jsonl"
        path.write_text(path.read_text()[:-40])
    with pytest.raises(InvalidInput, match="listed twice" if harm == "twice" else r"line \d+ is not a clip"):
        read_world(copied_world / "manifest.jsonl", copied_world, load_protocol("world"))


def test_compare_refuses_other_protocols(world_folder, model_folder, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    arguments = _arguments(world_folder, model_folder, "--no-test-time-controls")
    assert main([*arguments, "--out", str(first)]) == 0
    assert main([*arguments, "--set", "rerank_k=7", "--out", str(second)]) == 0
    assert main(["eval", "compare", str(first), str(second)]) == 4
    assert "rerank_k: 5 and 7" in capsys.readouterr().err
    assert main(["eval", "compare", str(first), str(tmp_path / "none.json")]) == 4
    assert main(["eval", "compare", str(first)]) == 2


def test_list_names_every_protocol(capsys):
    assert main(["eval", "list"]) == 0
    assert "\nworld " in capsys.readouterr().out
    assert main(["eval", "list", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} >= {"world"}


@pytest.mark.parametrize("program", ["retrieval", "qa", "compare", "list"])
def test_help_has_an_example(program, capsys):
    assert main(["eval", program, "--help"]) == 0
    assert f"example: vlm eval {program}" in " ".join(capsys.readouterr().out.split())
