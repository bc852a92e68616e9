"""What a state must be like before anything of it is taken over: its data's structure, types, ranges, and agreement.

All of this is known without a model. What needs the run (shapes, masks, schedules) is `Controller.check_state`'s.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lrkit.errors import LrkitError, shown
from lrkit.settings import MOST_STEPS

FORMAT = 1
NAMES = ("lost", "returned", "fresh")
"""What a decision in a history lists by name."""

_NEEDED = (
    *("format", "method", "targets", "head", "ranks", "step", "total_steps", "policies", "history", "sums"),
    *("components", "numbered", "seed"),
)
_DECISION = {"step", "policy", "budget", "kept", "units", "threshold", *NAMES}
_MOST = 2**62


def misfit(what: str) -> LrkitError:
    """The refusal of a state, with what does not fit."""
    return LrkitError(f"the state does not fit: {what}")


def meta_of(state: Any) -> dict[str, Any]:
    """The data of a state that is whole and of this format. `check_data` looks at the rest of it.

    Raises:
        LrkitError: it is no state, or of another format.
    """
    meta = state.get("meta") if isinstance(state, Mapping) else None
    if not isinstance(meta, dict) or not isinstance(state.get("tensors"), Mapping) or not set(_NEEDED) <= set(meta):
        raise LrkitError("this is no state of lrkit (it must be what adapted.state_dict() or adapted.save() gave)")
    if type(meta["format"]) is not int or meta["format"] != FORMAT:
        raise LrkitError(f"the state is of format {shown(meta['format'])}, this lrkit reads format {FORMAT}")
    for key in ("targets", "head"):
        if not isinstance(meta[key], list) or not all(isinstance(name, str) for name in meta[key]):
            raise misfit(f"{key} is not a list of names")
    if len(set(meta["targets"])) < len(meta["targets"]):
        raise misfit("targets names a layer twice")
    if not isinstance(meta["method"], dict):
        raise misfit("method is no table")
    check_tensors(state["tensors"])
    return meta


def check_data(meta: Mapping[str, Any]) -> None:
    """Raise LrkitError where what `meta_of` gave is of wrong types or ranges, or not at one with itself."""
    _check_steps(meta)
    _check_policies(meta["policies"])
    for key in ("sums", "ranks", "numbered"):
        table = meta[key]
        named = isinstance(table, dict) and all(isinstance(name, str) for name in table)
        if not named or set(table) != set(meta["targets"]) or not all(map(_whole, table.values())):
            raise misfit(f"{key} are not whole numbers for the layers of this run")
    _check_components(meta)
    dead = meta.get("dead")
    named = isinstance(dead, list) and all(isinstance(name, str) for name in dead)
    if not (dead is None or (named and set(dead) <= set(meta["targets"]) and len(set(dead)) == len(dead))):
        raise misfit("dead is not a list of layers of this run")
    _check_history(meta)


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _check_steps(meta: Mapping[str, Any]) -> None:
    step, total = meta["step"], meta["total_steps"]
    if not _whole(meta["seed"]):
        raise misfit("seed is not a whole number below 2^62")
    if not _whole(step) or not (total is None or _whole(total)):
        raise misfit("step and total_steps are not whole numbers")
    if total is None and step:
        raise misfit("steps have been taken, and total_steps is missing")
    if total is not None and not 1 <= total <= MOST_STEPS:
        raise misfit(f"total_steps is {total}, and must be from 1 to {MOST_STEPS:,}")
    if step > MOST_STEPS:
        raise misfit(f"step {step} is beyond any run")


def _check_policies(policies: Any) -> None:
    good = isinstance(policies, list) and all(isinstance(saved, dict) for saved in policies)
    if not good or not all(_whole(s.get("observations")) and type(s.get("ended")) is bool for s in policies):
        raise misfit("policies lack observations or ended")


def _check_components(meta: Mapping[str, Any]) -> None:
    components = meta["components"]
    good = isinstance(components, dict) and set(components) <= set(meta["targets"])
    for name, numbers in components.items() if good else ():
        good = good and isinstance(numbers, list) and all(map(_whole, numbers))
        good = good and len(numbers) == meta["ranks"][name] and all(a < b for a, b in pairwise(numbers))
        good = good and (not numbers or numbers[-1] < meta["numbered"][name])
    if not good:
        raise misfit("components are not the numbers of what is left of each layer that was cut, or has grown")
    for name, rank in meta["ranks"].items():
        if name not in components and rank != meta["numbered"][name]:
            raise misfit(
                f"{name} has rank {rank} of {meta['numbered'][name]}, and components do not say which are left"
            )


def _check_history(meta: Mapping[str, Any]) -> None:
    history = meta["history"]
    good = isinstance(history, list) and all(isinstance(d, dict) and set(d) == _DECISION for d in history)
    for d in history if good else ():
        good = good and all(_whole(d[key]) for key in ("step", "policy", "budget", "kept", "units"))
        good = good and (d["threshold"] is None or isinstance(d["threshold"], float))
        good = good and all(isinstance(d[key], list) and all(isinstance(n, str) for n in d[key]) for key in NAMES)
    if not good:
        raise misfit("history is not a list of decisions")
    last: dict[int, int] = {}
    before = 0
    for d in history:
        if d["policy"] >= len(meta["policies"]):
            raise misfit(f"history has a decision of policy {d['policy']}, and there are {len(meta['policies'])}")
        if not max(before, last.get(d["policy"], 0) + 1) <= d["step"] <= meta["step"]:
            raise misfit(f"history has a decision after step {d['step']} that cannot be there at step {meta['step']}")
        if d["kept"] > d["units"] or d["budget"] > d["units"]:
            raise misfit(f"history has a decision after step {d['step']} that keeps more units than there are")
        before = last[d["policy"]] = d["step"]
    for index, saved in enumerate(meta["policies"]):
        if saved["ended"] and index not in last:
            raise misfit(f"policy {index} has ended, and history has no decision of it")


def check_tensors(tensors: Mapping[Any, Any]) -> None:
    """Raise LrkitError unless all are plain tensors with values, under names."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise misfit("not all of its tensors are tensors")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise misfit(f"{shown(name)} is no plain tensor with values")


def check_ranks(meta: Mapping[str, Any], initial: Mapping[str, int], grows: bool) -> None:
    """Raise LrkitError where ranks cannot have come of those that a method begins with.

    Args:
        meta: what `meta_of` gave.
        initial: layer name to its first rank.
        grows: whether a policy adds components.
    """
    for name, first in initial.items():
        given = meta["numbered"][name]
        if given != first and not (grows and given > first and name in meta["components"]):
            raise misfit(f"{name} began with rank {first} by its method, and with {given} by what the state says")
