"""One run: a method, a task, a model and a seed in; scores, parameter counts, history and times out.

The training loop is transformers' Trainer with `lrkit.trainer.AdaptCallback`, so that a run from the command line is
what a user's own Trainer script would do.
"""

import contextlib
import math
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError, shown
from lrkit.reading import is_folder
from lrkit.settings import Time, check_settings, count_or_share, flag, in_steps, real, whole
from lrkit.study.store import LIST, check_sum, read_json

if TYPE_CHECKING:
    from lrkit.adapt.adapted import Adapted
    from lrkit.adapt.summary import Summary
    from lrkit.loop.history import Decision
    from lrkit.method import Method
    from lrkit.study.pretrained import Pretrained
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
        eval_every: score the validation rows so often while training, in steps or as a share; None for at the end alone.
        bf16: compute in bfloat16 by autocast.
        devices: processes that share each batch (data parallel); only a study's cells can have more than one.
        seed: of everything random.
        threads: CPU threads; None for torch's own choice.
    """

    steps: int | None = attrs.field(default=None, validator=_optional(whole(1)))
    epochs: float = attrs.field(default=1.0, validator=real(0.0, 1e6, above=True))
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
    eval_every: Time | None = attrs.field(default=None, validator=_optional(count_or_share(1)))
    bf16: bool = attrs.field(default=False, validator=flag())
    devices: int = attrs.field(default=1, validator=whole(1, 64))
    seed: int = attrs.field(default=0, validator=whole(0, 2**32 - 1))
    threads: int | None = attrs.field(default=None, validator=_optional(whole(1, 1024)))

    def __attrs_post_init__(self) -> None:
        """Refuse learning rates that are no float32."""
        for name in ("lr", "head_lr"):
            if (getattr(self, name) or 0.0) > 1e30:
                raise LrkitError(
                    f"RunSettings.{name} must be a number that float32 can hold, not {shown(getattr(self, name))}"
                )
        if self.batch_size % self.devices:
            raise LrkitError(f"RunSettings.batch_size {self.batch_size} must be a multiple of devices {self.devices}")


@attrs.frozen(kw_only=True)
class RunFlops:
    """Floating-point operations of a run's forward and backward passes; a multiply-add is two.

    Counted by torch on the training row of median length (of 1,000 rows, in a run shorter than an epoch), at eight
    steps spread over the run, so that frozen matrices and cut ranks are seen. Padding, the penalty, the optimizer and the
    decisions are not in it.

    Args:
        run: of all steps.
        first_step: of the first step, a whole batch.
        last_step: of the last one.
    """

    run: float
    first_step: float
    last_step: float


_NOT_PLAIN = ("summary", "history", "predictions")


@attrs.frozen(kw_only=True)
class Result:
    """What came of a run.

    Args:
        task: the task's name.
        model: what was asked for as the model.
        method: plain data.
        settings: plain data.
        scores: on the validation rows, the primary score first.
        majority: the primary score of the best constant guess for the rows that were scored.
        steps: optimizer steps taken.
        step_seconds: median time of a step.
        train_seconds: time of all steps.
        losses: training loss of each step, without the penalty.
        flops: work of the model in training.
        predictions: the model's raw outputs on the validation rows [rows, num_labels].
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
    flops: RunFlops
    predictions: Any = attrs.field(repr=False)
    summary: "Summary" = attrs.field(repr=False)
    history: "tuple[Decision, ...]" = attrs.field(repr=False)

    @property
    def score(self) -> float:
        """The primary score."""
        return next(iter(self.scores.values()))

    def to_plain(self) -> dict[str, Any]:
        """Everything as plain data."""
        plain = {f.name: getattr(self, f.name) for f in attrs.fields(Result) if f.name not in _NOT_PLAIN}
        plain["losses"] = list(self.losses)
        plain["flops"] = attrs.asdict(self.flops)
        return {
            **plain,
            "summary": self.summary.to_plain(),
            "history": [attrs.asdict(decision) for decision in self.history],
        }


HEAD_LR = 1e-3
"""The task head's learning rate where none is given."""


def rates(parameterization: Any, lr: float | None, head_lr: float | None) -> tuple[float, float]:
    """The learning rates in force: what is given, or the parameterization's own and `HEAD_LR`.

    Args:
        parameterization: the one that trains.
        lr: that of the adapters, if given.
        head_lr: that of the head, if given.
    """
    return parameterization.learning_rate if lr is None else lr, HEAD_LR if head_lr is None else head_lr


def total_steps(settings: RunSettings, rows: int) -> int:
    """Optimizer steps of a run over so many training rows."""
    if settings.steps is not None:
        return settings.steps
    return max(1, round(settings.epochs * -(-rows // settings.batch_size)))


@attrs.frozen(kw_only=True)
class Record:
    """Where a run writes as it goes, so that a run that is killed can go on from there.

    Args:
        folder: holds ``metrics.jsonl``, ``history.jsonl`` and ``checkpoints/``; what a run left there is gone on with.
        checkpoint_seconds: time between checkpoints.
        report_to: transformers' names of trackers that get the curves as well, such as ``"tensorboard"``.
        stop: asked after each step: whether to stop there, with a checkpoint; `train` then raises KeyboardInterrupt.
    """

    folder: Path
    checkpoint_seconds: float = 60.0
    report_to: tuple[str, ...] = ()
    stop: Callable[[], bool] | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def latest(self) -> Path | None:
        """The last checkpoint that is whole: its list of files was written last, and every file is as it says."""
        there = [
            path for path in self.checkpoints.glob("checkpoint-*") if _STEP.fullmatch(path.name) and is_folder(path)
        ]
        found = sorted(there, key=_step_of, reverse=True)
        return next((folder for folder in found if _is_whole(folder)), None)

    def step(self) -> int:
        """Optimizer steps that need not be done again."""
        latest = self.latest()
        return 0 if latest is None else _step_of(latest)


_STEP = re.compile("checkpoint-[0-9]{1,12}")


def check_sums(folder: Path) -> dict[str, int]:
    """The check sum of each file in a checkpoint."""
    files = [path for path in sorted(folder.iterdir()) if path.name != LIST and not path.name.startswith(".")]
    return {path.name: check_sum(path) for path in files}


def _is_whole(folder: Path) -> bool:
    try:
        listed = read_json(folder / LIST)
        return bool(listed) and listed == check_sums(folder)
    except (LrkitError, OSError):
        return False


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


@attrs.frozen(eq=False)
class _Tokens:
    train: Any
    validation: Any
    sample: dict[str, Any]
    """The training row of median length, as a batch of one."""


def _stamp(model: str) -> tuple[Any, ...]:
    """What tells a model folder from one whose files have changed since."""
    if not Path(model).is_dir():
        return ()
    stats = [(path.name, path.stat()) for path in sorted(Path(model).iterdir()) if path.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


@lru_cache(maxsize=1)
def _pretrained(model: str, stamp: tuple[Any, ...], labels: int, problem: str, names: tuple[str, ...]) -> "Pretrained":
    from lrkit.study.pretrained import load_pretrained

    label_names = dict(enumerate(names)) if names else None
    return load_pretrained(model, num_labels=labels, problem_type=problem, label_names=label_names)


def _model_for(model: str, task: "Task") -> "Pretrained":
    return _pretrained(model, _stamp(model), task.num_labels, task.problem_type, task.labels)


@lru_cache(maxsize=4)
def _tokens(
    task: "Task",
    model: str,
    stamp: tuple[Any, ...],
    max_length: int,
    rows: tuple[int | None, int | None],
    seed: int,
    wanted: int | None = None,
) -> _Tokens:
    from lrkit.study.rows import encoded

    chosen = task.subset(*rows, seed=seed)
    enough = len(chosen.train) if wanted is None else wanted
    return _Tokens(*encoded(chosen, _model_for(model, task), max_length, enough))


def forget() -> None:
    """Let go of the model and the rows that are kept for the next run."""
    _pretrained.cache_clear()
    _tokens.cache_clear()


def train(
    method: "Method",
    task: "Task",
    *,
    model: str = "minilm",
    targets: str | Sequence[str] = "all-linear",
    train_also: str | Sequence[str] = "auto",
    settings: RunSettings | None = None,
    progress: Progress | None = None,
    done: "Callable[[Adapted], None] | None" = None,
    record: Record | None = None,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Fine-tune a pretrained model with a method on a task, and score it.

    The model and the tokenized rows are kept for the next run in this process (`forget` lets go of them); what a run
    gives does not depend on the runs before it.

    Args:
        method: the method.
        task: the task.
        model: ``"minilm"``, a folder or a hub id.
        targets: which layers, as `lrkit.attach` takes it.
        train_also: which modules train in full, likewise.
        settings: how to train.
        progress: told of every step.
        done: called with the trained handle before the adapters are taken out again (to save them, say).
        record: write the run down as it goes, and go on with what was written there before: bit for bit the run that
            was never interrupted.
        say: told in a few words what is done before the first step.

    Raises:
        LrkitError: the model cannot be had, or the method does not fit it or the length of the run.
    """
    import torch

    from lrkit.adapt.adapted import attach

    settings = settings or RunSettings()
    rows = (settings.train_rows, settings.validation_rows)
    steps = total_steps(settings, min(len(task.train), settings.train_rows or len(task.train)))
    for policy in method.policies:
        policy.scheduler.over(steps, units=1, layers=1)  # refuses one that does not fit
    tell = say or (lambda _: None)
    tell(f"loading {model}")
    pretrained = _model_for(model, task)
    there, asked = len(task.train), steps * settings.batch_size
    used = min(there, settings.train_rows or there)
    tell(f"tokenizing {min(used, asked):,} of {there:,} training rows, and those for validation")
    # Only a choice of rows depends on the seed, and only a run shorter than an epoch leaves rows out.
    wanted = asked if asked < used else None
    tokens = _tokens(task, model, _stamp(model), settings.max_length, rows, settings.seed if any(rows) else 0, wanted)
    _check_length(pretrained, tokens, settings)
    net = pretrained.restart(settings.seed)
    # The adapters' start and dropout must not depend on what the head's start drew.
    torch.manual_seed(settings.seed)
    adapted = attach(net, method, targets=targets, train_also=train_also)
    tell(f"training {steps:,} steps")
    threads = torch.get_num_threads()
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        result = _train(adapted, task, model, pretrained, tokens, settings, steps, progress, record)
        if done is not None:
            done(adapted)
        adapted.detach()
    except BaseException:
        forget()  # what stopped may have left anything in the model
        raise
    finally:
        torch.set_num_threads(threads)  # the caller's
    return result


def _check_length(pretrained: "Pretrained", tokens: _Tokens, settings: RunSettings) -> None:
    limit = min(
        getattr(pretrained.model.config, "max_position_embeddings", None) or math.inf,
        pretrained.tokenizer.model_max_length,
    )
    if settings.max_length <= limit:
        return
    longest = max(len(row) for rows in (tokens.train, tokens.validation) for row in rows["input_ids"])
    if longest > limit:
        raise LrkitError(
            f"a row of {longest} tokens is longer than the model's {limit} positions: lower run.max_length"
        )


def _train(
    adapted: "Adapted",
    task: "Task",
    model: str,
    pretrained: "Pretrained",
    tokens: _Tokens,
    settings: RunSettings,
    steps: int,
    progress: Progress | None,
    record: Record | None,
) -> Result:
    import torch
    import transformers
    from transformers import DataCollatorWithPadding, TrainingArguments

    from lrkit.compose import to_plain
    from lrkit.study.loop import Recorder, RunTrainer, Watch
    from lrkit.trainer import AdaptCallback

    method = adapted.method
    lr, head_lr = rates(method.parameterization, settings.lr, settings.head_lr)
    groups = [
        {"params": adapted.adapter_parameters(), "lr": lr},
        {"params": adapted.head_parameters(), "lr": head_lr},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, weight_decay=settings.weight_decay)
    schedule = transformers.get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
        optimizer, in_steps(settings.lr_warmup, steps), steps
    )
    log_every = max(1, steps // 500)
    watch = Watch(progress)
    recorder = None if record is None else Recorder(record, adapted, log_every)
    closed = contextlib.nullcontext() if recorder is None else contextlib.closing(recorder)
    with tempfile.TemporaryDirectory() as empty, warnings.catch_warnings(), closed:
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer = RunTrainer(
            adapted=adapted,
            sample=tokens.sample,
            model=adapted.model,
            args=TrainingArguments(
                output_dir=empty if record is None else str(record.checkpoints),
                max_steps=steps,
                per_device_train_batch_size=settings.batch_size // settings.devices,
                per_device_eval_batch_size=settings.eval_batch_size,
                max_grad_norm=settings.grad_clip,
                bf16=settings.bf16,
                # Without this, transformers takes processes without GPUs for so many runs of one process; and refuses bf16.
                use_cpu=(settings.devices > 1 or settings.bf16) and not torch.cuda.is_available(),
                seed=settings.seed,
                save_strategy="no",
                eval_strategy="no" if settings.eval_every is None else "steps",
                eval_steps=None if settings.eval_every is None else max(1, in_steps(settings.eval_every, steps)),
                logging_strategy="steps",
                logging_steps=log_every,
                logging_nan_inf_filter=False,
                report_to=[] if record is None else list(record.report_to),
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=tokens.train,
            eval_dataset=tokens.validation,
            data_collator=DataCollatorWithPadding(pretrained.tokenizer),
            compute_metrics=lambda p: task.score(p.predictions, p.label_ids),
            optimizers=(optimizer, schedule),
            callbacks=[AdaptCallback(adapted), watch, *([] if recorder is None else [recorder])],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        latest = None if record is None else record.latest()
        try:
            trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
            if trainer.state.global_step < steps:
                raise KeyboardInterrupt  # the record was asked to stop
            predictions = trainer.predict(tokens.validation).predictions
        except BaseException:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it ended early is known, and no fault of the method's
                adapted.unbind()
            raise
        # Under mixed precision the model's forward was wrapped; the next run starts from the plain one.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    log = trainer.state.log_history
    return Result(
        task=task.name,
        model=model,
        method=to_plain(method),
        settings=attrs.asdict(settings) | {"lr": lr, "head_lr": head_lr},
        scores=task.score(predictions, tokens.validation["labels"]),
        majority=task.best_guess(tokens.validation["labels"]),
        steps=adapted.step,
        step_seconds=statistics.median(watch.seconds or [0.0]),
        train_seconds=sum(watch.seconds),
        losses=tuple(float(line["loss"]) for line in log if "loss" in line),
        flops=_flops([(line["step"], line["flops_of_a_row"]) for line in log if "flops_of_a_row" in line], settings),
        predictions=predictions,
        summary=adapted.summary(),
        history=tuple(adapted.history),
    )


def _flops(points: Sequence[tuple[float, float]], settings: RunSettings) -> RunFlops:
    """Of the whole run, from counts at some of its steps; between two of them half the steps cost as each."""
    last = points[-1][0]
    total = sum((b - a) * (at_a + at_b) / 2 for (a, at_a), (b, at_b) in pairwise(points))
    mean = total / (last - points[0][0]) if last > points[0][0] else points[0][1]
    size = settings.batch_size
    return RunFlops(run=mean * size * (last + 1), first_step=points[0][1] * size, last_step=points[-1][1] * size)


def settings_from(changes: dict[str, Any]) -> RunSettings:
    """`RunSettings` from plain data.

    Raises:
        LrkitError: an unknown setting (with the nearest right one), or a wrong type or range.
    """
    try:
        return RunSettings(**check_settings(RunSettings, changes, "run"))
    except LrkitError as error:
        raise LrkitError(str(error).replace("RunSettings.", "run.")) from None
