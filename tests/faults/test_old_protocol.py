"""A component that was written for lrkit 0.1.0 is refused in one line; all that comes with it goes on working."""

from typing import ClassVar

import attrs
import pytest
import torch
from torch import nn

import lrkit
from lrkit import LrkitError, Registry, hookimpl, retired
from lrkit.settings import whole


@attrs.frozen(kw_only=True)
class Growing(lrkit.parameterizations.LoRA):
    """A parameterization of a third party that says by `grows` that it can grow."""

    @property
    def grows(self):
        return True


@attrs.frozen(kw_only=True)
class Counting(lrkit.Parameterization):
    """One that counts its own units, and forgets `build`."""

    @property
    def parts(self):
        return ()

    def units(self, kind):
        return 1


@attrs.frozen(kw_only=True)
class Sharing(lrkit.parameterizations.LoRA):
    """One that adapts all layers at once, and is not told the model."""

    def adapt(self, layers):
        return {layer.name: self.build(layer) for layer in layers}


@attrs.frozen(kw_only=True)
class Told(lrkit.parameterizations.LoRA):
    """One that takes whatever it is given."""

    def adapt(self, *given):
        return {layer.name: self.build(layer) for layer in given[-1]}


@attrs.frozen(kw_only=True)
class Drawing(lrkit.parameterizations.LoRA):
    """One that draws fresh components part by part, with as many arguments as now."""

    def fresh(self, part, module, count, generator):
        return torch.zeros(count)


@attrs.frozen(kw_only=True)
class Flagged(lrkit.Action):
    """An action with a flag and with a rule of its own for who is kept."""

    reversible: ClassVar[bool] = False

    @property
    def unit(self):
        return "component"

    def select(self, ballot):
        return ballot.candidates

    def apply(self, blocks, kept, optimizer):
        pass


@attrs.frozen(kw_only=True)
class Inherits(Flagged):
    """Nothing of its own is old, but its base is."""


@attrs.frozen(kw_only=True)
class Settable(lrkit.actions.Zero):
    """A flag that is a setting, since it depends on the instance."""

    retains: bool = True


@attrs.frozen(kw_only=True)
class Square(lrkit.Scheduler):
    """A scheduler, of which nothing has changed."""

    power: int = attrs.field(default=2, validator=whole(1))

    def decay(self, progress):
        return (1 - progress) ** self.power


@attrs.frozen(kw_only=True)
class Present(lrkit.actions.Zero):
    """An action that writes nothing which is retired."""

    more: int = 1


class Plugin:
    """A distribution of 0.1.0's time with something of each kind."""

    @hookimpl
    def lrkit_parameterizations(self):
        return {"growing": Growing, "counting": Counting, "sharing": Sharing, "told": Told, "drawing": Drawing}

    @hookimpl
    def lrkit_actions(self):
        return {"flagged": Flagged, "inherits": Inherits, "settable": Settable, "present": Present}

    @hookimpl
    def lrkit_schedulers(self):
        return {"square": Square}

    @hookimpl
    def lrkit_methods(self):
        return {"old": made}


def made():
    """The method that the plug-in was written for."""
    return attrs.evolve(lrkit.methods.adalora(), action=Flagged())


LINES = {
    'parameterization "growing"': "`grows` is no longer asked for",
    'parameterization "counting"': "`units` is no longer asked for",
    'parameterization "sharing"': "`adapt` takes (model, targets)",
    'parameterization "drawing"': "`fresh` takes (module, count, generator, memory)",
    'action "flagged"': "`reversible`, `select` are no longer asked for",
    'action "inherits"': "`reversible`, `select` are no longer asked for",
    'action "settable"': "`retains` is no longer asked for",
}


@pytest.fixture
def old():
    registry = Registry(discover=False)
    with pytest.warns(lrkit.registry.PluginWarning):
        registry.add("old-dist 0.7", "entry", Plugin())
    return registry


def test_one_line_each(old):
    """Each old component has its own line, which names the distribution, the members and the table."""
    assert [str(problem) for problem in old.problems] == [
        f'plug-in "entry" of old-dist 0.7: {who} was written for lrkit 0.1.0: {members}; CHANGELOG.md has a table of what '
        "takes their place"
        for who, members in LINES.items()
    ]


def test_the_rest_works(old):
    """Its schedulers, its methods and its newer components are registered."""
    assert old.get("scheduler", "square") is Square
    assert old.get("action", "present") is Present
    assert old.get("parameterization", "told") is Told
    assert old.get("method", "old") is made


@pytest.mark.parametrize("name", ["flagged", "inherits", "settable"])
def test_asking_by_name(old, name):
    """A checkpoint or a study that names an old action is told why it is not there."""
    plain = lrkit.to_plain(lrkit.methods.adalora(), old) | {"action": {"name": name}}
    with pytest.raises(LrkitError, match=rf'unknown action "{name}".*old-dist 0\.7.*0\.1\.0.*CHANGELOG\.md'):
        lrkit.from_plain(plain, old)


def test_building_in_code(old):
    """A class that no plug-in offers, or a method that builds one, is refused when the method is built."""
    refusal = r"^action Flagged was written for lrkit 0\.1\.0: `reversible`, `select` are .*CHANGELOG\.md"
    with pytest.raises(LrkitError, match=refusal):
        made()
    with pytest.raises(LrkitError, match=refusal):
        old.method("old")
    with pytest.raises(LrkitError, match=r"^parameterization Growing was written for .*`grows`"):
        attrs.evolve(lrkit.methods.adalora(), parameterization=Growing(), action=lrkit.actions.Zero())


def test_without_a_policy(old):
    """An old parameterization is refused as well if nothing is adaptive."""
    with pytest.raises(LrkitError, match=r"^parameterization Growing was written for "):
        lrkit.Method(parameterization=Growing())


def test_lrkits_own_classes():
    """A member that one of lrkit's own classes has is not the third party's."""
    assert retired.outdated("action", Present) is None
    assert retired.outdated("action", lrkit.actions.Freeze) is None
    assert not issubclass(nn.Module, lrkit.Action)


def test_growth_is_a_verdict_now():
    """A plug-in's module that imports what an old action gave is told where to look."""
    with pytest.raises(ImportError, match=r"Growth is a Verdict now; CHANGELOG\.md has a table"):
        from lrkit.actions import Growth  # noqa: F401
    assert not hasattr(lrkit.actions, "Grwoth")


@attrs.frozen(kw_only=True)
class Held(Square):
    """A scheduler with a setting of a retired name."""

    end: float = 0.5


@attrs.frozen(kw_only=True)
class Sooner(Square):
    """A scheduler with a retired method."""

    def end(self, total_steps):
        return total_steps - 1


@attrs.frozen(kw_only=True)
class Later(Sooner):
    """One that inherits it."""


@attrs.frozen(kw_only=True)
class Shared(Sharing):
    """A parameterization whose base has old arguments."""


def test_settings_of_old_names():
    """A scheduler's setting may be called as a retired method; a method may not, nor may a base's."""
    assert retired.outdated("scheduler", Held) is None
    for cls in (Sooner, Later):
        assert "`end` is no longer asked for" in retired.outdated("scheduler", cls)
    assert "`adapt` takes (model, targets)" in retired.outdated("parameterization", Shared)
