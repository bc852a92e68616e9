"""A saved run as a record, structured strictly, and looked at before anything of it is taken over.

All of this is known without a model. `lrkit.loop.fitting` holds a record against a run.
"""

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import attrs
import cattrs
import torch
from torch import Tensor

from lrkit.errors import LrkitError, shown
from lrkit.loop.history import Decision
from lrkit.settings import MOST_STEPS
from lrkit.strict import Misfit, strict_converter, structured

FORMAT = 1
_MOST = 2**62


def misfit(what: str) -> LrkitError:
    """Make the refusal of a state, with what does not fit."""
    return LrkitError(f"the state does not fit: {what}")


@attrs.frozen(kw_only=True)
class SavedPolicy:
    """One policy's own numbers.

    Args:
        observations: how many steps its metric has observed.
        ended: whether its last decision has been taken.
    """

    observations: int
    ended: bool


@attrs.frozen(kw_only=True)
class Saved:
    """Everything that a checkpoint says beside its tensors. `check` asks whether it agrees with itself.

    Args:
        method: the method as plain data.
        targets: names of the adapted layers.
        head: names of the modules that train in full.
        ranks: layer name to the components that it stores.
        step: optimizer steps taken.
        total_steps: of the whole run; None before `bind`.
        seed: what fresh components and all chance are drawn from.
        policies: in the method's order.
        history: all decisions so far, in order.
        components: layer name to the numbers of its components, for layers that were cut or have grown.
        numbered: layer name to how many numbers have been given.
        sums: layer name to trainable parameters, summed over the steps.
        dead: layers that no gradient reaches; None if none has been seen yet.
        beside: the same as `sums` of what trains in no layer, without the head; None in states that do not say it.
        base: what the plain model was.
        allocation: the ranks in effect as plain data, for those who have only the file; None if the method has none.
    """

    method: dict[str, Any]
    targets: tuple[str, ...]
    head: tuple[str, ...]
    ranks: dict[str, int]
    step: int
    total_steps: int | None
    seed: int
    policies: tuple[SavedPolicy, ...]
    history: tuple[Decision, ...]
    components: dict[str, tuple[int, ...]]
    numbered: dict[str, int]
    sums: dict[str, int]
    dead: tuple[str, ...] | None = None
    beside: int | None = None
    base: Any = None
    allocation: Any = None

    def check(self) -> None:
        """Raise LrkitError unless all that it says agrees."""
        layers = set(self.targets)
        if len(layers) < len(self.targets):
            raise misfit("targets names a layer twice")
        for key in ("sums", "ranks", "numbered"):
            if set(getattr(self, key)) != layers:
                raise misfit(f"{key} must have a number for each layer of this run, and for no other")
        if self.dead is not None and (not set(self.dead) <= layers or len(set(self.dead)) < len(self.dead)):
            raise misfit("dead must name layers of this run, each once")
        self._check_steps()
        self._check_components()
        self._check_history()

    def _check_steps(self) -> None:
        if self.total_steps is None and self.step:
            raise misfit("steps have been taken, and total_steps is missing")
        if self.total_steps is not None and not 1 <= self.total_steps <= MOST_STEPS:
            raise misfit(f"total_steps is {self.total_steps}, and must be from 1 to {MOST_STEPS:,}")
        if self.step > MOST_STEPS:
            raise misfit(f"step {self.step} is beyond any run")

    def _check_components(self) -> None:
        for name, numbers in self.components.items():
            good = name in self.ranks and len(numbers) == self.ranks[name] and all(a < b for a, b in pairwise(numbers))
            if not good or (numbers and numbers[-1] >= self.numbered[name]):
                raise misfit(
                    f"components.{name} must be the numbers of what is left of a layer that was cut, or has grown"
                )
        for name, rank in self.ranks.items():
            if name not in self.components and rank != self.numbered[name]:
                raise misfit(
                    f"{name} has rank {rank} of {self.numbered[name]}, and components do not say which are left"
                )

    def _check_history(self) -> None:
        last: dict[int, int] = {}
        before = 0
        for d in self.history:
            if d.policy >= len(self.policies):
                raise misfit(f"history has a decision of policy {d.policy}, and there are {len(self.policies)}")
            if not max(before, last.get(d.policy, -1) + 1) <= d.step <= self.step:
                raise misfit(f"history has a decision after step {d.step} that cannot be there at step {self.step}")
            if d.kept > d.units or max(d.budget, d.spent) > d.whole:
                raise misfit(f"history has a decision after step {d.step} that keeps more units than there are")
            before = last[d.policy] = d.step
        for index, policy in enumerate(self.policies):
            if policy.ended and index not in last:
                raise misfit(f"policy {index} has ended, and history has no decision of it")

    def check_ranks(self, initial: Mapping[str, int], grows: bool) -> None:
        """Raise LrkitError if the ranks cannot have come of those that a method begins with.

        Args:
            initial: layer name to its first rank.
            grows: whether a policy adds components.
        """
        for name, first in initial.items():
            given = self.numbered[name]
            if given != first and not (grows and given > first and name in self.components):
                raise misfit(f"{name} began with rank {first} by its method, and with {given} by what the state says")

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return the numbers of a layer's components."""
        return self.components.get(name, tuple(range(self.ranks[name])))

    def to_plain(self) -> dict[str, Any]:
        """Return the record as JSON data."""
        plain: dict[str, Any] = {"format": FORMAT, **_converter().unstructure(self)}
        return plain


def read(state: Any) -> Saved:
    """Structure the data of a state, whose tensors must be plain ones under names.

    Raises:
        LrkitError: it is no state, of another format, or a value is of another type; with the path to it, such as
            "history[3].kept".
    """
    meta = state.get("meta") if isinstance(state, Mapping) else None
    needed = {"format", *(field.name for field in attrs.fields(Saved) if field.default is attrs.NOTHING)}
    if not isinstance(meta, dict) or not isinstance(state.get("tensors"), Mapping) or not needed <= set(meta):
        raise LrkitError("this is no state of lrkit (it must be what adapted.state_dict() or adapted.save() gave)")
    if type(meta["format"]) is not int or meta["format"] != FORMAT:
        raise LrkitError(f"the state is of format {shown(meta['format'])}, this lrkit reads format {FORMAT}")
    check_tensors(state["tensors"])
    if "dead" not in meta and meta["step"]:
        # A state without the word is of a run in which every layer counted, whether a gradient reached it or not.
        meta = {**meta, "dead": []}
    try:
        return structured(meta, Saved, _converter())
    except LrkitError as error:
        raise misfit(str(error)) from None


def check_tensors(tensors: Mapping[Any, Any]) -> None:
    """Raise LrkitError unless all are plain tensors with values, under names."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise misfit("not all of its tensors are tensors")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise misfit(f"{shown(name)} is no plain tensor with values")


# ---- plain data to records, strictly ----


def _whole(value: Any, _: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise Misfit(f"must be a whole number below 2^62, not {shown(value)}")
    return value


def _real(value: Any, _: Any) -> float:
    if type(value) is not float:
        raise Misfit(f"must be a number with a point, not {shown(value)}")
    return value


@cache
def _converter() -> cattrs.Converter:
    """Make a converter of whole numbers that an index can be, of floats that are floats, and of whole decisions."""
    converter = strict_converter()
    converter.register_structure_hook(int, _whole)
    converter.register_structure_hook(float, _real)
    build = converter.get_structure_hook(Decision)
    known = {field.name for field in attrs.fields(Decision)}

    def decision(value: Any, kind: Any) -> Any:
        # A record of before there were costs counts units, and has their defaults.
        if isinstance(value, Mapping) and set(value) not in (known, known - {"amount", "spent", "whole"}):
            odd = sorted(set(value) ^ known, key=str)[0]
            raise Misfit(f"has {shown(odd)}, which is not a field of it" if odd in value else f"lacks {shown(odd)}")
        return build(value, kind)

    converter.register_structure_hook(Decision, decision)
    return converter
