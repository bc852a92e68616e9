"""The handle on an adapted model: all that a user calls, handed on to the rooms that do it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrkit.adapt import checkpoint, weights
from lrkit.adapt.allocation import Allocation
from lrkit.adapt.binding import Binding
from lrkit.adapt.body import run_on
from lrkit.adapt.calibration import LossOf
from lrkit.adapt.choice import choose
from lrkit.adapt.graft import Graft
from lrkit.adapt.merging import dequantized
from lrkit.adapt.reference import Reference
from lrkit.adapt.saved import Archive, describe
from lrkit.adapt.summary import Summary, brief, summarize, trainable
from lrkit.adapt.trained import Trained
from lrkit.errors import LrkitError
from lrkit.layers.logical import entries
from lrkit.loop import state as states
from lrkit.loop.controller import Controller
from lrkit.loop.draws import seed_of
from lrkit.loop.history import Decision
from lrkit.method import Method


class Adapted(Trained):
    """A model with a method's adapters in it. Made by `attach` and `load`.

    Attributes:
        model: the model, adapted in place.
        method: the method.
        adapters: layer name to the module in its place.
        originals: layer name to the layer that was there.
        around: a module that the model's own calls go through; None for none.
        head: names of the modules that train in full.
        coverage: how much of the blocks' weights is adapted; None for a model without blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        targets: str | Sequence[str],
        train_also: str | Sequence[str],
        *,
        exact: bool = False,
        exclude: str | Sequence[str] = (),
        slices: bool = False,
        state: tuple[states.Saved, Mapping[str, Tensor]] | None = None,
    ) -> None:
        base = describe(model)  # now: a forward pass writes into its config
        parameterization = method.parameterization
        choice = choose(model, parameterization, targets, train_also, exact=exact, exclude=exclude, slices=slices)
        # From here on the model is changed. Only the controller and the state can still refuse.
        self.model, self.method, self.head = model, method, choice.head
        self.adapters, self.around, self.coverage = choice.adapters, choice.around, choice.coverage
        self._graft, self.originals = Graft(model, choice), choice.layers
        self._weights = weights.Weights(model, choice, self._graft.masters)
        self._archive = Archive(method, tuple(self.adapters), tuple(self.head), base, self._weights)
        try:
            controller = Controller(run_on(model, method, self.adapters, self._weights))
        except BaseException as error:
            self._graft.detach()
            if isinstance(error, LrkitError) and choice.offered is not None and targets == "all-linear":
                raise LrkitError(f"{error}{choice.offered.words}") from None
            raise
        self._binding = Binding(model, self.head, self._weights, controller)
        if state is not None:
            try:
                self._take(*state)
            except BaseException:
                self.detach()
                raise

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
            optimizer: the one that trains `parameters`, or several that do together (for example Muon and AdamW). Metrics
                then observe before the first of them steps, and decisions follow the last one's step.
            total_steps: optimizer steps of the whole run, those before a resume included. It may be raised once every
                schedule of the method has ended.
            penalty: ``"loss"`` if the caller trains on ``loss + adapted.penalty()``; ``"gradient"`` to add the penalty's
                gradient to the factors' in every step that `begin_step` announces, whoever computes the loss.
            scaler: the loss's ``GradScaler``, if ``penalty="gradient"`` or a metric measures ``"before-clipping"``.

        Raise LrkitError if it is bound already, or if optimizer, schedules or way of training in parallel do not fit.
        """
        self._graft.check()
        with torch.inference_mode(False):  # what is made in the mode for inference could never train
            self._binding.bind(optimizer, total_steps, penalty, scaler)

    def calibrate(self, batches: Iterable[Any], loss: LossOf | None = None) -> None:
        """Show batches to a method that decides by them before the first step (`lrkit.Scheduler`, `calibration`).

        Call it before `bind`. Each batch runs forward, and backward if a metric reads gradients, without dropout (as in
        EVA's code); gradients, modes, buffers and random generators are as before. Of several processes each gives its own:
        all begin as the first does, gradients are averaged, and the shortest list ends it. `batches` are dicts with labels,
        as the model takes them: at least one, and all are used. `loss` gives the loss of other batches.

        Raise LrkitError, with nothing decided, if there is no batch or no loss. Warn if there is nothing to calibrate.
        """
        self._graft.check()
        self._binding.calibrate(batches, loss)

    def begin_step(self) -> None:
        """Prepare the backward passes of one optimizer step, if bound with ``penalty="gradient"``."""
        self._binding.begin_step()

    def check_schedule(self, total_steps: int) -> None:
        """Raise LrkitError if a schedule of the method does not fit a run of so many steps."""
        self._graft.check()
        self.controller.schedule(total_steps, dry=True)

    def as_computed(self, p: Tensor) -> Tensor:
        """Return a parameter as the model computes with it: a float32 head beside half precision is rounded."""
        return self._graft.masters.as_computed(p)

    def unbind(self, *, quietly: bool = False) -> None:
        """Let go of the optimizer; `bind` goes on from here. Warn if a schedule has not ended, unless `quietly`."""
        if self._binding.bound and not quietly:
            self.check_finished()
        self._binding.unbind()

    def check_finished(self) -> None:
        """Warn once if a schedule has not ended, so that the budget is not reached. Call it before using the adapters."""
        self._graft.check()
        if unfinished := self.controller.unfinished():
            self.controller.warn("unfinished", unfinished)

    def penalty(self) -> Tensor:
        """Return the scalar to add to the loss while training: 0 for a method without a penalty."""
        self._graft.check()
        value, device = self._binding.penalty.value(), next(self.model.parameters()).device
        return torch.zeros((), device=device, dtype=torch.float32) if value is None else value

    @property
    def penalty_added(self) -> float | None:
        """Return the penalty at the beginning of the last step, if bound with ``penalty="gradient"``; None otherwise."""
        return None if (last := self._binding.penalty.last) is None else float(last)

    @property
    def has_penalty(self) -> bool:
        """Return whether the method adds a penalty to the loss."""
        return self._binding.penalty.exists

    @property
    def controller(self) -> Controller:
        """Return the loop, with policies, ranks and counts. Integrations need it, training scripts do not."""
        return self._binding.controller

    @property
    def history(self) -> list[Decision]:
        """Return one record per decision so far."""
        return self.controller.history

    @property
    def step(self) -> int:
        """Return the optimizer steps taken so far."""
        return self.controller.step

    @property
    def total_steps(self) -> int | None:
        """Return the optimizer steps of the whole run; None before `bind`."""
        return self.controller.total_steps

    @property
    def attached(self) -> bool:
        """Return whether the adapters are in the model; False once they were merged or detached."""
        return self._graft.alive

    def summary(self) -> Summary:
        """Return each layer's rank or frozen state, and its trainable parameters at first, now and on average."""
        self._graft.check()
        return summarize(self.controller, sum(p.numel() for p in self._weights.head()), self.coverage)

    def allocation(self) -> Allocation:
        """Return each layer's rank that is in effect now (masked components do not count), with the layers' sizes."""
        return Allocation.from_layers(self.summary().layers)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words, and how they divide into adapters and head."""
        print(trainable(self.model, entries(self.model), self.summary()))  # noqa: T201

    def scores(self, policy: int = 0) -> dict[str, float]:
        """Return every unit's present score by one policy, by name (-inf: out for good); nothing after its last decision."""
        state, seed = self.controller.policies[policy], seed_of(self.controller.seed, self.step, policy)
        return {} if state.ended else dict(zip(state.unit_names, state.scores(seed).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything adaptive: adapters and head, masks, frozen set, statistics, history.

        It is ``{"meta": JSON data, "tensors": name to tensor}``. With the optimizer's own state (and the generators', if
        there is dropout) a run that loads it goes on bit for bit.
        """
        self._graft.check()
        return self._archive.state(self.controller)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state, before or after `bind`. Raise LrkitError, with nothing changed, if it does not fit."""
        self._graft.check()
        self._take(states.read(state), state["tensors"])

    def _take(self, saved: states.Saved, tensors: Mapping[str, Tensor]) -> None:
        self._binding.take(self._archive.load(saved, tensors, self.controller, self._binding.last()))

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Go back to an earlier state of this run in all but the weights: schedule, statistics, masks, ranks, history.

        Weights stay as they are now; a component that was cut since then comes back as it was in `state`, which `state_dict`
        returned earlier in this run. Raise LrkitError, with nothing changed, if it is bound or the state is of another run.
        """
        self._graft.check()
        if self._binding.bound:
            raise LrkitError("call unbind() before rewind()")
        earlier = states.read(state)
        self._binding.take(self._archive.rewind(earlier, state["tensors"], self.controller, self._binding.last()))

    def take_ranks(self) -> None:
        """Let ``model.load_state_dict`` take weights of other ranks, for those who load them before the adaptive state."""
        for adapter in self.adapters.values():
            weights.take_ranks(adapter, self.method.parameterization.parts, lambda: self._binding.last())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write everything adaptive to ``folder/lrkit.safetensors``, atomically, and return its path."""
        return checkpoint.write_once(Path(folder), self.state_dict(), self._weights.parameters())

    def compact(self) -> dict[str, int]:
        """Cut the components that are masked and zero away for good, and return each layer's rank. Outputs stay the same.

        Raise LrkitError if the last decision is still to come, or if layers share their matrices.
        """
        self._graft.check()
        if not all(state.ended for state in self.controller.policies):
            raise LrkitError("masked components can still come back: compact() after the last decision")
        return self._binding.compact()

    def disabled(self) -> AbstractContextManager[None]:
        """Run the model as it was before `attach`, for a ``with`` block: its outputs bit for bit, a trained head's included.

        Nothing is copied, and a graph that was made before, inside or after the block stays right. It can be nested. Calls
        that need the adapters (saving, merging, binding, ...) are refused inside. Two threads may not use the model at once.
        """
        return self._graft.disabled()

    def reference(self) -> Reference:
        """Return a module that runs the model as it was before `attach` and shares its weights (for ``ref_model=``, say)."""
        self._graft.check()
        return Reference(self.model, self.disabled)

    def original(self, *, dequantize: bool = False) -> nn.Module:
        """Return a copy of the model as it was before `attach`, head and all; quantized weights are shared.

        With `dequantize`, float layers take quantized ones' places in it.
        """
        self._graft.check()
        plain = self._graft.original(self._weights.trained)
        return dequantized(plain) if dequantize else plain

    def expect_saves(self) -> None:
        """Do not warn at ``save_pretrained`` until `unbind`: an integration saves the adapters beside the model."""
        self._binding.hold(self._graft.saves.expect())

    def merge(self, *, dequantize: bool = False) -> nn.Module:
        """Add every ΔW to its base weight, take the adapters out, and return the plain model. The head stays as trained.

        With `dequantize`, float layers take quantized ones' places. Raise LrkitError, with nothing changed, if it cannot be.
        """
        self.check_finished()
        self._graft.merge(dequantize=dequantize)
        self._binding.leave()
        return self.model

    def detach(self) -> nn.Module:
        """Put everything back as it was before `attach`, bit for bit, the head included, and return the plain model."""
        self._graft.check()
        self._graft.detach()
        self._binding.leave()
        return self.model

    def __deepcopy__(self, memo: object) -> "Adapted":
        raise LrkitError("a handle cannot be copied: copy the plain model and attach again, or use save() and load()")

    def __repr__(self) -> str:
        """Return in one line what is attached to what."""
        return brief(self.model, self.method, len(self.adapters), self.step, self.total_steps)
