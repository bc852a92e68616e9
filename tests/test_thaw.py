"""Thawing: units that stop and train again, and units that are whole blocks of the transformer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, ClassVar

import attrs
import folders
import models
import pytest
import torch
import transformers
from rigs import OPTIMIZERS
from torch import nn

import lrkit
import lrkit.trainer
from lrkit import accounting
from lrkit.actions import Freeze, Switch
from lrkit.adapt.body import block_names
from lrkit.metrics import GradientUncertainty, Random
from lrkit.parameterizations import SVD, Full, LoRA
from lrkit.schedulers import Constant, Scheduler
from lrkit.study.comebacks import training
from lrkit.testing import ActionContract

STEPS = 12


class TestLayers(ActionContract):
    """Layers stop and train again, by what they cost; the optimizer's state stays."""

    component: ClassVar = Switch(unit="layer", state="kept", by="score-per-cost")


def switching(
    parameterization: Any = None, metric: Any = None, scheduler: Scheduler | None = None, **action: Any
) -> lrkit.Method:
    """Half of the blocks train, other ones every second step."""
    return lrkit.Method(
        parameterization=Full() if parameterization is None else parameterization,
        metric=metric or Random(),
        scheduler=scheduler or Constant(target=0.5, interval=2, ending="open"),
        action=Switch(**action),
    )


def start(method: lrkit.Method, kind: str = "bert", *, optimizer: str = "adamw", **attach: Any) -> tuple[Any, Any, Any]:
    """Attach and bind; without dropout."""
    model = models.make(kind, seed=3).eval()
    torch.manual_seed(5)  # of which chance lets blocks return
    adapted = lrkit.attach(model, method, **attach)
    made = OPTIMIZERS[optimizer](adapted.parameters())
    adapted.bind(made, total_steps=STEPS)
    return model, adapted, made


def step(model: Any, adapted: Any, optimizer: Any) -> None:
    """Take one step of the run."""
    loss = model(**models.batch(seed=adapted.step, rows=4)).loss + adapted.penalty()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def within(model: Any, block: str) -> dict[str, Any]:
    """All parameters of a block that trained at first."""
    return {name: p for name, p in model.named_parameters() if name.startswith(f"{block}.")}


# ---- blocks ----

_TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}


def made(kind: str, **config: Any) -> nn.Module:
    """A model of transformers on the meta device."""
    with torch.device("meta"):
        settings = getattr(transformers, f"{kind}Config")(**config)
        return transformers.AutoModel.from_config(settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "config", "names"),
    [
        ("Bert", _TINY | {"num_hidden_layers": 3}, [f"encoder.layer.{i}" for i in range(3)]),
        ("GPT2", {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 30}, ["h.0", "h.1"]),
        (
            "T5",
            {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2, "vocab_size": 30},
            [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)],
        ),
        ("Albert", _TINY | {"num_hidden_layers": 4, "embedding_size": 8}, ["encoder.albert_layer_groups.0"]),
        (
            "Mixtral",
            _TINY | {"num_hidden_layers": 2, "num_key_value_heads": 1, "num_local_experts": 2},
            ["layers.0", "layers.1"],
        ),
        ("Wav2Vec2", _TINY | {"num_hidden_layers": 2}, ["encoder.layers.0", "encoder.layers.1"]),
        (
            "Swin",
            {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "image_size": 32, "window_size": 2},
            ["encoder.layers.0", "encoder.layers.1"],
        ),
    ],
)
def test_blocks_are_found(kind: str, config: dict[str, Any], names: list[str]) -> None:
    """Blocks are the elements of the outermost lists that hold linear maps: no convolutions, no experts, no sublayers."""
    assert block_names(made(kind, **config)) == names


def test_blocks_hold_all_that_trains() -> None:
    """Of full fine-tuning a block has every parameter below its name, norms and biases too; embeddings are in none."""
    model, adapted, _ = start(switching())
    (state,) = adapted.controller.policies
    assert state.unit_names == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    for block in state.blocks:
        mine = within(model, block.name)
        assert {id(p) for p in block.tensors} == {id(p) for p in mine.values()}
        assert any("LayerNorm" in name for name in mine) and any("bias" in name for name in mine)


def test_blocks_hold_adapters() -> None:
    """Of LoRA a block has the adapters' matrices in it, whichever layers are adapted; blocks without any are no units."""
    method = switching(LoRA(rank=2), scheduler=Constant(target=1.0, interval=2, ending="open"))
    _, adapted, _ = start(method, targets=r".*layer\.1\..*(query|value)", train_also=[])
    ((block,),) = (state.blocks for state in adapted.controller.policies)
    assert block.name == "bert.encoder.layer.1"
    assert {id(p) for p in block.tensors} == {id(p) for p in adapted.parameters()}


def test_a_tensor_of_two_blocks_trains_on() -> None:
    """A tensor that two blocks share is in neither: it goes on training while one of them does not."""
    model = models.make("bert", seed=3)
    one, two = model.bert.encoder.layer
    two.attention.self.query.weight = one.attention.self.query.weight
    adapted = lrkit.attach(model, switching())
    shared = id(one.attention.self.query.weight)
    assert all(shared not in map(id, block.tensors) for block in adapted.controller.policies[0].blocks)


def test_models_without_blocks_are_refused() -> None:
    """A model that has no blocks is refused in one line, and left as it was."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(
        lrkit.LrkitError, match="Switch has nothing to act on: no unit of kind 'block' trains in Sequential"
    ):
        lrkit.attach(model, switching(LoRA(rank=2)), targets=["0"], train_also=[])
    assert type(model[0]) is nn.Linear


def test_an_int_counts_blocks() -> None:
    """A target of two is two blocks of the model; three of two are refused."""
    _, adapted, _ = start(switching(scheduler=Constant(target=2, interval=2)))
    assert adapted.controller.policies[0].times.budget(STEPS) == 2
    with pytest.raises(lrkit.LrkitError, match="there are 2"):
        start(switching(scheduler=Constant(target=3)))


# ---- what a switch does to a run ----


HALF = ((Full(), "kept"), (LoRA(rank=2), "new"))


@pytest.mark.parametrize(
    ("form", "state", "kind"),
    [
        *((form, state, "adamw") for form in (Full(), LoRA(rank=2)) for state in ("new", "kept")),
        *((form, state, kind) for kind in OPTIMIZERS for form, state in HALF if kind != "adamw"),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_a_run_is_the_plain_loop(state: str, form: Any, kind: str) -> None:
    """The run is bitwise that of a loop in plain torch, which sets flags and drops the optimizer's state by hand."""
    model, adapted, optimizer = start(switching(form, state=state), optimizer=kind)
    for _ in range(STEPS):
        step(model, adapted, optimizer)
    trains = {d.step: d for d in adapted.history}
    assert sum(len(d.returned) for d in adapted.history) >= 2  # blocks did come back

    plain, other, _ = start(lrkit.Method(parameterization=form))
    other.unbind()
    by_hand = OPTIMIZERS[kind](other.parameters())
    mine = {id(p) for p in other.parameters()}
    for at in range(STEPS):
        plain(**models.batch(seed=at, rows=4)).loss.backward()
        by_hand.step()
        by_hand.zero_grad()
        if (decision := trains.get(at + 1)) is not None:
            for names, flag in ((decision.lost, False), (decision.returned, True)):
                for p in (p for name in names for p in within(plain, name).values() if id(p) in mine):
                    p.requires_grad = flag
                    if state == "new" and not flag:
                        by_hand.state.pop(p, None)
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert len(optimizer.state) == len(by_hand.state)


def test_embeddings_and_head_train_on() -> None:
    """Whatever is in no block trains in every step."""
    model, adapted, optimizer = start(switching())
    beside = {n: p for n, p in model.named_parameters() if not n.startswith("bert.encoder.layer")}
    assert {n.split(".")[0] for n in beside} == {"bert", "classifier"}
    for _ in range(STEPS):
        before = {name: p.detach().clone() for name, p in beside.items()}
        step(model, adapted, optimizer)
        assert all(p.requires_grad and not torch.equal(p, before[name]) for name, p in beside.items())


@pytest.mark.parametrize("form", [Full(), LoRA(rank=2), SVD(rank=2)], ids=["full", "lora", "svd"])
def test_parameters_are_counted(form: Any) -> None:
    """The summary's numbers, now and on average, are those counted from the flags; and `count` knows them beforehand."""
    counted = accounting.count(switching(form), models.make("bert", seed=3), total_steps=STEPS)
    model, adapted, optimizer = start(switching(form))
    seen = []
    for _ in range(STEPS):
        seen.append(sum(p.numel() for p in adapted.adapter_parameters() if p.requires_grad))
        step(model, adapted, optimizer)
    summary = adapted.summary()
    assert summary.now == sum(p.numel() for p in adapted.adapter_parameters() if p.requires_grad) < summary.start
    assert summary.average == pytest.approx(sum(seen) / STEPS)
    assert summary.start == seen[0] == counted.start
    assert counted.end == pytest.approx(seen[-1])  # both blocks are of one size
    assert counted.average == pytest.approx(summary.average)
    assert (summary.beside > summary.beside_now) == isinstance(form, Full)  # norms of what does not train
    again = lrkit.attach(models.make("bert", seed=3), switching(form))
    again.load_state_dict(adapted.state_dict())
    assert again.summary() == summary


def test_states_without_the_word_load() -> None:
    """A state that does not count what is in no layer is of a run in which all of it trained in every step."""
    model, adapted, optimizer = start(lrkit.methods.full())
    for _ in range(3):
        step(model, adapted, optimizer)
    state = adapted.state_dict()
    assert state["meta"].pop("beside") == 3 * adapted.summary().beside
    again = lrkit.attach(models.make("bert", seed=3), lrkit.methods.full())
    again.load_state_dict(state)
    assert again.summary() == adapted.summary()


def test_optimizers_must_hold_all_blocks() -> None:
    """An optimizer made from what trains at the moment would never move the others: it is refused."""
    model, adapted, optimizer = start(switching())
    for _ in range(3):
        step(model, adapted, optimizer)
    adapted.unbind(quietly=True)
    with pytest.raises(lrkit.LrkitError, match=r'the optimizer does not hold .* such as "bert.encoder.layer'):
        adapted.bind(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), total_steps=STEPS)
    adapted.bind(optimizer, total_steps=STEPS)
    for _ in range(3, STEPS):
        step(model, adapted, optimizer)
    adapted.unbind()  # nothing changes any more, so that what is frozen need not be held, and that is said
    with pytest.warns(
        lrkit.LrkitWarning, match=f"its schedule ended with step {STEPS} of the run, and the next 1 steps"
    ):
        adapted.bind(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), total_steps=STEPS + 1)


def test_final_freezes_stay() -> None:
    """A matrix that another policy has frozen for good never trains again, whatever is switched; also after a load."""
    freeze = lrkit.Policy(
        metric=GradientUncertainty(), scheduler=Constant(target=0.5, warmup=2, interval=2), action=Freeze()
    )
    method = attrs.evolve(switching(LoRA(rank=2), unit="layer"), also=(freeze,))
    model, adapted, optimizer = start(method)
    for at in range(STEPS):
        step(model, adapted, optimizer)
        if at == STEPS // 2:
            state = adapted.state_dict()
            adapted.load_state_dict(state)
        one, two = adapted.controller.policies
        held = one.fate.frozen(one.blocks, one.kept) | two.fate.frozen(two.blocks, two.kept)
        assert {id(p) for p in adapted.adapter_parameters() if not p.requires_grad} == held
    assert any(d.returned for d in adapted.history if d.policy == 0)
    assert adapted.controller.components.asleep().isdisjoint(two.fate.frozen(two.blocks, two.kept))


def test_two_switches_agree() -> None:
    """Of two policies that switch, a tensor trains if both keep it."""
    other = switching(LoRA(rank=2), unit="matrix", scheduler=Constant(target=0.5, interval=3, ending="open"))
    method = attrs.evolve(switching(LoRA(rank=2)), also=(other.policies[0],))
    model, adapted, optimizer = start(method)
    for _ in range(STEPS):
        step(model, adapted, optimizer)
        held = [state.fate.frozen(state.blocks, state.kept) for state in adapted.controller.policies]
        assert {id(p) for p in adapted.adapter_parameters() if not p.requires_grad} == set.union(*held)


@pytest.mark.parametrize("metric", [GradientUncertainty(), Random()], ids=["gradients", "random"])
def test_statistics_begin_anew(metric: Any) -> None:
    """A unit that stopped keeps its last score; one that came back has a score of what was seen since."""
    model, adapted, optimizer = start(switching(LoRA(rank=2), metric, unit="matrix"))
    (state,) = adapted.controller.policies
    for _ in range(STEPS - 1):
        step(model, adapted, optimizer)
        if not isinstance(metric, Random):
            frozen = {
                id(p) for block, keep in zip(state.blocks, state.kept, strict=True) if not keep for p in block.tensors
            }
            assert set(map(id, state.statistics.layout.still)) == frozen
            fresh = [block for block in state.blocks if adapted.history and block.name in adapted.history[-1].returned]
            if fresh and adapted.history[-1].step == adapted.step:
                assert all(adapted.scores()[block.name] == 0 for block in fresh)


def test_dead_layers_are_told_when_they_thaw() -> None:
    """A layer that was frozen when gradients were first seen, and that the loss does not reach, is named once it trains."""
    model, adapted, optimizer = start(switching(LoRA(rank=2), unit="layer"))
    deaf = "bert.encoder.layer.1.output.dense"
    adapter = adapted.adapters[deaf]
    forward = type(adapter).forward
    adapter.forward = lambda x: forward(adapter, x).detach() * 0 + adapter.base(x)  # its own tensors are not reached
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for p in adapter.parameters():
            p.requires_grad_(False)  # as a decision before the first step leaves it
        step(model, adapted, optimizer)
        assert adapted.controller.liveness.dead == []
        for p in (adapter.A, adapter.B):
            p.requires_grad_(True)
        (state,) = adapted.controller.policies
        adapted.controller.liveness.doubt(state.blocks, [deaf])
        step(model, adapted, optimizer)
    assert adapted.controller.liveness.dead == [deaf]
    assert any(deaf in str(each.message) for each in said)


def test_rewind_lets_train_again() -> None:
    """Going back to a state in which a block trained lets it train, and freezes what was frozen then."""
    model, adapted, optimizer = start(switching())
    for _ in range(2):
        step(model, adapted, optimizer)
    early, flags = adapted.state_dict(), [p.requires_grad for p in adapted.parameters()]
    while [p.requires_grad for p in adapted.parameters()] == flags:
        step(model, adapted, optimizer)
    adapted.unbind(quietly=True)
    adapted.rewind(early)
    assert [p.requires_grad for p in adapted.parameters()] == flags


def test_checkpointed_blocks_thaw() -> None:
    """Gradient checkpointing changes nothing, in either form."""
    ends = []
    for reentrant in (None, False, True):
        model, adapted, optimizer = start(switching())
        if reentrant is not None:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "dropout_prob"):
                    module.dropout_prob = 0.0
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for _ in range(STEPS):
            step(model, adapted, optimizer)
        ends.append(copy.deepcopy(model.state_dict()))
    for other in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5, msg=name)


def test_frozen_blocks_cost_nothing() -> None:
    """FLOPs are those of what trains now."""
    model, adapted, optimizer = start(switching())
    batch = models.batch(seed=0, rows=4)
    before = accounting.flops(model, batch)
    for _ in range(2):
        step(model, adapted, optimizer)
    after = accounting.flops(model, batch)
    assert after.forward == before.forward and after.backward < before.backward


def test_a_history_says_how_long_each_trained() -> None:
    """The share of steps in which a layer trained follows from the decisions: of blocks, of matrices, or of neither."""
    for method in (switching(), switching(LoRA(rank=2), unit="matrix")):
        model, adapted, optimizer = start(method)
        trained = dict.fromkeys(adapted.adapters, 0.0)
        parts = [part for part in method.parameterization.parts if part.matrix]
        for _ in range(STEPS):
            for name, module in adapted.adapters.items():
                flags = [part.of(module).requires_grad for part in parts]
                trained[name] += sum(flags) / len(flags) / STEPS
            step(model, adapted, optimizer)
        assert training(adapted.history, STEPS, list(adapted.adapters)) == pytest.approx(trained)
    assert training([d for d in adapted.history if not d.returned], STEPS, list(adapted.adapters)) == {}


def test_trainers_hold_all_blocks(tmp_path: Path) -> None:
    """transformers' Trainer makes its optimizer of what requires a gradient: a run that is loaded trains all blocks."""
    model, adapted, optimizer = start(switching())
    for _ in range(3):
        step(model, adapted, optimizer)
    adapted.save(tmp_path)
    adapted = lrkit.load(models.make("bert", seed=3), tmp_path)
    frozen = [p for p in adapted.parameters() if not p.requires_grad]
    rows = [{key: value[0] for key, value in models.batch(seed=i, rows=1).items()} for i in range(STEPS)]
    trainer = transformers.Trainer(
        adapted.model,
        transformers.TrainingArguments(
            str(tmp_path),
            max_steps=STEPS - 3,
            per_device_train_batch_size=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        callbacks=[lrkit.trainer.AdaptCallback(adapted)],
    )
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert frozen and held >= set(map(id, frozen))
    held_down = adapted.controller.policies[0].fate.frozen(
        adapted.controller.policies[0].blocks, adapted.controller.policies[0].kept
    )
    assert {id(p) for p in adapted.parameters() if not p.requires_grad} == held_down


def test_flops_follow_who_trains(tmp_path, monkeypatch):
    """Of as many parameters in other layers the backward pass reaches less deep or deeper: each draw is counted anew."""
    from lrkit.study import trainer as study_trainer
    from lrkit.study.run import train
    from lrkit.study.run_settings import RunSettings

    place = folders.write_place(tmp_path, layers=2)
    method = lrkit.Method(
        parameterization=lrkit.parameterizations.LoRA(rank=2),
        metric=lrkit.metrics.Random(),
        scheduler=lrkit.schedulers.Constant(target=1 / 6, interval=1, ending="open"),
        action=lrkit.actions.Switch(unit="layer"),
    )
    found, count = {}, study_trainer.counts.of_step

    def spy(adapted, sample):
        lowest = next(i for i, p in enumerate(adapted.parameters()) if p.requires_grad)
        return found.setdefault(lowest, count(adapted, sample))

    monkeypatch.setattr(study_trainer.counts, "of_step", spy)
    settings = RunSettings(steps=8, batch_size=4, max_length=12)
    task = lrkit.tasks.load_task(data=str(place / "data"))
    train(method, task, model=str(place / "model"), targets=["query", "key", "value"], settings=settings)
    assert len(found) > 2
    deepest_first = [found[at] for at in sorted(found)]
    assert deepest_first == sorted(deepest_first, reverse=True) and len(set(deepest_first)) > 1
