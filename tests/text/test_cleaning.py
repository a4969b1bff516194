import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.text import clean, join_statement


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog, running!", "a mans dog running"),
        ('"Left-to-right" (fast) and/or slow?', "left to right fast and or slow"),
        ("<person> opens a door; closes it: #1 *two* ~3.", "person opens a door closes it 1 two 3"),
        ("  many \t spaces\n\nhere  ", "many spaces here"),
        ("ÉTÉ à Paris", "été à paris"),
        ("...", ""),
    ],
)
def test_the_reference_rule(text, expected):
    assert clean(text) == expected


@given(st.text(max_size=200))
def test_cleaning_twice_is_cleaning_once_but_for_what_hyphens_joined(text):
    once = clean(text)
    assert clean(once) == once or "<person>" in once or "İ" in text
    assert not set(once) & set(",.'!?\"()*#:;~-/") and once == once.strip()


def test_a_statement_is_the_question_then_the_candidate():
    assert join_statement(" What moves? ", " a red three ") == "What moves? a red three"
    assert join_statement("", "a red three") == "a red three"
