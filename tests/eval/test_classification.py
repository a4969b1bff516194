"""`vlm eval classification` from files to card, and how it refuses, by exit code."""

from __future__ import annotations

import json

import pytest
import torch

from vlm import world
from vlm.cli import main
from vlm.evaluation import read_card
from vlm.models import Classifier, ClassifierConfig, VideoMambaConfig, save_model
from vlm.world import ACTIONS, Scene, action


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    torch.manual_seed(6)
    vision = VideoMambaConfig(width=32, depth=2, num_frames=8, image_size=64, patch_size=32, pool_norm=False)
    folder = tmp_path_factory.mktemp("models") / "sorter"
    config = ClassifierConfig(vision=vision, num_classes=13, class_names=ACTIONS["action"])
    return save_model(Classifier(config, name="sorter"), folder)


def arguments(world_folder, model, *more, protocol="world-action", labels=None):
    named = {
        "--protocol": protocol,
        "--annotations": labels or world_folder / "manifest.jsonl",
        "--videos": world_folder,
        "--model": model,
    }
    quick = ("--set", "bootstrap.resamples=200")
    return ["eval", "classification", *(str(part) for pair in named.items() for part in pair), *quick, *more]


def scenes(folder):
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return {line["id"]: Scene.from_json(json.dumps(line["scene"])) for line in lines}


def test_clips_of_the_world_get_a_card(world_folder, classifier_folder, tmp_path, capsys, on_the_page):
    out = tmp_path / "card.json"
    assert main(arguments(world_folder, classifier_folder, "--out", str(out))) == 0
    assert "guessing" in capsys.readouterr().out
    card = read_card(out)
    named = {key: action(scene, "action") for key, scene in scenes(world_folder).items()}
    expected = [name for name in named.values() if name is not None]
    assert 0 < len(expected) < 20 and card["protocol"]["num_items"] == len(expected)
    counts = {name: expected.count(name) for name in set(expected)}
    assert {name: entry["num_videos"] for name, entry in card["classes"].items()} == counts
    page = on_the_page(out, "results", "chance")
    assert all(f"{name} ({count})" in page for name, count in counts.items())
    (tmp_path / "notes.html").write_text("mine")
    assert main(arguments(world_folder, classifier_folder, "--out", str(tmp_path / "notes.json"))) == 2
    assert "would replace this file" in capsys.readouterr().err
    groups = card["per_query"]["video_to_class"]["mean softmax"]["groups"]
    assert len(set(groups)) < len(groups)  # a clip and its twin are one group
    assert main(arguments(world_folder, classifier_folder, "--json")) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["results"] == card["results"]


def test_files_with_labels_and_several_views(world_folder, classifier_folder, tmp_path, capsys):
    names = list(scenes(world_folder))[:4]
    labels = tmp_path / "val.csv"
    labels.write_text("".join(f"{name}.mp4 {number}\n" for number, name in enumerate(names)))
    command = arguments(world_folder, classifier_folder, "--json", protocol="k400", labels=labels)
    assert main(command) == 4
    assert "not k400 (validation): classes: expected 400, found 4" in capsys.readouterr().err
    command += ["--set", "expected=null"]
    assert main(command) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["protocol"]["views"] == 12 and card["protocol"]["num_items"] == 4
    assert set(card["classes"]) == set(ACTIONS["action"][:4])
    assert card["leakage"] == {"status": "unchecked"}
    assert "image_size: 64 instead of 224" in card["deviations"]
    assert any(
        "VideoMamba-M (top-1, 8 frames, fine-tuned): accuracy 80.6" in row for row in card["published"]
    )
    assert main([*command, "--set", "clips=1", "--set", "crops=1"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["protocol"]["views"] == 1 and alone["protocol"] != card["protocol"]


def test_refusals_have_their_exit_codes(world_folder, classifier_folder, model_folder, tmp_path, capsys):
    assert main(arguments(world_folder, model_folder)) == 4
    assert "cannot classify" in capsys.readouterr().err
    assert main(arguments(world_folder, classifier_folder, protocol="world-direction")) == 4
    assert "other classes" in capsys.readouterr().err
    assert main(arguments(world_folder, classifier_folder, protocol="world")) == 4
    assert "no protocol 'world' for classification" in capsys.readouterr().err
    assert main(arguments(world_folder, classifier_folder, "--set", "clip=2")) == 2
    assert main(arguments(tmp_path / "absent", classifier_folder)) == 4
    labels = tmp_path / "val.csv"
    labels.write_text("gone.mp4 0\n")
    anything = ("--set", "expected=null")
    wrong = arguments(world_folder, classifier_folder, *anything, protocol="k400", labels=labels)
    assert main(wrong) == 4
    assert "1 of 1 videos cannot be read (gone.mp4: missing" in capsys.readouterr().err
    assert main([*wrong, "--allow-missing"]) == 4
    labels.write_text("gone.mp4 swim\n")
    assert main(wrong) == 4
    assert "labelled 'swim', which is none of the 13 classes" in capsys.readouterr().err


def test_a_world_without_single_events_is_refused(classifier_folder, tmp_path, capsys):
    from vlm.world.clips import describe

    scene = next(s for s in (world.sample_scene("val", 0, i) for i in range(100)) if len(s.events) > 1)
    (tmp_path / "manifest.jsonl").write_text(json.dumps(describe(scene)) + "\n")
    assert main(arguments(tmp_path, classifier_folder)) == 4
    assert "in no clip a single thing happens" in capsys.readouterr().err


def test_an_overlap_reaches_the_card(world_folder, classifier_folder, tmp_path, capsys):
    """That the training set holds tested videos is said; that nobody looked is said too."""
    labels, found = tmp_path / "val.csv", tmp_path / "overlap.json"
    names = list(scenes(world_folder))[:4]
    labels.write_text("".join(f"{name}.mp4 {number}\n" for number, name in enumerate(names)))
    report = {
        "format": "vlm-overlap/1",
        "first_sha256": "a" * 64,
        "num_first": 9,
        "by": {"id": 1},
        "captions": {"shared": []},
        "unreadable": {"first": {}, "second": {}},
        "matches": [{"by": "id", "first": "x.mp4", "second": f"{names[1]}.mp4", "value": 1.0}],
        "second_videos": [f"{name}.mp4" for name in names],
    }
    found.write_text(json.dumps(report))
    quick = ("--set", "expected=null", "--set", "clips=1", "--set", "crops=1", "--overlap", str(found))
    out = tmp_path / "card.json"
    command = arguments(world_folder, classifier_folder, *quick, protocol="k400", labels=labels)
    assert main([*command, "--out", str(out)]) == 0
    assert "leakage: checked: 1 of 4 videos are in the training set" in capsys.readouterr().out
    section = read_card(out)["leakage"]
    assert (section["status"], section["videos_shared"]) == ("checked", 1) and "captions" not in section


def test_the_list_names_both_kinds_of_protocols(capsys):
    assert main(["eval", "list", "--json"]) == 0
    names = [entry["name"] for entry in json.loads(capsys.readouterr().out)]
    assert {"world", "world-action", "world-direction", "k400", "ssv2", "breakfast", "coin"} <= set(names)


def test_a_probe_and_prompts_from_files_to_card(world_folder, model_folder, tmp_path, capsys):
    """The tiny model with random weights; what counts here is that files, flags and marks arrive."""
    from vlm.world.clips import write_clips

    trained = tmp_path / "train"
    write_clips(list(world.gallery("train", 5, 12)), trained)
    learnt = ("--method", "linear-probe", "--train", str(trained / "manifest.jsonl"))
    probe = (*learnt, "--train-videos", str(trained), "--json")
    assert main(arguments(world_folder, model_folder, *probe, protocol="world-action")) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["protocol"]["method"] == "linear-probe" and card["model"]["name"] == "tiny"
    assert card["probe"]["penalty"] in card["protocol"]["probe"]["penalties"]
    prompted = ("--method", "zero-shot", "--json")
    assert main(arguments(world_folder, model_folder, *prompted, protocol="world-direction")) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["protocol"]["method"] == "zero-shot" and card["data"]["unknown_words"] == []
    assert main(arguments(world_folder, model_folder, *prompted, protocol="world-action")) == 4
    assert "has no prompts" in capsys.readouterr().err
    same = ("--method", "linear-probe", "--train", str(world_folder / "manifest.jsonl"))
    assert main(arguments(world_folder, model_folder, *same)) == 4
    assert "stand in the training set and in the test set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [("--method", "linear-probe"), ("--train", "t"), ("--train-videos", "t"), ("--method", "guess")],
)
def test_wrong_flags_of_the_method(world_folder, classifier_folder, flags, capsys):
    assert main(arguments(world_folder, classifier_folder, *flags)) == 2
