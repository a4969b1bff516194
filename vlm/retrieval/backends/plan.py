"""Which search structure serves how many vectors, and how far it looks; the numbers were measured.

Up to `FLAT_ROWS` every vector is compared. Beyond, a vector is a code of 4 bits for every four dimensions (of
512), in lists of which some are looked through, and the best are scored again from the vector log.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["flat", "lists"]

FLAT_ROWS = 50_000
# a structure is trained anew once this many times the rows are in it
MAX_GROWTH = 4
_MAX_SUBVECTORS = 128
_MAX_LISTS = 65_536
_DEPTHS = (100, 300, 1000, 3000)
# what looking at one code, and scoring one stored vector again, takes in microseconds on one core
_CODE_US, _RESCORE_US = 0.006, 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A structure and how far it looks.

    Attributes:
        kind: ``flat`` compares everything, ``lists`` is IVF with product quantisation.
        num_lists: How many lists there are; 0 for ``flat``, as all that follows.
        num_subvectors: What a vector is cut into before each piece becomes 4 bits.
        breadth: Lists that are looked through.
        depth: Candidates scored again by their stored vectors, at least.
    """

    kind: Kind
    num_lists: int = 0
    num_subvectors: int = 0
    breadth: int = 0
    depth: int = 0

    def cost_us(self, num_rows: int) -> float:
        """Return about how long a query takes; to choose between settings alike on every machine."""
        return self.breadth / self.num_lists * num_rows * _CODE_US + self.depth * _RESCORE_US


def kind_for(num_rows: int) -> Kind:
    """Return the kind of structure that serves a number of rows."""
    return "flat" if num_rows <= FLAT_ROWS else "lists"


def plan_for(num_rows: int, dim: int, kind: Kind | None = None) -> Plan:
    """Return a structure for some vectors, before it is measured how far it has to look."""
    if (kind or kind_for(num_rows)) == "flat":
        return Plan(kind="flat")
    num_lists = 2 ** round(math.log2(max(1.0, math.sqrt(num_rows))))
    pieces = max(count for count in range(1, min(dim, _MAX_SUBVECTORS) + 1) if dim % count == 0)
    return Plan(kind="lists", num_lists=min(num_lists, _MAX_LISTS), num_subvectors=pieces)


def settings_of(plan: Plan, num_rows: int) -> list[Plan]:
    """Return how far a structure of lists may look, the cheapest first."""
    breadths = [2**power for power in range(plan.num_lists.bit_length()) if 2**power >= plan.num_lists // 64]
    settings = [
        dataclasses.replace(plan, breadth=breadth, depth=min(depth, num_rows))
        for breadth in breadths
        for depth in _DEPTHS
    ]
    return sorted(settings, key=lambda setting: setting.cost_us(num_rows))
