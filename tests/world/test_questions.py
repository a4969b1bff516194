"""Questions have one right answer, and nothing but the clip tells which."""

from collections import Counter

import pytest

from vlm.world import questions, sample_scene
from vlm.world.clips import describe


def test_the_right_statement_is_true_and_the_others_are_false(reader):
    kinds = Counter()
    for split in ("train", "test", "combo"):
        for index in range(120):
            scene = sample_scene(split, 9, index)
            record = describe(scene)
            for question in questions(scene):
                judged = [reader(text).is_true(record) for text in question.statements]
                assert judged == [i == question.answer_index for i in range(len(judged))], question
                assert len(set(question.options)) == len(question.options) == len(question.statements)
                kinds[question.kind] += 1
    assert set(kinds) == {
        *(f"direction-{kind}" for kind in ("move", "zigzag", "circle", "spin")),
        *(
            "speed",
            "count-bounce",
            "count-blink",
            "colour",
            "digit",
            "actor",
            "still",
            "first",
            "last",
            "place",
        ),
    }


@pytest.fixture(scope="module")
def asked():
    return [question for index in range(2000) for question in questions(sample_scene("train", 31, index))]


def test_answers_are_balanced_within_each_kind_by_place_and_by_word(asked):
    places, words, choices = Counter(), Counter(), Counter()
    for question in asked:
        size = (question.kind, len(question.options))
        choices[size] += 1
        places[size, question.answer_index] += 1
        if question.kind not in ("actor", "still", "first", "last"):
            words[question.kind, question.answer] += 1
    for (kind, size), total in choices.items():
        spread = 4 * (total * (1 / size) * (1 - 1 / size)) ** 0.5
        for place in range(size):
            assert abs(places[(kind, size), place] - total / size) <= spread, (kind, size, place)
    for kind in {kind for kind, _ in words}:
        counts = {word: count for (k, word), count in words.items() if k == kind}
        total, fair = sum(counts.values()), 1 / len(counts)
        # scene keys fall into splits by hash, so a little unevenness is no accident of sampling
        allowed = 4 * (total * fair * (1 - fair)) ** 0.5 + 0.03 * total
        assert max(abs(count - total * fair) for count in counts.values()) <= allowed, (kind, counts)


def test_the_order_of_two_events_cannot_be_guessed_from_the_options(asked):
    firsts = Counter()
    for question in asked:
        if question.kind == "first":
            verbs = [option.split()[3] for option in question.options]
            if verbs[0] != verbs[1]:
                firsts[tuple(sorted(verbs)), verbs[question.answer_index] == min(verbs)] += 1
    leaning = sum(max(firsts[pair, True], firsts[pair, False]) for pair in {pair for pair, _ in firsts})
    total = sum(firsts.values())
    assert total > 150
    assert leaning / total < 0.65  # the larger of two fair counts is always a little over one half


def test_questions_are_a_pure_function():
    scene = sample_scene("val", 0, 3)
    assert questions(scene) == questions(scene)
