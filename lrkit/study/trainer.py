"""The Trainer of a run: FLOPs and tokens counted on the way, and checkpoints without a copy of the frozen base."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from lrkit.adapt.adapted import Adapted
from lrkit.loop import beginning
from lrkit.settings import in_steps
from lrkit.study import flops as counts
from lrkit.study.batches import ByLength, tokens_in
from lrkit.study.divergence import unless_diverged
from lrkit.study.loaded import Tokens
from lrkit.study.run_settings import RunSettings
from lrkit.tasks.objective import Objective

_POINTS = 8
_HELD = 8
"""Batches whose predictions may wait on the device before they move to memory."""


class RunTrainer(Trainer):
    """A Trainer for an adapted model.

    A checkpoint does not hold the model's weights: the part that trains is in `AdaptCallback`'s file, and the rest never
    changes.

    Args:
        adapted: the handle on the model.
        rows: those of the run, whose task says what is predicted; FLOPs are counted on its sample.
        objective: the task's loss; None for the model's own.
        order: the order of the training rows; None for a random one.
        **settings: as Trainer takes them.
    """

    def __init__(
        self,
        *,
        adapted: Adapted,
        rows: Tokens,
        objective: Objective | None = None,
        order: ByLength | None = None,
        **settings: Any,
    ) -> None:
        alone: Any = settings["args"]
        alone._n_gpu = min(1, alone.n_gpu)  # noqa: SLF001 (several would be fed by DataParallel, a batch each)
        super().__init__(**settings)
        self._adapted, self._rows, self._objective, self._order = adapted, rows, objective, order
        self._sample = rows.sample if objective is None else objective.inputs(rows.sample)
        last = self.args.max_steps - 1
        self._counted: tuple[tuple[int, ...], float] | None = None
        self._calibration = 0.0
        self._points = {round(i * last / (_POINTS - 1)) for i in range(_POINTS)}
        self._tokens: torch.Tensor | int = 0
        self._tokens_here = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self._order is None else self._order

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Make the folder, and write nothing into it: see the class."""
        os.makedirs(output_dir or self.args.output_dir or ".", exist_ok=True)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint, and see its files onto the disk before it is said to be whole."""
        self.tokens()
        super()._save_checkpoint(*args, **kwargs)
        for path in Path(self.args.output_dir or ".", f"checkpoint-{self.state.global_step}").iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: `AdaptCallback` loads."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Make batches of the examples that are scored while the model trains."""
        with self._collating():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Make batches of the examples that are scored at the end."""
        with self._collating():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _collating(self) -> Iterator[None]:
        """Make batches as evaluation needs them, for a while."""
        scored = self._rows.task.collator(self._rows.tokenizer, training=False)
        training, self.data_collator = self.data_collator, scored
        try:
            yield
        finally:
            self.data_collator = training

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the objective's loss, or the model's own; with its outputs if asked for."""
        if self._objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self._objective.loss(model, inputs)
        return (loss, {"loss": loss, **outputs}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Compute a batch's loss and the task's predictions."""
        if self._objective is not None or prediction_loss_only:
            step: tuple[Any, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return step
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, predictions = self._rows.task.predict(model, inputs)
        several = predictions if isinstance(predictions, tuple) else (predictions,)
        kept = tuple(each.detach() for each in several)
        # The Trainer scores nothing without labels; the task has its own references.
        nothing = torch.zeros(len(kept[0]), dtype=torch.int64, device=kept[0].device)
        return None if loss is None else loss.detach().mean(), kept if len(kept) > 1 else kept[0], nothing

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take one step, and count its tokens; at some of them, first log the FLOPs of a row."""
        inputs = kwargs.get("inputs", args[1] if len(args) > 1 else {})
        self._tokens = self._tokens + tokens_in(inputs, self._adapted.model)
        if self.state.global_step in self._points:
            self._points.remove(self.state.global_step)
            self._log_flops()
        return super().training_step(*args, **kwargs)

    def tokens(self) -> tuple[int, int]:
        """Count the tokens of the training batches so far: of the whole run, and of what this process took part in."""
        waiting: Any = torch.as_tensor(self._tokens, device=self.args.device)
        new = int(self.accelerator.reduce(waiting, "sum"))  # over devices
        self._tokens, self._tokens_here = 0, self._tokens_here + new
        self.state.num_input_tokens_seen += new  # a checkpoint holds it
        return self.state.num_input_tokens_seen, self._tokens_here

    def samples(self, tokens: Tokens, max_length: int, count: int) -> list[dict[str, str | None]]:
        """Ask the trained model about a few validation rows; and, if it has words without training, the base.

        Returns:
            ``{"input", "reference", "base", "output"}`` each; the base's is None if its head is new.
        """
        model = self._adapted.model
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(), self.compute_loss_context_manager():
            found = self._rows.task.samples(model, tokens.tokenizer, max_length, count)
            base: Sequence[Any] = ()
            if found and self._rows.task.head.num_labels is None:
                with self._adapted.disabled():
                    base = self._rows.task.samples(model, tokens.tokenizer, max_length, count)
        return [
            {"input": each.input, "reference": each.reference, "base": before and before.output, "output": each.output}
            for each, before in zip_longest(found, base)
        ]

    def count_calibration(self) -> int:
        """Count the FLOPs of a calibration that is to come, per row of a batch; they are logged with the first step's.

        Returns:
            How many batches it asks for; 0 if none is to come.
        """
        if asked := beginning.batches(self._adapted.controller):
            rows: Any = self.train_dataset
            there = math.ceil(len(rows) / (self.args.train_batch_size * self.args.world_size))
            self._calibration = min(asked, there) * self._flops(counts.of_calibration)
        return asked

    def _log_flops(self) -> None:
        # Of as many parameters in other layers the backward pass may be another.
        trains = self._adapted.summary().now, *(p.requires_grad for p in self._adapted.parameters())
        if self._counted is None or self._counted[0] != trains:
            self._counted = trains, self._flops(counts.of_step)
        before, self._calibration = self._calibration, 0.0
        self.log({"flops_of_a_row": self._counted[1], **({"flops_of_calibration": before} if before else {})})

    def _flops(self, count: Callable[[Adapted, Mapping[str, torch.Tensor]], int]) -> float:
        model = self._adapted.model
        sample = {key: value.to(self.args.device) for key, value in self._sample.items()}
        was = model.training
        model.eval()  # the penalty is a batch's, not a row's
        with torch.random.fork_rng(), self.compute_loss_context_manager():
            counted = count(self._adapted, sample)
        model.train(was)
        return float(counted)


def trainer_for(
    adapted: Adapted,
    tokens: Tokens,
    objective: Objective | None,
    settings: RunSettings,
    steps: int,
    rates: tuple[float, float],
    *,
    log_every: int,
    folder: Path,
    report_to: Sequence[str],
    callbacks: Sequence[TrainerCallback],
) -> RunTrainer:
    """Make the Trainer of a run.

    Args:
        adapted: the handle on the model.
        tokens: the rows.
        objective: the task's loss; None for the model's own.
        settings: how the run trains.
        steps: optimizer steps.
        rates: learning rates of the adapters and of the head.
        log_every: steps between two logged losses.
        folder: the folder of the checkpoints.
        report_to: trackers.
        callbacks: in the order in which they are called.
    """
    groups = [
        {"params": adapted.adapter_parameters(), "lr": rates[0]},
        {"params": adapted.head_parameters(), "lr": rates[1]},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=rates[0], weight_decay=settings.weight_decay)
    schedule = transformers.get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
        optimizer, in_steps(settings.lr_warmup, steps), steps
    )
    trainer = RunTrainer(
        adapted=adapted,
        rows=tokens,
        objective=objective,
        order=ByLength(tokens.lengths, settings.batch_size, settings.seed) if settings.group_by_length else None,
        model=adapted.model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size // settings.devices,
            per_device_eval_batch_size=settings.eval_batch_size,
            eval_accumulation_steps=_HELD,
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
            report_to=list(report_to),
            disable_tqdm=True,
            label_names=["labels"],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=tokens.train,
        eval_dataset=tokens.validation,
        data_collator=tokens.task.collator(tokens.tokenizer, training=True),
        compute_metrics=lambda found: unless_diverged(tokens.score(found.predictions), adapted.parameters()),
        optimizers=(optimizer, schedule),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
