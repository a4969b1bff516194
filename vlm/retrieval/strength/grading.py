"""Grades for the hits of a text, by a calibration that is made when the first is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlm.retrieval.backends import Backend
from vlm.retrieval.strength import calibration as cache
from vlm.retrieval.strength.bank import TextBank
from vlm.retrieval.strength.calibration import Calibration
from vlm.types import Strength, TextFeatures

# what the head prefers among 8 scores nearly what it prefers among 48: measured on the digit world
_MATCHED = 8


class Grader:
    """Grades segments of one generation.

    Args:
        bank: The unrelated texts.
        backend: Searches the generation.
        alive: (rows,) bool, the segments that a search may return.
        folder: Where the calibration is kept; None if nowhere.
        rescore: Scores rows against a text again, as a search reranks, by row: from text, rows and their
            embedding scores; None without a matching head, or if the segments would have to be decoded again.
        known: A calibration that was kept elsewhere.
    """

    def __init__(
        self,
        bank: TextBank,
        backend: Backend,
        alive: np.ndarray,
        folder: Path | None,
        rescore: Callable[[TextFeatures, Sequence[int], Sequence[float]], dict[int, float]] | None,
        known: Calibration | None = None,
    ) -> None:
        self._bank, self._backend, self._alive = bank, backend, alive
        self._folder, self._rescore = folder, rescore
        self._kept = known
        self._calibration: Calibration | None = None
        self._lock = threading.Lock()

    def grade(self, scores: Sequence[float], reranked: Sequence[float | None]) -> list[Strength]:
        """Grade hits of a text.

        Args:
            scores: Their embedding scores.
            reranked: The scores by which they were reranked; None where they were not. If others were, a hit
                that was not is at best weak.
        """
        if not len(scores):
            return []
        with_head = any(score is not None for score in reranked)
        calibration = self._calibrated(with_head)
        wide = np.array(scores, np.float64)
        grades = calibration.grade(wide)
        if not with_head or not calibration.reranked:
            return grades
        again = calibration.grade_reranked(np.array(reranked, np.float64))
        capped: list[Strength] = ["weak" if grade == "strong" else grade for grade in grades]
        return [
            together if score is not None else alone
            for together, alone, score in zip(again, capped, reranked, strict=True)
        ]

    def bank_scores(self) -> list[float]:
        """Return the best embedding score of each unrelated text, searched now, whatever was kept."""
        if not self._alive.any():
            return []
        allowed = None if self._alive.all() else self._alive
        return [float(score) for score in self._backend.search(self._bank.embeddings(), 1, allowed)[0][:, 0]]

    def _calibrated(self, with_head: bool) -> Calibration:
        with_head = with_head and self._rescore is not None
        with self._lock:
            found, num_rows = self._calibration, int(np.count_nonzero(self._alive))
            if found is None:
                kept = self._kept if self._folder is None else cache.load(self._folder)
                found = kept if kept is not None and kept.fits(self._bank.key, num_rows) else None
            if found is None or (with_head and not found.reranked):
                found = self._measure(found, num_rows, with_head)
                if self._folder is not None:
                    cache.save(self._folder, found)
            self._calibration = found
            return found

    def _measure(self, known: Calibration | None, num_rows: int, with_head: bool) -> Calibration:
        count = min(_MATCHED if with_head else 1, num_rows)
        allowed = None if self._alive.all() else self._alive
        scores, rows = self._backend.search(self._bank.embeddings(), count, allowed)
        if known is None:
            best = tuple(float(score) for score in scores[:, 0])
            known = Calibration(bank=self._bank.key, num_rows=num_rows, scores=best)
        if not with_head or self._rescore is None:
            return known
        again = tuple(
            max(self._rescore(self._bank.features(number), found, own).values())
            for number, (found, own) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True))
        )
        return replace(known, reranked=again)
