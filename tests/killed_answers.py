"""A small run of question answering in a process of its own, to be killed: `python killed_answers.py MODEL OUT`."""

import sys
from pathlib import Path

import datasets

import lrkit

SENTENCES = ("the film was good", "the plot was dull", "a film was fine", "a plot was bad")


def task(rows=24):
    """The last word of one of three sentences; a context is three or four windows of 12 tokens."""
    made = []
    for n in range(rows):
        texts = [SENTENCES[(n + k) % 4] for k in range(3)]
        context, asked = " ".join(texts), n % 3
        start = len(" ".join(texts[: asked + 1])) - len(texts[asked].split()[-1])
        answer = {"text": [texts[asked].split()[-1]], "answer_start": [start]}
        made.append({"question": " ".join(texts[asked].split()[:2]), "context": context, "answers": answer})
    split = datasets.Dataset.from_list(made)
    return lrkit.tasks.QuestionAnswering(name="words", train=split, validation=split.select(range(8)), stride=3)


def run(model, out=None, progress=None, done=None):
    """A run that prunes, with a checkpoint at every step if it writes anything down."""
    from lrkit.study.checkpoints import Record
    from lrkit.study.run import RunSettings, train

    return train(
        lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=3, interval=1),
        task(),
        model=str(model),
        settings=RunSettings(steps=14, batch_size=4, max_length=12, eval_every=5, threads=1),
        record=None if out is None else Record(folder=Path(out), checkpoint_seconds=0.0),
        progress=progress,
        done=done,
    )


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir()
    run(*sys.argv[1:], progress=lambda step, *_: print(step, flush=True))
