"""Exit codes are a contract: one class each, and each class keeps its number."""

from __future__ import annotations

import pytest

from vlm import errors

CODES = {
    "VlmError": 1,
    "UsageError": 2,
    "RejectedItems": 3,
    "InvalidInput": 4,
    "ConfigError": 4,
    "DataError": 4,
    "CheckpointError": 4,
    "CapabilityError": 4,
    "KernelError": 4,
    "MissingExtra": 4,
    "IntegrityError": 5,
    "StoreError": 5,
    "NoSpaceError": 6,
    "BusyError": 75,
}


def test_every_class_has_its_code():
    classes = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.VlmError)
    }
    assert {name: value.exit_code for name, value in classes.items()} == CODES


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_interrupted_carries_its_signal(number, code):
    assert errors.Interrupted("stopped", number).exit_code == code


def test_interrupted_is_not_swallowed_by_code_that_skips_broken_items():
    def skip_broken_items():
        try:
            raise errors.Interrupted("stopped", 15)
        except Exception:
            return "skipped"

    with pytest.raises(errors.Interrupted, match="stopped"):
        skip_broken_items()


def test_missing_extra_says_how_to_install_it():
    error = errors.MissingExtra("faiss", "faiss-cpu", "the faiss backend")
    assert str(error).startswith("the faiss backend needs faiss")
    assert str(error).endswith("pip install 'videomamba-vlm[faiss-cpu]'")


def test_data_error_has_a_countable_reason():
    assert errors.DataError("clip.mp4: no video stream", "no-video").reason == "no-video"
    assert errors.DataError("clip.mp4: garbage").reason == "unreadable"
