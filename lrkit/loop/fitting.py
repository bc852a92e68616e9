"""Does a saved run fit this one? It is built at the saved ranks, and sizes are compared; nothing is changed."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lrkit.errors import LrkitError, shown
from lrkit.loop.components import Components
from lrkit.loop.policy import PolicyState
from lrkit.loop.resizing import Ranks
from lrkit.loop.rules import timetable
from lrkit.loop.run import BESIDE, Run
from lrkit.loop.state import Saved, misfit


def check(
    run: Run, saved: Saved, tensors: Mapping[str, Tensor], bound_for: int | None, off: Collection[int] = ()
) -> None:
    """Raise LrkitError if a state is not one of this run.

    Args:
        run: this run.
        saved: the state's data.
        tensors: its tensors: ``weight.*`` and ``policy.*``.
        bound_for: total steps that this run is bound for; None if it is not bound.
        off: ``id`` of each tensor that somebody froze by hand.
    """
    total = bound_for if saved.total_steps is None else saved.total_steps
    # Once every schedule has ended, nothing depends on the total any more.
    ended = bool(saved.policies) and all(policy.ended for policy in saved.policies)
    if run.method.policies and bound_for not in (None, total) and not ended:
        raise LrkitError(
            f"the state is of a run of {total} steps, this one is bound for {bound_for}: "
            "the schedule would be another one"
        )
    if len(saved.policies) != len(run.method.policies):
        raise misfit(f"policies must be a list of {len(run.method.policies)}")
    saved.check_ranks(run.ranks, run.grows)
    policies = policies_of(run, saved, tensors)
    if total is not None:
        for state in policies:
            _check_progress(state, saved, total)
    shapes = run.shapes(saved.ranks)
    frozen = run.idle(saved.ranks).union(*(state.fate.frozen(state.blocks, state.kept) for state in policies))

    def look(p: nn.Parameter) -> tuple[tuple[int, ...], bool]:
        shape = shapes.get(id(p), tuple(p.shape))
        return shape, id(p) not in frozen or id(p) in off

    for state in policies:
        prefix = f"policy.{state.index}"
        blank = {f"{prefix}.{name}": tensor for name, tensor in state.blank(look).items()}
        given = {name for name in tensors if name.startswith(f"{prefix}.")} - {f"{prefix}.kept"}
        if given != set(blank):
            raise misfit(f"{', '.join(sorted(given ^ set(blank)))} missing or not expected")
        for name, like in blank.items():
            if tensors[name].dtype != like.dtype or tensors[name].shape != like.shape:
                raise misfit(f"{name} is not {str(like.dtype).removeprefix('torch.')} {list(like.shape)}")
    known = {"weight", *(f"policy.{state.index}" for state in policies)}
    if odd := [n for n in tensors if ".".join(n.split(".", 2)[: 1 if n.startswith("weight.") else 2]) not in known]:
        raise misfit(f"{shown(odd[0])} is not expected")
    _check_sums(run, saved, policies, frozen)


def policies_of(run: Run, saved: Saved, tensors: Mapping[str, Tensor], off: Collection[int] = ()) -> list[PolicyState]:
    """Make each policy's state at the saved ranks, with its mask, and without statistics.

    Raises:
        LrkitError: tensors are missing or not expected, or a mask is not one of so many units.
    """
    numbers = {name: saved.numbers(name) for name in run.ranks}
    policies = run.policies(off)
    for state, record in zip(policies, saved.policies, strict=True):
        state.ended = record.ended
        prefix = f"policy.{state.index}"
        kept = tensors.get(f"{prefix}.kept")
        if kept is None:
            raise misfit(f"{prefix}.kept missing or not expected")
        state.take(numbers, state.kept)
        count = sum(block.count for block in state.blocks)
        if kept.dtype != torch.bool or kept.shape != (count,):
            raise misfit(f"{prefix}.kept is not bool [{count}]")
        state.take(numbers, kept.to(state.kept.device, copy=True))
        state.bury(run.tensors_of(saved.dead or ()))
    return policies


def sums_of(run: Run, saved: Saved) -> dict[str, int]:
    """Return the parameters that a saved run has trained, summed over its steps, by layer and `BESIDE` them.

    A state without a number for these is of a time when none of them ever stopped.
    """
    return {**saved.sums, BESIDE: saved.step * run.starts[BESIDE] if saved.beside is None else saved.beside}


def _check_progress(state: PolicyState, saved: Saved, total: int) -> None:
    """Refuse a decision that should have been taken, and one about units that this run has not."""
    if not state.ended:
        times = timetable(state, total)
        if 1 <= times.last < saved.step:  # a schedule that ends before the first step decides nothing, and never ends
            raise misfit(f"step {saved.step} of {total} is beyond the last decision of policy {state.index}")
    blocks = {block.name for block in state.blocks}
    mine = [d for d in saved.history if d.policy == state.index]
    if state.policy.scheduler.calibration and saved.step and not any(d.step == 0 for d in mine):
        raise misfit(f"it is of step {saved.step}, and policy {state.index} was never calibrated")
    names = {name.partition("[")[0] for d in mine for name in (*d.lost, *d.returned, *d.fresh)}
    if not names <= blocks:
        raise misfit(f"history names {shown(min(names - blocks))}, which is no unit of this run")


def _check_sums(run: Run, saved: Saved, policies: list[PolicyState], frozen: set[int]) -> None:
    """Refuse sums of more parameters than there were, or of too few for a run beyond its end."""
    step, sums = saved.step, sums_of(run, saved)
    tally = run.tally()
    ever = tally.would_be(run.shapes(saved.numbered), set(), {})
    if sums[BESIDE] > step * run.starts[BESIDE]:
        raise misfit(f"beside has {sums[BESIDE]}: more than {run.starts[BESIDE]} parameters at each of {step} steps")
    for name, first in run.ranks.items():
        grown = ever[name] if saved.numbered[name] else 0
        most = run.starts[name] * max(1, saved.numbered[name]) // first if first else max(run.starts[name], grown)
        if sums[name] > step * most:
            raise misfit(f"sums has {sums[name]} for {name}: more than {most} parameters at each of {step} steps")
    if saved.total_steps is None or step <= saved.total_steps:
        return
    components = Components(run, policies, Ranks(run.ranks), tally)
    kept = {name: int(mask.sum()) for name, mask in components.kept().items()}
    now = sum(tally.would_be(run.shapes(saved.ranks), frozen, kept).values())
    last = max((d.step for d in saved.history), default=0)
    # Half: a layer without a gradient may have been left out of the count on the way.
    if 2 * sum(sums.values()) < now * (step - last):
        raise misfit(f"step {step} is beyond the run of {saved.total_steps} steps, and sums are of fewer")
