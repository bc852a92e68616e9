"""A drawing area, and how it becomes part of a page or a file.

matplotlib is imported when something is drawn, since that takes half a second.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from lrkit.study.charts.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

TEXT, TICK = 12.0, 11.0
"""Sizes of text in pixels; nothing is scaled, so they are as large as they say."""

OVER = "over"
"""The `gid` of a text that lies over lines: a page gives it a rim of paper."""

_PAGE = {name: f"var(--{name})" for name in LIGHT}
_NAMES = {colour: name for name, colour in LIGHT.items()}
_UNREADABLE = re.compile(r"[^\S ]|[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in this block: set matplotlib's defaults, and set them back at its end.

    A text with a dollar sign is no formula, SVG has text rather than outlines, and equal charts are equal files. A letter
    that matplotlib's own font lacks is left to the fonts of whoever looks at the page.
    """
    import matplotlib

    settings: dict[Any, Any] = {
        "axes.axisbelow": True,
        "axes.edgecolor": LIGHT["soft"],
        "axes.grid.axis": "y",
        "axes.labelcolor": LIGHT["soft"],
        "axes.labelsize": TEXT,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": TEXT,
        "figure.dpi": 72,  # a point is a pixel
        "font.size": TEXT,
        "grid.color": LIGHT["grid"],
        "grid.linewidth": 1.0,
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "svg.hashsalt": "lrkit",
        "text.color": LIGHT["ink"],
        "text.parse_math": False,
        "xtick.color": LIGHT["soft"],
        "xtick.labelsize": TICK,
        "ytick.color": LIGHT["soft"],
        "ytick.labelsize": TICK,
        "ytick.left": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        yield


class Canvas:
    """A figure of a size in pixels, with tooltips.

    Args:
        width: in pixels.
        height: in pixels.
    """

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # not pyplot, which keeps every figure and wants a display

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasAgg(self.figure)
        self._tips: dict[str, Sequence[str]] = {}

    def axes(self, left: float, bottom: float, right: float, top: float) -> "Axes":
        """Add axes with these margins, in pixels."""
        wide, tall = self.width - left - right, self.height - bottom - top
        place = (left / self.width, bottom / self.height, wide / self.width, tall / self.height)
        return self.figure.add_axes(place)

    def label(self, x: float, y: float, text: str, *, bold: bool = False, **how: Any) -> None:
        """Write a text so many pixels from the left and the top; negative ones count from the right and the bottom."""
        across = x if x >= 0 else self.width + x
        up = self.height - y if y >= 0 else -y
        self.figure.text(
            across / self.width,
            up / self.height,
            readable(text),
            ha="left" if x >= 0 else "right",
            va="top" if y >= 0 else "baseline",
            weight="bold" if bold else "normal",
            color=LIGHT["ink"] if bold else LIGHT["soft"],
            **how,
        )

    def tip(self, artist: "Artist", *titles: str) -> None:
        """Give an artist a tooltip, or each of its marks one of its own, in their order."""
        key = f"tip{len(self._tips)}"
        artist.set_gid(key)
        self._tips[key] = titles

    def inline(self, name: str) -> str:
        """Return the chart as an ``svg`` element for a page.

        Colours become the page's variables and fonts the page's font. Each mark has its tooltip as a ``title``.

        Args:
            name: read out by a screen reader in the picture's place; empty for an ornament.
        """
        self.figure.patch.set_visible(False)
        for axes in self.figure.axes:
            axes.patch.set_visible(False)
        out = io.StringIO()
        self.figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        root = ElementTree.fromstring(out.getvalue())
        # An id is a chart's own in a page of many.
        prefix = hashlib.sha256(out.getvalue().encode()).hexdigest()[:8]
        used = set(re.findall(r"#([\w.-]+)", out.getvalue())) - {c.strip("#") for c in LIGHT.values()}
        for element in list(root.iter()):
            self._tidy(element, prefix, used)
        said = {"role": "img", "aria-label": name} if name else {"aria-hidden": "true"}
        size = {"width": f"{self.width:g}", "height": f"{self.height:g}"}
        root.attrib = {**size, "viewBox": f"0 0 {self.width:g} {self.height:g}", **said}
        _flatten(root)
        return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)

    def _tidy(self, element: ElementTree.Element, prefix: str, used: set[str]) -> None:
        """Bring one element into the page's form."""
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        if element.tag != "text":
            element.text = None
        for child in list(element):
            if child.tag.rpartition("}")[2] in ("metadata", "style", "clipPath"):
                element.remove(child)
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        attributes.pop("clip-path", None)  # axes hold all that is drawn in them
        if attributes.get("transform", "").startswith("rotate(-0 "):
            del attributes["transform"]
        own = attributes.pop("id", "")
        if own in self._tips:
            _put_titles(element, self._tips[own])
            if len(self._tips[own]) > 1:
                attributes["class"] = "tips"
        if own == OVER:
            attributes["class"] = OVER
        if own in used:
            attributes["id"] = f"{prefix}{own}"
        for key, value in attributes.items():
            if key == "d":
                value = re.sub(r"\s*([A-Za-z])\s*", r"\1", " ".join(value.split()))
            value = re.sub(r"font-family: [^;]*;? ?|font: [\d.]+px [^;]*;? ?", _size_alone, value)
            value = re.sub(r"#([\w.-]+)", lambda found: _named(found, prefix, used), value)
            attributes[key] = re.sub(r"-?\d+\.\d+", _short, value) if key != "id" else value
        element.attrib = attributes

    def save(self, path: Path) -> list[Path]:
        """Write the chart as PNG, SVG and PDF, with light paper.

        Args:
            path: of the PNG; the others stand beside it.
        """
        paths = [path.with_suffix(ending) for ending in (".png", ".svg", ".pdf")]
        for each in paths:
            dated = {"CreationDate": None} if each.suffix == ".pdf" else {"Date": None} if each.suffix == ".svg" else {}
            self.figure.savefig(each, dpi=144, facecolor=LIGHT["paper"], metadata=dated)
        return paths


def readable(text: str) -> str:
    """Return a text that SVG can hold: a control character, and half of a surrogate pair, becomes a replacement."""
    return _UNREADABLE.sub("\ufffd", text)


@lru_cache(1000)
def width_of(text: str, size: float = TEXT) -> float:
    """Return a text's width in pixels in matplotlib's own font, which is wider than the usual fonts of a page."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    return float(TextToPath().get_text_width_height_descent(text, FontProperties(size=size), False)[0])


def cut(text: str, room: float) -> str:
    """Cut a readable text to so many pixels, with a sign at its end that it was cut."""
    text = shown = readable(text)
    while len(text) > 1 and width_of(shown) > room:
        text = text[:-1]
        shown = f"{text}…"
    return shown


def _put_titles(element: ElementTree.Element, titles: Sequence[str]) -> None:
    """Hang tooltips into a group: one on the group, several on its marks."""
    marks = [element]
    if len(titles) > 1:
        kept = {id(node) for defs in element.iter() if defs.tag.endswith("defs") for node in defs.iter()}
        marks = [node for node in element.iter() if node.tag.endswith(("use", "path")) and id(node) not in kept]
    for mark, title in zip(marks, titles, strict=False):
        tooltip = ElementTree.Element("title")
        tooltip.text = readable(title)
        mark.insert(0, tooltip)


def _named(found: "re.Match[str]", prefix: str, used: set[str]) -> str:
    word = found.group(1)
    return _PAGE[_NAMES[f"#{word}"]] if f"#{word}" in _NAMES else f"#{prefix}{word}" if word in used else f"#{word}"


def _size_alone(found: "re.Match[str]") -> str:
    size = re.match(r"font: ([\d.]+px)", found.group(0))
    return f"font-size: {size.group(1)}; " if size else ""


def _short(found: "re.Match[str]") -> str:
    value = float(found.group(0))
    text = f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"  # below 1 it may be an opacity
    return text.rstrip("0").rstrip(".").replace("-0", "0") if float(text) == 0 else text.rstrip("0").rstrip(".")


def _flatten(element: ElementTree.Element) -> None:
    """Take out groups that say nothing, and definitions that are empty."""
    for child in list(element):
        _flatten(child)
    flat: list[Any] = []
    for child in element:
        needless = not child.attrib and (child.tag == "g" or (child.tag == "defs" and not len(child)))
        titled = len(child) and child[0].tag == "title"
        flat += list(child) if needless and not titled else [child]
    element[:] = flat
