"""Sphinx: MyST Markdown, furo, autodoc. No intersphinx: the build needs no network."""

import re
from importlib.metadata import version as _version

project = "lrkit"
author = "the lrkit authors"
copyright = author
version = release = _version("lrkit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lrkit {release}"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning"]  # of the extra [lightning]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False

nitpicky = True
# Other projects' names: there is no inventory to look them up in without a network.
nitpick_ignore_regex = [
    (r"py:class", r"lrkit\.loop\.controller\.Controller"),  # for integrations, and described in its file
    (
        r"py:.*",
        r"(torch|transformers|attrs?|pluggy|datasets|collections|concurrent|pandas|pathlib|typing|os|numpy)\..*|np\..*|NDArray|ArrayLike|PreTrainedTokenizerBase|nn\.Module|Tensor",
    ),
]


def _toctrees(app, docname, source):
    """Take a page's `<!-- toctree ... -->` for one: in a comment it is no raw text where the repository is browsed."""
    source[0] = re.sub(r"<!-- toctree\n(.*?)-->", r"```{toctree}\n:hidden:\n\n\1```", source[0], flags=re.DOTALL)


def setup(app):
    """Connect what this file adds."""
    app.connect("source-read", _toctrees)
