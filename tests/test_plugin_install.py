"""A distribution written elsewhere, installed with pip, used by the command line in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import folders
import pytest

import lrkit
from lrkit.hookspecs import KINDS, hook_of
from lrkit.registry import BUILT_IN

BACKEND = (
    ("setuptools>=61", "setuptools.build_meta")
    if importlib.util.find_spec("setuptools")
    else ("hatchling", "hatchling.build")
)
PROJECT = f"""
[build-system]
requires = ["{BACKEND[0]}"]
build-backend = "{BACKEND[1]}"

[project]
name = "NAME"
version = "0.3.1"
dependencies = ["lrkit"]

[project.entry-points.lrkit]
ENTRY = "MODULE"
"""
PEAK = '''
"""The largest gradient seen."""
from collections.abc import Mapping
from typing import ClassVar

import attrs
import lrkit
import torch
from torch import Tensor


@attrs.frozen(kw_only=True)
class Peak(lrkit.Metric):
    """The largest abs(gradient) of an entry, forgotten slowly."""

    buffers: ClassVar[tuple[str, ...]] = ("peak",)
    decay: float = 0.9

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        state["peak"].copy_(torch.maximum(state["peak"] * self.decay, grad.abs()))

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return state["peak"]


@lrkit.hookimpl
def lrkit_metrics() -> dict[str, type[lrkit.Metric]]:
    return {"peak": Peak}
'''
BROKEN = 'raise RuntimeError("the licence server\\ndoes not answer")\n'


def install(folder: Path, name: str, entry: str, source: str) -> Path:
    """Write a distribution and install it with pip into a folder of its own."""
    module = name.replace("-", "_")
    project = folder / name
    project.mkdir()
    text = PROJECT.replace("NAME", name).replace("ENTRY", entry).replace("MODULE", module)
    (project / "pyproject.toml").write_text(text)
    (project / f"{module}.py").write_text(source)
    site = folder / f"{name}-site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(site), str(project)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("good"), "acme-peak", "peak-gradient", PEAK)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("broken"), "acme-broken", "licensed", BROKEN)


Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Runs `lrkit` as a user does, with these folders beside what is installed."""
    script = Path(sys.executable).with_name("lrkit")
    command = [str(script)] if script.exists() else [sys.executable, "-c", "from lrkit.cli import main; main()"]
    (tmp_path / "cwd").mkdir()

    def run(*arguments: str, sites: tuple[Path, ...]) -> subprocess.CompletedProcess[str]:
        here = [str(site) for site in sites]
        before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*before, *here])}
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=180, cwd=tmp_path / "cwd", env=environment
        )

    return run


def listed(stdout: str) -> dict[tuple[str, str], str]:
    """(kind, name) to the distribution, read from the printed table."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in stdout.splitlines()]
    return {(row[0], row[1]): row[2] for row in rows if len(row) == 4 and row[0] in KINDS}


OURS = {
    (kind, name): f"lrkit {lrkit.__version__}"
    for kind in KINDS
    for module in map(importlib.import_module, BUILT_IN)
    for name in getattr(module, hook_of(kind), dict)()
}


def test_an_installed_plug_in_is_listed_with_its_distribution(call: Call, good: Path) -> None:
    done = call("plugins", sites=(good,))
    assert "acme" not in done.stderr
    found = listed(done.stdout)
    assert found[("metric", "peak")] == "acme-peak 0.3.1"
    assert found.items() >= OURS.items()
    assert done.returncode == (2 if done.stderr else 0)  # other plug-ins on this machine are no part of this


def test_a_plug_in_that_raises_on_import_is_one_line_and_the_rest_is_listed(
    call: Call, good: Path, broken: Path
) -> None:
    done = call("plugins", sites=(broken, good))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "acme" in line]
    assert line == (
        'lrkit: plug-in "licensed" of acme-broken 0.3.1: cannot be imported: '
        "RuntimeError: the licence server does not answer"
    )
    assert all(line.startswith("lrkit: ") for line in done.stderr.splitlines())
    found = listed(done.stdout)
    assert found[("metric", "peak")] == "acme-peak 0.3.1"
    assert found.items() >= OURS.items()


def test_a_run_trains_with_the_metric_of_a_plug_in_beside_a_broken_one(
    call: Call, good: Path, broken: Path, tmp_path: Path
) -> None:
    model, data = folders.write_model(tmp_path / "model"), folders.write_data(tmp_path / "data")
    done = call(
        *("run", "adalora", "--swap", "metric=peak", "--set", "metric.decay=0.5"),
        *("--model", str(model), "--data", str(data), "--set", "run.steps=8", "--set", "run.batch_size=6"),
        *("--out", "results", "--json"),
        sites=(good, broken),
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "acme" in line]
    assert line.startswith('lrkit: plug-in "licensed" of acme-broken 0.3.1: cannot be imported: ')
    assert all(line.startswith("lrkit: ") for line in done.stderr.splitlines())
    result = json.loads(done.stdout)
    assert (result["method"]["metric"]["name"], result["method"]["metric"]["decay"]) == ("peak", 0.5)
    assert result["steps"] == 8
    assert result["history"][-1]["kept"] == result["history"][-1]["budget"] == 8 * len(result["summary"]["layers"])
    assert all(decision["threshold"] > 0 for decision in result["history"]), "gradients have been seen"
    # Taken up again where the plug-in is not installed, it says which part is missing.
    from transformers import AutoModelForSequenceClassification

    from lrkit.models import quiet_transformers

    with quiet_transformers():
        net = AutoModelForSequenceClassification.from_pretrained(model)
    with pytest.raises(lrkit.LrkitError, match='unknown metric "peak"'):
        lrkit.load(net, tmp_path / "cwd" / "results")
