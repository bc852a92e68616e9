"""What a study adds to the training of its cells, and how it scales with workers.

Overhead: whole cells (MiniLM, movies) against the same training by a plain Trainer with AdaptCallback, in one process,
turn and turn about. Workers: the same cells by one worker of one thread and by two, from the first cell's beginning to the
last one's end.
"""

import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import attrs
import harness

STEPS, PAIRS, CELLS, CELL_STEPS = 40, 3, 8, 12
RUN = {"steps": STEPS, "max_length": 64, "validation_rows": 256}


def bare(method, task, settings):
    """The same training with nothing of the study around it."""
    import torch
    import transformers
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    import lrkit
    from lrkit.settings import in_steps
    from lrkit.study.loaded import model_for, tokens_for

    pretrained = model_for("minilm", task)
    tokens = tokens_for(task, "minilm", settings, STEPS)
    begin = time.perf_counter()
    net = pretrained.restart(settings.seed)
    torch.manual_seed(settings.seed)
    adapted = lrkit.attach(net, method)
    optimizer = torch.optim.AdamW(
        [{"params": adapted.adapter_parameters(), "lr": 1e-2}, {"params": adapted.head_parameters(), "lr": 1e-3}],
        weight_decay=0.0,
    )
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, in_steps(settings.lr_warmup, STEPS), STEPS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=net,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=settings.eval_batch_size,
                seed=settings.seed,
                save_strategy="no",
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=tokens.train,
            data_collator=DataCollatorWithPadding(pretrained.tokenizer),
            optimizers=(optimizer, schedule),
            callbacks=[lrkit.trainer.AdaptCallback(adapted)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        trainer.predict(tokens.validation)
    seconds = time.perf_counter() - begin
    adapted.detach()
    return seconds


def overhead(folder, rounds):
    """Seconds of a cell over seconds of the bare training, a pair at a time."""
    import lrkit
    from lrkit.study.cell import make_cell
    from lrkit.study.loaded import tokens_for
    from lrkit.study.plan import TaskSpec
    from lrkit.study.run import settings_from
    from lrkit.study.store import canonical
    from lrkit.study.worker import load_kept, run_cell

    method, spec = lrkit.methods.adalora(rank=8, target_rank=4), TaskSpec(task="movies")
    pairs = []
    for seed in range(rounds + 1):
        settings = settings_from({**RUN, "seed": seed})
        cell = make_cell(lrkit.to_plain(method), spec, "minilm", "all-linear", attrs.asdict(settings))
        task = load_kept(canonical(cell.task), None)
        # Loading and tokenizing are once a worker, not once a cell.
        tokens_for(task, "minilm", settings, STEPS)

        def whole(cell=cell):
            begin = time.perf_counter()
            answer = run_cell(cell.to_plain(), str(folder / cell.key), {})
            assert answer["status"] == "done", answer
            return time.perf_counter() - begin

        if seed % 2:
            took = whole()
            pairs.append((took, bare(method, task, settings)))
        else:
            first = bare(method, task, settings)
            pairs.append((whole(), first))
    return [a / b for a, b in pairs[1:]]  # the first pair warms up


def cells_a_minute(folder, workers, cells):
    """Cells a minute of so many workers of one thread, without their start."""
    from lrkit.study.execute import execute
    from lrkit.study.plan import lay_out, study_from

    run = {"steps": CELL_STEPS, "max_length": 64, "validation_rows": 256}
    study = study_from({"base": "adalora", "set": {"rank": 8, "target_rank": 4}, "run": run, "seeds": cells})
    execute(lay_out(study), folder, workers=workers, threads=1, costs=False)
    begun, ended = [], []
    for path in folder.glob("cells/*/attempts.jsonl"):
        begin = json.loads(path.read_text().splitlines()[0])
        begun.append(path.parent.joinpath("config.json").stat().st_mtime)
        ended.append(path.parent.joinpath("result.json").stat().st_mtime)
        assert begin["event"] == "begin"
    # A worker's first cell loads the model: from the end of the first cells on, all are alike.
    order = sorted(ended)
    rest = order[workers - 1 :]
    return 60 * (len(rest) - 1) / (rest[-1] - rest[0])


def main():
    arguments = harness.options()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        ratios = overhead(Path(folder) / "overhead", max(2, round(PAIRS * arguments.rounds)))
        cells = max(5, round(CELLS * arguments.rounds))
        one, two = (cells_a_minute(Path(folder) / str(workers), workers, cells) for workers in (1, 2))
    middle = statistics.median(ratios)
    rows = [
        harness.Row(
            what="an ablation cell over its bare training",
            target="at most +3%",
            measured=f"{middle - 1:+.1%} ({min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%})",
            reached=middle <= 1.03,
            values={"ratios": ratios},
        ),
        harness.Row(
            what="cells a minute, two workers of one thread over one",
            target="at least x1.8",
            measured=f"x{two / one:.2f}",
            reached=two / one >= 1.8,
            values={"cells a minute": [one, two]},
        ),
    ]
    harness.finish(rows, arguments)


if __name__ == "__main__":
    main()
