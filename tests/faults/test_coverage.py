"""What attach passes over, and what no gradient reaches, is said, and stands back in rankings."""

import attrs
import pytest
import torch
import zoo
from torch import nn
from zoo import IDS, said

import lrkit

LORA = lrkit.methods.lora(rank=2)
ADALORA = lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=3)


def covered_by_hand(model, adapted):
    """Entries of the weights in module lists, and of those that an adapter stands on: with torch alone."""
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    mine = tuple(f"{name}." for name in adapted)
    sizes = {
        name: p.numel()
        for name, p in model.named_parameters()
        if name.startswith(lists) and p.ndim > 1 and not name.endswith("bias")
    }
    return sum(size for name, size in sizes.items() if name.startswith(mine)) / sum(sizes.values())


@pytest.mark.parametrize("name", ["xlnet", "convnext"])
def test_what_is_left_out_is_said(name):
    """More than a tenth of the blocks' weights outside of all linear layers makes one warning with share and place."""
    model = zoo.make(name)
    plain = zoo.make(name)
    adapted, words = said(lambda: lrkit.attach(model, LORA))
    share = covered_by_hand(plain, adapted.adapters)
    assert adapted.coverage.share == pytest.approx(share) and share < 0.9
    assert f"adapts {100 * share:.0f} %" in words
    for parameter in {"gate_up_proj", "rel_attn", "dwconv"}:
        inside = any(parameter in n for n, p in plain.named_parameters() if p.ndim > 2)
        assert (parameter in words) == inside
    summary = adapted.summary()
    assert f"{100 * share:.0f} %" in str(summary)
    assert summary.to_plain()["coverage"]["share"] == adapted.coverage.share
    assert sum(each.share for each in summary.coverage.left_out) == pytest.approx(1 - share)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-moe",
        "mixtral",
        "gpt-oss",
        "jamba",
        "gpt2-lm",
        "t5-lm",
        "wav2vec2",
        "swin",
        "siglip",
        "llava",
        "modernbert",
    ],
)
def test_what_is_covered_is_silent(name):
    """A model whose blocks are linear layers but for a tenth is attached to without a word, and shown all the same."""
    adapted = lrkit.attach(zoo.make(name), LORA)
    assert 0.9 < adapted.coverage.share <= 1
    assert "of the blocks' weights adapted" in str(adapted.summary())


def test_experts_are_layers():
    """Stacks of experts are found by name, by expression and by all-linear, and a method for FFNs has a place in them."""
    adapted = lrkit.attach(zoo.make("qwen3-moe"), LORA, targets=["gate_up_proj"])
    assert all(name.endswith("mlp.experts.gate_up_proj") for name in adapted.adapters)
    adapted = lrkit.attach(zoo.make("mixtral"), LORA, targets=r".*experts\.down_proj")
    assert len(adapted.adapters) == sum(
        n.endswith("experts.down_proj") for n, _ in zoo.make("mixtral").named_parameters()
    )
    adapted = lrkit.attach(zoo.make("mixtral"), lrkit.methods.aflora(rank=2))
    assert any("experts" in name for name in adapted.scores())


def test_routers_by_class_are_left_out():
    """An nn.Linear that returns tuples is named and left out; named alone, it is an error."""
    adapted, words = said(lambda: lrkit.attach(zoo.make("llama4"), LORA))
    assert (
        "model.layers.0.feed_forward.router, model.layers.1.feed_forward.router (Llama4Router: it returns a tuple)"
        in words
    )
    assert not any("router" in name for name in adapted.adapters)
    adapted, words = said(lambda: lrkit.attach(zoo.make("llama4"), LORA, targets=["q_proj", "router"]))
    assert "router" in words and len(adapted.adapters) == 2
    for targets in (["router"], r".*\.router"):
        with pytest.raises(lrkit.LrkitError, match=r"names nothing but .*returns a tuple"):
            lrkit.attach(zoo.make("llama4"), LORA, targets=targets)


class Soft(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Wide(nn.Linear):
    def forward(self, x):
        return torch.cat([super().forward(x)] * 2, -1)


class Nearly(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 16).round() / 16, self.bias)


class Loud(nn.Linear):
    def forward(self, x):
        if len(x) < 16:
            raise RuntimeError("my kernel wants sixteen rows")
        return super().forward(x)


@pytest.mark.parametrize(("kind", "taken"), [(Soft, False), (Wide, False), (Nearly, True), (Loud, True)])
def test_linear_is_what_acts_so(kind, taken):
    """A subclass counts by what it does to two rows; one that cannot run here is believed."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([kind(16, 16), nn.Linear(16, 16)])
    state = torch.random.get_rng_state()
    adapted, _ = said(lambda: lrkit.attach(model, lrkit.methods.elora(rank=2), train_also=()))
    assert ("layers.0" in adapted.adapters) == taken
    adapted.detach()
    # What looks at a layer leaves the caller's random numbers alone.
    torch.random.set_rng_state(state)
    one = torch.rand(1)
    torch.random.set_rng_state(state)
    from lrkit.layers.behaviour import strangeness

    strangeness(model.layers[0], 16, 16)
    assert torch.equal(one, torch.rand(1))


class Packed(nn.Module):
    """A quantized layer that is no nn.Linear, with its weight in buffers."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 16, 16
        self.register_buffer("qweight", torch.zeros(2, 16, dtype=torch.int32))


def test_quantized_layers_of_others_count():
    """A layer that packs its weight counts by its sizes, and is adapted if it acts as a linear map."""
    model = nn.Module()
    model.layers = nn.ModuleList([Packed(), nn.Linear(16, 16), Packed(), Packed()])
    adapted, _ = said(lambda: lrkit.attach(model, LORA))
    assert len(adapted.adapters) == 4 and adapted.coverage.share == 1


def test_models_of_peft_are_refused():
    """PEFT's own matrices are never adapted."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(zoo.make("llama-lm"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(lrkit.LrkitError, match="PEFT"):
        lrkit.attach(model, LORA)
    lrkit.attach(model.unload(), LORA)


# ---- what no gradient reaches ----


def train(model, adapted, optimizer, steps, data=lambda step: {"input_ids": IDS, "labels": IDS}):
    for step in range(steps):
        (model(**data(step)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_layers_read_without_a_call_are_named(name, bound):
    """Whoever reads dt_proj's weight passes its adapter by: each such layer is named once, bound or not."""
    model = zoo.make(name)
    adapted, _ = said(lambda: lrkit.attach(model, LORA))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    if bound:
        adapted.bind(optimizer, total_steps=3)
    _, words = said(lambda: train(model, adapted, optimizer, 3))
    passed_by = {name for name, adapter in adapted.adapters.items() if not adapter.B.any()}
    assert passed_by and all(name.endswith("dt_proj") for name in passed_by)
    assert all(words.count(name) == 1 for name in passed_by)
    assert not any(name in words for name in adapted.adapters if name not in passed_by)


def test_nothing_dead_is_kept():
    """With a penalty that moves a dead layer's matrices, its components lose to every live one all the same."""
    model = zoo.make("mamba")
    adapted = lrkit.attach(model, ADALORA)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=10)
    said(lambda: train(model, adapted, optimizer, 10))
    kept = {layer.name: layer.rank for layer in adapted.summary().layers}
    assert sum(kept.values()) == 16 == adapted.history[-1].kept
    assert all(rank == 0 for name, rank in kept.items() if "dt_proj" in name)
    for decision in adapted.history:  # the budget is exact as long as there are so many live components
        assert decision.kept == decision.budget


def test_dead_matrices_freeze_first():
    """Under freezing, what is kept training is live."""
    model = zoo.make("jamba")
    method = lrkit.methods.aflora(rank=2, train="both", warmup=1, final=3)
    adapted, _ = said(lambda: lrkit.attach(model, method))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=10)
    said(lambda: train(model, adapted, optimizer, 10))
    decision = next(d for d in adapted.history if d.lost)
    dead = [name for name in decision.lost if "dt_proj" in name]
    assert len(dead) == 2 * sum("dt_proj" in name for name in adapted.adapters)


def test_a_resumed_run_with_dead_layers_is_the_run():
    """Who is dead is in the state: a run that goes on from it is bitwise the run."""

    def begin():
        model = zoo.make("mamba").eval()
        adapted = lrkit.attach(model, ADALORA)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=10)
        return model, adapted, optimizer

    model, adapted, optimizer = begin()
    said(lambda: train(model, adapted, optimizer, 5))
    state = adapted.state_dict()
    assert state["meta"]["dead"] == ["backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"]
    said(lambda: train(model, adapted, optimizer, 5))
    other, again, optimizer = begin()
    again.load_state_dict(state)
    said(lambda: train(other, again, optimizer, 5))
    assert again.history == adapted.history
    for one, two in zip(adapted.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    for wrong in (["nowhere"], 3):
        state["meta"]["dead"] = wrong
        with pytest.raises(lrkit.LrkitError, match="dead must"):
            again.load_state_dict(state)


def test_a_layer_that_comes_alive_takes_part():
    """Text first, then images: the vision tower's layers rank from their first gradient on."""

    def data(step):
        if step < 3:
            return {"input_ids": IDS, "labels": IDS}
        ids = torch.cat([torch.full((2, 16), 63), IDS], 1)
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        return {"input_ids": ids, "labels": ids, "pixel_values": pixels}

    model = zoo.make("llava")
    adapted = lrkit.attach(model, ADALORA)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=14)
    _, words = said(lambda: train(model, adapted, optimizer, 3, data))
    tower = [name for name in adapted.adapters if "vision_tower" in name]
    assert tower and all(name in words for name in tower)
    score = adapted.scores()
    assert all(score[f"{name}[0]"] == -torch.inf for name in tower)
    said(lambda: train(model, adapted, optimizer, 3, lambda step: data(step + 3)))
    score = adapted.scores()
    reached = [name for name in tower if score[f"{name}[0]"] > 0]
    assert len(reached) >= len(tower) // 2  # the last layer of the tower is not what LLaVA reads
    said(lambda: train(model, adapted, optimizer, 8, lambda step: data(step + 6)))
    assert adapted.history[-1].kept == adapted.history[-1].budget


def test_healthy_models_have_no_dead():
    """Every layer that a gradient reaches is left alone, with its statistics where they were."""
    import models

    model = models.make("bert")
    adapted = lrkit.attach(model, ADALORA)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=10)
    assert adapted.state_dict()["meta"]["dead"] is None
    train(model, adapted, optimizer, 1, models.batch)
    assert adapted.state_dict()["meta"]["dead"] == []


def test_a_long_list_stays_readable():
    """Many dead layers are told by pattern and number."""
    from lrkit.errors import listing

    assert listing(["a.0.b", "a.1.b"]) == "a.0.b, a.1.b"
    assert (
        listing([f"model.layers.{i}.mixer.dt_proj" for i in range(64)]) == "model.layers.<i>.mixer.dt_proj (64 layers)"
    )


def test_a_policy_beside_growth_goes_on():
    """A method that ranks whole layers treats a dead one as it treats one that was cut away."""
    model = zoo.make("mamba")
    method = attrs.evolve(ADALORA, action=lrkit.actions.Prune(cut="end"))
    adapted = lrkit.attach(model, method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=10)
    said(lambda: train(model, adapted, optimizer, 10))
    assert [layer.rank for layer in adapted.summary().layers if "dt_proj" in layer.name] == [0, 0]
