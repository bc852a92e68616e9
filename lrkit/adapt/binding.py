"""A method's tie to optimizers: the loop runs at their steps, and the penalty's gradient goes into their tensors."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrkit.adapt import calibration, parallel, sharding, watching
from lrkit.adapt.optimizers import Steps, as_long_as_alive, as_one, unwrapped
from lrkit.adapt.penalty import Penalty, looks
from lrkit.adapt.saved import Loaded
from lrkit.adapt.taps import Taps
from lrkit.adapt.weights import Weights
from lrkit.adapt.wrappers import averaging, wrapping
from lrkit.errors import LrkitError, listing
from lrkit.loop import beginning, liveness
from lrkit.loop.controller import Controller
from lrkit.loop.gradients import Unclipped
from lrkit.loop.resizing import outgrown


class Binding:
    """A method's tie to optimizers, for as long as its adapters are in a model.

    From the beginning it watches every optimizer, and warns if one trains the adapters while the method is not bound to it,
    or if the loss does not reach them. From `bind` on it runs the loop.

    Args:
        model: the adapted model.
        head: names of its modules that train in full.
        weights: what trains.
        controller: the loop.
    """

    def __init__(self, model: nn.Module, head: Sequence[str], weights: Weights, controller: Controller) -> None:
        self._model, self._head, self._weights, self.controller = model, head, weights, controller
        self.penalty = self._new_penalty()
        weights.on_move = self._moved
        self.last: Callable[[], Optimizer | None] = lambda: None
        """Returns the optimizers that are or were bound last, as one, if they still live."""
        self._steps: Steps | None = None
        self._scale: Callable[[], float] | None = None
        self._unclipped: Unclipped | None = None
        self._looked = False
        self.taps = Taps(model, lambda: self.controller.peers)
        self._outer = parallel.Outer(self._met)
        self._outer.hang_on(model)
        liveness.watch(self, Binding._watch)
        watching.stay(controller.run.modules, self)

    def _new_penalty(self) -> Penalty:
        run = self.controller.run
        return Penalty(run.method.parameterization, run.modules, self._weights.adapter(), self.controller.warn)

    def _moved(self, moves: sharding.Moves) -> None:
        """Go on with the sharded parameters that `fully_shard` has put in the places of those that were attached."""
        if self.bound:
            raise LrkitError(
                "the model was sharded after bind: call fully_shard first, then make the optimizer from "
                "adapted.parameters(), and bind it"
            )
        self._weights.follow(moves)
        old = self.controller
        run, saved = old.run.anew(self._weights.head()), old.saved({}, (), None)
        off = {id(moves[each]) if each in moves else each for each in old.components.off}
        self.controller = Controller(run, saved, old.tensors(), old.warn, off)
        self.controller.schedule(old.total_steps)
        self.penalty = self._new_penalty()

    # ---- bound and let go ----

    @property
    def bound(self) -> bool:
        """Return whether the loop runs."""
        return self._steps is not None

    def bind(self, optimizer: Optimizer | Sequence[Optimizer], total_steps: int, penalty: str, scaler: Any) -> None:
        """Run the loop from here on, at every step of the optimizers. The arguments are those of `Adapted.bind`."""
        optimizers = unwrapped(optimizer)
        if self.bound:
            raise LrkitError("already bound to an optimizer: call unbind() first")
        if reason := beginning.refusal(self.controller):
            raise LrkitError(reason)
        if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
            raise LrkitError(f"total_steps must be an int of at least 1, not {total_steps!r}")
        if penalty not in ("loss", "gradient"):
            raise LrkitError(f'penalty must be "loss" or "gradient", not {penalty!r}')
        masks = any(state.masks for state in self.controller.policies)
        for each in optimizers:
            reason = parallel.refusal(self._model, each, adaptive=bool(self.controller.policies))
            if reason := reason or (averaging(each) if masks else None):
                raise LrkitError(reason)
        trained = self._weights.parameters()
        held, asleep = set().union(*map(liveness.held_by, optimizers)), self.controller.components.asleep()
        if reason := sharding.refusal(self._model, self.controller) or self._weights.refusal(held, asleep):
            raise LrkitError(reason)
        run, ranks = self.controller.run, self.controller.components.ranks
        if reason := self.controller.objection(total_steps) or outgrown(optimizers, run.modules, run.parts, ranks):
            raise LrkitError(reason)
        if masks and (told := wrapping(optimizer)):
            self.controller.warn("wrapped", told)
        self._tell_others(held)
        self.controller.begin(total_steps)
        self.controller.seed = sharding.one_seed(self.controller.seed, self._model)
        self._steps = Steps(
            optimizers,
            trained,
            self._before_step,
            self._after_step,
            self.controller.warn,
            adaptive=bool(self.controller.policies) or self.penalty.exists,
        )
        for p in sharding.left_whole(self._model, trained):
            self._steps.hold(sharding.averaged(self._model, p))
        self.last = as_long_as_alive(optimizers)
        liveness.watch(self, Binding._watch)
        self._scale = None if scaler is None else scaler.get_scale
        self.taps.scale = self._scale or (lambda: 1.0)
        self.controller.peers = sharding.peers(self._model) or self.controller.peers
        if self.penalty.exists and penalty == "gradient":
            for handle in self.penalty.add_in_backward(self.taps.scale):
                self._steps.hold(handle)
        self._keep_gradients()
        self._outer.hang_on(self._model)
        if calibration.begin(self._weights, self.controller, as_one(optimizers)):
            self.follow()
        self.taps.hang(self.controller.readers())

    def calibrate(self, batches: Iterable[Any], loss: calibration.LossOf | None) -> None:
        """Take the decisions of step 0 that go by batches. The arguments are those of `Adapted.calibrate`."""
        self._weights.put_back()  # the loop of sharded parameters is another one
        waiting = beginning.waiting(self.controller, calibrated=True)
        if waiting:
            self.controller.peers = parallel.peers(None)
        # If nothing waits, the hooks of a method that is bound stay as they are.
        reading = self.taps.hung(waiting, forward=beginning.forward_alone(waiting)) if waiting else nullcontext()
        with torch.inference_mode(False), reading:  # what is made in the mode for inference could never train
            moved = calibration.calibrate(self._model, self._weights, self.controller, waiting, batches, loss)
        if moved:
            self.follow()

    def _tell_others(self, held: set[int]) -> None:
        """Warn of the model's parameters that an optimizer trains and that are none of the method's."""
        others = [
            name
            for name, p in self._model.named_parameters()
            if p.requires_grad and id(p) in held and id(p) not in self._weights.trained
        ]
        if others:
            self.controller.warn(
                "others",
                f"the optimizer trains {listing(others)} too, which are not saved with the adapters, and detach does not "
                "put them back: name what trains beside them in train_also",
            )

    def hold(self, handle: Any) -> None:
        """Keep the handle of another hook, and remove it when the optimizers are let go of."""
        if self._steps is not None:
            self._steps.hold(handle)

    def unbind(self) -> None:
        """Let go of the optimizers. `bind` goes on from here."""
        if self._steps is not None:
            self._steps.release()
        if self._unclipped is not None:
            self._unclipped.remove()
        self.penalty.end()
        self.taps.hang(())
        self._steps = self._unclipped = self._outer.ddp = None
        liveness.watch(self, Binding._watch)

    def leave(self) -> None:
        """Let go of the optimizers and the model for good."""
        self.unbind()
        liveness.leave(self)
        self._outer.remove()

    def take(self, loaded: Loaded) -> None:
        """Go on with the loop of a loaded state, and say what is to be said of it, since nothing can fail any more."""
        self.controller = loaded.controller
        if self._steps is not None:
            self._steps.forget()
        self.taps.hang(self.controller.readers() if self.bound else ())
        self.follow()
        if loaded.cast:
            self.controller.warn("cast state", loaded.cast)

    def compact(self) -> dict[str, int]:
        """Cut components as `Adapted.compact` says."""
        ranks = self.controller.compact(self.last())
        self.follow()
        return ranks

    def follow(self) -> None:
        """Let DDP follow tensors that have stopped training, train again, or are of another size."""
        self._outer.follow()

    # ---- at each step ----

    def begin_step(self) -> None:
        """Compute the penalty's gradient, if it is added while training."""
        self._weights.put_back()
        self.penalty.begin()

    def _before_step(self, scale: Tensor | None) -> None:
        self._weights.put_back()
        unclipped, step = self._unclipped, self.controller.step + 1
        if self.penalty.exists:
            self.penalty.check_arrival()
            window = looks(self.controller.total_steps or 1)
            if unclipped is not None and step in window:
                self.penalty.compare(unclipped, last=step == window[-1])
        # On a GPU, reading the loss's scale waits for all that runs there: read it only if a metric needs it.
        loss_scale = self._scale() if self._scale is not None and self.controller.wants_unclipped else None
        self.controller.before_step(scale, unclipped, loss_scale)
        self.penalty.stepped()

    def _after_step(self, optimizer: Optimizer) -> None:
        if self.controller.after_step(optimizer):
            self.follow()
        self._keep_gradients()
        self.taps.hang(self.controller.readers())

    def _keep_gradients(self) -> None:
        """Keep gradients as backward leaves them in the next step, if they are going to be read there."""
        looking = self.penalty.exists and self.controller.step + 1 in looks(self.controller.total_steps or 1)
        if not (looking or self.controller.wants_unclipped):
            if self._unclipped is not None:
                self._unclipped.remove()
            self._unclipped = None
        elif self._unclipped is None:
            self._unclipped = Unclipped(self._weights.adapter())
        else:
            self._unclipped.clear()

    # ---- watching ----

    def _watch(self, optimizer: Optimizer, held: frozenset[int]) -> None:
        """Look at any optimizer before its step, as long as there may be something to say of it."""
        if not (self._looked or self.bound):
            self._weights.put_back()
        if not (self._looked or held.isdisjoint(self._weights.trained)):
            # Name the modules that train and have no gradient, before the first step that has any.
            self._looked = watching.look(self._model, self._head, self._weights, self.controller, self._outer.ddp)
        # An optimizer that steps inside the bound one's step is one that it wraps.
        if self._steps is None or not (optimizer in self._steps.optimizers or self._steps.stepping):
            self._notice(held)

    def _notice(self, held: frozenset[int]) -> None:
        """Say that the method is not bound to an optimizer that steps the adapters' parameters."""
        self._weights.put_back()
        # The set of all that trains first: other models' optimizers step as well, and a walk through this one takes time.
        if held.isdisjoint(self._weights.trained) or held.isdisjoint(map(id, self._weights.adapter())):
            return
        trained = self._weights.parameters()
        if reason := sharding.refusal(self._model, self.controller):
            raise LrkitError(reason)
        if left := sharding.left_whole(self._model, trained):
            raise LrkitError(
                f"{len(left)} of the {len(trained)} tensors that train are whole beside sharded ones, and nothing averages "
                "their gradients: bind the method to the optimizer, whatever it is, or fully_shard without ignored_params"
            )
        if self.controller.policies or self.penalty.exists:
            self.controller.warn(
                "unbound",
                "an optimizer steps the adapters' parameters, but the method is not bound to it: nothing is adaptive. "
                "Call adapted.bind(optimizer, total_steps=...) before training, or give transformers' Trainer "
                "callbacks=[AdaptCallback(adapted)]",
            )
        elif self._looked:
            liveness.leave(self)  # nothing more to notice

    def _met(self, ddp: Any) -> None:
        """Let chance be the same on every process of a DDP module, however each was seeded."""
        if self.controller.policies and self.bound and (reason := parallel.joining(ddp)):
            raise LrkitError(reason)
        if ddp is not self._outer.ddp and self.controller.policies:
            self.controller.seed = parallel.first_says(self.controller.seed, ddp)
            self.controller.peers = parallel.peers(ddp)
