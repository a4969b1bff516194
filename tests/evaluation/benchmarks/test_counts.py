"""The counts that the protocols pin, taken from the published files where they are at hand."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from vlm.data.annotations.benchmarks import AnnotationFiles, answer_coverage, read_answer_list, read_moments
from vlm.data.annotations.benchmarks.files import load_ids
from vlm.errors import DataError
from vlm.evaluation import load_protocol, protocol_files
from vlm.evaluation.benchmarks.reading import read_records, read_retrieval_set
from vlm.text.cleaning import clean


@pytest.fixture(scope="module")
def files(shared):
    if not (shared / "annotations").is_dir():
        pytest.skip(f"no {shared / 'annotations'}")
    return shared / "annotations"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("msrvtt-1ka", "msrvtt/MSRVTT_JSFUSION_test.csv"),
        ("msrvtt-1ka", "msrvtt/msrvtt_ret_test1k.json"),
        ("msrvtt-full", "msrvtt/mdmmt_msrvtt_mdata_test.json"),
        ("didemo", "didemo"),
        ("didemo", "didemo/tmass_didemo_test_label.csv"),
        ("activitynet", "activitynet"),
        ("lsmdc", "lsmdc"),
        ("msvd", "msvd"),
        ("msvd-first", "msvd"),
        ("activitynet-qa", "activitynet_qa"),
        ("qvhighlights", "qvhighlights"),
    ],
)
def test_published_files_hold_what_is_pinned(files, name, path):
    """And every file that was read is one whose hash the protocol knows."""
    protocol = load_protocol(name)
    found = read_records(protocol, files / path)
    assert protocol.expected is not None
    assert found.differences == []
    assert set(found.files.values()) <= {known.sha256 for known in protocol.known}


def test_the_known_hashes_are_of_files_at_hand(files):
    here = {path.name for path in files.rglob("*") if path.is_file()}
    for name in protocol_files():
        assert {known.name for known in load_protocol(name).known} <= here


def _positives(files, name, path, *overrides):
    data = read_retrieval_set(load_protocol(name, overrides), files / path, None)
    return data, data.positives.sizes


def _ceiling(positives, data):
    """What a model reaches under strict pairs if it ranks by the words alone: one in so many, by chance."""
    return float(np.mean(1 / positives))


def test_texts_that_stand_for_several_queries(files):
    data, sizes = _positives(files, "msrvtt-1ka", "msrvtt/MSRVTT_JSFUSION_test.csv", "positives=same-text")
    assert len({clean(text) for text, size in zip(data.queries, sizes, strict=True) if size > 1}) == 4
    assert int((sizes > 1).sum()) == 9
    assert 1 - _ceiling(sizes, data) == pytest.approx(0.005)
    data, sizes = _positives(
        files, "msrvtt-full", "msrvtt/mdmmt_msrvtt_mdata_test.json", "positives=same-text"
    )
    assert len({clean(text) for text, size in zip(data.queries, sizes, strict=True) if size > 1}) == 1465
    assert int((sizes > 1).sum()) == 6265
    assert 1 - _ceiling(sizes, data) == pytest.approx(0.077, abs=5e-4)
    _, strict = _positives(files, "msrvtt-1ka", "msrvtt/MSRVTT_JSFUSION_test.csv")
    assert strict.tolist() == [1] * 1000


def test_two_layouts_of_one_set_make_equal_cards_possible(files):
    table, listed = (
        read_retrieval_set(load_protocol("msrvtt-1ka"), files / "msrvtt" / name, None)
        for name in ("MSRVTT_JSFUSION_test.csv", "msrvtt_ret_test1k.json")
    )
    assert table.annotations_sha256 == listed.annotations_sha256
    assert (table.clip_ids, table.queries) == (listed.clip_ids, listed.queries)
    lists, joined = (
        read_retrieval_set(load_protocol("didemo"), files / "didemo" / name, None)
        for name in ("test_data.json", "tmass_didemo_test_label.csv")
    )
    assert lists.clip_ids == joined.clip_ids
    assert [text.split() for text in lists.queries] == [text.split() for text in joined.queries]


@pytest.mark.parametrize(
    ("name", "longer"),
    [("didemo", {32: 0.366}), ("activitynet", {32: 0.728, 50: 0.340, 64: 0.178})],
)
def test_words_of_a_paragraph(files, name, longer):
    data = read_retrieval_set(load_protocol(name), files / name, None)
    words = np.asarray([len(text.split()) for text in data.queries])
    assert {k: float((words > k).mean()) for k in longer} == pytest.approx(longer, abs=5e-4)


def test_traps_of_the_real_files(files):
    msvd = read_records(load_protocol("msvd"), files / "msvd")
    assert sum(len(set(row.captions)) for row in msvd.records) == 24033
    everything = json.loads((files / "msvd/captions_msvd.json").read_text())
    assert sum(name.startswith(("-", "_")) for name in everything) == 79
    anet = read_records(load_protocol("activitynet"), files / "activitynet")
    assert sum(name.startswith("v_-") for name in anet.videos) == 78
    assert sum(text.startswith(" ") for row in anet.records for text in row.captions) == 11638
    moments = read_moments(AnnotationFiles(files / "activitynet/2dtan_val.json"), ())
    assert (len(moments), len({moment.video for moment in moments})) == (17505, 4917)
    assert sum(moment.has_odd_window for moment in moments) == 134
    didemo = read_records(load_protocol("didemo"), files / "didemo")
    assert sum(name.endswith(".") for name in didemo.videos) == 27
    assert didemo.counts.captions == 3932
    rows = json.loads((files / "didemo/test_data.json").read_text())
    stems = Counter(name.rpartition(".")[0] for name in {row["video"] for row in rows})
    assert (len(stems), sum(stems.values()), sum(count > 1 for count in stems.values())) == (1004, 1037, 33)


def test_the_list_of_vatex(files):
    """Its captions were not at hand; its 1,500 names were."""
    names = load_ids(files / "vatex/test1k5_sec_list.txt")
    assert (len(names), sum(name.startswith(("-", "_")) for name in names)) == (1500, 67)


def test_coverage_of_the_answers_of_train(files):
    found = read_records(load_protocol("msrvtt-qa"), files / "msrvtt_qa/val.jsonl")
    known = read_answer_list(files / "msrvtt_qa/train_ans2label.json")
    assert (found.counts.questions, found.counts.videos, len(known)) == (12278, 497, 1500)
    assert answer_coverage(found.records, known) == pytest.approx(0.930, abs=5e-4)
    assert found.differences == ["videos: expected 2990, found 497", "questions: expected 72821, found 12278"]


def test_test_sets_of_other_papers_are_not_taken_for_the_protocols(files):
    """Known: all captions for 1k-A (R@1 3.1), MSVD as paragraphs (72.2 for 49.0), val_2 for val_1."""
    every = read_records(load_protocol("msrvtt-1ka"), files / "msrvtt/mdmmt_msrvtt_mdata_test.json")
    assert every.differences == [
        "videos: expected 1000, found 2990",
        "captions: expected 1000, found 59800",
        "queries: expected 1000, found 59800",
    ]
    joined = read_records(load_protocol("msvd", ("captions=joined",)), files / "msvd")
    assert joined.differences == ["queries: expected 27763, found 670"]
    first = read_records(load_protocol("msvd", ("captions=first",)), files / "msvd")
    assert first.differences == joined.differences
    with pytest.raises(DataError, match="32 of the 4917 videos of ce_val_1_list.txt have no captions"):
        read_records(load_protocol("activitynet"), files / "activitynet/2dtan_test.json")
