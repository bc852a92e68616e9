"""Ask what an action does to tensors, to the optimizer's state and to flags, and what it leaves alone."""

from typing import Any

import torch
from torch import Tensor

from lrkit.loop.fates import fate_of
from lrkit.testing.action.clauses import ActionClauses
from lrkit.testing.action.stage import Stage
from lrkit.testing.base import clause
from lrkit.testing.comparisons import same
from lrkit.testing.findings import calling, expect
from lrkit.units import split


class Acting(ActionClauses):
    """The clauses about `proximal`, `apply` and a load, on a model in the middle of a run."""

    @clause
    def test_proximal_moves_its_units_alone(self, component: Any) -> None:
        """`proximal` gives None, or bool [units]; no flag, no optimizer state and nothing outside of its blocks changes."""
        for parameterization in self._fitting(component):
            for share in (1.0, 0.5, 0.0):
                stage = Stage(component, parameterization)
                before, groups = stage.look(), stage.groups()
                with calling(f"proximal on {parameterization!r}"):
                    standing = component.proximal(stage.blocks, share, stage.optimizer)
                expect(
                    standing is None
                    or (
                        isinstance(standing, Tensor)
                        and standing.dtype == torch.bool
                        and standing.shape == (stage.count,)
                    ),
                    f"proximal must return None or bool [{stage.count}], not {standing!r}",
                )
                after = stage.look()
                mine = {id(tensor) for block in stage.blocks for tensor in block.tensors}
                for name, p in stage.parameters.items():
                    there = slice(1, None) if id(p) in mine else slice(None)
                    expect(
                        same(before[name][there], after[name][there]),
                        f"proximal on {parameterization!r} changes {name}, its flag, gradient or optimizer state",
                    )
                expect(stage.groups() == groups, "proximal edits the optimizer's param_groups")

    @clause
    def test_acts_on_what_loses_alone(self, component: Any) -> None:
        """`apply`, also without an optimizer, leaves kept units, and all outside of its blocks, flags and gradients too."""
        for parameterization in self._fitting(component):
            for which in ("all", "half", "none"):
                stage = Stage(component, parameterization)
                kept, before = stage.kept(which), stage.look()
                for name, optimizer in (("apply", stage.optimizer), ("apply without an optimizer", None)):
                    with calling(f"{name} on {parameterization!r}, {which} kept,"):
                        component.apply(stage.blocks, kept, optimizer)
                    self._compare(stage, kept, before, f"{name} on {parameterization!r}, {which} of the units kept:")

    def _compare(self, stage: Stage, kept: Tensor, before: dict[str, Any], name: str) -> None:
        after = stage.look()
        names = {id(p): n for n, p in stage.parameters.items()}
        inside: set[str] = set()
        for block, keep in zip(stage.blocks, split(kept, stage.blocks), strict=True):
            gates = [(part, block.tensor(part)) for part in stage.gates if block.kind == "component"]
            for part, tensor in (*zip(block.parts, block.tensors, strict=True), *gates):
                key = names.get(id(tensor))
                if key is None:  # put in another's place, which is another clause's matter
                    continue
                inside.add(key)
                if bool(keep.all()):
                    expect(same(before[key][:2], after[key][:2]), f"{name} {key}, all of it kept, has changed")
                elif part.axis is not None and block.kind == "component":
                    index = keep.nonzero().flatten()
                    old, new = (look[key][0].index_select(part.axis, index) for look in (before, after))
                    expect(torch.equal(old, new), f"{name} the kept components of {key} have changed")
        for key in before:
            expect(
                key in inside or same(before[key], after[key]),
                f"{name} {key} is in none of the blocks, and its value, flag, gradient or optimizer state has changed",
            )

    @clause
    def test_what_returns_trains_again(self, component: Any) -> None:
        """If frozen units may come back, `apply` lets those that are kept train, as they are; without an optimizer, too."""
        if component.fate != "frozen" or component.final:
            return
        for parameterization in self._fitting(component):
            stage = Stage(component, parameterization)
            wanted = {name: (value, flag) for name, (value, flag, *_) in stage.look().items()}
            for optimizer in (stage.optimizer, None):
                for which in ("none", "all"):
                    with calling(f"apply on {parameterization!r}, {which} kept,"):
                        component.apply(stage.blocks, stage.kept(which), optimizer)
                for name, p in stage.parameters.items():
                    value, flag = wanted[name]
                    expect(
                        torch.equal(p, value) and p.requires_grad == flag,
                        f"{name} is in a unit that lost and is kept again, and its value or requires_grad is not what it "
                        "was before: `apply` must let kept units train, or final be True",
                    )

    @clause
    def test_parameters_stay_what_they_are(self, component: Any) -> None:
        """The parameters stay the same objects, leaves of the same shape and dtype, and `param_groups` are never edited."""
        for parameterization in self._fitting(component):
            for optimizer in (True, False):
                stage = Stage(component, parameterization)
                groups = stage.groups()
                shapes = {name: (p.shape, p.dtype) for name, p in stage.parameters.items()}
                for which in ("half", "none"):
                    with calling(f"apply on {parameterization!r}"):
                        component.apply(stage.blocks, stage.kept(which), stage.optimizer if optimizer else None)
                expect(
                    stage.groups() == groups, "apply edits the optimizer's param_groups: a resumed run has other ones"
                )
                now = dict(stage.model.named_parameters())
                for name, p in stage.parameters.items():
                    expect(
                        now.get(name) is p,
                        f"apply puts another tensor in the place of {name}: the optimizer holds the old",
                    )
                    expect(
                        p.is_leaf and (p.shape, p.dtype) == shapes[name], f"apply changes the shape or dtype of {name}"
                    )

    @clause
    def test_a_load_makes_again_what_tensors_do_not_hold(self, component: Any) -> None:
        """`apply` makes flags if the fate is "frozen", and none otherwise; a load makes them again, and changes no value."""
        for parameterization in self._fitting(component):
            stage, fresh = (Stage(component, parameterization) for _ in range(2))
            with calling("apply"):
                component.apply(stage.blocks, stage.kept("half"), stage.optimizer)
            with torch.no_grad():
                for name, p in stage.parameters.items():
                    if p.requires_grad:
                        p.add_(0.01)  # as the optimizer would, until the next decision
                    fresh.parameters[name].copy_(p)
            wanted = {name: (p.detach().clone(), p.requires_grad) for name, p in stage.parameters.items()}
            froze = any(p.requires_grad != wanted[name][1] for name, p in fresh.parameters.items())
            expect(
                froze == (component.fate == "frozen"),
                f'fate is "{component.fate}", and apply does{"" if froze else " not"} freeze',
            )
            for times in ("", " a second time"):
                with calling("a load"):
                    fate_of(component).restore(fresh.blocks, fresh.kept("half"))
                for name, p in fresh.parameters.items():
                    value, flag = wanted[name]
                    expect(
                        torch.equal(p, value), f"a load{times} changes the value of {name}: tensors are loaded already"
                    )
                    expect(
                        p.requires_grad == flag,
                        f"after a load{times} {name}.requires_grad is {p.requires_grad}; after apply it was {flag}",
                    )
