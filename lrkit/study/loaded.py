"""The model and the tokenized rows of a run, kept for the next run in the same process.

The result of a run does not depend on what is kept here: a model is set back to its own weights before each run.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError
from lrkit.study.loading import Loading
from lrkit.study.run_settings import RunSettings, steps_of, total_steps

if TYPE_CHECKING:
    from lrkit.study.pretrained import Pretrained
    from lrkit.tasks import Head, Task

AS_EVER = Loading()
"""A model in float32, without code of its own."""


@attrs.frozen(eq=False)
class Tokens:
    """The rows of a run as examples.

    Args:
        task: with the rows that the run takes.
        tokenizer: the model's.
        train: training examples.
        validation: validation examples.
        sample: the training example of median length, as a batch of one.
        lengths: tokens of each training example; empty if they are encoded when they are asked for.
    """

    task: "Task"
    tokenizer: Any
    train: Any
    validation: Any
    sample: dict[str, Any]
    lengths: Sequence[int] = ()

    def score(self, outputs: Any) -> dict[str, float]:
        """Score what `lrkit.tasks.Task.predict` returned of the validation examples."""
        return self.task.score(self.answers(outputs), self.task.references())

    def answers(self, outputs: Any) -> Any:
        """Say what the model answers to each validation row: `lrkit.tasks.Task.answers`."""
        return self.task.answers(outputs, self.validation, self.tokenizer)


def model_for(model: str, task: "Task", loading: Loading = AS_EVER) -> "Pretrained":
    """Load a model with a head for a task, or take the one that is kept.

    Raises:
        LrkitError: the model cannot be had.
    """
    return _pretrained(model, _stamp(model), task.head, loading)


def steps_for(task: "Task", model: str, settings: RunSettings, loading: Loading = AS_EVER) -> int:
    """Count the optimizer steps of a run: an epoch passes over the examples, which the tokenizer decides on.

    Raises:
        LrkitError: as `tokens_for`.
    """
    if task.by_row or settings.steps is not None:
        return steps_of(settings, len(task.train))
    return total_steps(settings, len(tokens_for(task, model, settings, loading=loading).train))


def tokens_for(
    task: "Task", model: str, settings: RunSettings, steps: int | None = None, *, loading: Loading = AS_EVER
) -> Tokens:
    """Tokenize the rows of a run of so many steps (None: at least an epoch), or take those that are kept.

    Raises:
        LrkitError: the tokenizer does not know the text, or a row is longer than the model's positions.
    """
    rows = (settings.train_rows, settings.validation_rows)
    used = min(len(task.train), settings.train_rows or len(task.train))
    asked = used if steps is None or not task.by_row else steps * settings.batch_size
    # The seed matters only to a choice of rows, and only a run shorter than an epoch leaves rows out.
    # To order rows by their lengths all of them must be known.
    seed, wanted = settings.seed if any(rows) else 0, asked if asked < used and not settings.group_by_length else None
    tokens = _tokens(task, model, _stamp(model), settings.max_length, rows, seed, wanted, loading)
    _check_length(model_for(model, task, loading), tokens, settings)
    return tokens


def forget() -> None:
    """Let go of the model and the rows that are kept."""
    _pretrained.cache_clear()
    _tokens.cache_clear()


def _stamp(model: str) -> tuple[Any, ...]:
    """Tell a model folder from one whose files have changed since."""
    if not Path(model).is_dir():
        return ()
    stats = [(path.name, path.stat()) for path in sorted(Path(model).iterdir()) if path.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


@lru_cache(maxsize=1)
def _pretrained(model: str, stamp: tuple[Any, ...], head: "Head", loading: Loading) -> "Pretrained":
    from lrkit.study.pretrained import load_pretrained

    return load_pretrained(model, head, loading)


@lru_cache(maxsize=4)
def _tokens(
    task: "Task",
    model: str,
    stamp: tuple[Any, ...],
    max_length: int,
    rows: tuple[int | None, int | None],
    seed: int,
    wanted: int | None,
    loading: Loading,
) -> Tokens:
    from lrkit.study.rows import encoded

    chosen, pretrained = task.subset(*rows, seed=seed), model_for(model, task, loading)
    enough = len(chosen.train) if wanted is None else wanted
    return Tokens(chosen, pretrained.tokenizer, *encoded(chosen, pretrained, max_length, enough))


def _check_length(pretrained: "Pretrained", tokens: Tokens, settings: RunSettings) -> None:
    limit = min(
        getattr(pretrained.model.config, "max_position_embeddings", None) or math.inf,
        pretrained.tokenizer.model_max_length,
    )
    if settings.max_length > limit:
        longest = max(len(row) for rows in (tokens.train, tokens.validation) for row in rows["input_ids"])
        if longest > limit:
            raise LrkitError(
                f"a row of {longest} tokens is longer than the model's {limit} positions: lower run.max_length"
            )
    written = tokens.task.writes
    if not written or settings.max_length + written <= limit:
        return
    scored = max(map(len, tokens.validation["input_ids"]))
    if scored + written > limit:
        raise LrkitError(
            f"a prompt of {scored} tokens and task.max_new_tokens = {written} are more than the model's {limit} positions: "
            "lower run.max_length or task.max_new_tokens"
        )
