"""A small study in processes of its own, for tests that kill it:
`python killed_study.py FOLDER OUT WORKERS [EXECUTOR [SEEDS [STEPS [ADDRESS]]]]`."""

import sys
from pathlib import Path


def study(folder, seeds=2, steps=14):
    """Rows that prune, freeze and do neither; checkpoints at every step."""
    from lrkit.study.plan import study_from

    return study_from(
        {
            "base": "adalora",
            "set": {"rank": 4, "target_rank": 2, "warmup": 2, "final": 3, "interval": 1},
            "swap": {"metric": ["magnitude"]},
            "rows": [{"label": "aflora", "base": "aflora"}],
            "tasks": [{"data": str(folder / "data")}],
            "model": str(folder / "model"),
            "seeds": seeds,
            "run": {"steps": steps, "batch_size": 4, "max_length": 12, "eval_every": 5},
        }
    )


def main(folder, out, workers, executor="local", seeds=2, steps=14, address=None):
    from lrkit.study.execute import execute
    from lrkit.study.plan import lay_out

    outcome = execute(
        lay_out(study(Path(folder), seeds=int(seeds), steps=int(steps))),
        Path(out),
        executor=executor,
        workers=int(workers),
        address=address,
        threads=1,
        costs=False,
        checkpoint_seconds=0.0,
    )
    print(outcome.done, outcome.ran, outcome.failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
