"""Names to components. Built-ins and plug-ins come through the same pluggy hooks, from the entry-point group ``lrkit``.

A plug-in that cannot be used never stops the import and never takes anything with it: it is left out, the reason is kept
in `Registry.problems` with the distribution's name, and asking for something it might have offered says so. A name that
two plug-ins claim belongs to neither, and using it raises with both named; a built-in name cannot be taken.
"""

import inspect
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

import attrs
import pluggy

from lrkit import hookspecs
from lrkit.errors import LrkitError, LrkitWarning, nearest

Kind = Literal["parameterization", "metric", "scheduler", "action", "method", "task", "executor", "study"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUP = "lrkit"
_NAME = re.compile(r"[^\W\d_][\w.-]*(/[\w.-]+)*")


class PluginWarning(LrkitWarning):
    """A plug-in could not be used."""


@attrs.frozen
class Problem:
    """Why a plug-in, or a name of it, cannot be used.

    Args:
        distribution: the distribution that brought it, with its version.
        plugin: the entry point's name.
        message: one line.
        detail: the traceback, where there is one.
    """

    distribution: str
    plugin: str
    message: str
    detail: str = ""

    def __str__(self) -> str:
        """One line that names the distribution."""
        return f'plug-in "{self.plugin}" of {self.distribution}: {self.message}'


@attrs.frozen
class Offer:
    """One registered component: what it is, and who brought it."""

    kind: Kind
    name: str
    value: Any
    distribution: str
    plugin: str


def hook_of(kind: Kind) -> str:
    """The name of the hook through which components of a kind come."""
    return "lrkit_studies" if kind == "study" else f"lrkit_{kind}s"


def _expected(kind: Kind) -> type | None:
    from lrkit.actions import Action
    from lrkit.metrics import Metric
    from lrkit.parameterizations import Parameterization
    from lrkit.schedulers import Scheduler

    return {
        "parameterization": Parameterization,
        "metric": Metric,
        "scheduler": Scheduler,
        "action": Action,
    }.get(kind)


class Registry:
    """All components by kind and name.

    Args:
        plugins: further plug-ins as (distribution, plug-in name, module or object), beside the built-ins.
        discover: load the installed entry points too.
    """

    def __init__(self, plugins: Iterable[tuple[str, str, object]] = (), *, discover: bool = True) -> None:
        from lrkit import __version__, builtin_plugin

        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._offers: dict[tuple[Kind, str], list[Offer]] = {}
        self.problems: list[Problem] = []
        self._builtin = f"lrkit {__version__}"
        self.add(self._builtin, "builtin", builtin_plugin)
        for distribution, name, plugin in plugins:
            self.add(distribution, name, plugin)
        if discover:
            for point in sorted(entry_points(group=GROUP), key=lambda p: (_distribution(p), p.name)):
                self._load(point)
        # What is added to it later only this process knows.
        self._installed = frozenset(self._offers)

    # ---- loading ----

    def _load(self, point: EntryPoint) -> None:
        distribution = _distribution(point)
        try:
            # What it prints is no part of a command's results.
            with redirect_stdout(sys.stderr), _loaded(point.name):
                plugin = point.load()
        except (KeyboardInterrupt, GeneratorExit):
            raise
        # A plug-in may raise anything on import, SystemExit included; it must not take the host with it.
        except BaseException as error:
            self._problem(distribution, point.name, f"cannot be imported: {_line(error)}", traceback.format_exc())
            return
        self.add(distribution, point.name, plugin)

    def add(self, distribution: str, name: str, plugin: object) -> None:
        """Register one plug-in: a module or an object with hook implementations.

        What is wrong with it goes to `problems` and is warned of; nothing is raised.
        """
        try:
            self._manager.register(plugin, name=f"{distribution}:{name}")
        except (pluggy.PluginValidationError, ValueError) as error:
            self._problem(distribution, name, _line(error))
            return
        try:
            wrong = self._misspelt(plugin)
        except Exception as error:
            wrong = f"cannot be looked at: {_line(error)}"
        if wrong:
            self._manager.unregister(plugin)
            self._problem(distribution, name, wrong)
            return
        offers: list[Offer] = []
        try:
            for kind in KINDS:
                offers += self._ask(plugin, kind, distribution, name)
        except LrkitError as error:
            self._manager.unregister(plugin)
            self._problem(distribution, name, str(error))
            return
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            self._manager.unregister(plugin)
            self._problem(distribution, name, f"a hook raised {_line(error)}", traceback.format_exc())
            return
        for offer in offers:
            self._register(offer)

    def _misspelt(self, plugin: object) -> str | None:
        known = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("lrkit_")]
        for caller in self._manager.get_hookcallers(plugin) or ():
            if not caller.has_spec():
                return f'there is no hook "{caller.name}"{nearest(caller.name, known)}'
        for name in dir(plugin):
            value = getattr(plugin, name, None)
            if not name.startswith("lrkit_") or not callable(value):
                continue
            if name not in known:
                return f'there is no hook "{name}"{nearest(name, known)}'
            if not hasattr(value, "lrkit_impl"):
                return f'"{name}" is not marked with @lrkit.hookimpl, so it would never be called'
        if not self._manager.get_hookcallers(plugin):
            return f"offers nothing: it has no function marked with @lrkit.hookimpl; there are {', '.join(known)}"
        return None

    def _ask(self, plugin: object, kind: Kind, distribution: str, name: str) -> list[Offer]:
        hook = hook_of(kind)
        implementations = [i for i in getattr(self._manager.hook, hook).get_hookimpls() if i.plugin is plugin]
        if not implementations:
            return []
        if len(implementations) > 1:
            raise LrkitError(f"{hook} is implemented {len(implementations)} times: merge them into one")
        with redirect_stdout(sys.stderr):
            offered = implementations[0].function()
        if not isinstance(offered, Mapping):
            raise LrkitError(f"{hook} must return a mapping from names to {kind}s, not {type(offered).__name__}")
        expected = _expected(kind)
        for key, value in offered.items():
            if not isinstance(key, str) or not key:
                raise LrkitError(f"{hook} must have names as keys, not {key!r}")
            if not _NAME.fullmatch(key) or key.lower() in ("none", "null", "true", "false", "nan", "inf", "infinity"):
                # All else means something on the command line: a list, a number, an option, nothing.
                raise LrkitError(
                    f'{hook}: a name begins with a letter, goes on with letters, digits, ".", "_", "-" and "/", and is no '
                    f"word for a value, unlike {key!r}"
                )
            if kind == "study":
                if not isinstance(value, str) and not hasattr(value, "read_text"):
                    raise LrkitError(f'{hook}: "{key}" must be a path or the text of a TOML file, not {value!r}')
            elif expected is None and not callable(value):
                raise LrkitError(f'{hook}: "{key}" must be callable, not {value!r}')
            if expected is not None:
                if not (isinstance(value, type) and issubclass(value, expected)):
                    raise LrkitError(f'{hook}: "{key}" must be a class derived from {expected.__name__}, not {value!r}')
                if "__attrs_attrs__" not in vars(value):
                    raise LrkitError(
                        f'{hook}: "{key}": decorate class {value.__name__} with @attrs.frozen(kw_only=True)'
                    )
                abstract = sorted(getattr(value, "__abstractmethods__", ()))
                if abstract:
                    raise LrkitError(f'{hook}: "{key}": class {value.__name__} does not write {", ".join(abstract)}')
        return [Offer(kind, key, value, distribution, name) for key, value in offered.items()]

    def _register(self, offer: Offer) -> None:
        holders = self._offers.setdefault((offer.kind, offer.name), [])
        if holders:
            others = " and ".join(other.distribution for other in holders)
            self._problem(
                offer.distribution, offer.plugin, f'{offer.kind} "{offer.name}" is already offered by {others}'
            )
            if holders[0].distribution == self._builtin:
                return
        holders.append(offer)

    def _problem(self, distribution: str, plugin: str, message: str, detail: str = "") -> None:
        problem = Problem(distribution, plugin, message, detail)
        self.problems.append(problem)
        warnings.warn(str(problem), PluginWarning, stacklevel=2)

    @contextmanager
    def lend(self, kind: Kind, name: str, value: Any) -> Iterator[None]:
        """Offer one more component for a while, where it is not registered: what is saved needs names.

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
        """All registered names of a kind, built-ins first in their own order."""
        return [name for k, name in self._offers if k == kind]

    def offers(self, kind: Kind | None = None) -> list[Offer]:
        """All offers, or those of one kind, with who brought them."""
        return [o for offers in self._offers.values() for o in offers if kind is None or o.kind == kind]

    def is_installed(self, kind: str, name: str) -> bool:
        """Whether it came with the registry, so that another process has it too, and was not added or lent later."""
        return (kind, name) in self._installed

    def get(self, kind: Kind, name: str) -> Any:
        """The component of this kind and name.

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
            # The papers' other systems are plug-ins: who asks for one by its right name is told where to look.
            tail = broken or ("" if hint else "; others come with plug-ins: `lrkit plugins` lists what is installed")
            raise LrkitError(f'unknown {kind} "{word}"{hint}; there are {", ".join(known) or "none"}{tail}')
        if len(offers) > 1:
            both = " and ".join(offer.distribution for offer in offers)
            raise LrkitError(f'{kind} "{name}" is offered by {both}: uninstall one of them')
        return offers[0].value

    def name_of(self, kind: Kind, cls: type) -> str:
        """The registered name of a component's class. Raises LrkitError where it is not registered."""
        for offer in self.offers(kind):
            if offer.value is cls:
                return offer.name
        raise LrkitError(
            f"{kind} {cls.__module__}.{cls.__qualname__} is not registered: offer it by the hook lrkit_{kind}s of a "
            "plug-in, or in this process by lrkit.current().add(...)"
        )


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"


def _line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # of a plug-in's own exception class
        text = "(its message cannot be read)"
    text = text if len(text) <= 500 else f"{text[:500]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@cache
def current() -> Registry:
    """The registry of this process: built-ins and installed plug-ins, loaded once, when first asked for.

    Raises:
        LrkitError: a plug-in asks for it while it is being imported.
    """
    with _lock:
        if _loading:
            raise LrkitError(
                "lrkit's registry was asked for while plug-ins are being loaded: do that later, in a function"
            )
        return Registry()


_lock = threading.RLock()  # another thread waits; the same one, asking again, is a plug-in in the middle of its import
_loading: list[str] = []


@contextmanager
def _loaded(name: str) -> Iterator[None]:
    with _lock:
        _loading.append(name)
        try:
            yield
        finally:
            _loading.pop()


def registered_tasks() -> dict[str, Any]:
    """All tasks' loaders by name, for `lrkit.tasks.load_task`.

    Each is looked up when it is asked for: a name that two plug-ins claim must not stop the runs of other tasks.
    """

    def later(name: str) -> Any:
        return lambda rest: current().get("task", name)(rest)

    return {name: later(name) for name in current().names("task")}


__all__ = ["KINDS", "Kind", "Offer", "PluginWarning", "Problem", "Registry", "current", "registered_tasks"]
