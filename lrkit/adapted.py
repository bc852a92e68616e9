"""Put a method's adapters into a model, run it, and take them out again."""

import copy
import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrkit import checkpoint, liveness, parallel, pretrained, states
from lrkit.behaviour import is_exact
from lrkit.binding import Binding, held_by, unwrapped
from lrkit.controller import Controller
from lrkit.coverage import TOLD_FROM, coverage, percent
from lrkit.errors import LrkitError, LrkitWarning, shown
from lrkit.foresight import check_fresh, check_room, weightless
from lrkit.gradients import Unclipped
from lrkit.heads import check_trainable, find_head, head_parameters, tell_tied
from lrkit.history import Decision
from lrkit.masters import Masters
from lrkit.method import Method, from_plain, to_plain
from lrkit.parameterizations import Parameterization, Target
from lrkit.penalty import Penalty, looks
from lrkit.precision import is_plain
from lrkit.reference import Reference, without
from lrkit.summary import Summary, summarize
from lrkit.targets import find_targets, listing
from lrkit.units import resize

_MARK = "_lrkit_adapted"
_AROUND = "lrkit_around"
_ASIDE = "_lrkit_aside"


def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: str | Sequence[str] = "all-linear",
    train_also: str | Sequence[str] = "auto",
) -> "Adapted":
    """Put a method's adapters into a model, in place.

    Everything else is frozen but the task head, which trains in full. Fresh adapters leave the outputs as they are
    (ΔW = 0), and draw their random start from torch's global generator.

    Args:
        model: any model with ``nn.Linear`` or transformers' ``Conv1D`` layers.
        method: the method.
        targets: ``"all-linear"`` for every linear map inside the transformer's blocks (of these the ones that the
            parameterization chooses, where it has places of its own), a regular expression that matches whole layer
            names, or a list of names or name suffixes.
        train_also: ``"auto"`` for the task head that is new (classifier, score, and the pooler before it), or a list of
            names or name suffixes of modules that train in full; an empty list for none.

    Returns:
        The handle on what was attached.

    Raises:
        LrkitError: nothing matches, or the method cannot adapt this model. The model is then as it was.
    """
    if not isinstance(method, Method):
        raise LrkitError(f"attach takes a lrkit.Method, such as lrkit.methods.adalora(), not {method!r}")
    check_model(model)
    return Adapted(model, method, targets, train_also)


def check_model(model: nn.Module) -> None:
    """Raise LrkitError for what is no model, has its weights elsewhere, or carries adapters already."""
    if not isinstance(model, nn.Module):
        raise LrkitError(f"a model is an nn.Module, not {model!r}")
    for name, module in model.named_modules():
        # accelerate keeps such weights on the CPU or disk, and has them on the device for the length of a call.
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,))):
            raise LrkitError(f"{name or 'the model'} is offloaded by accelerate: load the model without offloading")
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            raise LrkitError(
                f"{name or 'the model'} is PEFT's own ({type(module).__name__}): take PEFT's adapters out first "
                "(merge_and_unload() or unload()), or let lrkit.from_peft read the folder that PEFT saved"
            )
    if any(getattr(module, _MARK, False) for module in model.modules()):
        raise LrkitError(
            "this model already carries adapters: detach() or merge() them first (and copy a model before attach, not after)"
        )


def load(model: nn.Module, folder: str | os.PathLike[str]) -> "Adapted":
    """Attach to a plain model what `Adapted.save` wrote, with its weights and everything adaptive.

    Args:
        model: the model as it was when the saved adapters were attached.
        folder: the folder that was saved to.

    Raises:
        LrkitError: no such file, a truncated or foreign one, or one that does not fit this model. The model is then as
            it was.
    """
    with checkpoint.stored(Path(folder)) as stored:
        meta = states.meta_of({"meta": stored.meta, "tensors": {}})
        states.check_data(meta)
        method = from_plain(meta["method"])
        check_model(model)
        if (twin := weightless(model)) is not None:
            found, _ = _find(twin, method.parameterization, meta["targets"], exact=True)
            given = sum(math.prod(shape) for name, shape in stored.shapes.items() if name.startswith("weight."))
            grows = any(policy.action.grows for policy in method.policies)
            check_fresh(twin, found, method.parameterization, given, meta, grows)
        state = stored.state()
    adapted = Adapted(model, method, meta["targets"], meta["head"], exact=True)
    try:
        adapted.load_state_dict(state)
    except BaseException:
        adapted.detach()
        raise
    return adapted


class Adapted:
    """A model with a method's adapters in it. Made by `attach` and `load`.

    Attributes:
        model: the model, adapted in place.
        method: the method.
        adapters: layer name to what stands in its place.
        around: what the model's own calls go through; None for nothing.
        head: names of the modules that train in full.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        targets: str | Sequence[str],
        train_also: str | Sequence[str],
        *,
        exact: bool = False,
    ) -> None:
        found, offered = _find(model, method.parameterization, targets, exact)
        check_room(found, method.parameterization)
        self.model, self.method = model, method
        self._base = _base(model)  # now: a forward pass writes into its config
        self.head = find_head(model, train_also, exact=exact)
        parameterization = method.parameterization
        own = set(parameterization.own_parameters(model))
        self._check_apart([target.name for target in found])
        head_ids = {id(p) for p in head_parameters(model, self.head)}
        trained_own = {n: p for n, p in model.named_parameters() if n in own or id(p) in head_ids}
        check_trainable(trained_own)
        before = [(p, p.requires_grad) for p in model.parameters()]
        buffers = {id(buffer) for buffer in model.buffers()}
        self.adapters: dict[str, nn.Module] = dict(parameterization.adapt_model(model, found))
        self.around = self.adapters.pop("", None)
        self._check_apart(self.adapters)
        self.coverage = coverage(model, self.adapters, trained_own.values())
        self._offer = coverage(model, [t.name for t in offered], trained_own.values()) if offered else None
        if not exact:
            self._tell_left_out(targets)
            tell_tied(model, self.head)
        # From here on the model is changed; what could be refused was refused above, except by the controller.
        self._before = before
        self._masters = Masters(model, trained_own)
        self._originals = {name: model.get_submodule(name) for name in self.adapters}
        self._places = _places(model, {n: m for n, m in self._originals.items() if self.adapters[n] is not m})
        put_in = [*self.adapters.values(), *([] if self.around is None else [self.around])]
        fresh = {id(p) for module in put_in for p in module.parameters()} - {id(p) for p, _ in before}
        self._fresh_ids = fresh
        for p, _ in before:
            p.requires_grad_(False)
        for p in trained_own.values():
            p.requires_grad_(True)
        for name, parent, attribute in self._places:
            self.adapters[name].train(self._originals[name].training)
            setattr(self.adapters[name], _MARK, True)
            setattr(parent, attribute, self.adapters[name])
        if self.around is not None:
            _surround(model, self.around)
        self._notice_saves = pretrained.SaveNotice(model, [name for name, _, _ in self._places])
        self._off = 0
        self._alive = True
        setattr(model, _MARK, True)
        lasting = model.state_dict().keys()
        self._fresh_buffers = [n for n, b in model.named_buffers() if id(b) not in buffers and n in lasting]
        self._head_ids = head_ids
        self._saved_ids = fresh | {id(p) for p in trained_own.values()}
        self._trained_ids = {id(p) for p in model.parameters() if p.requires_grad}
        self._binding: Binding | None = None
        self._last: Callable[[], torch.optim.Optimizer | None] = lambda: None
        self._unclipped: Unclipped | None = None
        self._outer = parallel.Outer(self._check_growth)
        self._penalty = Penalty(
            lambda: parameterization.penalty(list(self.adapters.values())),
            self.adapter_parameters(),
            parameterization.penalty_weight,
            lambda key, message: self._controller.warn(key, message),
        )
        try:
            self._controller = Controller(method, self.adapters, self._trained_ids, self.head_parameters())
        except BaseException as error:
            self.detach()
            if isinstance(error, LrkitError) and self._offer is not None and targets == "all-linear":
                raise LrkitError(f"{error}{self._offer.words}") from None
            raise
        self._dtypes = {id(p): p.dtype for p in self.parameters()}
        self._looked = False
        self._outer.hang_on(model)
        liveness.watch(self, Adapted._look_on)

    def _tell_left_out(self, targets: str | Sequence[str]) -> None:
        """Say what "all linear layers" leaves out, where it is not a little."""
        if self._offer is not None and targets == "all-linear" and 1 - self._offer.share > TOLD_FROM:
            warnings.warn(
                f'targets="all-linear" adapts {percent(self._offer.share)} of the weights in the blocks of '
                f"{type(self.model).__name__}{self._offer.words}",
                LrkitWarning,
                stacklevel=4,
            )

    def _check_apart(self, layers: Iterable[str]) -> None:
        head = tuple(f"{name}." for name in self.head)
        inside = [name for name in layers if f"{name}.".startswith(head or ("\0",))]
        if inside:
            raise LrkitError(
                f'"{inside[0]}" is both a target and part of the head, which trains in full: leave it out of '
                "targets, or name the head with train_also"
            )

    # ---- training ----

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and tensors of all that the method trains, head included, in the model's order.

        What has been frozen on the way stays in the list, so that an optimizer made on resume has the same groups.
        """
        self._check_alive()
        self._masters.put_back()
        for name, p in self.model.named_parameters():
            if id(p) in self._trained_ids:
                yield name, p

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that the method trains, head included: what an optimizer needs."""
        return (p for _, p in self.named_parameters())

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What trains without the head."""
        return [p for p in self.parameters() if id(p) not in self._head_ids]

    def head_parameters(self) -> list[nn.Parameter]:
        """The head alone."""
        return [p for p in self.parameters() if id(p) in self._head_ids]

    def bind(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        total_steps: int,
        penalty: Literal["loss", "gradient"] = "loss",
        scaler: Any = None,
    ) -> None:
        """Tie the method to an optimizer. From here on it runs by itself, at every real optimizer step.

        Args:
            optimizer: the one that trains `parameters`; or several that together do (Muon and AdamW, say), each of which
                steps once per step of the method: metrics observe before the first of them steps, and decisions follow the
                last one's step.
            total_steps: optimizer steps of the whole run, those before a resume included. Once every schedule of the method
                has ended, a run may be bound for more steps than it was begun with.
            penalty: ``"loss"``: the caller trains on ``loss + adapted.penalty()``. ``"gradient"``: the penalty's gradient is
                added to the factors' in every step that `begin_step` announces, whoever computes the loss.
            scaler: the ``GradScaler`` that multiplies the loss, if there is one. Only `penalty` ``"gradient"`` and a
                metric that measures ``"before-clipping"`` need to know.

        Raises:
            LrkitError: already bound, optimizers that do not hold all that the method trains, a closure-only optimizer
                (LBFGS, at its first step), a way of training in parallel that cannot work, or a schedule that does not fit.
        """
        self._check_alive()
        optimizers = unwrapped(optimizer)
        if self._binding is not None:
            raise LrkitError("already bound to an optimizer: call unbind() first")
        if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
            raise LrkitError(f"total_steps must be an int of at least 1, not {total_steps!r}")
        if penalty not in ("loss", "gradient"):
            raise LrkitError(f'penalty must be "loss" or "gradient", not {penalty!r}')
        for each in optimizers:
            if reason := parallel.refusal(self.model, each, adaptive=bool(self.method.policies)):
                raise LrkitError(reason)
        if len(list(self.named_parameters())) != len(self._trained_ids):
            raise LrkitError(
                "the model's parameters are no longer those that were attached: something (FSDP, quantization, a cast that "
                "makes new ones) has replaced them"
            )
        held = set().union(*map(held_by, optimizers))
        missing = [n for n, p in self.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise LrkitError(
                f"the optimizer does not hold {len(missing)} of the parameters that the method trains, such as "
                f'"{missing[0]}": make it from adapted.parameters()'
            )
        if refusal := self._controller.objection(total_steps):
            raise LrkitError(refusal)
        self._controller.begin(total_steps)
        binding = Binding(
            optimizers,
            list(self.parameters()),
            self._before_step,
            self._after_step,
            self._controller.warn,
            adaptive=bool(self.method.policies) or self.has_penalty,
        )
        self._binding, self._last = binding, binding.last()
        liveness.watch(self, Adapted._look_on)
        scale: Callable[[], float] = (lambda: 1.0) if scaler is None else scaler.get_scale
        if self.has_penalty and penalty == "gradient":
            for handle in self._penalty.add_in_backward(scale):
                binding.hold(handle)
        self._scale = None if scaler is None else scale
        self._keep_gradients()
        self._outer.hang_on(self.model)

    def begin_step(self) -> None:
        """Make ready for the backward passes of one optimizer step, if bound with ``penalty="gradient"``."""
        self._penalty.begin()

    def check_schedule(self, total_steps: int) -> None:
        """Raise LrkitError if a schedule of the method does not fit a run of so many steps; change nothing else."""
        self._check_alive()
        self._controller.check_schedules(total_steps)

    def as_computed(self, p: Tensor) -> Tensor:
        """Return a parameter as the model computes with it: a head beside half precision is kept in float32, and rounded."""
        return self._masters.as_computed(p)

    def hold(self, handle: Any) -> None:
        """Remove a hook's handle when the optimizer is let go of: what an integration hung on the model for this run."""
        if self._binding is not None:
            self._binding.hold(handle)

    def unbind(self, *, quietly: bool = False) -> None:
        """Let go of the optimizer. What was decided stays; `bind` goes on from here.

        Args:
            quietly: say nothing of a schedule that has not ended.
        """
        if self._binding is not None and not quietly:
            self.check_finished()
        self._unbind()

    def check_finished(self) -> None:
        """Warn once if a schedule has not ended, so that the budget is not reached: for those that take the adapters on."""
        self._check_alive()
        if unfinished := self._controller.unfinished():
            self._controller.warn("unfinished", unfinished)

    def _unbind(self) -> None:
        if self._binding is not None:
            self._binding.release()
        if self._unclipped is not None:
            self._unclipped.remove()
        self._penalty.end()
        self._binding = self._unclipped = self._outer.ddp = None
        liveness.watch(self, Adapted._look_on)

    def _look_on(self, optimizer: torch.optim.Optimizer) -> None:
        """See any optimizer's step before it is taken, as long as there may be something to say of it."""
        if not self._looked and held_by(optimizer) & self._trained_ids:
            self._first_look()
        # Within the bound one's step another may step: one that it wraps.
        bound = self._binding
        if bound is None or not (optimizer in bound.optimizers or bound.stepping):
            self._notice(optimizer)

    def _notice(self, optimizer: torch.optim.Optimizer) -> None:
        """Say that the method is not bound to an optimizer that steps the adapters' parameters."""
        if held_by(optimizer).isdisjoint(map(id, self.adapter_parameters())):
            return
        if reason := parallel.refusal(self.model, optimizer, adaptive=False):
            raise LrkitError(reason)
        if self.method.policies or self.has_penalty:
            self._controller.warn(
                "unbound",
                "an optimizer steps the adapters' parameters, but the method is not bound to it: nothing is adaptive. "
                "Call adapted.bind(optimizer, total_steps=...) before training",
            )
        elif self._looked:
            liveness.leave(self)  # nothing more to notice

    def _first_look(self) -> None:
        """Before the first step with gradients: name what trains and has none."""
        self._controller.look()
        dead = self._controller.liveness.dead
        if dead is None and self.adapters:
            return
        self._looked = True
        self._tell_cast()
        heads = {name: list(head_parameters(self.model, [name])) for name in self.head}
        silent = liveness.unreached(heads)
        if silent:
            self._controller.warn(
                "head",
                f"no gradient reaches {listing(silent)}, which trains in full: the loss does not depend on it. Leave it out "
                "with train_also",
            )
        ddp = self._outer.ddp
        if ddp is not None and (dead or silent) and not (ddp.find_unused_parameters or ddp.static_graph):
            raise LrkitError(
                f"no gradient reaches {listing([*(dead or []), *silent])}, and DDP waits for it, so that others are not "
                "averaged: leave it out (targets, train_also), or use DistributedDataParallel(..., "
                "find_unused_parameters=True)"
            )

    def _check_growth(self) -> None:
        if self._binding is not None and self._controller.grows:
            raise LrkitError("the method adds components, which DDP cannot follow: train it in one process")

    def _before_step(self, scale: Tensor | None) -> None:
        self._masters.put_back()
        unclipped, step = self._unclipped, self.step + 1
        if self.has_penalty:
            self._penalty.check_arrival()
            window = looks(self.total_steps or 1)
            if unclipped is not None and step in window:
                self._penalty.compare(unclipped, last=step == window[-1])
        # On a GPU the loss's scale waits for all that runs: it is asked for where a metric needs it.
        loss_scale = self._scale() if self._scale is not None and self._controller.wants_unclipped else None
        self._controller.before_step(scale, unclipped, loss_scale)
        self._penalty.stepped()

    def _keep_gradients(self) -> None:
        """Keep gradients as backward leaves them in the next step, if somebody will look at them there."""
        looking = self.has_penalty and self.step + 1 in looks(self.total_steps or 1)
        if not (looking or self._controller.wants_unclipped):
            if self._unclipped is not None:
                self._unclipped.remove()
            self._unclipped = None
        elif self._unclipped is None:
            self._unclipped = Unclipped(self.adapter_parameters())
        else:
            self._unclipped.clear()

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._controller.after_step(optimizer) and self._outer.ddp is not None:
            parallel.follow(self._outer.ddp)
        self._keep_gradients()

    def penalty(self) -> Tensor:
        """The scalar to add to the loss while training: 0 for a method without one."""
        self._check_alive()
        penalty = self._penalty.value()
        if penalty is None:
            device = next(self.model.parameters()).device
            return torch.zeros((), dtype=torch.float32, device=device)
        return penalty

    @property
    def penalty_added(self) -> float | None:
        """The penalty at the beginning of the last step, if bound with ``penalty="gradient"``; None otherwise."""
        return None if self._penalty.last is None else float(self._penalty.last)

    @functools.cached_property
    def has_penalty(self) -> bool:
        """Whether the method adds a penalty to the loss."""
        with torch.no_grad():
            return self._penalty.value() is not None

    # ---- looking ----

    @property
    def history(self) -> list[Decision]:
        """One record for each decision so far."""
        return self._controller.history

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self._controller.step

    @property
    def attached(self) -> bool:
        """Whether the adapters are in the model; False once they were merged or detached."""
        return self._alive

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None before `bind`."""
        return self._controller.total_steps

    def summary(self) -> Summary:
        """Per layer: rank or frozen state, trainable parameters at first, now and on average. Prints as a table."""
        self._check_alive()
        inside = {id(p) for module in self.adapters.values() for p in module.parameters()}
        beside = sum(p.numel() for p in self.adapter_parameters() if id(p) not in inside)
        head = sum(p.numel() for p in self.head_parameters())
        return summarize(self._controller, head, beside, self.coverage)

    def scores(self, policy: int = 0) -> dict[str, float]:
        """The present score of every unit of one policy, by the unit's name; empty once its last decision is taken."""
        state = self._controller.policies[policy]
        if state.ended:
            return {}
        return dict(zip(state.unit_names, state.scores().tolist(), strict=True))

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Everything adaptive: adapters and head, masks, frozen set, statistics, history.

        Returns:
            ``{"meta": JSON data, "tensors": name to tensor}``, copies all. With the optimizer's own state (and the
            generators', where there is dropout) a run that loads it goes on bit for bit.
        """
        self._check_alive()
        self._tell_cast()
        tensors, data = self._controller.state()
        for name, p in self._saved():
            tensors[f"weight.{name}"] = p.detach().clone()
        meta = {
            "format": states.FORMAT,
            "method": to_plain(self.method),
            "targets": list(self.adapters),
            "head": list(self.head),
            "ranks": self._controller.ranks(),
            "base": self._base,
            **data,
        }
        return {"meta": copy.deepcopy(meta), "tensors": tensors}

    def _saved(self) -> Iterator[tuple[str, Tensor]]:
        self._masters.put_back()
        for name, p in self.model.named_parameters():
            if id(p) in self._saved_ids:
                yield name, p
        for name in self._fresh_buffers:
            yield name, self.model.get_buffer(name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Before or after `bind`.

        Raises:
            LrkitError: of another method, other layers, other shapes, or no such state at all. Nothing is changed then.
        """
        self._check_alive()
        meta, tensors = states.meta_of(state), state["tensors"]
        # Settings that lrkit did not have when the state was written are at their defaults, which is how it was then.
        mine, theirs = to_plain(self.method), to_plain(from_plain(meta["method"]))
        if mine != theirs:
            raise LrkitError(f"the state is of another method: {_difference(theirs, mine)}")
        for what, here, there in (("layers", list(self.adapters), meta["targets"]), ("head", self.head, meta["head"])):
            if here != there:
                odd = sorted(set(here) ^ set(there))
                told = ", ".join(map(shown, odd[:3])) or "in another order"
                raise LrkitError(f"the state is of {'other layers' if what == 'layers' else 'another head'}: {told}")
        states.check_data(meta)
        saved = dict(self._saved())
        weights = {n.removeprefix("weight."): t for n, t in tensors.items() if n.startswith("weight.")}
        if set(saved) != set(weights):
            odd = sorted(set(saved) ^ set(weights))
            raise states.misfit(f"{', '.join(map(shown, odd[:3]))} missing or not expected")
        expected = self._controller.shapes(meta["ranks"])
        for name, tensor in weights.items():
            if tensor.shape != expected.get(id(saved[name]), saved[name].shape):
                raise states.misfit(f"{name} is {list(tensor.shape)}, here {list(saved[name].shape)}")
            own = saved[name].dtype
            if tensor.dtype != own and not (tensor.is_floating_point() and own.is_floating_point):
                raise states.misfit(f"{name} is {tensor.dtype}, here {own}")
        self._controller.check_state(tensors, meta)
        if self._controller.total_steps is None and meta["total_steps"] is not None:
            self._controller.foretell(meta["total_steps"])
        # All has been looked at: what follows cannot fail.
        self._follow_casts(weights, saved)
        with torch.no_grad():
            for name, tensor in weights.items():
                if tensor.shape != saved[name].shape:
                    p = saved[name]
                    assert isinstance(p, nn.Parameter)  # `shapes` knows components alone, and no buffer has any
                    self._make_room(p, tensor.shape)
                saved[name].copy_(tensor)
        for p in self.parameters():
            p.requires_grad_(p.numel() > 0)  # the state may be of an earlier step, when less was frozen
        self._controller.load_state(tensors, meta)
        if self._outer.ddp is not None:
            parallel.follow(self._outer.ddp)

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Go back to an earlier state of this run in all but the weights: schedule, statistics, masks, ranks, history.

        Weights stay as they are now; a component that was cut since then comes back as it was in `state`. The method must be
        unbound, and may then be bound for another number of steps.

        Args:
            state: what `state_dict` gave earlier in this run.

        Raises:
            LrkitError: it is bound, or the state is of another run. Nothing is changed then.
        """
        self._check_alive()
        if self._binding is not None:
            raise LrkitError("call unbind() before rewind()")
        meta = states.meta_of(state)
        tensors = dict(state["tensors"])
        now, then = self._controller.numbers(), self._controller.numbers(meta)
        places = self._controller.places()
        for name, p in self._saved():
            layer, axis = places.get(id(p), (None, 0))
            key = f"weight.{name}"
            if layer is None or now[layer] == then[layer]:
                tensors[key] = p.detach().clone()
                continue
            both = [(then[layer].index(n), now[layer].index(n)) for n in then[layer] if n in now[layer]]
            tensors[key] = tensors[key].clone().to(p)
            for there, here in both:
                tensors[key].select(axis, there).copy_(p.detach().select(axis, here))
        total, self._controller.total_steps = self._controller.total_steps, None
        try:
            self.load_state_dict({"meta": meta, "tensors": tensors})
        except BaseException:
            self._controller.total_steps = total
            raise

    def _follow_casts(self, weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """Take over the dtype of a state that was cast after attach; keep this one's where these tensors were cast."""
        odd = [name for name, tensor in weights.items() if tensor.dtype != saved[name].dtype]
        follow = [name for name in odd if self._dtypes.get(id(saved[name]), saved[name].dtype) == saved[name].dtype]
        for name in follow:
            saved[name].grad = None
            saved[name].data = saved[name].data.to(weights[name].dtype)
        if odd:
            state, here = weights[odd[0]].dtype, saved[odd[0]].dtype
            self._controller.warn(
                "cast state",
                f"the state was saved in {state} ({odd[0]}), and is loaded in {here}"
                + (": it goes on as it was" if follow else ", to which the model was cast"),
            )

    def _tell_cast(self) -> None:
        """Say once that what trains is no longer in the precision that attach gave it."""
        now = [p.dtype for p in self.parameters() if p.dtype != self._dtypes.get(id(p), p.dtype)]
        if now:
            self._controller.warn(
                "cast",
                f"what trains was cast to {now[0]} after attach, and trains in it"
                + (": small updates round away" if now[0].itemsize < 4 else ""),
            )

    def take_ranks(self) -> None:
        """Let ``model.load_state_dict`` take weights of other ranks, by giving each adapter the rank that they have.

        For who loads the model's weights alone, before `load_state_dict` loads everything adaptive.
        """
        for module in self.adapters.values():
            module.register_load_state_dict_pre_hook(self._take_rank)  # type: ignore[no-untyped-call]

    def _take_rank(self, module: nn.Module, weights: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        room: list[tuple[nn.Parameter, torch.Size]] = []
        ranks = set()
        for part in self.method.parameterization.parts:
            p, given = part.of(module), weights.get(prefix + part.name)
            if part.axis is not None and given is not None:
                shape = list(p.shape)
                if given.ndim != p.ndim:
                    return
                shape[part.axis] = given.shape[part.axis]
                if list(given.shape) != shape:
                    return  # of another layer: torch says so
                ranks.add(given.shape[part.axis])
                room.append((p, given.shape))
        for p, size in room if len(ranks) == 1 else ():
            if size != p.shape:
                self._make_room(p, size)

    def _make_room(self, p: nn.Parameter, shape: torch.Size) -> None:
        """Resize a tensor for a load. The last optimizer's state for it goes, unless it is of the new shape by now."""
        optimizer = self._binding.optimizer if self._binding is not None else self._last()
        state = optimizer.state.get(p, {}) if optimizer is not None else {}
        values = [value for value in state.values() if isinstance(value, Tensor)]
        # State of the tensor's shape until now is its own entry by entry, even if rank 1 makes it look like Adafactor's.
        odd = any(value.shape == p.shape != shape or not _belongs(value.shape, shape) for value in values)
        if optimizer is not None and odd:
            del optimizer.state[p]
        resize(p, p.new_empty(shape))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write everything adaptive to ``folder/lrkit.safetensors``, atomically; `load` reads it.

        Returns:
            The file's path.
        """
        return checkpoint.write(Path(folder), self.state_dict())

    # ---- taking out ----

    def original(self) -> nn.Module:
        """A copy of the model as it was before `attach`, head and all. The adapted model stays as it is.

        Quantized and sharded weights, which do not train, are shared with it.
        """
        self._check_alive()
        # Not every quantized tensor can be copied; none of them changes.
        frozen = (p for p in self.model.parameters() if id(p) not in self._trained_ids and not is_plain(p))
        memo: dict[int, Any] = {id(p): p for p in frozen}
        for name, _, _ in self._places:
            memo[id(self.adapters[name])] = copy.deepcopy(self._originals[name], memo)
        if self.around is not None:
            memo[id(self.around)] = None
        model = copy.deepcopy(self.model, memo)
        _leave_alone(model)
        delattr(model, _MARK)
        self._masters.strip(memo)
        parallel.Outer.strip(model)
        pretrained.strip(model)
        for p, flag in self._before:
            memo[id(p)].requires_grad_(flag)
        return model

    def merge(self) -> nn.Module:
        """Add every ΔW to its base weight and take the adapters out. The head stays as it was trained.

        Returns:
            The plain model, with the adapted one's outputs.

        Raises:
            LrkitError: an adapter that is no ΔW of a weight, or whose base weight cannot be added to. Nothing is changed.
        """
        self._check_alive()
        self.check_finished()
        if self.around is not None:
            raise LrkitError(
                f"{type(self.around).__name__} stands around the whole model, and cannot be merged into it"
            )
        for name, _, _ in self._places:
            adapter = self.adapters[name]
            if getattr(adapter, "merge", None) is None:
                raise LrkitError(f"{name}: {type(adapter).__name__} cannot be merged into the layer's weight")
        self._check_mergeable()
        for name in {name for name, _, _ in self._places}:
            merge = self.adapters[name].merge
            assert callable(merge)
            merge()
        self._masters.settle()
        return self._leave()

    def _check_mergeable(self) -> None:
        owners: dict[int, list[nn.Module]] = {}
        for module in self.model.modules():
            for p in module._parameters.values():
                if p is not None:
                    owners.setdefault(id(p), []).append(module)
        for name, _, _ in self._places:
            weight = self._originals[name]._parameters.get("weight")
            if weight is None:
                raise LrkitError(
                    f"{name}: the base weight is computed (a parametrization, weight norm): nothing can be added to it"
                )
            if parallel.is_sharded(weight):
                raise LrkitError(f"{name}: the base weight is sharded (DTensor): merge the unsharded model")
            if not is_plain(weight):
                kind = (
                    type(weight).__name__ if weight.is_floating_point() and weight.dtype.itemsize > 1 else weight.dtype
                )
                raise LrkitError(
                    f"{name}: the base weight is quantized ({kind}), and nothing can be added to it exactly"
                )
            layer = self._originals[name]
            if isinstance(layer, nn.Linear) and not is_exact(layer, layer.in_features):
                raise LrkitError(
                    f"{name}: {type(layer).__name__} does not compute with its weight as it is: what is added to the weight "
                    "would not be what is added to the output"
                )
            if len(owners[id(weight)]) > 1:
                raise LrkitError(f"{name}: the base weight is tied to another layer's, which must not change with it")

    def detach(self) -> nn.Module:
        """Take the adapters out and put everything back as it was before `attach`, bit for bit, the head included.

        Returns:
            The plain model.
        """
        self._check_alive()
        self._masters.restore()
        return self._leave()

    def _leave(self) -> nn.Module:
        self._alive = False
        self._masters.put_back()
        self._unbind()
        liveness.leave(self)
        self._notice_saves.remove()
        self._outer.remove()
        for name, parent, attribute in self._places:
            setattr(parent, attribute, self._originals[name].train(self.adapters[name].training))
        _leave_alone(self.model)
        for p, flag in self._before:
            p.requires_grad_(flag)
            p.grad = None
        delattr(self.model, _MARK)
        for name, _, _ in self._places:
            self.adapters[name].__dict__.pop(_MARK, None)
        return self.model

    # ---- without the adapters, for a while ----

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the model as it was before `attach`: its outputs bit for bit, those of a head that trains included.

        Within it the adapters and what trains in the model are out of the model, each replaced by what stood there. Nothing
        is copied, and a graph that was made before, within or after it stays right. It can be nested. It is not for two
        threads that use the model at once.

        Raises:
            LrkitError: within it, by what needs the adapters in their places (saving, loading, merging, binding, ...).
        """
        self._check_alive(within=True)
        if self._off:
            self._off += 1
            try:
                yield
            finally:
                self._off -= 1
            return
        places = [(parent, attribute, self._originals[name]) for name, parent, attribute in self._places]
        values = [(kept.tensor, self._masters.original(kept)) for kept in self._masters.kept]
        self._off = 1
        if self.around is not None:
            self.around.__dict__[_ASIDE] = True
        try:
            with without(places, values, self.model):
                yield
        finally:
            self._off -= 1
            if self.around is not None:
                self.around.__dict__.pop(_ASIDE, None)

    def reference(self) -> Reference:
        """The model as it was before `attach` as a module that shares every weight: TRL's ``ref_model=``, say.

        See `lrkit.reference.Reference`.
        """
        self._check_alive()
        return Reference(self.model, self.disabled)

    def expect_saves(self) -> pretrained.Expected:
        """Say nothing at ``save_pretrained`` until the handle's ``remove()``: the adapters are saved beside the model."""
        return self._notice_saves.expect()

    def compact(self) -> dict[str, int]:
        """Cut the components that are masked and zero away for good: smaller and faster, with the same outputs.

        Returns:
            Layer name to its rank now.

        Raises:
            LrkitError: the last decision is still to come, so that masked components can come back; or layers share their
                matrices.
        """
        self._check_alive()
        if any(not state.ended for state in self._controller.policies):
            raise LrkitError("masked components can still come back: compact() after the last decision")
        return self._controller.compact(self._last())

    def _check_alive(self, *, within: bool = False) -> None:
        if not self._alive:
            raise LrkitError("these adapters were merged or detached: attach again")
        if self._off and not within:
            raise LrkitError("the adapters are out of the model within adapted.disabled(): do this outside of it")

    def __deepcopy__(self, memo: object) -> "Adapted":
        raise LrkitError("a handle cannot be copied: copy the plain model and attach again, or use save() and load()")

    def __repr__(self) -> str:
        """What is attached to what."""
        return f"Adapted({type(self.model).__name__}, {len(self.adapters)} layers, {self.method!r})"


def _belongs(state: torch.Size, shape: torch.Size) -> bool:
    """Whether an optimizer's state can be of a tensor of this shape: of its shape, or of some of its sizes (Adafactor's)."""
    if len(state) == len(shape):
        return all(a in (b, 1) for a, b in zip(state, shape, strict=True))
    return set(state) <= {*shape, 1}


def _find(
    model: nn.Module, parameterization: Parameterization, targets: str | Sequence[str], exact: bool
) -> tuple[list[Target], list[Target]]:
    """The layers that `targets` means for this parameterization, and those that it has chosen them from."""
    if not parameterization.takes_targets:
        if targets != "all-linear" and not exact:
            raise LrkitError(f"{parameterization!r} has places of its own: leave targets out")
        return [], []
    offered = found = find_targets(model, targets, exact=exact)
    if targets == "all-linear" and not (found := list(parameterization.choose(found))):
        seen = coverage(model, [target.name for target in offered])
        raise LrkitError(
            f"{parameterization!r} has no place in {type(model).__name__}: it chooses none of the linear layers "
            f"inside the transformer's blocks; name layers with targets{'' if seen is None else seen.words}"
        )
    return found, offered


def _surround(model: nn.Module, around: nn.Module) -> None:
    """Let the model's calls go through a module, which becomes a part of it."""
    call = model.forward

    @functools.wraps(call)  # the Trainer looks at the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) if _ASIDE in around.__dict__ else around(call, *args, **kwargs)

    model.add_module(_AROUND, around)
    model.__dict__["forward"] = forward


def _leave_alone(model: nn.Module) -> None:
    if _AROUND in model._modules:
        del model._modules[_AROUND]
        call = model.__dict__.pop("forward").__wrapped__
        if getattr(call, "__func__", None) is not type(model).forward:
            model.__dict__["forward"] = call  # somebody else had replaced it before


def _places(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module, str]]:
    """Every place (layer name, parent, attribute) where a layer stands; a layer that is used twice stands in two."""
    names = {id(layer): name for name, layer in layers.items()}
    return [
        (names[id(child)], parent, attribute)
        for parent in list(model.modules())
        for attribute, child in parent._modules.items()
        if child is not None and id(child) in names
    ]


def _base(model: nn.Module) -> dict[str, Any] | None:
    """What a transformers model was, for those who have only the saved file; None for any other model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return None
    return {
        "class": type(model).__name__,
        "name": getattr(config, "name_or_path", ""),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "config": json.loads(config.to_json_string()),
    }


def _difference(theirs: Any, mine: Any, where: str = "") -> str:
    """The first place where two plain data differ, in words."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in {**theirs, **mine}:
            if theirs.get(key) != mine.get(key):
                return _difference(theirs.get(key), mine.get(key), f"{where}.{key}" if where else key)
    return f"{where} is {shown(theirs)} there and {shown(mine)} here"
