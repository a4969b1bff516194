"""Texts for the background bank: captions of a great many things, of which one library shows few.

Hits are graded against them, and search structures are measured by them: like queries, they share subjects.
"""

from __future__ import annotations

_PEOPLE = (
    "a surgeon", "two children", "an old man", "a chef", "a group of soldiers", "a woman in a red coat",
    "a football team", "a welder", "a bride", "a street musician", "a farmer", "three tourists",
    "a ballet dancer", "a fisherman", "a teacher", "a boxer", "a baby", "a mechanic", "a priest", "a jockey",
)  # fmt: skip
_DEEDS = (
    "stirs soup in a large pot", "repairs a bicycle wheel", "plays a violin", "throws a javelin",
    "paints a fence white", "kneels and prays", "folds a letter", "climbs a rope ladder",
    "pours molten metal", "blows out candles on a cake", "shears a sheep", "waves a flag",
    "assembles a bookshelf", "juggles three oranges", "reads a newspaper", "cuts hair with scissors",
)  # fmt: skip
_SCENES = (
    "a herd of elephants crosses a dusty river bed", "lava flows slowly into the sea",
    "a steam train leaves a snowy station", "a jellyfish drifts in dark water",
    "an owl turns its head on a branch", "a crane lifts a container onto a ship",
    "rain runs down the window of a bus", "a spider repairs its web at dawn",
    "a rocket rises from its launch pad", "bees crawl over a honeycomb",
    "a glacier breaks off into the water", "hot air balloons float over a valley",
    "a cat pushes a glass off a table", "a printing press turns out newspapers",
    "a whale breaches near a small boat", "a windmill turns behind a field of tulips",
    "traffic crawls through a tunnel at night", "a kite is caught in a tall tree",
    "a camel walks past an ancient temple", "an escalator moves with nobody on it",
    "a lightning bolt strikes a tower", "two goats fight on a steep rock",
    "a drawing of a horse is made with charcoal", "a bartender's hands shake a cocktail",
    "a chart of share prices is explained", "a tram turns at a crossing",
    "popcorn bursts in a machine", "a lighthouse shines through fog",
    "a chess game is played in a park", "a parade of drummers passes by",
    "wet clay is shaped on a potter's wheel", "a tractor ploughs a field followed by gulls",
)  # fmt: skip
_NUM_WORLD = 160


def texts_for(domain: str) -> tuple[str, ...]:
    """Return at least a hundred texts of what a model with this domain understands, always the same."""
    if domain == "digit-world":
        from vlm.world import caption, gallery

        return tuple(caption(scene) for scene in gallery("train", 77, _NUM_WORLD))
    # each person does some of the things: every text is another, no person or deed outweighs the rest
    count, step = len(_DEEDS), 5
    deeds = [
        f"{person} {_DEEDS[(step * number + turn * 3) % count]}"
        for number, person in enumerate(_PEOPLE)
        for turn in range(6)
    ]
    return (*deeds, *_SCENES)
