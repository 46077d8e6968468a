"""HTML from values: every string is escaped unless it is `Markup`."""

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is HTML already."""


VOID = ("img", "meta")  # elements without content


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element.

    Args:
      name: name of the element.
      *children: `Markup`, or values whose text is escaped.
      **attributes: attributes of the element; a trailing `_` of a name is dropped.
    """
    head = name + "".join(f' {k.rstrip("_")}="{html.escape(str(v))}"' for k, v in attributes.items())
    return Markup(f"<{head}>" if name in VOID else f"<{head}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """Concatenate markup and escaped values."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(str(c)) for c in children))


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table that scrolls sideways on a narrow screen."""
    head = tag("thead", tag("tr", *(tag("th", cell) for cell in header)))
    body = tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))
    return tag("div", tag("table", head, body), class_="scroll")


def folded(summary: object, *children: object) -> Markup:
    """Return content that is shown when its summary is clicked."""
    return tag("details", tag("summary", summary), *children)
