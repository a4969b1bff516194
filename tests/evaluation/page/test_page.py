"""A page shows the numbers of its card, only those, and nothing that a caption or a name could smuggle in."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

from vlm.evaluation import MatrixFiles, evaluate_scores, read_card
from vlm.evaluation.page import render_page
from vlm.evaluation.page.markup import Markup, element, join
from vlm.evaluation.protocol import BootstrapSettings
from vlm.evaluation.runner import RunOptions, evaluate_model
from vlm.evaluation.scores.corrections import Corrections

HOSTILE = (
    """</title></style><script>alert(1)</script><img src=x onerror="alert(2)"> & "quoted" 'single' ]]>"""
)


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: elements, exact numbers with what is shown of them, texts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.numbers, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "data":
            self.numbers.append([float(dict(attributes)["value"]), ""])

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "data":
            self.numbers[-1][1] += text
        if self.open and self.open[-1] != "style":
            self.texts.append(text)

    @property
    def text(self):
        return "".join(self.texts)

    def points(self):
        return [
            (float(attributes["data-x"]), float(attributes["data-y"]))
            for tag, attributes in self.elements
            if tag == "circle"
        ]

    def bars(self, group):
        return [
            int(attributes["data-count"])
            for tag, attributes in self.elements
            if tag == "rect" and attributes["class"] == f"bar s{group}"
        ]


@pytest.fixture
def card(toy, data, protocol, load):
    options = RunOptions(frames_curve=(1, 8))
    corrections = Corrections(dual_softmax=True)
    return evaluate_model(
        toy("bag", head="order"), data, protocol, load, options=options, corrections=corrections
    )


def _figures(section):
    """Return every ``value``, ``low`` and ``high`` below a section."""
    if not isinstance(section, dict):
        return set()
    own = {section[key] for key in ("value", "low", "high") if isinstance(section.get(key), float)}
    return own.union(*map(_figures, section.values()))


def test_every_figure_of_the_card_is_on_the_page_as_it_is(card):
    page = Page(render_page(card))
    assert page.open == []
    exact = {value for value, _ in page.numbers}
    for name in ("results", "twins", "twin_chance", "minimal_pairs", "ceilings"):
        assert _figures(card[name]) <= exact, name
    allowed = _figures(card) | set(card["cost"].values())
    for entry in (*card["hubness"]["most_frequent"], card["hubness"]):
        allowed |= {value for value in entry.values() if isinstance(value, (int, float))}
    for example in (*card["examples"]["best"], *card["examples"]["worst"]):
        allowed |= {example["rank"], example["right"]["score"], example["first"]["score"]}
    allowed |= {value for section in ("data", "protocol") for value in card[section].values()
                if isinstance(value, float)}  # fmt: skip
    assert exact <= allowed
    for value, shown in page.numbers:
        rounded = re.search(r"-?[\d.]+(?:e-?\d+)?$", shown)[0]
        digits = len(rounded.partition(".")[2])
        assert any(abs(float(rounded) - scale * value) <= 0.5001 * 10**-digits for scale in (1, 100)), shown


def test_plots_show_the_card(card):
    page = Page(render_page(card))
    expected = []
    for kinds in card["recall_curve"].values():
        for curve in kinds.values():
            expected += list(zip(curve["k"], curve["recall"], strict=True))
    for direction in ("query_to_item", "item_to_query"):
        for point in card["frames_curve"]["points"]:
            expected.append((point["frames"], point["results"][direction]["itc"]["recall@1"]["value"]))
    expected += [
        (point["frames"], point["twins"]["direction"]["value"]) for point in card["frames_curve"]["points"]
    ]
    assert sorted(page.points()) == sorted(expected)
    assert page.bars(0) == card["histogram"]["negatives"]
    assert page.bars(1) == card["histogram"]["positives"]


def test_the_curve_passes_through_the_results(card):
    for direction, kinds in card["recall_curve"].items():
        for kind, curve in kinds.items():
            at = dict(zip(curve["k"], curve["recall"], strict=True))
            for k in (1, 5, 10):
                if k in at and f"recall@{k}" in card["results"][direction][kind]:
                    assert at[k] == card["results"][direction][kind][f"recall@{k}"]["value"]
            assert curve["k"][-1] == (6 if kind == "itm@6" else 20)


def test_warnings_are_on_the_page(card):
    page = Page(render_page(card))
    assert "leakage: unchecked" in page.text
    assert "dsl is transductive" in page.text
    assert "tied queries, text to video, itc: 20" in page.text
    assert "not above chance" not in page.text


def test_nothing_above_chance_is_said_so(toy, data, protocol, load):
    card = evaluate_model(toy("nothing", capabilities=("search",)), data, protocol, load)
    assert "text to video, itc: R@1 is not above chance" in Page(render_page(card)).text


def test_hostile_words_stay_words(toy, clips, scenes, data, protocol, load):
    """As caption, name of a clip, model, control, tier and reason, and in the cards of others."""
    model = toy("order")
    model.row = {f"{HOSTILE} {text}": row for text, row in model.row.items()}
    model.name = HOSTILE
    hostile = dataclasses.replace(
        data,
        queries=tuple(f"{HOSTILE} {text}" for text in data.queries),
        clip_ids=tuple(f"{HOSTILE} {name}" for name in data.clip_ids),
        tiers=(HOSTILE,) * len(data.queries),
    )
    options = RunOptions(frames_curve=(8,))
    card = evaluate_model(model, hostile, protocol, load, source=HOSTILE, options=options)
    card["published"] = card["deviations"] = [HOSTILE]
    card["controls"][HOSTILE] = {**card["controls"]["first-frame"], "verdict": HOSTILE}
    card["frames_curve"]["rule"] = HOSTILE
    card["protocol"]["name"] = HOSTILE
    card["data"]["missing"] = [{"clip": HOSTILE, "reason": HOSTILE}]
    before = copy.deepcopy(card)
    text = render_page(card, {data.clip_ids[0]: "data:image/jpeg;base64,AAAA"})
    page = Page(text)
    assert page.open == []
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "iframe", "link", "object", "a"})
    assert [
        attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)
    ] == []
    assert page.text.count("<script>alert(1)</script>") > 20
    assert card == before


def test_nothing_is_fetched(card):
    text = render_page(card, {card["examples"]["best"][0]["right"]["name"]: "data:image/jpeg;base64,AAAA"})
    page = Page(text)
    sources = [attributes["src"] for _, attributes in page.elements if "src" in attributes]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"vlm eval[^<]*", "", text))
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def _matrix_card(tmp_path, scores, kind="itc", captions=None):
    np.save(tmp_path / "scores.npy", scores)
    (tmp_path / "positives.json").write_text(json.dumps([[i] for i in range(len(scores))]))
    files = MatrixFiles(kind=kind)
    if captions:
        (tmp_path / "captions.json").write_text(json.dumps(captions))
        files = MatrixFiles(kind=kind, captions=tmp_path / "captions.json")
    paths = tmp_path / "scores.npy", tmp_path / "positives.json"
    return evaluate_scores(*paths, files, bootstrap=BootstrapSettings(resamples=100))


def test_a_matrix_without_videos_has_what_applies(tmp_path):
    random = np.random.default_rng(0)
    scores = random.standard_normal((30, 30)) + 2 * np.eye(30)
    card = _matrix_card(tmp_path, scores, captions=[f"caption {i}" for i in range(30)])
    page = Page(render_page(card))
    titles = {
        text for text in page.texts if text in ("Hubs", "Examples", "Plots", "Beside it", "Data", "Leakage")
    }
    assert titles == {"Hubs", "Examples", "Plots"}
    assert "item 3" in page.text
    assert card["examples"]["worst"][0]["caption"] in page.text
    assert "img" not in {tag for tag, _ in page.elements}
    for section in ("frames_curve", "leakage", "cost"):
        assert section not in card


def test_small_and_reranked_matrices_lack_parts_instead_of_showing_empty_ones(tmp_path):
    small = _matrix_card(tmp_path, np.eye(2))
    assert "hubness" not in small
    assert "Hubs" not in Page(render_page(small)).texts
    single = _matrix_card(tmp_path, np.eye(1))
    assert single["examples"]["worst"] == []
    assert "Examples" not in Page(render_page(single)).texts
    scores = np.full((20, 20), -100.0)
    scores[:, :5] = np.random.default_rng(0).random((20, 5))
    reranked = _matrix_card(tmp_path, scores, "itm@5")
    assert not {"histogram", "hubness", "examples"} & set(reranked)
    page = Page(render_page(reranked))
    assert not {"Hubs", "Examples"} & set(page.texts)
    assert {x for x, _ in page.points()} == {1, 2, 3, 5}


def test_examples_by_hand(tmp_path):
    """Ranks 1, 1, 2 and 3 of four; of equal ranks the larger margin is the better."""
    scores = np.array([[9, 1, 1, 1], [4, 5, 1, 1], [3, 1, 2, 1], [5, 4, 4, 4]], np.float64)
    card = _matrix_card(tmp_path, scores)
    best, worst = card["examples"]["best"], card["examples"]["worst"]
    assert [(entry["query"], entry["rank"]) for entry in best] == [(0, 1.0), (1, 1.0)]
    assert [(entry["query"], entry["rank"]) for entry in worst] == [(3, 3.0), (2, 2.0)]
    assert worst[1]["first"] == {"item": 0, "score": 3.0}
    assert worst[1]["right"] == {"item": 2, "score": 2.0}


def test_an_older_card_has_a_page_too(root):
    card = read_card(root / "eval" / "results" / "world-demo.json")
    assert "Examples" in Page(render_page(card)).texts
    for later in (
        "kinds",
        "duplicates",
        "recall_curve",
        "histogram",
        "examples",
        "hubness",
        "minimal_pairs",
        "leakage",
        "deviations",
        "published",
    ):
        card.pop(later, None)
    page = Page(render_page(card))
    assert f"{100 * card['results']['query_to_item']['itc']['recall@1']['value']:.1f}" in page.text
    assert "Examples" not in page.texts


def test_markup_escapes_all_but_itself():
    assert element("p", "<b>", Markup("<i>x</i>"), 3, title='"<') == '<p title="&quot;&lt;"><b></p>'.replace(
        "<b>", "&lt;b&gt;<i>x</i>3"
    )
    assert join("a<b", Markup("<br>")) == "a&lt;b<br>"
    assert isinstance(join(), Markup)
