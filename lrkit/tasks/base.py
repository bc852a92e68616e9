"""A `Task`: rows split in two, what a model is given of them, and how its answers are scored.

A kind of task is a subclass: texts with labels, questions about a text, texts that become texts, and so on. A run asks its
task these questions, in this order; the classes here have the answers of most kinds:

1. `head`, `dropout`: which model.
2. `texts`, `encode`, `collator`: what becomes of rows, as examples and as batches.
3. `check_model`, `objective`: whether the model can learn that, and the loss, if it is not the model's own.
4. `predict`, `answers`: what is kept of a batch in evaluation, and what the whole of that says of each row.
5. `references`, `score`, `majority`, `higher_is_better`: how good that is.
6. `samples`: what the model says to a few rows, to be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError, shown
from lrkit.settings import annotation_of, as_annotated, as_plain, refuse_others
from lrkit.tasks.head import Head
from lrkit.tasks.hub import new_fingerprint
from lrkit.tasks.learnt import Learnt

if TYPE_CHECKING:
    import datasets

_FEWEST, _MOST = 200, 2_000
"""Rows that are set aside for selection, if a tenth is less or more."""
_SELECTION = 0x5E1EC7
"""Tells the generator of this split from that of `Task.subset`, which has the same seeds."""
_OWN = ("name", "train", "validation")


@attrs.frozen(kw_only=True, eq=False)
class Task(Learnt):
    """Rows split in two, what a model is given of them, and how its answers are scored.

    A kind of task says at least `texts`, `encode`, `answers`, `references`, `score` and `perfect`. Its further attributes
    that have defaults are its options: ``--set task.NAME=VALUE`` on the command line.

    Attributes:
        name: its name in reports: "movies", "glue/rte", a folder's name.
        train, validation: the rows.

    Raises:
        LrkitError: a split has no rows, or lacks one of `columns`.
    """

    name: str
    train: datasets.Dataset = attrs.field(repr=False)
    validation: datasets.Dataset = attrs.field(repr=False)

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Refuse to make a task of no kind."""
        if cls is Task:
            raise LrkitError(
                "lrkit.tasks.Task is what all kinds of tasks have in common: texts with labels are a "
                "lrkit.tasks.Classification"
            )
        return object.__new__(cls)

    def __attrs_post_init__(self) -> None:
        where = f'task "{self.name}"'
        self.check(where)
        if not isinstance(self.head, Head):
            raise LrkitError(f"{where}: head must be a lrkit.tasks.Head(num_labels=...), not {shown(self.head)}")
        for split, rows in (("train", self.train), ("validation", self.validation)):
            absent = [column for column in self.columns if column not in rows.column_names]
            if absent:
                raise LrkitError(f'{where}: {split} has no column "{absent[0]}", only {", ".join(rows.column_names)}')
            if not len(rows):
                raise LrkitError(f"{where}: {split} has no rows")

    # ---- what a kind of task says ------------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the columns that both splits must have."""
        return ()

    def check(self, where: str) -> None:
        """Check that the task's attributes fit together.

        Args:
            where: how an error begins: ``task "mine"``.

        Raises:
            LrkitError: they do not.
        """

    def texts(self, rows: datasets.Dataset) -> list[str]:
        """List the texts of some rows that the model is given: a run checks that its tokenizer knows them."""
        raise NotImplementedError

    def encode(
        self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> dict[str, Any]:
        """Encode some rows as examples: model inputs by column, not padded.

        Args:
            batch: rows, column by column.
            tokenizer: a transformers tokenizer.
            max_length: tokens of an example, special tokens included.
            training: for a step, or for a score. For example, a generated answer is no part of what is scored.

        Returns:
            Columns of examples. Those that the model's ``forward`` does not take are for `answers` alone, and are in no
            batch. There may be more or fewer examples than rows, if `by_row` is False.

        Raises:
            LrkitError: the tokenizer cannot encode them.
        """
        raise NotImplementedError

    def answers(self, outputs: Any, examples: datasets.Dataset, tokenizer: Any) -> Any:
        """Say what the model answers to each validation row.

        Args:
            outputs: what `predict` returned of all batches, one below the other: an array [examples, ...], or a tuple of
                arrays. Rows of unlike lengths are filled up with -100.
            examples: the validation rows as `encode` made them, in the order of the outputs.
            tokenizer: the one that encoded them.

        Returns:
            One answer per validation row, in their order, as an array or a list that `score` takes. A run keeps an array
            in ``predictions.npz``, and a list, for example of texts, in ``predictions.jsonl``.
        """
        return outputs

    def references(self) -> Any:
        """Return the right answers to the validation rows, in their order and in the form that `score` takes."""
        raise NotImplementedError

    def score(self, predictions: Any, references: Any) -> dict[str, float]:
        """Score answers; the first key is the primary score.

        Args:
            predictions: as `answers` returns them, at least one.
            references: as many, as `references` returns them.

        Returns:
            Scores by name, nan if an output is not finite, since a run that diverged has no score.
        """
        raise NotImplementedError

    def perfect(self) -> Any:
        """Return answers to the validation rows that score best: in most tasks the references."""
        return self.references()

    @property
    def majority(self) -> float | None:
        """Compute the primary score of the best trivial answers to the validation rows, the floor of any method.

        For example, the largest class's share for accuracy. None if there are none that could be computed.
        """
        return None

    # ---- what all tasks have -----------------------------------------------------------------------------------------

    @property
    def primary(self) -> str:
        """Return the name of the primary score."""
        return next(iter(self.score(self.perfect(), self.references())))

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Name the attributes that a user may set: those with a default that `__init__` takes."""
        fields = [field for field in attrs.fields(cls) if field.init and field.default is not attrs.NOTHING]
        return tuple(field.name for field in fields if field.name not in _OWN)

    def set_options(self) -> dict[str, Any]:
        """Return the options that are not at their defaults, as plain data."""
        defaults = {field.name: field.default for field in attrs.fields(type(self))}
        found = {name: getattr(self, name) for name in self.options() if name in defaults}
        plain: dict[str, Any] = as_plain({name: value for name, value in found.items() if value != defaults[name]})
        return plain

    def with_options(self, given: Mapping[str, Any]) -> Task:
        """Return the task with other options, which are plain data.

        Raises:
            LrkitError: there is no such option (with the nearest one), or it cannot have that value.
        """
        if not given:
            return self
        refuse_others(given, self.options(), f'task "{self.name}"')
        hints = {key: annotation_of(type(self), key) for key in given}
        return attrs.evolve(self, **{key: as_annotated(each, hints[key], f"task.{key}") for key, each in given.items()})

    def examples(self, tokenizer: Any, max_length: int, *, training: bool) -> datasets.Dataset:
        """Encode all rows of a split as examples: the training rows, or the validation rows.

        Raises:
            LrkitError: the tokenizer cannot encode them, or no example is left.
        """
        from lrkit.tasks.hub import quiet_datasets

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return self.encode(batch, tokenizer, max_length, training=training)

        rows = self.train if training else self.validation
        with quiet_datasets():
            done = rows.map(
                encode,
                batched=True,
                remove_columns=rows.column_names,
                keep_in_memory=True,  # nothing is written into the hub's cache
                load_from_cache_file=False,
                new_fingerprint=new_fingerprint(),  # the default pickles the tokenizer, to name a cache file
            )
        if not len(done):
            split = "train" if training else "validation"
            raise LrkitError(
                f'task "{self.name}": no example is left of {len(rows):,} {split} rows in {max_length} tokens'
            )
        return done

    def tokenize(self, tokenizer: Any, max_length: int) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Encode both splits: `examples` for training, and for a score."""
        train = self.examples(tokenizer, max_length, training=True)
        return train, self.examples(tokenizer, max_length, training=False)

    def selection(self, seed: int = 0) -> Task:
        """Set a part of the training rows aside, and score on them instead of on the validation rows.

        For choosing settings: what is chosen must never have seen the validation rows. A tenth of the rows is set aside, but
        200 at least and 2,000 at most, and never more than half.

        Args:
            seed: of the split.

        Returns:
            The task with the other rows for training, and those set aside in place of the validation rows.

        Raises:
            LrkitError: there is a single row.
        """
        rows = len(self.train)
        aside = min(max(round(rows / 10), _FEWEST), _MOST, rows // 2)
        if not aside:
            raise LrkitError(f'task "{self.name}": of {rows} training row none can be set aside to select settings by')
        import numpy as np

        order = np.random.default_rng([_SELECTION, seed]).permutation(rows)
        parts = [
            self.train.select(sorted(which.tolist()), keep_in_memory=True, new_fingerprint=new_fingerprint())
            for which in (order[aside:], order[:aside])
        ]
        return attrs.evolve(self, train=parts[0], validation=parts[1])

    def subset(self, train: int | None = None, validation: int | None = None, seed: int = 0) -> Task:
        """Keep the first so many rows of each split after a shuffle with `seed`; None keeps all.

        Asking for more rows than there are gives all of them. A larger subset contains a smaller one of the
        same seed.

        Raises:
            LrkitError: for a size below 1.
        """
        rows = first_rows(self.train, "train", train, seed)
        return attrs.evolve(self, train=rows, validation=first_rows(self.validation, "validation", validation, seed))


def first_rows(rows: datasets.Dataset, split: str, n: int | None, seed: int) -> datasets.Dataset:
    """Keep the first so many rows of a split after a shuffle; None keeps all. Raises LrkitError for a size below 1."""
    if n is None:
        return rows
    if n < 1:
        raise LrkitError(f"a subset of {split} needs 1 row or more, not {n}")
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(rows))[:n]
    # with a fingerprint for a table in memory, as in `Task.examples`
    return rows.select(order.tolist(), keep_in_memory=True, new_fingerprint=new_fingerprint())
