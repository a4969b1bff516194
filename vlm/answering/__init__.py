"""Questions about indexed videos: find the moment that answers, choose an answer, show the evidence."""

from vlm.answering.evidence import decode_evidence, find_evidence
from vlm.answering.multiple_choice import Choices, choose, judge, state_choices

__all__ = ["Choices", "choose", "decode_evidence", "find_evidence", "judge", "state_choices"]
