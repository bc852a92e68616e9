"""lrkit in transformers' Trainer: one callback, nothing else to call."""

import inspect
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lrkit.adapt import checkpoint
from lrkit.adapt.adapted import Adapted
from lrkit.adapt.quantized import let_train
from lrkit.compose import to_plain
from lrkit.errors import LrkitError, LrkitWarning, shown
from lrkit.loop import beginning, rules
from lrkit.shards import is_sharded


class AdaptCallback(TrainerCallback):
    """A callback that runs an adapted model's method: ``Trainer(..., callbacks=[AdaptCallback(adapted)])``.

    It binds the method to the Trainer's optimizer, adds the penalty's gradient to the factors' while training, writes
    everything adaptive into each checkpoint folder, and loads it on ``resume_from_checkpoint``.

    The penalty's gradient goes into the first gradient that arrives at each factor in an optimizer step, before clipping,
    so that the run is the one of ``loss + penalty`` whoever computes the loss (TRL's trainers, label smoothing,
    ``compute_loss_func``). The loss that the Trainer logs is the task's; the penalty is logged beside it as ``penalty``,
    and trackers (``report_to``) get both.

    If the method decides by batches before the first step, it is calibrated by the Trainer's loss on the first batches, as
    many as the scheduler asks for; training then begins with the same ones. A run that resumes is not calibrated again.

    A model whose base is quantized trains in the Trainer once this callback has been made.

    Args:
        adapted: the handle that `lrkit.attach` returned for the Trainer's model.
        resume_from: the folder to load, if it is not the checkpoint that the Trainer resumes from.
        log: True to log `figures` (ranks, budget, scores) beside each loss, as the penalty always is; ``"layers"`` for each
            layer's rank as well.
    """

    def __init__(
        self,
        adapted: Adapted,
        resume_from: str | os.PathLike[str] | None = None,
        *,
        log: bool | Literal["layers"] = False,
    ) -> None:
        if log not in (True, False, "layers"):
            raise LrkitError(f'log must be True, False or "layers", not {shown(log)}')
        if not isinstance(adapted, Adapted):
            raise LrkitError(f"AdaptCallback takes the handle that lrkit.attach returned, not {type(adapted).__name__}")
        self.adapted = adapted
        self.resume_from = resume_from
        self.log = log
        self._training = False
        self._start: dict[str, Any] | None = None
        let_train(adapted)

    def on_init_end(self, *_: Any, **kwargs: Any) -> None:
        """Let a checkpoint of other ranks be loaded, and the Trainer's optimizer hold what may train later.

        Before it calls `on_train_begin`, the Trainer loads weights, and makes its optimizer of what requires a gradient.
        """
        self._check_model(kwargs.get("model"))
        self.adapted.take_ranks()
        asleep = self.adapted.controller.components.asleep()
        for p in self.adapted.parameters():
            p.requires_grad_(p.requires_grad or (id(p) in asleep and p.numel() > 0))  # until bind

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bind, once the run is loaded (if the Trainer resumes), rewound (if it begins again) or calibrated.

        A second ``train()`` goes on.
        """
        self.adapted.unbind(quietly=True)
        if state.global_step > 0:
            self.adapted.load_state_dict(checkpoint.read(self._folder(args, state)))
        elif self.resume_from is not None and not self.adapted.step:
            raise LrkitError(
                f"AdaptCallback(resume_from={os.fspath(self.resume_from)!r}) says what belongs to the checkpoint that the "
                "Trainer resumes from, and it begins at step 0: call train(resume_from_checkpoint=...), or leave "
                "resume_from out"
            )
        elif self._training and self._start is not None:
            self.adapted.rewind(self._start)
            warnings.warn(
                f"the Trainer begins again at step 0 (batch size {args.train_batch_size}): statistics, masks, ranks and "
                "history go back to where they were; the weights stay as the Trainer leaves them",
                LrkitWarning,
                stacklevel=2,
            )
        else:
            if beginning.batches(self.adapted.controller):
                self._calibrate(kwargs["train_dataloader"])
            if args.auto_find_batch_size:
                self._start = self.adapted.state_dict()
        if args.save_strategy != "no":
            to_plain(
                self.adapted.method
            )  # what has no name could not be saved, which the first checkpoint would find out
        optimizer = kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)  # accelerate's
        self.adapted.bind(
            optimizer, total_steps=state.max_steps + self._earlier(state, scaler), penalty="gradient", scaler=scaler
        )
        self.adapted.expect_saves()  # `on_save` writes the adapters beside the model
        self._training = True
        _call_last(get_reporting_integration_callbacks(args.report_to))  # type: ignore[no-untyped-call]

    def _earlier(self, state: TrainerState, scaler: Any) -> int:
        """Count the method's steps before this ``train()``."""
        step, total = self.adapted.step, self.adapted.total_steps
        if not state.global_step:
            return step
        return rules.earlier(step, total, state.global_step, state.max_steps, skipping=scaler is not None)

    def _check_model(self, model: Any) -> None:
        """Refuse a Trainer of another model."""
        there = None if model is None else {id(p) for p in model.parameters()}
        if there is not None and not all(id(p) in there for p in self.adapted.parameters()):
            raise LrkitError(
                "AdaptCallback has the handle of another model than the Trainer's: give it what lrkit.attach(model, ...) "
                "returned for that one"
            )

    def _calibrate(self, loader: Any) -> None:
        """Calibrate by the first batches of a Trainer, and its loss."""
        trainer = _calling(Trainer)

        def loss(batch: Any) -> torch.Tensor:
            with trainer.compute_loss_context_manager():
                inputs = trainer._prepare_inputs(batch)  # noqa: SLF001 - it moves them, and some trainers make them there
                found: torch.Tensor = trainer.compute_loss(self.adapted.model, inputs)
            return found

        batches = beginning.taken(self.adapted.controller, loader)
        self.adapted.calibrate(batches, None if trainer is None else loss)
        if hasattr(loader, "end"):
            loader.end()  # accelerate's: it has been left halfway

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Find the folder of the checkpoint that the Trainer resumes from."""
        given = (found.get("resume_from_checkpoint") for found in _locals(Trainer))
        local = next((each for each in given if isinstance(each, str | os.PathLike)), None)
        own = (
            args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None,
            Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}",
        )
        resumed = own if local is None else (local,)  # it tells a callback of the step alone
        tried = [Path(folder) for folder in (self.resume_from, *resumed) if folder is not None]
        for folder in tried:
            if (folder / checkpoint.FILE).is_file():
                return folder
        raise LrkitError(
            f"the Trainer resumes at step {state.global_step}, and there is no {checkpoint.FILE} in "
            f"{' or '.join(str(folder) for folder in tried)}: give AdaptCallback(adapted, resume_from=FOLDER)"
        )

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        """Compute the penalty's gradient for this step."""
        self.adapted.begin_step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the penalty beside the loss, under a name of its own, and the `figures` if they are asked for."""
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs:
            return
        penalty = self.adapted.penalty_added
        more = {} if penalty is None else {"penalty": penalty}
        if self.log:
            more |= figures(self.adapted, layers=self.log == "layers")
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write everything adaptive into the checkpoint folder."""
        if state.is_world_process_zero or any(map(is_sharded, self.adapted.parameters())):  # all give their parts
            self.adapted.save(Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer, and load the Trainer's best checkpoint if it did."""
        self._training, self._start = False, None
        self.adapted.unbind(quietly=True)
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and (Path(best) / checkpoint.FILE).is_file():
            self.adapted.load_state_dict(checkpoint.read(Path(best)))
        self.adapted.check_finished()


def _call_last(trackers: Sequence[type[TrainerCallback]]) -> None:
    """Let the Trainer that is calling now call its trackers after its other callbacks, so that they get what those log.

    A Trainer calls the trackers of ``report_to`` before all callbacks that it is given.
    """
    handler = _calling(CallbackHandler)
    if handler is not None:
        # A new list: the handler is going through the old one.
        handler.callbacks = sorted(handler.callbacks, key=lambda callback: isinstance(callback, tuple(trackers)))


def _calling(kind: type[Any]) -> Any:
    """Return the object of a class that calls now: a Trainer tells a callback neither of itself nor of its other callbacks.

    It is found on the call stack; None if there is none.
    """
    return next((found["self"] for found in _locals(kind)), None)


def _locals(kind: type[Any]) -> Iterator[dict[str, Any]]:
    """Yield the local names of each call of a class's methods that is going on now, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        found, frame = frame.f_locals, frame.f_back
        if isinstance(found.get("self"), kind):
            yield found


_PREFIX = "lrkit/"


def figures(adapted: Adapted, *, layers: bool = False) -> dict[str, float]:
    """Return what a method does at this step as numbers for a tracker, by name.

    - ``lrkit/rank/total``, ``mean``, ``min``, ``max``: over the layers with rank components, masked ones not counted;
    - ``lrkit/rank/LAYER``: each layer's, if `layers`;
    - ``lrkit/trainable``: adapter parameters in effect;
    - ``lrkit/budget`` and ``lrkit/kept``: of the last decision, in units (or what its scheduler counts);
    - ``lrkit/score/mean``, ``min``, ``max``: of the units' present scores, until the last decision.

    Those of further policies begin with ``lrkit/1/``, ``lrkit/2/``, ... A figure that the method does not have is left out.

    Args:
        adapted: the handle.
        layers: return each layer's rank as well.
    """
    found: dict[str, float] = {f"{_PREFIX}trainable": sum(layer.now for layer in adapted.summary().layers)}
    ranks = {layer.name: layer.rank for layer in adapted.summary().layers if layer.rank is not None}
    if ranks:
        found[f"{_PREFIX}rank/total"] = sum(ranks.values())
        found |= _spread(f"{_PREFIX}rank", list(ranks.values()))
    if layers:
        found |= {f"{_PREFIX}rank/{name}": rank for name, rank in ranks.items()}
    last = {decision.policy: decision for decision in adapted.history}
    for policy in range(len(adapted.controller.policies)):
        prefix = f"{_PREFIX}{policy}/" if policy else _PREFIX
        if policy in last:
            found |= {f"{prefix}budget": last[policy].budget, f"{prefix}kept": last[policy].kept}
        scores = [score for score in adapted.scores(policy).values() if math.isfinite(score)]
        found |= _spread(f"{prefix}score", scores) if scores else {}
    return found


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}/mean": sum(values) / len(values), f"{name}/min": min(values), f"{name}/max": max(values)}
