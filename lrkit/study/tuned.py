"""Read what a tuned study tried and chose: `trials_of` and `chosen_of`. No torch here."""

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from lrkit.study.results import StudyRecord


@attrs.frozen(kw_only=True)
class TrialRecord:
    """One trial of a row on a task: some settings, on all tuning seeds.

    Args:
        number: which one, counted from 0.
        settings: path to value; a setting that is not known yet is left out.
        scores: seed to the primary score on the rows set aside, of the furthest rung; NaN if the run diverged.
        mean: over the tuning seeds; None until all are done, NaN if one diverged.
        stopped: the step after which halving stopped it; None if it went to the end.
    """

    number: int
    settings: dict[str, Any]
    scores: dict[int, float]
    mean: float | None
    stopped: int | None = None


@attrs.frozen(kw_only=True)
class Choice:
    """What the trials of a row on a task chose.

    Args:
        trial: the trial that was chosen.
        settings: path to value.
        default: path to the value that the row has without tuning.
        edges: paths whose chosen value is the least or the greatest that was tried.
        widen: what the same command is given to try further values, ``--tune run.lr=...``; empty if none is at an edge.
    """

    trial: int
    settings: dict[str, Any]
    default: dict[str, Any]
    edges: tuple[str, ...] = ()
    widen: str = ""


def trials_of(record: "StudyRecord", row: int, task: str) -> tuple[TrialRecord, ...]:
    """List the trials of a row on a task, by number; empty if the study is not tuned."""
    raise NotImplementedError


def chosen_of(record: "StudyRecord", row: int, task: str) -> Choice | None:
    """Return what was chosen for a row on a task; None until all of its trials are done."""
    raise NotImplementedError
