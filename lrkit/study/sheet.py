"""Write CSV that a spreadsheet shows as it is: an apostrophe stands before a text that it would run as a formula."""

import csv
import io

_STARTS = "=+-@|%\uff1d\uff0b\uff0d\uff20\u2212"
"""Characters that begin a formula, in their full-width forms as well."""


def harmless(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula. Numbers stay as they are."""
    inner = text.lstrip("\t\r\n\v\f\0 \u00a0\u3000\ufeff'\"")
    if not inner or inner[0] not in _STARTS or _is_number(text):
        # One that begins with a tab or a line's end is cut off there by some, and read on from there.
        return f"'{text}" if text[:1] in ("\t", "\r", "\n", "\0") else text
    return f"'{text}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()


def safe_csv(content: str) -> str:
    """Return CSV with every text made `harmless`, headers included."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in csv.reader(io.StringIO(content, newline="")):
        writer.writerow([harmless(cell) for cell in row])
    return out.getvalue()
