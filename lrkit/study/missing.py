"""Tell which cells of a study are missing in its folder."""

import functools
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from lrkit.study.cell_folder import digest_of_result, follows, is_done, is_packed
from lrkit.study.graph import jobs_of
from lrkit.study.jobs import Job
from lrkit.study.ledger import check_folder
from lrkit.study.old import with_old
from lrkit.study.plan import Plan
from lrkit.study.study_file import TaskRecord


def missing_of(jobs: Sequence[Job], cells: Path, again: AbstractSet[str]) -> dict[str, Job]:
    """Return the cells to run, by key: those that are not done, or done from others' results, and those of `again`."""
    missing: dict[str, Job] = {}
    digest = functools.cache(digest_of_result)  # many cells need the same ones
    for job in jobs:  # a cell whose source is run again may have to follow it
        done = job.key not in again and is_done(cells / job.key)
        if not done or any(source in missing for source in job.sources) or not follows(cells / job.key, digest):
            missing[job.key] = job
    return missing


def made_anew(jobs: Sequence[Job], cells: Path, recompute: bool) -> set[str]:
    """Return the keys of the cells that were taken in from a pack, if these are computed again."""
    return {job.key for job in jobs if recompute and is_packed(cells / job.key)}


def count_done(
    plan: Plan, tasks: Mapping[str, TaskRecord], folder: Path, *, keep_old: bool = False, recompute: bool = False
) -> tuple[int, int]:
    """Count a plan's cells that are done in a folder, and all of them.

    Raise LrkitError if the folder holds something else. `tasks` are those that `check` returned; the other arguments, and
    what is raised, are those of `run_missing`.
    """
    cells = folder / "cells"
    jobs = with_old(jobs_of(plan), folder, keep_old, recompute)
    check_folder(plan, jobs, tasks, folder)
    missing = missing_of(jobs, cells, made_anew(jobs, cells, recompute))
    every = {job.key for job in jobs}
    return len(every) - len(missing), len(every)
