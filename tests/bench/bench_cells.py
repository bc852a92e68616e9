"""What a study of up to 10,000 cells costs to plan, to run and to report, with a training function that does nothing.

Cells are those of a real study (rows that differ in rank and rate, 50 seeds, a tiny BERT, a folder of data), on a pool of
two threads; what trains them is replaced by a function that gives one small result with another score each time. So all
that is left is lrkit's own work: by cell it must not grow with the number of cells. Times are of the CPU.

    PYTHONPATH=tests/bench:tests python -P tests/bench/bench_cells.py                # 100 to 1,000 cells: a minute
    PYTHONPATH=tests/bench:tests python -P tests/bench/bench_cells.py --rounds 10    # 1,000 to 10,000: a quarter of an hour
"""

import json
import random
import resource
import shutil
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import folders
import harness

SIZES, SEEDS = (100, 200, 500, 1_000), 50


def study(place, cells):
    """A study of so many cells: a row for every 50 of them."""
    from lrkit.study.plan import study_from

    rows = max(2, cells // SEEDS)
    swaps = [{"label": f"row {i}", "set": {"rank": 2 + i % 4}, "run": {"lr": 1e-4 * (1 + i)}} for i in range(1, rows)]
    return study_from(
        {
            "base": "lora",
            "set": {"rank": 2},
            "rows": [{"base": "lora", **each} for each in swaps],
            "tasks": [{"data": str(place / "data")}],
            "model": str(place / "model"),
            "seeds": max(2, cells // rows),
            "run": {"steps": 10, "batch_size": 4, "max_length": 12},
        }
    )


class Nothing:
    """What takes the training's place: the result of one real run, with a score of its own."""

    def __init__(self, place):
        import lrkit
        from lrkit.study.run import train
        from lrkit.study.run_settings import settings_from
        from lrkit.study.task_spec import TaskSpec, load_task_of

        self.result = train(
            lrkit.methods.lora(rank=2),
            load_task_of(TaskSpec(data=str(place / "data"))),
            model=str(place / "model"),
            settings=settings_from({"steps": 10, "batch_size": 4, "max_length": 12}),
        )
        self.chance = random.Random(0)

    def __call__(self, method, task, *, settings, done, record, **_):
        record.folder.joinpath("lrkit.safetensors").write_bytes(b"")
        score = self.chance.gauss(0.7, 0.05)
        return attrs.evolve(self.result, scores={**self.result.scores, next(iter(self.result.scores)): score})


def measure(place, out, cells):
    """Seconds and bytes of one study."""
    from lrkit.study.execute import check, execute
    from lrkit.study.graph import jobs_of
    from lrkit.study.plan import lay_out
    from lrkit.study.report import write_report

    took = {}

    def timed(name, function):
        begin = time.process_time()
        value = function()
        took[name] = time.process_time() - begin
        return value

    asked = study(place, cells)
    plan = timed("plan: rows", lambda: lay_out(asked))
    timed("plan: check", lambda: check(plan))
    jobs = timed("plan: cells", lambda: [job.key for job in jobs_of(plan)])
    with ThreadPoolExecutor(2) as pool:
        timed("run", lambda: execute(plan, out, executor=pool, costs=False))
        timed("run again, all done", lambda: execute(plan, out, executor=pool, costs=False))
    files = [path for path in out.joinpath("cells").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    timed("report", lambda: write_report(out))
    page = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    return {
        "cells": len(jobs),
        "rows": len(plan.rows),
        **took,
        "files per cell": len(files) / len(jobs),
        "bytes per cell": size / len(jobs),
        "bytes of study.json per cell": out.joinpath("study.json").stat().st_size / len(jobs),
        "bytes beside the cells": page,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main():
    import lrkit.study.run

    arguments = harness.options()
    warnings.simplefilter("ignore")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        place = folders.write_place(Path(folder), layers=2)
        lrkit.study.run.train = Nothing(place)
        for cells in (max(4, round(size * arguments.rounds)) for size in SIZES):
            out = Path(folder) / str(cells)
            found.append(measure(place, out, cells))
            shutil.rmtree(out)
            print(json.dumps({name: round(value, 2) for name, value in found[-1].items()}), flush=True)
    first, last = found[0], found[-1]
    rows = []
    for what in ("plan: rows", "plan: check", "plan: cells", "run", "run again, all done", "report"):
        each = [1000 * one[what] / one["cells"] for one in found]
        rows.append(
            harness.Row(
                what=f"{what}: ms a cell, {last['cells']:,} cells over {first['cells']:,}",
                target="at most x1.3",
                measured=f"x{each[-1] / each[0]:.2f} ({', '.join(f'{ms:.2f}' for ms in each)} ms)",
                reached=each[-1] <= 1.3 * each[0],
                values={"ms a cell": each, "seconds": [one[what] for one in found]},
            )
        )
    files = f"{last['files per cell']:.1f} files, {last['bytes per cell']:,.0f} bytes"
    rows.append(harness.Row(what="files of a cell", target="", measured=files, reached=None, values={"all": found}))
    harness.finish(rows, arguments)


if __name__ == "__main__":
    main()
