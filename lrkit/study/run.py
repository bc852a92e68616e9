"""Train one method on one task with one seed: `train`. Everything else that runs in lrkit.study calls it.

The training loop is transformers' Trainer with `lrkit.trainer.AdaptCallback`, so that a run from the command line does
the same as a user's own Trainer script.
"""

import contextlib
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitWarning
from lrkit.loop.history import Decision
from lrkit.study.checkpoints import Record
from lrkit.study.divergence import unless_diverged
from lrkit.study.files import CellResult, Parameters, RunFlops
from lrkit.study.loaded import AS_EVER, Tokens, forget, model_for, steps_for, tokens_for
from lrkit.study.loading import Loading
from lrkit.study.precision import slow_bf16
from lrkit.study.run_settings import Progress, RunSettings, rates, settings_from, steps_of, total_steps

if TYPE_CHECKING:
    from lrkit.adapt.adapted import Adapted
    from lrkit.adapt.summary import Summary
    from lrkit.method import Method
    from lrkit.tasks import Objective, Task


@attrs.frozen(kw_only=True)
class Result(CellResult):
    """Everything that a run comes to: the numbers that a cell keeps, and what only this process has.

    Args:
        scores: on the validation rows, the primary score first.
        majority: the primary score of the best trivial answers to the rows that were scored; None if there are none.
        steps: optimizer steps taken.
        parameters: trainable parameters, as in `summary`.
        layers: the adapted layers, as in `summary`.
        flops: work of the model in training.
        task: the task's name.
        model: the model that was asked for.
        loading: how it was loaded, as plain data of what is not at its default.
        options: the task's that are not at their defaults, as plain data.
        method: plain data.
        settings: plain data.
        step_seconds: median time of a step.
        train_seconds: time of all steps.
        losses: training loss of each step, without the penalty.
        tokens_per_second: tokens of the training batches, over the time of all steps.
        samples: a few validation rows: ``{"input", "reference", "base", "output"}`` each, the base's answer None if its
            head is new; empty if the model says nothing in words.
        predictions: what the model answers to the validation rows, as `lrkit.tasks.Task.answers` has it.
        summary: per layer rank, frozen state and parameters.
        history: every decision.
    """

    task: str
    model: str
    loading: dict[str, Any]
    options: dict[str, Any]
    method: dict[str, Any]
    settings: dict[str, Any]
    majority: float | None
    step_seconds: float
    train_seconds: float
    losses: tuple[float, ...] = attrs.field(repr=False)
    flops: RunFlops
    tokens_per_second: float | None
    samples: tuple[dict[str, str | None], ...] = attrs.field(repr=False)
    predictions: Any = attrs.field(repr=False)
    summary: "Summary" = attrs.field(repr=False)
    history: tuple[Decision, ...] = attrs.field(repr=False)

    def to_plain(self) -> dict[str, Any]:
        """Return everything but the predictions as plain data."""
        names = ["task", "model", "method", "settings", "scores", "higher_is_better", "majority", "steps"]
        names += ["step_seconds", "train_seconds", "tokens", "tokens_per_second"]
        return {
            **{name: getattr(self, name) for name in names},
            "samples": list(self.samples),
            **{name: getattr(self, name) for name in ("loading", "options") if getattr(self, name)},
            "losses": list(self.losses),
            "flops": attrs.asdict(self.flops),
            "summary": self.summary.to_plain(),
            "history": [attrs.asdict(decision) for decision in self.history],
        }


def train(
    method: "Method",
    task: "Task",
    *,
    model: str = "minilm",
    loading: Loading = AS_EVER,
    targets: str | Sequence[str] = "all-linear",
    train_also: str | Sequence[str] = "auto",
    settings: RunSettings | None = None,
    progress: Progress | None = None,
    done: "Callable[[Adapted], None] | None" = None,
    record: Record | None = None,
    say: Callable[[str], None] | None = None,
    stop: int | None = None,
    samples: int = 3,
) -> Result:
    """Fine-tune a pretrained model with a method on a task, and score it.

    The model and the tokenized rows are kept for the next run in this process (`lrkit.study.loaded.forget` lets go of
    them); the result of a run does not depend on the runs before it.

    Args:
        method: the method.
        task: the task.
        model: ``"minilm"``, a folder or a hub id.
        loading: how it is loaded: dtype, quantization, revision, ...
        targets: which layers, as `lrkit.attach` takes it.
        train_also: which modules train in full, likewise.
        settings: how to train.
        progress: told of every step: (step, total steps, loss or None).
        done: called with the trained handle before the adapters are taken out again (to save them, say).
        record: write the run down as it goes, and go on with what was written there before: bit for bit the run that
            was never interrupted.
        say: told in a few words what is done before the first step.
        stop: the step after which training ends and the model is scored, with rates and schedules bound to all steps;
            None for the last one.
        samples: how many validation rows are answered to be read, by a task whose models answer in words.

    Raises:
        LrkitError: the model cannot be had, or the method does not fit it or the length of the run.
    """
    import torch

    from lrkit.adapt.adapted import attach

    settings = settings or RunSettings()
    if (slow := slow_bf16([settings.bf16])) is not None:
        warnings.warn(slow, LrkitWarning, stacklevel=2)
    tell = say or (lambda _: None)
    there = len(task.train)
    used = min(there, settings.train_rows or there)
    if task.by_row:
        steps = steps_of(settings, there)
        check_length(method, steps)
        tell(f"loading {model}")
        asked = min(used, steps * settings.batch_size)
        tell(f"tokenizing {asked:,} of {there:,} training rows, and those for validation")
    else:
        tell(f"loading {model}, and tokenizing {used:,} training rows, and those for validation")
        steps = steps_for(task, model, settings, loading)
        check_length(method, steps)
    pretrained = model_for(model, task, loading)
    tokens = tokens_for(task, model, settings, steps, loading=loading)
    net = pretrained.restart(settings.seed)
    collator = task.collator(pretrained.tokenizer, training=True)
    objective = task.objective(
        net, lambda n: collator([tokens.train[i] for i in range(min(n, len(tokens.train)))]), settings.seed
    )
    # The adapters' start and dropout must not depend on what the head's start drew.
    torch.manual_seed(settings.seed)
    adapted = attach(net, method, targets=targets, train_also=train_also, **settings.attach)
    tell(f"training {steps:,} steps")
    threads = torch.get_num_threads()
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        result = _train(
            adapted, model, loading, objective, tokens, settings, steps, progress, record, stop, tell, samples
        )
        if done is not None:
            done(adapted)
        adapted.detach()
    except BaseException:
        forget()  # a run that stopped halfway may have left anything in the model
        raise
    finally:
        torch.set_num_threads(threads)  # the caller's
    return result


def check_length(method: "Method", steps: int) -> None:
    """Raise LrkitError unless all schedules of a method fit a run of so many steps."""
    for policy in method.policies:
        policy.scheduler.over(steps, units=1, layers=1)  # refuses one that does not fit


def _train(
    adapted: "Adapted",
    model: str,
    loading: Loading,
    objective: "Objective | None",
    tokens: Tokens,
    settings: RunSettings,
    steps: int,
    progress: Progress | None,
    record: Record | None,
    stop: int | None,
    tell: Callable[[str], None],
    samples: int,
) -> Result:
    from lrkit.study.flops import run_flops
    from lrkit.study.recorder import Ending, Recorder, Watch
    from lrkit.study.trainer import trainer_for
    from lrkit.trainer import AdaptCallback

    in_force = rates(adapted.method.parameterization, settings.lr, settings.head_lr)
    log_every = max(1, steps // 500)
    watch = Watch(progress, tell)
    recorder = None if record is None else Recorder(record, adapted, log_every)
    trackers = () if record is None else record.report_to
    closed = contextlib.nullcontext() if recorder is None else contextlib.closing(recorder)
    with tempfile.TemporaryDirectory() as empty, warnings.catch_warnings(), closed:
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer = trainer_for(
            adapted,
            tokens,
            objective,
            settings,
            steps,
            in_force,
            log_every=log_every,
            folder=Path(empty) if record is None else record.checkpoints,
            report_to=trackers,
            callbacks=[
                AdaptCallback(adapted, log=bool(trackers)),
                watch,
                *([] if stop is None else [Ending(stop)]),  # before the recorder, which has nothing to keep at the end
                *([] if recorder is None else [recorder]),
            ],
        )
        latest = None if record is None else record.latest()
        if latest is None:
            if asked := trainer.count_calibration():
                tell(f"calibrating by {asked} batches")
        else:
            tell(f"going on from {latest.name.replace('checkpoint-', 'step ')}")
        try:
            trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
            if trainer.state.global_step < min(steps, stop or steps):
                raise KeyboardInterrupt  # the record was asked to stop
            tell(f"scoring {len(tokens.task.validation):,} validation rows")
            predictions = tokens.answers(trainer.predict(tokens.validation).predictions)
            said = trainer.samples(tokens, settings.max_length, samples) if samples else []
        except BaseException:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it ended early is known, and no fault of the method's
                adapted.unbind()
            raise
        # Under mixed precision the model's forward was wrapped; the next run starts from the plain one.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    log = trainer.state.log_history
    task, (total, here), seconds = tokens.task, trainer.tokens(), sum(watch.seconds)
    return _result(
        adapted,
        task=task.name,
        model=model,
        loading=loading.to_plain(),
        settings=attrs.asdict(settings) | dict(zip(("lr", "head_lr"), in_force, strict=True)),
        scores=unless_diverged(task.score(predictions, task.references()), adapted.parameters())
        | ({} if objective is None else objective.judge(adapted.summary().layers)),
        truth=() if objective is None else objective.truth,
        options=task.set_options(),
        higher_is_better=task.higher_is_better,
        majority=task.majority,
        tokens=total,
        tokens_per_second=here / seconds if seconds else None,
        samples=tuple(said),
        step_seconds=statistics.median(watch.seconds or [0.0]),
        train_seconds=seconds,
        losses=tuple(float(line["loss"]) for line in log if "loss" in line),
        flops=run_flops(log, settings),
        predictions=predictions,
    )


def _result(adapted: "Adapted", **found: Any) -> Result:
    """Put together a result: what was found, and what the handle knows."""
    from lrkit.compose import to_plain

    summary = adapted.summary()
    plain = summary.to_plain()
    numbers = {field.name: plain[field.name] for field in attrs.fields(Parameters)}
    return Result(
        method=to_plain(adapted.method),
        steps=adapted.step,
        summary=summary,
        parameters=Parameters(**numbers),
        layers=summary.layers,
        history=tuple(adapted.history),
        **found,
    )


__all__ = ["Loading", "Record", "Result", "RunFlops", "RunSettings", "rates", "settings_from", "total_steps", "train"]
