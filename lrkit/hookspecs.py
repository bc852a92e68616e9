"""The hooks of lrkit.

A plug-in is a distribution with an entry point in the group ``lrkit``, whose module has functions of these names marked
with ``@lrkit.hookimpl``. Each hook returns what the plug-in offers, by registered name.
"""

from collections.abc import Mapping
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("lrkit")
hookimpl = pluggy.HookimplMarker("lrkit")


@hookspec
def lrkit_parameterizations() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Parameterizations by name: classes derived from `lrkit.Parameterization`."""


@hookspec
def lrkit_metrics() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Importance metrics by name: classes derived from `lrkit.Metric`."""


@hookspec
def lrkit_schedulers() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Schedulers by name: classes derived from `lrkit.Scheduler`."""


@hookspec
def lrkit_actions() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Actions by name: classes derived from `lrkit.Action`."""


@hookspec
def lrkit_methods() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Methods by name: functions with keyword arguments that have defaults, and return a `lrkit.Method`."""


@hookspec
def lrkit_tasks() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Tasks by name: functions of what follows the name and a slash (or None) that return a `lrkit.tasks.Task`."""


@hookspec
def lrkit_studies() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Study files by name, for ``lrkit ablate NAME``: each a `pathlib.Path`, or the text of a TOML file (str)."""


@hookspec
def lrkit_executors() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Executors by name: functions of workers (int), threads of each (int) and an address (str or None).

    They return a `concurrent.futures.Executor`.
    """
