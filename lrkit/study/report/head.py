"""The page's head: what was asked for, how far it is, and which cells are missing."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs

from lrkit.study.report.view import WORDS, View
from lrkit.study.results import CellRecord, Status, StudyRecord
from lrkit.study.scores import scale_of
from lrkit.study.setting_texts import setting


@attrs.frozen(kw_only=True)
class Head:
    """The texts of the head.

    Args:
        title: the study's.
        note: the study's.
        facts: name and text of each.
        counts: status, words and number of cells, of those that there are.
        told: the same as one sentence.
        missing: row and text for each that is not done.
        missing_title: above these.
        old: how many cells are of other code, as a sentence; empty if none is.
        old_rows: row and text for these.
    """

    title: str
    note: str
    facts: list[tuple[str, str]]
    counts: list[tuple[Status, str, int]]
    told: str
    missing: list[tuple[int, str]]
    missing_title: str
    old: str
    old_rows: list[tuple[int, str]]

    @classmethod
    def of(cls, view: View) -> "Head":
        """Collect it."""
        record = view.record
        counts = [(status, WORDS[status], n) for status, n in record.counts.items() if n]
        told = [f"{record.counts['done']} of {len(record.cells)} cells done"]
        told += [f"{n} {words}" for status, words, n in counts if status != "done"]
        unfinished = record.counts["running"] + record.counts["missing"]
        old = [cell for cell in record.cells if cell.old and cell.status == "done" and not cell.packed]
        many = "1 cell is" if len(old) == 1 else f"{len(old)} cells are"
        return cls(
            title=record.title,
            note=record.note.strip(),
            facts=[(name, text) for name, text in _facts(record) if text],
            counts=counts,
            told=f"{', '.join(told)}.",
            missing=list(_missing(view)),
            missing_title="What is missing" if unfinished else "What failed",
            old=f"{many} of other code: the sources of lrkit or of a plug-in have changed since. The same command "
            "computes them again."
            if old
            else "",
            old_rows=list(_old(view, old)),
        )


def _facts(record: StudyRecord) -> Iterator[tuple[str, str]]:
    loading = ", ".join(f"{name} {setting(value)}" for name, value in record.loading.items())
    yield "Model", f"{record.model} ({loading})" if loading else record.model
    targets = record.targets
    yield "Adapted layers", targets if isinstance(targets, str) else setting(targets) if targets else ""
    tasks = []
    for task in record.tasks:
        # That of the rows that were scored, once there are such.
        found = [c.result.majority for c in record.cells if c.task == task.name and c.result]
        scored = [value for value in found if value is not None]
        majority = statistics.fmean(scored) if scored else task.majority
        guess = "" if majority is None else f"best trivial answers {_guess(task.metric, majority)}"
        lower = "" if task.higher_is_better else "lower is better"
        options = (f"{name} {setting(value)}" for name, value in task.options.items())
        inside = ", ".join(filter(None, (task.metric, lower, *options, guess)))
        tasks.append(f"{task.name} ({inside})" if inside else task.name)
    yield ("Tasks" if len(tasks) > 1 else "Task"), "; ".join(tasks)
    yield "Seeds", f"{', '.join(map(str, record.seeds))} ({len(record.seeds)})"
    steps = sorted({cell.result.steps for cell in record.cells if cell.result})
    planned = record.run.get("steps")
    yield "Steps", ", ".join(f"{n:,}" for n in steps) or (f"{planned:,}" if isinstance(planned, int) else "")
    others = [f"{key} {setting(value)}" for key, value in record.run.items() if value is not None and key != "steps"]
    yield "Settings", ", ".join(others)
    yield "Versions", ", ".join(_tally((c.config.get("versions") or {}) for c in record.cells))
    keys = ("device", "threads", "host", "python")
    yield "Machine", ", ".join(_tally({k: c.env[k] for k in keys if c.env.get(k) is not None} for c in record.cells))
    packs = Counter((c.packed, c.code or "unknown") for c in (*record.cells, *record.trials) if c.packed)
    taken = [f"{n} {'cell' if n == 1 else 'cells'} from {name}, of code {code}" for (name, code), n in packs.items()]
    yield "Taken in", "; ".join(taken) + (" (a digest of the files that decide a result)" if taken else "")
    times = [attempt.time for cell in record.cells for attempt in cell.attempts if attempt.time]
    yield "Last activity", max(times, default="")[:19].replace("T", " ")


def _guess(metric: str, majority: float) -> str:
    scale = scale_of([metric] if metric else [], [majority])
    return f"{majority:.3g}" if not scale.unit else f"{scale.of(majority):.3g} %"


def _tally(tables: Iterable[Any]) -> Iterator[str]:
    """Write each name with its value, and if it differs between cells with how many have which."""
    found: dict[str, Counter[str]] = {}
    for table in tables:
        for name, value in table.items() if isinstance(table, dict) else ():
            found.setdefault(str(name), Counter())[str(value)] += 1
    for name, counts in found.items():
        if len(counts) == 1:
            yield f"{name} {next(iter(counts))}"
        else:
            each = ", ".join(f"{value} ({n} cells)" for value, n in counts.most_common(4))
            yield f"{name} {each}" + (f" and {len(counts) - 4} more" if len(counts) > 4 else "")


def _missing(view: View) -> Iterator[tuple[int, str]]:
    for row in view.rows:
        for task in view.record.tasks:
            undone = [cell for cell in view.cells(row, task.name) if cell.status != "done"]
            if undone:
                on = f" on {task.name}" if view.several else ""
                yield row, f"{on}: {'; '.join(_seeds(undone))}"


def _seeds(cells: Sequence[CellRecord]) -> Iterator[str]:
    """Write the seeds of cells that are not done, by status."""
    for status in ("running", "failed", "missing"):
        chosen = [cell for cell in cells if cell.status == status]
        if chosen:
            seeds = ", ".join(f"{c.seed} (at step {c.steps})" if status == "running" else str(c.seed) for c in chosen)
            yield f"{'seed' if len(chosen) == 1 else 'seeds'} {seeds} {WORDS[status]}"


def _old(view: View, old: Sequence[CellRecord]) -> Iterator[tuple[int, str]]:
    for row in view.rows:
        mine = [cell for cell in old if cell.row == row]
        if mine:
            named = ", ".join(f"{cell.task} {cell.seed}" if view.several else str(cell.seed) for cell in mine)
            yield row, f": {'seed' if len(mine) == 1 else 'seeds'} {named}"
