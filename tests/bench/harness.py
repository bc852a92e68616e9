"""What every benchmark here shares: interleaved timing in one process, paired ratios with their spread, rows and a file.

Machines differ and drift, so nothing here is a time by itself: A, B, A, B, ... in one process, and the median of the
ratios of neighbours. A target that is missed is printed as missed; no benchmark fails.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

Step = Callable[[], Any]


@attrs.frozen(kw_only=True)
class Row:
    """One line of the table.

    Args:
        what: what was measured.
        target: in words.
        measured: with its spread.
        reached: None where there is no target.
        values: the figures behind it.
    """

    what: str
    target: str
    measured: str
    reached: bool | None
    values: dict[str, Any] = attrs.Factory(dict)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, help="write rows and figures to this file")
    parser.add_argument("--rounds", type=float, default=1.0, help="more or fewer rounds: a factor")
    return parser.parse_args()


def interleaved(steps: Mapping[str, Step], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each step, round by round."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(max(3, rounds)):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    return times


@attrs.frozen
class Ratio:
    """The median of paired ratios, and the quartiles."""

    median: float
    low: float
    high: float

    def percent(self) -> str:
        """As an overhead."""
        return f"{self.median - 1:+.1%} ({self.low - 1:+.1%} to {self.high - 1:+.1%})"

    def times(self) -> str:
        """As a factor."""
        return f"x{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> Ratio:
    pairs = [a / b for a, b in zip(times[one], times[other], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return Ratio(middle, low, high)


def milliseconds(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians."""
    return {name: round(statistics.median(values) * 1000, 3) for name, values in times.items()}


def machine() -> dict[str, Any]:
    import peft
    import torch

    import lrkit
    from lrkit.loop import native

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{len(names)} x {names[0]}" if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "lrkit": lrkit.__version__,
        "compiled statistics": native.library() is not None,
    }


def table(rows: list[Row]) -> str:
    cells = [("what", "target", "measured", "reached")]
    cells += [(r.what, r.target, r.measured, {True: "yes", False: "NO", None: ""}[r.reached]) for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in cells)


def finish(rows: list[Row], arguments: argparse.Namespace) -> None:
    """Print the rows, and write them where that was asked for."""
    print(table(rows))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": machine(), "rows": [attrs.asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")
