"""Odd models, optimizers and orders of doing things: each works, or is refused in one line with nothing changed."""

import copy
import os
import stat

import attrs
import models
import pytest
import torch
from test_attach import METHODS, fit, logits
from test_trainer import trainer
from torch import nn

import lrkit
from lrkit import accounting
from lrkit.adapt import checkpoint


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


def test_torch_s_own_encoder_layer_is_refused_since_its_fast_path_passes_adapters_by():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    with pytest.raises(lrkit.LrkitError, match="all-linear"):
        lrkit.attach(model, lrkit.methods.lora())
    with pytest.raises(lrkit.LrkitError, match="fast path"):
        lrkit.attach(model, lrkit.methods.lora(), targets=["linear1"])


@pytest.mark.parametrize("computed", ["spectral_norm", "weight_norm"])
def test_a_computed_weight_cannot_be_merged_into(computed):
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


def test_a_tied_weight_cannot_be_merged_into():
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(models.gpt2().config)
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["lm_head"])
    with pytest.raises(lrkit.LrkitError, match=r"lm_head.*tied"):
        adapted.merge()
    adapted.detach()


def test_layers_that_share_matrices_cannot_be_cut():
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


def test_a_step_with_a_closure_is_refused_for_an_adaptive_method():
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["aflora"])
    optimizer = torch.optim.LBFGS(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=20)
    with pytest.raises(lrkit.LrkitError, match="closure"):
        optimizer.step(lambda: model(**models.batch()).loss)


def test_overlapping_policies_are_not_subtracted_twice():
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


def test_the_trainer_s_penalty_is_added_once_after_a_run_that_broke_off(tmp_path):
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


def test_load_best_model_at_end_takes_the_adaptive_state_along(tmp_path):
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
    t.train()
    assert adapted.step == 8
    assert adapted.summary().step == 8
    saved = checkpoint.read(tmp_path / "checkpoint-8")["tensors"]
    for name, p in adapted.named_parameters():
        assert torch.equal(p, saved[f"weight.{name}"])


def test_adapters_inside_adapters_are_refused():
    model = models.make("bert")
    lrkit.attach(model.bert, lrkit.methods.lora(), train_also=())
    with pytest.raises(lrkit.LrkitError, match="already carries"):
        lrkit.attach(model, lrkit.methods.lora())


def test_a_handle_is_not_copied():
    adapted = lrkit.attach(models.make("bert"), lrkit.methods.lora())
    with pytest.raises(lrkit.LrkitError, match="cannot be copied"):
        copy.deepcopy(adapted)
    copy.deepcopy(adapted.model)  # the model can


def test_compact_goes_with_any_optimizer_s_state():
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    optimizer = torch.optim.Adafactor(adapted.parameters(), lr=1e-2)
    fit(model, adapted, optimizer=optimizer, total=22)
    adapted.compact()
    fit(model, adapted, steps=2, optimizer=optimizer, bind=False)


@pytest.mark.parametrize("order", ["lrkit first", "optimizer first"])
def test_state_in_any_order_with_an_optimizer_whose_state_has_other_shapes(order):
    """Adafactor's row and column factors are of no tensor's shape, and of the cut tensors all the same."""
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


def test_compact_after_unbind_cuts_the_optimizer_s_state_too():
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    fit(model, adapted, optimizer=optimizer, total=22)
    adapted.unbind()
    adapted.compact()
    fit(model, adapted, steps=2, optimizer=optimizer, total=22)


def test_compact_before_training_is_refused():
    adapted = lrkit.attach(models.make("bert"), METHODS["adalora"])
    with pytest.raises(lrkit.LrkitError, match="can still come back"):
        adapted.compact()


def test_an_empty_batch_goes_through():
    model = Net()
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2))
    out = model(torch.zeros(0, 8))
    assert out.shape == (0, 2)
    out.sum().backward()
    assert all(p.grad is not None for p in adapted.adapter_parameters())


def test_a_state_compacted_otherwise_is_taken_over(tmp_path):
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


def test_what_was_saved_is_loaded_where_a_name_is_another_s_suffix(tmp_path):
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


def test_a_saved_file_is_as_readable_as_any_other(tmp_path):
    adapted = lrkit.attach(Net(), lrkit.methods.lora(rank=2))
    old = os.umask(0o022)
    try:
        mode = stat.S_IMODE(adapted.save(tmp_path).stat().st_mode)
    finally:
        os.umask(old)
    assert mode == 0o644


def test_a_budget_that_grows_is_refused_when_the_units_are_known():
    model = models.make("bert")
    method = attrs.evolve(METHODS["adalora"], scheduler=lrkit.schedulers.Cubic(target=3, start=0.1))
    adapted = lrkit.attach(model, method)
    with pytest.raises(lrkit.LrkitError, match="never grows"):
        adapted.bind(torch.optim.SGD(adapted.parameters(), lr=0.1), total_steps=20)


@pytest.mark.parametrize(
    "arguments", [{"targets": 3}, {"targets": [None]}, {"train_also": 3}, {"train_also": [3]}], ids=str
)
def test_wrong_types_are_one_line(arguments):
    with pytest.raises(lrkit.LrkitError, match="must be"):
        lrkit.attach(Net(), lrkit.methods.lora(), **arguments)


def test_no_model_is_one_line():
    with pytest.raises(lrkit.LrkitError, match=r"nn\.Module"):
        lrkit.attach("bert-base-uncased", lrkit.methods.lora())


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_an_offloaded_model_is_one_line(how, tmp_path):
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


def test_statistics_follow_the_model_to_another_device():
    """No GPU here: the meta device stands for one. The layout must be on it, and nothing of the old one be left."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["hybrid"])
    model.to("meta")
    for state in adapted.controller.policies:
        state.follow_device()
        assert state.statistics.layout.device.type == "meta"
        assert {b.device.type for b in state.statistics.buffers.values()} == {"meta"}
        assert state.kept.device.type == "meta"


@attrs.frozen(kw_only=True)
class Halve(lrkit.Action):
    """λ of a loser is halved."""

    fate = "dimmed"
    unit = "component"

    @torch.no_grad()
    def apply(self, blocks, kept, optimizer):
        for block, keep in zip(blocks, kept.split([b.count for b in blocks]), strict=True):
            block.core.mul_(torch.where(keep, 1.0, 0.5))


def test_what_an_action_retains_is_trained_and_counted():
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


def test_a_schedule_that_leaves_nothing_is_said():
    method = attrs.evolve(METHODS["adalora"], scheduler=attrs.evolve(METHODS["adalora"].scheduler, target=0.0))
    adapted = lrkit.attach(models.make("bert"), method)
    with pytest.warns(lrkit.LrkitWarning, match=r"Cubic.target = 0.0: after the last decision.* no component is left"):
        adapted.bind(torch.optim.SGD(adapted.parameters(), lr=0.1), total_steps=20)
