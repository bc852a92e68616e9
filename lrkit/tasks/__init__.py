"""Data in: the tasks that a run can learn, by name or from a folder.

A task name is `name` or `name/rest`. A loader is a callable `(rest: str | None) -> Task`, and `TASKS` maps names to the
built-in ones. Other packages offer theirs through the hook `lrkit_tasks`, in the same form. For example:

    >>> task = load_task("glue/rte")        # or load_task("movies"), load_task(data="my/folder")
    >>> train, validation = task.tokenize(tokenizer, max_length=128)
    >>> task.score(logits, labels)
    {'accuracy': 0.53}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from lrkit.errors import LrkitError, nearest
from lrkit.hookspecs import hookimpl
from lrkit.tasks.base import Task
from lrkit.tasks.classification import Classification
from lrkit.tasks.completion import Completion
from lrkit.tasks.folder import load_folder
from lrkit.tasks.glue import GLUE, load_glue
from lrkit.tasks.gsm8k import load_gsm8k
from lrkit.tasks.head import Head
from lrkit.tasks.language_modelling import LanguageModelling
from lrkit.tasks.learnt import Sample
from lrkit.tasks.movies import load_movies
from lrkit.tasks.objective import Objective
from lrkit.tasks.question_answering import QuestionAnswering
from lrkit.tasks.scoring import METRICS
from lrkit.tasks.squad import load_squad, load_squad_v2
from lrkit.tasks.summaries import load_cnn_dailymail, load_xsum
from lrkit.tasks.teacher import load_teacher
from lrkit.tasks.text_to_text import TextToText
from lrkit.tasks.token_classification import TokenClassification
from lrkit.tasks.verbalized import Verbalized

TaskLoader = Callable[[str | None], Task]

DEFAULT = "movies"


def _movies(rest: str | None) -> Task:
    """Load movie-review sentences with mean human ratings. Source: the distribution vaderSentiment 3.3.2."""
    if rest is not None:
        raise LrkitError(f'task "movies" has no parts: write "movies", not "movies/{rest}"')
    return load_movies()


def _glue(rest: str | None) -> Task:
    """Load one of GLUE's tasks, from the hub. Source: arXiv 1804.07461."""
    if not rest:
        raise LrkitError(f'task "glue" needs a name, such as "glue/rte"; there are: {", ".join(GLUE)}')
    return load_glue(rest)


TASKS: Mapping[str, TaskLoader] = {
    "movies": _movies,
    "glue": _glue,
    "teacher": load_teacher,
    "squad": load_squad,
    "squad_v2": load_squad_v2,
    "xsum": load_xsum,
    "cnn_dailymail": load_cnn_dailymail,
    "gsm8k": load_gsm8k,
}


@hookimpl
def lrkit_tasks() -> Mapping[str, TaskLoader]:
    """Offer the built-in tasks."""
    return TASKS


def load_task(
    spec: str | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    metric: str | None = None,
    tasks: Mapping[str, TaskLoader] | None = None,
) -> Task:
    """Load the task that `--task` names, or the one in the folder that `--data` names, or `movies`.

    Args:
        spec: `name` or `name/rest`.
        data: a folder for `load_folder`.
        metric: the metric that scores a folder's task, a name in `METRICS`; only with `data`.
        tasks: loaders by name, those of plug-ins too; None: the built-in ones.

    Raises:
        LrkitError: for an unknown name, for both `spec` and `data`, or as the task's loader says.
    """
    if data is not None:
        if spec is not None:
            raise LrkitError(f'give a task ("{spec}") or a data folder ("{os.fspath(data)}"), not both')
        return load_folder(data, metric)
    if metric is not None:
        raise LrkitError("a metric is chosen only for a data folder: a named task has its own")
    loaders = TASKS if tasks is None else tasks
    name, slash, rest = (DEFAULT if spec is None else spec).partition("/")
    if name not in loaders:
        hint = f' (did you mean "glue/{name}"?)' if "glue" in loaders and name in GLUE else nearest(name, loaders)
        raise LrkitError(f'unknown task "{spec}"{hint}; there are: {", ".join(sorted(loaders))}; or --data FOLDER')
    return loaders[name](rest if slash else None)


__all__ = [
    "DEFAULT",
    "GLUE",
    "METRICS",
    "TASKS",
    "Classification",
    "Completion",
    "Head",
    "LanguageModelling",
    "Objective",
    "QuestionAnswering",
    "Sample",
    "Task",
    "TaskLoader",
    "TextToText",
    "TokenClassification",
    "Verbalized",
    "load_folder",
    "load_task",
]
