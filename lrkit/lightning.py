"""lrkit in Lightning's Trainer: one callback, nothing else to call. It needs ``lightning``."""

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader

from lrkit.adapt.adapted import Adapted
from lrkit.errors import LrkitError
from lrkit.loop import beginning, rules


class AdaptCallback(Callback):  # type: ignore[misc] # Lightning is not installed where types are checked
    """A callback that runs an adapted model's method: ``lightning.Trainer(..., callbacks=[AdaptCallback(adapted)])``.

    It binds the method to the optimizers that ``configure_optimizers`` returns, adds the penalty's gradient to the factors'
    before clipping (leave ``adapted.penalty()`` out of the loss), and keeps everything adaptive in Lightning's checkpoints,
    so that ``fit(ckpt_path=...)`` is bitwise the run that was not interrupted. A method that decides by batches before the
    first step is calibrated by the loss of ``training_step`` on the training data.

    Args:
        adapted: the handle that `lrkit.attach` returned for the LightningModule's model.
    """

    def __init__(self, adapted: Adapted) -> None:
        self.adapted = adapted
        self._loaded: dict[str, Any] | None = None
        adapted.take_ranks()  # Lightning loads the weights of a checkpoint, with its ranks, before any optimizer exists

    def state_dict(self) -> dict[str, Any]:
        """Return everything adaptive, for the checkpoint."""
        return self.adapted.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training begins: the weights and the optimizers come first."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Load if the Trainer resumes, or calibrate; then bind.

        Raises:
            LrkitError: the module optimizes by hand, so that nothing says where a step begins.
        """
        if not pl_module.automatic_optimization:
            raise LrkitError(
                "with automatic_optimization=False Lightning does not say where a step begins: leave the callback out, and "
                "call adapted.bind(optimizers, total_steps=...) yourself, and add adapted.penalty() to the loss"
            )
        self.adapted.unbind(quietly=True)
        if self._loaded is not None:
            self.adapted.load_state_dict(self._loaded)
        if beginning.batches(self.adapted.controller):
            self._calibrate(trainer, pl_module)
        step, there, steps = self.adapted.step, trainer.global_step, int(trainer.estimated_stepping_batches)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        before = step - there
        if self._loaded is not None:
            before = rules.earlier(step, self.adapted.total_steps, there, steps, skipping=scaler is not None)
        total, self._loaded = steps + before, None
        self.adapted.bind(trainer.optimizers, total_steps=total, penalty="gradient", scaler=scaler)

    def _calibrate(self, trainer: Any, module: Any) -> None:
        """Calibrate by the first batches of the training data."""
        taken = len(inspect.signature(module.training_step).parameters)

        def loss(batch: Any) -> Any:
            with trainer.precision_plugin.train_step_context():
                found = module.training_step(*(trainer.strategy.batch_to_device(batch), 0)[:taken])
            return found["loss"] if isinstance(found, Mapping) else found

        loader = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
        batches = beginning.taken(self.adapted.controller, loader)
        self.adapted.calibrate((batch for batch, *_ in batches), loss)

    def on_before_zero_grad(self, *_: Any) -> None:
        """Compute the penalty's gradient: gradients are emptied once per optimizer step, before the first backward pass."""
        self.adapted.begin_step()

    def on_train_end(self, *_: Any) -> None:
        """Let go of the optimizers."""
        self.adapted.unbind()
