"""Claims about reels, in pairs of which one is true: who was there, and who came first.

Who was there is asked of what one of two reels shows and the other does not. In a group of two and their
mirrors every claim is as often true as false: who does not look at the reel is right in exactly half.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from vlm.world.chapters.reels import Atom, Reel, sample_reels, sampled
from vlm.world.splits import SPLITS

Kind = Literal["presence", "order"]
KINDS: tuple[Kind, ...] = ("presence", "order")

_KEY = 20261202


class ClaimPair(NamedTuple):
    """Two claims about a reel, of which the first is true and the second false.

    Attributes:
        kind: ``presence`` (this is there, not that) or ``order`` (one then the other, not vice versa).
        first: The atom that is there, or that comes first.
        second: The atom that is not there, or that comes later.
    """

    kind: Kind
    first: Atom
    second: Atom

    @property
    def texts(self) -> tuple[str, str]:
        """The true claim and the false one, in words that captions use."""
        first, second = self.first.words, self.second.words
        if self.kind == "presence":
            return first, second
        return f"{first} then {second}", f"{second} then {first}"


class AskedReel(NamedTuple):
    """A reel and the claims about it."""

    reel: Reel
    pairs: tuple[ClaimPair, ...]


def claims_of(reel: Reel, other: Reel, count: int, rng: np.random.Generator) -> tuple[ClaimPair, ...]:
    """Return ``count`` pairs of each kind about a reel; what is not there is what ``other`` shows alone.

    The same twice only where a reel is too short for ``count`` different ones.
    """
    return (*_presence(reel, other, count, rng), *_order(reel, count, rng))


def asked_groups(split: str, seed: int, count: int, pairs: int = 8) -> list[tuple[AskedReel, ...]]:
    """Return ``count`` groups of four reels: one of a pair, its mirror, the other, and its mirror.

    Args:
        split: ``train``, ``val`` or ``test``.
        seed: Of the stream.
        count: Groups.
        pairs: Pairs of each kind about each reel; over a group each claim is as often true as false.
    """
    groups = []
    for index in range(count):
        one, other = sample_reels(split, seed, index)
        rng = stream(split, seed, index)
        here = _presence(one, other, pairs, rng)
        group: list[AskedReel] = []
        for reel, presence in ((one, here), (other, _turned(here))):
            order = _order(reel, pairs, rng)
            group.append(AskedReel(reel, presence + order))
            group.append(AskedReel(reel.mirror(), presence + _turned(order)))
        groups.append(tuple(group))
    return groups


def _presence(reel: Reel, other: Reel, count: int, rng: np.random.Generator) -> tuple[ClaimPair, ...]:
    here = [atom for atom in reel.atoms if atom not in other.atoms]
    there = [atom for atom in other.atoms if atom not in reel.atoms]
    couples = list(product(here, there))
    return tuple(ClaimPair("presence", *couples[n]) for n in _some(len(couples), count, rng))


def _order(reel: Reel, count: int, rng: np.random.Generator) -> tuple[ClaimPair, ...]:
    couples = list(combinations(reel.atoms, 2))
    return tuple(ClaimPair("order", *couples[n]) for n in _some(len(couples), count, rng))


def _turned(pairs: tuple[ClaimPair, ...]) -> tuple[ClaimPair, ...]:
    return tuple(pair._replace(first=pair.second, second=pair.first) for pair in pairs)


def _some(size: int, count: int, rng: np.random.Generator) -> list[int]:
    chosen: list[int] = rng.choice(size, size=count, replace=size < count).tolist()
    return chosen


def stream(split: str, seed: int, index: int) -> np.random.Generator:
    """Return the random numbers by which claims about a pair of reels are drawn."""
    keys = [_KEY, SPLITS.index(split), seed, index]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(keys)))


def truth_of(asked: Sequence[AskedReel]) -> npt.NDArray[np.bool_]:
    """Return (reels, claims) whether each claim is true of each reel, a pair's true and false one in turn."""
    places = [{atom: place for place, atom in enumerate(item.reel.atoms)} for item in asked]
    columns = []
    for item in asked:
        for kind, first, second in item.pairs:
            if kind == "presence":
                columns += [[first in known for known in places], [second in known for known in places]]
            else:
                found = [(known.get(first), known.get(second)) for known in places]
                columns.append([a is not None and b is not None and a < b for a, b in found])
                columns.append([a is not None and b is not None and a > b for a, b in found])
    return np.ascontiguousarray(np.array(columns, dtype=bool).T)


def ceiling(asked: AskedReel, num_frames: int, *, ordered: bool = True) -> npt.NDArray[np.float64]:
    """Return how often an oracle is right that sees the sampled frames alone, (pairs,) in {0, 0.5, 1}.

    It reads every frame without fault, knows the rules by which reels and claims are made, and even which
    scenes it did not see. It guesses where it knows nothing; of an atom that it did not see it says that it
    was where more of the scenes lie that it did not see.

    Args:
        asked: Reel and claims.
        num_frames: Frames that are sampled evenly.
        ordered: Whether it knows the order of the frames, which a bag of frames does not.
    """
    atoms = asked.reel.atoms
    seen = sorted(set(sampled(asked.reel, num_frames)[0].tolist()))
    unseen = [place for place in range(len(atoms)) if place not in seen]
    known = {atoms[place]: place for place in seen}
    return np.array([_chance(pair, known, unseen, atoms, ordered) for pair in asked.pairs])


def _chance(
    pair: ClaimPair, known: dict[Atom, int], unseen: Sequence[int], atoms: Sequence[Atom], ordered: bool
) -> float:
    if pair.kind == "presence":
        return 1.0 if pair.first in known else 0.5
    if not ordered or not (pair.first in known or pair.second in known):
        return 0.5
    if pair.first in known and pair.second in known:
        return 1.0
    seen_first = pair.first in known
    place = known[pair.first if seen_first else pair.second]
    hidden = atoms.index(pair.second if seen_first else pair.first)
    before = sum(other < place for other in unseen)
    after = len(unseen) - before
    if before == after:
        return 0.5
    return float((hidden > place) == (after > before))
