"""What the papers print of their settings, typed from them: the study files are compared with it."""

from __future__ import annotations

from typing import Any

# AdaLoRA (arXiv 2303.10512), the appendix's table for GLUE; batch 32: rate, epochs, γ, t_i, ΔT, t_f. And from the released
# scripts at d10f5eb: α, length, learning-rate warm-up, weight decay.
ADALORA: dict[str, tuple[float, int, float, int, int, int, int, int, float, float]] = {
    "mnli": (5e-4, 7, 0.1, 8000, 100, 50_000, 16, 256, 1000, 0.0),
    "rte": (1.2e-3, 50, 0.3, 600, 1, 1800, 32, 320, 200, 0.01),
    "qnli": (1.2e-3, 5, 0.1, 2000, 100, 8000, 32, 512, 500, 0.01),
    "mrpc": (1e-3, 30, 0.1, 600, 1, 1800, 32, 320, 0.1, 0.01),
    "qqp": (5e-4, 5, 0.1, 8000, 100, 25_000, 16, 320, 2000, 0.01),
    "sst2": (8e-4, 24, 0.1, 6000, 100, 22_000, 16, 128, 1000, 0.01),
    "cola": (5e-4, 25, 0.5, 800, 10, 3500, 32, 64, 100, 0.0),
    "stsb": (2.2e-3, 25, 0.1, 800, 10, 2000, 32, 128, 100, 0.1),
}

# Its table for summaries: batch, epochs, t_i, t_f, all at rate 5e-4, γ 0.1 and ΔT 100. And from the released scripts: tokens
# of a source and of a target, beams.
ADALORA_SUMMARIES = {
    "xsum": (64, 25, 6000, 50_000, 768, 64, 8),
    "cnn_dailymail": (32, 15, 5000, 85_000, 1024, 160, 4),
}

# AFLoRA (arXiv 2403.13269): rate of the classifier, of the rest, epochs. Batch 64, 256 tokens, warm-up .06, decay .1,
# clip .1.
AFLORA: dict[str, tuple[float, float, int]] = {
    "cola": (4e-2, 1e-2, 20),
    "sst2": (4e-3, 4e-3, 10),
    "mrpc": (8e-2, 1e-2, 20),
    "qnli": (4e-3, 1e-3, 10),
    "stsb": (2e-2, 2e-3, 20),
    "rte": (4e-2, 1e-3, 20),
    "mnli": (4e-3, 1e-3, 10),
    "qqp": (4e-3, 4e-3, 10),
}

# Average final rank and initial rank of a budget in per cent of DeBERTaV3-base.
BUDGETS = {"0.08 %": (1, 2), "0.16 %": (2, 4), "0.32 %": (4, 6), "0.65 %": (8, 12)}


def check_adalora(plan: Any, names: list[str]) -> None:
    """That a study's tasks train as AdaLoRA's appendix says, and AdaLoRA's own rows by its schedule."""
    assert plan.study.model == "microsoft/deberta-v3-base"
    assert [task.name for task in plan.tasks] == [f"glue/{name}" for name in names]
    for name, task in zip(names, plan.tasks, strict=True):
        lr, epochs, gamma, warmup, interval, final, alpha, length, ramp, decay = ADALORA[name]
        for row in plan.rows:
            method, run = plan.method(row, task), plan.settings(row, task, 0)
            assert (run.epochs, run.max_length, run.lr_warmup, run.weight_decay) == (epochs, length, ramp, decay), name
            assert (run.steps, run.batch_size) == (None, 32)
            assert run.lr == row.run.get("lr", lr) and run.head_lr == row.run.get("head_lr", lr)
            if method.scheduler is not None:
                s = method.scheduler
                assert (s.warmup, s.interval, s.final) == (warmup, interval, final), (name, row.label)
            form = method.parameterization
            assert getattr(form, "alpha", alpha) == alpha
            if row.label.startswith("γ = 0"):
                assert form.orthogonality == 0
            elif hasattr(form, "orthogonality"):
                assert form.orthogonality == gamma, (name, row.label)


def check_aflora(plan: Any, names: list[str]) -> None:
    """That a study's tasks train as AFLoRA's appendix says, and freeze from one epoch on until 70 % before the end."""
    assert plan.study.model == "microsoft/deberta-v3-base"
    assert [task.name for task in plan.tasks] == [f"glue/{name}" for name in names]
    for name, task in zip(names, plan.tasks, strict=True):
        head, rest, epochs = AFLORA[name]
        for row in plan.rows:
            run = plan.settings(row, task, 0)
            assert (run.lr, run.head_lr) == (row.run.get("lr", rest), row.run.get("head_lr", head)), (name, row.label)
            assert (run.epochs, run.batch_size, run.max_length) == (epochs, 64, 256)
            assert (run.lr_warmup, run.weight_decay, run.grad_clip) == (0.06, 0.1, 0.1)
            method = plan.method(row, task)
            if type(method.action).__name__ == "Freeze":
                assert (method.scheduler.warmup, method.scheduler.final) == (1 / epochs, 0.7)
                assert method.parameterization.rank == 4


def check_minilm(plan: Any) -> None:
    """That a study's first profile runs without a network, and says every rate that it trains at."""
    assert plan.study.model == "minilm" and [task.name for task in plan.tasks] == ["movies"]
    for row in plan.rows:
        run = plan.settings(row, plan.tasks[0], 0)
        assert run.steps == 120
        assert run.lr is not None, f"{row.label}: what a class has as its default is not seen in the file"
        known = row.method.parameterization.learning_rate
        assert run.lr == known, f"{row.label} trains at {run.lr}, and its form's own rate is {known}"
