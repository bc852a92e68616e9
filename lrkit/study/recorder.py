"""Callbacks of a run's Trainer: time its steps, and write down its curves, decisions and checkpoints."""

import shutil
import time
from collections.abc import Callable
from typing import Any

import attrs
import torch
from transformers import TrainerCallback

from lrkit.adapt.adapted import Adapted
from lrkit.study.checkpoints import Record, check_sums
from lrkit.study.run_settings import Progress
from lrkit.study.store import LIST, Lines, write_json

_PATIENCE = 5.0
"""Seconds from being asked to stop to stopping without a checkpoint of that step."""

_EVERY = 10.0
"""Seconds between two words about scoring."""

_NO_SCORES = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""Entries of transformers' evaluation log that are not scores."""


class Watch(TrainerCallback):
    """Times steps, and tells of their losses, and of scoring that takes long.

    Args:
        progress: told of each logged loss.
        tell: told in a few words how far scoring is.
    """

    def __init__(self, progress: Progress | None, tell: Callable[[str], None]) -> None:
        self.seconds: list[float] = []
        self._progress, self._begin = progress, 0.0
        self._scoring = Scoring(lambda done, of: tell(f"scored {done:,} of {of:,} validation examples"))

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """Tell how far scoring is."""
        self._scoring.batch(eval_dataloader)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._begin)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Tell of the loss."""
        if logs and "loss" in logs and self._progress is not None:
            self._progress(state.global_step, state.max_steps, float(logs["loss"]))


class Scoring:
    """Tells every so often how many examples are scored.

    Args:
        tell: told how many, and of how many.
    """

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self._tell, self._batches, self._said = tell, 0, time.monotonic()
        self._loader: Any = None

    def batch(self, loader: Any) -> None:
        """Count one more batch of an evaluation.

        Args:
            loader: makes the batches; another one for each evaluation.
        """
        if loader is not self._loader:
            self._loader, self._batches, self._said = loader, 0, time.monotonic()
        self._batches += 1
        if loader is not None and time.monotonic() - self._said >= _EVERY:
            self._said = time.monotonic()
            self._tell(len(loader.dataset) * self._batches // len(loader), len(loader.dataset))


class Ending(TrainerCallback):
    """Ends training after a step before the last one.

    Args:
        step: the step.
    """

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End training once the step has been taken."""
        control.should_training_stop |= state.global_step >= self._step


class Recorder(TrainerCallback):
    """Writes curves and decisions as they come, and asks for a checkpoint every so often.

    Args:
        record: the folder to write into.
        adapted: the handle whose decisions are written.
        log_every: steps between two logged losses. A checkpoint falls on one of these, since a loss summed up halfway
            would be lost with the process.
    """

    def __init__(self, record: Record, adapted: Adapted, log_every: int) -> None:
        self._record, self._adapted, self._log_every = record, adapted, log_every
        self._metrics = Lines(record.folder / "metrics.jsonl")
        self._history = Lines(record.folder / "history.jsonl")
        self._saved = self._logged = time.monotonic()
        self._decisions, self._step = 0, 0
        self._asked: float | None = None
        self._scoring = Scoring(lambda done, of: self._metrics.write({"step": self._now, "scored": done, "of": of}))
        self._now = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """Write down how far scoring is, so that whoever waits for the cell can tell."""
        if state.is_world_process_zero:
            self._now = state.global_step
            self._scoring.batch(eval_dataloader)

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._history.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the decisions and the step of the checkpoint that the run goes on from."""
        # Before the first step a decision may have been taken that is still to be written.
        self._decisions, self._step = len(self._adapted.history) if state.global_step else 0, state.global_step
        self._saved = self._logged = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write one line for a loss or for scores."""
        if not logs or not state.is_world_process_zero:
            return
        line: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            now = time.monotonic()
            seconds = (now - self._logged) / max(1, state.global_step - self._step)
            self._logged, self._step = now, state.global_step
            line |= {"loss": logs["loss"], "lr": logs.get("learning_rate"), "seconds": seconds}
            line |= {"penalty": logs["penalty"]} if "penalty" in logs else {}  # beside the loss, and not in it
        scores = {
            key.removeprefix("eval_"): value
            for key, value in logs.items()
            if key.startswith("eval_") and key.removeprefix("eval_") not in _NO_SCORES
        }
        if scores:
            line["scores"] = scores
        if len(line) > 1:
            self._metrics.write(line)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write new decisions, and ask for a checkpoint if one is due."""
        if state.is_world_process_zero:
            for decision in self._adapted.history[self._decisions :]:
                self._history.write(attrs.asdict(decision))
        self._decisions = len(self._adapted.history)
        if state.global_step >= state.max_steps or control.should_training_stop:
            return  # a run that went on from a checkpoint of its last step would take one more
        asked = self._record.stop is not None and self._record.stop()
        if asked and self._asked is None:
            self._asked = time.monotonic()
        if state.global_step % self._log_every:
            # The last checkpoint stands: a good place for a new one may be minutes away.
            control.should_training_stop |= self._asked is not None and time.monotonic() - self._asked > _PATIENCE
            return
        if asked:
            control.should_save = control.should_training_stop = True
            return
        due = time.monotonic() - self._saved >= self._record.checkpoint_seconds
        if args.world_size > 1:
            # All processes save or none: each keeps its own random state.
            flag = torch.tensor([float(due)], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            due = bool(flag.item())
        control.should_save = control.should_save or due

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """List the new checkpoint's files, which makes it whole, and drop the one that it replaces."""
        self._saved = time.monotonic()
        if args.world_size > 1:
            torch.distributed.barrier()  # every process has written its random state
        if state.is_world_process_zero:
            new = self._record.checkpoints / f"checkpoint-{state.global_step}"
            write_json(new / LIST, check_sums(new))
            for folder in self._record.checkpoints.glob("checkpoint-*"):
                if folder != new:
                    shutil.rmtree(folder, ignore_errors=True)
