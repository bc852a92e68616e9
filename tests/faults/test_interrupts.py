"""Ctrl-C: a run goes on where it was, and a second one ends it at once without a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import folders
import pytest

STEPS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"))


def start(place, *arguments, slow=0.0):
    """`python -m lrkit run` in a process of its own, each step slowed down."""
    slower = (
        "import sys, time; from torch.optim.optimizer import register_optimizer_step_post_hook as hook\n"
        f"hook(lambda *_: time.sleep({slow}))\nfrom lrkit.cli import main; main(sys.argv[1:])"
    )
    settings = [f"run.steps={STEPS}", "run.batch_size=4", "run.max_length=8"]
    command = ["run", "adalora", "--model", str(place / "model"), "--data", str(place / "data")]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", slower, *command, *arguments], env=environment, **pipes)


def wait_for(process, path, pattern):
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        if any(Path(path).glob(pattern)) and any(f.stat().st_size for f in Path(path).glob(pattern)):
            return
        time.sleep(0.02)
    pytest.fail(f"it did not get that far: {process.communicate()}")


def test_the_same_command_goes_on(place, tmp_path):
    """Interrupted and run again, it saves the bytes that an undisturbed run saves."""
    whole = start(place, "--out", str(tmp_path / "whole"))
    broken = start(place, "--out", str(tmp_path / "broken"), slow=0.1)
    wait_for(broken, tmp_path / "broken", "unfinished/*/metrics.jsonl")
    broken.send_signal(signal.SIGINT)
    _, said = broken.communicate(timeout=60)
    assert broken.returncode == 130, said
    assert "Traceback" not in said and "the same command goes on from there" in said and "schedule" not in said
    assert "training ends" not in said, "a pause is no end"
    assert not (tmp_path / "broken" / "result.json").exists()
    again = start(place, "--out", str(tmp_path / "broken"))
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert whole.communicate(timeout=120) and whole.returncode == 0
    one, two = ((tmp_path / name / "lrkit.safetensors").read_bytes() for name in ("whole", "broken"))
    assert one == two
    assert not (tmp_path / "broken" / "unfinished").exists()


def test_another_command_does_not_go_on(place, tmp_path):
    """What an interrupted run left belongs to the same command alone."""
    (tmp_path / "out" / "unfinished").mkdir(parents=True)
    (tmp_path / "out" / "unfinished" / "request.json").write_text('{"format": 1, "cells": {"lora": "0"}}')
    other = start(place, "--out", str(tmp_path / "out"))
    _, said = other.communicate(timeout=60)
    assert other.returncode == 2 and "holds an unfinished run that is another one" in said


def a_second_one_ends_it_at_once(place, tmp_path):
    """Even while the first is being followed; and without a traceback. See tests/integrations/test_second_interrupt.py."""
    process = start(place, "--out", str(tmp_path / "out"), slow=3.0)
    wait_for(process, tmp_path / "out", "unfinished/*/metrics.jsonl")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert time.monotonic() - begin < 2.0
