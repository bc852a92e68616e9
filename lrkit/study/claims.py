"""Claims of a study: stated in its file before the first test cell runs, and judged by one rule. No torch here.

A claim says that one row scores better than another. Its differences d are paired by task and seed, the first row's score
minus the second's, and the other way round on a task whose lower scores are better; so they are advantages. Its margin m is
the smallest advantage that would matter. The verdict is

- *replicated* if the stratified sign-flip test of all tasks together (`lrkit.study.combined`) rejects "no task has a
  difference" at 0.05, after Holm's correction over the claims of the study, with the first row ahead;
- *not replicated* if that test rejects with the second row ahead, or if on every task an advantage of m or more is
  rejected at 0.05, one-sided (the upper end of the 90 % interval lies below m);
- *open* otherwise; as long as a cell is missing; if a run of either row diverged (those that did not are no fair sample);
  and if all differences on a task are equal (the scores are too coarse), whatever p is.

Holm's correction is over all claims of the study: one that cannot be tested, or not yet, counts with p = 1. So a corrected p
can only fall while a study runs, and no verdict is taken back: a p that is below 0.05 without it waits for the other claims.

For example, of a claim with m = 0.01 and a mean difference of 0.002 from -0.003 to 0.007 on its one task, the advantage
that was claimed is excluded: not replicated.
"""

import statistics
from collections.abc import Sequence
from typing import Literal

import attrs

from lrkit.study.claim import Claim
from lrkit.study.claim_power import in_words, seeds_to_decide, seeds_to_exclude
from lrkit.study.combined import combined_p, standardized
from lrkit.study.comparison import gains_between, mixed_pairs, over_rows, scale_on
from lrkit.study.equivalence import below_p
from lrkit.study.paired import LEVEL, all_equal, interval, smallest_p
from lrkit.study.results import StudyRecord
from lrkit.study.scores import Scale, margin_words, p_text
from lrkit.study.setting_texts import ordered, short_name, value_text
from lrkit.study.texts import markdown
from lrkit.study.tuned import chosen_of, lr_of

Verdict = Literal["replicated", "not replicated", "open"]


@attrs.frozen(kw_only=True)
class OnTask:
    """A claim's differences on one task.

    Args:
        task: the task's name.
        n: pairs.
        difference: their mean, an advantage: on a task whose lower scores are better, by how much it is lower.
        low: lower end of the 95 % interval; None with fewer than six pairs.
        high: its upper end.
        p_below: one-sided p of "the mean is the margin or more"; small if so large an advantage is excluded.
        scale: how scores of the task are written.
    """

    task: str
    n: int
    difference: float
    low: float | None
    high: float | None
    p_below: float | None
    scale: Scale

    @property
    def words(self) -> str:
        """Return difference and interval in the units of the tables: ``+0.31 [-0.12, +0.74]``."""
        number = self.scale.number
        ends = "" if self.low is None or self.high is None else f" [{number(self.low, '+')}, {number(self.high, '+')}]"
        ends = ", no width" if self.low is not None and self.low == self.high else ends
        return f"{number(self.difference, '+')}{ends}"


@attrs.frozen(kw_only=True)
class Judged:
    """A claim and its verdict so far.

    Args:
        claim: as it was stated.
        margin: the smallest advantage that would matter; None if none was stated.
        verdict: by the rule of this module.
        why: the reason in a few words.
        tasks: the differences on each task.
        p: two-sided p over all tasks; None without a pair.
        p_holm: the same, Holm-corrected over the claims; None if the claim cannot be tested, or not yet.
        missing: pairs of cells that are still to come.
        diverged: pairs of which a score is NaN; they have no difference.
    """

    claim: Claim
    margin: float | None
    verdict: Verdict
    why: str
    tasks: tuple[OnTask, ...]
    p: float | None
    p_holm: float | None
    missing: int
    diverged: int = 0

    @property
    def difference(self) -> str:
        """Return the mean difference on each task with its 95 % interval and n, in words."""
        return "; ".join(f"{text}, n {each.n}" for text, each in zip(self.differences, self.tasks, strict=True)) or "-"

    @property
    def differences(self) -> tuple[str, ...]:
        """Return the mean difference on each task with its 95 % interval, after the task's name if there are several."""
        several = len(self.tasks) > 1
        return tuple(f"{each.task} {each.words}" if several else each.words for each in self.tasks)

    @property
    def against_margin(self) -> str:
        """Return the one-sided p of "the advantage is the margin or more" on each task: ``0.001 / 0.053``."""
        return " / ".join(p_text(each.p_below) for each in self.tasks if each.p_below is not None) or "-"


def judge(record: StudyRecord) -> tuple[Judged, ...]:
    """Judge every claim of a study, in its order.

    Args:
        record: the study, finished or still running.
    """
    labels = {row.label: index for index, row in enumerate(record.rows)}
    scales = {task.name: scale_on(record, task.name) for task in record.tasks}
    pairs = [_pairs(record, labels[claim.higher], labels[claim.lower]) for claim in record.claims]
    untested = [_untested(each) for each in pairs]
    p = [combined_p([*each.differences.values()]) if each.differences else None for each in pairs]
    corrected = over_rows({i: 1.0 if untested[i] or each is None else each for i, each in enumerate(p)})
    waits = any(each.missing for each in pairs)
    found = []
    for index, (claim, each) in enumerate(zip(record.claims, pairs, strict=True)):
        margin = record.margin if claim.margin is None else claim.margin
        tasks = tuple(_on_task(task, their, margin, scales[task]) for task, their in each.differences.items())
        verdict: Verdict = "open"
        why, p_holm = untested[index], None
        if not why:
            p_holm = corrected[index]
            differences = [*each.differences.values()]
            ahead = standardized(differences) > 0
            others = waits and (p[index] or 0.0) < LEVEL
            verdict, why = _verdict(tasks, margin, ahead, p_holm, others)
            if verdict == "open" and margin is not None and not others:
                why += _disagreement(tasks, differences, margin) or seeds_to_decide(
                    differences, margin, len(pairs), margin_words(margin, [one.scale for one in tasks])
                )
        why += f"; in {_count(each.mixed)} one is of older code than the other" if each.mixed else ""
        found.append(
            Judged(
                claim=claim,
                margin=margin,
                verdict=verdict,
                why=why,
                tasks=tasks,
                p=p[index],
                p_holm=p_holm,
                missing=each.missing,
                diverged=each.diverged,
            )
        )
    return tuple(found)


@attrs.frozen
class _Pairs:
    """The differences of two rows by task, for tasks that have any; pairs still to come, diverged, or of mixed code."""

    differences: dict[str, list[float]]
    missing: int
    diverged: int
    mixed: int


def _pairs(record: StudyRecord, higher: int, lower: int) -> _Pairs:
    differences: dict[str, list[float]] = {}
    missing = diverged = mixed = 0
    for task in record.tasks:
        found, left_out = gains_between(record, higher, lower, task.name)
        seeds = {cell.seed for row in (higher, lower) for cell in record.cells_of(row, task.name)}
        missing += len(seeds) - len(found) - left_out
        diverged += left_out
        mixed += mixed_pairs(record, higher, lower, task.name)
        if found:
            differences[task.name] = found
    return _Pairs(differences, missing, diverged, mixed)


def _untested(pairs: _Pairs) -> str:
    """Return why a claim cannot be tested, or not yet; empty if it can."""
    if pairs.missing:
        return f"{_count(pairs.missing)} still to come"
    if pairs.diverged:
        return f"in {_count(pairs.diverged)} a run diverged"
    if not pairs.differences:
        return "no pair of cells"
    if equal := [task for task, each in pairs.differences.items() if all_equal(each)]:
        return f"all differences on {equal[0]} are equal: the scores are too coarse to tell"
    return ""


def _on_task(task: str, differences: Sequence[float], margin: float | None, scale: Scale) -> OnTask:
    ends = interval(differences)
    return OnTask(
        task=task,
        n=len(differences),
        difference=statistics.fmean(differences),
        low=ends[0] if ends else None,
        high=ends[1] if ends else None,
        p_below=None if margin is None else below_p(differences, margin),
        scale=scale,
    )


def _verdict(
    tasks: Sequence[OnTask], margin: float | None, ahead: bool, p_holm: float, waits: bool
) -> tuple[Verdict, str]:
    """Return a tested claim's verdict by the rule of this module, and its reason."""
    p = p_text(p_holm)
    if p_holm < LEVEL:
        return ("replicated", f"ahead, p {p}") if ahead else ("not replicated", f"behind, p {p}")
    if waits:
        return "open", "p is below 0.05 before Holm's correction, which waits for the other claims"
    if margin is None:
        return "open", f"p {p}, and no margin was stated"
    words = margin_words(margin, [each.scale for each in tasks])
    if all(each.p_below is not None and each.p_below < LEVEL for each in tasks):
        return "not replicated", f"an advantage of {words} is excluded on every task"
    if few := [each for each in tasks if smallest_p(each.n) / 2 >= LEVEL]:
        return "open", f"with {few[0].n} pairs nothing can be excluded"
    return "open", f"p {p}, and an advantage of {words} is not excluded on every task"


def _disagreement(tasks: Sequence[OnTask], differences: Sequence[Sequence[float]], margin: float) -> str:
    """Say that the first row is ahead on one task and behind on another, if one of the two is shown; empty otherwise.

    Then more seeds can do no more than exclude an advantage of the margin, and not even that if one is seen.
    """
    ahead = [each for each in tasks if each.difference > 0]
    behind = [each for each in tasks if each.difference < 0]
    shown = any(each.low is not None and each.high is not None and each.low * each.high > 0 for each in tasks)
    if not (ahead and behind and shown):
        return ""
    names = " and ".join(each.task for each in ahead), " and ".join(each.task for each in behind)
    what = f": the tasks disagree (ahead on {names[0]}, behind on {names[1]})"
    if any(each.difference >= margin for each in ahead):
        return f"{what}, which more seeds do not settle"
    if any(len(each) < 3 for each in differences):
        return what
    means = [max(each.difference, 0.0) for each in tasks]
    seeds = seeds_to_exclude([statistics.stdev(each) for each in differences], margin, means=means)
    many, words = in_words(seeds), margin_words(margin, [each.scale for each in tasks])
    return f"{what}; {many} seeds would probably (0.8) exclude an advantage of {words} if differences stay so"


def _count(pairs: int) -> str:
    return f"{pairs} pair{'s' if pairs > 1 else ''} of cells"


def to_markdown(record: StudyRecord, judged: Sequence[Judged]) -> str:
    """Return the claims as a Markdown table. Its ``p (margin)`` is that of "the margin or more" on each task, one-sided.

    Values that differ from task to task stand in the order of the tasks, ``0.01 / 0.003``.

    Args:
        record: the study.
        judged: its claims, as `judge` returns them.
    """
    head = (
        "| claim | verdict | difference [95 % interval] | n | p (Holm) | margin | p (margin) | chosen | because |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for each in judged:
        chosen = [_chosen(record, row) for row in (each.claim.higher, each.claim.lower)]
        cells = (
            f"**{markdown(each.claim.name)}**: {markdown(each.claim.says)}",
            each.verdict,
            "<br>".join(map(markdown, each.differences)) or "-",
            " / ".join(map(str, dict.fromkeys(task.n for task in each.tasks))) or "-",
            "-" if each.p_holm is None else p_text(each.p_holm),
            "-" if each.margin is None else margin_words(each.margin, [task.scale for task in each.tasks]),
            each.against_margin,
            "<br>".join(map(markdown, chosen)),
            markdown(each.why),
        )
        lines.append(f"| {' | '.join(cells)} |\n")
    return head + "".join(lines)


def _chosen(record: StudyRecord, label: str) -> str:
    """Say what was chosen for a row, task by task where it differs: ``adalora: lr 0.01 / 0.003, alpha 32``."""
    row = next(index for index, each in enumerate(record.rows) if each.label == label)
    choices = [chosen_of(record, row, task.name) for task in record.tasks]
    found = [each.settings for each in choices if each is not None]
    if not found or len(found) < len(choices):
        rates = dict.fromkeys(lr_of(record, row, task.name) or "?" for task in record.tasks)
        return f"{label}: lr {' / '.join(rates)}"
    told = [(path, dict.fromkeys(value_text(each[path]) for each in found)) for path in ordered(found[0])]
    return f"{label}: " + ", ".join(f"{short_name(path)} {' / '.join(values)}" for path, values in told)


__all__ = ["Judged", "OnTask", "Verdict", "judge", "to_markdown"]
