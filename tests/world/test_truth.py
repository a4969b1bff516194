"""Captions mean what they say: words, read by an independent reader, against structured facts."""

import numpy as np
import pytest

from vlm.world import caption, facts, is_true, questions, sample_scene, templates, truth_matrix, vocabulary
from vlm.world.captions import MAX_WORDS
from vlm.world.clips import describe


@pytest.fixture(scope="module")
def scenes():
    simple = [sample_scene("train", 5, index) for index in range(150)]
    return simple + [sample_scene(split, 5, i) for split in ("val", "test", "combo") for i in range(50)]


def test_every_wording_is_true_of_its_own_scene(scenes, reader):
    for scene in scenes[::3]:
        record = describe(scene)
        for template in (*templates("train"), *templates("val"), *templates("test")):
            assert reader(caption(scene, template)).is_true(record), caption(scene, template)


def test_truth_matrix_equals_reading_every_caption_against_every_clip(scenes, reader):
    from vlm.world import variants

    rng = np.random.default_rng(0)
    others = [other for scene in scenes[:60] for other in variants(scene, rng).values()]
    shown = scenes + [scene.backwards() for scene in scenes] + others
    records = [describe(scene) for scene in shown]
    truth = truth_matrix(scenes, shown)
    for row, scene in enumerate(scenes):
        read = reader(caption(scene))
        assert [read.is_true(record) for record in records] == truth[row].tolist(), caption(scene)
    assert truth.sum() > len(scenes)  # some captions are true of more than their own clip


def test_truth_matrix_equals_one_by_one(scenes):
    some = scenes[:40]
    truth = truth_matrix(some, some)
    for row, scene in enumerate(some):
        assert [is_true(facts(scene), other) for other in some] == truth[row].tolist()


def test_no_clips_give_an_empty_matrix(scenes):
    assert truth_matrix([], scenes[:2]).shape == (0, 2)
    assert truth_matrix(scenes[:2], []).shape == (2, 0)


def test_words_come_from_the_closed_vocabulary_and_captions_stay_short(scenes):
    known = set(vocabulary())
    assert sorted(known) == vocabulary() and all(word == word.lower() for word in known)
    for scene in scenes:
        said = [caption(scene, template) for template in templates(scene.split)]
        assert max(len(text.split()) for text in said) <= MAX_WORDS
        said += [t for q in questions(scene) for t in (q.text, *q.options, *q.statements)]
        for text in said:
            assert set(text.split()) <= known, text
            assert text == " ".join(text.split())


def test_templates_are_held_out_but_their_words_are_not():
    train, val, test = (set(templates(split)) for split in ("train", "val", "test"))
    assert not train & val and not train & test and not val & test
    assert len(train) + len(val) + len(test) == 72
    assert templates("combo") == templates("test")
    for place in range(5):
        every = {template[place] for template in train | val | test}
        assert {template[place] for template in train} == every


def test_caption_is_fixed_without_rng_and_varies_with_it(scenes):
    scene = next(s for s in scenes if len(s.events) > 1)
    assert caption(scene) == caption(scene)
    rng = np.random.default_rng(1)
    assert len({caption(scene, rng=rng) for _ in range(30)}) > 3
