"""Cards from score matrices: files as users bring them, kinds of score, both directions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlm.errors import InvalidInput, UsageError
from vlm.evaluation import MatrixFiles, evaluate_scores
from vlm.evaluation.protocol import BootstrapSettings

QUICK = BootstrapSettings(resamples=100)


@pytest.fixture
def files(tmp_path):
    def write(scores, positives):
        np.save(tmp_path / "scores.npy", scores)
        text = positives if isinstance(positives, str) else json.dumps(positives)
        (tmp_path / "positives.json").write_text(text)
        return tmp_path / "scores.npy", tmp_path / "positives.json"

    return write


def test_several_captions_a_clip_in_both_directions(files):
    """Four captions of two clips and one clip that nobody describes."""
    scores = np.array([[9, 1, 5], [5, 6, 7], [1, 8, 0], [9, 8, 7]], np.float32)
    card = evaluate_scores(*files(scores, [[0], [0], [1], [1]]), bootstrap=QUICK)
    forward = card["results"]["query_to_item"]["itc"]
    assert forward["recall@1"]["value"] == 0.5
    assert forward["mean_rank"]["value"] == pytest.approx((1 + 3 + 1 + 2) / 4)
    assert forward["median_rank"]["value"] == 1.5
    backward = card["results"]["item_to_query"]["itc"]
    # clip 0: caption 0 (9) ties with caption 3, which is not its own; clip 1: caption 2 and 3 tie, both right
    assert backward["recall@1"]["value"] == pytest.approx((0.5 + 1) / 2)
    assert card["ties"]["item_to_query"]["itc"] == 1
    assert "recall@5" not in forward  # of three items
    assert (card["protocol"]["num_queries"], card["protocol"]["num_items"]) == (4, 3)
    assert len(card["per_query"]["item_to_query"]["itc"]["above"]) == 2
    assert card["per_query"]["query_to_item"]["itc"]["groups"] == [0, 0, 1, 1]


def test_a_collapsed_model_scores_one_over_n(files):
    card = evaluate_scores(*files(np.zeros((50, 50), np.int8), [[i] for i in range(50)]), bootstrap=QUICK)
    for direction in ("query_to_item", "item_to_query"):
        block = card["results"][direction]["itc"]
        assert block["recall@1"]["value"] == pytest.approx(1 / 50)
        assert block["recall@10"]["value"] == pytest.approx(0.2)
        assert block["median_rank"]["value"] == 25.5
        assert {name: entry["value"] for name, entry in block.items()} == pytest.approx(
            {name: entry["value"] for name, entry in card["chance"][direction].items()}
        )
        assert card["ties"][direction]["itc"] == 50


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "float64"])
def test_types(files, dtype):
    scores = np.eye(20).astype(dtype)
    card = evaluate_scores(*files(scores, [[i] for i in range(20)]), bootstrap=QUICK)
    assert card["results"]["query_to_item"]["itc"]["recall@1"]["value"] == 1.0
    assert card["model"]["dtype"] == dtype


def test_reranked_scores_are_only_what_k_allows(files):
    """-100 where nothing was scored: no R@10 of three candidates, no median, no other direction."""
    random = np.random.default_rng(0)
    scores = np.full((30, 30), -100, np.float32)
    for row in scores:
        row[random.choice(30, 3, replace=False)] = random.standard_normal(3)
    card = evaluate_scores(
        *files(scores, [[i] for i in range(30)]), MatrixFiles(kind="itm@3"), bootstrap=QUICK
    )
    assert list(card["results"]) == ["query_to_item"]
    assert list(card["results"]["query_to_item"]) == ["itm@3"]
    assert set(card["results"]["query_to_item"]["itm@3"]) == {"recall@1"}
    rank_known = scores[np.arange(30), np.arange(30)] > -100
    best = scores.argmax(axis=1) == np.arange(30)
    assert card["results"]["query_to_item"]["itm@3"]["recall@1"]["value"] == pytest.approx(
        (best & rank_known).mean()
    )
    assert card["ties"]["query_to_item"]["itm@3"] == 0  # fill values do not tie


@pytest.mark.parametrize("kind", ["itm", "itm@0", "itm@-1", "itm@x", "sim", ""])
def test_unknown_kinds_are_refused(files, kind):
    with pytest.raises(UsageError, match="kind of score"):
        evaluate_scores(*files(np.eye(3), [[0], [1], [2]]), MatrixFiles(kind=kind))


@pytest.mark.parametrize("kind", ["dsl", "bank"])
def test_kinds_keep_their_names(files, kind):
    card = evaluate_scores(*files(np.eye(3), [[0], [1], [2]]), MatrixFiles(kind=kind), bootstrap=QUICK)
    assert list(card["results"]["query_to_item"]) == list(card["results"]["item_to_query"]) == [kind]


@pytest.mark.parametrize(
    ("scores", "positives", "message"),
    [
        (np.eye(3), [[0], [1]], "expected 3 lists.*got 2"),
        (np.eye(3), [[0], [1], [3]], "column 3 is outside 0..2"),
        (np.eye(3), [[0], [1], []], "query 2.*non-empty"),
        (np.eye(3), [[0], [1], [-1]], "outside"),
        (np.eye(3), [[0], [1], [1.5]], "query 2"),
        (np.eye(3), [[0], [1], ["2"]], "query 2"),
        (np.eye(3), [0, 1, 2], "list of columns for each query"),
        (np.eye(3), {"0": [0]}, "JSON list"),
        (np.eye(3), "{", "expected JSON"),
        (np.eye(3)[0], [[0]], "got shape"),
        (np.eye(3) * np.nan, [[0], [1], [2]], r"9 of 9 scores are not finite.*\(0, 0\)"),
        (np.eye(3, dtype=np.complex64), [[0], [1], [2]], "real scores"),
        (np.zeros((0, 3)), [], "no query"),
        (np.zeros((2, 0)), [[0], [0]], "outside"),
    ],
)
def test_bad_files_are_refused(files, scores, positives, message):
    with pytest.raises(InvalidInput, match=message):
        evaluate_scores(*files(scores, positives), bootstrap=QUICK)


def test_half_precision_overflow_is_found(files):
    with pytest.raises(InvalidInput, match="1 of 9 scores are not finite"), np.errstate(over="ignore"):
        evaluate_scores(*files((np.eye(3) + np.diag([1e6, 0, 0])).astype(np.float16), [[0], [1], [2]]))


def test_pickles_and_torn_files_are_refused(files, tmp_path):
    _, positives = files(np.eye(3), [[0], [1], [2]])
    np.save(tmp_path / "objects.npy", np.array([[{}]], object), allow_pickle=True)
    torn = tmp_path / "torn.npy"
    torn.write_bytes((tmp_path / "scores.npy").read_bytes()[:-5])
    for path in (tmp_path / "objects.npy", torn, tmp_path / "none.npy", positives):
        with pytest.raises(InvalidInput, match=r"expected a NumPy .npy file"):
            evaluate_scores(path, positives)


def test_a_full_matrix_is_no_reranked_one(files):
    """R@1 over all items is not R@1 of the best three of another score, and must not be called so."""
    scores = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    right = [[i] for i in range(5)]
    with pytest.raises(InvalidInput, match="row 0 holds 8 scores above its lowest, but itm@3 scores 3 items"):
        evaluate_scores(*files(scores, right), MatrixFiles(kind="itm@3"))
    card = evaluate_scores(*files(scores, right), MatrixFiles(kind="itm@9"), bootstrap=QUICK)
    assert list(card["results"]) == ["query_to_item"]
    assert "median_rank" in card["results"]["query_to_item"]["itm@9"]  # nine of nine: every rank exists


def test_rows_with_fewer_scores_than_k(files):
    """A positive on the fill value was not scored: it is no hit at k, and never a tie of fill values."""
    scores = np.full((2, 20), -100, np.float32)
    scores[0, [3, 5]] = [2.0, 1.0]
    scores[1, :12] = np.arange(12.0)
    kind = MatrixFiles(kind="itm@12")
    card = evaluate_scores(*files(scores, [[19], [11]]), kind, recall_at=(1, 10, 12), bootstrap=QUICK)
    block = card["results"]["query_to_item"]["itm@12"]
    assert [block[f"recall@{k}"]["value"] for k in (1, 10, 12)] == [0.5, 0.5, 0.5]
    assert "ndcg@10" not in block  # the first row's places three to ten hold nothing
    scores[0, :12] = np.arange(12.0)
    card = evaluate_scores(*files(scores, [[19], [11]]), kind, bootstrap=QUICK)
    assert card["results"]["query_to_item"]["itm@12"]["ndcg@10"]["value"] == 0.5
    assert not {"median_rank", "mean_rank", "map"} & set(card["results"]["query_to_item"]["itm@12"])


@pytest.mark.parametrize("side", ["t2v", "v2t"])
@pytest.mark.parametrize("k", [3, 128])
def test_official_reranked_matrices(files, fixtures, side, k):
    """The official file with its -100 fill, as a user would bring it; of k = 3 only R@1 is a rank."""
    from safetensors import safe_open

    with safe_open(fixtures / "umt_retrieval.safetensors", "numpy") as file:
        metrics = json.loads(file.metadata()["config"])["metrics"][f"k{k}/rerank"]
        scores = file.get_tensor(f"k{k}/{side}_scores_rerank")
    kind = f"itm@{k}"
    card = evaluate_scores(*files(scores, [[i] for i in range(6)]), MatrixFiles(kind=kind), bootstrap=QUICK)
    block, name = card["results"]["query_to_item"][kind], "img" if side == "t2v" else "txt"
    for depth in (1,) if k == 3 else (1, 5):
        assert round(100 * block[f"recall@{depth}"]["value"], 2) == metrics[f"{name}_r{depth}"]
    if k == 3:
        assert set(block) == {"recall@1"}
    else:
        assert {"median_rank", "mean_rank", "map"} <= set(block)
