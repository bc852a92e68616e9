"""A run in a process of its own, for tests that kill it: `python killed_task.py MODULE MODEL FOLDER`.

MODULE is a test module with a function `task()`, a `METHOD` and `SETTINGS`.
"""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path


def kill_at(step, module, model, folder):
    """Start the run, and kill its process once it has taken so many steps; there is a checkpoint at each."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, module, str(model), str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    told = []
    for line in process.stdout:
        told.append(line)
        if line == f"step {step}\n":
            os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "".join(told)
    process.stdout.close()


def main(module, model, folder):
    from lrkit.study.run import Record, train

    Path(folder).mkdir()
    tests = importlib.import_module(module)
    train(
        tests.METHOD,
        tests.task(),
        model=model,
        settings=tests.SETTINGS,
        record=Record(folder=Path(folder), checkpoint_seconds=0.0),
        progress=lambda step, *_: print("step", step, flush=True),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
