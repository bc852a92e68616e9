"""Allocations: their arithmetic and files, and layers of different ranks through a whole run, with PEFT as the oracle."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import models
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrkit
from lrkit import testing
from lrkit.adapt import sharing
from lrkit.cli import main
from lrkit.loop.resizing import Resize
from lrkit.ranks import ranks_of
from lrkit.templates.parameterization import ExampleName

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]

TABLE = {"query": 3, "1.attention.self.key": 0, ".*intermediate.dense": 2, "*": 1}
METHODS = {
    "lora": lrkit.methods.lora(rank=TABLE, alpha=6.0),
    "svd-lora": lrkit.methods.svd_lora(rank=TABLE, alpha=8.0),
    "elora": lrkit.methods.elora(rank=TABLE),
    "adalora": lrkit.methods.adalora(rank=TABLE, target_rank=1, interval=1),
    "aflora": lrkit.methods.aflora(rank=TABLE, train="both", final=0.3),
    "a third party's": attrs.evolve(
        lrkit.methods.adalora(target_rank=1), parameterization=ExampleName(rank=TABLE, scale_by="mean-rank")
    ),
}
SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12).map(
    lambda sizes: {f"layer.{i}": size for i, size in enumerate(sizes)}
)


def cost(ranks: Mapping[str, int], sizes: Mapping[str, tuple[int, int]]) -> int:
    """Return the number of parameters, from the formula."""
    return sum(rank * (sizes[name][0] + sizes[name][1]) for name, rank in ranks.items())


def bert() -> nn.Module:
    return models.make("bert").eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**models.batch()).logits


def train(adapted: lrkit.Adapted, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        (adapted.model(**models.batch(adapted.step)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


def begun(method: lrkit.Method, steps: int, total: int = 12) -> tuple[lrkit.Adapted, torch.optim.Optimizer]:
    model = bert()
    torch.manual_seed(3)
    adapted = lrkit.attach(model, method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.1)
    adapted.bind(optimizer, total_steps=total)
    train(adapted, optimizer, steps)
    return adapted, optimizer


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@given(SIZES, st.integers(1, 200), st.integers(0, 5))
def test_totals_are_met(sizes: dict[str, tuple[int, int]], total: int, seed: int) -> None:
    """Uniform and random ranks add up to the total, and uniform ones are at most one apart."""
    even, drawn = sharing.uniform(sizes, total=total), sharing.at_random(sizes, seed, total=total)
    assert sum(even.values()) == sum(drawn.values()) == total
    assert max(even.values()) - min(even.values()) <= 1
    assert drawn == sharing.at_random(sizes, seed, total=total)


@given(SIZES, st.integers(0, 5000), st.integers(0, 5))
def test_parameters_within_one_component(sizes: dict[str, tuple[int, int]], most: int, seed: int) -> None:
    """No more parameters than asked for, and what is left is less than one component."""
    even, drawn = sharing.uniform(sizes, cost=most), sharing.at_random(sizes, seed, cost=most)
    assert 0 <= most - cost(drawn, sizes) < min(map(sum, sizes.values()))
    assert max(even.values()) - min(even.values()) <= 1
    short = [sum(sizes[name]) for name, rank in even.items() if rank == min(even.values())]
    assert 0 <= most - cost(even, sizes) < min(short)


@given(SIZES, st.lists(st.integers(0, 9), min_size=12, max_size=12), st.integers(0, 99))
def test_shuffles_keep_parameters(sizes: dict[str, tuple[int, int]], ranks: list[int], seed: int) -> None:
    """Each group of layers of equal d_in + d_out has the same ranks, in another order."""
    found = lrkit.Allocation(dict(zip(sizes, ranks, strict=False)), sizes)
    other = found.shuffled(seed=seed)
    assert other.parameters == found.parameters == cost(found, sizes)
    for size in {sum(pair) for pair in sizes.values()}:
        group = [name for name, pair in sizes.items() if sum(pair) == size]
        assert sorted(other[name] for name in group) == sorted(found[name] for name in group)


def test_controls_follow_their_model() -> None:
    """Controls of a found allocation have its layers and parameters; by a model they are the same as by sizes."""
    model = bert()
    found = lrkit.Allocation(TABLE).on(model)
    assert found.total == sum(found.values()) == 2 * (3 + 2) + 6 * 1 + 1
    least = min(map(sum, found.sizes.values()))
    for kind in ("uniform", "random"):
        other = found.like(kind, seed=5)
        assert 0 <= found.parameters - other.parameters < (least if kind == "random" else 3 * least)
    assert found.like("shuffled", seed=2) == lrkit.Allocation(TABLE).shuffled(seed=2, model=model)
    assert lrkit.Allocation.random(model, parameters=found.parameters, seed=5) == found.like("random", seed=5)
    assert lrkit.Allocation.uniform(model, total=24) == dict.fromkeys(found, 2)
    assert lrkit.Allocation.random(model, total=24, seed=1) != lrkit.Allocation.random(model, total=24, seed=2)
    assert any(found.shuffled(seed=seed) != found for seed in range(3))


# ---- data ------------------------------------------------------------------------------------------------------------


def test_it_is_a_mapping() -> None:
    """It counts, iterates, compares, hashes and copies like its entries; nobody can change it."""
    made = lrkit.Allocation(TABLE)
    assert (len(made), list(made), dict(made), made["query"]) == (4, list(TABLE), TABLE, 3)
    assert made == TABLE == lrkit.Allocation(dict(reversed(TABLE.items()))) == copy.deepcopy(made)
    assert hash(made) == hash(lrkit.Allocation(dict(reversed(TABLE.items()))))
    assert made != {"query": 3}
    assert len(repr(lrkit.Allocation.uniform(bert(), total=24))) < 80
    with pytest.raises(AttributeError):
        made.sizes = {}  # type: ignore[misc]
    with pytest.raises(TypeError):
        made["query"] = 3  # type: ignore[index]


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=8).filter(str.isprintable), st.integers(0, 9), min_size=1), st.data()
)
def test_files_read_back(tmp_path_factory: pytest.TempPathFactory, ranks: dict[str, int], data: st.DataObject) -> None:
    """TOML and JSON hold entries and sizes, whatever the layers are called."""
    try:
        made = lrkit.Allocation(ranks)
    except lrkit.LrkitError:
        return  # a name that is no pattern
    if "*" not in ranks and data.draw(st.booleans()):
        try:
            made = lrkit.Allocation(ranks, {name: (len(name), 7) for name in ranks})
        except lrkit.LrkitError:
            return  # two patterns for one name
    for ending in ("toml", "json"):
        path = made.save(tmp_path_factory.getbasetemp() / f"allocation.{ending}")
        again = lrkit.Allocation.load(path)
        assert (dict(again), again.sizes) == (dict(made), made.sizes)


BAD: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "must have an entry"),
    "no table": ([8], "must be a table"),
    "a negative rank": ({"query": -1}, '"query" must be an int from 0'),
    "a share": ({"query": 0.5}, '"query" must be an int from 0'),
    "a flag": ({"query": True}, '"query" must be an int from 0'),
    "a huge rank": ({"query": 10**6}, "65,536"),
    "no pattern": ({"(": 1}, "is not a regular expression"),
    "without end": ({"(a|a)*b": 1}, "matched for ever"),
    "a number": ({1: 1}, "a layer's name or a pattern"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_entries_are_refused(case: str) -> None:
    """What is no rank or no pattern is named, in `Allocation` and in `rank=` alike."""
    given_, told = BAD[case]
    for make in (lrkit.Allocation, lambda ranks: lrkit.methods.lora(rank=ranks)):
        if isinstance(given_, Mapping) or make is lrkit.Allocation:
            with pytest.raises(lrkit.LrkitError, match=told):
                make(given_)


MISFITS: dict[str, tuple[dict[str, int], str]] = {
    "layers without a rank": ({"query": 3}, r'2 of 12 adapted layers, and none of .*key.*"\*" = 0'),
    "an entry without layers": ({"qeury": 3, "*": 1}, r'"qeury" matches no adapted layer \(did you mean "query"'),
    "no rank at all": ({"*": 0}, "rank is 0 in every adapted layer"),
    "two patterns": ({".*query": 3, "attention.*": 2, "*": 1}, "both match .*query, and say other ranks"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_leave_the_model(case: str) -> None:
    """A table that does not fit the layers is refused with their names, and nothing has been put in."""
    table, told = MISFITS[case]
    model = bert()
    before = logits(model)
    for method in (lrkit.methods.lora(rank=table), lrkit.methods.elora(rank=table)):
        with pytest.raises(lrkit.LrkitError, match=told):
            lrkit.attach(model, method)
    assert torch.equal(logits(model), before)
    lrkit.attach(model, lrkit.methods.lora())


FILES = {
    "no such file": ("a.toml", None, "no allocation at .*a.toml"),
    "another ending": ("a.yaml", "", r"ends in .toml or .json"),
    "no TOML": ("a.toml", "[ranks", "a.toml: no TOML"),
    "no ranks": ("a.json", "{}", "a.json is no allocation: .*ranks"),
    "a text for a rank": ("a.toml", '[ranks]\nquery = "3"', 'a.toml is no allocation: the rank of "query"'),
    "another table": ("a.toml", "[ranks]\nquery = 3\n[size]\n", 'no setting "size".*"sizes"'),
    "no size": ("a.toml", "[ranks]\na = 3\n[sizes]\na = [3]\n", 'the size of "a" must be'),
    "sizes of others": ("a.toml", "[ranks]\na = 3\n[sizes]\nb = [3, 3]\n", "names 0 of 1 adapted layers"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_named(case: str, tmp_path: Path) -> None:
    """A file that is no allocation is refused in one line, with its path and the key."""
    name, text, told = FILES[case]
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(lrkit.LrkitError, match=told) as caught:
        lrkit.Allocation.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_unknown_sizes_are_told() -> None:
    """Without sizes there are no parameters, no controls, and no total of a pattern."""
    made = lrkit.Allocation({"a.b": 2, "a.c": 3, "*": 0})
    assert made.total == 5
    for ask in (lambda: made.parameters, lambda: made.like("random"), lambda: made.shuffled(seed=0)):
        with pytest.raises(lrkit.LrkitError, match=r"on\(model\)"):
            ask()
    with pytest.raises(lrkit.LrkitError, match=r'"\*" stands for'):
        _ = lrkit.Allocation({"*": 2}).total
    with pytest.raises(lrkit.LrkitError, match="either total"):
        lrkit.Allocation.uniform(bert(), total=3, parameters=4)
    with pytest.raises(lrkit.LrkitError, match="from 1 to"):
        lrkit.Allocation.uniform(bert(), total=0)


@settings(max_examples=15, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["query", "key", "self.value", "layer.1.intermediate.dense", "0.attention.output.dense"]),
        st.integers(1, 6),
        max_size=3,
    ),
    st.sampled_from([{}, {".*output.dense": 2}, {"(key|value)": 3}]),
)
def test_patterns_are_as_in_peft(plain: dict[str, int], pattern: dict[str, int]) -> None:
    """PEFT's ``rank_pattern``, of which the first that matches counts, gives the same ranks if the nearest comes first."""
    if not plain and not pattern:
        return
    config = peft.LoraConfig(r=7, rank_pattern=plain | pattern, target_modules=["query", "key", "value", "dense"])
    model = peft.get_peft_model(bert(), config)
    theirs = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and ".layer." in name
    }
    assert ranks_of({**pattern, **plain, "*": 7}, list(theirs)) == theirs


def test_the_nearest_entry_counts() -> None:
    """A whole name, then the longest run of last components, then an expression, then the rest, in any order of entries."""
    entries = {"a.0.self.query": 1, "0.self.query": 2, "query": 3, ".*key": 4, "*": 5}
    layers = ["a.0.self.query", "b.0.self.query", "a.1.self.query", "a.0.self.key", "query", "a.0.my_query"]
    for order in (entries, dict(reversed(entries.items()))):
        assert list(ranks_of(order, layers).values()) == [1, 2, 3, 4, 3, 5]


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "svd-lora", "elora", "adalora", "aflora"])
def test_one_rank_is_bitwise_an_int(name: str) -> None:
    """A table with one rank for all layers gives the numbers of the int, bit for bit."""
    method = METHODS[name]
    ends = []
    for rank in (2, {"*": 2}, {"query": 2, "*": 2}):
        parameterization = attrs.evolve(method.parameterization, rank=rank)
        adapted, _ = begun(attrs.evolve(method, parameterization=parameterization), 4)
        ends.append({n: p.detach().clone() for n, p in adapted.named_parameters()})
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        assert all(torch.equal(other[n], p) for n, p in ends[0].items())


@pytest.mark.parametrize("name", METHODS)
def test_layers_without_rank_train_nothing(name: str) -> None:
    """At rank 0 a layer stays an adapted layer, and counts, trains and gets nothing."""
    adapted, optimizer = begun(METHODS[name], 3)
    layers = {layer.name: layer for layer in adapted.summary().layers}
    assert len(layers) == 12
    assert {n: layer.initial_rank for n, layer in layers.items()} == ranks_of(TABLE, list(layers))
    without = next(n for n in layers if n.endswith("1.attention.self.key"))
    assert (layers[without].rank, layers[without].start, layers[without].now) == (0, 0, 0)
    own = [p for n, p in adapted.adapters[without].named_parameters() if not n.startswith("base.")]
    assert own
    assert not any(p.requires_grad or p.grad is not None or optimizer.state.get(p) for p in own)
    method = METHODS[name].parameterization
    if name in ("lora", "svd-lora"):
        core = sum(adapted.allocation().values()) if name == "svd-lora" else 0
        assert adapted.summary().start == adapted.allocation().parameters + core
    from lrkit.accounting import count

    assert count(METHODS[name], bert(), total_steps=12).start == adapted.summary().start, method


@pytest.mark.parametrize("name", [name for name in METHODS if name != "a third party's"])
def test_resumed_is_undisturbed(name: str, tmp_path: Path) -> None:
    """A run with ranks of its own in each layer is saved halfway, loaded, and ends as the one that went through."""
    method = METHODS[name]
    whole, _ = begun(method, 12)
    half, optimizer = begun(method, 5)
    state, inside = half.state_dict(), copy.deepcopy(optimizer.state_dict())
    again = lrkit.attach(bert(), method)
    other = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0.1)
    again.load_state_dict(state)
    again.bind(other, total_steps=12)
    other.load_state_dict(inside)
    train(again, other, 7)
    assert torch.equal(logits(again.model), logits(whole.model))
    assert again.history == whole.history
    assert again.summary() == whole.summary()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "a third party's"])
def test_files_keep_ranks(name: str, tmp_path: Path) -> None:
    """The method's plain data, a saved folder, `compact`, `merge` and a loaded model have the same ranks and outputs."""
    method = METHODS[name]
    plain = json.loads(json.dumps(lrkit.to_plain(method)))
    assert plain["parameterization"]["rank"] == TABLE
    assert lrkit.from_plain(plain) == method
    changed = lrkit.with_setting(plain, "parameterization.rank", lrkit.Allocation({"*": 3}))
    assert json.loads(json.dumps(changed))["parameterization"]["rank"] == {"*": 3}
    adapted, _ = begun(method, 12)
    end = logits(adapted.model)
    adapted.save(tmp_path)
    found = lrkit.Allocation.from_run(tmp_path)
    assert found == adapted.allocation()
    assert found.sizes == adapted.allocation().sizes == lrkit.Allocation(TABLE).on(bert()).sizes
    again = lrkit.load(bert(), tmp_path)
    assert torch.equal(logits(again.model), end)
    assert again.compact() == dict(found)
    torch.testing.assert_close(logits(again.model), end, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(again.merge()), end, rtol=0, atol=1e-5)


def test_masked_components_do_not_count() -> None:
    """The allocation in effect is what AdaLoRA's budget has left, and may begin another run as it is."""
    adapted, _ = begun(lrkit.methods.adalora(rank=4, target_rank=2, interval=1, final=0.5), 12)
    found = adapted.allocation()
    assert found.total == 24
    assert {adapter.rank for adapter in adapted.adapters.values()} == {4}
    other = lrkit.attach(bert(), lrkit.methods.svd_lora(rank=found))
    assert {name: adapter.rank for name, adapter in other.adapters.items()} == dict(found)
    with pytest.raises(lrkit.LrkitError, match="already carries adapters"):
        lrkit.Allocation.uniform(other.model, total=24)
    with pytest.raises(lrkit.LrkitError, match="these have none"):
        lrkit.attach(bert(), lrkit.methods.full()).allocation()


def test_budgets_begin_with_what_is_there() -> None:
    """b_0 is the sum of all ranks, and a target above their mean is refused when the run begins."""
    adapted, _ = begun(METHODS["adalora"], 1)
    assert adapted.controller.policies[0].units == adapted.controller.policies[0].times.budget(0) == 17
    matrices, _ = begun(METHODS["aflora"], 1)
    assert matrices.controller.policies[0].units == 2 * 11  # A and B of the layers that have a rank
    with pytest.raises(lrkit.LrkitError, match="is 24 units in 12 layers, and there are 17 units at first"):
        begun(lrkit.methods.adalora(rank=TABLE, target_rank=2), 1)
    with pytest.raises(lrkit.LrkitError, match="target = 4 is above the initial rank 3"):
        lrkit.methods.adalora(rank=TABLE, target_rank=4)


def test_scales_follow_the_setting() -> None:
    """The r of α/r is each layer's own rank, or the mean over all layers, those of rank 0 included."""
    ranks = ranks_of(TABLE, list(lrkit.Allocation(TABLE).on(bert())))
    mean = sum(ranks.values()) / len(ranks)
    for by, divisor in (("own-rank", ranks), ("mean-rank", dict.fromkeys(ranks, mean))):
        for made, small in (
            (lrkit.parameterizations.LoRA(rank=TABLE, alpha=6.0, scale_by=by), 0.0),
            (lrkit.parameterizations.SVD(rank=TABLE, alpha=6.0, scale_by=by), 1e-5),
            (ExampleName(rank=TABLE, alpha=6.0, scale_by=by), 0.0),
        ):
            adapted = lrkit.attach(bert(), lrkit.Method(parameterization=made))
            for name, adapter in adapted.adapters.items():
                assert adapter.scaling == pytest.approx(6.0 / (max(1, divisor[name]) + small), rel=1e-12)


def test_layers_without_rank_can_grow() -> None:
    """A layer that began with rank 0 gets components, and all of its tensors train from there on, also after a load."""
    adapted, optimizer = begun(METHODS["elora"], 1)
    name = next(n for n in adapted.adapters if n.endswith("1.attention.self.key"))
    components = adapted.controller.components
    how = Resize(torch.zeros(0, dtype=torch.long), 2)
    assert components.resize({name: how}, optimizer, 0.1, torch.Generator().manual_seed(0)) == {name: (0, 1)}
    core, out_scale = (adapted.adapters[name].get_parameter(each) for each in ("core", "out_scale"))
    assert core.requires_grad
    assert out_scale.requires_grad
    before = core.detach().clone()
    train(adapted, optimizer, 3)
    assert not torch.equal(core, before)


def test_shared_matrices_have_one_rank() -> None:
    """One A and B for all layers cannot be of several ranks."""
    with pytest.raises(lrkit.LrkitError, match="one A and B for all layers"):
        lrkit.methods.elora(rank=TABLE, shared=True)


class TestRanksOfTheirOwn(testing.ParameterizationContract):
    """A third party's parameterization and one of lrkit's keep every promise if layers differ."""

    component = (
        ExampleName(rank={"query": 3, "down": 2, "0.attention.output": 0, "*": 1}),
        lrkit.parameterizations.VectorScaled(rank={"query": 3, "0.attention.output": 0, "*": 2}),
    )


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_by", ["own-rank", "mean-rank"])
def test_peft_reads_ranks_and_scales(scale_by: Any, tmp_path: Path) -> None:
    """PEFT gets every layer's rank and α by its patterns, has the same logits, and comes back with the same allocation."""
    made = lrkit.parameterizations.LoRA(rank=TABLE, alpha=6.0, scale_by=scale_by)
    adapted, _ = begun(lrkit.Method(parameterization=made), 6)
    lrkit.export(adapted, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(logits(theirs), logits(adapted.model), rtol=0, atol=1e-6)
    config = theirs.peft_config["default"]
    ranked = {name: rank for name, rank in adapted.allocation().items() if rank}
    assert {name: config.rank_pattern.get(name, config.r) for name in ranked} == ranked
    for name, rank in ranked.items():
        alpha = config.alpha_pattern.get(name, config.lora_alpha)
        assert alpha / rank == pytest.approx(adapted.adapters[name].scaling, rel=1e-12)
    again = lrkit.from_peft(bert(), tmp_path / "peft")
    assert again.allocation() == ranked
    assert again.method.parameterization.scale_by == scale_by
    torch.testing.assert_close(logits(again.model), logits(theirs), rtol=0, atol=1e-6)
    for name, adapter in again.adapters.items():
        assert adapter.scaling == pytest.approx(adapted.adapters[name].scaling, rel=1e-12)


def test_peft_patterns_come_in(tmp_path: Path) -> None:
    """A LoRA that PEFT trained with patterns of its own has its ranks, scales and logits here."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["query", "key", "dense"],
        rank_pattern={"query": 2, "layer.1.output.dense": 3},
        alpha_pattern={"key": 12},
        init_lora_weights=False,
        task_type="SEQ_CLS",
        exclude_modules=["bert.pooler.dense"],
    )
    theirs = peft.get_peft_model(bert(), config).eval()
    theirs.save_pretrained(str(tmp_path))
    adapted = lrkit.from_peft(bert(), tmp_path)
    torch.testing.assert_close(logits(adapted.model), logits(theirs), rtol=0, atol=1e-6)
    told = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {n: m.r["default"] for n, m in told.items()} == adapted.allocation()


# ---- runs and commands -----------------------------------------------------------------------------------------------

LAYERS = [
    {"name": "a", "rank": 2, "initial_rank": 4, "frozen": [], "start": 1, "now": 1, "average": 1.0},
    {"name": "b", "rank": 0, "initial_rank": 4, "frozen": [], "start": 1, "now": 1, "average": 1.0},
]


def test_runs_are_read(tmp_path: Path) -> None:
    """A run's and a cell's ``result.json`` give the ranks, with sizes if they are there, as older ones have none."""
    sized = [{**layer, "d_in": 3, "d_out": 4} for layer in LAYERS]
    for content in ({"layers": LAYERS}, {"summary": {"layers": LAYERS}}):
        (tmp_path / "result.json").write_text(json.dumps(content))
        found = lrkit.Allocation.from_run(tmp_path)
        assert (dict(found), found.sizes) == ({"a": 2, "b": 0}, None)
    (tmp_path / "result.json").write_text(json.dumps({"layers": sized}))
    assert lrkit.Allocation.from_run(tmp_path).parameters == 14


BAD_RUNS: dict[str, tuple[Any, str]] = {
    "no layers": ({"layers": []}, "no list of layers"),
    "no ranks": ({"layers": [{**LAYERS[0], "rank": None}]}, "no rank components"),
    "no table": ([], "no list of layers"),
    "no name": ({"layers": [{"rank": 1}]}, r"layers\[0\].name"),
    "no rank": ({"layers": [{**LAYERS[0], "rank": "2"}]}, "must be an int from 0"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs_are_named(case: str, tmp_path: Path) -> None:
    """A folder that is no run with ranks is refused, with its path."""
    content, told = BAD_RUNS[case]
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(lrkit.LrkitError, match=told) as caught:
        lrkit.Allocation.from_run(tmp_path)
    assert str(tmp_path) in str(caught.value)


def main_exits(code: int, *arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code


def counted(capsys: pytest.CaptureFixture[str], *arguments: str) -> int:
    main_exits(0, "params", "--model", "minilm", "--json", *arguments)
    return next(iter(json.loads(capsys.readouterr().out)["methods"].values()))["start"]


def test_ranks_at_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """``--ranks`` takes a file, a run, uniform and random, and keeps the method's own total for the last two."""
    assert counted(capsys, "lora", "--ranks", "uniform") == counted(capsys, "lora")
    drawn = counted(capsys, "lora", "--set", "rank=2", "--ranks", "random:3")
    assert drawn != counted(capsys, "lora", "--set", "rank=2")
    path = lrkit.Allocation({"query": 3, "*": 0}).save(tmp_path / "ranks.toml")
    assert counted(capsys, "lora", "--ranks", str(path)) == 6 * 3 * (384 + 384)
    begun(lrkit.methods.lora(rank=1), 1)[0].save(tmp_path)
    main_exits(2, "params", "lora", "--model", "minilm", "--ranks", str(path), "--set", "rank=4")
    main_exits(2, "params", "lora", "--model", "minilm", "--ranks", str(tmp_path))
    assert "rank names 12 of 36 adapted layers" in capsys.readouterr().err  # of a run on a smaller model


BAD_RANKS = {
    "no seed": (["lora", "--ranks", "random"], 'random:SEED (such as random:0), not "random"'),
    "a seed for uniform": (["lora", "--ranks", "uniform:1"], "FILE, RUN, uniform or random:SEED"),
    "no such run": (["lora", "--ranks", "nowhere"], 'there is no "nowhere"'),
    "no ranks": (["full", "--ranks", "uniform"], 'parameterization "full" has no setting rank'),
    "no method": (["--ranks", "uniform"], "name one"),
}


@pytest.mark.parametrize("case", BAD_RANKS)
def test_bad_ranks_are_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and one line."""
    arguments, told = BAD_RANKS[case]
    main_exits(2, "params", *arguments)
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
