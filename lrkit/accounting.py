"""Count parameters, FLOPs and bytes on the model itself, without weights (on the meta device) if need be."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from lrkit.adapt.adapted import Adapted, attach
from lrkit.adapt.taps import resting
from lrkit.counting import counter
from lrkit.errors import LrkitError
from lrkit.layers.logical import as_floats, entries
from lrkit.loop.course import is_known
from lrkit.loop.policy import PolicyState
from lrkit.models import experts_by

if TYPE_CHECKING:
    from lrkit.method import Method


@attrs.frozen(kw_only=True)
class ParameterCount:
    """Trainable parameters of a method on a model, over a whole run.

    Args:
        layers: adapted layers.
        start: as attached, before any decision at step 0; without the head.
        end: at the last step; frozen tensors and masked components do not count. Which units go is not known without
            training, so each counts at its policy's mean unit size. If even their number is not known (see
            `Action.turnover`), none goes here, and the range says the rest.
        average: over all steps, likewise.
        end_range: the least and the most that `end` can be, whichever units go and come within the schedule's room.
        average_range: likewise for `average`.
        core: core values (λ) that `start` counts and AdaLoRA's paper does not.
        head: of the task head (classifier, pooler), which the papers do not count.
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
        model: any model, on the meta device if it has no weights. It is given back as it was.
        total_steps: optimizer steps of the run.
        **attach_settings: of `lrkit.attach`: ``targets``, ``train_also``, ``exclude``, ``slices``.

    Raises:
        LrkitError: the method does not fit the model or the length of the run.
    """
    adapted = attach(model, method, **attach_settings)
    try:
        adapted.controller.begin(total_steps)
        layers = adapted.adapters.values()
        head = sum(p.numel() for p in adapted.head_parameters())
        start = sum(p.numel() for p in adapted.adapter_parameters() if p.requires_grad)
        values = [part for part in method.parameterization.parts if part.core]
        core = sum(part.of(layer).numel() for part in values for layer in layers)
        series = [_removed(state) for state in adapted.controller.policies]
        times, most, least, mean = _together(adapted, series, total_steps)
    finally:
        adapted.detach()
    return ParameterCount(
        layers=len(layers),
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
        model=entries(model) - head,
        total_steps=total_steps,
    )


@attrs.frozen
class _Removed:
    """How many parameters a policy has taken out of training: at least, at most, and as a share of its own on average."""

    least: int
    most: int
    share: float


def _together(
    adapted: Adapted, series: Sequence[Sequence[tuple[int, _Removed]]], total_steps: int
) -> tuple[list[int], list[int], list[int], list[float]]:
    """Add up what all policies take out of training, by spans of equal steps.

    Policies may take the same entries. The most is then the sum of theirs, up to all entries; the least is the largest of
    theirs; and in the mean an entry stays with the product of the shares that they keep. Added parameters count as
    negative.

    Returns:
        Steps per span, the most, the least, and the mean.
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
    """Cut the spans of several policies at the same steps; return steps per span, and what each policy takes out."""
    ends = [list(accumulate(times for times, _ in each)) for each in series]
    cuts = sorted({end for each in ends for end in each})
    times = [end - begin for begin, end in pairwise([0, *cuts])]
    columns = [[each[bisect_left(e, cut)][1] for cut in cuts] for each, e in zip(series, ends, strict=True)]
    return times, list(zip(*columns, strict=True))


def _removed(state: PolicyState) -> list[tuple[int, _Removed]]:
    """Count what one policy takes out of training, by spans of equal steps; negative if it adds some."""
    costs = state.costs
    sizes = sorted(size for size, block in zip(costs.sizes, state.blocks, strict=True) for _ in range(block.count))
    below = [0, *accumulate(sizes)]
    if not is_known(state.policy.action):
        # Their number is known only after a run: from the first decision on none go, or all, or all go to the largest layer.
        assert state.times is not None
        total = state.times.total_steps
        first = next((each.start for each in state.times.decisions()), total)
        least = min(0, below[-1] - state.units * sizes[-1]) if state.policy.action.grows else 0
        spans = [(first, _Removed(0, 0, 0.0)), (total - first, _Removed(least, below[-1], 0.0))]
        return [(steps, removed) for steps, removed in spans if steps]
    removed = []
    # Step t trains what the decision after step t - 1 kept.
    for times, there, cut, _ in _but_last(state.course()):
        if costs.each is not None:
            least, most = costs.in_parameters(cut)
            removed.append((times, _Removed(least, min(most, below[-1]), cut / costs.first)))
            continue
        gone = min(cut, state.units)
        new = there - (state.units - gone)
        least, most = below[gone] - new * sizes[-1], below[-1] - below[-1 - gone] - new * sizes[0]
        removed.append((times, _Removed(least, most, 1 - there / state.units)))
    return removed


def _but_last(spans: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Drop the state after the last step, which no step trains in."""
    times, there, cut, added = spans[-1]
    return [*spans[:-1], *([(times - 1, there, cut, added)] if times > 1 else [])]


@attrs.frozen(kw_only=True)
class Flops:
    """Floating-point operations per batch, counted by torch when they are dispatched; a multiply-add is two."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Add forward and backward."""
        return self.forward + self.backward


def flops(model: nn.Module, batch: Mapping[str, Tensor], loss: "Callable[[Any], Tensor] | None" = None) -> Flops:
    """Count one forward and backward pass of the model as it is now: frozen matrices and cut ranks cost nothing.

    Quantized layers cost as much as float ones. No metric takes anything in here, nor is its work counted.

    Args:
        model: any model. If it is on the meta device, so must be the batch.
        batch: keyword arguments of its forward.
        loss: from the model's output to a scalar; None for its ``loss``, or the sum of its first output.

    The parameters' gradients stay as they were.
    """
    with resting():
        return passes(model, batch, loss)


def passes(model: nn.Module, batch: Mapping[str, Tensor], loss: "Callable[[Any], Tensor] | None" = None) -> Flops:
    """Count as `flops`, and what hooks compute; the forward pass alone if gradients are turned off."""
    parameters = [p for p in model.parameters() if p.requires_grad and torch.is_grad_enabled()]
    # torch does not count its product of sorted rows, which transformers takes for experts that are not adapted.
    with experts_by(model, "batched_mm" if any(p.is_meta for p in model.parameters()) else "eager"):
        with as_floats(model), counter() as forward:
            output = model(**batch)
        with counter() as backward:
            if parameters:
                scalar = loss(output) if loss is not None else _scalar(output)
                torch.autograd.grad(scalar, parameters, allow_unused=True)
    return Flops(forward=forward.get_total_flops(), backward=backward.get_total_flops())


def flops_on(method: "Method", model: nn.Module, tokens: int, **attach_settings: Any) -> Flops:
    """Count the `flops` of a method's first step on a sequence, and in an encoder-decoder a target, of so many tokens.

    Args:
        method: the method.
        model: a model that takes ``input_ids`` and ``attention_mask``, on any device. It is given back as it was.
        tokens: length of the sequence.
        **attach_settings: of `lrkit.attach`: ``targets``, ``train_also``, ``exclude``, ``slices``.
    """
    adapted = attach(model, method, **attach_settings)
    ids = torch.zeros((1, tokens), dtype=torch.long, device=next(model.parameters()).device)
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    batch = dict.fromkeys(["input_ids", *(["decoder_input_ids"] if two else [])], ids)
    try:
        try:
            return flops(model, {**batch, "attention_mask": torch.ones_like(ids)})
        except RuntimeError:
            # Some models read the mask, which has no values on the meta device; others need it.
            return flops(model, batch)
    except (RuntimeError, NotImplementedError, IndexError) as error:
        where = f"{type(model).__name__} cannot be run for {tokens} tokens on {ids.device.type}"
        raise LrkitError(f"{where} to count FLOPs: {' '.join(str(error).split())[:200]}") from error
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
    """Memory that a run holds without its activations, in bytes.

    Args:
        parameters: of the whole model, adapters included.
        gradients: of all parameters that have one.
        optimizer: the optimizer's state.
        adaptive: lrkit's own: statistics, masks, and indices of units.
        buffers: of the whole model; some quantized layers (GPTQ's) keep their weights there.
        copies: old values for `detach`, of what trains and was the model's own: of all in full fine-tuning.
    """

    parameters: int
    gradients: int
    optimizer: int
    adaptive: int
    buffers: int
    copies: int


def memory(adapted: Adapted, optimizer: torch.optim.Optimizer | None = None) -> Bytes:
    """Count the bytes that a run holds now, with those of an optimizer's state if one is given."""
    unique = list(adapted.model.parameters())
    states = optimizer.state.values() if optimizer is not None else ()
    policies = adapted.controller.policies
    own = [tensor for state in policies for tensor in (state.kept, *state.statistics.held())]
    return Bytes(
        parameters=_bytes(unique),
        gradients=_bytes([p.grad for p in unique if p.grad is not None]),
        optimizer=_bytes([v for state in states for v in state.values() if isinstance(v, Tensor)]),
        adaptive=_bytes(own),
        buffers=_bytes(list(adapted.model.buffers())),
        copies=_bytes(adapted.copies()),
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
