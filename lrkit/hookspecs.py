"""The hooks of lrkit, and the kinds of components that come through them.

A plug-in is a distribution with an entry point in the group ``lrkit``, whose module has functions of these names marked
with ``@lrkit.hookimpl``. Each hook returns the components that the plug-in offers, by registered name.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import pluggy

Kind = Literal["parameterization", "metric", "scheduler", "action", "method", "layer", "task", "executor", "study"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUP = "lrkit"

_NAME = re.compile(r"[^\W\d_][\w.-]*(/[\w.-]+)*")
_VALUES = ("none", "null", "true", "false", "nan", "inf", "infinity")

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


def hook_of(kind: Kind) -> str:
    """Return the name of the hook through which components of a kind come."""
    return "lrkit_studies" if kind == "study" else f"lrkit_{kind}s"


def is_name(text: str) -> bool:
    """Return whether a component may be registered under a name: no list, number, option or word for a value."""
    return _NAME.fullmatch(text) is not None and text.lower() not in _VALUES


@hookspec
def lrkit_parameterizations() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Offer parameterizations by name: classes derived from `lrkit.Parameterization`."""


@hookspec
def lrkit_metrics() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Offer importance metrics by name: classes derived from `lrkit.Metric`."""


@hookspec
def lrkit_schedulers() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Offer schedulers by name: classes derived from `lrkit.Scheduler`."""


@hookspec
def lrkit_actions() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Offer actions by name: classes derived from `lrkit.Action`."""


@hookspec
def lrkit_methods() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Offer methods by name: functions that return a `lrkit.Method`, with keyword arguments that have defaults."""


@hookspec
def lrkit_layers() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Offer kinds of layers by name: classes derived from `lrkit.layers.LayerKind`, made without arguments.

    A layer is of the first kind that knows its sizes; lrkit's own kinds are asked first.
    """


@hookspec
def lrkit_tasks() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Offer tasks by name: functions that return a `lrkit.tasks.Task`.

    Their one argument is the text after the name and a slash, or None. For example, ``glue/rte`` calls the function of the
    task ``glue`` with ``"rte"``.
    """


@hookspec
def lrkit_studies() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Offer study files by name, for ``lrkit ablate NAME``: each a `pathlib.Path`, or the text of a TOML file (str)."""


@hookspec
def lrkit_executors() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Offer executors by name: functions that return a `concurrent.futures.Executor`.

    Their arguments are the number of workers (int), threads per worker (int) and an address (str or None).
    """
