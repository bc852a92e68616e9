"""The task `teacher`: learn a model that differs from the base by a known low-rank ΔW in a few of its layers.

It is a positive control. The layers that the rank belongs in are known, so that an allocation can be held against them:
if a method does not find them here, its "no difference" elsewhere says little.

The teacher is the pretrained model with W + ΔW in place of W in some layers. ΔW = s U V with U [rows of W, rank] and
V [rank, columns of W] drawn from a standard normal distribution, and s such that ||ΔW|| = norm · ||W|| (Frobenius). The
student is the pretrained model with adapters and without a head. It learns the teacher's last hidden states on the
sentences of the task `movies`, whose labels play no part.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError, cut, listing, nearest
from lrkit.tasks.classification import Classification
from lrkit.tasks.lesson import Lesson, digest
from lrkit.tasks.movies import load_movies

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import nn

NAME = "teacher"
CALIBRATION_ROWS = 32
"""Training rows from which the scale of the loss is taken: see `Lesson`."""


@attrs.frozen(kw_only=True, eq=False)
class Teacher(Classification):
    """Sentences on which a student learns a teacher's hidden states. The rows' labels are 0 and are not read.

    Attributes:
        layers: the layers that get a ΔW, as `layer_named` takes them; empty to draw them by the run's seed.
        drawn: how many are drawn.
        rank: of each ΔW.
        size: Frobenius norm of each ΔW over that of its weight.
    """

    kind: Any = attrs.field(default="regression", init=False)
    metric: str = attrs.field(default="explained", init=False)
    layers: tuple[str, ...] = ()
    drawn: int = 2
    rank: int = 4
    size: float = 0.7

    def _check_answers(self, where: str) -> None:
        """Accept the rows' labels as they are: nothing is read from them."""

    @property
    def auto_class(self) -> str:
        """Name transformers' class of a model without a head."""
        return "AutoModel"

    @property
    def dropout(self) -> bool:
        """Switch the model's own dropout off: the teacher has none, and noise would hide what is to be learnt."""
        return False

    def perfect(self) -> Any:
        """Return the errors of a student that equals its teacher [rows of validation, 2]."""
        import numpy as np

        return np.tile([0.0, 1.0], (len(self.validation), 1))

    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Score a student by the share of the base's error that is gone: 0 for the untouched base, 1 for a perfect copy.

        ``explained`` = 1 - Σ error of the student / Σ error of the base, over rows; below 0 if the student is worse than
        the base.

        Args:
            predictions: [n, 2]: each row's error, that of the student and that of the base (see `Lesson.loss`).
            labels: [n], which are not read.

        Returns:
            The score; nan if an error is not finite.

        Raises:
            LrkitError: if the shapes do not fit, or are empty.
        """
        import numpy as np

        errors = np.asarray(predictions, dtype=np.float64)
        if errors.ndim != 2 or errors.shape != (len(np.asarray(labels)), 2) or not len(errors):
            raise LrkitError(
                f'task "{self.name}": predictions of shape {errors.shape} are not two errors for each of '
                f"{len(np.asarray(labels))} rows"
            )
        student, base = errors.sum(axis=0)
        return {"explained": float(1 - student / base) if np.isfinite(errors).all() and base > 0 else math.nan}

    @property
    def majority(self) -> float | None:
        """Return the score of the untouched base, 0."""
        return 0.0

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Name no option: all of them are parts of the task's name."""
        return ()

    def truth(self, model: nn.Module, seed: int) -> tuple[str, ...]:
        """Name the layers that get a ΔW in a run with a seed, in the model's order.

        They are drawn, each set of layers as likely as any other, from those that ``targets="all-linear"`` means. The draw
        touches no generator of torch's or numpy's, and depends on the seed and the number of layers alone.

        Args:
            model: the plain model; it needs no weights.
            seed: the run's.

        Raises:
            LrkitError: a layer that was asked for is not in the model, or more are to be drawn than there are.
        """
        return tuple(name for _, name in self._places(model, seed))

    def _places(self, model: nn.Module, seed: int) -> list[tuple[int, str]]:
        """List the number among all linear layers, and the name, of each layer that gets a ΔW."""
        names = _linear_names(model)
        if self.layers:
            chosen = {layer_named(layer, names) for layer in self.layers}
            if len(chosen) < len(self.layers):
                raise LrkitError(f'task "{self.name}" names one layer twice: {", ".join(self.layers)}')
        else:
            if self.drawn > len(names):
                raise LrkitError(
                    f'task "{self.name}": {self.drawn} layers cannot be drawn from the {len(names)} of '
                    f"{type(model).__name__}"
                )
            order = sorted(range(len(names)), key=lambda place: digest("layer", seed, place))
            chosen = {names[place] for place in order[: self.drawn]}
        return [(place, name) for place, name in enumerate(names) if name in chosen]

    def objective(self, model: nn.Module, batch: Callable[[int], Mapping[str, Any]], seed: int) -> Lesson:
        """Make a run's teacher out of its model, and measure the base's error on a few training rows.

        Raises:
            LrkitError: the model has a decoder of its own beside its encoder, or no layer as asked for, or a layer is
                smaller than the rank.
        """
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise LrkitError(
                f'task "{self.name}" is for encoders and decoders; {type(model).__name__} is an encoder with a decoder'
            )
        places = self._places(model, seed)
        deltas = {name: (seed, place, self.rank, self.size) for place, name in places}
        return Lesson(model, deltas, batch(CALIBRATION_ROWS))


def layer_named(asked: str, names: Sequence[str]) -> str:
    """Find a layer by the end of its name, or by its block's number and the end of its name.

    For example: ``4.output.dense`` is ``encoder.layer.4.output.dense``, and ``1.value`` is
    ``encoder.layer.1.attention.self.value``.

    Raises:
        LrkitError: there is none, or there are several.
    """
    found = [name for name in names if name == asked or name.endswith(f".{asked}")]
    if not found:
        block, _, rest = asked.partition(".")
        found = [n for n in names if block.isdigit() and block in n.split(".") and rest and n.endswith(f".{rest}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise LrkitError(f'task "{NAME}": layer "{cut(asked, 80)}" may be {listing(found)}: write more of its name')
    ends = {re.sub(r"^.*?(?=\d+\.)", "", name) for name in names}
    raise LrkitError(
        f'task "{NAME}": no linear layer of the blocks is called "{cut(asked, 80)}"{nearest(asked, ends)}; '
        f'names are such as "{names[0]}"'
    )


def load_teacher(rest: str | None) -> Teacher:
    """Load the task `teacher`, from the parts after its name, each separated by a slash.

    - ``1.value+4.output.dense``: the layers, as `layer_named` takes them; without them they are drawn by the run's seed.
    - ``layers=3``: how many are drawn, 2 if not said.
    - ``rank=2``: the rank of each ΔW, 4 if not said.
    - ``norm=0.5``: its norm over the weight's, 0.7 if not said.

    Source: none; the sentences are those of the distribution vaderSentiment 3.3.2.

    For example ``teacher``, ``teacher/rank=2`` or ``teacher/1.value+4.output.dense/rank=2/norm=0.5``.

    Raises:
        LrkitError: another part, one twice, or a number out of range; or the sentences cannot be had.
    """
    parts = [] if rest is None else rest.split("/")
    said: dict[str, Any] = {}
    for part in parts:
        key, value = _part(part)
        if key in said:
            raise LrkitError(f'task "{NAME}/{cut(rest or "", 120)}" says {key} twice')
        said[key] = value
    if "drawn" in said and "layers" in said:
        raise LrkitError(f'task "{NAME}" names its layers or has them drawn (layers=2), not both')
    movies = load_movies()
    return Teacher(
        name=NAME if rest is None else f"{NAME}/{rest}",
        train=_without_labels(movies.train),
        validation=_without_labels(movies.validation),
        fields=movies.fields,
        **said,
    )


_OPTIONS: Mapping[str, tuple[str, type]] = {"layers": ("drawn", int), "rank": ("rank", int), "norm": ("size", float)}


def _part(part: str) -> tuple[str, Any]:
    """Read one part of the task's name as a field of `Teacher` and its value."""
    key, equals, text = part.partition("=")
    if not equals:
        layers = tuple(part.split("+"))
        if not all(re.fullmatch(r"\w+(\.\w+)+", layer) for layer in layers) or len({*layers}) < len(layers):
            raise LrkitError(
                f'task "{NAME}" has no part "{cut(part, 80)}": write layers, each once, such as "1.value+4.output.dense", '
                "or layers=2, rank=4 or norm=0.7"
            )
        return "layers", layers
    if key not in _OPTIONS:
        raise LrkitError(
            f'task "{NAME}" has no setting "{cut(key, 80)}"{nearest(key, _OPTIONS)}; there are: {", ".join(_OPTIONS)}'
        )
    field, kind = _OPTIONS[key]
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    low, high = (1, 4096) if kind is int else (1e-6, 1e3)
    if not low <= value <= high:
        raise LrkitError(
            f'task "{NAME}": {key} must be a {"whole number" if kind is int else "number"} from {low:g} to {high:g}, '
            f'not "{cut(text, 80)}"'
        )
    return field, value


def _without_labels(rows: Any) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"sentence": list(rows["sentence"]), "label": [0.0] * len(rows)})


def _linear_names(model: nn.Module) -> list[str]:
    """Name the layers that ``targets="all-linear"`` means, in the model's order."""
    from lrkit.adapt.targets import find_targets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attach says what is left out
        return [target.name for target in find_targets(model, "all-linear")]
