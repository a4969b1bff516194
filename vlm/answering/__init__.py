"""Questions about indexed videos: find the moment that answers, choose an answer, show the evidence."""

from vlm.answering.evidence import find_evidence
from vlm.answering.multiple_choice import Choices, choose

__all__ = ["Choices", "choose", "find_evidence"]
