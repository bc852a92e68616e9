"""Steps that are broken off, scaled gradients, layers reached late, masks of other calls: nothing is silently wrong."""

import contextlib
import copy
import io

import attrs
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lrkit
import lrkit.trainer
from lrkit.errors import LrkitError
from lrkit.study.asked import study_from
from lrkit.study.plan import lay_out
from lrkit.testing import resumes

LAYERS = [f"layers.{i}" for i in range(3)]


class Chain(nn.Module):
    """Three layers in a row, of which a call may leave some out."""

    def __init__(self, d=16):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(3))
        self.head = nn.Linear(d, 2)

    def forward(self, x, labels, use=(True, True, True)):
        for layer, there in zip(self.layers, use, strict=True):
            x = torch.tanh(layer(x)) if there else x
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


@attrs.frozen(kw_only=True)
class Count(lrkit.metrics.LayerMetric):
    """How many rows a layer has seen. Source: none."""

    reads = "inputs"

    def begin(self, layer):
        return {"rows": torch.zeros((), device=layer.device)}

    def observe(self, seen, state):
        state["rows"].add_(len(seen.x))

    def score(self, layer, state):
        return state["rows"].expand(layer.units).clone()


@attrs.frozen(kw_only=True)
class CountBack(Count):
    """How many rows of a layer have had a gradient. Source: none."""

    reads = "gradient"


def said(metric):
    """A layer that no gradient reaches is said where gradients are computed."""
    return pytest.warns(lrkit.LrkitWarning) if metric.reads == "gradient" else contextlib.nullcontext()


COUNTS = pytest.mark.parametrize("metric", [Count(), CountBack()], ids=["inputs", "gradients"])


def batch(number, **more):
    generator = torch.Generator().manual_seed(number)
    return {
        "x": torch.randn(8, 16, generator=generator),
        "labels": torch.randint(0, 2, (8,), generator=generator),
        **more,
    }


def attached(method):
    model = Chain()
    torch.manual_seed(1)
    return model, lrkit.attach(model, method, targets=LAYERS, train_also=["head"])


def adalora(**settings):
    return lrkit.methods.adalora(rank=4, target_rank=2, warmup=1, final=3, **settings)


def statistics(adapted):
    """The buffers of the metric, by name."""
    return {name: t.clone() for name, t in adapted.state_dict()["tensors"].items() if ".buffer." in name}


def alike(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=1e-4, atol=0)


# ---- gradient scalers ----


def scaled(method, make, enabled, steps=3):
    """Train under a GradScaler, without `unscale_`, and return the statistics."""
    model, adapted = attached(method)
    optimizers = make(list(adapted.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1, enabled=enabled)
    adapted.bind(optimizers, total_steps=10)
    for step in range(steps):
        scaler.scale(model(**batch(step))["loss"] + adapted.penalty()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return statistics(adapted)


def two(fused):
    def make(parameters):
        wide, flat = ([p for p in parameters if (p.ndim > 1) == matrix] for matrix in (True, False))
        return [torch.optim.AdamW(each, lr=1e-2, fused=own) for each, own in zip((wide, flat), fused, strict=True)]

    return make


@pytest.mark.parametrize("fused", [(False, False), (False, True), (True, True)])
def test_two_scaled_optimizers(fused):
    """A scaler unscales the gradients of one optimizer after the other; statistics are those of a run without it."""
    alike(scaled(adalora(), two(fused), enabled=True), scaled(adalora(), two(fused), enabled=False))


@pytest.mark.parametrize("variant", ["peft", "released"])
def test_fused_optimizer_after_its_step(variant):
    """A fused optimizer writes unscaled gradients back, so that a metric that looks afterwards divides by nothing."""

    def fused(parameters):
        return [torch.optim.AdamW(parameters, lr=1e-2, fused=True)]

    method = adalora(variant=variant)
    alike(scaled(method, fused, enabled=True), scaled(method, fused, enabled=False))


# ---- steps that an exception breaks off ----


class Breaks(torch.optim.AdamW):
    """Raises at its next step if it is told to, after the hooks before the step."""

    broken = False

    def step(self, closure=None):
        if self.broken:
            self.broken = False
            raise RuntimeError("broken off")
        return super().step(closure)


@pytest.mark.parametrize("where", ["inside", "between"])
def test_reload_after_a_broken_step(where):
    """A step that breaks off, then the last state and optimizers loaded in the same process: the run is undisturbed."""

    def run(disturbed):
        model, adapted = attached(adalora())
        parameters = list(adapted.parameters())
        optimizers = [Breaks(parameters[:4], lr=1e-2), torch.optim.AdamW(parameters[4:], lr=1e-2)]
        adapted.bind(optimizers, total_steps=10)
        for step in range(10):
            if step == 4 and disturbed:
                kept = adapted.state_dict(), [copy.deepcopy(o.state_dict()) for o in optimizers]
                (model(**batch(77))["loss"] + adapted.penalty()).backward()
                optimizers[0].broken = where == "inside"
                with contextlib.suppress(RuntimeError):
                    optimizers[0].step()
                adapted.load_state_dict(kept[0])
                for optimizer, state in zip(optimizers, kept[1], strict=True):
                    optimizer.load_state_dict(state)
                    optimizer.zero_grad()
            (model(**batch(step))["loss"] + adapted.penalty()).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return adapted

    undisturbed, disturbed = run(False), run(True)
    assert undisturbed.history == disturbed.history
    assert undisturbed.step == disturbed.step == 10
    for (name, p), q in zip(undisturbed.named_parameters(), disturbed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_step_after_a_broken_one():
    """Without a reload the next step is seen whole all the same, and counted once."""
    model, adapted = attached(adalora())
    optimizer = Breaks(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=10)
    for step in range(3):
        before = statistics(adapted)
        (model(**batch(step))["loss"] + adapted.penalty()).backward()
        optimizer.broken = step == 1
        with contextlib.suppress(RuntimeError):
            optimizer.step()
        optimizer.zero_grad()
    assert adapted.step == 2
    assert any(not torch.equal(values, before[name]) for name, values in statistics(adapted).items())


def test_a_closure_that_raises():
    """An unbound optimizer is told of, although a closure has failed before in the bound one's step."""
    model, adapted = attached(adalora())
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=10)

    def closure():
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        optimizer.step(closure)
    other = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    (model(**batch(0))["loss"] + adapted.penalty()).backward()
    with pytest.warns(lrkit.LrkitWarning, match="the method is not bound to it"):
        other.step()


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("broken off")


def test_gradients_after_a_broken_backward():
    """A metric of gradients before clipping sees the next step's, although a backward pass has failed on its way."""

    def run(disturbed):
        model, adapted = attached(attrs.evolve(adalora(), metric=lrkit.metrics.Sensitivity(measure="before-clipping")))
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=10)
        if disturbed:
            hook = model.layers[0].register_forward_hook(lambda module, args, y: _Fails.apply(y))
            with pytest.raises(RuntimeError, match="broken off"):
                model(_Fails.apply(torch.zeros(8, 16)), batch(9)["labels"])["loss"].backward()
            hook.remove()
            optimizer.zero_grad()
        (model(**batch(0))["loss"] + adapted.penalty()).backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1e-3)
        optimizer.step()
        return statistics(adapted)

    alike(run(False), run(True))


# ---- layers that are reached late ----

LATE = ((True, False, True), (True, True, True))


def counting(calibration, target=0.5, metric=None):
    scheduler = lrkit.schedulers.Once(target=target, calibration=calibration)
    return lrkit.Method(
        parameterization=lrkit.parameterizations.SVD(rank=4),
        metric=metric or Count(),
        scheduler=scheduler,
        action=lrkit.actions.Prune(),
    )


@COUNTS
@pytest.mark.parametrize("uses", [LATE, LATE[::-1]])
def test_batches_of_a_late_layer_count(uses, metric):
    """The batch that reaches a layer counts, whether it is the first one or not: its 8 rows are the lowest score."""
    _, adapted = attached(counting(calibration=2, target=1.0, metric=metric))
    with said(metric) if uses is LATE else contextlib.nullcontext():
        adapted.calibrate([batch(number, use=use) for number, use in enumerate(uses)])
    assert adapted.history[0].threshold == 8


def test_rows_of_a_late_layer():
    """While training, too, a layer's rows count from the step that first reaches it."""
    method = attrs.evolve(counting(calibration=1), scheduler=lrkit.schedulers.Constant(target=0.5, final=2))
    model, adapted = attached(method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=10)
    seen = []
    for step, use in enumerate((LATE[0], LATE[1], LATE[1])):
        with pytest.warns(lrkit.LrkitWarning) if step == 0 else contextlib.nullcontext():
            (model(**batch(step, use=use))["loss"] + adapted.penalty()).backward()
            optimizer.step()
        optimizer.zero_grad()
        state = adapted.controller.policies[0].statistics.state
        seen.append({name: int(tensors["rows"]) for name, tensors in state.items()})
    assert seen == [dict(zip(LAYERS, rows, strict=True)) for rows in ((8, 0, 8), (16, 8, 16), (24, 16, 24))]


@COUNTS
def test_a_layer_that_sees_nothing_is_said(metric):
    """A layer that no batch of a calibration goes through is named, whatever is read."""
    _, adapted = attached(counting(calibration=2, target=1.0, metric=metric))
    with pytest.warns(lrkit.LrkitWarning, match=f"no (input|gradient) .* 1 of .*{LAYERS[1]}"):
        adapted.calibrate([batch(0, use=LATE[0]), batch(1, use=LATE[0])])


@COUNTS
def test_calibration_after_a_failed_one(metric):
    """Nothing that a calibration saw before it failed is left, not even that a layer was not reached."""

    def batches(fails):
        yield batch(0, use=LATE[0])
        if fails:
            raise RuntimeError("broken off")
        yield batch(1)

    _, adapted = attached(counting(calibration=2, metric=metric))
    with said(metric), pytest.raises(RuntimeError, match="broken off"):
        adapted.calibrate(batches(fails=True))
    assert adapted.controller.liveness.dead is None
    _, other = attached(counting(calibration=2, metric=metric))
    for each in (adapted, other):
        each.calibrate([batch(1), batch(2)])
    assert adapted.history == other.history


@COUNTS
def test_a_failed_calibration_beside_another_policy(metric):
    """A policy that was not calibrated ranks all layers again, too: its statistics are those of the beginning."""
    gradients = lrkit.Policy(
        metric=lrkit.metrics.GradientUncertainty(),
        scheduler=lrkit.schedulers.Cubic(target=0.5, warmup=2, final=2),
        action=lrkit.actions.Freeze(),
    )
    _, adapted = attached(attrs.evolve(counting(calibration=2, metric=metric), also=(gradients,)))

    def buffers():
        return {name: values.clone() for name, values in adapted.controller.policies[1].statistics.buffers.items()}

    def batches():
        yield batch(0, use=LATE[0])
        raise RuntimeError("broken off")

    before = buffers()
    with said(metric), pytest.raises(RuntimeError, match="broken off"):
        adapted.calibrate(batches())
    after = buffers()
    assert {name: values.shape for name, values in after.items()} == {n: v.shape for n, v in before.items()}
    assert before and not any(values.any() for values in after.values())


# ---- masks of other calls ----

PADDED = torch.tensor([[1] * 2 + [0] * 6, [1] * 8])


def llama(reentrant):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=2, **sizes))
    method = attrs.evolve(counting(calibration=1), scheduler=lrkit.schedulers.Constant(target=0.5, final=2))
    adapted = lrkit.attach(model, method, targets=["q_proj", "down_proj"])
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    adapted.bind(torch.optim.AdamW(adapted.parameters(), lr=1e-2), total_steps=10)
    return model, adapted


def ids(number):
    return torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(number))


def rows(adapted):
    return {int(tensors["rows"]) for tensors in adapted.controller.policies[0].statistics.state.values()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_evaluation_before_backward(reentrant):
    """A call without gradients between forward and backward leaves the mask of the one that waits."""
    model, adapted = llama(reentrant)
    loss = model(input_ids=ids(1), attention_mask=PADDED, labels=ids(1)).loss + adapted.penalty()
    with torch.no_grad():
        model.eval()(input_ids=ids(2))
    model.train()
    loss.backward()
    assert rows(adapted) == {10}


@pytest.mark.parametrize("masks", [(PADDED, None), (None, PADDED), (PADDED, PADDED)])
def test_two_calls_before_backward(masks):
    """Two calls, one of which is padded, recomputed at one backward pass: which mask is whose is not known, and told."""
    full = torch.ones(2, 8, dtype=torch.long)
    for reentrant in (False, True):
        model, adapted = llama(reentrant)
        calls = [(number, full if mask is None else mask) for number, mask in enumerate(masks)]
        loss = sum(model(input_ids=ids(n), attention_mask=mask).logits.square().mean() for n, mask in calls)
        with pytest.raises(LrkitError, match="after 2 calls") if reentrant else contextlib.nullcontext():
            (loss + adapted.penalty()).backward()
        assert reentrant or rows(adapted) == {sum(int(mask.sum()) for _, mask in calls)}


# ---- what an action is told, and what may lose ----


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
def test_components_that_began_from_the_base(init):
    """A component of zeros takes the piece of the base's weight that it began with away, which is said before a step."""
    method = lrkit.Method(
        parameterization=lrkit.parameterizations.LoRA(rank=4, init=init),
        metric=lrkit.metrics.Sensitivity(),
        scheduler=lrkit.schedulers.Linear(target=0.5),
        action=lrkit.actions.Zero(),
    )
    _, adapted = attached(method)
    optimizer, base = torch.optim.AdamW(adapted.parameters(), lr=1e-2), "takes that piece of the base's weight with it"
    with contextlib.nullcontext() if init == "kaiming" else pytest.warns(lrkit.LrkitWarning, match=base):
        adapted.bind(optimizer, total_steps=10)


@attrs.frozen(kw_only=True)
class Thaw(lrkit.actions.Switch):
    """A matrix that trains stops with probability 1/2, and one that is frozen comes back with probability p.

    Source: none, a control.

    Args:
        p: the probability.
    """

    unit: str = "matrix"
    exact = False
    p: float = 0.25

    def decide(self, ballot):
        chance = torch.rand(len(ballot.scores), generator=ballot.generator)
        kept = torch.where(ballot.kept, chance < 0.5, chance < self.p)
        return lrkit.actions.Verdict(kept & ballot.candidates, budget=len(kept))

    def turnover(self, units, budget, layers):
        return None


def thawing(action):
    return lrkit.Method(
        parameterization=lrkit.parameterizations.LoRA(rank=2),
        metric=lrkit.metrics.Random(),
        scheduler=lrkit.schedulers.Constant(target=1.0, interval=1, ending="open"),
        action=action,
    )


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_an_action_knows_who_is_frozen(p):
    """Of those that are frozen none comes back with p = 0, and all with p = 1; the draws are those of the seed."""
    model, adapted = attached(thawing(Thaw(p=p)))
    adapted.bind(optimizer := torch.optim.AdamW(adapted.parameters(), lr=1e-2), total_steps=8)
    frozen: set[str] = set()
    for step in range(8):
        (model(**batch(step))["loss"] + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        decision = adapted.history[-1]
        assert set(decision.returned) <= frozen
        assert p != 0.0 or not decision.returned
        assert p != 1.0 or set(decision.returned) == frozen
        frozen = frozen - set(decision.returned) | set(decision.lost)
    assert p == 1.0 or frozen


def test_thawing_resumes():
    """A resumed run draws the same, and knows who was frozen."""
    with lrkit.current().lend("action", "thaw", Thaw):
        resumes(thawing(Thaw()), total_steps=8, points=(3,))


def test_units_that_are_no_candidates():
    """A verdict that keeps a unit that may not be kept is refused at the step, with the action named."""

    @attrs.frozen(kw_only=True)
    class Stubborn(lrkit.actions.Prune):
        def decide(self, ballot):
            return lrkit.actions.Verdict(torch.ones_like(ballot.kept))

        @property
        def final(self):
            return True

        def proximal(self, blocks, share, optimizer):
            return torch.arange(sum(block.count for block in blocks)) > 0

    model, adapted = attached(attrs.evolve(adalora(), action=Stubborn()))
    adapted.bind(optimizer := torch.optim.AdamW(adapted.parameters(), lr=1e-2), total_steps=10)
    for step in range(2):
        (model(**batch(step))["loss"] + adapted.penalty()).backward()
        refused = r"Stubborn\(.*\) at step 2: it keeps 1 units that are no candidates"
        with pytest.raises(LrkitError, match=refused) if step else contextlib.nullcontext():
            optimizer.step()


# ---- states and copies ----


def test_ranks_taken_before_bind():
    """`model.load_state_dict` at other ranks resizes the state of the optimizer that is bound later, too."""
    model, adapted = attached(attrs.evolve(adalora(), action=lrkit.actions.Prune(cut="always")))
    adapted.take_ranks()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=12)

    def train(steps):
        for step in steps:
            (model(**batch(step))["loss"] + adapted.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(range(3))
    weights, state = copy.deepcopy(model.state_dict()), adapted.state_dict()
    train(range(3, 12))
    model.load_state_dict(weights)
    adapted.load_state_dict(state)
    train(range(3, 5))
    assert adapted.step == 5


def test_models_with_taps_travel():
    """An adapted model whose layers are read, and its original, can be pickled; a copy reads nothing."""
    model, adapted = attached(
        attrs.evolve(counting(calibration=1), scheduler=lrkit.schedulers.Constant(target=0.5, final=2))
    )
    adapted.bind(torch.optim.AdamW(adapted.parameters(), lr=1e-2), total_steps=10)
    original = adapted.original()
    assert not original._forward_pre_hooks and not original._forward_hooks
    for each in (model, original):
        file = io.BytesIO()
        torch.save(each, file)
        file.seek(0)
        found = torch.load(file, weights_only=False)
        assert torch.equal(found(**batch(0))["loss"], each(**batch(0))["loss"])


# ---- decisions by nothing ----


@pytest.mark.parametrize("start", [1.0, 0.5])
def test_step_0_by_nothing(start):
    """A metric that has seen nothing cannot say who loses at step 0: it is told, unless nobody loses."""

    @attrs.frozen(kw_only=True)
    class Early(lrkit.schedulers.Linear):
        """A line that begins at step 0. Source: none."""

        at_start = True

    method = attrs.evolve(adalora(), scheduler=Early(start=start, target=0.25))
    _, adapted = attached(method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    told = "Early decides at step 0, when SensitivityUncertainty.* has seen nothing"
    with pytest.warns(lrkit.LrkitWarning, match=told) if start < 1 else contextlib.nullcontext():
        adapted.bind(optimizer, total_steps=10)
    assert adapted.history[0].step == 0


def test_parts_are_swapped_and_not_set():
    """A part of the method in `set` is answered with the word for it."""
    study = {"base": "adalora", "rows": [{"from": "adalora", "label": "frozen", "set": {"action": "zero"}}]}
    with pytest.raises(LrkitError, match=r'no setting "action", a part: swap it, swap = \{"action" = "NAME"\}'):
        lay_out(study_from(study))


def test_a_trainer_asks_for_names_first(tmp_path):
    """What cannot be saved without a name is told before the first step, and not at the first checkpoint."""
    model, adapted = attached(attrs.evolve(adalora(), metric=Nameless()))
    rows = [{name: values[0] for name, values in batch(number).items()} for number in range(8)]
    where = {"output_dir": str(tmp_path), "max_steps": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    for strategy in ("steps", "no"):
        trainer = Trainer(
            model,
            TrainingArguments(**where, save_strategy=strategy, save_steps=2),
            train_dataset=rows,
            callbacks=[lrkit.trainer.AdaptCallback(adapted)],
        )
        refused = pytest.raises(LrkitError, match=r"Nameless.* is not registered")
        with refused if strategy == "steps" else contextlib.nullcontext():
            trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@attrs.frozen(kw_only=True)
class Nameless(lrkit.metrics.SensitivityUncertainty):
    """As its base. Source: none."""
