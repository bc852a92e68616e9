"""lrkit in transformers' Trainer: one callback, nothing else to call."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lrkit import checkpoint
from lrkit.adapted import Adapted
from lrkit.errors import LrkitError


class AdaptCallback(TrainerCallback):
    """Runs an adapted model's method in a Trainer: ``Trainer(..., callbacks=[AdaptCallback(adapted)])``.

    It binds the method to the Trainer's optimizer, adds the penalty to the model's loss while training (and only then),
    writes everything adaptive into each checkpoint folder, and loads it on ``resume_from_checkpoint``.

    The penalty is added to the loss that the model returns. Where the Trainer computes the loss itself (label smoothing,
    ``compute_loss_func``), add ``adapted.penalty()`` there; a step without it is warned of.

    Args:
        adapted: what `lrkit.attach` gave for the Trainer's model.
        resume_from: the checkpoint folder to load, where it is not ``args.resume_from_checkpoint`` and not in the
            Trainer's ``output_dir``.
    """

    def __init__(self, adapted: Adapted, resume_from: str | os.PathLike[str] | None = None) -> None:
        self.adapted = adapted
        self.resume_from = resume_from

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let a checkpoint of other ranks be loaded: the Trainer loads the model's weights before it says so."""
        self.adapted.take_ranks()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bind; and load, where the Trainer resumes."""
        self._close(quietly=True)
        if state.global_step > 0:
            self.adapted.load_state_dict(checkpoint.read(self._folder(args, state)))
            if self.adapted.step != state.global_step:
                raise LrkitError(
                    f"the Trainer resumes at step {state.global_step}, the lrkit state beside it is of step "
                    f"{self.adapted.step}"
                )
        self.adapted.bind(kwargs["optimizer"], total_steps=state.max_steps)
        self.adapted.hold(self.adapted.expect_saves())  # `on_save` writes the adapters beside the model
        if self.adapted.has_penalty:
            accumulation = args.gradient_accumulation_steps

            def add_penalty(module: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> Any:
                if not module.training or not torch.is_grad_enabled():
                    return output
                # A loss that is already divided by the tokens of the whole accumulated batch is summed, not averaged,
                # over the accumulation; the penalty must then be shared out over its steps.
                share = accumulation if kwargs.get("num_items_in_batch") is not None else 1
                return _with_penalty(output, self.adapted, share)

            self.adapted.hold(self.adapted.model.register_forward_hook(add_penalty, with_kwargs=True))

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        tried = [
            Path(folder)
            for folder in (
                self.resume_from,
                args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None,
                Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}",
            )
            if folder is not None
        ]
        for folder in tried:
            if (folder / checkpoint.FILE).is_file():
                return folder
        raise LrkitError(
            f"the Trainer resumes at step {state.global_step}, and there is no {checkpoint.FILE} in "
            f"{' or '.join(str(folder) for folder in tried)}: give AdaptCallback(adapted, resume_from=FOLDER)"
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write everything adaptive into the checkpoint folder."""
        if state.is_world_process_zero:
            self.adapted.save(Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer and the model's loss; follow the Trainer to its best checkpoint, if it went there."""
        self._close()
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and (Path(best) / checkpoint.FILE).is_file():
            self.adapted.load_state_dict(checkpoint.read(Path(best)))

    def _close(self, *, quietly: bool = False) -> None:
        if quietly:
            self.adapted._unbind()
        else:
            self.adapted.unbind()


def _with_penalty(output: Any, adapted: Adapted, share: int) -> Any:
    """The model's output with the penalty added to its loss; as it is where there is no loss in it."""
    if isinstance(output, dict):
        if output.get("loss") is not None:
            output["loss"] = output["loss"] + adapted.penalty() / share
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor) and output[0].ndim == 0:
        return (output[0] + adapted.penalty() / share, *output[1:])
    return output
