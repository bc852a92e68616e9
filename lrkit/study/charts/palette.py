"""Colours by name, on light paper and on dark, and how rows are told apart.

The seven hues are told apart with normal sight and with the three kinds of colour blindness, on either paper: any two are
at least 20 apart (CIE76), and each has a contrast of 3:1 or more against the paper.
"""

from collections.abc import Sequence

import attrs

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f1e1b",
    "soft": "#5e5c56",
    "rule": "#dddad2",
    "grid": "#edebe5",
    "faint": "#f6f5f1",
    "link": "#1a5fa3",
    "base": "#57564f",
    "h0": "#034777",
    "h1": "#b8623d",
    "h2": "#24a87e",
    "h3": "#e84fb8",
    "h4": "#7a22e6",
    "h5": "#9f9004",
    "h6": "#811e0e",
    "heat": "#0f5a96",
    "warm": "#a84708",
    "bad": "#a3261a",
    "planned": "#d2cfc5",
}
"""No two are equal: a colour in a drawing is looked up here to find its name."""

DARK = {
    "paper": "#16171a",
    "ink": "#e6e4dd",
    "soft": "#a5a39b",
    "rule": "#3a3b3f",
    "grid": "#292a2e",
    "faint": "#1e1f23",
    "link": "#8ab8f0",
    "base": "#e0ddd3",
    "h0": "#86adfa",
    "h1": "#e2571a",
    "h2": "#20c98d",
    "h3": "#ec3fb8",
    "h4": "#9650f0",
    "h5": "#e6c540",
    "h6": "#c76657",
    "heat": "#5b93cf",
    "warm": "#cf8443",
    "bad": "#ff9385",
    "planned": "#4c4d52",
}

_HUES = 7
_DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 3))
_MARKERS = "os^D"


@attrs.frozen
class Style:
    """A row's look: the name of a colour, and a dash and a marker for rows that share it."""

    colour: str
    dash: tuple[int, ...] = ()
    shape: int = 0

    @property
    def hex(self) -> str:
        """The colour on light paper."""
        return LIGHT[self.colour]

    @property
    def line(self) -> tuple[int, tuple[int, ...]] | str:
        """The dash as matplotlib takes it."""
        return (0, self.dash) if self.dash else "solid"

    @property
    def marker(self) -> str:
        """The marker as matplotlib takes it."""
        return _MARKERS[self.shape % len(_MARKERS)]


def styles(rows: int, base: int) -> tuple[Style, ...]:
    """Give each row a style: the base its own colour, the others the hues in turn, then again with a dash and marker."""
    found: list[Style] = []
    for row in range(rows):
        others = row - (row > base)
        again = others // _HUES
        own = Style("base", (), 3)
        found.append(own if row == base else Style(f"h{others % _HUES}", _DASHES[again % 3], again % 3))
    return tuple(found)


def in_css(colours: Sequence[tuple[str, str]] | dict[str, str]) -> str:
    """Write colours as CSS variables, for example ``--paper:#ffffff;--ink:#1f1e1b``."""
    return ";".join(f"--{name}:{colour}" for name, colour in dict(colours).items())
