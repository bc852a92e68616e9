"""The Trainer of a run: what it writes down on the way, and checkpoints without a copy of the frozen base."""

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from transformers import Trainer, TrainerCallback

from lrkit.accounting import flops
from lrkit.adapt.adapted import Adapted
from lrkit.study.run import check_sums
from lrkit.study.store import LIST, Lines, write_json

if TYPE_CHECKING:
    from lrkit.study.run import Progress, Record

_POINTS = 8
_PATIENCE = 5.0
"""Seconds from being asked to stop to stopping without a checkpoint of that step."""


class RunTrainer(Trainer):
    """A Trainer for an adapted model.

    The model's weights are in no checkpoint: what trains is in `AdaptCallback`'s file, and the rest never changes.

    Args:
        adapted: the handle on the model.
        sample: a batch of one row, on which FLOPs are counted.
        **settings: as Trainer takes them.
    """

    def __init__(self, *, adapted: Adapted, sample: dict[str, Any], **settings: Any) -> None:
        super().__init__(**settings)
        self._adapted, self._sample = adapted, sample
        last = self.args.max_steps - 1
        self._counted: tuple[int, float] | None = None
        self._points = {round(i * last / (_POINTS - 1)) for i in range(_POINTS)}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only the folder: see the class."""
        os.makedirs(output_dir or self.args.output_dir or ".", exist_ok=True)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint whose files are on the disk before it is said to be whole."""
        super()._save_checkpoint(*args, **kwargs)
        for path in Path(self.args.output_dir or ".", f"checkpoint-{self.state.global_step}").iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `AdaptCallback` loads."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step; at some of them the FLOPs of a row are counted first."""
        if self.state.global_step in self._points:
            self._points.remove(self.state.global_step)
            self._count()
        return super().training_step(*args, **kwargs)

    def _count(self) -> None:
        trains = self._adapted.summary().now
        if self._counted is None or self._counted[0] != trains:
            self._counted = trains, self._flops()
        self.log({"flops_of_a_row": self._counted[1]})

    def _flops(self) -> float:
        model = self._adapted.model
        sample = {key: value.to(self.args.device) for key, value in self._sample.items()}
        was = model.training
        model.eval()  # the penalty is a batch's, not a row's
        with torch.random.fork_rng(), self.compute_loss_context_manager():
            counted = flops(model, sample)
        model.train(was)
        return float(counted.total)


class Watch(TrainerCallback):
    """Times steps, and tells of their losses.

    Args:
        progress: told of each logged loss.
    """

    def __init__(self, progress: "Progress | None") -> None:
        self.seconds: list[float] = []
        self._progress, self._begin = progress, 0.0

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


class Recorder(TrainerCallback):
    """Writes curves and decisions as they come, and asks for a checkpoint every so often.

    Args:
        record: where to.
        adapted: whose decisions.
        log_every: steps between two logged losses. A checkpoint falls on one of these, since a loss summed up halfway
            would be lost with the process.
    """

    def __init__(self, record: "Record", adapted: Adapted, log_every: int) -> None:
        self._record, self._adapted, self._log_every = record, adapted, log_every
        self._metrics = Lines(record.folder / "metrics.jsonl")
        self._history = Lines(record.folder / "history.jsonl")
        self._saved = self._logged = time.monotonic()
        self._decisions, self._step = 0, 0
        self._asked: float | None = None

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._history.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Know what was there before."""
        self._decisions, self._step = len(self._adapted.history), state.global_step
        self._saved = self._logged = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One line for a loss or for scores."""
        if not logs or not state.is_world_process_zero:
            return
        line: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            now = time.monotonic()
            seconds = (now - self._logged) / max(1, state.global_step - self._step)
            self._logged, self._step = now, state.global_step
            line |= {"loss": logs["loss"], "lr": logs.get("learning_rate"), "seconds": seconds}
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
        """New decisions; and perhaps a checkpoint."""
        if state.is_world_process_zero:
            for decision in self._adapted.history[self._decisions :]:
                self._history.write(attrs.asdict(decision))
        self._decisions = len(self._adapted.history)
        if state.global_step >= state.max_steps:
            return
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
        """List the new checkpoint's files, which makes it whole, and drop what it replaces."""
        self._saved = time.monotonic()
        if args.world_size > 1:
            torch.distributed.barrier()  # every process has written its random state
        if state.is_world_process_zero:
            new = self._record.checkpoints / f"checkpoint-{state.global_step}"
            write_json(new / LIST, check_sums(new))
            for folder in self._record.checkpoints.glob("checkpoint-*"):
                if folder != new:
                    shutil.rmtree(folder, ignore_errors=True)


_NO_SCORES = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
