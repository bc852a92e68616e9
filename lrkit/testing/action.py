"""The contract of an action."""

import functools
from typing import Any, ClassVar, get_args

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit import metrics
from lrkit.actions import Action, Ballot, Fate, Verdict
from lrkit.adapt.adapted import attach
from lrkit.loop.fates import fate_of
from lrkit.method import Method
from lrkit.parameterizations import Parameterization, Target
from lrkit.process import as_it_was
from lrkit.testing.base import (
    POINTS,
    PartContract,
    Run,
    batch,
    builtin_metrics,
    builtin_parameterizations,
    calling,
    clause,
    decides,
    expect,
    method_with,
    or_refused,
    resumes,
    seed_torch,
    tiny,
)
from lrkit.units import Block, Part, blocks_of, present, split


@attrs.frozen(kw_only=True)
class _Nothing(Parameterization):
    """No part at all: nothing that an action could act on."""

    @property
    def parts(self) -> tuple[Part, ...]:
        return ()

    def build(self, target: Target) -> nn.Module:
        return target.layer


class _Stage:
    """A model in the middle of a run, and half of its blocks for an action to act on."""

    def __init__(self, action: Action, parameterization: Parameterization) -> None:
        self.model = tiny()
        seed_torch(5)
        adapted = attach(self.model, Method(parameterization=parameterization))
        self.optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
        adapted.bind(self.optimizer, total_steps=2)
        with torch.no_grad():
            for p in adapted.adapter_parameters():
                p.normal_()
        x, labels = batch()
        for _ in range(2):
            self.optimizer.zero_grad()
            (F.cross_entropy(self.model(x), labels) + adapted.penalty()).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        adapted.unbind()
        trained = {id(p) for p in adapted.parameters()}
        blocks = blocks_of(adapted.adapters, parameterization.parts, action.unit, trained)
        self.blocks: list[Block] = blocks[: max(2, len(blocks) // 2)]
        self.parameters = dict(self.model.named_parameters())

    @property
    def count(self) -> int:
        return sum(block.count for block in self.blocks)

    def kept(self, which: str) -> Tensor:
        if which != "half":
            return torch.full((self.count,), which == "all")
        return torch.randperm(self.count, generator=torch.Generator().manual_seed(6)) % 2 == 0

    def look(self) -> dict[str, Any]:
        """Value, flag, gradient and optimizer state of every parameter."""
        return {
            name: (
                p.detach().clone(),
                p.requires_grad,
                None if p.grad is None else p.grad.clone(),
                {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.optimizer.state.get(p, {}).items()},
            )
            for name, p in self.parameters.items()
        }

    def groups(self) -> str:
        return repr(
            [{k: [id(p) for p in v] if k == "params" else v for k, v in g.items()} for g in self.optimizer.param_groups]
        )


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict | tuple) and isinstance(two, dict | tuple):
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        return (
            len(one) == len(two)
            and all(k in two if isinstance(two, dict) else True for k in keys)
            and all(_same(one[k], two[k]) for k in keys)
        )
    return type(one) is type(two) and bool(one == two)


class ActionContract(PartContract):
    """The contract of a `lrkit.Action`."""

    parameterizations: ClassVar[tuple[Parameterization, ...]] = ()
    """Parameterizations beside lrkit's own that it is to be tried on."""
    exact: ClassVar[bool] = True
    """False for a rule of `decide` that keeps another number than the budget, as its source has it. An action's class may
    say so itself, by an attribute `exact`, for a check that does not know this class."""

    def _is_exact(self, component: Action) -> bool:
        return self.exact and bool(getattr(component, "exact", True))

    def _fitting(self, component: Action) -> list[Parameterization]:
        fitting = []
        for parameterization in (*self.parameterizations, *builtin_parameterizations()):
            build = functools.partial(
                method_with, component, parameterization=parameterization, metric=metrics.GradientUncertainty()
            )
            if or_refused(build, component, parameterization) is not None:
                fitting.append(parameterization)
        expect(fitting, "it refuses every parameterization: name one that it fits in `parameterizations`")
        return fitting

    def _host(self, component: Any) -> Method:
        return method_with(
            component, parameterization=self._fitting(component)[0], metric=metrics.GradientUncertainty()
        )

    def _exercise(self, component: Any) -> None:
        with as_it_was():
            stage = _Stage(component, self._fitting(component)[0])
        component.proximal(stage.blocks, 0.5, stage.optimizer)
        for which in ("all", "half", "none"):
            component.decide(self._ballot(20, 8))
            fate = fate_of(component)
            for call in (fate.hold, fate.restore):
                call(stage.blocks, stage.kept(which))
            component.apply(stage.blocks, stage.kept(which), stage.optimizer)

    def _ballot(self, units: int, budget: int, *, ties: bool = False, out: int = 0) -> Ballot:
        generator = torch.Generator().manual_seed(7)
        scores = torch.zeros(units) if ties else torch.randperm(units, generator=generator).float() / units
        candidates = torch.ones(units, dtype=torch.bool)
        candidates[torch.randperm(units, generator=generator)[:out]] = False
        return Ballot(
            scores.masked_fill(~candidates, -torch.inf),
            candidates,
            budget,
            budget / units,
            scores[candidates].repeat_interleave(3),
            torch.ones(units, dtype=torch.long),
            torch.zeros(units, dtype=torch.long),
            layers=1,
        )

    @clause
    def test_says_what_it_acts_on(self, component: Any) -> None:
        """`unit` and `fate` are words that lrkit knows; `final` and `grows` are True or False."""
        kinds = ("component", "matrix", "layer")
        expect(component.unit in kinds, f"unit must be one of {', '.join(kinds)}, not {component.unit!r}")
        fates = get_args(Fate)
        says = getattr(component, "fate", None)
        expect(says in fates, f"fate must be one of {', '.join(fates)}, not {says!r}")
        for name in ("final", "grows"):
            says = getattr(component, name, None)
            expect(isinstance(says, bool), f"{name} must be True or False, not {says!r}")

    @clause
    def test_decide_keeps_the_best_of_the_budget(self, component: Any) -> None:
        """`decide` keeps exactly the budget, ties and all, and nobody with a lower score than one that loses."""
        for units, budget in ((20, 8), (20, 0), (20, 20), (1, 1), (1, 0)):
            # If losing is final, some are out already; the budget has never been above those that are left.
            for out, ties in ((0, False), (0, True), (min(units - budget, 5) if component.final else 0, False)):
                ballot = self._ballot(units, budget, ties=ties and self._is_exact(component), out=out)
                before = attrs.asdict(ballot, recurse=False)
                copies = {key: v.clone() if isinstance(v, Tensor) else v for key, v in before.items()}
                with torch.no_grad(), calling("decide"):
                    kept = self._kept(component, ballot)
                name = f"{budget} of {units - out}"
                expect(_same(copies, before), "decide writes to the ballot it was given")
                lost = ballot.scores[~kept & ballot.candidates]
                expect(
                    not kept.any() or not len(lost) or bool(ballot.scores[kept].min() >= lost.max()),
                    f"{name}: it keeps a unit whose score is below that of one that loses",
                )
                if self._is_exact(component):
                    expect(int(kept.sum()) == budget, f"{name}: it keeps {int(kept.sum())}, the budget is {budget}")
                with torch.no_grad():
                    expect(torch.equal(kept, component.decide(ballot).kept), f"{name}: asked again, it keeps others")

    @clause
    def test_losers_stay_lost_where_that_is_final(self, component: Any) -> None:
        """If it is `final`, `decide` never keeps a unit that is not a candidate any more."""
        for budget in (3, 10) if component.final else ():
            ballot = self._ballot(20, budget, ties=budget == 3, out=8)
            with torch.no_grad(), calling("decide"):
                kept = self._kept(component, ballot)
            back = int((kept & ~ballot.candidates).sum())
            expect(not back, f"final is True, and decide keeps {back} units that had lost for good")

    def _kept(self, component: Action, ballot: Ballot) -> Tensor:
        """Return who is kept. Raises Broken for a verdict that is not one."""
        verdict, units = component.decide(ballot), len(ballot.scores)
        expect(
            isinstance(verdict, Verdict), f"decide must return a lrkit.actions.Verdict, not {type(verdict).__name__}"
        )
        kept = verdict.kept
        expect(
            isinstance(kept, Tensor) and kept.dtype == torch.bool and kept.shape == (units,),
            f"decide must keep bool [{units}], not {getattr(kept, 'dtype', type(kept))} {list(getattr(kept, 'shape', ()))}",
        )
        return kept

    @clause
    def test_proximal_moves_its_units_alone(self, component: Any) -> None:
        """`proximal` gives None, or bool [units]; no flag, no optimizer state and nothing outside of its blocks changes."""
        for parameterization in self._fitting(component):
            for share in (1.0, 0.5, 0.0):
                stage = _Stage(component, parameterization)
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
                        _same(before[name][there], after[name][there]),
                        f"proximal on {parameterization!r} changes {name}, its flag, gradient or optimizer state",
                    )
                expect(stage.groups() == groups, "proximal edits the optimizer's param_groups")

    @clause
    def test_acts_on_what_loses_alone(self, component: Any) -> None:
        """`apply`, also without an optimizer, leaves kept units, and all outside of its blocks, flags and gradients too."""
        for parameterization in self._fitting(component):
            for which in ("all", "half", "none"):
                stage = _Stage(component, parameterization)
                kept, before = stage.kept(which), stage.look()
                for name, optimizer in (("apply", stage.optimizer), ("apply without an optimizer", None)):
                    with calling(f"{name} on {parameterization!r}, {which} kept,"):
                        component.apply(stage.blocks, kept, optimizer)
                    self._compare(stage, kept, before, f"{name} on {parameterization!r}, {which} of the units kept:")

    def _compare(self, stage: _Stage, kept: Tensor, before: dict[str, Any], name: str) -> None:
        after = stage.look()
        names = {id(p): n for n, p in stage.parameters.items()}
        inside: set[str] = set()
        for block, keep in zip(stage.blocks, split(kept, stage.blocks), strict=True):
            for part, tensor in zip(block.parts, block.tensors, strict=True):
                key = names.get(id(tensor))
                if key is None:  # put in another's place, which is another clause's matter
                    continue
                inside.add(key)
                if bool(keep.all()):
                    expect(_same(before[key][:2], after[key][:2]), f"{name} {key}, all of it kept, has changed")
                elif part.axis is not None and block.kind == "component":
                    index = keep.nonzero().flatten()
                    old, new = (look[key][0].index_select(part.axis, index) for look in (before, after))
                    expect(torch.equal(old, new), f"{name} the kept components of {key} have changed")
        for key in before:
            expect(
                key in inside or _same(before[key], after[key]),
                f"{name} {key} is in none of the blocks, and its value, flag, gradient or optimizer state has changed",
            )

    @clause
    def test_parameters_stay_what_they_are(self, component: Any) -> None:
        """The parameters stay the same objects, leaves of the same shape and dtype, and `param_groups` are never edited."""
        for parameterization in self._fitting(component):
            for optimizer in (True, False):
                stage = _Stage(component, parameterization)
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
            stage, fresh = (_Stage(component, parameterization) for _ in range(2))
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

    @clause
    def test_refusal_names_both_sides(self, component: Any) -> None:
        """Each parameterization is taken, or refused when the method is built, in one line that names both sides."""
        for parameterization in (*self.parameterizations, *builtin_parameterizations(), _Nothing()):
            with calling(f"refusal({parameterization!r})"):
                reason = component.refusal(parameterization)
            expect(
                reason is None or (isinstance(reason, str) and reason.strip()),
                f"refusal must return None or the reason in words, not {reason!r}",
            )
            build = functools.partial(
                method_with, component, parameterization=parameterization, metric=metrics.GradientUncertainty()
            )
            with calling(f"a method with {parameterization!r}"):
                or_refused(build, component, parameterization)

    @clause
    def test_what_has_lost_is_out(self, component: Any) -> None:
        """After the last decision a masked or removed component adds nothing, whatever the optimizer does."""
        if component.unit != "component" or component.fate not in ("masked", "removed"):
            return
        for parameterization in self._fitting(component):
            method = method_with(component, parameterization=parameterization, metric=metrics.GradientUncertainty())
            with calling(f"a run with {parameterization!r}"):
                run = Run(method, 10)
                run.to(10)  # the last decision was after step 8
            (state,) = run.adapted.controller.policies
            for block, keep in zip(state.blocks, split(state.kept, state.blocks), strict=True):
                there = present(block.module, block.parts)
                back = int((there & ~keep).sum())
                expect(
                    not back,
                    f"on {parameterization!r}: {back} components of {block.name} that lost are not zero two steps after the "
                    'last decision, and are counted as gone: `apply` must take them out, or fate be "dimmed"',
                )

    @clause
    def test_trains_with_all_it_takes(self, component: Any) -> None:
        """With every parameterization and metric that is not refused it trains, decides, and can be cut where it prunes."""
        for parameterization in self._fitting(component):
            for metric in builtin_metrics():
                sides = {"parameterization": parameterization, "metric": metric}
                method = or_refused(functools.partial(method_with, component, **sides), component, *sides.values())
                if method is None:
                    continue
                with calling(f"a run with {parameterization!r} and {metric!r}"):
                    run = Run(method, 10)
                    run.to(8)
                    if component.unit == "component":
                        run.adapted.compact()
                    run.to(10)
                    decides(run, self._is_exact(component))

    @clause
    def test_resumes_exactly(self, component: Any) -> None:
        """A run that is saved and resumed, before, between and after decisions, is bitwise the run."""
        for parameterization in self._fitting(component):
            method = method_with(component, parameterization=parameterization, metric=metrics.GradientUncertainty())
            resumes(method, 10, POINTS)
