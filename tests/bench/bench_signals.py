"""What it costs to read layers: a step by the signal that a metric reads, a batch of calibration, a step of a newer method.

MiniLM, all linear layers, r = 8, turn and turn about in one process.
"""

import copy
import statistics
import time
from typing import ClassVar

import attrs
import harness
import subjects
import torch

import lrkit
from lrkit import accounting

ROUNDS = 10
ROWS, TOKENS = 32, 32


@attrs.frozen(kw_only=True)
class Counted(lrkit.LayerMetric):
    """How many rows go into a layer."""

    def begin(self, layer):
        return {"rows": torch.zeros((), dtype=torch.int64, device=layer.device)}

    def observe(self, seen, state):
        state["rows"].add_(len(seen.x))

    def score(self, layer, state):
        return state["rows"].float().expand(layer.units)


@attrs.frozen(kw_only=True)
class Squared(Counted):
    """Their squares as well, in float64."""

    def begin(self, layer):
        return super().begin(layer) | {"sum": torch.zeros((), dtype=torch.float64, device=layer.device)}

    def observe(self, seen, state):
        super().observe(seen, state)
        state["sum"].add_(seen.x.double().square().sum())


@attrs.frozen(kw_only=True)
class CountedBack(Counted):
    """How many gradients come back."""

    reads: ClassVar = "gradient"


@attrs.frozen(kw_only=True)
class Sketched(CountedBack):
    """A sketch of dL/dW of 8 columns."""

    def begin(self, layer):
        omega = torch.randn(layer.d_in, 8, generator=torch.Generator().manual_seed(0))
        return super().begin(layer) | {"omega": omega, "sketch": torch.zeros(layer.d_out, 8)}

    def observe(self, seen, state):
        super().observe(seen, state)
        state["sketch"].addmm_(seen.g.t(), seen.x @ state["omega"])


@attrs.frozen(kw_only=True)
class Kept(CountedBack):
    """All of dL/dW."""

    def begin(self, layer):
        return super().begin(layer) | {"gradient": torch.zeros(layer.d_out, layer.d_in)}

    def observe(self, seen, state):
        super().observe(seen, state)
        state["gradient"].addmm_(seen.g.t(), seen.x)


METRICS = {
    "inputs, counts rows": Counted(),
    "inputs, sums squares in float64": Squared(),
    "gradients, counts rows": CountedBack(),
    "gradients, keeps a sketch of 8 columns": Sketched(),
    "gradients, keeps all of dL/dW": Kept(),
}


def named(name, **settings):
    return lrkit.current().get("method", name)(**settings)


def signals(base, data, arguments):
    """A step of AdaLoRA by what its metric reads, over one whose metric reads nothing."""
    method = lrkit.methods.adalora(rank=8, target_rank=4)
    every = {"nothing": lrkit.metrics.Random(), **METRICS}
    steps = {name: subjects.ours(base, data, attrs.evolve(method, metric=metric)) for name, metric in every.items()}
    times = harness.interleaved(steps, round(ROUNDS * arguments.rounds))
    for name in METRICS:
        yield harness.Row(
            what=f"a step with a metric that reads {name}, over one that reads nothing",
            target="",
            measured=harness.ratio(times, name, "nothing").times(),
            reached=None,
        )


def calibration(base, data, arguments):
    """A batch of each method's calibration, over a step of LoRA."""
    step = subjects.ours(base, data, lrkit.methods.lora(rank=8))
    times = {name: [] for name in ("lora", "eva", "fim-lora", "gora")}
    for _ in range(max(3, round(ROUNDS * arguments.rounds / 2))):
        for name, taken in times.items():
            if name == "lora":
                begin = time.perf_counter()
                step()
                taken.append(time.perf_counter() - begin)
                continue
            each = []
            for count in (1, 4):
                adapted = lrkit.attach(copy.deepcopy(base), named(name))
                begin = time.perf_counter()
                adapted.calibrate([data] * count)
                each.append(time.perf_counter() - begin)
            taken.append((each[1] - each[0]) / 3)
    for name in list(times)[1:]:
        asked = max(policy.scheduler.calibration for policy in named(name).policies)
        over = harness.ratio(times, name, "lora")
        yield harness.Row(
            what=f"{name}: a batch of calibration over a step of LoRA; {asked} by default",
            target="",
            measured=f"{over.times()}; all {over.median * asked:.1f}",
            reached=None,
            values={"milliseconds": harness.milliseconds(times)} if name == "eva" else {},
        )


def newer(base, data, arguments):
    """A step of each newer method after its first decision, over a step of LoRA; and what lrkit keeps for it."""
    steps = {"lora": subjects.ours(base, data, lrkit.methods.lora(rank=8))}
    for name in ("lisa", "adagradselect", "l1ra", "dylora", "lora-drop"):
        steps[name] = subjects.ours(base, data, named(name))
    times = harness.interleaved(steps, round(ROUNDS * arguments.rounds))
    for name in list(steps)[1:]:
        kept = accounting.memory(steps[name].adapted).adaptive
        yield harness.Row(
            what=f"{name}: a step over a step of LoRA",
            target="",
            measured=f"{harness.ratio(times, name, 'lora').times()}; keeps {kept / 2**20:.1f} MiB",
            reached=None,
            values={"milliseconds": statistics.median(times[name]) * 1000},
        )


def main():
    arguments = harness.options()
    torch.manual_seed(0)
    base, data = subjects.minilm(), subjects.batch(ROWS, TOKENS)
    rows = [row for part in (signals, calibration, newer) for row in part(base, data, arguments)]
    harness.finish(rows, arguments)


if __name__ == "__main__":
    main()
