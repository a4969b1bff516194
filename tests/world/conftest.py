"""Two independent judges: one reads pixels alone, one reads words; neither shares code with ``vlm.world``."""

from itertools import combinations, product

import numpy as np
import pytest

from vlm.world.clips import freeze

# what the words mean to a viewer: hue in degrees
HUES = {"red": 1, "orange": 32, "yellow": 59, "green": 125, "cyan": 185, "blue": 232, "pink": 310}
SIDE = 64
QUIET = 0.21  # of a thing's own area, changed from one frame to the next by noise alone


def masks(frames):
    """Colour name -> weights (t, h, w): how strongly each pixel has that hue."""
    rgb = frames.astype(np.float32)
    high, low = rgb.max(-1), rgb.min(-1)
    strong = np.nonzero(high - low > 75)
    (r, g, b), high, low = rgb[strong].T, high[strong], low[strong]
    spread = high - low
    hue = 60 * np.where(
        high == r, ((g - b) / spread) % 6, np.where(high == g, (b - r) / spread + 2, (r - g) / spread + 4)
    )
    away = np.stack([np.abs((hue - HUES[name] + 180) % 360 - 180) for name in HUES])
    nearest = away.argmin(0)
    found = {}
    for place, name in enumerate(HUES):
        found[name] = np.zeros(frames.shape[:3], dtype=np.float32)
        mine = nearest == place
        found[name][tuple(axis[mine] for axis in strong)] = np.clip((spread[mine] - 75) / 60, 0, 1)
    return found


def circular_path(weights):
    """Centroid on the torus for every frame, unwrapped in time: (t,) each; NaN where nothing is seen."""
    angle = 2 * np.pi * (np.arange(SIDE) + 0.5) / SIDE
    total = weights.sum((1, 2))
    path = []
    for axis in (1, 2):  # sum over rows leaves columns
        profile = weights.sum(axis)
        mean = np.angle((profile * np.exp(1j * angle)).sum(1))
        # refine: an ordinary centroid in a window around the circular one
        start = mean / (2 * np.pi) * SIDE - 0.5
        offset = (np.arange(SIDE)[None] - start[:, None] + SIDE / 2) % SIDE - SIDE / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            centre = start + (profile * offset).sum(1) / total
        for frame in range(1, len(centre)):
            before = centre[frame - 1]
            if np.isnan(before):
                seen = centre[:frame][~np.isnan(centre[:frame])]
                before = seen[-1] if seen.size else centre[frame]
            centre[frame] += SIDE * np.round((before - centre[frame]) / SIDE)
        path.append(centre)
    return path[0], path[1], total


class Witness:
    """Watches one clip. ``sure`` is False when things hid one another and it would have to guess."""

    def __init__(self, frames):
        self.sure = True
        self.events = []
        self.things = {}
        for name, weights in masks(frames).items():
            area = weights.sum((1, 2))
            if np.percentile(area, 75) > 25:
                self.things[name] = weights
        for name, weights in self.things.items():
            self._watch(name, weights)
        self._join_swaps()
        self.events.sort(key=lambda event: (event["start"], event["end"]))

    def _watch(self, name, weights):
        x, y, area = circular_path(weights)
        usual = np.median(area[area > 20])
        seen = area > 0.35 * usual
        steady = area[seen] / usual
        if steady.min() < 0.84 or steady.max() > 1.18:
            self.sure = False
        if not (seen[0] and seen[-1]):
            self.sure = False
            return
        gaps = intervals(~seen)
        if gaps:
            self.events.append(
                {
                    "kind": "blink",
                    "colour": name,
                    "start": gaps[0][0] - 1,
                    "end": gaps[-1][1],
                    "count": len(gaps),
                }
            )
        times = np.arange(len(x))
        x, y = np.interp(times, times[seen], x[seen]), np.interp(times, times[seen], y[seen])
        change = np.abs(np.diff(weights, axis=0)).sum((1, 2)) / usual
        step = np.hypot(np.diff(x), np.diff(y))
        both = seen[:-1] & seen[1:]
        for start, end in join_hops(intervals(((change > QUIET) | (step > 0.55)) & both), x, y):
            if end - start > 2 or np.hypot(x[end] - x[start], y[end] - y[start]) > 3:
                self._judge(name, x, y, start, end, weights)

    def _judge(self, name, x, y, start, end, weights):
        px, py = x[start : end + 1] - x[start], y[start : end + 1] - y[start]
        net_x, net_y = px[-1], py[-1]
        width, height = np.ptp(px), np.ptp(py)
        event = {"colour": name, "start": start, "end": end, "net": (net_x, net_y)}
        event["where"] = (x[start], y[start], x[end], y[end])
        net = np.hypot(net_x, net_y)
        if net > 5:
            sideways = abs(net_x) > abs(net_y)
            along, across = (net_x, net_y) if sideways else (net_y, net_x)
            sway = height if sideways else width
            event["direction"] = {(True, True): "right", (True, False): "left", (False, True): "down"}.get(
                (sideways, along > 0), "up"
            )
            straight = abs(across) < 2 and sway < 3
            event["kind"] = "move" if straight else "zigzag"
            if straight:
                event["speed"] = "quickly" if abs(along) / (end - start) > 1.5 else "slowly"
        elif width < 2.5 and 9 < height < 15 and py.max() < 2.5:
            peaks = intervals(py < py.min() / 2)
            event.update(kind="bounce", count=len(peaks), direction=None)
        elif min(width, height) > 12:
            turning = (px[:-1] * np.diff(py) - py[:-1] * np.diff(px)).sum()
            event.update(kind="circle", direction="clockwise" if turning > 0 else "counterclockwise")
        elif (np.abs(np.diff(weights[start : end + 1], axis=0)).sum() / weights[start:end].sum()) < 0.3:
            self.sure = False  # something passed in front
            return
        else:
            turn = turned(weights[start : end + 1], x[start : end + 1], y[start : end + 1])
            event.update(kind="spin", direction="clockwise" if turn > 0 else "counterclockwise")
        self.events.append(event)

    def _join_swaps(self):
        for one, other in combinations([event for event in self.events if "where" in event], 2):
            together = abs(one["start"] - other["start"]) <= 1 and abs(one["end"] - other["end"]) <= 1
            miss = [abs((one["where"][i] - other["where"][(i + 2) % 4] + 32) % 64 - 32) for i in range(4)]
            if together and max(miss) < 5 and np.hypot(*one["net"]) > 15:
                self.events = [event for event in self.events if event is not one and event is not other]
                swap = {"kind": "swap", "partner": other["colour"], "direction": None}
                self.events.append(
                    {"start": one["start"], "end": one["end"], "colour": one["colour"], **swap}
                )
                return


def intervals(flags):
    """Runs of True as (first, one past last)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def join_hops(spans, x, y):
    """At the top of a hop the picture hardly changes: join what mirrors itself about a short rest."""
    joined = []
    for span in spans:
        if joined and 0 < span[0] - joined[-1][1] <= 3:
            before, rest = joined[-1]
            reach = min(4, rest - before, span[1] - span[0])
            steps = np.arange(1, reach + 1)
            tops = ((rest, span[0]), (rest, rest), (span[0], span[0]))
            mirrored = min(np.abs(y[a - steps] - y[b + steps]).max() for a, b in tops) < 1.5
            fall = y[rest - reach] - y[rest]
            gentle = y[rest - 1] - y[rest] < 1.8  # a hop slows down towards its top, a movement does not
            if (
                mirrored
                and gentle
                and fall > (4.8 if reach == 4 else 3)
                and np.ptp(x[before : span[1] + 1]) < 2.5
            ):
                joined[-1] = (before, span[1])
                continue
        joined.append(span)
    return joined


def turned(weights, x, y):
    """Signed turning of a shape, by matching angular profiles of neighbouring frames; clockwise > 0."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    bins = 72
    total, last = 0, None
    for frame in range(len(weights)):
        dy = (rows - y[frame] + 32) % 64 - 32
        dx = (columns - x[frame] + 32) % 64 - 32
        place = ((np.arctan2(dy, dx) / (2 * np.pi) * bins).round().astype(int)) % bins
        profile = np.bincount(place.ravel(), (weights[frame] * np.hypot(dx, dy)).ravel(), bins)
        profile = np.fft.irfft(np.fft.rfft(profile) * np.exp(-((np.arange(bins // 2 + 1) / 6) ** 2)), bins)
        if last is not None:
            match = np.fft.irfft(np.fft.rfft(profile) * np.conj(np.fft.rfft(last)), bins)
            shift = int(match.argmax())
            shift = shift - bins if shift > bins // 2 else shift
            total += np.sign(shift) if abs(shift) < 12 else 0
        last = profile
    return total


@pytest.fixture(scope="session")
def witness():
    return Witness


COUNTS = {"once": 1, "twice": 2, "thrice": 3}
MEANING = {
    "moves": "move", "goes": "move", "zigzags": "zigzag", "weaves": "zigzag", "circles": "circle",
    "loops": "circle", "spins": "spin", "turns": "spin", "bounces": "bounce", "hops": "bounce",
    "blinks": "blink", "flashes": "blink", "swaps": "swap", "trades": "swap",
}  # fmt: skip

ADVERBS = {
    "speed": ("slowly", "quickly"),
    "count": tuple(COUNTS),
    "direction": ("left", "right", "up", "down", "clockwise", "counterclockwise"),
}
PHRASES = {
    "waits": ([], "waits"),
    "nonstop": ([], "nonstop"),
    "stops": ([], "stops"),
    "stays": (["still"], "still"),
    "does": (["not", "move"], "still"),
    "is": (["left", "of"], "left_of"),
}


class Reader:
    """Reads a caption's words and judges it against a manifest record, by search over the record's events."""

    def __init__(self, text):
        self.words = [word for word in text.split() if word not in ("the", "a", "an")]
        self.clauses, self.links, self.last = [], [], None
        while self.words:
            if self.clauses:
                self.links.append(self._link())
            self.clauses.append(self._clause())

    def _take(self):
        return self.words.pop(0)

    def _link(self):
        word = self._take()
        if word == "and" and self.words[0] == "then":
            self._take()
            return "then"
        return {"then": "then", "before": "then", "while": "while", "as": "while", "and": "and"}[word]

    def _thing(self):
        if self.words[0] == "it":
            self._take()
            return self.last
        self.last = (self._take(), int(self._take()))
        return self.last

    def _clause(self):
        clause = {"who": self._thing()}
        while self.words and self.words[0] not in ("then", "before", "while", "as"):
            goes_on = "waits" in clause and "kind" not in clause
            if self.words[0] == "and" and self.words[1] != "stops" and not goes_on:
                break
            self._add(clause, self._take())
        return clause

    def _add(self, clause, word):
        if word in MEANING:
            clause["kind"] = MEANING[word]
            if clause["kind"] == "swap":
                assert [self._take(), self._take()] == ["places", "with"]
                who, clause["other"] = self.last, self._thing()
                self.last = who
        elif word in PHRASES:
            rest, key = PHRASES[word]
            assert [self._take() for _ in rest] == rest
            clause[key] = self._thing() if key == "left_of" else True
        elif word != "and":
            key = next(key for key, words in ADVERBS.items() if word in words)
            clause[key] = COUNTS.get(word, word)

    def is_true(self, record):
        names = [(item["colour"], item["digit"]) for item in record["objects"]]
        choices = []
        for clause in self.clauses:
            if not {clause["who"], clause.get("left_of", clause["who"])} <= set(names):
                return False
            who = names.index(clause["who"])
            events = [e for e in record["events"] if who in (e["object"], e["partner"])]
            if "still" in clause:
                choices.append([] if events else [None])
            elif "left_of" in clause:
                other = names.index(clause["left_of"])
                choices.append([None] if self._is_left(record, who, other) else [])
            else:
                choices.append([e for e in events if self._fits(clause, e, who, names)])
        return any(self._ordered(pick) for pick in product(*choices))

    @staticmethod
    def _is_left(record, who, other):
        """Neither ever goes sideways, and there is clear room between them."""
        for event in record["events"]:
            sideways = event["kind"] in ("circle", "swap", "zigzag") or event["direction"] in (
                "left",
                "right",
            )
            if sideways and {who, other} & {event["object"], event["partner"]}:
                return False
        places = record["scene"]["things"]
        return places[other]["x"] - places[who]["x"] >= 20

    @staticmethod
    def _fits(clause, event, who, names):
        if event["kind"] != clause["kind"]:
            return False
        if event["kind"] == "swap":
            pair = {names[event["object"]], names[event["partner"]]}
            return pair == {clause["who"], clause["other"]}
        if event["object"] != who:
            return False
        if any(key in clause and event[key] != clause[key] for key in ("direction", "speed", "count")):
            return False
        if "stops" in clause and event["end_frame"] > 33:
            return False
        if "waits" in clause and event["start_frame"] < 6:
            return False
        return "nonstop" not in clause or (event["start_frame"], event["end_frame"]) == (0, 39)

    def _ordered(self, pick):
        """Groups joined by "while" happen together; each group is over before the next begins."""
        groups = [[pick[0]]]
        for link, event in zip(self.links, pick[1:], strict=True):
            if event is None or pick[0] is None or link == "and":
                continue
            if link == "while":
                groups[-1].append(event)
            else:
                groups.append([event])
        for place, group in enumerate(groups):
            for one, other in combinations([e for e in group if e], 2):
                shared = min(one["end_frame"], other["end_frame"]) - max(
                    one["start_frame"], other["start_frame"]
                )
                short = min(one["end_frame"] - one["start_frame"], other["end_frame"] - other["start_frame"])
                if 2 * shared < short:
                    return False
            for later in groups[place + 1 :]:
                for one, other in product(group, later):
                    if one and other and one["end_frame"] > other["start_frame"]:
                        return False
        return True


@pytest.fixture(scope="session")
def reader():
    return Reader


@pytest.fixture(scope="session")
def world_now():
    """What the generator produces today, to be compared with the frozen protocol."""
    return freeze()
