"""How good a hit is: its score against the best scores that unrelated texts get in the same index."""

from vlm.retrieval.strength.bank import TextBank
from vlm.retrieval.strength.calibration import Calibration
from vlm.retrieval.strength.grading import Grader

__all__ = ["Calibration", "Grader", "TextBank"]
