"""Plug-ins: which ones are installed, loading one, and seeing that it is sound.

A plug-in's code may raise anything, and its objects may lie. Here all of that becomes one line in a `ForeignError`, so that
a broken plug-in costs nobody else anything. Imports no torch: the command line asks for installed distributions first.
"""

import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.metadata import Distribution, EntryPoint
from typing import Any

import attrs
import pluggy

from lrkit import foreign, hookspecs
from lrkit.errors import LrkitError, nearest
from lrkit.foreign import ForeignError
from lrkit.hookspecs import GROUP, KINDS, Kind, hook_of, is_name
from lrkit.retired import outdated

_entry_points = metadata.entry_points
_NAMELESS = "an unknown distribution"


@attrs.frozen
class Offer:
    """One component of a plug-in.

    Args:
        kind: its kind.
        name: the name that it is offered under.
        value: the class, function or text.
        distribution: who brought it, with the version.
        plugin: the entry point's name.
    """

    kind: Kind
    name: str
    value: Any
    distribution: str
    plugin: str


# ---- installed distributions -----------------------------------------------------------------------------------------


def installed() -> tuple[list[tuple[str, EntryPoint]], list[tuple[str, str]]]:
    """List the entry points in lrkit's group, in order, each with its distribution's name and version.

    Returns:
        The entry points; and (distribution, why) per distribution that may have some and cannot be read.
    """
    try:
        found = [(_named(point.dist), point) for point in _entry_points(group=GROUP)]
        unread: list[tuple[str, str]] = []
    except Exception:  # one broken distribution breaks the list of all: look at each by itself
        found, unread = _one_by_one(GROUP)
    return sorted(found, key=lambda pair: (pair[0], pair[1].name)), unread


def spare_others() -> None:
    """Let torch and transformers work beside a distribution whose entry points cannot be read.

    They list entry points as well, and fail if one file is no such list. Call this in a process that is lrkit's own: it
    replaces `importlib.metadata.entry_points` by one that leaves out unreadable files, if there are any.
    """
    try:
        metadata.entry_points(group=GROUP)
    except Exception:

        def readable(**which: Any) -> metadata.EntryPoints:
            return metadata.EntryPoints(point for _, point in _one_by_one(None)[0]).select(**which)

        metadata.entry_points = readable  # type: ignore[assignment]


def normalized(distribution: str) -> str:
    """Return a distribution's name as names are compared (PEP 503): ``lrkit-peft`` for ``Lrkit.PEFT``."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _one_by_one(group: str | None) -> tuple[list[tuple[str, EntryPoint]], list[tuple[str, str]]]:
    """List entry points as `installed` does, of one group or of all, one distribution after another."""
    found: list[tuple[str, EntryPoint]] = []
    unread: list[tuple[str, str]] = []
    seen = set()
    for distribution in metadata.distributions():
        name = _named(distribution)
        if name != _NAMELESS:
            plain = normalized(name.partition(" ")[0])
            if plain in seen:
                continue  # shadowed by the first of this name on the path
            seen.add(plain)
        try:
            found += [(name, point) for point in distribution.entry_points if group in (None, point.group)]
        except Exception as error:
            if _concerns(distribution):
                unread.append((name, f"its entry points cannot be read: {foreign.line_of(error)}"))
    return found, unread


def _concerns(distribution: Distribution) -> bool:
    """Return whether entry points that cannot be read may be lrkit's."""
    try:
        return f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or "")
    except Exception:
        return True


def _named(distribution: Distribution | None) -> str:
    """Return name and version of a distribution, as far as its metadata can be read."""
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


# ---- one plug-in -----------------------------------------------------------------------------------------------------


def imported(point: EntryPoint) -> object:
    """Load what an entry point names. Raises ForeignError if it cannot be imported."""
    try:
        return foreign.call(point.load)
    except LrkitError as error:
        raise ForeignError(f"cannot be imported: {foreign.line_of(error)}", foreign.detail()) from error
    except ForeignError as error:
        raise ForeignError(f"cannot be imported: {error.line}", error.detail) from error


def offers_of(
    plugin: object, distribution: str, name: str, bases: Mapping[Kind, type]
) -> tuple[list[Offer], list[str]]:
    """Ask a plug-in's hooks for its components.

    Args:
        plugin: a module, or an object with hook implementations.
        distribution: who brought it.
        name: the entry point's name.
        bases: the class that components of a kind must derive from.

    Returns:
        Its components; and a line per component that is left out, since it was written for an earlier lrkit.

    Raises:
        ForeignError: the plug-in is not sound. Nothing of it is to be used.
    """
    try:
        return foreign.call(_offers_of, plugin, distribution, name, bases)  # type: ignore[no-any-return]
    except LrkitError as error:
        raise ForeignError(str(error), "") from error


def _offers_of(
    plugin: object, distribution: str, name: str, bases: Mapping[Kind, type]
) -> tuple[list[Offer], list[str]]:
    """Ask a plug-in's hooks. Raises LrkitError if they are wrong, and whatever the plug-in's own code raises."""
    manager = _manager(plugin, f"{distribution}:{name}")
    offers: list[Offer] = []
    left_out: list[str] = []
    try:
        for kind in KINDS:
            for key, value in _asked(manager, kind):
                if flaw := _flaw(kind, key, value, bases.get(kind)):
                    raise LrkitError(flaw)
                key = str.__str__(key)  # a subclass of str may compare as it likes
                if kind in bases and (reason := outdated(kind, value)):
                    left_out.append(f'{kind} "{key}" {reason}')
                elif abstract := sorted(getattr(value, "__abstractmethods__", ())) if kind in bases else []:
                    missing = ", ".join(abstract)
                    raise LrkitError(f'{hook_of(kind)}: "{key}": class {value.__name__} does not write {missing}')
                else:
                    offers.append(Offer(kind, key, value, distribution, name))
    except (LrkitError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ForeignError(f"a hook raised {foreign.line_of(error)}", foreign.detail()) from error
    return offers, left_out


def _manager(plugin: object, name: str) -> pluggy.PluginManager:
    """Register one plug-in with pluggy. Raises LrkitError if its hooks are misspelt, unmarked or not there."""
    if plugin is None:
        raise LrkitError("the entry point is None: it must name a module or an object with hooks")
    # A manager for each: a hostile object must not meet the others, and pluggy compares those that it holds.
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name=name)
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
    return manager


def _misspelt(manager: pluggy.PluginManager, plugin: object) -> str | None:
    """Return what is wrong with a plug-in's hooks, or None."""
    known = [hook_of(kind) for kind in KINDS]
    callers = manager.get_hookcallers(plugin) or ()
    for caller in callers:
        if not caller.has_spec():
            return f'there is no hook "{caller.name}"{nearest(caller.name, known)}'
    for name in dir(plugin):
        value = getattr(plugin, name, None) if name.startswith("lrkit_") else None
        if not callable(value):
            continue
        if name not in known:
            return f'there is no hook "{name}"{nearest(name, known)}'
        if manager.parse_hookimpl_opts(plugin, name) is None:
            return f'"{name}" is not marked with @lrkit.hookimpl, so it would never be called'
    if not callers:
        return f"offers nothing: it has no function marked with @lrkit.hookimpl; there are {', '.join(known)}"
    return None


def _asked(manager: pluggy.PluginManager, kind: Kind) -> Iterator[tuple[Any, Any]]:
    """Call the hook of a kind, if the plug-in has it, and go through its answer."""
    hook = hook_of(kind)
    implementations = getattr(manager.hook, hook).get_hookimpls()
    if len(implementations) > 1:
        raise LrkitError(f"{hook} is implemented {len(implementations)} times: merge them into one")
    for implementation in implementations:
        offered = implementation.function()
        if not isinstance(offered, Mapping):
            raise LrkitError(f"{hook} must return a mapping from names to {kind}s, not {type(offered).__name__}")
        yield from offered.items()


def _flaw(kind: Kind, key: Any, value: Any, base: type | None) -> str | None:
    """Return what is wrong with one offered component, or None."""
    hook = hook_of(kind)
    if not isinstance(key, str) or not key:
        return f"{hook} must have names as keys, not {foreign.text_of(key)}"
    if not is_name(str.__str__(key)):
        return (
            f'{hook}: a name begins with a letter, goes on with letters, digits, ".", "_", "-" and "/", and is no word '
            f"for a value, unlike {key!r}"
        )
    if kind == "study":
        readable = isinstance(value, str) or hasattr(value, "read_text")
        wanted = None if readable else "a path or the text of a TOML file"
    elif base is None:
        wanted = None if callable(value) else "callable"
    elif not isinstance(value, type) or not issubclass(value, base):
        wanted = f"a class derived from {base.__name__}"
    elif "__attrs_attrs__" not in vars(value):
        return f'{hook}: "{key}": decorate class {value.__name__} with @attrs.frozen(kw_only=True)'
    else:
        wanted = None
    return f'{hook}: "{key}" must be {wanted}, not {foreign.text_of(value)}' if wanted else None
