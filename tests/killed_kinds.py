"""A run of one kind of task in a process of its own, for tests that kill it: `python killed_kinds.py KIND MODEL FOLDER`."""

import hashlib
import json
import sys
from pathlib import Path

STEPS = 12


def tags():
    from test_token_classification import sentences_task

    return sentences_task()


def words():
    from test_verbalized import films

    return films()


KINDS = {"tags": tags, "words": words}


def run(kind, model, folder):
    """Train with a checkpoint after each step, and write down what came out; say each step that is done."""
    import numpy as np

    import lrkit
    from lrkit.study.run import Record, RunSettings, train

    found = {}

    def digest(adapted):
        tensors = adapted.state_dict()["tensors"]
        parts = [name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors)]
        found["state"] = hashlib.sha256(b"".join(parts)).hexdigest()

    result = train(
        lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=3, interval=1),
        KINDS[kind](),
        model=str(model),
        settings=RunSettings(
            steps=STEPS, batch_size=4, lr=1e-2, max_length=64 if kind == "words" else 10, eval_every=5
        ),
        record=Record(folder=Path(folder), checkpoint_seconds=0.0),
        progress=lambda step, *_: print(step, flush=True),
        done=digest,
    )
    said = result.predictions
    found |= {
        "scores": result.scores,
        "losses": result.losses,
        "said": said.tolist() if isinstance(said, np.ndarray) else said,
    }
    (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(*sys.argv[1:])
