"""The settings of a run: steps, rates, batches and seed. No torch here."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from lrkit.errors import LrkitError, shown
from lrkit.settings import Time, check_settings, count_or_share, flag, real, whole

Progress = Callable[[int, int, float | None], None]
"""Called after each step of a run with (step, total steps, loss of the step or None)."""


def _optional(validator: Any) -> Any:
    return attrs.validators.optional(validator)


def _names(value: Any) -> str | tuple[str, ...]:
    names = value if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise LrkitError(f"RunSettings.exclude must be a regular expression or a list of names, not {shown(value)}")
    return names


ATTACH = ("exclude", "slices")
"""The settings that are arguments of `lrkit.attach`. A cell holds those alone that differ from their defaults."""


@attrs.frozen(kw_only=True)
class RunSettings:
    """The settings of a run. On the command line ``--set run.steps=200``.

    Args:
        steps: optimizer steps; None to go by `epochs`.
        epochs: passes over the training rows, if `steps` is None.
        batch_size: rows per step.
        eval_batch_size: rows per batch in evaluation.
        lr: peak learning rate of the adapters; None for the parameterization's own (`learning_rate`).
        head_lr: that of the task head; None for 1e-3.
        lr_warmup: learning-rate warm-up, in steps or as a share; after it the rate falls linearly to zero.
        weight_decay: of AdamW.
        grad_clip: largest gradient norm; 0 for no clipping.
        max_length: tokens per row; a longer row is cut.
        train_rows: train on so many rows, chosen by the seed; None for all.
        validation_rows: likewise.
        eval_every: steps, or share of the run, between two scores of the validation rows while training; None to score
            them at the end alone.
        bf16: compute in bfloat16 by autocast.
        group_by_length: make batches of rows of like length, which pad less; batches come in random order.
        devices: processes that share each batch (data parallel); only a study's cells can have more than one.
        seed: of everything random.
        threads: CPU threads; None for torch's own choice.
        exclude: layers to leave out of those that targets mean, as `lrkit.attach` takes it. On the command line names joined
            by commas, or a regular expression.
        slices: adapt the parts of fused projections (q, k and v of a ``qkv_proj``) in their places, as `lrkit.attach` does.
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
    group_by_length: bool = attrs.field(default=False, validator=flag())
    devices: int = attrs.field(default=1, validator=whole(1, 64))
    seed: int = attrs.field(default=0, validator=whole(0, 2**32 - 1))
    threads: int | None = attrs.field(default=None, validator=_optional(whole(1, 1024)))
    exclude: str | tuple[str, ...] = attrs.field(default=(), converter=_names)
    slices: bool = attrs.field(default=False, validator=flag())

    @property
    def attach(self) -> dict[str, Any]:
        """Return those that are arguments of `lrkit.attach`."""
        return {name: getattr(self, name) for name in ATTACH}

    def __attrs_post_init__(self) -> None:
        """Refuse learning rates that float32 cannot hold, and batches that devices cannot share."""
        for name in ("lr", "head_lr"):
            if (getattr(self, name) or 0.0) > 1e30:
                raise LrkitError(
                    f"RunSettings.{name} must be a number that float32 can hold, not {shown(getattr(self, name))}"
                )
        if self.batch_size % self.devices:
            raise LrkitError(f"RunSettings.batch_size {self.batch_size} must be a multiple of devices {self.devices}")


def settings_from(changes: dict[str, Any]) -> RunSettings:
    """Make `RunSettings` from plain data.

    Raises:
        LrkitError: an unknown setting (with the nearest right one), or a wrong type or range.
    """
    try:
        return RunSettings(**check_settings(RunSettings, changes, "run"))
    except LrkitError as error:
        raise LrkitError(str(error).replace("RunSettings.", "run.")) from None


def attach_settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `lrkit.attach` among a run's settings, which are plain data. Raises as `settings_from`."""
    return settings_from({name: run[name] for name in ATTACH if name in run}).attach


HEAD_LR = 1e-3
"""The task head's learning rate if none is given."""


def rates(parameterization: Any, lr: float | None, head_lr: float | None) -> tuple[float, float]:
    """Return the learning rates in force: those given, or else the parameterization's own and `HEAD_LR`.

    Args:
        parameterization: the one that trains.
        lr: that of the adapters, if given.
        head_lr: that of the head, if given.
    """
    return parameterization.learning_rate if lr is None else lr, HEAD_LR if head_lr is None else head_lr


def total_steps(settings: RunSettings, rows: int) -> int:
    """Count the optimizer steps of a run over so many training rows."""
    if settings.steps is not None:
        return settings.steps
    return max(1, round(settings.epochs * -(-rows // settings.batch_size)))


def steps_of(settings: RunSettings, rows: int) -> int:
    """Count the optimizer steps of a run on a task of so many training rows, of which it may take a part."""
    return total_steps(settings, min(rows, settings.train_rows or rows))
