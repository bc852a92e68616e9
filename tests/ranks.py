"""A script run as two processes of one group."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

_BEGIN = """
import sys, torch, torch.distributed as dist
sys.path[:0] = sys.argv[3:]
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.set_num_threads(1)
"""
_END = "\ndist.destroy_process_group()\n"


def run_two(script: str, folder: Path) -> None:
    """Run a script twice side by side, which knows its ``rank`` and a ``folder`` to write to; both must end well."""
    paths = [str(HERE), str(HERE / "faults")]
    running = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", _BEGIN + script + _END, str(rank), str(folder), *paths],
            env=os.environ,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    errors = [each.communicate(timeout=150)[1] for each in running]
    assert [each.returncode for each in running] == [0, 0], errors
