"""Sphinx: MyST Markdown, furo, autodoc. No intersphinx: the build needs no network."""

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
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False

nitpicky = True
# Other projects' names: there is no inventory to look them up in without a network.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|transformers|attrs?|pluggy|datasets|collections|concurrent|pandas|pathlib|typing|os|numpy)\..*|ArrayLike|PreTrainedTokenizerBase",
    ),
]
