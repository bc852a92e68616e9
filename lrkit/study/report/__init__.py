"""The report of a study: one HTML page that works offline, and its tables as CSV, Markdown and LaTeX.

- `lrkit.study.report.write`: the files.
- `lrkit.study.report.page`: the page, of the templates, the CSS and the script beside it.
- `lrkit.study.report.view`: a study as every section looks at it.
- `lrkit.study.report.head`, `results`, `rows`, `figures`, `layers`, `cells`: the sections' numbers and texts.

The page holds everything that it shows. It asks for nothing from anywhere, and tells the browser so in its content
security policy. Templates escape whatever comes from the study. A study that is still running gives a page that says
which cells are missing; written again later, it is replaced in one move.
"""

from lrkit.study.report.page import page
from lrkit.study.report.write import write_report

__all__ = ["page", "write_report"]
