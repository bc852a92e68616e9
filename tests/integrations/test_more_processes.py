"""Three processes where the default suite has two, two devices to a cell, and faults that DDP alone shows."""

import pytest
import test_parallel
import test_sharded
from faults.test_heads import an_unread_pooler_under_ddp as test_an_unread_pooler_under_ddp
from faults.test_penalty import processes_average_it as test_processes_average_it
from faults.test_stale_cells import workers_reach_the_executor as test_workers_reach_the_executor
from faults.test_unclipped import processes_see_the_mean as test_processes_see_the_mean
from test_sharded import runs, test_sharded_equals_one_process, test_sharded_runs_resume_anywhere
from test_study import cell_of_two_devices as test_cell_of_two_devices
from test_study import place


@pytest.fixture(scope="module", autouse=True)
def three():
    """Let both modules begin three processes as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_sharded, "WORLDS", (2, 3))
        patch.setitem(test_parallel.MODES, 3, ("ddp:aflora",))
        yield


def test_three_ranks_decide_alike(tmp_path):
    """DDP's ranks end where one process ends."""
    ended = {3: test_parallel.processes("ddp:aflora", 3, tmp_path)}
    test_parallel.test_ddp_ranks_decide_alike_and_end_where_one_process_ends(3, "ddp:aflora", ended)


__all__ = [
    "place",
    "runs",
    "test_an_unread_pooler_under_ddp",
    "test_cell_of_two_devices",
    "test_processes_average_it",
    "test_processes_see_the_mean",
    "test_sharded_equals_one_process",
    "test_sharded_runs_resume_anywhere",
    "test_workers_reach_the_executor",
]
