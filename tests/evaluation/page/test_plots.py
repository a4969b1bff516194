"""Labels of an axis that do not run into one another."""

import re

from vlm.evaluation.page.plots import Curve, draw_curves


def test_labels_without_room_are_left_out() -> None:
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    page = str(draw_curves([Curve("a", [1, 10, 1000], [0.1, 0.5, 1.0])], "k", "recall", ticks))
    found = re.findall(r'<text x="([\d.]+)" y="227" text-anchor="(\w+)">(\d+)</text>', page)
    assert [label for _, _, label in found if label != "500"] == [str(tick) for tick in ticks if tick != 500]
    assert "500" not in [label for _, _, label in found]
    spans = []
    for x, anchor, label in found:
        width = 6.5 * len(label)
        spans.append((float(x) - width * (1.0 if anchor == "end" else 0.5), width))
    for (start, width), (following, _) in zip(spans, spans[1:], strict=False):
        assert start + width < following
