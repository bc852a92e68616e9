"""FSDP2: two and three processes that hold a part of each tensor, against one that holds all."""

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import sharded_worker
import torch
from sharded_worker import METHODS

HERE = Path(__file__).parent
WORLDS = (2,)
"""Numbers of processes; tests/integrations/test_more_processes.py has three as well."""


def processes(folder, *worlds):
    """Run the worker in so many processes, one number after the other, and return what each process has found."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-P", str(HERE / "sharded_worker.py"), str(folder), *map(str, worlds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in worlds}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs of one process, and of each number of several, each of the later ones resuming what those before it saved."""
    folder = tmp_path_factory.mktemp("sharded")
    models.make("llama").save_pretrained(folder / "llama")
    alone = {name: sharded_worker.one(method, folder / f"{name}-1") for name, method in METHODS.items()}
    return alone, processes(folder, *WORLDS), folder


def alike(one, other):
    """Two ends of one run: the same decisions, and weights and statistics to rounding."""
    assert one["history"] == other["history"]
    assert one["sums"] == other["sums"]
    assert one["tensors"].keys() == other["tensors"].keys()
    for key, value in one["tensors"].items():
        # A key's bias cancels in the softmax: its gradient is rounding alone, of which Adam makes larger steps.
        exact = 1e-12 if key.endswith("key.bias") else 1e-14
        rounding = {"rtol": 1e-5, "atol": 1e-9} if value.dtype == torch.float32 else {"rtol": 0, "atol": exact}
        torch.testing.assert_close(other["tensors"][key], value, **rounding, msg=lambda m, k=key: f"{k}: {m}")


def test_sharded_equals_one_process(runs):
    """Every method ends where one process ends, on several processes, which all hold the same."""
    alone, sharded, _ = runs
    for results in sharded.values():
        for name in METHODS:
            alike(alone[name], results[0]["run"][name])
            for other in results[1:]:
                assert results[0]["run"][name]["history"] == other["run"][name]["history"]
                mine, theirs = results[0]["run"][name]["tensors"], other["run"][name]["tensors"]
                assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_sharded_runs_resume_anywhere(runs):
    """A run that one process or two began goes on with another number of them, and ends the same."""
    alone, sharded, folder = runs
    for results in sharded.values():
        for name, found in results[0]["resumed"].items():
            alike(alone[name], found)
    for name in METHODS:
        alike(alone[name], sharded_worker.resumed(folder / f"{name}-{WORLDS[-1]}"))


@pytest.mark.parametrize("kind", sharded_worker.KINDS)
def test_kinds_of_layers_are_sharded(kind, runs):
    """Adapters of every kind of layer end where one process ends, with the same decisions."""
    tensors, history = sharded_worker.of_kind(kind)
    found, decisions = runs[1][2][0]["kinds"][kind]
    assert decisions == history
    assert found.keys() == tensors.keys()
    rounding = 2e-3 if kind == "half precision" else 1e-14
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=rounding, msg=lambda m, n=name: f"{n}: {m}")


def test_failed_saves_fail_everywhere(runs):
    """A save that fails where it is written raises the same line on every process, and leaves the old file."""
    first, second = (torch.load(runs[2] / f"saves-{rank}.pt") for rank in range(2))
    for case, words in {"occupied": "File exists", "full": "No space left"}.items():
        assert words in first[case]
        assert first[case] == second[case]
    assert first["alone"] != "nothing"
    assert first["kept"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("before", "attach first, then fully_shard"),
        ("whole", "nothing averages their gradients: bind"),
        ("cut", "cuts or adds components"),
        ("shared", "share matrices"),
        ("late", "sharded after bind"),
        ("stale", "make it from adapted.parameters() after fully_shard"),
        ("merge", "base weight is sharded"),
        ("tp_plan", "tensor parallel layers (tp_plan, parallelize_module) cannot be adapted"),
        ("parallelize", "tensor parallel layers (tp_plan, parallelize_module) cannot be adapted"),
    ],
)
def test_sharded_refusals_are_lines(case, words, runs):
    """Whatever sharded parameters cannot do is refused on every process in one line."""
    for result in runs[1][2]:
        assert words in result["said"][case]
        assert "\n" not in result["said"][case]
