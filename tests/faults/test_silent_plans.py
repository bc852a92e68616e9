"""Faults of studies: costs that went to other rows, arguments passed over, folders that a kill left, p near 0.05."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import folders
import pytest
from command_line import ask

import lrkit
from lrkit.cli import main
from lrkit.compose import swapped, to_plain
from lrkit.errors import LrkitError
from lrkit.study import code
from lrkit.study.asked import study_from
from lrkit.study.joining import joined
from lrkit.study.packed import Pack
from lrkit.study.scores import check_share, p_text
from lrkit.study.study_file import CellEntry, CostEntry, RowRecord, StudyFile, TaskRecord
from lrkit.study.taken import _merged

NOWHERE = Path("nowhere")
ADALORA = to_plain(lrkit.methods.adalora())


def row(label, method):
    return RowRecord(label=label, method=method, targets="all-linear", train_also="auto")


def study(rows, costs=(), made="new"):
    """A study of one task and seed, with a cell for each row."""
    cells = [CellEntry(key=f"{made}{i}", row=i, task="movies", seed=0, setup="s", code=made) for i in range(len(rows))]
    more = {"tasks": (TaskRecord(name="movies"),), "seeds": (0,), "targets": "all-linear", "model": "minilm"}
    return StudyFile(name="s", rows=tuple(rows), cells=tuple(cells), costs=tuple(costs), **more)


def cost(key, index):
    return CostEntry(key=key, row=index, task="movies")


def test_costs_stay_with_rows():
    """A row's cost that was measured here stays beside that row when a pack in another order is taken in."""
    base, one, two = (
        row("adalora", ADALORA),
        row("a", swapped(ADALORA, "metric", "magnitude")),
        row("b", swapped(ADALORA, "metric", "sensitivity")),
    )
    pack = study([base, two, one], [cost("of-base", 0), cost("of-b", 1)], "packed")
    own = study([base, one], [cost("of-a", 1)], "own")
    merged = _merged(Pack(path=NOWHERE, study=pack, cells={}, costs={}), own, {}, NOWHERE)
    assert {each.key: merged.rows[each.row].label for each in merged.costs} == {
        "of-base": "adalora",
        "of-b": "b",
        "of-a": "a",
    }


@pytest.mark.parametrize(("changed", "left"), [(1, ["0", "2"]), (0, [])], ids=["row", "base"])
def test_costs_go_with_rows(changed, left):
    """A row whose cells gave way loses its cost; all do if the base did, to whose time they are ratios."""
    rows = [row(label, to_plain(lrkit.methods.lora(rank=rank))) for label, rank in (("base", 4), ("x", 2), ("y", 1))]
    there = study(rows, [cost(str(i), i) for i in range(3)], "old")
    now = list(rows)
    now[changed] = row(rows[changed].label, to_plain(lrkit.methods.lora(rank=8)))
    assert [each.key for each in joined(there, study(now), NOWHERE, yields=True).costs] == left


@pytest.mark.parametrize("base", ["teacher", "attrs"])
def test_a_study_takes_no_plan(base, tmp_path):
    """`lrkit.ablate` refuses what is of a method if it is given a study, and names it."""
    given = base if base == "teacher" else study_from({"base": "lora"})
    with pytest.raises(LrkitError, match=r"ablate: seeds, margin are of a method .* a study has its own"):
        lrkit.ablate(given, seeds=2, margin=0.5, out=tmp_path / "s")
    assert not (tmp_path / "s").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from lrkit.cli.folders import new_folder
from lrkit.study.place import try_folder
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
new_folder(Path(sys.argv[1])) if sys.argv[2] == "run" else try_folder(Path(sys.argv[1]) / "cells")
"""


@pytest.mark.parametrize("what", ["run", "study"])
def test_killed_while_trying(what, tmp_path, capsys):
    """A folder that a process was killed in, while it tried to write there, takes the same command."""
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(out), what], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL and [*out.rglob(".lrkit-*")]
    if what == "run":
        from lrkit.cli.folders import new_folder

        assert new_folder(out) == out
    else:
        assert "done" in ask(capsys, "ablate", "lora", "--swap", "rank=4", "--out", out, "--dry-run", "--json")
    (out / "mine.txt").write_text("kept")
    with pytest.raises(LrkitError, match="nothing is overwritten"):
        folders_check(what, out)


def folders_check(what, out):
    from lrkit.cli.folders import new_folder
    from lrkit.study.ledger import _check_free

    new_folder(out) if what == "run" else _check_free(out)


def refused(capsys, *words):
    """Return the one line by which a command is refused."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    told = capsys.readouterr()
    assert end.value.code == 2 and told.err.count("\n") == 1, told.err
    return told.err


def test_params_take_no_task(capsys):
    """A setting of a task is refused where nothing is trained, misspelt or not."""
    assert "task.nonsense is a setting of a task" in refused(capsys, "params", "lora", "--set", "task.nonsense=4")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--report-to", "nonsense"), 'there is no tracker "nonsense"'),
        (("--address", "here"), "--address is for executors"),
    ],
    ids=["tracker", "address"],
)
def test_dry_runs_refuse_alike(option, told, capsys, tmp_path):
    """A dry run refuses the options that the run itself would refuse."""
    place = folders.write_place(tmp_path, layers=1)
    words = ("ablate", "lora", "--swap", "rank=4", "--data", str(place / "data"), "--model", str(place / "model"))
    assert told in refused(capsys, *words, *option, "--dry-run")


def test_p_near_the_level():
    """A p that two digits write as 0.05 has a third one, so that its side is seen."""
    assert [p_text(p) for p in (51 / 1024, 0.0502, 0.05, 0.0527, 0.044, 1.0)] == [
        "0.0498",
        "0.0502",
        "0.05",
        "0.053",
        "0.044",
        "1",
    ]


@pytest.mark.parametrize("score", ["accuracy", "pearson", "spearman", "matthews", "explained"])
def test_margins_in_points(score):
    """A margin of 1 is meant as a point where no score is above 1; perplexities may have one."""
    with pytest.raises(LrkitError, match=f"must be below 1.*{score}"):
        check_share(1.0, "the margin", score)
    check_share(1.0, "the margin", "perplexity")


def test_what_scores_counts():
    """No file that trains or scores a cell imports from files that are left out of the digest of the code."""
    root = Path(code.__file__).parents[1]
    out = [name.removesuffix(".py").replace("/", ".") for name in code.OUTSIDE]
    trains = [
        "study/run.py",
        "study/trainer.py",
        "study/cell.py",
        "study/worker.py",
        "study/batches.py",
        "study/loaded.py",
    ]
    found = {}
    for name in trains:
        for node in ast.walk(ast.parse((root / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lrkit."):
                module = node.module.removeprefix("lrkit.")
                found |= (
                    {(name, module): node.lineno} if any(module == o or module.startswith(f"{o}.") for o in out) else {}
                )
    assert not found


def test_claims_after_trials(tmp_path):
    """A margin may be stated after trials, which see no validation rows, and not after a test cell."""
    there = study([row("base", ADALORA)])
    now = attrs.evolve(there, margin=0.01)
    (tmp_path / "cells" / "a-trial").mkdir(parents=True)
    assert joined(there, now, tmp_path, yields=True).margin == 0.01
    (tmp_path / "cells" / "new0").mkdir()
    with pytest.raises(LrkitError, match="has test cells already and no margin"):
        joined(there, now, tmp_path, yields=True)
