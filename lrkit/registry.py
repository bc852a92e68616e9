"""Names to components. Built-ins and plug-ins come through the same pluggy hooks, from the entry-point group ``lrkit``.

A plug-in that cannot be used never stops the import and never takes anything with it. It is left out, `Registry.problems`
keeps the reason with the distribution's name, and asking for something it might have offered says so. A name that two
plug-ins claim belongs to neither, and using it raises with both named. A built-in name cannot be taken.
"""

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import attrs

from lrkit import __version__, foreign
from lrkit.actions import Action
from lrkit.errors import LrkitError, LrkitWarning, nearest
from lrkit.foreign import ForeignError
from lrkit.hookspecs import KINDS, Kind
from lrkit.method import Method
from lrkit.metrics import Importance
from lrkit.parameterizations import Parameterization
from lrkit.schedulers import Scheduler
from lrkit.vetting import Offer, imported, installed, offers_of

BASES: Mapping[Kind, type] = {
    "parameterization": Parameterization,
    "metric": Importance,
    "scheduler": Scheduler,
    "action": Action,
}
"""The classes that components of four kinds derive from; all other kinds are functions and texts."""
BUILT_IN = (
    *("lrkit.parameterizations", "lrkit.metrics", "lrkit.schedulers", "lrkit.actions", "lrkit.methods"),
    *("lrkit.layers", "lrkit.tasks", "lrkit.study.shipped", "lrkit.study.executors"),
)
"""Modules of lrkit with hook implementations. They come by name: some are above this room and import it."""
_OURS = f"lrkit {__version__}"


class PluginWarning(LrkitWarning):
    """A plug-in could not be used."""


@attrs.frozen
class Problem:
    """Why a plug-in, or a name of it, cannot be used.

    Args:
        distribution: the distribution that brought it, with its version.
        plugin: the entry point's name.
        message: one line.
        detail: the traceback, if there is one.
    """

    distribution: str
    plugin: str
    message: str
    detail: str = ""

    def __str__(self) -> str:
        """One line that names the distribution."""
        return f'plug-in "{self.plugin}" of {self.distribution}: {self.message}'


class Registry:
    """All components by kind and name.

    Args:
        plugins: further plug-ins as (distribution, plug-in name, module or object), beside the built-ins.
        discover: load the installed entry points too.
    """

    def __init__(self, plugins: Iterable[tuple[str, str, object]] = (), *, discover: bool = True) -> None:
        self._offers: dict[tuple[Kind, str], list[Offer]] = {}
        self._plugins: list[object] = []
        self.problems: list[Problem] = []
        for module in BUILT_IN:
            self.add(_OURS, "builtin", import_module(module))
        for distribution, name, plugin in plugins:
            self.add(distribution, name, plugin)
        points, unread = installed() if discover else ([], [])
        for distribution, message in unread:
            self._problem(distribution, "entry_points.txt", message)
        for distribution, point in points:
            try:
                with _loading_plugins():
                    plugin = imported(point)
            except ForeignError as error:
                self._problem(distribution, point.name, error.line, error.detail)
            else:
                self.add(distribution, point.name, plugin)
        self._installed = frozenset(self._offers)

    # ---- putting in ----

    def add(self, distribution: str, name: str, plugin: object) -> None:
        """Register one plug-in: a module or an object with hook implementations.

        Nothing is raised if it is wrong: the reason goes to `problems`, with a warning.
        """
        if any(plugin is other for other in self._plugins):
            self._problem(distribution, name, "is registered already, under another name")
            return
        try:
            offers, left_out = offers_of(plugin, distribution, name, BASES)
        except ForeignError as error:
            self._problem(distribution, name, error.line, error.detail)
            return
        self._plugins.append(plugin)
        for line in left_out:
            self._problem(distribution, name, line)
        for offer in offers:
            self._register(offer)

    def _register(self, offer: Offer) -> None:
        holders = self._offers.setdefault((offer.kind, offer.name), [])
        if holders:
            others = " and ".join(other.distribution for other in holders)
            message = f'{offer.kind} "{offer.name}" is already offered by {others}'
            self._problem(offer.distribution, offer.plugin, message)
            if holders[0].distribution == _OURS:
                return
        holders.append(offer)

    def _problem(self, distribution: str, plugin: str, message: str, detail: str = "") -> None:
        problem = Problem(distribution, plugin, message, detail)
        self.problems.append(problem)
        warnings.warn(str(problem), PluginWarning, stacklevel=2)

    @contextmanager
    def lend(self, kind: Kind, name: str, value: Any) -> Iterator[None]:
        """Offer one more component for a while, unless it is registered: to save a run, its components must have names.

        Args:
            kind: its kind.
            name: a name that is free.
            value: its class.
        """
        if any(offer.value is value for offer in self.offers(kind)):
            yield
            return
        self._offers[(kind, name)] = [Offer(kind, name, value, "this process", "lent")]
        try:
            yield
        finally:
            del self._offers[(kind, name)]

    # ---- looking up ----

    def names(self, kind: Kind) -> list[str]:
        """List all registered names of a kind, built-ins first in their own order."""
        return [name for k, name in self._offers if k == kind]

    def offers(self, kind: Kind | None = None) -> list[Offer]:
        """List all components, or those of one kind, with who brought them."""
        return [o for offers in self._offers.values() for o in offers if kind is None or o.kind == kind]

    def is_installed(self, kind: str, name: str) -> bool:
        """Return whether a component came with the registry, so that another process has it too.

        For example, one that a notebook adds by `add` did not.
        """
        return (kind, name) in self._installed

    def get(self, kind: Kind, name: str) -> Any:
        """Return the component of this kind and name.

        Raises:
            LrkitError: no such name (with the nearest right one, and with the plug-ins that could not be loaded), or a
                name that two distributions claim.
        """
        offers = self._offers.get((kind, name)) if isinstance(name, str) else None
        if not offers:
            known = self.names(kind)
            broken = "".join(f"; {problem}" for problem in self.problems)
            word = name if isinstance(name, str) else repr(name)
            hint = nearest(word, known)
            # The papers' other systems are plug-ins: tell those who ask for one by its right name how to find it.
            tail = broken or ("" if hint else "; others come with plug-ins: `lrkit plugins` lists what is installed")
            raise LrkitError(f'unknown {kind} "{word}"{hint}; there are {", ".join(known) or "none"}{tail}')
        if len(offers) > 1:
            both = " and ".join(offer.distribution for offer in offers)
            raise LrkitError(f'{kind} "{name}" is offered by {both}: uninstall one of them')
        return offers[0].value

    def name_of(self, kind: Kind, cls: type) -> str:
        """Return the registered name of a component's class. Raises LrkitError if it is not registered."""
        for offer in self.offers(kind):
            if offer.value is cls:
                return offer.name
        raise LrkitError(
            f"{kind} {cls.__module__}.{cls.__qualname__} is not registered: offer it by the hook lrkit_{kind}s of a "
            "plug-in, or in this process by lrkit.current().add(...)"
        )

    # ---- calling ----

    def method(self, name: str, **arguments: Any) -> Method:
        """Call the function of a registered method with these arguments.

        Raises:
            LrkitError: no such method, or its function refuses, raises anything, or gives something else.
        """
        made: Method = self.made("method", name, **arguments)
        if not issubclass(type(made), Method):  # isinstance asks the object, which may raise
            raise LrkitError(f"{self._who('method', name)} gives {foreign.text_of(made)}, which is no lrkit.Method")
        return made

    def made(self, kind: Kind, name: str, *arguments: Any, **named: Any) -> Any:
        """Call the registered function of a method, task or executor.

        Raises:
            LrkitError: no such name, or the function refuses or raises anything.
        """
        function = self.get(kind, name)
        try:
            return foreign.call(function, *arguments, **named)
        except ForeignError as error:
            raise LrkitError(f"{self._who(kind, name)} cannot be made: {error.line}") from error

    def _who(self, kind: Kind, name: str) -> str:
        distribution = self._offers[kind, name][0].distribution
        return f'{kind} "{name}"' + ("" if distribution == _OURS else f" of {distribution}")


# ---- the registry of this process ------------------------------------------------------------------------------------

_lock = threading.RLock()  # another thread waits; the same one, asking again, is a plug-in amid its import
_loading: list[None] = []


@cache
def current() -> Registry:
    """Return the registry of this process: built-ins and installed plug-ins, loaded once, when first asked for.

    Raises:
        LrkitError: a plug-in asks for it while it is being imported.
    """
    with _lock:
        if _loading:
            raise LrkitError(
                "lrkit's registry was asked for while plug-ins are being loaded: do that later, in a function"
            )
        return Registry()


@contextmanager
def _loading_plugins() -> Iterator[None]:
    with _lock:
        _loading.append(None)
        try:
            yield
        finally:
            _loading.pop()


def registered_tasks() -> dict[str, Any]:
    """Return all tasks' loaders by name, for `lrkit.tasks.load_task`.

    Each is looked up when it is called: a name that two plug-ins claim must not stop the runs of other tasks.
    """

    def later(name: str) -> Any:
        return lambda rest: current().made("task", name, rest)

    return {name: later(name) for name in current().names("task")}


__all__ = ["KINDS", "Kind", "Offer", "PluginWarning", "Problem", "Registry", "current", "installed", "registered_tasks"]
