"""Runs of further kinds of tasks that are killed go on bitwise."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import killed_kinds
import pytest
import tiny_words
from folders import write_model

from lrkit.study.run import Record

MODELS = {"tags": write_model, "words": tiny_words.write_llama}


@pytest.mark.parametrize("kind", ["tags"])  # the others: tests/integrations/test_killed.py
def test_killed_run_is_same(kind, tmp_path):
    """A run that is killed and goes on has the state, losses, answers and scores of one that is not."""
    model = MODELS[kind](tmp_path / "model")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    command = [sys.executable, "-P", killed_kinds.__file__, kind, str(model), str(killed)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, *sys.path)))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.strip() == "6":
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert 4 <= Record(folder=killed).step() < killed_kinds.STEPS
    for folder in (killed, whole):
        killed_kinds.run(kind, model, folder)
    one, other = (json.loads((folder / "found.json").read_text()) for folder in (killed, whole))
    assert one["losses"][-3:] == other["losses"][-3:]
    assert {**one, "losses": None} == {**other, "losses": None}
