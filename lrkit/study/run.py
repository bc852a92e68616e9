"""One run: a method, a task, a model and a seed in; scores, parameter counts, history and times out.

The training loop is transformers' Trainer with `lrkit.trainer.AdaptCallback`, so that a run from the command line is
what a user's own Trainer script would do.
"""

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError
from lrkit.settings import Time, count_or_share, in_steps, real, whole

if TYPE_CHECKING:
    from lrkit.adapted import Adapted
    from lrkit.controller import Decision
    from lrkit.method import Method
    from lrkit.summary import Summary
    from lrkit.tasks import Task

Progress = Callable[[int, int, float | None], None]
"""Called after each step with (step, total steps, loss of the step or None)."""


def _optional(validator: Any) -> Any:
    return attrs.validators.optional(validator)


@attrs.frozen(kw_only=True)
class RunSettings:
    """How a run trains. On the command line ``--set run.steps=200``.

    Args:
        steps: optimizer steps; None to go by `epochs`.
        epochs: passes over the training rows, where `steps` is None.
        batch_size: rows a step.
        eval_batch_size: rows a batch in evaluation.
        lr: peak learning rate of the adapters; None for the parameterization's own (`learning_rate`).
        head_lr: that of the task head; None for 1e-3.
        lr_warmup: learning-rate warm-up, in steps or as a share; after it the rate falls linearly to zero.
        weight_decay: of AdamW.
        grad_clip: largest gradient norm; 0 for no clipping.
        max_length: tokens a row is cut at.
        train_rows: only so many training rows, chosen by the seed; None for all.
        validation_rows: likewise.
        seed: of everything random.
        threads: CPU threads; None for torch's own choice.
    """

    steps: int | None = attrs.field(default=None, validator=_optional(whole(1)))
    epochs: float = attrs.field(default=1.0, validator=real(0.0, above=True))
    batch_size: int = attrs.field(default=32, validator=whole(1))
    eval_batch_size: int = attrs.field(default=64, validator=whole(1))
    lr: float | None = attrs.field(default=None, validator=_optional(real(0.0, above=True)))
    head_lr: float | None = attrs.field(default=None, validator=_optional(real(0.0, above=True)))
    lr_warmup: Time = attrs.field(default=0.06, validator=count_or_share())
    weight_decay: float = attrs.field(default=0.0, validator=real(0.0))
    grad_clip: float = attrs.field(default=1.0, validator=real(0.0))
    max_length: int = attrs.field(default=128, validator=whole(4))
    train_rows: int | None = attrs.field(default=None, validator=_optional(whole(1)))
    validation_rows: int | None = attrs.field(default=None, validator=_optional(whole(1)))
    seed: int = attrs.field(default=0, validator=whole(0))
    threads: int | None = attrs.field(default=None, validator=_optional(whole(1, 1024)))

    def __attrs_post_init__(self) -> None:
        """Refuse learning rates that are no float32."""
        for name in ("lr", "head_lr"):
            if (getattr(self, name) or 0.0) > 1e30:
                raise LrkitError(
                    f"RunSettings.{name} must be a number that float32 can hold, not {getattr(self, name)!r}"
                )


@attrs.frozen(kw_only=True)
class Result:
    """What came of a run.

    Args:
        task: the task's name.
        model: what was asked for as the model.
        method: plain data.
        settings: plain data.
        scores: on the validation rows, the primary score first.
        majority: the primary score of the best constant guess.
        steps: optimizer steps taken.
        step_seconds: median time of a step.
        train_seconds: time of all steps.
        losses: training loss of each step, penalty included.
        summary: per layer rank, frozen state and parameters.
        history: every decision.
    """

    task: str
    model: str
    method: dict[str, Any]
    settings: dict[str, Any]
    scores: dict[str, float]
    majority: float
    steps: int
    step_seconds: float
    train_seconds: float
    losses: tuple[float, ...] = attrs.field(repr=False)
    summary: "Summary" = attrs.field(repr=False)
    history: "tuple[Decision, ...]" = attrs.field(repr=False)

    @property
    def score(self) -> float:
        """The primary score."""
        return next(iter(self.scores.values()))

    def to_plain(self) -> dict[str, Any]:
        """Everything as plain data."""
        plain = {f.name: getattr(self, f.name) for f in attrs.fields(Result) if f.name not in ("summary", "history")}
        plain["losses"] = list(self.losses)
        return {
            **plain,
            "summary": self.summary.to_plain(),
            "history": [attrs.asdict(decision) for decision in self.history],
        }


def total_steps(settings: RunSettings, rows: int) -> int:
    """Optimizer steps of a run over so many training rows."""
    if settings.steps is not None:
        return settings.steps
    return max(1, round(settings.epochs * -(-rows // settings.batch_size)))


def train(
    method: "Method",
    task: "Task",
    *,
    model: str = "minilm",
    targets: str | Sequence[str] = "all-linear",
    settings: RunSettings | None = None,
    progress: Progress | None = None,
    done: "Callable[[Adapted], None] | None" = None,
) -> Result:
    """Fine-tune a pretrained model with a method on a task, and score it.

    Args:
        method: the method.
        task: the task.
        model: ``"minilm"``, a folder or a hub id.
        targets: which layers, as `lrkit.attach` takes it.
        settings: how to train.
        progress: told of every step.
        done: called with the trained handle before it is let go of (to save it, say).

    Raises:
        LrkitError: the model cannot be had, or the method does not fit it or the length of the run.
    """
    import torch
    import transformers
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

    from lrkit.adapted import attach
    from lrkit.method import to_plain
    from lrkit.models import load_model
    from lrkit.trainer import AdaptCallback

    settings = settings or RunSettings()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    task = task.subset(settings.train_rows, settings.validation_rows, seed=settings.seed)
    steps = total_steps(settings, len(task.train))
    for policy in method.policies:
        policy.scheduler.bounds(steps)
    set_seed(settings.seed)
    net, tokenizer = load_model(model, task)
    # The head's start, the adapters' start and dropout must not depend on what the loading drew.
    set_seed(settings.seed)
    adapted = attach(net, method, targets=targets)
    lr = method.parameterization.learning_rate if settings.lr is None else settings.lr
    head_lr = 1e-3 if settings.head_lr is None else settings.head_lr
    groups = [
        {"params": adapted.adapter_parameters(), "lr": lr},
        {"params": adapted.head_parameters(), "lr": head_lr},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, weight_decay=settings.weight_decay)
    schedule = transformers.get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
        optimizer, in_steps(settings.lr_warmup, steps), steps
    )
    train_rows, validation_rows = task.tokenize(tokenizer, settings.max_length)
    positions = getattr(net.config, "max_position_embeddings", None) or math.inf
    longest = max(len(row) for rows in (train_rows, validation_rows) for row in rows["input_ids"])
    if longest > min(positions, tokenizer.model_max_length):
        raise LrkitError(
            f"a row of {longest} tokens is longer than the model's {min(positions, tokenizer.model_max_length)} positions: "
            "lower run.max_length"
        )
    watch = _watch(progress)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer = Trainer(
            model=net,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=settings.eval_batch_size,
                max_grad_norm=settings.grad_clip,
                seed=settings.seed,
                save_strategy="no",
                eval_strategy="no",
                logging_strategy="steps",
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            optimizers=(optimizer, schedule),
            callbacks=[AdaptCallback(adapted), watch],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        try:
            trainer.train()
            predictions = trainer.predict(validation_rows).predictions
        except BaseException:
            adapted.unbind()
            raise
    if done is not None:
        done(adapted)
    return Result(
        task=task.name,
        model=model,
        method=to_plain(method),
        settings=attrs.asdict(settings),
        scores=task.score(predictions, validation_rows["labels"]),
        majority=task.majority,
        steps=adapted.step,
        step_seconds=statistics.median(watch.seconds),
        train_seconds=sum(watch.seconds),
        losses=tuple(watch.losses),
        summary=adapted.summary(),
        history=tuple(adapted.history),
    )


def _watch(progress: Progress | None) -> Any:
    """A Trainer callback that times steps and keeps losses. Made here, so that importing this costs no transformers."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self._begin = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds.append(time.perf_counter() - self._begin)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))
                if progress is not None:
                    progress(state.global_step, state.max_steps, self.losses[-1])

    return Watch()


def settings_from(changes: dict[str, Any]) -> RunSettings:
    """`RunSettings` from plain data.

    Raises:
        LrkitError: an unknown setting (with the nearest right one), or a wrong type or range.
    """
    from lrkit.method import check_settings

    try:
        return RunSettings(**check_settings(RunSettings, changes, "run"))
    except LrkitError as error:
        raise LrkitError(str(error).replace("RunSettings.", "run.")) from None
