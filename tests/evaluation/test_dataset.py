"""How many videos may be missing, which all programs that measure a model ask alike."""

import pytest

from vlm.errors import InvalidInput
from vlm.evaluation.dataset import refuse_missing

GONE = [(f"v{number}", "missing") for number in range(4)]


@pytest.mark.parametrize(
    ("count", "allowed", "is_refused"),
    [
        (0, False, False),
        (1, False, True),
        (1, 0, True),
        (1, 1, False),
        (2, 1, True),
        (4, 4, False),
        (4, True, False),
    ],
)
def test_none_all_or_so_many(count, allowed, is_refused):
    if is_refused:
        with pytest.raises(InvalidInput, match=rf"^{count} of 9 clips cannot be read \(v0: missing"):
            refuse_missing(GONE[:count], 9, allowed)
    else:
        refuse_missing(GONE[:count], 9, allowed)


def test_the_first_are_named_and_the_rest_counted():
    with pytest.raises(InvalidInput, match=r"4 of 4 videos .*v2: missing and 1 more\)"):
        refuse_missing(GONE, 4, 3, "videos")
