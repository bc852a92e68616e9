"""Batches of rows of like length: all rows once per epoch, less padding, and the same order in a resumed run."""

import itertools

import attrs
import folders
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_study import results, stopped_at

from lrkit.study.batches import ByLength
from lrkit.study.cell import make_cell
from lrkit.study.execute import execute
from lrkit.study.graph import jobs_of
from lrkit.study.plan import lay_out, study_from
from lrkit.study.run import Record
from lrkit.study.run_settings import settings_from
from lrkit.study.task_spec import TaskSpec
from lrkit.study.worker import run_cell


def batches(order, size):
    rows = list(order)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=400), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_an_epoch_is_all_rows(lengths, size, seed):
    """Each row once per epoch, in another order in each; and no batch but the last one is not full."""
    order = ByLength(lengths, size, seed)
    epochs = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert all(sorted(epoch) == list(range(len(lengths))) for epoch in epochs)
    assert epochs[0] == epochs[2] and len(order) == len(lengths)
    assert len(lengths) < 20 or epochs[0] != epochs[1]


@given(st.lists(st.integers(1, 90), min_size=40, max_size=200), st.integers(0, 99))
def test_lengths_are_alike(lengths, seed):
    """Up to 50 batches of 4 are cut out of one sorted list: between two of them no row's length is on the wrong side."""
    found = batches(ByLength(lengths, 4, seed), 4)
    full = sorted(sorted(lengths[i] for i in batch) for batch in found if len(batch) == 4)
    for shorter, longer in itertools.pairwise(full):
        assert shorter[-1] <= longer[0] or shorter[0] == longer[0]


def test_batches_come_in_random_order():
    """Lengths neither rise nor fall in the course of an epoch: of 50 batches about half are longer than the one before."""
    lengths = [i % 97 for i in range(1600)]
    means = [sum(lengths[i] for i in batch) / 32 for batch in batches(ByLength(lengths, 32, 3), 32)]
    rises = sum(b > a for a, b in itertools.pairwise(means))
    assert 15 <= rises <= 34


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"), layers=2)


def study(place, **run):
    return study_from(
        {
            "base": "adalora",
            "set": {"rank": 2, "target_rank": 1},
            "tasks": [{"data": str(place / "data")}],
            "model": str(place / "model"),
            "seeds": 1,
            "run": {"steps": 12, "batch_size": 8, "max_length": 12, "train_rows": 40, **run},
        }
    )


@pytest.mark.parametrize(("step", "rows"), [(3, 40), (8, 40), (3, None)])
def test_grouped_run_resumes(place, tmp_path, step, rows):
    """A run of batches by length, shorter than an epoch or not, that stops on its way comes to the same bytes."""
    plan = lay_out(study(place, group_by_length=True, train_rows=rows, batch_size=4 if rows is None else 8))
    execute(plan, tmp_path / "whole", workers=0, costs=False)
    job = jobs_of(plan)[0].cell
    stopped = tmp_path / "stopped" / job.key
    with stopped_at(step + 1):
        assert run_cell(job.to_plain(), str(stopped), {"checkpoint_seconds": 0.0})["status"] == "failed"
    assert Record(folder=stopped).step() == step
    assert run_cell(job.to_plain(), str(stopped), {})["status"] == "done"
    assert (stopped / "result.json").read_bytes() == results(tmp_path / "whole")[job.key][0]


def test_grouping_is_another_cell(place, tmp_path):
    """Grouped batches are other ones; a cell that groups none is called as before there was a choice."""
    plan = lay_out(study(place))
    spec, row = plan.tasks[0], plan.rows[0]
    settings = attrs.asdict(plan.settings(row, spec, 0))
    method = jobs_of(plan)[0].cell.method

    def cell(**run):
        return make_cell(method, TaskSpec(data=str(place / "data")), str(place / "model"), "all-linear", run)

    plain = cell(**settings)
    assert "group_by_length" not in plain.run and not settings_from(plain.run).group_by_length
    assert plain.key == cell(**{k: v for k, v in settings.items() if k != "group_by_length"}).key
    assert plain.key != cell(**{**settings, "group_by_length": True}).key
