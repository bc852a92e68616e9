"""Names to components. Built-ins and plug-ins come through the same pluggy hooks, from the entry-point group ``lrkit``.

A plug-in that cannot be used never stops the import and never takes anything with it: it is left out, the reason is kept
in `Registry.problems` with the distribution's name, and asking for something it might have offered says so. A name that
two plug-ins claim belongs to neither, and using it raises with both named; a built-in name cannot be taken.
"""

import inspect
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.metadata import Distribution, EntryPoint
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs
import pluggy

from lrkit import foreign, hookspecs
from lrkit.errors import LrkitError, LrkitWarning, nearest
from lrkit.foreign import ForeignError

if TYPE_CHECKING:
    from lrkit.method import Method

Kind = Literal["parameterization", "metric", "scheduler", "action", "method", "task", "executor", "study"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUP = "lrkit"
_entry_points = metadata.entry_points
_NAME = re.compile(r"[^\W\d_][\w.-]*(/[\w.-]+)*")


def is_name(text: str) -> bool:
    """Whether a component may be registered under this name."""
    words = ("none", "null", "true", "false", "nan", "inf", "infinity")
    return _NAME.fullmatch(text) is not None and text.lower() not in words


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

        self._offers: dict[tuple[Kind, str], list[Offer]] = {}
        self._plugins: list[object] = []
        self.problems: list[Problem] = []
        self._builtin = f"lrkit {__version__}"
        self.add(self._builtin, "builtin", builtin_plugin)
        for distribution, name, plugin in plugins:
            self.add(distribution, name, plugin)
        if discover:
            points, unread = installed()
            for distribution, message in unread:
                self._problem(distribution, "entry_points.txt", message)
            for distribution, point in points:
                self._load(distribution, point)
        # What is added to it later only this process knows.
        self._installed = frozenset(self._offers)

    # ---- loading ----

    def _load(self, distribution: str, point: EntryPoint) -> None:
        try:
            with _loaded(point.name):
                plugin = foreign.call(point.load)
        except LrkitError as error:
            self._problem(distribution, point.name, f"cannot be imported: {foreign.line_of(error)}", foreign.detail())
            return
        except ForeignError as error:
            self._problem(distribution, point.name, f"cannot be imported: {error.line}", error.detail)
            return
        self.add(distribution, point.name, plugin)

    def add(self, distribution: str, name: str, plugin: object) -> None:
        """Register one plug-in: a module or an object with hook implementations.

        What is wrong with it goes to `problems` and is warned of; nothing is raised.
        """
        try:
            offers = foreign.call(self._offers_of, plugin, distribution, name)
        except LrkitError as error:
            self._problem(distribution, name, str(error))
            return
        except ForeignError as error:
            self._problem(distribution, name, error.line, error.detail)
            return
        self._plugins.append(plugin)
        for offer in offers:
            self._register(offer)

    def _offers_of(self, plugin: object, distribution: str, name: str) -> list[Offer]:
        """What a plug-in offers. Raises LrkitError for one that is wrong, and whatever its own code raises."""
        if plugin is None:
            raise LrkitError("the entry point is None: it must name a module or an object with hooks")
        if any(plugin is other for other in self._plugins):
            raise LrkitError("is registered already, under another name")
        # A manager for each: a hostile object must not meet the others, and pluggy compares those that it holds.
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(hookspecs)
        try:
            manager.register(plugin, name=f"{distribution}:{name}")
        except pluggy.PluginValidationError as error:
            raise LrkitError(foreign.line_of(error)) from None
        except Exception as error:
            raise LrkitError(f"cannot be looked at: {foreign.line_of(error)}") from error
        try:
            wrong = _misspelt(manager, plugin)
        except Exception as error:
            raise LrkitError(f"cannot be looked at: {foreign.line_of(error)}") from error
        if wrong:
            raise LrkitError(wrong)
        try:
            return [offer for kind in KINDS for offer in self._ask(manager, plugin, kind, distribution, name)]
        except (LrkitError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise ForeignError(f"a hook raised {foreign.line_of(error)}", foreign.detail()) from error

    def _ask(
        self, manager: pluggy.PluginManager, plugin: object, kind: Kind, distribution: str, name: str
    ) -> list[Offer]:
        hook = hook_of(kind)
        implementations = [i for i in getattr(manager.hook, hook).get_hookimpls() if i.plugin is plugin]
        if not implementations:
            return []
        if len(implementations) > 1:
            raise LrkitError(f"{hook} is implemented {len(implementations)} times: merge them into one")
        offered = implementations[0].function()
        if not isinstance(offered, Mapping):
            raise LrkitError(f"{hook} must return a mapping from names to {kind}s, not {type(offered).__name__}")
        expected = _expected(kind)
        offers = []
        for key, value in offered.items():
            if not isinstance(key, str) or not key:
                raise LrkitError(f"{hook} must have names as keys, not {foreign.text_of(key)}")
            key = str.__str__(key)  # a subclass may compare as it likes
            if not is_name(key):
                # All else means something on the command line: a list, a number, an option, nothing.
                raise LrkitError(
                    f'{hook}: a name begins with a letter, goes on with letters, digits, ".", "_", "-" and "/", and is no '
                    f"word for a value, unlike {key!r}"
                )
            if kind == "study":
                if not isinstance(value, str) and not hasattr(value, "read_text"):
                    raise LrkitError(
                        f'{hook}: "{key}" must be a path or the text of a TOML file, not {foreign.text_of(value)}'
                    )
            elif expected is None and not callable(value):
                raise LrkitError(f'{hook}: "{key}" must be callable, not {foreign.text_of(value)}')
            if expected is not None:
                if not (isinstance(value, type) and issubclass(value, expected)):
                    raise LrkitError(
                        f'{hook}: "{key}" must be a class derived from {expected.__name__}, not {foreign.text_of(value)}'
                    )
                if "__attrs_attrs__" not in vars(value):
                    raise LrkitError(
                        f'{hook}: "{key}": decorate class {value.__name__} with @attrs.frozen(kw_only=True)'
                    )
                abstract = sorted(getattr(value, "__abstractmethods__", ()))
                if abstract:
                    raise LrkitError(f'{hook}: "{key}": class {value.__name__} does not write {", ".join(abstract)}')
            offers.append(Offer(kind, key, value, distribution, name))
        return offers

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

    def method(self, name: str, **arguments: Any) -> "Method":
        """The method of this name, from its function with these arguments.

        Raises:
            LrkitError: no such method, or its function refuses, raises anything, or gives something else.
        """
        from lrkit.method import Method

        made: Method = self.made("method", name, **arguments)
        if not issubclass(type(made), Method):  # isinstance asks the object, which may raise
            raise LrkitError(f"{self._who('method', name)} gives {foreign.text_of(made)}, which is no lrkit.Method")
        return made

    def made(self, kind: Kind, name: str, *arguments: Any, **named: Any) -> Any:
        """What the function that is registered under a name gives: a method, a task or an executor.

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
        return f'{kind} "{name}"' + ("" if distribution == self._builtin else f" of {distribution}")

    def name_of(self, kind: Kind, cls: type) -> str:
        """The registered name of a component's class. Raises LrkitError where it is not registered."""
        for offer in self.offers(kind):
            if offer.value is cls:
                return offer.name
        raise LrkitError(
            f"{kind} {cls.__module__}.{cls.__qualname__} is not registered: offer it by the hook lrkit_{kind}s of a "
            "plug-in, or in this process by lrkit.current().add(...)"
        )


def _misspelt(manager: pluggy.PluginManager, plugin: object) -> str | None:
    """What is wrong with a plug-in's hooks, if anything is."""
    known = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("lrkit_")]
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            return f'there is no hook "{caller.name}"{nearest(caller.name, known)}'
    for name in dir(plugin):
        if not name.startswith("lrkit_"):
            continue
        value = getattr(plugin, name, None)
        if not callable(value):
            continue
        if name not in known:
            return f'there is no hook "{name}"{nearest(name, known)}'
        if not hasattr(value, "lrkit_impl"):
            return f'"{name}" is not marked with @lrkit.hookimpl, so it would never be called'
    if not manager.get_hookcallers(plugin):
        return f"offers nothing: it has no function marked with @lrkit.hookimpl; there are {', '.join(known)}"
    return None


def installed() -> tuple[list[tuple[str, EntryPoint]], list[tuple[str, str]]]:
    """The entry points in lrkit's group, in order, each with its distribution's name and version.

    Returns:
        The entry points; and (distribution, why) for each distribution that may have some, and cannot be read.
    """
    try:
        found = [(_named(point.dist), point) for point in _entry_points(group=GROUP)]
        unread: list[tuple[str, str]] = []
    except Exception:  # one broken distribution breaks the list of all: each by itself
        found, unread = _one_by_one(GROUP)
    return sorted(found, key=lambda pair: (pair[0], pair[1].name)), unread


def spare_others() -> None:
    """Let torch and transformers work beside a distribution whose entry points cannot be read.

    They list entry points as well, and one file that is no such list stops them all. For a process that is lrkit's own:
    if the list cannot be had, `importlib.metadata.entry_points` leaves out what cannot be read.
    """
    try:
        metadata.entry_points(group=GROUP)
    except Exception:

        def readable(**which: Any) -> metadata.EntryPoints:
            return metadata.EntryPoints(point for _, point in _one_by_one(None)[0]).select(**which)

        metadata.entry_points = readable  # type: ignore[assignment]


def normalized(distribution: str) -> str:
    """A distribution's name as names are compared (PEP 503): ``lrkit_peft``, ``Lrkit.PEFT``: ``lrkit-peft``."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _one_by_one(group: str | None) -> tuple[list[tuple[str, EntryPoint]], list[tuple[str, str]]]:
    """As `installed`, of one group or of all, one distribution after another."""
    found: list[tuple[str, EntryPoint]] = []
    unread: list[tuple[str, str]] = []
    seen = set()
    for distribution in metadata.distributions():
        name = _named(distribution)
        if name != _NAMELESS:
            plain = normalized(name.partition(" ")[0])
            if plain in seen:
                continue  # one that is shadowed, as Python has it
            seen.add(plain)
        try:
            found += [(name, point) for point in distribution.entry_points if group in (None, point.group)]
        except Exception as error:
            if _concerns(distribution):
                unread.append((name, f"its entry points cannot be read: {foreign.line_of(error)}"))
    return found, unread


def _concerns(distribution: Distribution) -> bool:
    """Whether entry points that cannot be read may be lrkit's."""
    try:
        return f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or "")
    except Exception:
        return True


_NAMELESS = "an unknown distribution"


def _named(distribution: Distribution | None) -> str:
    """Name and version of a distribution, as far as its metadata can be read."""
    if distribution is None:
        return _NAMELESS
    try:
        name = distribution.metadata["Name"]
    except Exception:  # no metadata, no UTF-8, ...
        return _NAMELESS
    try:
        return f"{name} {distribution.version}" if name else _NAMELESS
    except Exception:
        return f"{name} (no version)"


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
        return lambda rest: current().made("task", name, rest)

    return {name: later(name) for name in current().names("task")}


__all__ = [
    "KINDS",
    "Kind",
    "Offer",
    "PluginWarning",
    "Problem",
    "Registry",
    "current",
    "installed",
    "is_name",
    "registered_tasks",
]
