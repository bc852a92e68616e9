"""Odd models, optimizers and orders of doing things: each works, or is refused in one line with nothing changed."""

import copy
import os
import stat

import attrs
import models
import pytest
import torch
from signals import InputNorm
from test_attach import METHODS, fit, logits
from test_trainer import trainer
from torch import nn

import lrkit
from lrkit import accounting
from lrkit.adapt import checkpoint
from lrkit.schedulers import Constant


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.classifier = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.classifier(x)


def random_factors(adapted):
    for adapter in adapted.adapters.values():
        for p in adapter.parameters(recurse=False):
            nn.init.normal_(p, std=0.5)


def test_encoder_layer_refused():
    """torch's own encoder layer is refused, since its fast path bypasses adapters."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    with pytest.raises(lrkit.LrkitError, match="all-linear"):
        lrkit.attach(model, lrkit.methods.lora())
    with pytest.raises(lrkit.LrkitError, match="fast path"):
        lrkit.attach(model, lrkit.methods.lora(), targets=["linear1"])


@pytest.mark.parametrize("computed", ["spectral_norm", "weight_norm"])
def test_computed_weight_not_merged(computed):
    """Merging into a weight that is computed at each forward is refused."""
    model = Net()
    getattr(nn.utils.parametrizations, computed)(model.layers[1])
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["layers.0", "layers.1"])
    random_factors(adapted)
    x = torch.randn(4, 8)
    model.eval()
    before = model(x)
    with pytest.raises(lrkit.LrkitError, match=r"layers\.1.*computed"):
        adapted.merge()
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:.* has its weight from")  # tests/test_layers.py asks for it
def test_tied_weight_not_merged():
    """Merging into a weight that two layers share is refused."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(models.gpt2().config)
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["lm_head"])
    with pytest.raises(lrkit.LrkitError, match=r"lm_head.*tied"):
        adapted.merge()
    adapted.detach()


def test_shared_matrices_not_cut():
    """Cutting is refused if layers share their matrices."""
    method = attrs.evolve(
        lrkit.methods.elora(rank=4, shared=True),
        metric=lrkit.metrics.Magnitude(),
        scheduler=lrkit.schedulers.Cubic(target=2, final=5),
        action=lrkit.actions.Prune(),
    )
    model = models.make("bert")
    adapted = lrkit.attach(model, method)
    fit(model, adapted)
    before = logits(model)
    with pytest.raises(lrkit.LrkitError, match="share their matrices"):
        adapted.compact()
    assert torch.equal(logits(model), before)


def test_closure_refused():
    """An optimizer's step with a closure is refused if the method is adaptive."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["aflora"])
    optimizer = torch.optim.LBFGS(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=20)
    with pytest.raises(lrkit.LrkitError, match="closure"):
        optimizer.step(lambda: model(**models.batch()).loss)


def test_overlapping_policies():
    """If two policies take out the same parameters, they are subtracted once."""
    also = lrkit.Policy(
        metric=lrkit.metrics.SensitivityUncertainty(),
        scheduler=lrkit.schedulers.Cubic(target=2),
        action=lrkit.actions.Prune(),
    )
    method = attrs.evolve(lrkit.methods.aflora(rank=4, train="both"), also=(also,))
    counted = accounting.count(method, models.make("bert"), total_steps=20)
    model = models.make("bert")
    adapted = lrkit.attach(model, method)
    fit(model, adapted)
    now, average = adapted.summary().now, adapted.summary().average
    assert counted.end_range[0] <= now <= counted.end_range[1]
    assert counted.average_range[0] <= average <= counted.average_range[1]
    # All matrices are frozen, and half of the components masked: b and half of d are left.
    assert counted.end == pytest.approx(now) == sum(m.d_out + 2 for m in adapted.adapters.values())


def test_penalty_added_once(tmp_path):
    """The hooks of a run that ended in an error are gone with its adapters: the next one adds γ ∇R once."""
    method = lrkit.methods.svd_lora(rank=4, orthogonality=1.0, variant="paper")
    t, adapted = trainer("bert", method, tmp_path, max_steps=1, learning_rate=0.0, max_grad_norm=0.0)
    original = t.compute_loss

    def breaks(*args, **kwargs):
        raise KeyError("broken")

    t.compute_loss = breaks
    with pytest.raises(KeyError):
        t.train()
    t.compute_loss = original
    t.callback_handler.callbacks = [
        c for c in t.callback_handler.callbacks if not isinstance(c, lrkit.trainer.AdaptCallback)
    ]
    adapted.detach()
    adapted = lrkit.attach(t.model, method)
    t.optimizer = t.lr_scheduler = None
    t.add_callback(lrkit.trainer.AdaptCallback(adapted))
    expected = adapted.method.parameterization.penalty(list(adapted.adapters.values()))
    adapter = next(iter(adapted.adapters.values()))
    (gradient,) = torch.autograd.grad(expected, adapter.B)
    seen = {}
    t.create_optimizer()
    t.optimizer.register_step_pre_hook(lambda *_: seen.update(grad=adapter.B.grad.clone()))
    t.train()
    torch.testing.assert_close(seen["grad"], gradient)  # Λ = 0: the loss itself has none for P


def test_best_model_loaded(tmp_path):
    """`load_best_model_at_end` loads the adaptive state too."""
    from test_trainer import Rows

    t, adapted = trainer(
        "bert",
        METHODS["adalora"],
        tmp_path,
        rows=Rows(),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=4,
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_best",
    )
    t.evaluate_was = t.evaluate

    def evaluate(*args, **kwargs):
        metrics = t.evaluate_was(*args, **kwargs)
        return metrics | {"eval_best": 1.0 if t.state.global_step == 8 else 0.0}

    t.evaluate = evaluate
    with pytest.warns(
        lrkit.LrkitWarning, match="ends at step 8 of 20, before the last decision at step 15: the budget was"
    ):
        t.train()
    assert adapted.step == 8
    assert adapted.summary().step == 8
    saved = checkpoint.read(tmp_path / "checkpoint-8")["tensors"]
    for name, p in adapted.named_parameters():
        assert torch.equal(p, saved[f"weight.{name}"])


def test_nested_adapters_refused():
    """Adapters inside of adapters are refused."""
    model = models.make("bert")
    lrkit.attach(model.bert, lrkit.methods.lora(), train_also=())
    with pytest.raises(lrkit.LrkitError, match="already carries"):
        lrkit.attach(model, lrkit.methods.lora())


def test_handle_not_copied():
    """A handle cannot be copied; its model can."""
    adapted = lrkit.attach(models.make("bert"), lrkit.methods.lora())
    with pytest.raises(lrkit.LrkitError, match="cannot be copied"):
        copy.deepcopy(adapted)
    copy.deepcopy(adapted.model)  # the model can


def test_compact_with_adafactor():
    """`compact`, and steps after it, work with Adafactor, whose state has other shapes."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    optimizer = torch.optim.Adafactor(adapted.parameters(), lr=1e-2)
    fit(model, adapted, optimizer=optimizer, total=22)
    adapted.compact()
    fit(model, adapted, steps=2, optimizer=optimizer, bind=False)


@pytest.mark.parametrize("order", ["lrkit first", "optimizer first"])
def test_other_state_shapes(order):
    """States load in any order, though Adafactor's row and column factors have the shape of no tensor."""
    method = attrs.evolve(METHODS["adalora"], action=lrkit.actions.Prune(cut="always"))

    def begin():
        model = models.make("bert")
        adapted = lrkit.attach(model, method)
        return model, adapted, torch.optim.Adafactor(adapted.parameters(), lr=1e-2)

    model, adapted, optimizer = begin()
    fit(model, adapted, optimizer=optimizer, steps=12, total=20)
    assert len(set(adapted.controller.ranks.now().values())) > 1
    ours, theirs = copy.deepcopy(adapted.state_dict()), copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(5)
    fit(model, adapted, optimizer=optimizer, steps=3, bind=False)
    model, again, optimizer = begin()
    again.bind(optimizer, total_steps=20)
    if order == "optimizer first":
        optimizer.load_state_dict(theirs)
    again.load_state_dict(ours)
    if order == "lrkit first":
        optimizer.load_state_dict(theirs)
    torch.manual_seed(5)
    fit(model, again, optimizer=optimizer, steps=3, bind=False)
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), again.parameters(), strict=True))


def test_compact_after_unbind():
    """`compact` cuts the optimizer's state even after `unbind`."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    fit(model, adapted, optimizer=optimizer, total=22)
    adapted.unbind()
    adapted.compact()
    fit(model, adapted, steps=2, optimizer=optimizer, total=22)


def test_compact_too_early():
    """`compact` is refused before training."""
    adapted = lrkit.attach(models.make("bert"), METHODS["adalora"])
    with pytest.raises(lrkit.LrkitError, match="can still come back"):
        adapted.compact()


def test_empty_batch():
    """An empty batch goes through forward and backward."""
    model = Net()
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2))
    out = model(torch.zeros(0, 8))
    assert out.shape == (0, 2)
    out.sum().backward()
    assert all(p.grad is not None for p in adapted.adapter_parameters())


def test_state_compacted_otherwise(tmp_path):
    """A model can load a state that was compacted to other ranks than its own."""
    states = []
    for seed in (0, 1):
        model = models.make("bert", seed=seed)
        adapted = lrkit.attach(model, METHODS["adalora"])
        fit(model, adapted)
        adapted.unbind()
        adapted.compact()
        states.append((model, adapted, adapted.state_dict()))
    assert states[0][2]["meta"]["ranks"] != states[1][2]["meta"]["ranks"]
    model, adapted, _ = states[0]
    adapted.load_state_dict(states[1][2])
    assert adapted.state_dict()["meta"]["ranks"] == states[1][2]["meta"]["ranks"]
    assert adapted.summary().layers == states[1][1].summary().layers


def test_name_is_a_suffix(tmp_path):
    """A save is loaded even if one module's name is the suffix of another's."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.block = nn.ModuleDict({"fc": nn.Linear(4, 4)})

        def forward(self, x):
            return self.fc(self.block["fc"](x))

    model = Deep()
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets="fc")
    adapted.save(tmp_path)
    adapted.detach()
    assert list(lrkit.load(model, tmp_path).adapters) == ["fc"]


def test_file_mode(tmp_path):
    """A saved file has the mode of any other new file."""
    adapted = lrkit.attach(Net(), lrkit.methods.lora(rank=2))
    old = os.umask(0o022)
    try:
        mode = stat.S_IMODE(adapted.save(tmp_path).stat().st_mode)
    finally:
        os.umask(old)
    assert mode == 0o644


def test_growing_budget_refused():
    """A budget that grows is refused as soon as the number of units is known."""
    model = models.make("bert")
    method = attrs.evolve(METHODS["adalora"], scheduler=lrkit.schedulers.Cubic(target=3, start=0.1))
    adapted = lrkit.attach(model, method)
    with pytest.raises(lrkit.LrkitError, match="never grows"):
        adapted.bind(torch.optim.SGD(adapted.parameters(), lr=0.1), total_steps=20)


@pytest.mark.parametrize(
    "arguments", [{"targets": 3}, {"targets": [None]}, {"train_also": 3}, {"train_also": [3]}], ids=str
)
def test_wrong_types(arguments):
    """Arguments of a wrong type are refused in one line."""
    with pytest.raises(lrkit.LrkitError, match="must be"):
        lrkit.attach(Net(), lrkit.methods.lora(), **arguments)


def test_not_a_model():
    """A model's name in the place of a model is refused in one line."""
    with pytest.raises(lrkit.LrkitError, match=r"nn\.Module"):
        lrkit.attach("bert-base-uncased", lrkit.methods.lora())


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_model(how, tmp_path):
    """An offloaded model is refused in one line."""
    import accelerate

    model = models.make("bert")
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    before = [type(module) for module in model.modules()]
    with pytest.raises(lrkit.LrkitError, match=r"bert\.embeddings\S* is offloaded by accelerate"):
        lrkit.attach(model, lrkit.methods.lora())
    assert [type(module) for module in model.modules()] == before


def test_statistics_follow_device():
    """Statistics follow the model to another device, for which the meta device stands; none stay on the old one."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["hybrid"])
    model.to("meta")
    for state in adapted.controller.policies:
        state.follow_device()
        assert state.statistics.layout.device.type == "meta"
        assert {b.device.type for b in state.statistics.buffers.values()} == {"meta"}
        assert state.kept.device.type == "meta"


def test_streams_follow_device():
    """So do the tensors of a metric that reads layers, at the first rows that come on the other device."""
    model = models.make("bert")
    method = attrs.evolve(
        METHODS["lora"], metric=InputNorm(), scheduler=Constant(final=2), action=lrkit.actions.Freeze()
    )
    adapted = lrkit.attach(model, method)
    adapted.bind(torch.optim.AdamW(adapted.parameters()), total_steps=5)
    model.to("meta")
    batch = {key: value.to("meta") for key, value in models.batch().items() if key != "attention_mask"}
    model(**batch).logits.sum().backward()
    (state,) = adapted.controller.policies
    assert {t.device.type for t in state.statistics.held()} == {"meta"}


@attrs.frozen(kw_only=True)
class Halve(lrkit.Action):
    """λ of a loser is halved."""

    fate = "dimmed"
    unit = "component"

    @torch.no_grad()
    def apply(self, blocks, kept, optimizer):
        for block, keep in zip(blocks, kept.split([b.count for b in blocks]), strict=True):
            block.core.mul_(torch.where(keep, 1.0, 0.5))


def test_retained_units_counted():
    """Units that an action dims are trained and counted."""
    model = models.make("bert")
    adapted = lrkit.attach(model, attrs.evolve(METHODS["adalora"], action=Halve()))
    fit(model, adapted)
    now = adapted.summary()
    assert adapted.history[-1].lost
    assert now.now == now.start == now.average == sum(p.numel() for p in adapted.adapter_parameters())
    ranks = adapted.controller.ranks.now()
    adapted.compact()
    assert adapted.controller.ranks.now() == ranks
    counted = accounting.count(attrs.evolve(METHODS["adalora"], action=Halve()), models.make("bert"), total_steps=20)
    assert counted.end == counted.average == counted.start == now.start


def test_nothing_left():
    """A schedule that leaves no component gives a warning."""
    method = attrs.evolve(METHODS["adalora"], scheduler=attrs.evolve(METHODS["adalora"].scheduler, target=0.0))
    adapted = lrkit.attach(models.make("bert"), method)
    with pytest.warns(lrkit.LrkitWarning, match=r"Cubic.target = 0.0: after the last decision.* no component is left"):
        adapted.bind(torch.optim.SGD(adapted.parameters(), lr=0.1), total_steps=20)
