"""A method's penalty: its value for the loss, or its gradient straight into the factors; and whether it arrived."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrkit.adapt.sharding import gathered
from lrkit.loop.gradients import Unclipped, on_gradient
from lrkit.parameterizations import Parameterization
from lrkit.shards import held, whole

FELT = 0.1
"""Gradients of a smaller norm are not compared, since clipping, mostly at 1, does not change them. For example the task of a
model with random weights has next to no gradient, and any penalty exceeds it."""


def looks(steps: int) -> range:
    """Return the steps 1, 2, ... of a run at which the penalty's gradient is compared with the task's.

    They are five, after the first tenth of the run. Before that the core values, which begin at zero, keep the task's
    gradient from the other factors.
    """
    begin = steps // 10 + 1
    return range(begin, min(begin + 5, steps + 1))


Warn = Callable[[str, str], None]
"""Called with a key and a message; each key is said once."""


class Penalty:
    """The penalty γ R of a method, and the way of its gradient to the factors.

    In a bare loop the caller adds it to the loss. If somebody else computes the loss (a Trainer, for example),
    `add_in_backward` adds γ ∇R to the first gradient that arrives at each factor in an optimizer step. Since the factors do
    not move within a step, that is the gradient of ``loss + penalty``, whatever the accumulation. If the loss does not reach
    a factor in a step, the penalty does not either, and the factor stays as it is.

    Args:
        parameterization: computes γ R, or None for a method without a penalty.
        adapters: the modules that it is computed from.
        factors: the tensors that the method trains beside the head.
        warn: says a message once per key.
    """

    def __init__(
        self,
        parameterization: Parameterization,
        adapters: Mapping[str, nn.Module],
        factors: Sequence[nn.Parameter],
        warn: Warn,
    ) -> None:
        self._parameterization, self._adapters = parameterization, list(adapters.values())
        self._factors, self._warn = list(factors), warn
        self._adding = self._idle = False
        self._due: dict[int, Tensor] = {}
        self._given: set[int] = set()
        self._weight: Tensor | float | None = None
        self._norms: list[Tensor] = []
        self.last: float | Tensor | None = None
        """γ R at the beginning of the last step that `begin` was called for."""

    @functools.cached_property
    def exists(self) -> bool:
        """Return whether the method has a penalty."""
        with torch.no_grad():
            return self._compute() is not None

    def _compute(self) -> Tensor | None:
        """Return γ R from whole factors, a scalar that is the same on every process."""
        with gathered(self._adapters):
            return self._parameterization.penalty(self._adapters)

    def value(self) -> Tensor | None:
        """Return γ R, a scalar for the loss that notes the arrival of its gradient; None for a method without a penalty."""
        value = self._compute()
        if value is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._idle = not value.requires_grad
            if value.requires_grad:
                value.register_hook(self._arrive)  # type: ignore[no-untyped-call]
        return value

    def _arrive(self, grad: Tensor) -> None:
        if self._adding:
            self._warn(
                "twice",
                "the penalty's gradient is added while training, and the loss holds adapted.penalty() as well: it counts "
                "twice. Leave it out of the loss",
            )
            return
        self._weight = grad.detach() if self._weight is None else self._weight + grad.detach()

    # ---- without the loss ----

    def add_in_backward(self, scale: Callable[[], float]) -> list[RemovableHandle]:
        """Add γ ∇R to the factors' gradients from now on, in every step that `begin` announces.

        Args:
            scale: the factor that a gradient scaler multiplies the loss by; 1 without one.

        Returns:
            Handles that end it when they are removed.
        """
        self._adding = True

        def hook_for(p: nn.Parameter) -> Callable[[Tensor], Tensor | None]:
            def add(grad: Tensor) -> Tensor | None:
                due = self._due.get(id(p))
                # Once per step; and again if the gradient that it was added to was thrown away, as a count of FLOPs does.
                if due is None or (id(p) in self._given and p.grad is not None):
                    return None
                self._given.add(id(p))
                if self._weight is None:  # once per step: on a GPU, reading it waits for all that runs there
                    self._weight = scale()
                return grad + due.to(grad) * self._weight

            return add

        return [on_gradient(p, hook_for(p)) for p in self._factors]

    def end(self) -> None:
        """Forget what belongs to a run that is over."""
        self._adding, self._weight, self._due, self._given, self._norms = False, None, {}, set(), []

    def begin(self) -> None:
        """Compute γ ∇R for the optimizer step whose first backward pass is next, if it is added there."""
        if not self._adding:
            return
        value, grads = self._gradient()
        self._due, self._given = {id(p): held(g) for p, g in grads}, set()
        self._weight, self._idle = None, not grads
        self.last = value

    def _gradient(self) -> tuple[Tensor | None, list[tuple[nn.Parameter, Tensor]]]:
        """Return γ R without its graph, and γ ∇R by factor."""
        due, self._due = self._due, {}  # the hooks on the factors are called with this gradient too
        try:
            with torch.enable_grad():
                value = self._compute()
                if value is None or not value.requires_grad:
                    return value, []
                live = [p for p in self._factors if p.requires_grad]
                grads = torch.autograd.grad(value, live, allow_unused=True)
        finally:
            self._due = due
        return value.detach(), [(p, g) for p, g in zip(live, grads, strict=True) if g is not None]

    # ---- what became of it ----

    def check_arrival(self) -> None:
        """Warn if the gradient has not arrived since the last step. Call this when an optimizer is about to step.

        If every factor is frozen there is no gradient, and no warning.
        """
        if self._weight is None and not self._idle and self._gradient()[1]:
            self._idle = True  # said: do not look again before the penalty is asked for
            self._warn(
                "penalty",
                "the method has a penalty, and its gradient was in none of the gradients of this optimizer step: use "
                "loss = ... + adapted.penalty()"
                if not self._adding
                else "the method has a penalty, and its gradient was in none of the gradients of this optimizer step: the "
                "loss reaches none of the factors",
            )

    def compare(self, gradients: Unclipped, *, last: bool) -> None:
        """Compare the penalty's gradient with the task's, and warn after some steps if it is the larger one.

        Args:
            gradients: of the factors, penalty included.
            last: whether this is the last of the steps that are looked at.
        """
        weight = self._weight
        if weight is None:
            return
        pulls = {id(p): g for p, g in self._gradient()[1]}
        device = self._factors[0].device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for p in self._factors:
            grad, pull = gradients.of(p), pulls.get(id(p))
            if pull is None and grad is None:
                continue
            pull = torch.zeros_like(p) if pull is None else pull
            task = torch.zeros_like(pull) if grad is None else grad / weight - pull
            squares = [whole(each).double().square().sum().to(device) for each in (pull, task)]
            sums += torch.stack(squares)
        self._norms.append(sums.sqrt())
        if not last:
            return
        penalty, task_norm = torch.stack(self._norms).mean(0).tolist()
        if penalty > max(task_norm, FELT):
            setting = self._parameterization.penalty_weight
            advice = f"a smaller parameterization.{setting}" if setting else "a smaller penalty"
            self._warn(
                "drowned",
                f"the penalty's gradient is larger than the task's: norm {penalty:.3g} beside {task_norm:.3g}, on average "
                f"over {len(self._norms)} steps. It decides where the factors go: {advice} would let the task",
            )

    def stepped(self) -> None:
        """Forget the arrival, after an optimizer step."""
        self._weight = None
