"""Shapes and text as SVG elements; their colours follow the light or dark scheme of whoever looks."""

from __future__ import annotations

import xml.etree.ElementTree as ET

# Width of a letter over the size of the font, rather too wide than too narrow: fonts differ from reader to reader.
MONO, SANS = 0.61, 0.56
SMALL, NORMAL, LARGE = 11, 12, 15

_STYLE = """
.attnres { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
.attnres text { fill: #1f2328; }
.attnres .title { font-size: 15px; font-weight: 600; }
.attnres .strong { font-weight: 600; }
.attnres .small { font-size: 11px; }
.attnres .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.attnres .muted { fill: #59636e; }
.attnres .page { fill: #ffffff; }
.attnres .box { fill: #f6f8fa; stroke: #c3cbd3; }
.attnres .gap { stroke-dasharray: 5 4; }
.attnres .read-line { stroke: #8c959f; }
.attnres .read-end { fill: #59636e; }
.attnres .lane { stroke: #0969da; stroke-width: 2; }
.attnres .in-progress { stroke: #bc4c00; }
.attnres .source { fill: #0969da; stroke: #0969da; stroke-width: 2; }
.attnres .partial { fill: #ffffff; stroke: #bc4c00; }
.attnres .plus { stroke: #bc4c00; stroke-width: 2; }
.attnres text.count { fill: #ffffff; font-size: 10px; font-weight: 600; }
@media (prefers-color-scheme: dark) {
.attnres text { fill: #e6edf3; }
.attnres .muted { fill: #9198a1; }
.attnres .page { fill: #0d1117; }
.attnres .box { fill: #161b22; stroke: #3d444d; }
.attnres .read-line { stroke: #656c76; }
.attnres .read-end { fill: #9198a1; }
.attnres .lane { stroke: #58a6ff; }
.attnres .in-progress { stroke: #f0883e; }
.attnres .source { fill: #58a6ff; stroke: #58a6ff; }
.attnres .partial { fill: #0d1117; stroke: #f0883e; }
.attnres .plus { stroke: #f0883e; }
.attnres text.count { fill: #0d1117; }
}
"""


def width_of(text: str, size: int = NORMAL, *, mono: bool = False) -> float:
    """Upper estimate of the width of ``text``, in pixels."""
    return len(text) * size * (MONO if mono else SANS)


class Canvas:
    """An SVG document, or a group in one; shapes are drawn in the order of the calls.

    Args:
        element: What they are added to.
    """

    def __init__(self, element: ET.Element) -> None:
        self.element = element

    @classmethod
    def page(cls, title: str, description: str) -> Canvas:
        """An empty page; screen readers get ``title`` and ``description``."""
        svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "attnres", "role": "img"})
        for tag, text in (("title", title), ("desc", description), ("style", _STYLE)):
            ET.SubElement(svg, tag).text = text
        page = cls(svg)
        page._add("rect", "page", width="100%", height="100%")
        return page

    def group(self, kind: str, title: str, **data: object) -> Canvas:
        """A group of class ``kind``, with a text that is shown where the pointer is over it."""
        group = Canvas(self._add("g", kind, **{f"data-{name}": value for name, value in data.items()}))
        ET.SubElement(group.element, "title").text = title
        return group

    def text(self, kind: str, x: float, y: float, text: str, *, anchor: str = "start") -> None:
        """Text whose vertical middle is ``y``."""
        at = {"x": x, "y": y, "dominant-baseline": "central"}
        self._add("text", kind, **at, **({} if anchor == "start" else {"text-anchor": anchor})).text = text

    def box(self, kind: str, x: float, y: float, width: float, height: float, *, radius: float = 6) -> None:
        """A rectangle with round corners."""
        self._add("rect", kind, x=x, y=y, width=width, height=height, rx=radius)

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """A straight line."""
        self._add("line", kind, x1=x1, y1=y1, x2=x2, y2=y2)

    def dot(self, kind: str, x: float, y: float, radius: float) -> None:
        """A circle."""
        self._add("circle", kind, cx=x, cy=y, r=radius)

    def arrow_head(self, kind: str, x: float, y: float) -> None:
        """The end, in ``x``, of an arrow that comes from the right."""
        self._add("path", kind, d=f"M{x:g} {y:g}l8 -4v8z")

    def finished(self, width: float, height: float) -> str:
        """The document, of this size in pixels."""
        size = {"width": f"{width:.0f}", "height": f"{height:.0f}"}
        self.element.attrib.update(size, viewBox=f"0 0 {size['width']} {size['height']}")
        ET.indent(self.element)
        return ET.tostring(self.element, encoding="unicode") + "\n"

    def _add(self, tag: str, kind: str, **attributes: object) -> ET.Element:
        given = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in attributes.items()}
        return ET.SubElement(self.element, tag, {"class": kind, **given})
