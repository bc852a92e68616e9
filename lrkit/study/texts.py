"""Write numbers and texts so that a terminal, Markdown or LaTeX shows them as they are meant. No torch here."""

import re
import textwrap
import unicodedata
from collections.abc import Sequence


def compact(value: float, digits: int = 3) -> str:
    """Write a large number with its decimal prefix: 331776 is ``332 k``, 1.2e13 is ``12.0 T``; under 1000 as it is."""
    size = abs(value)
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        # 999,950 is 1.00 M, not 1000 k
        if size >= 10**power * (1 - 0.5 * 10**-digits):
            return f"{_significant(value / 10**power, digits)} {prefix}"
    return f"{value:.0f}" if size >= 100 or value == int(value) else _significant(value, digits)


def memory(value: float) -> str:
    """Write bytes in binary units: ``512 MiB``, ``1.42 GiB``."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            return f"{_significant(value / 2**power, 3)} {unit}"
    return f"{value:.0f} B"


def _significant(value: float, digits: int) -> str:
    whole = len(str(int(abs(value))))
    return f"{value:.{max(0, digits - whole)}f}"


def probability(p: float) -> str:
    """Write a p in four decimals, or that it is below 0.0001."""
    return "<0.0001" if p < 0.00005 else f"{p:.4f}"


def text_tables(texts: Sequence[Sequence[str]], width: int) -> list[str]:
    """Write rows of text, header first, as aligned tables no wider than `width`: columns that do not fit go to another."""
    widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
    first = min(widths[0], max(24, width - sum(2 + w for w in widths[1:])))
    groups: list[list[int]] = [[]]
    for i in range(1, len(widths)):
        if groups[-1] and first + sum(2 + widths[j] for j in [*groups[-1], i]) > width:
            groups.append([])
        groups[-1].append(i)
    tables = []
    for group in groups:
        lines = []
        for line in texts:
            label = textwrap.wrap(line[0], first) or [""]
            lines.append("  ".join([label[0].ljust(first), *(line[i].rjust(widths[i]) for i in group)]))
            lines += ["  " + rest for rest in textwrap.wrap(" ".join(label[1:]), first - 2)]
        rule = "-" * len(lines[0])
        tables.append("\n".join([lines[0].rstrip(), rule, *lines[1:]]))
    return tables


def markdown(text: str) -> str:
    """Escape a text so that Markdown shows it as it is, on one line."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|~&#" else c for c in " ".join(text.split()))


_MATH = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ±×÷·→≤≥−<>|†"
_MATH_NAMES = (
    r"\alpha \beta \gamma \delta \epsilon \zeta \eta \theta \iota \kappa \lambda \mu \nu \xi \pi \rho \sigma \tau "
    r"\upsilon \phi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi \Sigma \Phi \Psi \Omega "
    r"\pm \times \div \cdot \to \le \ge - < > | \dagger"
)
_TEXT = '–—…‘’“”"\\~^'
_TEXT_NAMES = r"\textendash{} \textemdash{} \dots{} ` ' `` '' '' \textbackslash{} \textasciitilde{} \^{}"
_LATEX = {
    **{c: "\\" + c for c in "&%$#_{}"},
    **{sign: f"${name}$" for sign, name in zip(_MATH, _MATH_NAMES.split(), strict=True)},
    **dict(zip(_TEXT, _TEXT_NAMES.split(), strict=True)),
}


def latex(text: str) -> str:
    """Escape a text so that pdfLaTeX sets it as it is, on one line.

    A letter that needs more than LaTeX's own fonts is written as its code point, [U+4E2D], so that the file compiles.
    """

    def one(c: str) -> str:
        plain = " " <= c <= "~" or ("À" <= c <= "ÿ" and c not in "ÐÞðþ")
        return _LATEX.get(c) or (c if plain else f"[U+{ord(c):04X}]")

    out = "".join(one(c) for c in unicodedata.normalize("NFC", " ".join(text.split())))
    return re.sub("-(?=-)", "-{}", out)  # two hyphens would be set as a dash
