"""The verdicts that docs/replication.md prints, against the committed cells."""

import functools
import itertools
import re
import statistics
from pathlib import Path

import all_methods
import pytest

from lrkit.study.claims import judge, to_markdown
from lrkit.study.comebacks import comebacks
from lrkit.study.recall import recalls_of
from lrkit.study.records import read_study
from lrkit.study.taken import unpack
from lrkit.study.tuned import trials_of

DOCS = Path(__file__).parents[1] / "docs"
PACKS = sorted(path.parent.name for path in DOCS.glob("replication/*/cells.jsonl.gz"))
TABLE = (DOCS / "replication.md").read_text().split("## Verdicts")[1].split("\n## ")[0].splitlines()

FIRST, SECOND, OUTPUT = "intermediate.dense", "[0-9].output.dense", "attention.output.dense"


@pytest.fixture(scope="module")
def record_of(tmp_path_factory):
    """Read a study back from its committed cells, once."""

    @functools.cache
    def read(name):
        folder = tmp_path_factory.mktemp("packs") / name
        unpack(DOCS / "replication" / name, folder)
        return read_study(folder)

    return read


def rows(study):
    """The rows of a study in the page's first table."""
    return [line for line in TABLE if line.startswith(f"| `{study}`: ")]


def printed(study, line):
    """The page's row of a line of claims.md: some of its columns."""
    claim, verdict, difference, n, p, _, excluded, chosen, _ = line.strip("| ").split(" | ")
    name = claim.split("**")[1].replace("-", " ")
    return f"| `{study}`: {name} | {verdict} | {difference} | {p} | {excluded} | {n} | {chosen} |"


def test_studies_with_rows():
    """Whatever the table names is packed, and it names at least one study."""
    named = {line.split("`")[1] for line in TABLE if line.startswith("| `")}
    assert named and named <= set(PACKS)


@pytest.mark.parametrize("study", PACKS)
def test_printed_verdicts(study, record_of):
    """The table has the line of each claim of a finished study as the cells give it, and none of an unfinished one."""
    record = record_of(study)
    judged = judge(record)
    missing = sum(each.missing for each in judged)
    lines = to_markdown(record, judged).splitlines()[2:]
    assert rows(study) == ([] if missing else [printed(study, line) for line in lines])


def told():
    """The page in one line, without marks of its tables and lists."""
    return " ".join((DOCS / "replication.md").read_text().split())


def cells_of(record, label):
    """The test cells of the row with a label."""
    return record.cells_of(next(index for index, each in enumerate(record.rows) if each.label == label))


def ranks_of(record, label, task=None):
    """The ranks that a row's runs end with: seed and task to layer to rank."""
    return {
        (cell.task, cell.seed): {layer.name: layer.rank or 0 for layer in cell.result.layers}
        for cell in cells_of(record, label)
        if task in (None, cell.task)
    }


def in_module(ranks, end):
    """The mean rank of the layers whose name ends so, as a regular expression has it."""
    return statistics.fmean(rank for run in ranks.values() for name, rank in run.items() if re.search(f"{end}$", name))


def correlation(some, others):
    """Pearson's correlation of two runs' ranks over the layers."""
    return statistics.correlation(list(some.values()), [others[name] for name in some])


def test_recall_of_the_teacher(record_of):
    """What the page and the README say of the right layers that AdaLoRA's ranks keep, and uniform ones."""
    record, page = record_of("teacher"), told()
    (task,) = {each.name for each in record.tasks}
    found = {each.label: each for each in recalls_of(record, task)}
    ours, uniform = found["adalora"], found["uniform"]
    assert f"keep {100 * ours.recall:.0f} % of what the two right layers" in page
    assert f"({ours.low:.2f} to {ours.high:.2f}; uniform ranks {100 * uniform.recall:.0f} %)" in page
    both = f"{ours.draws - len(ours.misses)} of {ours.draws}"
    assert (
        f"{ours.found} of {ours.right} right layers keep half of their first rank or more, both of a teacher in {both}"
        in page
    )
    assert f"(both in {both} draws)" in (DOCS.parent / "README.md").read_text()


def test_ranks_of_controls(record_of):
    """What the page says of the ranks in `where-the-rank-goes`: who agrees with whom, empty layers, and modules."""
    record, page = record_of("where-the-rank-goes"), told()
    agree, alike, empty, unlike = [], [], [], []
    for task in ("movies", "glue/sst2"):
        found, cut = (ranks_of(record, label, task) for label in ("adalora", "cut-at-end"))
        for ranks, means in ((found, agree), (cut, alike)):
            means.append(statistics.fmean(correlation(*two) for two in itertools.combinations(ranks.values(), 2)))
        unlike.append(statistics.fmean(correlation(found[key], cut[key]) for key in found))
        empty.append(statistics.fmean(list(run.values()).count(0) for run in found.values()))
    assert f"{agree[0]:.2f} on movies, {agree[1]:.2f} on SST-2" in page
    assert f"cut at the end agree as well ({alike[0]:.2f} and {alike[1]:.2f})" in page
    assert f"{empty[0]:.0f} and {empty[1]:.0f} layers end with no rank" in page
    assert f"correlation {unlike[0]:.2f} and {unlike[1]:.2f}" in page
    here, there = (
        [f"{in_module(ranks_of(record, label), name):.1f}" for name in ("self.query", "self.key", SECOND)]
        for label in ("adalora", "cut-at-end")
    )
    assert (
        f"query and key than one cut after step 120 ({here[0]} and {here[1]} against {there[0]} and {there[1]} of 8"
        in page
    )
    assert f"second matrix ({here[2]} against {there[2]})" in page
    for task, place in (("movies", "movies"), ("glue/sst2", "SST-2")):
        cells = [cells_of(record, row.label) for row in record.rows]
        means = [100 * statistics.fmean(c.result.scores["accuracy"] for c in row if c.task == task) for row in cells]
        assert f"{min(means):.1f} and {max(means):.1f} % on {place}" in page


def test_ranks_of_adalora(record_of):
    """What the page says of the ranks in `adalora-tuned`, by module and block, and of components that came back."""
    record, page = record_of("adalora-tuned"), told()
    ranks = ranks_of(record, "adalora")
    modules = {name: f"{in_module(ranks, name):.1f}" for name in (FIRST, SECOND, "value", "key", "query", OUTPUT)}
    assert modules[FIRST] == modules[SECOND]
    assert f"{modules[FIRST]} in both of its matrices, {modules['value']} in value, {modules[OUTPUT]} in the" in page
    assert f"{modules['key']} in key, {modules['query']} in query" in page
    ends = [
        statistics.fmean(rank for run in ranks.values() for name, rank in run.items() if f"layer.{block}." in name)
        for block in (0, 5)
    ]
    assert f"{ends[0]:.1f} in the first block, {ends[1]:.1f} in the last" in page
    _, back, stay = zip(*(comebacks(cell.decisions) for cell in cells_of(record, "adalora")), strict=True)
    assert f"{statistics.fmean(back):.1f} of 144 in a run ({min(back)} to {max(back)})" in page
    assert f"of which {statistics.fmean(stay):.1f} stay" in page


def test_losses_by_rate(record_of):
    """The page's table of losses by rate and scale is that of the trials."""
    record = record_of("adalora-tuned")
    losses: dict[tuple[float, float, str, str], list[float]] = {}
    for index, row in enumerate(record.rows):
        for task in record.tasks:
            settings = {trial.number: trial.settings for trial in trials_of(record, index, task.name)}
            for cell in record.trials_in(index, task.name):
                late = statistics.fmean(value for step, value in cell.losses if 90 < step <= 120)
                lr, alpha = settings[cell.number]["run.lr"], settings[cell.number]["parameterization.alpha"]
                losses.setdefault((lr, alpha / 2, row.label, task.name), []).append(late)
    lines = [line.strip(" |").split(" | ") for line in (DOCS / "replication.md").read_text().splitlines()]
    table = [line for line in lines if line[0] in ("1e-3", "1e-2") and len(line) == 5]
    assert len(table) == 4
    for rate, scale, *cells in table:
        for label, told_here in zip(("lora", "svd-lora", "adalora"), cells, strict=True):
            means = [losses[float(rate), float(scale), label, task] for task in ("movies", "glue/sst2")]
            assert [len(each) for each in means] == [2, 2]
            assert told_here == " / ".join(f"{statistics.fmean(each):.2f}" for each in means)


def test_freezing_order(record_of):
    """What the page says of AFLoRA: when each kind of matrix froze, which is last in every run, and its FLOPs."""
    record, page = record_of("aflora-tuned"), told()
    kinds = ("intermediate.dense.A", "output.dense.A", "output.dense.B", "intermediate.dense.B")
    every: dict[str, list[int]] = {kind: [] for kind in kinds}
    for cell in cells_of(record, "aflora"):
        steps: dict[str, list[int]] = {kind: [] for kind in kinds}
        for decision in cell.decisions:
            for name in decision.lost:
                steps[name.split(".", 4)[-1]].append(decision.step)
        assert {len(each) for each in steps.values()} == {6}
        assert max(steps, key=lambda kind: statistics.fmean(steps[kind])) == kinds[0]
        assert max(step for each in steps.values() for step in each) == 26
        for kind in kinds:
            every[kind] += steps[kind]
    assert len(every[kinds[0]]) == 6 * 20
    means = [f"{statistics.fmean(every[kind]):.1f}" for kind in kinds]
    words = "after step {}, the output layer's A after {}, its B after {}, the intermediate's B after {}."
    assert words.format(*means) in page
    flops = {
        label: statistics.fmean(cell.result.flops.run for cell in cells_of(record, label))
        for label in ("aflora", "lora", "elora")
    }
    assert f"{flops['aflora'] / flops['lora']:.2f} times as many as LoRA's" in page
    assert f"{flops['aflora'] / flops['elora']:.2f} times as many as ELoRA's" in page


def test_choices_of_aflora(record_of):
    """What the page says of the rows of `aflora-choices`: their means, their sizes, and when the last matrix freezes."""
    record, page = record_of("aflora-choices"), told()
    labels = [row.label for row in record.rows]
    means = {
        task: {
            label: 100 * statistics.fmean(cell.result.score for cell in cells_of(record, label) if cell.task == task)
            for label in labels
        }
        for task in ("movies", "glue/sst2")
    }
    every = means["movies"].values()
    others = [mean for label, mean in means["glue/sst2"].items() if label != "attention"]
    assert f"between {min(every):.1f} and {max(every):.1f} % on movies" in page
    assert f"between {min(others):.1f} and {max(others):.1f} % on SST-2" in page
    assert max(mean for mean in others) - means["glue/sst2"]["attention"] > 1.0
    trials = {
        (row.label, trial.settings["run.lr"]): f"{100 * trial.mean:.1f}"
        for index, row in enumerate(record.rows)
        for trial in trials_of(record, index, "glue/sst2")
    }
    low, high = trials["attention", 0.01], trials["attention", 0.03]
    assert f"chose 1e-2 (its two trials: {low} %, and {high} at 3e-2)" in page
    assert f"(AFLoRA's trials: {trials['aflora', 0.03]} %, and {trials['aflora', 0.01]} at 1e-2)" in page
    at_first = [cells_of(record, label)[0].result.parameters for label in ("aflora", "attention", "both")]
    sizes = [f"{(each.start - each.now) / 1000:.0f},000" for each in at_first]
    assert f"start with {sizes[0]} parameters, the attention's with {sizes[1]}, both with {sizes[2]}" in page
    last = {
        max(decision.step for decision in cell.decisions if decision.lost)
        for label in labels
        for cell in cells_of(record, label)
    }
    assert f"frozen after step {min(last)} to {max(last)} of 120, by row" in page


def test_choices_of_adalora(record_of):
    """What the page says of the rows of `adalora-choices`: their means, and which components came back by which score."""
    record, page = record_of("adalora-choices"), told()
    for task, name in (("movies", "movies"), ("glue/sst2", "SST-2")):
        means = [
            100 * statistics.fmean(cell.result.score for cell in cells_of(record, row.label) if cell.task == task)
            for row in record.rows
        ]
        assert f"between {min(means):.1f} and {max(means):.1f} % on {name}" in page
    back = {}
    for label in ("adalora", "sensitivity", "magnitude"):
        _, came, stay = zip(*(comebacks(cell.decisions) for cell in cells_of(record, label)), strict=True)
        back[label] = f"{statistics.fmean(came):.1f}", f"{statistics.fmean(stay):.1f}"
        if label == "adalora":
            lowest, highest = min(came), max(came)
    assert (
        f"{back['adalora'][0]} come back in a run ({lowest} to {highest}), of which {back['adalora'][1]} stay" in page
    )
    assert f"by the raw sensitivity {back['sensitivity'][0]} do, and {back['sensitivity'][1]} stay" in page
    assert f"by the size of λ {back['magnitude'][0]}, and {back['magnitude'][1]}" in page


def test_newer_allocators(record_of):
    """What the page says of the rows of `newer`: means, ranks by module, agreement of seeds, and moves of L1RA."""
    record, page = record_of("newer"), told()
    means = {
        (label, task): 100
        * statistics.fmean(cell.result.score for cell in cells_of(record, label) if cell.task == task)
        for label in ("lora", "eva", "fim-lora", "l1ra")
        for task in ("movies", "glue/sst2")
    }
    fim, lora = ([means[label, task] for task in ("movies", "glue/sst2")] for label in ("fim-lora", "lora"))
    assert f"({fim[0]:.1f} against {lora[0]:.1f} % on movies, {fim[1]:.1f} against {lora[1]:.1f} on SST-2)" in page
    behind = [f"{lora[i] - means['eva', task]:.1f}" for i, task in enumerate(("movies", "glue/sst2"))]
    assert f"behind on both tasks, by {behind[0]} and {behind[1]} points" in page
    behind = [f"{lora[i] - means['l1ra', task]:.1f}" for i, task in enumerate(("movies", "glue/sst2"))]
    assert f"behind on both, by {behind[0]} and {behind[1]} points" in page
    ranks = ranks_of(record, "fim-lora", "movies")
    value, first, second = (in_module(ranks, each) for each in ("self.value", FIRST, SECOND))
    query, key = (in_module(ranks, f"self.{each}") for each in ("query", "key"))
    assert f"value ({value:.1f} on movies) and the FFN ({first:.1f} and {second:.1f})" in page
    assert f"query and key ({query:.1f} and {key:.1f})" in page
    agree = statistics.fmean(correlation(*two) for two in itertools.combinations(ranks.values(), 2))
    assert f"two seeds' ranks correlate by {agree:.2f}" in page
    ranks = ranks_of(record, "eva", "movies")
    assert f"attention's output ({in_module(ranks, OUTPUT):.1f} on movies)" in page
    assert f"less in the FFN ({in_module(ranks, FIRST):.1f} and {in_module(ranks, SECOND):.1f})" in page
    moves = {"lost": [], "fresh": []}
    for task in ("movies", "glue/sst2"):
        runs = [cell.decisions for cell in cells_of(record, "l1ra") if cell.task == task]
        for key in moves:
            moves[key].append(statistics.fmean(sum(len(getattr(each, key)) for each in run) for run in runs))
    lost, fresh = ([round(number) for number in sorted(each)] for each in moves.values())
    assert f"({lost[0]} to {lost[1]} leave a layer in a run, and {fresh[0]} to {fresh[1]} come to another)" in page
    trials = {each.settings["run.lr"]: each.mean for each in trials_of(record, 1, "movies")}
    assert trials[0.003] < 0.5 < trials[0.001]


def test_ffn_again(record_of):
    """What the page says of the FFN beside the attention at one rate."""
    record, page = record_of("ffn-again"), told()
    ffn, same = (
        100 * statistics.fmean(cell.result.score for cell in cells_of(record, label))
        for label in ("aflora", "attention-same-rate")
    )
    own, at_one = judge(record)
    assert (own.verdict, at_one.verdict) == ("open", "not replicated")
    assert f"ahead by {100 * own.tasks[0].difference:.1f} (p {own.p_holm:.2g}, open)" in page
    assert f"not ahead at all ({ffn:.1f} and {same:.1f} %; an advantage of a point is excluded)" in page


def test_questions(record_of):
    """The means and the trials that the page compares, in F1."""
    record, page = record_of("questions"), told()
    mean = {row: statistics.fmean(cell.result.score for cell in cells_of(record, row)) for row in ("lora", "adalora")}
    assert (
        f"AdaLoRA's F1 on questions about a text is {100 * mean['adalora']:.1f}, LoRA's {100 * mean['lora']:.1f}"
        in page
    )
    (guess,) = (task.majority for task in record.tasks)
    assert f"the best answer without learning has {100 * guess:.1f}" in page
    trial = {}
    for index, row in enumerate(record.rows):
        for each in trials_of(record, index, "squad"):
            trial[row.label, each.settings["run.lr"]] = f"{100 * each.mean:.1f}"
    low, best = trial["lora", 0.001], trial["lora", 0.003]
    lora = f"it chose 3e-3 ({best} in its trial; {low} at 1e-3), and at 1e-2 it learns nothing"
    assert f"{lora} ({trial['lora', 0.01]})" in page
    assert f"({trial['adalora', 0.001]} at 1e-3, {trial['adalora', 0.003]} at 3e-3)" in page
    assert f"AdaLoRA bears 1e-2, and there it has {trial['adalora', 0.01]}" in page
    assert all(float(trial["lora", rate]) > float(trial["adalora", rate]) for rate in (0.001, 0.003))


def test_prompts(record_of):
    """The perplexities that the page compares, and that every seed agrees."""
    record, page = record_of("prompts"), told()
    scores = {row: [cell.result.score for cell in cells_of(record, row)] for row in ("lora", "aflora")}
    mean = {row: statistics.fmean(each) for row, each in scores.items()}
    assert f"LoRA's perplexity is {mean['lora']:.3f}, AFLoRA's {mean['aflora']:.3f}" in page
    assert all(a < b for a, b in zip(scores["lora"], scores["aflora"], strict=True))
    size = {row: statistics.fmean(c.result.parameters.average for c in cells_of(record, row)) / 1000 for row in scores}
    assert f"{size['aflora']:,.0f},000 parameters on average against {size['lora']:,.0f},000" in page
    for index in (0, 1):
        trial = [f"{each.mean:.2f}" for each in trials_of(record, index, "gsm8k")]
        assert f"{trial[0]}, {trial[1]} and {trial[2]}" in page


def test_all_methods(record_of):
    """The table of all methods is that of the packed cells, and no row is ahead of the tuned LoRA, as the page says."""
    record, page = record_of("all-methods"), (DOCS / "methods" / "index.md").read_text()
    lines = all_methods.table(record)
    assert "\n".join(lines) in page
    assert {status for status, count in record.counts.items() if count} == {"done"} and len(record.cells) == 2 * len(
        record.rows
    )
    scores = {
        row.label: statistics.fmean(each.score for each in record.cells_of(n)) for n, row in enumerate(record.rows)
    }
    assert max(scores, key=scores.get) == "lora, tuned"
    guess = {each.result.majority for each in record.cells}
    assert f"constant guess has {100 * statistics.fmean(guess):.1f} %" in " ".join(page.split()) and len(guess) == 1
    assert {each.result.parameters.head for each in record.cells} == {148_610}
