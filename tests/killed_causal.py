"""A run of a causal language model in a process of its own, for tests that kill it:
`python killed_causal.py MODEL OUT KIND [STEP]`: it kills itself behind a step."""

import json
import os
import signal
import sys
from pathlib import Path

STEPS = 6


def task(kind):
    """Prompts, packed or not, or scored by what is written; or plain text."""
    import datasets
    import test_completion

    from lrkit.tasks import Completion, LanguageModelling

    rows = test_completion.rows(test_completion.SAID * 3)
    if kind == "text":
        texts = datasets.Dataset.from_dict({"text": [a + b for a, b in test_completion.SAID * 3]})
        return LanguageModelling(name="text", train=texts, validation=texts)
    options = {"packed": {"packing": True}, "written": {"metric": "exact_match", "max_new_tokens": 4}, "plain": {}}
    return Completion(name="said", train=rows, validation=test_completion.rows(), **options[kind])


def run(model, kind, record=None, progress=None):
    import lrkit
    from lrkit.study.run import train
    from lrkit.study.run_settings import RunSettings

    settings = RunSettings(steps=STEPS, batch_size=2, max_length=30, lr=1e-2, seed=3, eval_every=4)
    method = lrkit.methods.adalora(rank=4, target_rank=2, warmup=1, final=3, interval=1)
    return train(method, task(kind), model=model, settings=settings, record=record, progress=progress)


def told(result):
    """Everything of a result that must be the same, as JSON; the predictions to the last bit."""
    predictions = result.predictions
    exact = (
        predictions if isinstance(predictions, list) else [[float(each).hex() for each in row] for row in predictions]
    )
    ranks = [layer.rank for layer in result.layers]
    return json.dumps({"scores": result.scores, "losses": list(result.losses), "said": exact, "ranks": ranks})


def main(model, out, kind, at=0):
    from lrkit.study.checkpoints import Record

    def progress(step, total, loss):
        if step == int(at):
            os.kill(os.getpid(), signal.SIGKILL)

    Path(out).mkdir(exist_ok=True)
    print(told(run(model, kind, Record(folder=Path(out), checkpoint_seconds=0.0), progress)))


if __name__ == "__main__":
    main(*sys.argv[1:])
