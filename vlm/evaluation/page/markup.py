"""HTML that cannot be broken by what is put into it: every text is escaped unless it was built here."""

from __future__ import annotations

import html
from collections.abc import Sequence


class Markup(str):
    """Text that is HTML or SVG already."""

    __slots__ = ()


Content = str | int | float | Markup
_VOID = frozenset({"meta", "img", "br", "line", "rect", "circle", "polyline", "path"})


def element(tag: str, *content: Content, **attributes: Content | None) -> Markup:
    """Return an element; what is not ``Markup`` is escaped, in attributes too.

    Args:
        tag: Its name.
        content: What is inside.
        attributes: ``class_`` is written ``class``, other underscores become hyphens, None is left out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID and not content:
        return Markup(f"<{tag}{written}/>" if tag not in ("meta", "img", "br") else f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(*content)}</{tag}>")


def join(*content: Content) -> Markup:
    """Return contents one after another, escaped where they are not ``Markup``."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in content))


def table(head: Sequence[Content], rows: Sequence[Sequence[Content]]) -> Markup:
    """Return a table whose first column names the rows, in a box that scrolls sideways if it must."""
    columns = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]))
        for row in rows
    )
    grid = element("table", element("thead", columns), element("tbody", *body))
    return element("div", grid, class_="scroll")


def number(value: float, shown: str) -> Markup:
    """Return a number as people read it, which carries its exact value."""
    return element("data", shown, value=repr(float(value)))
