"""attach, bind, train, summary, state, compact, merge, detach, save, load: on the model shapes people have."""

import copy

import attrs
import models
import pytest
import torch
from torch import nn

import lrkit

HYBRID = attrs.evolve(
    lrkit.methods.aflora(rank=4, warmup=2, final=6),
    also=(
        lrkit.Policy(
            metric=lrkit.metrics.SensitivityUncertainty(),
            scheduler=lrkit.schedulers.Cubic(target=2, warmup=3, final=4, interval=2),
            action=lrkit.actions.Prune(),
        ),
    ),
)
METHODS = {
    "full": lrkit.methods.full(),
    "lora": lrkit.methods.lora(rank=4),
    "svd-lora": lrkit.methods.svd_lora(rank=4),
    "elora": lrkit.methods.elora(rank=16),
    "vera": lrkit.methods.elora(rank=16, shared=True),
    "adalora": lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5),
    "aflora": lrkit.methods.aflora(rank=4, warmup=2, final=6),
    "hybrid": HYBRID,
    "pissa": lrkit.methods.lora(rank=4, alpha=2.0, init="pissa"),
    "dora": attrs.evolve(
        lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5),
        parameterization=lrkit.parameterizations.DoRA(rank=4, form="svd"),
    ),
}


def logits(model, data=None):
    data = {k: v for k, v in (data or models.batch(seed=5)).items() if k != "labels"}
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(**data).logits.clone()
    model.train(training)
    return out


def fit(model, adapted, steps=20, lr=1e-2, optimizer=None, total=20, bind=True):
    optimizer = optimizer or torch.optim.AdamW(adapted.parameters(), lr=lr)
    if bind:
        adapted.bind(optimizer, total_steps=total)
    model.train()
    losses = []
    for step in range(steps):
        loss = model(**models.batch(seed=step % 3)).loss
        losses.append(loss.item())
        (loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", models.MODELS)
def test_whole_life(name, method, tmp_path):
    """Every model is attached, trained, saved, taken back, loaded and merged, by every method."""
    model = models.make(name)
    original, flags = weights(model), [p.requires_grad for p in model.parameters()]
    before = logits(model)
    adapted = lrkit.attach(model, METHODS[method])
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)  # ΔW = 0 at first
    torch.manual_seed(1)
    losses = fit(model, adapted)
    assert min(losses[-3:]) < losses[0]
    assert adapted.step == 20
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)

    adapted.save(tmp_path)
    assert adapted.detach() is model
    now = weights(model)
    assert now.keys() == original.keys()
    assert all(torch.equal(now[key], original[key]) for key in original)
    assert [p.requires_grad for p in model.parameters()] == flags

    again = lrkit.load(model, tmp_path)
    assert torch.equal(logits(model), trained)
    assert again.summary() == adapted_summary(adapted, again)
    assert again.history == adapted.history
    if method != "full":
        assert again.merge() is model
        torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
        assert weights(model).keys() == original.keys()


def adapted_summary(adapted, again):
    from lrkit.adapt.summary import summarize

    return summarize(adapted.controller, again.summary().head)


def test_all_parameters_counted():
    """Parameters outside of adapted layers are counted too."""
    model = models.make("bert")
    adapted = lrkit.attach(model, lrkit.methods.full())
    everything = sum(p.numel() for p in model.parameters())
    summary = adapted.summary()
    assert summary.start == summary.now == summary.average == everything - summary.head
    assert summary.to_plain()["beside"] == summary.start - sum(layer.start for layer in summary.layers) > 0
    assert "in no layer" in str(summary)


def test_plain_copy():
    """`original` gives a copy of the model as it was, and leaves the adapted one alone."""
    model = models.make("bert")
    model.bert.embeddings.requires_grad_(False)
    before = weights(model)
    flags = [p.requires_grad for p in model.parameters()]
    adapted = lrkit.attach(model, METHODS["adalora"])
    fit(model, adapted)
    during = weights(model)
    copy = adapted.original()
    assert list(weights(copy)) == list(before) and all(torch.equal(t, before[n]) for n, t in weights(copy).items())
    assert [p.requires_grad for p in copy.parameters()] == flags
    lrkit.attach(copy, METHODS["adalora"])  # it carries no adapters
    assert all(torch.equal(t, during[n]) for n, t in weights(model).items())


@pytest.mark.parametrize("name", models.MODELS)
def test_all_linear(name):
    """The targets "all-linear" are every linear layer of the blocks, and nothing else."""
    model = models.make(name)
    adapted = lrkit.attach(model, lrkit.methods.lora())
    per_block = {"gpt2": 4, "llama": 7}.get(name, 6)
    assert len(adapted.adapters) == 2 * per_block
    outside = [n for n in adapted.adapters if any(w in n.split(".") for w in ("classifier", "score", "pooler"))]
    assert outside == []
    head = {"bert": ["bert.pooler", "classifier"], "gpt2": ["score"], "llama": ["score"], "roberta": ["classifier"]}
    head |= {"mpnet": ["classifier"], "deberta": ["pooler", "classifier"]}
    assert adapted.head == head[name]


@pytest.mark.parametrize(("where", "count"), [("ffn", (2, 3)), ("attention", (4, 4)), ("both", (6, 7))])
@pytest.mark.parametrize("name", models.MODELS)
def test_aflora_chooses_by_name(name, where, count):
    """AFLoRA chooses by name which matrices train: square FFNs and grouped-query attention cannot mislead it."""
    adapted = lrkit.attach(models.make(name), lrkit.methods.aflora(rank=3, train=where))
    training = [n for n, m in adapted.adapters.items() if m.A.requires_grad]
    expected = {"gpt2": {"ffn": 2, "attention": 2, "both": 4}, "llama": {"ffn": 3, "attention": 4, "both": 7}}
    expected_count = expected.get(name, {"ffn": 2, "attention": 4, "both": 6})[where]
    assert len(training) == 2 * expected_count
    assert all(m.core.requires_grad and m.out_scale.requires_grad for m in adapted.adapters.values())
    attention = [n for n in training if "attn" in n or "attention" in n]
    assert len(attention) == (0 if where == "ffn" else 2 * {"gpt2": 2}.get(name, 4))


def test_history_is_true():
    """After freezing and pruning the model is what the history says."""
    model = models.make("bert")
    adapted = lrkit.attach(model, HYBRID)
    fit(model, adapted)
    frozen = {name for d in adapted.history for name in d.lost if d.policy == 0}
    matrices = {
        f"{n}.{p}" for n, m in adapted.adapters.items() for p in "AB" if n.endswith(("dense",)) and "att" not in n
    }
    assert frozen == matrices
    for name, module in adapted.adapters.items():
        assert not module.A.requires_grad and not module.B.requires_grad, name
    kept = sum(int((m.core != 0).sum()) for m in adapted.adapters.values())
    assert kept == adapted.history[-1].kept == 2 * 12
    summary = adapted.summary()
    assert sum(layer.rank for layer in summary.layers) == 24
    assert {layer.frozen for layer in summary.layers} == {(), ("B", "A")}


def test_paper_counts():
    """Σ rank · (d_in + d_out + 1) for kept triplets, and the average over steps from the history alone."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    start = sum(4 * (m.d_in + m.d_out + 1) for m in adapted.adapters.values())
    assert adapted.summary().start == adapted.summary().now == start
    fit(model, adapted)
    sizes = {n: m.d_in + m.d_out + 1 for n, m in adapted.adapters.items()}
    active = {f"{n}[{i}]" for n in sizes for i in range(4)}
    changes = {d.step: d for d in adapted.history}
    total = 0
    for step in range(1, 21):
        total += sum(sizes[name.partition("[")[0]] for name in active)  # what trained during this step
        if step in changes:
            active = active - set(changes[step].lost) | set(changes[step].returned)
    assert adapted.summary().now == sum(sizes[name.partition("[")[0]] for name in active)
    assert adapted.summary().average == pytest.approx(total / 20, rel=1e-12)
    table = str(adapted.summary()).splitlines()
    assert table[0].split() == ["layer", "of", "bert.encoder.layer", "state", "at", "start", "now", "on", "average"]
    assert [f"bert.encoder.layer.{row.split()[0]}" for row in table[1:-3]] == list(adapted.adapters)
    assert max(map(len, table)) <= 80


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_compact_keeps_outputs(name, tmp_path):
    """`compact` cuts masked components and keeps the outputs."""
    model = models.make(name)
    adapted = lrkit.attach(model, METHODS["adalora"])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    fit(model, adapted, optimizer=optimizer, total=22)
    before = logits(model)
    parameters = sum(p.numel() for p in adapted.adapter_parameters())
    ranks = adapted.compact()
    assert sum(ranks.values()) == 2 * len(ranks)
    assert sum(p.numel() for p in adapted.adapter_parameters()) == adapted.summary().now < parameters
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    for p in adapted.parameters():  # the optimizer's state is cut with its parameters, and goes on
        for value in optimizer.state.get(p, {}).values():
            assert value.ndim == 0 or value.shape == p.shape
    fit(model, adapted, steps=2, optimizer=optimizer, bind=False)
    after = logits(model)
    adapted.save(tmp_path)
    adapted.detach()
    lrkit.load(model, tmp_path)
    assert torch.equal(logits(model), after)


def test_compact_too_early():
    """`compact` is refused while components can still come back."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    fit(model, adapted, steps=6)
    with pytest.raises(lrkit.LrkitError, match="can still come back"):
        adapted.compact()


@pytest.mark.parametrize("method", ["adalora", "aflora", "hybrid", "lora"])
@pytest.mark.parametrize("order", ["state first", "bind first"])
def test_resume_is_exact(method, order):
    """A resumed run is bitwise the run, in any order of loading."""

    def start():
        model = models.make("bert", seed=3)
        adapted = lrkit.attach(model, METHODS[method])
        return model, adapted, torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.1)

    model, adapted, optimizer = start()
    model.eval()  # no dropout: the generators' state is the caller's business
    adapted.bind(optimizer, total_steps=20)

    def steps(model, adapted, optimizer, begin, end):
        for step in range(begin, end):
            (model(**models.batch(seed=step)).loss + adapted.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(model, adapted, optimizer, 0, 9)
    saved, saved_optimizer = adapted.state_dict(), copy.deepcopy(optimizer.state_dict())
    steps(model, adapted, optimizer, 9, 20)

    model2, adapted2, optimizer2 = start()
    model2.eval()
    if order == "bind first":
        adapted2.bind(optimizer2, total_steps=20)
        adapted2.load_state_dict(saved)
    else:
        adapted2.load_state_dict(saved)
        adapted2.bind(optimizer2, total_steps=20)
    optimizer2.load_state_dict(saved_optimizer)
    steps(model2, adapted2, optimizer2, 9, 20)
    for (name, a), (_, b) in zip(model.state_dict().items(), model2.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert adapted.history == adapted2.history
    assert adapted.summary() == adapted2.summary()
    one, two = adapted.state_dict(), adapted2.state_dict()
    assert one["meta"] == two["meta"]
    assert all(torch.equal(one["tensors"][k], two["tensors"][k]) for k in one["tensors"])


# ---- what is refused, with the model as it was ----


def refused(model, method, match, **kwargs):
    before = [name for name, _ in model.named_modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(lrkit.LrkitError, match=match):
        lrkit.attach(model, method, **kwargs)
    assert before == ([name for name, _ in model.named_modules()], [p.requires_grad for p in model.parameters()])
    lrkit.attach(model, method, targets=[n for n, m in model.named_modules() if isinstance(m, nn.Linear)][:1])


def test_refusals_change_nothing():
    """If `attach` refuses, the model stays as it was."""
    lora = lrkit.methods.lora()
    refused(models.make("bert"), lora, "matches no linear layer.*query", targets="qeury")
    refused(models.make("bert"), lora, 'did you mean "query"', targets=["qeury"])
    refused(models.make("bert"), lora, "is a LayerNorm", targets=["LayerNorm"])
    refused(models.make("bert"), lora, "no regular expression|not a regular expression", targets="*query")
    refused(models.make("bert"), lora, "empty list", targets=[])
    refused(models.make("bert"), lora, "both a target and part of the head", targets=["classifier", "query"])
    refused(models.make("bert"), lora, "train_also.*matches no module", train_also=["clasifier"])
    refused(nn.Sequential(nn.Linear(4, 4)), lora, "all-linear.*name the layers")
    net = nn.ModuleDict({"stem": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    refused(net, lora, "NonDynamicallyQuantizableLinear", targets=["out_proj"])


def test_nothing_to_freeze():
    """If only attention is adapted, freezing in the FFN is refused."""
    model = models.make("bert")
    with pytest.raises(lrkit.LrkitError, match="nothing to act on"):
        lrkit.attach(model, lrkit.methods.aflora(), targets=["query", "value"])
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, nn.Linear)
    assert all(p.requires_grad for p in model.parameters())


def test_adapted_once():
    """A model that carries adapters is refused, and a handle is of no use after `detach`."""
    model = models.make("bert")
    adapted = lrkit.attach(model, lrkit.methods.lora())
    with pytest.raises(lrkit.LrkitError, match=r"already carries .* lrkit\.export each and switch .* load_adapter"):
        lrkit.attach(model, lrkit.methods.lora())
    adapted.detach()
    with pytest.raises(lrkit.LrkitError, match="merged or detached"):
        adapted.penalty()


def test_bind_refuses():
    """`bind` refuses a wrong optimizer or length, and a second optimizer."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    with pytest.raises(lrkit.LrkitError, match="does not hold"):
        adapted.bind(torch.optim.SGD(adapted.head_parameters(), lr=0.1), total_steps=10)
    good = torch.optim.SGD(adapted.parameters(), lr=0.1)
    with pytest.raises(lrkit.LrkitError, match="total_steps"):
        adapted.bind(good, total_steps=0)
    with pytest.raises(lrkit.LrkitError, match=r"warmup 2 \+ final 5 steps are more than total_steps 6"):
        adapted.bind(good, total_steps=6)
    with pytest.raises(lrkit.LrkitError, match="torch optimizer"):
        adapted.bind(None, total_steps=20)
    adapted.bind(good, total_steps=20)
    with pytest.raises(lrkit.LrkitError, match="already bound"):
        adapted.bind(good, total_steps=20)


def test_unfitting_state(tmp_path):
    """A state that does not fit is refused and changes nothing."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    fit(model, adapted, steps=7)
    good = adapted.state_dict()
    others = {
        "another method: metric": lrkit.attach(
            models.make("bert"), attrs.evolve(METHODS["adalora"], metric=lrkit.metrics.Magnitude())
        ).state_dict(),
        "other layers": lrkit.attach(models.make("bert"), METHODS["adalora"], targets=["query"]).state_dict(),
        "no state of lrkit": {"weights": {}},
        "does not fit": {
            "meta": good["meta"],
            "tensors": {k: v[..., :1] if k.endswith(".A") else v for k, v in good["tensors"].items()},
        },
    }
    for match, state in others.items():
        before = adapted.state_dict()
        with pytest.raises(lrkit.LrkitError, match=match):
            adapted.load_state_dict(state)
        after = adapted.state_dict()
        assert before["meta"] == after["meta"]
        assert all(torch.equal(before["tensors"][k], after["tensors"][k]) for k in before["tensors"])
    path = adapted.save(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    plain = models.make("bert")
    with pytest.raises(lrkit.LrkitError, match="truncated"):
        lrkit.load(plain, tmp_path)
    assert isinstance(plain.bert.encoder.layer[0].attention.self.query, nn.Linear)


def test_forgotten_penalty():
    """A forgotten penalty gives one warning."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=20)
    model(**models.batch()).loss.backward()
    with pytest.warns(lrkit.LrkitWarning, match="penalty"):
        optimizer.step()
    optimizer.step()  # a second warning would be an error here


def test_broken_gradients():
    """Missing gradients, and gradients that are not finite, give one warning and are skipped."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["aflora"])
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=20)
    with pytest.warns(lrkit.LrkitWarning, match="no gradient at step 1"):
        optimizer.step()
    model(**models.batch()).loss.backward()
    next(m.A for n, m in adapted.adapters.items() if m.A.requires_grad).grad.fill_(torch.nan)
    before = adapted.state_dict()["tensors"]["policy.0.buffer.importance"]
    with pytest.warns(lrkit.LrkitWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(adapted.state_dict()["tensors"]["policy.0.buffer.importance"], before)


def test_layer_in_two_places():
    """A layer that stands in two places is adapted in both."""
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 2))
    x = torch.randn(3, 6)
    before = model(x)
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["0"])
    assert model[0] is model[2]
    torch.nn.init.normal_(adapted.adapters["0"].B)
    changed = model(x)
    assert not torch.allclose(changed, before)
    adapted.merge()
    torch.testing.assert_close(model(x), changed)
    assert model[0] is model[2] is shared


def test_half_precision_base():
    """Adapters of a half precision model are float32."""
    model = models.make("bert").to(torch.bfloat16)
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=4))
    assert {p.dtype for p in adapted.adapter_parameters()} == {torch.float32}
    losses = fit(model, adapted, steps=10)
    assert min(losses[-3:]) < losses[0]


def test_nan_ranks_last():
    """A score that is not a number ranks last."""
    model = models.make("bert")
    adapted = lrkit.attach(model, attrs.evolve(METHODS["adalora"], metric=lrkit.metrics.Magnitude()))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=20)
    adapters = list(adapted.adapters.values())
    with torch.no_grad():
        for adapter in adapters:
            adapter.core.copy_(torch.tensor([3.0, 2.0, 1.0, 0.5]))
        adapters[0].core[0] = torch.nan
    for _ in range(3):
        adapted.penalty().backward()
        optimizer.step()
    kept = adapted.history[0]
    assert kept.step == 3
    assert f"{next(iter(adapted.adapters))}[0]" in kept.lost
