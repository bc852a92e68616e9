"""Several processes, and everything that comes between a loss and an optimizer's step."""

import os
import subprocess
import sys
from pathlib import Path

import models
import parallel_worker
import pytest
import torch
from test_attach import METHODS, fit

import lrkit
from lrkit.parameterizations import LowRank

HERE = Path(__file__).parent


def processes(mode, world, folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    outs = [folder / f"{rank}.pt" for rank in range(world)]
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-P",
                str(HERE / "parallel_worker.py"),
                mode,
                str(rank),
                str(world),
                str(folder / "init"),
                out,
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    errors = [process.communicate(timeout=150)[1] for process in running]
    assert [process.returncode for process in running] == [0] * world, errors
    return [torch.load(out) for out in outs]


MODES = {
    2: (
        *("ddp:adalora", "ddp:aflora", "accumulate:hybrid", "ddp:chance", "ddp:switch", "ddp:blocks"),
        *("ddp:cut end", "ddp:cut always"),
    )
}
"""By how many processes, what they do. tests/integrations/test_more_processes.py has three."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """By how many processes there are, what each of them has found for each mode: one start for all modes."""
    return {
        world: processes(",".join(modes), world, tmp_path_factory.mktemp(f"{world}")) for world, modes in MODES.items()
    }


@pytest.mark.parametrize(("world", "mode"), [(world, mode) for world, modes in MODES.items() for mode in modes])
def test_ddp_ranks_decide_alike_and_end_where_one_process_ends(world, mode, ended):
    """All ranks hold the same, and what one process with all rows holds; also if components are cut on the way."""
    results = [each[mode] for each in ended[world]]
    for other in results[1:]:
        assert results[0]["history"] == other["history"]
        assert all(torch.equal(v, other["weights"][k]) for k, v in results[0]["weights"].items())
    kind, _, name = mode.partition(":")
    chosen = (METHODS | parallel_worker.CUTTING | parallel_worker.CHOSEN)[name]
    model, adapted = parallel_worker.one(chosen, accumulate=2 if kind == "accumulate" else 1)
    assert results[0]["history"] == [(d.step, d.budget, d.kept, d.lost, d.returned) for d in adapted.history]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(results[0]["weights"][key], value, rtol=1e-3, atol=1e-4)
    counts = [sum(step) for step in results[0]["sent"]]
    if name == "aflora":  # a frozen matrix's gradient is neither computed nor sent
        assert counts[0] - counts[-1] == 8
    if name == "blocks":
        assert min(counts) < max(counts) == len(results[0]["sent"][0]) and any(d.returned for d in adapted.history)
    if name == "switch":
        assert len(set(counts)) == 1 and any(d.returned for d in adapted.history)
        assert counts[0] < len(results[0]["sent"][0])


def test_deepspeed_and_fsdp1_are_refused_in_one_line():
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    engine = type("DeepSpeedZeroOptimizer", (torch.optim.SGD,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    with pytest.raises(lrkit.LrkitError, match="DeepSpeed"):
        adapted.bind(engine(adapted.parameters(), lr=0.1), total_steps=20)
    fsdp = type("FullyShardedDataParallel", (torch.nn.Module,), {})
    model.bert.add_module("wrapped", fsdp())
    with pytest.raises(lrkit.LrkitError, match="FSDP1"):
        adapted.bind(torch.optim.SGD(adapted.parameters(), lr=0.1), total_steps=20)


# ---- between the loss and the step ----


def run(method="adalora", steps=20, between=None, accumulate=1, model=None, **bind):
    model = model or models.make("bert", seed=1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    model.train()
    torch.manual_seed(4)
    adapted = lrkit.attach(model, METHODS[method])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=20)
    for step in range(steps):
        rows = models.batch(seed=step, rows=8)
        for part in range(accumulate):
            mine = {k: v[part::accumulate] for k, v in rows.items()}
            loss = (model(**mine).loss + adapted.penalty()) / accumulate
            loss.backward()
        if between is not None:
            between(model)
        optimizer.step()
        optimizer.zero_grad()
    return model, adapted


def alike(one, two):
    assert [(d.step, d.kept, d.lost, d.returned) for d in one[1].history] == [
        (d.step, d.kept, d.lost, d.returned) for d in two[1].history
    ]
    for key, value in one[0].state_dict().items():
        torch.testing.assert_close(value, two[0].state_dict()[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["adalora", "aflora"])
def test_gradient_accumulation_is_one_step_of_the_whole_batch(method):
    whole, parts = run(method), run(method, accumulate=4)
    assert parts[1].step == 20
    alike(whole, parts)


def test_gradients_are_seen_as_clipped():
    def clip(model):
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e-3)

    _, adapted = run("aflora", steps=2, between=clip)  # b = 0: the first gradient of A and B is zero
    importance = adapted.state_dict()["tensors"]["policy.0.buffer.importance"]
    assert 0 < importance.norm() <= 0.15e-3


def test_gradient_checkpointing_changes_nothing():
    model = models.make("bert", seed=1)
    models.checkpoint_activations(model)
    alike(run("adalora"), run("adalora", model=model))


def test_bf16_autocast_trains():
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["hybrid"])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=20)
    losses = []
    for step in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**models.batch(seed=step % 3)).loss + adapted.penalty()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert min(losses[-3:]) < losses[0]
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}
    assert adapted.history[-1].kept == 24


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused optimizer"])
def test_a_step_that_grad_scaler_skips_is_no_step(fused):
    """With a fused optimizer the scaler leaves gradients scaled, and the optimizer skips by itself, after the hooks."""
    reference, reference_adapted = run("adalora", steps=6)
    model = models.make("bert", seed=1).eval()
    torch.manual_seed(4)
    adapted = lrkit.attach(model, METHODS["adalora"])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, fused=fused)
    adapted.bind(optimizer, total_steps=20)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    steps = 0
    for attempt in range(9):
        scaler.scale(model(**models.batch(seed=steps)).loss + adapted.penalty()).backward()
        overflow = attempt in (1, 2, 5)
        if overflow:
            next(adapted.parameters()).grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps += not overflow
        assert adapted.step == steps
    alike((reference, reference_adapted), (model, adapted))


# What torch's own tracer does with autograd functions, and says of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("method", ["lora", "adalora", "aflora"])
def test_torch_compile_takes_the_adapted_model_whole(method):
    model = models.make("bert", seed=1).eval()
    adapted = lrkit.attach(model, METHODS[method])
    for m in adapted.adapters.values():
        torch.nn.init.normal_(m.B if m.core is None or m.out_scale is None else m.out_scale, std=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    data = models.batch()
    one = model(**data)
    one.loss.backward()
    wanted = [p.grad.clone() for p in adapted.parameters()]
    model.zero_grad()
    two = compiled(**data)
    two.loss.backward()
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-4, atol=1e-5)
    for p, gradient in zip(adapted.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


# ---- no silent nothing ----


def test_a_method_that_was_never_bound_says_so_at_the_first_step():
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["aflora"])
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).step()  # somebody else's
    model(**models.batch()).loss.backward()
    with pytest.warns(lrkit.LrkitWarning, match="not bound"):
        optimizer.step()
    optimizer.step()
    adapted.detach()
    optimizer.step()


def test_another_optimizer_than_the_bound_one_is_noticed():
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["aflora"])
    bound, other = (torch.optim.SGD(adapted.parameters(), lr=0.1) for _ in range(2))
    adapted.bind(bound, total_steps=20)
    model(**models.batch()).loss.backward()
    bound.step()  # says nothing
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).step()  # somebody else's
    with pytest.warns(lrkit.LrkitWarning, match="not bound to it"):
        other.step()
    assert adapted.step == 1


def test_an_optimizer_within_the_bound_one_is_its_own_matter():
    class Outer(torch.optim.SGD):
        """As sharpness-aware minimisers have it: another optimizer over the same parameters does the step."""

        def step(self, closure=None):
            self.inner.step()

    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["aflora"])
    outer = Outer(adapted.parameters(), lr=0.1)
    outer.inner = torch.optim.AdamW(outer.param_groups, lr=0.1)
    adapted.bind(outer, total_steps=20)
    model(**models.batch()).loss.backward()
    outer.step()
    assert adapted.step == 1


def test_steps_beyond_the_total_are_said():
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["aflora"])
    with pytest.warns(lrkit.LrkitWarning, match="step 21 of a run that was bound for total_steps=20"):
        fit(model, adapted, steps=22)


@pytest.mark.parametrize("end", ["unbind", "merge"])
def test_training_that_ends_before_the_budget_is_reached_is_said(end):
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    fit(model, adapted, steps=7)
    with pytest.warns(lrkit.LrkitWarning, match="ends at step 7 of 20, before the last decision at step 15"):
        getattr(adapted, end)()


def test_the_method_runs_where_only_model_and_optimizer_are_kept():
    import gc

    def setup():
        model = models.make("bert")
        adapted = lrkit.attach(model, METHODS["aflora"])
        optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
        adapted.bind(optimizer, total_steps=20)
        return model, optimizer

    model, optimizer = setup()
    gc.collect()
    for step in range(20):
        model(**models.batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ffn = [m for n, m in model.named_modules() if isinstance(m, LowRank) and "attention" not in n]
    assert all(not m.A.requires_grad for m in ffn)
