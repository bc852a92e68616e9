"""A plug-in package to begin with: what is in ``lrkit/templates``, under other names."""

import importlib.util
import keyword
import re
from importlib.resources import files

from lrkit.errors import LrkitError, nearest

KINDS = ("metric", "layer-metric", "scheduler", "action", "parameterization", "method", "task")
"""The kinds that there is a template for."""

REGISTERED = {**{kind: kind for kind in KINDS}, "layer-metric": "metric"}
"""The kind that what each template makes is registered as."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.IGNORECASE)
_USE = {
    "metric": "lrkit run adalora --swap metric={}",
    "layer-metric": "lrkit run adalora --swap metric={}",
    "scheduler": "lrkit run adalora --swap scheduler={}",
    "action": "lrkit run adalora --swap action={}",
    "parameterization": "lrkit run adalora --swap parameterization={}",
    "method": "lrkit run {}",
    "task": "lrkit run adalora --task {}",
}


def written(name: str, kind: str) -> dict[str, str]:
    """Write the files of a new plug-in package: path in the package to text.

    Args:
        name: the distribution's name. Its component has the same name, without ``lrkit-`` in front.
        kind: one of `KINDS`.

    Raises:
        LrkitError: a name that is none, that is taken, or that makes no Python names; or an unknown kind.
    """
    if kind not in KINDS:
        raise LrkitError(
            f'there is no template for --kind "{kind}"{nearest(kind, KINDS)}; there are {", ".join(KINDS)}'
        )
    if not _NAME.fullmatch(name):
        raise LrkitError(
            f'"{name}" is no name for a distribution: letters, digits, ".", "_" and "-", with a letter or digit at both ends'
        )
    distribution = re.sub(r"[-_.]+", "-", name).lower()
    module = distribution.replace("-", "_")
    offered = distribution.removeprefix("lrkit-")
    function = offered.replace("-", "_")
    cls = "".join(word.capitalize() for word in offered.split("-"))
    for what, word in (("module", module), ("function", function), ("class", cls)):
        if not word.isidentifier() or keyword.iskeyword(word):
            raise LrkitError(f'"{name}" makes no Python name: the {what} would be called {word}')
    if importlib.util.find_spec(module) is not None:
        raise LrkitError(f'a module "{module}" can be imported already, and would be in the way: choose another name')
    _check_free(name, offered, REGISTERED[kind])
    words = {
        "example-distribution": distribution,
        "example_use": f"```sh\n{_USE[kind].format(offered)}\n```",
        "example_kind": REGISTERED[kind],
        # In a method's module, its function; everywhere else the module.
        "def example_name": f"def {function}",
        ": example_name}": f": {function}}}",
        "import example_name\n\n\nclass": f"import {function}\n\n\nclass",
        "component = example_name": f"component = {function}",
        "evolve(example_name(": f"evolve({function}(",
        "example_name": module,
        "example-name": offered,
        "ExampleName": cls,
    }

    template = kind.replace("-", "_")

    def text(file: str) -> str:
        read = (files("lrkit") / "templates" / file).read_text(encoding="utf-8")
        for old, new in words.items():
            read = read.replace(old, new)
        return read

    return {
        "pyproject.toml": text("pyproject.txt"),
        "README.md": text("readme.txt"),
        f"{module}.py": text(f"{template}.py"),
        f"tests/test_{module}.py": text(f"{template}_test.txt") + text("offered_test.txt"),
    }


def _check_free(name: str, offered: str, kind: str) -> None:
    """Refuse a name that nothing can be registered under, or under which something is. Raises LrkitError."""
    from lrkit.hookspecs import is_name
    from lrkit.registry import current

    if not is_name(offered):
        raise LrkitError(f'"{name}" would offer "{offered}", which is a word for a value: choose another name')
    for offer in current().offers():
        if (offer.kind, offer.name) == (kind, offered):
            raise LrkitError(f'{kind} "{offered}" is already offered by {offer.distribution}: choose another name')
