"""One row of a task's table: plain numbers, as CSV and JSON have them. No torch here."""

import attrs


@attrs.frozen(kw_only=True)
class TableRow:
    """One row of a task's table. None stands for a number that there is not (yet); no number here is NaN.

    Args:
        index: index into the study's rows.
        label: the row's name.
        task: the task's name.
        is_base: it is the row that the others are compared with.
        planned: cells the study asks for.
        done: cells with a result.
        running: cells begun, without a result (they run now, or were interrupted).
        failed: cells whose last attempt failed.
        missing: cells never begun.
        n: finite scores.
        diverged: results whose score is NaN. They are in no mean and no pair; `notes` says so.
        mean: mean over seeds.
        sd: standard deviation (ddof 1) over seeds.
        pairs: seeds with which row and base both have a finite score.
        difference: mean of row minus base over the pairs.
        low: lower end of its 95 % interval (`lrkit.study.paired.interval`); None with fewer than six pairs: it is
            unbounded then.
        high: upper end.
        p: two-sided sign-flip p (`lrkit.study.paired.sign_flip_p`).
        p_holm: Holm-corrected over the rows of the task's table.
        smallest_p: the smallest p that so many pairs can give.
        few_pairs: fewer than six pairs.
        parameters_average: trainable adapter parameters averaged over the run, mean over the done cells.
        parameters_final: the same at the end of the run.
        head: trainable parameters of the task head, which are in neither.
        flops: counted operations of a whole run, mean over the done cells.
        step_ratio: step time over the base's at the start of training.
        step_ratio_end: the same at the end of training.
        peak_memory: bytes.
        effect: effect size: `difference` over the standard deviation of the pairs' differences; None if they are equal.
        guess: the primary score of the best trivial answers, mean over the done cells.
        notes: sentences that belong to this row.
        lr: the adapters' learning rate; those of the tasks if they differ.
        effect_corrected: `effect` without its small-sample bias (`lrkit.study.effects.corrected`); None below three pairs.
        effect_low: lower end of the effect's 95 % interval (`lrkit.study.effects.effect_interval`).
        effect_high: upper end.
        low_90: lower end of the difference's 90 % interval, the one that an equivalence test at 0.05 inverts; None with
            fewer than five pairs.
        high_90: upper end.
        margin: differences that are smaller do not matter: as stated before the first test cell; None if none was.
        p_equivalent: p of the two one-sided tests against the margin (`lrkit.study.equivalence.equivalence_p`).
        p_equivalent_holm: Holm-corrected over the rows of the task's table.
        verdict: ``"different"``, ``"equivalent"``, ``"negligible"`` (both) or ``"open"`` (neither), as
            `lrkit.study.equivalence.verdict_of` has it; empty for the base, and without pairs.
        published: the value that others published, as it is printed; empty if none is stated.
        higher_is_better: a larger score is a better one on the task.
        tokens_per_second: tokens of training batches per second of the cells' own steps, mean over the done cells.
    """

    index: int
    label: str
    task: str
    is_base: bool
    planned: int
    done: int
    running: int
    failed: int
    missing: int
    n: int
    diverged: int
    mean: float | None
    sd: float | None
    pairs: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    smallest_p: float | None
    few_pairs: bool
    parameters_average: float | None
    parameters_final: float | None
    head: float | None
    flops: float | None
    step_ratio: float | None
    step_ratio_end: float | None
    peak_memory: float | None
    effect: float | None
    guess: float | None
    notes: tuple[str, ...]
    lr: str = ""
    effect_corrected: float | None = None
    effect_low: float | None = None
    effect_high: float | None = None
    low_90: float | None = None
    high_90: float | None = None
    margin: float | None = None
    p_equivalent: float | None = None
    p_equivalent_holm: float | None = None
    verdict: str = ""
    published: str = ""
    higher_is_better: bool = True
    tokens_per_second: float | None = None

    @property
    def warning(self) -> str:
        """Say in few words that the mean is not better than the best trivial answers; empty if it is, or none is known."""
        if self.mean is None or self.guess is None:
            return ""
        if self.higher_is_better:
            return "" if self.mean > self.guess else "not above the trivial answers"
        return "" if self.mean < self.guess else "not below the trivial answers"
