"""A look at the installed plug-ins: what each offers, and whether it keeps the contract of `lrkit.testing`."""

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from lrkit.errors import LrkitError, nearest

if TYPE_CHECKING:
    from lrkit.registry import Offer, Registry
    from lrkit.testing import Finding


@attrs.frozen(kw_only=True)
class Component:
    """One thing that a plug-in offers, and whether it keeps its contract.

    Args:
        kind: its kind.
        name: its registered name.
        kept: None if it was not checked; `note` then says why.
        findings: the clauses that it breaks.
        note: why it was not checked.
        seconds: how long the check took; None if it was not checked.
    """

    kind: str
    name: str
    kept: bool | None
    findings: "tuple[Finding, ...]" = ()
    note: str = ""
    seconds: float | None = None

    @property
    def verdict(self) -> str:
        """Say in a word or two whether it keeps its contract."""
        broken = f"{len(self.findings)} clause{'s' if len(self.findings) > 1 else ''} broken"
        return {True: "kept", False: broken, None: "not checked"}[self.kept]

    @property
    def state(self) -> str:
        """Say whether it keeps its contract, and why it was not checked."""
        return f"{self.verdict}: {self.note}" if self.kept is None else self.verdict


@attrs.frozen(kw_only=True)
class Report:
    """One plug-in.

    Args:
        distribution: the distribution that brings it.
        version: the distribution's version.
        plugin: its entry point's name.
        module: what the entry point names; empty for one that was added in this process.
        components: what it offers.
        problems: why it, or a part of it, cannot be used.
    """

    distribution: str
    version: str
    plugin: str
    module: str
    components: tuple[Component, ...]
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Check that nothing is wrong with it."""
        return not self.problems and all(component.kept is not False for component in self.components)


Told = Callable[[Component, int, int], None]
"""Called after each component, with how many have been looked at and how many there are."""


def examine(name: str | None = None, registry: "Registry | None" = None, told: Told | None = None) -> list[Report]:
    """Look at every installed plug-in, and check its contract.

    Args:
        name: one distribution or entry point; None for all but lrkit's own.
        registry: what is looked at; None for this process's.
        told: called after each component.

    Raises:
        LrkitError: nothing of that name is installed.
    """
    from lrkit.registry import current
    from lrkit.vetting import installed

    registry = registry or current()
    modules = {(distribution, point.name): point.value for distribution, point in installed()[0]}
    chosen = _chosen(registry, name)
    total = sum((offer.distribution, offer.plugin) in chosen for offer in registry.offers())
    reports: list[Report] = []
    seen = 0
    for distribution, plugin in chosen:
        whose, _, version = distribution.rpartition(" ")
        problems = [p.message for p in registry.problems if (p.distribution, p.plugin) == (distribution, plugin)]
        components = []
        for offer in registry.offers():
            if (offer.distribution, offer.plugin) == (distribution, plugin):
                collision = _collision(registry, offer)
                if collision and not any(f'{offer.kind} "{offer.name}"' in problem for problem in problems):
                    problems.append(collision)
                components.append(_component(offer, collision))
                seen += 1
                if told is not None:
                    told(components[-1], seen, total)
        reports.append(
            Report(
                distribution=whose or distribution,
                version=version if whose else "",
                plugin=plugin,
                module=modules.get((distribution, plugin), ""),
                components=tuple(components),
                problems=tuple(problems),
            )
        )
    return reports


def _chosen(registry: "Registry", name: str | None) -> list[tuple[str, str]]:
    """Find the plug-ins to look at, as (distribution, entry point). Raises LrkitError if there is none of that name."""
    brought = [(offer.distribution, offer.plugin) for offer in registry.offers()]
    brought += [(problem.distribution, problem.plugin) for problem in registry.problems]
    known = list(dict.fromkeys(brought))
    ours = known[0]  # the built-ins are registered first
    chosen = [key for key in known if (key != ours if name is None else _plain(name) in _names(*key))]
    if name is not None and not chosen:
        names = sorted({word for key in known for word in _names(*key)})
        raise LrkitError(f'no plug-in "{name}" is installed{nearest(name, names)}; there are {", ".join(names)}')
    return chosen


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _names(distribution: str, plugin: str) -> set[str]:
    return {_plain(distribution.rpartition(" ")[0] or distribution), _plain(plugin)}


def _collision(registry: "Registry", offer: "Offer") -> str:
    """Say who else offers a component of this kind and name; empty if nobody does."""
    others = [each for each in registry.offers(offer.kind) if each.name == offer.name and each is not offer]
    who = ", ".join(each.distribution for each in others)
    return f'{offer.kind} "{offer.name}" is offered by {who} too' if others else ""


def _component(offer: "Offer", collision: str) -> Component:
    from lrkit.testing import CONTRACTS, Finding, check

    if collision:
        return Component(kind=offer.kind, name=offer.name, kept=None, note=collision)
    if offer.kind == "task":
        return Component(kind=offer.kind, name=offer.name, kept=None, note="loading it may need the network")
    if offer.kind == "study":
        note = f"lrkit ablate {offer.name} --dry-run checks it"
        return Component(kind=offer.kind, name=offer.name, kept=None, note=note)
    if offer.kind not in CONTRACTS:
        return Component(kind=offer.kind, name=offer.name, kept=None, note="there is no contract for it")
    begin = time.monotonic()
    try:
        findings = tuple(check(offer.value, kind=offer.kind))
    except (Exception, SystemExit) as error:
        findings = (Finding("can be checked", f"{type(error).__name__}: {' '.join(str(error).split())}"),)
    seconds = time.monotonic() - begin
    return Component(kind=offer.kind, name=offer.name, kept=not findings, findings=findings, seconds=seconds)
