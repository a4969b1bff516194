"""`vlm index` and `vlm search`: what they print for programs, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlm.cli import main
from vlm.errors import InvalidInput
from vlm.types import Hit


def write_clip(path: Path, colour: tuple[int, int, int], seconds: float, **tags: str) -> Path:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, av.open(file, "w", format="mp4") as container:
        container.metadata.update(tags)
        stream = container.add_stream("libx264", rate=4, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 32, 32, "yuv420p", 1
        frame = np.full((32, 32, 3), colour, np.uint8)
        for _ in range(round(seconds * 4)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """Save a tiny untrained model; return its folder."""
    import torch

    from vlm.models import TextEncoderConfig, VideoMambaConfig, VideoTextConfig, VideoTextModel, save_model
    from vlm.text import build_tokenizer

    def make(name: str, domain: str = "open", seed: int = 0) -> str:
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(["a red thing"])
        text = TextEncoderConfig(
            vocabulary_size=tokenizer.vocabulary_size, width=16, num_layers=2, fusion_layer=1, num_heads=2,
            intermediate_width=16, max_positions=16, vision_width=16,
        )  # fmt: skip
        vision = VideoMambaConfig(width=16, depth=1, num_frames=2, image_size=32, patch_size=8, state_size=4)
        config = VideoTextConfig(vision=vision, text=text, embedding_width=8)
        folder = tmp_path_factory.mktemp("models") / name
        save_model(VideoTextModel(config, tokenizer=tokenizer, name=name, domain=domain), folder)
        return str(folder)

    return make


@pytest.fixture(scope="module")
def model(make_model) -> str:
    return make_model("tiny")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_clip(folder / "red.mp4", (200, 0, 0), 12)
    write_clip(folder / "blue.mp4", (0, 0, 200), 3)
    (folder / "readme.txt").touch()
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory, videos, model) -> str:
    folder = str(tmp_path_factory.mktemp("index") / "i")
    assert main(["index", "build", str(videos), "--out", folder, "--model", model]) == 0
    return folder


def test_building_says_what_it_did_and_again_does_nothing(tmp_path, videos, model, capsys) -> None:
    command = ["index", "build", str(videos), "--out", str(tmp_path / "i"), "--model", model]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "2 added, 0 updated, 0 renamed, 0 unchanged, 0 removed, 0 rejected; 3 segments" in printed.out
    assert "left alone: 1 .txt" in printed.err and "100%" in printed.err
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_added"], report["num_unchanged"], report["rejected"]) == (0, 2, [])


def test_info_has_the_contract_s_keys(index, model, capsys) -> None:
    assert main(["index", "info", index, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["num_videos"], info["num_segments"], info["num_rejected"], info["rejected"]) == (2, 3, 0, [])
    assert (info["model"], info["model_domain"]) == (model, "open")
    assert main(["index", "info", index]) == 0
    assert "2 videos" in capsys.readouterr().out


def test_search_prints_hits_as_promised(index, videos, capsys) -> None:
    assert main(["search", index, "a red thing", "--top-k", "5", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert {Path(hit["path"]).name for hit in hits} == {"red.mp4", "blue.mp4"}
    for rank, hit in enumerate(hits, 1):
        assert set(hit) == {*Hit.__slots__, "model_domain"}
        assert (hit["rank"], hit["score_kind"], hit["model_domain"], hit["warning"]) == (
            rank,
            "itc",
            "open",
            None,
        )
        assert 0 <= hit["start_s"] < hit["end_s"] <= 12
    for extra in (["--rerank", "50"], ["--where", "duration_s < 10"], ["--backend", "exact"]):
        assert main(["search", index, "a red thing", "--json", *extra]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found) == (1 if "--where" in extra else 2)
        assert {hit["score_kind"] for hit in found} == {"itm+itc@50" if "--rerank" in extra else "itc"}
    assert main(["search", index, "--video", str(videos / "red.mp4")]) == 0
    assert "red.mp4" in capsys.readouterr().out


def test_search_by_image(index, tmp_path, capsys) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "i.png")
    assert main(["search", index, "--image", str(tmp_path / "i.png"), "--top-k", "1"]) == 0
    assert capsys.readouterr().out.count("mp4") == 1


def test_the_python_calls_give_the_same_hits(index, capsys) -> None:
    from vlm import Searcher, VideoIndex, load_model

    opened = VideoIndex.open(index)
    hits = Searcher(opened, load_model(opened.manifest.model.source)).search("a red thing", rerank=3)
    assert main(["search", index, "a red thing", "--rerank", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [hit.pop("model_domain") for hit in printed] == ["open"] * len(hits)
    assert [Hit.from_json(hit) for hit in printed] == hits


def test_words_that_are_not_understood_are_listed(index, capsys) -> None:
    assert main(["search", index, "a red dog on the beach", "--json"]) == 0
    printed = capsys.readouterr()
    assert "vlm: not understood: dog, on, the, beach\n" in printed.err
    assert json.loads(printed.out)


def test_an_endless_query_is_cut_with_a_warning(index, capsys) -> None:
    assert main(["search", index, "red " * 10_000, "--json"]) == 0
    printed = capsys.readouterr()
    assert "vlm: warning: the query has 40000 characters; only the first 20000 are read" in printed.err
    assert "longer than 16 tokens" in printed.err
    assert len(json.loads(printed.out)) == 2


def test_rejected_files_give_3_and_are_listed(tmp_path, videos, model, capsys) -> None:
    bad = tmp_path / "v" / "bad\nname.mp4"
    write_clip(tmp_path / "v" / "-good'\".mp4", (1, 2, 3), 1)
    bad.write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    folder = str(tmp_path / "i")
    assert main(["index", "build", str(tmp_path / "v"), "--out", folder, "--model", model]) == 3
    assert "rejected (not_a_video)" in capsys.readouterr().out
    assert main(["index", "info", folder, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert [(entry["path"], entry["reason"]) for entry in info["rejected"]] == [(str(bad), "not_a_video")]
    assert info["num_rejected"] == 1
    assert main(["index", "info", folder]) == 0
    assert "bad\nname" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[], ["a.txt"], ["broken.mp4"]])
def test_nothing_usable_gives_4(tmp_path, model, content, capsys) -> None:
    (tmp_path / "v").mkdir()
    for name in content:
        (tmp_path / "v" / name).write_text("x")
    command = ["index", "build", str(tmp_path / "v"), "--out", str(tmp_path / "i"), "--model", model]
    assert main(command) == 4
    message = capsys.readouterr().err
    assert "no video files in" in message or "none of 1 files is a usable video" in message


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["index", "build", "nowhere", "--out", "x", "--model", "MODEL"], 4, "'nowhere': no such file"),
        (["index", "build", "VIDEOS", "--out", "x", "--model", "nowhere/m"], 4, "no such file or folder"),
        (["index", "build", "VIDEOS", "--out", "INDEX", "--model", "MODEL", "--segment-seconds", "9"], 4,
         "built with --segment-seconds 8.0, got 9.0"),
        (["index", "build", "VIDEOS", "--out", "VIDEOS", "--model", "MODEL"], 4, "is no index"),
        (["index", "build", "VIDEOS", "--out", "x", "--model", "MODEL", "--stride-seconds", "9"], 4,
         "0 < stride"),
        (["index", "build", "VIDEOS", "--out", "x", "--model", "MODEL", "--workers", "0"], 2,
         "at least 1"),
        (["index", "info", "nowhere"], 4, "no index there"),
        (["index", "remove", "INDEX", "nobody"], 4, "holds no video 'nobody'"),
        (["search", "nowhere", "x"], 4, "no index there"),
        (["search", "INDEX"], 2, "give one of"),
        (["search", "INDEX", "x", "--image", "y"], 2, "give one of"),
        (["search", "INDEX", "x", "--top-k", "0"], 2, "--top-k"),
        (["search", "INDEX", "x", "--where", "1=1; DROP TABLE videos"], 4, "filter"),
        (["search", "INDEX", ""], 4, "query is empty"),
        (["search", "INDEX", "--image", "nowhere.png"], 4, "no such image"),
        (["search", "INDEX", "--video", "nowhere.mp4"], 4, "no such file"),
        (["search", "INDEX", "x", "--model", "OTHER"], 4, "cannot be compared"),
        (["index", "add", "INDEX", "VIDEOS", "--model", "OTHER"], 4, "cannot be compared"),
    ],
)  # fmt: skip
def test_exit_codes(
    arguments, code, message, index, model, videos, make_model, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"INDEX": index, "MODEL": model, "VIDEOS": str(videos)}
    if "OTHER" in arguments:
        places["OTHER"] = make_model("other", seed=7)
    assert main([places.get(word, word) for word in arguments]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_narrow_model_on_ordinary_videos(tmp_path, videos, make_model, capsys) -> None:
    demo = make_model("demo-like", domain="digit-world")
    folder = tmp_path / "i"
    command = ["index", "build", str(videos), "--out", str(folder), "--model", demo]
    assert main(command) == 4
    message = capsys.readouterr().err
    assert "is an ordinary video" in message and "digit-world" in message and "vlm models list" in message
    assert not folder.exists()
    assert main([*command, "--allow-demo-model"]) == 0
    capsys.readouterr()
    assert main(["search", str(folder), "a red thing", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert [hit["model_domain"] for hit in hits] == ["digit-world"] * 2
    assert all("knows only the digit-world" in hit["warning"] for hit in hits)
    assert main(["search", str(folder), "a red thing"]) == 0
    assert capsys.readouterr().out.count("knows only the digit-world") == 2


def test_clips_of_its_world_need_no_leave(tmp_path, make_model, capsys) -> None:
    write_clip(tmp_path / "w" / "1.mp4", (9, 9, 9), 1, comment="digit-world v1")
    demo = make_model("demo-like", domain="digit-world")
    assert main(["index", "build", str(tmp_path / "w"), "--out", str(tmp_path / "i"), "--model", demo]) == 0
    assert main(["search", str(tmp_path / "i"), "red", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1])[0]["warning"] is None


def test_add_remove_update_verify(tmp_path, videos, model, capsys) -> None:
    folder = str(tmp_path / "i")
    clip = write_clip(tmp_path / "more" / "x.mp4", (5, 5, 5), 1)
    assert main(["index", "build", str(videos / "red.mp4"), "--out", folder, "--model", model]) == 0
    assert main(["index", "add", folder, str(videos), str(clip.parent)]) == 0
    assert "2 added" in capsys.readouterr().out
    assert main(["index", "remove", folder, str(videos / "blue.mp4"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"num_removed": 1, "num_videos": 2}
    clip.unlink()
    assert main(["index", "update", folder]) == 0
    assert "1 added, 0 updated, 0 renamed, 1 unchanged, 1 removed" in capsys.readouterr().out
    assert main(["index", "verify", folder]) == 0
    assert "as it was written" in capsys.readouterr().out
    part = sorted(Path(folder, "vectors").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-1] + b"\x00")
    assert main(["index", "verify", folder, "--json"]) == 5
    printed = capsys.readouterr()
    assert json.loads(printed.out)["damaged"][0]["name"] == f"vectors/{part.name}"
    assert "--repair mends what can be mended" in printed.err
    assert main(["index", "verify", folder, "--repair"]) == 3
    printed = capsys.readouterr().out
    assert "1 videos have lost their vectors" in printed and f"vlm index update {folder}" in printed
    assert main(["index", "update", folder]) == 0
    assert "1 added" in capsys.readouterr().out
    assert main(["index", "compact", folder]) == 0
    assert main(["index", "verify", folder, "--repair"]) == 0
    assert capsys.readouterr().out.endswith("every file is as it was written\n")


def test_cut_at_shots(tmp_path, model, videos, capsys) -> None:
    folder, clips = str(tmp_path / "i"), str(videos)
    command = ["index", "build", clips, "--out", folder, "--model", model, "--segments", "shots"]
    assert main(command) == 0
    assert main([*command, "--rehash"]) == 0
    assert main(["index", "info", folder]) == 0
    assert "(shots)" in capsys.readouterr().out
    assert main(command[:-2]) == 4
    assert "was built with --segments shots, got even" in capsys.readouterr().err
    assert main(["search", folder, "red", "--aggregate", "mean", "--json"]) == 0
    assert {hit["score_kind"] for hit in json.loads(capsys.readouterr().out)} == {"itc_mean"}


def test_a_locked_index_gives_75(index, videos, capsys) -> None:
    from vlm.retrieval.durability import WriterLock

    with WriterLock(Path(index)):
        assert main(["index", "add", index, str(videos)]) == 75
    assert "is being written by process" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["index"], ["index", "build"], ["search"]])
def test_help_shows_an_example_without_loading_torch(command) -> None:
    code = (
        "import sys; from vlm.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "example: vlm" in done.stdout


def test_numbers_that_cannot_be_are_refused_before_anything_is_made(model, videos, tmp_path, capsys) -> None:
    out = tmp_path / "i"
    for flags, code, message in (
        (("--timeout", "inf"), 2, "above 0 seconds and finite, got inf"),
        (("--segment-seconds", "inf"), 4, "segments of inf s"),
        (("--dry-run", "--segment-seconds", "5", "--stride-seconds", "10"), 4, "stride of 10 s"),
    ):
        assert main(["index", "build", str(videos), "--out", str(out), "--model", model, *flags]) == code
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_videos_are_listed_with_the_names_that_other_commands_take(index, videos, capsys) -> None:
    assert main(["index", "info", index, "--videos", "--json"]) == 0
    listed = {Path(one["path"]).name: one for one in json.loads(capsys.readouterr().out)["videos"]}
    assert {name: one["num_segments"] for name, one in listed.items()} == {"red.mp4": 2, "blue.mp4": 1}
    assert main(["index", "info", index, "--videos"]) == 0
    printed = capsys.readouterr().out
    assert f"{listed['red.mp4']['video_id']}       12.0 s  {videos / 'red.mp4'}" in printed
    outputs = []
    for name in (str(videos / "red.mp4"), listed["red.mp4"]["video_id"]):
        command = ["search", index, "--plus", f"like:{name}@4", "--unlike", f"{name}@0", "--json"]
        assert main([*command, "--plus", "text:a red thing"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "blue.mp4" in outputs[0] and "red.mp4" not in outputs[0]


def test_a_sum_says_what_it_does_not_understand(index, capsys) -> None:
    assert main(["search", index, "a red thing", "--plus", "text:xylophone", "--minus", "a zebra"]) == 0
    assert "not understood: xylophone, zebra" in capsys.readouterr().err
    assert main(["search", index, "a red thing", "--plus", "img:dog.jpg"]) == 4
    assert "expected a term such as image:beach.jpg" in capsys.readouterr().err


def test_a_question_without_choices_gets_its_moment(index, capsys) -> None:
    assert main(["ask", index, "a red thing", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["answer"], found["choices"]) == (None, [])
    assert main(["search", index, "a red thing", "--json"]) == 0
    assert found["evidence"]["path"] in capsys.readouterr().out
    assert main(["ask", index, "a red thing"]) == 0
    assert f"seen in {found['evidence']['path']} from" in capsys.readouterr().out


def test_what_is_no_index_or_one_already_is_named(index, model, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["index", "verify", str(tmp_path / "empty"), "--repair"]) == 4
    assert "no index there; run vlm index build" in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())
    (tmp_path / "empty" / "manifest.lance").mkdir()
    assert main(["search", str(tmp_path / "empty"), "x"]) == 4
    assert "a published store: add --backend lance" in capsys.readouterr().err
    from vlm import VideoIndex, load_model

    with pytest.raises(InvalidInput, match="is an index already; open it, or choose another place"):
        VideoIndex.create(index, load_model(model))
