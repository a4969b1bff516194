"""Every layout of the public benchmarks, on cut-down copies, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.data.annotations.benchmarks import (
    AnnotationFiles,
    Captioned,
    VideoFolder,
    answer_coverage,
    content_hash,
    read_answer_list,
    read_captions,
    read_moments,
    read_questions,
    to_json,
    video_key,
)
from vlm.errors import DataError


@pytest.fixture
def folder(fixtures):
    return fixtures / "annotations"


def captions(path, *, lists=(), part=None):
    return {
        row.videos: row.captions for row in read_captions(AnnotationFiles(path), (), lists=lists, part=part)
    }


def by_key(rows):
    return {video_key(videos[0]): texts for videos, texts in rows.items()}


def test_msrvtt_in_four_layouts(folder):
    table = by_key(captions(folder / "msrvtt/MSRVTT_JSFUSION_test.csv"))
    assert table["video9770"] == ("A man is connecting something to a system.",)
    assert table["video7020"] == ("a man is singing!",)
    assert by_key(captions(folder / "msrvtt/msrvtt_ret_test1k.json")) == table
    whole = by_key(captions(folder / "msrvtt/MSRVTT_data.json", part="test"))
    assert whole == by_key(captions(folder / "msrvtt/msrvtt_mdata_test.json"))
    assert whole["video7020"] == ("a man is singing!", "a singer, on a stage")
    assert "video0" in by_key(captions(folder / "msrvtt/MSRVTT_data.json"))
    with pytest.raises(DataError, match="no captions of the split 'val'"):
        captions(folder / "msrvtt/MSRVTT_data.json", part="val")


def test_msvd_keeps_equal_captions_and_the_order_of_its_list(folder):
    wanted = {
        ("mv89psg6zh4_33_46",): ("a bird bathes", "a bird in a bath"),
        ("-4wsuPCjDBc_5_15",): ("a squirrel eats", "a squirrel eats", "a small animal eats a nut"),
    }
    for name in ("captions_msvd.json", "raw-captions.json"):
        found = captions(folder / "msvd" / name, lists=["test_list.txt"])
        assert found == wanted
        assert list(found) == list(wanted)
    assert by_key(captions(folder / "msvd/msvd_ret_test.json")) == by_key(wanted)
    assert len(captions(folder / "msvd/captions_msvd.json")) == 3


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_a_pickle_is_never_opened(tmp_path, protocol):
    """Its name gives it away, and under another name its first bytes do."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    for name in ("raw-captions.pkl", "raw-captions.json"):
        (tmp_path / name).write_bytes(pickle.dumps({"a": Bomb()}, protocol=protocol))
        with pytest.raises(DataError, match="pickle|not JSON|cannot be read") as caught:
            captions(tmp_path / name)
        if name.endswith(".pkl"):
            assert caught.value.reason == "pickle"
            assert "json.dump(pickle.load(open('raw-captions.pkl', 'rb'))" in str(caught.value)
    assert not (tmp_path / "marker").exists()


def test_the_advice_for_a_pickle_works(tmp_path, monkeypatch):
    """What the message tells to run gives a file that is read."""
    monkeypatch.chdir(tmp_path)
    Path("raw-captions.pkl").write_bytes(pickle.dumps({"-a_1_2": [["a", "cat"], ["cats"]]}))
    with pytest.raises(DataError) as caught:
        read_captions(AnnotationFiles(tmp_path), ["raw-captions.json"])
    code = str(caught.value).partition('python -c "')[2].partition('"')[0]
    subprocess.run([sys.executable, "-c", code], check=True)
    assert captions(tmp_path / "raw-captions.json") == {("-a_1_2",): ("a cat", "cats")}


def test_didemo_keeps_the_listed_one_of_two_extensions(folder):
    """The same video is described under .mov and .mp4, and one listed name ends in a bare dot."""
    found = captions(folder / "didemo/test_data.json", lists=["test_list.txt"])
    name = "39457011@N00_5403825464_79c0f43b72"
    assert len(found) == 3
    assert found[f"{name}.mov",] == (
        "dog first rolls onto its side",
        "dog rolls over onto its legs.",
        "the puppy runs away",
        "the dog runs.",
    )
    assert len(captions(folder / "didemo/test_data.json")) == 4
    assert sum(videos[0].endswith(".") for videos in found) == 1


def test_activitynet_keeps_blanks_dashes_and_odd_segments(folder):
    path = folder / "activitynet/val_1.json"
    found = captions(path, lists=["val_1_list.txt"])
    assert found["v_uqiMw7tQ1Cc",][1].startswith("  The coach")
    assert "v_-MFzpFMdWZs" in by_key(found)
    moments = read_moments(AnnotationFiles(path), ())
    assert len(moments) == sum(map(len, found.values()))
    assert any(moment.has_odd_window for moment in moments)
    assert not any(moment.query.startswith(" ") for moment in moments)


def test_lsmdc_with_quotes_and_dots(folder):
    table = captions(folder / "lsmdc/LSMDC16_challenge_1000_publictect.csv")
    assert table["3086_UGLY_TRUTH_00.23.23.000-00.23.28.886",] == ('SOMEONE stands, "hands" on hips.',)
    assert table == captions(folder / "lsmdc/lsmdc_mdata_test.json")


def test_lsmdc_with_a_torn_line(folder, tmp_path):
    text = (folder / "lsmdc/LSMDC16_challenge_1000_publictect.csv").read_text()
    (tmp_path / "l.csv").write_text(text + "1004_Juno_00.01\t00:00\n")
    with pytest.raises(DataError, match="line 3: expected 6 columns"):
        captions(tmp_path / "l.csv")


def test_vatex_and_something_something(folder):
    found = captions(folder / "vatex/vatex_data.json", lists=["test1k5_sec_list.txt"])
    assert [len(texts) for texts in found.values()] == [10, 10]
    rows = read_captions(AnnotationFiles(folder / "ssv2"), ["ssv2_ret_template_val_small.json"])
    assert rows[0] == Captioned(
        videos=("1.webm", "2.webm"), captions=("Pushing something from left to right",)
    )


def test_a_list_with_unknown_or_repeated_videos(folder, tmp_path):
    (tmp_path / "c.json").write_text((folder / "msvd/captions_msvd.json").read_text())
    (tmp_path / "test_list.txt").write_text("mv89psg6zh4_33_46\nnobody_1_2\n")
    with pytest.raises(DataError, match=r"1 of the 2 videos of test_list.txt .* nobody_1_2"):
        captions(tmp_path / "c.json", lists=["test_list.txt"])
    (tmp_path / "test_list.txt").write_text("mv89psg6zh4_33_46\nmv89psg6zh4_33_46\n")
    with pytest.raises(DataError, match="2, 1 different"):
        captions(tmp_path / "c.json", lists=["test_list.txt"])


@pytest.mark.parametrize(
    "value",
    [{}, [], [1], 3, [{"video": "a"}], {"a": 3}, {"a": {"text": []}}, {"a": [[1]]},
     [{"video": "a", "caption": ""}], {"videos": [], "sentences": [{}]},
     {"annotations": [{"image_id": 3}]}, {"format": "vlm-annotations/1"}],
)  # fmt: skip
def test_what_is_of_no_layout(tmp_path, value):
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"x\.json") as caught:
        captions(tmp_path / "x.json")
    assert caught.value.reason == "bad_annotations"


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no such annotation file"):
        AnnotationFiles(tmp_path / "none")
    with pytest.raises(DataError, match="holds none of a.json, b.csv"):
        read_captions(AnnotationFiles(tmp_path), ["a.json", "b.csv"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("video9770.mp4", "video9770"),
        ("video9770", "video9770"),
        ("10052357@N03_7585070382_5762149bfc.", "10052357@N03_7585070382_5762149bfc"),
        ("a@N00_1.3g2", "a@N00_1"),
        ("a.MTS", "a"),
        ("1004_Juno_00.01.02.345-00.01.04.567", "1004_Juno_00.01.02.345-00.01.04.567"),
        ("1004_Juno_00.01.02.345-00.01.04.567.avi", "1004_Juno_00.01.02.345-00.01.04.567"),
        ("NUsG9BgSes0_210.0_360.0", "NUsG9BgSes0_210.0_360.0"),
        ("-4wsuPCjDBc_5_15", "-4wsuPCjDBc_5_15"),
        ("real/a.mp4", "real/a"),
        ("/home/me/didemo/a.mov", "a"),
        (".", "."),
    ],
)
def test_names_of_videos(name, key):
    assert video_key(name) == key


def test_videos_are_found_under_other_extensions_prefixes_and_folders(tmp_path):
    for name in (
        "video1.webm", "x@N03_1.mp4", "v_-abc.mkv", "film/1004_J_00.01.02.345-00.01.04.567.avi", "twice.mp4",
        "film/twice.webm", "bare.", "notes.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    videos = VideoFolder(tmp_path, ("v_",))

    def found(name):
        path, reason = videos.find(name)
        return str(path.relative_to(tmp_path)) if path else reason

    assert found("video1.mp4") == found("video1") == "video1.webm"
    assert found("x@N03_1.") == found("x@N03_1.mov") == "x@N03_1.mp4"
    assert found("-abc") == found("v_-abc") == "v_-abc.mkv"
    assert found("1004_J_00.01.02.345-00.01.04.567").endswith(".avi")
    assert found("twice.mp4") == "twice.mp4"
    assert found("twice.mov") == "ambiguous"
    assert found("bare.") == "bare."
    assert found("notes") == found("1004_J_00.01.02") == "missing"
    assert found("../x@N03_1.mp4") == found("a/../../b") == "unsafe_name"
    assert found("/elsewhere/video1.mp4") == "video1.webm"


def questions(path, **named):
    return read_questions(AnnotationFiles(path), (), **named)


def test_open_questions_in_six_layouts(folder, tmp_path):
    here = folder / "questions"
    (reference,) = questions(here / "msrvtt_qa_test.json")
    assert (reference.video, reference.answers, reference.question_id) == ("video7010.mp4", ("screen",), "5")
    raw = questions(here / "test_qa.json", numbered="video{}")
    assert [(item.video, item.answers) for item in raw] == [("video6513", ("couch",)), ("video1", ("dog",))]
    mapped = questions(here / "test_qa.json", numbered="vid{}", mapping=["youtube_mapping.txt"])
    assert [item.video for item in mapped] == ["other_1_2", "-4wsuPCjDBc_5_15"]
    lines = questions(here / "val.jsonl")
    assert [item.kind for item in lines] == ["what", "how"]
    apart = questions(here / "test_q.json", answers=["test_a.json"])
    answers = {row["question_id"]: row["answer"] for row in json.loads((here / "test_a.json").read_text())}
    assert {item.question_id: item.answers for item in apart} == {k: (v,) for k, v in answers.items()}
    grouped = questions(here / "grouped.json")
    assert [(item.text, item.answers) for item in grouped] == [("who?", ("a man",)), ("what?", ("a car",))]
    violet = {
        "test": [
            {"video": "a_1_2", "question": "who?", "answer": 1},
            {"video": "a_1_2", "question": "x", "answer": -1},
        ]
    }
    (tmp_path / "v.json").write_text(json.dumps({**violet, "vocab": ["dog", "man"]}))
    assert [item.answers for item in questions(tmp_path / "v.json")] == [("man",)]


def test_answers_that_do_not_fit_their_questions(folder, tmp_path):
    for name in ("test_q.json", "test_a.json"):
        (tmp_path / name).write_text((folder / "questions" / name).read_text())
    answers = json.loads((tmp_path / "test_a.json").read_text())
    answers[0]["question_id"] = "v_other_1"
    (tmp_path / "test_a.json").write_text(json.dumps(answers))
    with pytest.raises(DataError, match="1 questions have no answer and 1 answers have no question"):
        questions(tmp_path / "test_q.json", answers=["test_a.json"])
    with pytest.raises(DataError, match="not beside it"):
        questions(tmp_path / "test_q.json")
    (tmp_path / "twice.json").write_text(
        json.dumps([{"video": "a", "question": "q", "answer": "b", "question_id": 1}] * 2)
    )
    with pytest.raises(DataError, match="several questions, such as '1'"):
        questions(tmp_path / "twice.json")


def test_multiple_choice_in_both_layouts(folder):
    for name in ("msrvtt_mc_test.json", "msrvtt_multi_choice_qa.jsonl"):
        (item,) = questions(folder / "questions" / name)
        assert (video_key(item.video), item.answer_index, item.answers) == ("video9770", 3, ("four",))


def test_an_answer_outside_its_candidates(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps([{"video": "a", "caption": ["x", "y"], "answer": 2}]))
    with pytest.raises(DataError, match="an answer among the candidates"):
        questions(tmp_path / "m.json")


def test_coverage_of_an_answer_list(folder):
    known = read_answer_list(folder / "questions/train_ans2label.json")
    assert known == ["couch", "dog"]
    assert answer_coverage(questions(folder / "questions/val.jsonl"), known) == 0.5


def test_moments(folder):
    (moment,) = read_moments(AnnotationFiles(folder / "moments/highlight_val_release.jsonl"), ())
    assert (moment.video, moment.windows) == ("NUsG9BgSes0_210.0_360.0", ((82.0, 86.0), (90.0, 94.0)))
    assert moment.ratings == ((41, (4, 1, 1)), (42, (4, 1, 1)))
    first, second = read_moments(AnnotationFiles(folder / "moments"), ["charades_sta_test.txt"])
    assert (first.video, first.windows, first.query) == ("3MSZA", ((24.3, 30.4),), "person turn a light on.")
    assert second.query_id == "2"
    with pytest.raises(DataError, match="labels of this part were not published"):
        read_moments(AnnotationFiles(folder / "moments/highlight_test_release.jsonl"), ())


def test_the_unified_file_says_the_same(folder, tmp_path):
    """Every kind comes back as it went in, and other content has another hash."""
    listed = read_captions(AnnotationFiles(folder / "didemo"), ["test_data.json"], lists=["test_list.txt"])
    asked = questions(folder / "questions/msrvtt_mc_test.json")
    moments = read_moments(AnnotationFiles(folder / "moments/highlight_val_release.jsonl"), ())
    readers = (
        lambda path: read_captions(AnnotationFiles(path), ()),
        lambda path: read_questions(AnnotationFiles(path), ()),
        lambda path: read_moments(AnnotationFiles(path), ()),
    )
    for records, read in zip((listed, asked, moments), readers, strict=True):
        path = tmp_path / "unified.json"
        path.write_text(to_json(records, "name", {"a.json": "0" * 64}))
        assert read(path) == records
        assert content_hash(read(path)) == content_hash(records)
        assert json.loads(path.read_text())["made_of"] == {"a.json": "0" * 64}
    assert content_hash(listed[1:]) != content_hash(listed)
    with pytest.raises(DataError, match="holds 'moments', expected 'captions'"):
        readers[0](path)
