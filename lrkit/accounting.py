"""Parameters, FLOPs and bytes: counted on the model itself, never guessed.

Counting needs no weights: on the meta device a model of any size is attached to and run in a moment.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrkit.adapt.adapted import Adapted, attach
from lrkit.errors import LrkitError
from lrkit.units import Block

if TYPE_CHECKING:
    from lrkit.method import Method


@attrs.frozen(kw_only=True)
class ParameterCount:
    """Trainable parameters of a method on a model, over a whole run.

    Args:
        layers: adapted layers.
        start: at the first step, without the head.
        end: at the last step; frozen tensors and masked components do not count. Which units go is not known without
            training: here each counts at its policy's mean unit size. Where it is not even known how many go (see
            `Action.budgeted`), none goes here, and the range says the rest.
        average: over all steps, likewise.
        end_range: the least and the most that `end` can be, whichever units go.
        average_range: likewise for `average`.
        core: core values (λ) that are in `start`; AdaLoRA's paper leaves them out.
        head: of the task head (classifier, pooler), which the papers leave out.
        model: all parameters of the plain model without its head.
        total_steps: the run that the averages are over.
    """

    layers: int
    start: int
    end: float
    average: float
    end_range: tuple[int, int]
    average_range: tuple[float, float]
    core: int
    head: int
    model: int
    total_steps: int


def count(method: "Method", model: nn.Module, *, total_steps: int, **attach_settings: Any) -> ParameterCount:
    """Count the trainable parameters of a method on a model, at every step of a run, from the schedule alone.

    Args:
        method: the method.
        model: any model, on the meta device for one that has no weights. It is given back as it was.
        total_steps: optimizer steps of the run.
        **attach_settings: ``targets`` and ``train_also`` of `lrkit.attach`.

    Raises:
        LrkitError: the method does not fit the model or the length of the run.
    """
    adapted = attach(model, method, **attach_settings)
    try:
        controller = adapted.controller
        controller.begin(total_steps)
        head = sum(p.numel() for p in adapted.head_parameters())
        added = set(map(id, adapted.added_parameters()))
        plain = sum(p.numel() for p in _unique(model) if id(p) not in added) - head
        core = sum(
            part.of(module).numel()
            for part in method.parameterization.parts
            if part.core
            for module in _modules(adapted)
        )
        start = sum(p.numel() for p in adapted.adapter_parameters())
        series = [_removed(adapted, index, total_steps) for index in range(len(method.policies))]
        times, most, least, mean = _together(adapted, series, total_steps)
        return ParameterCount(
            layers=len(adapted.adapters),
            start=start,
            end=start - mean[-1],
            average=start - math.fsum(map(mul, times, mean)) / total_steps,
            end_range=(start - most[-1], start - least[-1]),
            average_range=(
                start - sum(map(mul, times, most)) / total_steps,
                start - sum(map(mul, times, least)) / total_steps,
            ),
            core=core,
            head=head,
            model=plain,
            total_steps=total_steps,
        )
    finally:
        adapted.detach()


def _modules(adapted: Adapted) -> list[nn.Module]:
    return list(adapted.adapters.values())


def _unique(model: nn.Module) -> list[nn.Parameter]:
    return list(dict.fromkeys(model.parameters()))


@attrs.frozen
class _Removed:
    least: int
    most: int
    share: float


def _together(
    adapted: Adapted, series: Sequence[Sequence[tuple[int, _Removed]]], total_steps: int
) -> tuple[list[int], list[int], list[int], list[float]]:
    """What all policies take out of training, by spans of equal steps: how many steps, the most, the least, and the mean.

    Policies may take the same entries. The most is then their sum, but no more than there is; the least is the larger
    one; and in the mean an entry stays with the product of the shares that are kept. What is added counts as taken out
    below zero.
    """
    if not series:
        return [total_steps], [0], [0], [0.0]
    sizes: dict[int, int] = {}
    policies: dict[int, tuple[int, ...]] = {}
    for index, state in enumerate(adapted.controller.policies):
        for block in state.blocks:
            for tensor in block.tensors:
                sizes[id(tensor)] = tensor.numel()
                policies[id(tensor)] = (*policies.get(id(tensor), ()), index)
    groups: dict[tuple[int, ...], int] = {}
    for key, who in policies.items():
        groups[who] = groups.get(who, 0) + sizes[key]
    everything = sum(sizes.values())
    times, steps = _joined(series)
    most = [min(everything, sum(r.most for r in step)) for step in steps]
    least = [max(0, *(r.least for r in step)) + sum(min(0, r.least) for r in step) for step in steps]
    mean = [
        math.fsum(size * (1 - math.prod(1 - step[i].share for i in who)) for who, size in groups.items())
        for step in steps
    ]
    return times, most, least, mean


def _joined(series: Sequence[Sequence[tuple[int, _Removed]]]) -> tuple[list[int], list[tuple[_Removed, ...]]]:
    """Spans of several policies cut at the same steps: how many steps each, and what the policies take out."""
    ends = [list(accumulate(times for times, _ in each)) for each in series]
    cuts = sorted({end for each in ends for end in each})
    times = [end - begin for begin, end in pairwise([0, *cuts])]
    columns = [[each[bisect_left(e, cut)][1] for cut in cuts] for each, e in zip(series, ends, strict=True)]
    return times, list(zip(*columns, strict=True))


def _removed(adapted: Adapted, index: int, total_steps: int) -> list[tuple[int, _Removed]]:
    """Parameters out of training by one policy, by spans of equal steps; below zero where it adds some."""
    state = adapted.controller.policies[index]
    budgeted = state.policy.action.budgeted
    sizes = sorted(size for block in state.blocks for size in _unit_sizes(block))
    below = [0]
    for size in sizes:
        below.append(below[-1] + size)
    removed = []
    # During a step trains what the decision after the step before has left.
    for times, there, cut, _ in _but_last(state.course(total_steps)):
        if not budgeted:
            # How many go is known only after a run: none, or all of them once the schedule has begun.
            removed.append((times, _Removed(0, below[-1] if cut else 0, 0.0)))
            continue
        gone = min(cut, state.units)
        new = there - (state.units - gone)
        least, most = below[gone] - new * sizes[-1], below[-1] - below[-1 - gone] - new * sizes[0]
        removed.append((times, _Removed(least, most, 1 - there / state.units)))
    return removed


def _but_last(spans: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Spans without the state after the last step."""
    times, there, cut, added = spans[-1]
    return [*spans[:-1], *([(times - 1, there, cut, added)] if times > 1 else [])]


def _unit_sizes(block: Block) -> list[int]:
    total = 0
    for part in block.parts:
        numel = block.tensor(part).numel()
        total += numel // block.count if block.kind == "component" else numel
    return [total] * block.count


@attrs.frozen(kw_only=True)
class Flops:
    """Floating-point operations of one batch: a multiply-add is two. Counted by torch as they are dispatched."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def flops(model: nn.Module, batch: Mapping[str, Tensor], loss: "Callable[[Any], Tensor] | None" = None) -> Flops:
    """Count one forward and backward pass as the model now is: frozen matrices and cut ranks cost nothing.

    Args:
        model: any model, on the meta device too (with a batch there).
        batch: keyword arguments of its forward.
        loss: from the model's output to a scalar; None for its ``loss``, or the sum of its first output.

    Returns:
        The counts. Gradients are left as they were found.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with FlopCounterMode(display=False) as forward:
        output = model(**batch)
    scalar = loss(output) if loss is not None else _scalar(output)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(scalar, parameters, allow_unused=True)
    return Flops(forward=forward.get_total_flops(), backward=backward.get_total_flops())


def flops_on(method: "Method", model: nn.Module, tokens: int, **attach_settings: Any) -> Flops:
    """`flops` of a method's first step on a model for one sequence of so many tokens. The model is given back as it was.

    Args:
        method: the method.
        model: a model that takes ``input_ids`` and ``attention_mask``, on any device.
        tokens: length of the sequence.
        **attach_settings: ``targets`` and ``train_also`` of `lrkit.attach`.
    """
    adapted = attach(model, method, **attach_settings)
    try:
        device = next(model.parameters()).device
        ids = torch.zeros((1, tokens), dtype=torch.long, device=device)
        try:
            try:
                return flops(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            except RuntimeError:
                # Some models look into the mask, which has no values on the meta device; others cannot do without it.
                return flops(model, {"input_ids": ids})
        except (RuntimeError, NotImplementedError, IndexError) as error:
            first = " ".join(str(error).split())[:200]
            raise LrkitError(
                f"{type(model).__name__} cannot be run for {tokens} tokens on {device.type} to count FLOPs: {first}"
            ) from error
    finally:
        adapted.detach()


def _scalar(output: Any) -> Tensor:
    if getattr(output, "loss", None) is not None:
        value: Tensor = output.loss
        return value
    first: Tensor = output[0] if not isinstance(output, Tensor) else output
    return first.sum()


@attrs.frozen(kw_only=True)
class Bytes:
    """Memory of a run beside activations, in bytes.

    Args:
        parameters: of the whole model, adapters in.
        gradients: of what trains.
        optimizer: the optimizer's state.
        adaptive: lrkit's own: statistics, masks, and indices of units.
    """

    parameters: int
    gradients: int
    optimizer: int
    adaptive: int


def memory(adapted: Adapted, optimizer: torch.optim.Optimizer | None = None) -> Bytes:
    """Count the bytes that a run holds now.

    Args:
        adapted: the handle.
        optimizer: whose state is counted; None counts none.
    """
    unique = _unique(adapted.model)
    states = optimizer.state.values() if optimizer is not None else ()
    controller = adapted.controller
    own = [t for s in controller.policies for t in (s.kept, s.still, *s.buffers.values())]
    own += [t for s in controller.policies for t in s.layout.index]
    return Bytes(
        parameters=_bytes(unique),
        gradients=_bytes([p.grad for p in unique if p.grad is not None]),
        optimizer=_bytes([v for state in states for v in state.values() if isinstance(v, Tensor)]),
        adaptive=_bytes(own),
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
