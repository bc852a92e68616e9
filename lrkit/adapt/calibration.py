"""Batches before the first step: what comes of them is observed and thrown away, and the decisions of step 0 go by it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrkit.adapt import sharding
from lrkit.adapt.sharding import several
from lrkit.adapt.weights import Weights
from lrkit.errors import LrkitError, LrkitWarning, listing
from lrkit.loop import beginning
from lrkit.loop.controller import Controller
from lrkit.loop.policy import PolicyState, leave_out
from lrkit.process import as_it_was
from lrkit.shards import held, is_sharded

LossOf = Callable[[Any], Tensor]
"""Gives the loss of a batch, a scalar with a graph."""

_LARGE = 1 << 16
_END = object()  # a batch may be anything, None as well
_GRADIENTS = (
    "gradient has come back to the adapters",
    "Is the loss finite, and does it depend on the adapted layers?",
)
_INPUTS = (
    "input has gone through the adapted layers",
    "Hooks do not run inside torch.compile: compile the model afterwards",
)


def calibrate(
    model: nn.Module,
    weights: Weights,
    loop: Controller,
    states: Sequence[PolicyState],
    batches: Iterable[Any],
    loss: LossOf | None,
) -> bool:
    """Show batches to the policies that ask for some, and take their decisions.

    Args:
        model: the adapted model.
        weights: what trains.
        loop: its loop.
        states: the policies that wait for a calibration. If there are none, nothing is done but to warn.
        batches: at least one.
        loss: the loss of a batch; None for the model's own. Where inputs alone are read, its value counts for nothing.

    Returns:
        Whether tensors have stopped training, or are of another size.

    Raises:
        LrkitError: no batches, or one without a loss; none with a finite gradient, or with finite inputs if nothing else is
            read. Nothing is decided then.
    """
    if not states:
        asks = any(policy.scheduler.calibration for policy in loop.run.method.policies)
        why = "its calibration has been done" if asks else "it asks for no calibration"
        warnings.warn(f"calibrate does nothing for this method: {why}", LrkitWarning, stacklevel=4)
        return False
    if reason := sharding.refusal(model, loop):
        raise LrkitError(reason)
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise LrkitError(f"calibrate takes a list of batches, or an iterator, not {type(batches).__name__}")
    agree(weights, loop)
    dead, forward = loop.liveness.dead, beginning.forward_alone(states)
    try:
        with _undisturbed(model, recomputing=not forward):
            seen, arrived, left = 0, False, iter(batches)
            reads, shown = {name for state in states for name in state.statistics.reads}, set[str]()
            while (batch := _next(left, loop, weights)) is not _END:
                if forward:
                    _forward(loss or (lambda batch: model(**_fields(batch))), batch)
                else:
                    _backward(loss or model_loss(model), batch)
                weights.put_back()
                if several() and not forward:
                    _average(weights.parameters())
                shown |= beginning.observe(loop, states)
                arrived = arrived or forward or _arrived(weights.adapter())
                for p in model.parameters():
                    p.grad = None
                seen += 1
            if not seen:
                where = ", in this process or another" if several() else ""
                raise LrkitError(f"calibrate needs at least one batch, and was given none{where}")
            blind = bool(reads) and not _all_say(bool(shown), weights, "MAX")
            if blind or not _all_say(arrived, weights, "MAX"):
                what, hint = _INPUTS if blind else _GRADIENTS
                raise LrkitError(f"no finite {what} in any of {seen} batches: nothing can be decided by them. {hint}")
            if forward and (unseen := reads - shown) and not several():
                loop.warn(
                    "unseen layers",
                    f"no input has gone through {len(unseen)} of the adapted layers in any of {seen} batches, and they are "
                    f"ranked as layers that see nothing: {listing(sorted(unseen))}",
                )
        return beginning.decide(loop, states, None)
    except BaseException:
        weights.put_back()
        loop.liveness.dead = dead
        leave_out(loop.policies, loop.run.tensors_of(dead or []))
        for state in states:
            state.begin()
        raise


def begin(weights: Weights, loop: Controller, optimizer: torch.optim.Optimizer) -> bool:
    """Take the decisions of step 0 that need no batches. Returns as `calibrate`."""
    states = beginning.waiting(loop, calibrated=False)
    if not states:
        return False
    agree(weights, loop)
    return beginning.decide(loop, states, optimizer)


def model_loss(model: nn.Module) -> LossOf:
    """Return a function from a batch, a dict, to the loss in the model's outputs. Raises LrkitError if there is none."""

    def of(batch: Any) -> Tensor:
        outputs = model(**_fields(batch))
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if loss is None:
            raise LrkitError(
                f"{type(model).__name__} returns no loss for this batch ({', '.join(map(str, batch))}): add labels, or give "
                "calibrate(batches, loss=...), a function from a batch to its loss"
            )
        return loss  # type: ignore[no-any-return]

    return of


def _fields(batch: Any) -> Mapping[str, Any]:
    """Return a batch, which has to be a dict."""
    if not isinstance(batch, Mapping):
        raise LrkitError(
            f"a batch to calibrate by must be a dict, as the model takes it, not {type(batch).__name__}: or give "
            "calibrate(batches, loss=...), a function from a batch to its loss"
        )
    return batch


@torch.no_grad()
def _forward(call: Callable[[Any], Any], batch: Any) -> None:
    call(batch)


def _backward(loss_of: LossOf, batch: Any) -> None:
    with torch.enable_grad():
        loss = loss_of(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise LrkitError("the loss to calibrate by must be one number that depends on what trains")
        loss.backward()  # type: ignore[no-untyped-call]


def _drops(name: str, value: object) -> bool:
    """Return whether an attribute of a module or its config is a rate of dropout, or of layers left out."""
    return isinstance(value, float) and ("drop" in name)


@contextmanager
def _undisturbed(model: nn.Module, *, recomputing: bool) -> Iterator[None]:
    """Evaluate the model for a while. Afterwards gradients, modes, buffers and random generators are as they were.

    Args:
        model: the model.
        recomputing: let it recompute activations for a backward pass, if it does so.
    """
    modes = [(module, module.training) for module in model.modules()]
    # transformers recomputes activations (gradient checkpointing) in the mode for training alone, in which such a module
    # drops by rates of its own, or of the config that it reads.
    recomputed = [m for m, _ in modes if recomputing and getattr(m, "gradient_checkpointing", False) is True]
    configs = {id(config): config for module in recomputed if (config := getattr(module, "config", None)) is not None}
    dropping: list[Any] = [*recomputed, *configs.values()]
    rates = [(owner, name, rate) for owner in dropping for name, rate in vars(owner).items() if _drops(name, rate)]
    grads = [(p, p.grad) for p in model.parameters()]
    # A quantized base keeps weights in large whole-number buffers, to which no forward pass writes.
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and (buffer.is_floating_point() or buffer.numel() < _LARGE)
    ]
    with as_it_was():
        try:
            for module, _ in modes:
                module.training = False
            for module in recomputed:
                module.training = True
            for owner, name, _ in rates:
                setattr(owner, name, 0.0)
            for p, _ in grads:
                p.grad = None
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for owner, name, rate in rates:
                setattr(owner, name, rate)
            for p, grad in grads:
                p.grad = grad
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _arrived(adapter: Iterable[nn.Parameter]) -> bool:
    """Return whether a gradient has come back, and all that have are finite."""
    sums = [held(p.grad).sum() for p in adapter if p.grad is not None]
    return bool(sums) and bool(torch.isfinite(torch.stack([each.to(sums[0].device) for each in sums])).all())


# ---- several processes ----


def _all_say(here: bool, weights: Weights, how: str) -> bool:
    """Return whether something is so in one of several processes (``"MAX"``), or in all of them (``"MIN"``)."""
    if not several():
        return here
    distributed: Any = torch.distributed
    flag = torch.tensor(float(here), device=weights.parameters()[0].device)
    distributed.all_reduce(flag, op=getattr(distributed.ReduceOp, how))
    return bool(flag)


def agree(weights: Weights, loop: Controller) -> None:
    """Begin as the first of several processes does: take over what trains or was put in, and its seed."""
    if not several():
        return
    distributed: Any = torch.distributed
    for tensor in weights.saved().values():
        if not is_sharded(tensor):
            distributed.broadcast(tensor.detach(), 0)
    told = torch.tensor(loop.seed, dtype=torch.int64, device=weights.parameters()[0].device)
    distributed.broadcast(told, 0)
    loop.seed = int(told)


def _next(left: Iterator[Any], loop: Controller, weights: Weights) -> Any:
    """Return the next batch; `_END` once this process or another has none left."""
    batch = next(left, _END)
    if _all_say(batch is not _END, weights, "MIN"):
        return batch
    if batch is not _END:
        loop.warn(
            "calibration", "another process has fewer batches to calibrate by: those beyond its last are left out"
        )
    return _END


def _average(trained: list[nn.Parameter]) -> None:
    """Average gradients over all processes. Sharded ones are averaged already."""
    distributed: Any = torch.distributed
    whole = [p for p in trained if p.requires_grad and not is_sharded(p)]
    if not whole:
        return
    device = whole[0].device
    there = torch.tensor([float(p.grad is not None) for p in whole], device=device)
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(device, torch.float32) for p in whole]
    flat = torch.cat([there, *parts])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    means = torch.split(flat[len(whole) :], [p.numel() for p in whole])
    for p, mean, share in zip(whole, means, flat[: len(whole)].tolist(), strict=True):
        p.grad = mean.view(p.shape).to(p) if share else None
