"""Make a figure's SVG fit to stand beside others in one page: own ids, nothing that is fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from furina.records import RecordError

SHAPES = {"svg", "g", "defs", "path", "use", "rect", "circle", "line", "polygon", "polyline"}
PAINTS = {"clipPath", "pattern", "image", "linearGradient", "radialGradient", "stop"}
DROPPED = {"metadata", "style", "title"}
"""What a page says itself: captions, and matplotlib's one rule about strokes (see page.css)."""
STROKES = "*{stroke-linejoin: round; stroke-linecap: butt}"
NEUTRAL = {
    "#000000": "var(--ink)",
    "#ffffff": "var(--paper)",
    "#e5e5e5": "var(--line)",
}
"""Colours of text, ground and grid become the page's own, so that a figure follows its theme."""
FINE = re.compile(r"-?\d+\.\d{3,}")
"""A number with more decimals than can be seen, a hundredth of a point."""
QUOTES = " \"'"


def inline(svg: str, prefix: str, themed: bool = True) -> str:
    """Return the SVG with `prefix` before every id and reference, for the body of an HTML page.

    Unless it is `themed` it keeps all its colours, as where words stand on coloured cells.
    Raises RecordError on an element that matplotlib does not draw with and on a reference outside
    the figure: a page must neither run nor fetch what a figure says.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise RecordError(f"The figure {prefix} is not SVG ({error}); draw it again.") from error
    for parent in list(root.iter()):
        for child in list(parent):
            if _name(child) in DROPPED:
                _check_dropped(child, prefix)
                parent.remove(child)
    for element in root.iter():
        element.tag, element.text, element.tail = _name(element), None, None
        if element.tag not in SHAPES | PAINTS:
            raise RecordError(f"The figure {prefix} holds <{element.tag}>; draw it again.")
        element.attrib = dict(_attributes(element, prefix, themed))
    if not themed:
        root.set("class", "fixed")
    return ElementTree.tostring(root, encoding="unicode")


def _name(element: Element) -> str:
    """Return an element's or attribute's name without its namespace, which HTML knows itself."""
    return element.tag.rpartition("}")[2]


def _check_dropped(element: Element, prefix: str) -> None:
    if _name(element) == "style" and (element.text or "").strip() != STROKES:
        raise RecordError(f"The figure {prefix} has a style sheet of its own; draw it again.")


def _attributes(element: Element, prefix: str, themed: bool) -> Iterator[tuple[str, str]]:
    for key, value in element.attrib.items():
        name = key.rpartition("}")[2]
        if name == "id":
            yield name, f"{prefix}-{value}"
        elif name == "href":
            yield name, _reference(value, prefix)
        elif name == "style" and themed:
            yield name, _page_colours(_urls(value, prefix))
        elif name in ("d", "x", "y"):
            yield name, FINE.sub(lambda match: f"{float(match[0]):.2f}", " ".join(value.split()))
        elif name.startswith("on"):
            raise RecordError(f"The figure {prefix} has a script ({name}); draw it again.")
        else:
            yield name, _urls(value, prefix)


def _reference(target: str, prefix: str) -> str:
    if target.startswith("#"):
        return f"#{prefix}-{target[1:]}"
    if target.startswith("data:image/png;base64,"):
        return target
    raise RecordError(f"The figure {prefix} refers to {target!r}, outside itself; draw it again.")


def _urls(value: str, prefix: str) -> str:
    def own(match: re.Match[str]) -> str:
        return f"url({_reference(match[1].strip(QUOTES), prefix)})"

    return re.sub(r"url\((.*?)\)", own, value)


def _page_colours(style: str) -> str:
    return re.sub(
        r"#[0-9a-f]{6}\b", lambda match: NEUTRAL.get(match[0].lower(), match[0]), style, flags=re.I
    )
