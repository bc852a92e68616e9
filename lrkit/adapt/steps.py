"""Steps of a method: one step of every optimizer that it is bound to is one step of the method."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lrkit.adapt import parallel
from lrkit.adapt.optimizers import as_one, called_before, listed
from lrkit.loop.gradients import on_accumulated


class Steps:
    """Hooks on one or several optimizers. Each of them steps once per step of the method.

    `before` is called when the first of them is about to step, with all gradients still there, and `after` when the last of
    them has stepped. A step that a gradient scaler skips does not count. If one steps again while another has not, the
    previous step of the method ends there.

    Args:
        optimizers: as `unwrapped` returns them.
        trained: tensors that they train.
        before: takes the factor that gradients still carry, or None.
        after: takes the optimizers as one.
        warn: says a message once per key.
        adaptive: whether gradients must be there before the step. A closure is then called before it.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        trained: Sequence[nn.Parameter],
        before: Callable[[Tensor | None], None],
        after: Callable[[Optimizer], None],
        warn: Callable[[str, str], None],
        *,
        adaptive: bool,
    ) -> None:
        self.optimizers = list(optimizers)
        self._together = as_one(self.optimizers)
        self._adaptive = adaptive
        self._before, self._after, self._warn = before, after, warn
        self._handles: list[Any] = []
        self._stepped: set[int] = set()
        self._inside = 0
        self._begun = self._backward = False
        for each in self.optimizers:
            self._handles += [each.register_step_pre_hook(self._enter), each.register_step_post_hook(self._leave)]
        if len(self.optimizers) > 1:
            self._handles += [on_accumulated(p, self._see) for p in trained]

    @property
    def stepping(self) -> bool:
        """Return whether one of them is inside its step. Another optimizer that steps now is one that it wraps."""
        return self._inside > 0

    def hold(self, handle: Any) -> None:
        """Keep the handle of another hook, and remove it together with these."""
        self._handles.append(handle)

    def release(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inside = [], 0

    # The optimizers' hooks hold this object, and it holds whoever it calls: a method goes on running if a script keeps no
    # more than the model and the optimizer.

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._inside += 1
        replaced = called_before(optimizer, args, kwargs) if self._adaptive else None
        again = id(optimizer) in self._stepped
        if self._begun and (again or self._backward):
            names = listed([each for each in self.optimizers if id(each) not in self._stepped])
            self._warn("uneven", f"{names} did not step, and the others did: a step of the method is one of each")
            self._finish()
        scale, skips = parallel.scaled_by(optimizer)
        if not skips and not self._begun:
            self._begun, self._backward = True, False
            self._before(scale)
        return replaced

    def _leave(self, optimizer: Optimizer, *_: Any) -> None:
        self._inside = max(0, self._inside - 1)
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.optimizers):
            self._finish()

    def _finish(self) -> None:
        begun, self._begun = self._begun, False
        self._stepped = set()
        if begun:
            self._after(self._together)

    def _see(self, _: Tensor) -> None:
        self._backward = True
