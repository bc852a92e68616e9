"""A method: built or refused with both sides named, swapped, and as plain data there and back."""

from __future__ import annotations

import itertools
import json
import re
import typing
from typing import Any, Literal

import attrs
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import lrkit
from lrkit import Method, Policy, from_plain, methods, to_plain, with_component, with_setting
from lrkit.actions import Freeze, Prune
from lrkit.compose import compose
from lrkit.errors import LrkitError
from lrkit.fit import most_units
from lrkit.method import FIELDS
from lrkit.metrics import GradientUncertainty, Magnitude, RatioUncertainty, Sensitivity, SensitivityUncertainty
from lrkit.parameterizations import SVD, DoRA, Full, LoRA, VectorScaled
from lrkit.registry import Registry
from lrkit.schedulers import Constant, Cubic, Linear, Scheduler
from lrkit.settings import as_annotated, real
from lrkit.units import blocks_of

NAMES = ["full", "lora", "dora", "svd-lora", "elora", "adalora", "aflora"]


@pytest.fixture(autouse=True, scope="module")
def _only_built_ins() -> Any:
    """What happens to be installed beside lrkit is no part of these tests."""
    patch = pytest.MonkeyPatch()
    registry = Registry(discover=False)
    patch.setattr("lrkit.current", lambda: registry)  # looked up once, and kept: its true value comes back as well
    patch.setattr("lrkit.registry.current", lambda: registry)
    yield registry
    patch.undo()


def same(one: Method, other: Method) -> None:
    """Equal, and of the same types all the way down: 1 == 1.0, but one step is not the whole run."""
    assert one == other
    assert repr(one) == repr(other)


def there_and_back(method: Method) -> dict[str, Any]:
    plain = to_plain(method)
    same(from_plain(plain), method)
    text = json.dumps(plain, allow_nan=False)
    assert json.loads(text) == plain, "plain data is what JSON can hold: no tuples, no objects"
    same(from_plain(json.loads(text)), method)
    assert repr(to_plain(from_plain(json.loads(text)))) == repr(plain)
    return plain


# ---- drawn methods ---------------------------------------------------------------------------------------------------

positive = st.floats(1e-6, 1e6)
share = st.floats(0.0, 1.0)
below_one = st.floats(0.0, 1.0, exclude_max=True)
time = st.integers(0, 10_000) | share
betas = {"beta1": below_one, "beta2": below_one}


def component(cls: type, **settings: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Components of a class with every setting drawn: those that are not given, by their annotations."""
    hints = typing.get_type_hints(cls)
    for field in attrs.fields(cls):
        hint = hints[field.name]
        if field.name not in settings:
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else {bool: (False, True)}[hint]
            settings[field.name] = st.sampled_from(choices)
    return st.builds(cls, **settings)


_rank = st.integers(1, 64)
parameterizations = st.one_of(
    component(Full),
    component(LoRA, rank=_rank, alpha=positive, dropout=below_one),
    component(SVD, rank=_rank, alpha=st.none() | positive, init_std=positive, orthogonality=st.floats(0.0, 10.0)),
    component(VectorScaled, rank=_rank, shared=st.just(False), d_init=positive),
    component(VectorScaled, rank=_rank, train=st.just("none"), d_init=positive),
)
_window = st.integers(1, 20)
entrywise = st.one_of(
    component(Sensitivity, beta1=below_one),
    component(SensitivityUncertainty, **betas, window=_window),
    component(GradientUncertainty, **betas, window=_window),
    component(RatioUncertainty, **betas, window=_window, epsilon=positive),
)


def schedulers(most: int) -> st.SearchStrategy[Scheduler]:
    """Any scheduler whose amounts fit `most` units a layer."""
    amount = st.integers(0, most) | share
    times = {"warmup": time, "final": time, "interval": st.integers(1, 10_000) | share}
    # A budget never grows: of two amounts of one kind the smaller is the target.
    amounts = st.tuples(amount, amount).map(lambda two: sorted(two) if type(two[0]) is type(two[1]) else list(two))
    return st.tuples(st.sampled_from([Constant, Linear, Cubic]), amounts).flatmap(
        lambda drawn: component(drawn[0], target=st.just(drawn[1][0]), start=st.just(drawn[1][1]), **times)
    )


def ranked(scheduler: Scheduler) -> st.SearchStrategy[str]:
    """How an action may rank under a schedule: by cost only if units differ in cost."""
    return st.sampled_from(["score"] if scheduler.amount == "units" else ["score", "score-per-cost"])


@st.composite
def drawn_policies(draw: Any, p: Any) -> Policy:
    rank = getattr(p, "rank", 0)
    matrices = 0 if getattr(p, "train", "") == "none" else 1 if isinstance(p, Full) else 2
    choices = ["prune"] * isinstance(p, SVD | VectorScaled) + ["freeze", "together"] * (matrices > 0)
    action = draw(st.sampled_from(choices))
    if action == "prune":
        metric, scheduler = draw(entrywise | component(Magnitude)), draw(schedulers(rank))
        return Policy(metric=metric, scheduler=scheduler, action=draw(component(Prune, by=ranked(scheduler))))
    together = action == "together"
    metric, scheduler = draw(entrywise), draw(schedulers(1 if together else matrices))
    rule = draw(st.sampled_from(["rank", "quantile"] if scheduler.amount == "units" else ["rank"]))
    by = ranked(scheduler) if rule == "rank" else st.just("score")
    kind = component(Freeze, together=st.just(together), rule=st.just(rule), by=by)
    return Policy(metric=metric, scheduler=scheduler, action=draw(kind))


@st.composite
def drawn_methods(draw: Any) -> Method:
    p = draw(parameterizations)
    policies = draw(st.lists(drawn_policies(p), max_size=3))
    if policies and draw(st.booleans()):
        first, *policies = policies
        return Method(
            parameterization=p, metric=first.metric, scheduler=first.scheduler, action=first.action, also=policies
        )
    return Method(parameterization=p, also=policies)


# ---- plain data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_named_method_goes_to_plain_data_and_back(name: str) -> None:
    method = lrkit.registry.current().get("method", name)()
    assert isinstance(method, Method)
    plain = there_and_back(method)
    for kind in FIELDS:
        component = getattr(method, kind)
        if component is None:
            assert plain[kind] is None
        else:
            assert set(plain[kind]) == {"name", *(field.name for field in attrs.fields(type(component)))}
            assert lrkit.registry.current().get(kind, plain[kind]["name"]) is type(component)


def test_the_registry_has_the_named_methods() -> None:
    assert lrkit.registry.current().names("method") == NAMES


@given(drawn_methods())
def test_any_method_goes_to_plain_data_and_back(method: Method) -> None:
    plain = there_and_back(method)
    assert list(plain) == [*FIELDS, "also"]
    assert len(plain["also"]) == len(method.also)


@given(drawn_methods(), st.data())
def test_settings_left_out_of_plain_data_take_their_defaults(method: Method, data: Any) -> None:
    """Of each component a random part of the settings is dropped: the rest is read as it stands."""
    plain = to_plain(method)
    expected: dict[str, Any] = {}
    for kind in FIELDS:
        component = getattr(method, kind)
        if component is None:
            continue
        cls = type(component)
        names = [field.name for field in attrs.fields(cls)]
        kept = {n for n in names if data.draw(st.booleans(), f"{kind}.{n}")}
        plain[kind] = {k: v for k, v in plain[kind].items() if k == "name" or k in kept}
        try:
            expected[kind] = cls(**{n: getattr(component, n) for n in kept})
        except LrkitError:
            assume(False)
    try:
        wanted = Method(**expected, also=method.also)
    except LrkitError as error:
        with pytest.raises(LrkitError, match=re.escape(str(error))):
            from_plain(plain)
    else:
        same(from_plain(plain), wanted)


def test_a_name_alone_is_a_component_with_its_defaults() -> None:
    plain = {"parameterization": "svd", "metric": "magnitude", "scheduler": "linear", "action": "prune"}
    same(
        from_plain(plain),
        Method(parameterization=SVD(), metric=Magnitude(), scheduler=Linear(), action=Prune(), also=()),
    )
    same(from_plain({"parameterization": {"name": "lora"}}), Method(parameterization=LoRA()))


def test_a_whole_number_in_a_real_setting_is_equal_after_the_way_there_and_back() -> None:
    method = methods.lora(alpha=16)
    assert from_plain(json.loads(json.dumps(to_plain(method)))) == method


def test_plain_data_is_a_copy() -> None:
    method = methods.adalora()
    plain = to_plain(method)
    plain["parameterization"]["rank"] = 1
    plain["also"].append("anything")
    assert to_plain(method)["parameterization"]["rank"] == 12
    assert to_plain(method)["also"] == []


def test_a_component_of_ones_own_needs_to_be_registered() -> None:
    @attrs.frozen(kw_only=True)
    class Mine(Magnitude):
        power: int = 2

    method = attrs.evolve(methods.adalora(), metric=Mine(power=3))
    with pytest.raises(LrkitError, match=r"Mine is not registered.*lrkit_metrics"):
        to_plain(method)
    registry = Registry(discover=False)
    registry.add("mine 1.0", "mine", _Offers(lrkit_metrics={"mine": Mine}))
    assert registry.problems == []
    plain = to_plain(method, registry)
    assert (plain["metric"]["name"], plain["metric"]["power"]) == ("mine", 3)
    same(from_plain(json.loads(json.dumps(plain)), registry), method)
    with pytest.raises(LrkitError, match=r'unknown metric "mine"'):
        from_plain(plain)


class _Offers:
    """A plug-in object that offers what it is given."""

    def __init__(self, **hooks: dict[str, Any]) -> None:
        for name, offered in hooks.items():
            setattr(self, name, lrkit.hookimpl(lambda offered=offered: offered))


# ---- the named compositions ------------------------------------------------------------------------------------------


def leaves(plain: Any, path: str = "") -> dict[str, Any]:
    if isinstance(plain, dict):
        return {p: v for key, item in plain.items() for p, v in leaves(item, f"{path}.{key}".strip(".")).items()}
    return {path: plain}


ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "lora": (
        {"rank": 3, "alpha": 5.5, "dropout": 0.25, "scale": "sqrt-rank", "init": "pissa"},
        {
            "parameterization.rank": 3,
            "parameterization.alpha": 5.5,
            "parameterization.dropout": 0.25,
            "parameterization.scale": "sqrt-rank",
            "parameterization.init": "pissa",
        },
    ),
    "dora": (
        {"rank": 3, "alpha": 5.5, "dropout": 0.25, "scale": "sqrt-rank"},
        {
            "parameterization.rank": 3,
            "parameterization.alpha": 5.5,
            "parameterization.dropout": 0.25,
            "parameterization.scale": "sqrt-rank",
        },
    ),
    "svd-lora": (
        {"rank": 3, "alpha": 5.5, "orthogonality": 0.75},
        {"parameterization.rank": 3, "parameterization.alpha": 5.5, "parameterization.orthogonality": 0.75},
    ),
    "elora": ({"rank": 7, "shared": True}, {"parameterization.rank": 7, "parameterization.shared": True}),
    "adalora": (
        {
            "rank": 9,
            "target_rank": 5,
            "warmup": 11,
            "final": 13,
            "interval": 17,
            "beta1": 0.25,
            "beta2": 0.75,
            "alpha": 5.5,
            "orthogonality": 0.5,
        },
        {
            "parameterization.rank": 9,
            "parameterization.alpha": 5.5,
            "parameterization.orthogonality": 0.5,
            "scheduler.target": 5,
            "scheduler.warmup": 11,
            "scheduler.final": 13,
            "scheduler.interval": 17,
            "metric.beta1": 0.25,
            "metric.beta2": 0.75,
        },
    ),
    "aflora": (
        {
            "rank": 9,
            "train": "attention",
            "warmup": 11,
            "final": 13,
            "interval": 17,
            "beta1": 0.25,
            "beta2": 0.75,
            "together": True,
        },
        {
            "parameterization.rank": 9,
            "parameterization.train": "attention",
            "scheduler.warmup": 11,
            "scheduler.final": 13,
            "scheduler.interval": 17,
            "metric.beta1": 0.25,
            "metric.beta2": 0.75,
            "action.together": True,
        },
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_a_named_method_reaches_its_setting_and_no_other(name: str) -> None:
    import inspect

    factory = lrkit.registry.current().get("method", name)
    arguments, settings = ARGUMENTS[name]
    assert {*arguments, "variant"} == {*inspect.signature(factory).parameters, "variant"}
    default = leaves(to_plain(factory()))
    assert leaves(to_plain(factory(**arguments))) == {**default, **settings}
    for path in settings:
        assert default[path] != settings[path]


VARIANTS = {
    "svd-lora": {"paper": {"parameterization.orthogonality_norm": "squared"}},
    "adalora": {
        "paper": {"parameterization.orthogonality_norm": "squared"},
        "released": {
            "metric.measure": "after-step",
            "scheduler.first_step": 0,
            "scheduler.ending": "released",
            "action.ties": "threshold",
        },
        "peft": {
            "metric.measure": "after-step",
            "scheduler.first_step": 0,
            "scheduler.ending": "peft",
            "action.ties": "threshold",
        },
    },
    "aflora": {
        "released": {
            "metric.window": 10,
            "metric.measure": "before-clipping",
            "scheduler.first_step": 0,
            "scheduler.ending": "released",
            "action.rule": "quantile",
        }
    },
}


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n, variants in VARIANTS.items() for v in variants])
def test_a_variant_differs_in_what_it_says_and_takes_the_same_arguments(name: str, variant: str) -> None:
    factory = lrkit.registry.current().get("method", name)
    changed = VARIANTS[name][variant]
    assert leaves(to_plain(factory(variant=variant))) == {**leaves(to_plain(factory())), **changed}
    arguments, settings = ARGUMENTS[name]
    assert leaves(to_plain(factory(variant=variant, **arguments))) == {
        **leaves(to_plain(factory(variant=variant))),
        **settings,
    }
    there_and_back(factory(variant=variant))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("variant", ["Paper", "", None, True, 1], ids=repr)
def test_an_unknown_variant_is_refused(name: str, variant: Any) -> None:
    with pytest.raises(LrkitError, match=f"{name.replace('-', '_')} variant must be"):
        lrkit.registry.current().get("method", name)(variant=variant)
    default = "paper" if name == "aflora" else "default"
    assert lrkit.registry.current().get("method", name)(variant=default) == lrkit.current().get("method", name)()


def test_the_compositions_of_the_papers() -> None:
    same(
        methods.adalora(rank=12, target_rank=8, variant="paper"),
        Method(
            parameterization=SVD(rank=12, alpha=None, orthogonality=0.1, orthogonality_norm="squared"),
            metric=SensitivityUncertainty(beta1=0.85, beta2=0.85),
            scheduler=Cubic(target=8, warmup=0.15, final=0.5, interval=0.002),
            action=Prune(),
        ),
    )
    same(
        methods.aflora(),
        Method(
            parameterization=VectorScaled(rank=4, train="ffn", shared=False, d_init=0.1),
            metric=GradientUncertainty(beta1=0.85, beta2=0.95),
            scheduler=Cubic(target=0.0, warmup=0.05, final=0.7, interval=1),
            action=Freeze(together=False),
        ),
    )
    same(methods.elora(), Method(parameterization=VectorScaled(rank=1024, train="none", d_init=0.1)))
    same(methods.full(), Method(parameterization=Full()))
    assert type(methods.lora().parameterization) is LoRA
    same(methods.dora(), Method(parameterization=DoRA(rank=8, alpha=16.0, form="lora", dropout=0.0)))
    assert type(methods.svd_lora().parameterization) is SVD


# ---- a method is frozen, and swapped by evolve -----------------------------------------------------------------------


def test_evolve_swaps_one_part_and_leaves_the_rest() -> None:
    method = methods.adalora()
    swapped = attrs.evolve(method, metric=Magnitude())
    assert swapped.metric == Magnitude()
    for kind in ("parameterization", "scheduler", "action", "also"):
        assert getattr(swapped, kind) is getattr(method, kind)
    assert method.metric == SensitivityUncertainty()
    assert swapped != method
    assert attrs.evolve(swapped, metric=method.metric) == method


def test_prune_and_freeze_in_one_run_is_one_line() -> None:
    hybrid = attrs.evolve(
        methods.aflora(rank=4),
        also=(Policy(metric=SensitivityUncertainty(), scheduler=Cubic(target=2), action=Prune()),),
    )
    assert [type(policy.action) for policy in hybrid.policies] == [Freeze, Prune]
    assert hybrid.policies[0] == Policy(
        metric=GradientUncertainty(), scheduler=Cubic(target=0.0, warmup=0.05, final=0.7), action=Freeze()
    )
    there_and_back(hybrid)


def test_policies_are_in_the_order_in_which_they_act() -> None:
    one = Policy(metric=Magnitude(), scheduler=Linear(), action=Prune())
    two = Policy(metric=Sensitivity(), scheduler=Constant(), action=Prune())
    assert methods.lora().policies == ()
    assert Method(parameterization=SVD(), also=[one, two]).policies == (one, two)
    assert attrs.evolve(methods.adalora(), also=[two, one]).policies[1:] == (two, one)
    assert attrs.evolve(methods.adalora(), also=one).also == (one,)


@pytest.mark.parametrize(
    ("instance", "field"),
    [
        (methods.adalora(), "metric"),
        (methods.adalora().policies[0], "action"),
        (SVD(), "rank"),
        (Magnitude(), "measure"),
        (Cubic(), "target"),
        (Freeze(), "together"),
    ],
)
def test_all_of_it_is_frozen(instance: Any, field: str) -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(instance, field, 1)
    with pytest.raises(TypeError):
        type(instance)(1)
    assert hash(instance) == hash(attrs.evolve(instance))


def test_a_method_has_no_name() -> None:
    assert [field.name for field in attrs.fields(Method)] == [*FIELDS, "also"]


# ---- what cannot work is refused when it is built --------------------------------------------------------------------

prune = {"metric": SensitivityUncertainty(), "scheduler": Cubic(), "action": Prune()}
freeze = {"metric": GradientUncertainty(), "scheduler": Cubic(), "action": Freeze()}
together = {**freeze, "action": Freeze(together=True)}

REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "pruning LoRA": ({"parameterization": LoRA(rank=3), **prune}, ("Prune(", "LoRA(rank=3", "core value")),
    "pruning full fine-tuning": ({"parameterization": Full(), **prune}, ("Prune(", "Full()", "core value")),
    "freezing what never trains": (
        {"parameterization": VectorScaled(train="none"), **freeze},
        ("Freeze(together=False", "VectorScaled(rank=4, train='none'", "matrices that train"),
    ),
    "freezing layers that never train": (
        {"parameterization": VectorScaled(train="none", shared=True), **together},
        ("Freeze(together=True", "VectorScaled(rank=4, train='none', shared=True", "matrices that train"),
    ),
    "a core metric for matrices": (
        {"parameterization": SVD(), **freeze, "metric": Magnitude()},
        ("Magnitude(", "Freeze(together=False", "'matrix'"),
    ),
    "a core metric for layers": (
        {"parameterization": LoRA(), **together, "metric": Magnitude()},
        ("Magnitude(", "Freeze(together=True", "'layer'"),
    ),
    "target rank above the rank": (
        {"parameterization": SVD(rank=8), **prune, "scheduler": Cubic(target=12)},
        ("Cubic.target = 12", "initial rank 8", "SVD(rank=8", "at most 8"),
    ),
    "target rank above the rank of gates": (
        {"parameterization": VectorScaled(rank=3), **prune, "scheduler": Linear(target=4)},
        ("Linear.target = 4", "initial rank 3", "VectorScaled(rank=3", "at most 3"),
    ),
    "start above the rank": (
        {"parameterization": SVD(rank=8), **prune, "scheduler": Constant(target=4, start=9)},
        ("Constant.start = 9", "initial rank 8", "SVD(rank=8", "at most 8"),
    ),
    "more matrices than there are": (
        {"parameterization": LoRA(rank=8), **freeze, "scheduler": Cubic(target=3)},
        ("Cubic.target = 3", "number of units (matrix) 2", "LoRA(rank=8", "at most 2"),
    ),
    "more layers than there are": (
        {"parameterization": LoRA(rank=8), **together, "scheduler": Cubic(target=2)},
        ("Cubic.target = 2", "number of units (layer) 1", "LoRA(rank=8", "at most 1"),
    ),
    "more weights than there are": (
        {"parameterization": Full(), **freeze, "scheduler": Cubic(target=2)},
        ("Cubic.target = 2", "number of units (matrix) 1", "Full()", "at most 1"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("where", ["method", "also", "also, behind one that fits"])
def test_a_combination_that_does_not_fit_is_refused_with_both_sides_named(case: str, where: str) -> None:
    fields, named = REFUSED[case]
    parameterization = fields["parameterization"]
    policy = {name: fields[name] for name in ("metric", "scheduler", "action")}
    if where != "method":
        fits = Policy(**(prune if isinstance(parameterization, SVD | VectorScaled) else freeze))
        also = (Policy(**policy),) if where == "also" else (fits, Policy(**policy))
        fields = {"parameterization": parameterization, "also": also}
    with pytest.raises(LrkitError) as caught:
        Method(**fields)
    message = str(caught.value)
    assert "\n" not in message
    for words in named:
        assert words in message


def test_an_action_of_ones_own_needs_no_refusal_where_there_are_no_such_units() -> None:
    @attrs.frozen(kw_only=True)
    class Components(Freeze):
        @property
        def unit(self) -> Any:
            return "component"

        def refusal(self, parameterization: Any) -> None:
            return None

    Method(parameterization=LoRA(), **{**freeze, "action": Components()})
    with pytest.raises(LrkitError, match=r"Components\(.*Full\(\).*'component', and there are none that train"):
        Method(parameterization=Full(), **{**freeze, "action": Components()})


@attrs.frozen(kw_only=True)
class Widen(Prune):
    """An action that may add components."""

    grows = True


def test_layers_that_grow_alone() -> None:
    """Components can be added if `fresh` says how they begin, and if no layer reads another one's tensors."""
    policy = {"metric": Sensitivity(), "scheduler": Cubic(target=0.5), "action": Widen()}
    own, shared = (VectorScaled(rank=4, train="none", shared=shared) for shared in (False, True))
    for fits in (SVD(rank=4), own):
        Method(parameterization=fits, **policy)

    @attrs.frozen(kw_only=True)
    class Silent(SVD):
        fresh = lrkit.Parameterization.fresh

    for not_alone in (shared, Silent(rank=4)):
        name = type(not_alone).__name__
        with pytest.raises(LrkitError, match=rf"Widen\(.*{name}\(.*does not say how a new one begins") as caught:
            Method(parameterization=not_alone, **policy)
        assert ("share tensors" in str(caught.value)) == (not_alone is shared)


@pytest.mark.parametrize("amounts", [{"start": 2, "target": 9}, {"start": 0.25, "target": 0.5}], ids=repr)
def test_a_budget_that_rises(amounts: dict[str, Any]) -> None:
    """A budget may rise, and above the first rank, if the action adds units; for any other it is refused."""
    policy = {"metric": Sensitivity(), "scheduler": Cubic(**amounts)}
    Method(parameterization=SVD(rank=4), action=Widen(), **policy)
    with pytest.raises(LrkitError, match=r"Cubic\.target = .* is above start = .*Prune\(.*adds no units"):
        Method(parameterization=SVD(rank=4), action=Prune(), **policy)


@pytest.mark.parametrize("parameterization", [Full(), LoRA(rank=3), SVD(rank=5), VectorScaled(train="none")], ids=repr)
def test_units_that_train(parameterization: Any) -> None:
    """The most units of a kind are those that blocks of a model have, over its widest layer."""
    found = lrkit.attach(Mixed(), Method(parameterization=parameterization), targets=r"block\..*", train_also=())
    trained = {id(p) for p in found.parameters()}
    for kind in ("component", "matrix", "layer"):
        blocks = blocks_of(found.adapters, parameterization.parts, kind, trained)  # type: ignore[arg-type]
        per_layer = [sum(b.count for b in blocks if b.module is m) for m in found.adapters.values()]
        assert most_units(parameterization, kind) == max(per_layer)  # type: ignore[arg-type]


def test_a_swap_that_does_not_fit_is_refused() -> None:
    method = methods.adalora(rank=12, target_rank=8)
    with pytest.raises(LrkitError, match=r"Cubic\.target = 8 is above the initial rank 4 of SVD\(rank=4"):
        attrs.evolve(method, parameterization=SVD(rank=4))
    with pytest.raises(LrkitError, match=r"Prune\(.*LoRA\("):
        attrs.evolve(method, parameterization=LoRA(rank=12))
    with pytest.raises(LrkitError, match=r"Cubic\.target = 13 .* rank 12 of SVD"):
        methods.adalora(rank=12, target_rank=13)
    with pytest.raises(LrkitError, match=r"Cubic\.target = 8 .* rank 3 of SVD"):
        methods.adalora(rank=3)


def test_what_is_kept_may_be_everything() -> None:
    assert methods.adalora(rank=8, target_rank=8).scheduler == Cubic(target=8, warmup=0.15, final=0.5, interval=0.002)
    Method(parameterization=LoRA(), **{**freeze, "scheduler": Cubic(target=2)})
    Method(parameterization=LoRA(), **{**together, "scheduler": Cubic(target=1)})
    Method(parameterization=SVD(rank=5), **{**prune, "scheduler": Cubic(target=0, start=5)})


@pytest.mark.parametrize("given_", [n for k in (1, 2) for n in itertools.combinations(prune, k)], ids="+".join)
def test_a_policy_is_whole_or_not_there(given_: tuple[str, ...]) -> None:
    missing = [name for name in prune if name not in given_]
    with pytest.raises(LrkitError) as caught:
        Method(parameterization=SVD(), **{name: prune[name] for name in given_})
    assert f"{' and '.join(given_)} given, {' and '.join(missing)} missing" in str(caught.value)
    with pytest.raises(LrkitError, match="missing"):
        attrs.evolve(methods.adalora(), **dict.fromkeys(missing))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a class": ({"metric": Magnitude}, "metric must be an Importance, not .*write Magnitude\\(\\)"),
    "a class for the parameterization": ({"parameterization": SVD}, "must be a Parameterization.*write SVD\\(\\)"),
    "a class for the scheduler": ({"scheduler": Cubic}, "must be a Scheduler.*write Cubic\\(\\)"),
    "a class for the action": ({"action": Prune}, "must be an? Action.*write Prune\\(\\)"),
    "another kind": ({"metric": Cubic()}, "metric must be an Importance, not Cubic\\("),
    "a name": ({"action": "prune"}, "action must be an? Action, not 'prune'"),
    "nothing": ({"parameterization": None}, "parameterization must be a Parameterization, not None"),
    "a method": ({"parameterization": methods.lora()}, "must be a Parameterization, not Method\\("),
    "an action in also": ({"also": [Prune()]}, "also must hold lrkit.Policy.*not Prune\\("),
    "a class in also": ({"also": [Policy]}, "also must hold lrkit.Policy.*not <class"),
    "plain data in also": ({"also": [{"metric": "magnitude"}]}, "also must hold lrkit.Policy"),
    "a number as also": ({"also": 5}, "also must"),
    "nothing as also": ({"also": None}, "also must"),
    "a class as also": ({"also": Policy}, "also must"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_type_is_refused_in_one_line(case: str) -> None:
    fields, message = WRONG[case]
    with pytest.raises(LrkitError, match=message) as caught:
        attrs.evolve(methods.adalora(), **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["metric", "scheduler", "action"])
@pytest.mark.parametrize("value", [None, Magnitude, "cubic", 3, SVD()], ids=repr)
def test_a_policy_takes_no_other_types(field: str, value: Any) -> None:
    base = {"metric": "Importance"}.get(field, field.capitalize())
    with pytest.raises(LrkitError, match=rf"Policy\.{field} must be an? {base}, not "):
        Policy(**{**prune, field: value})


def _build(**fields: Any) -> tuple[Method | None, str]:
    """A method; or None and why it was refused."""
    try:
        return Method(**fields), ""
    except LrkitError as error:
        return None, str(error)


class Mixed(nn.Module):
    """Two attention and two FFN maps under the names that tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict(
            {
                "attention": nn.ModuleDict({"query": nn.Linear(5, 6), "output": nn.Linear(6, 5)}),
                "mlp": nn.ModuleDict({"up": nn.Linear(5, 7), "down": nn.Linear(7, 5)}),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.block.values():
            for layer in part.values():
                x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("action", [Prune(), Freeze(), Freeze(together=True)], ids=repr)
@pytest.mark.parametrize(
    "parameterization",
    [
        Full(),
        LoRA(rank=3),
        SVD(rank=3),
        *(VectorScaled(rank=3, train=train) for train in ("ffn", "attention", "both", "none")),
        VectorScaled(rank=3, train="none", shared=True),
    ],
    ids=repr,
)
def test_any_combination_trains_or_is_refused_when_it_is_built(parameterization: Any, action: Any) -> None:
    """Every built-in metric and scheduler on it: six steps of training that move something, or a refusal before."""
    registry = lrkit.registry.current()
    offered = [[o.value for o in registry.offers(kind)] for kind in ("metric", "scheduler")]
    built = 0
    for metric, scheduler in itertools.product(*offered):
        phases = {} if scheduler().at_start else {"warmup": 1, "final": 1}
        fields = {"metric": metric(), "scheduler": scheduler(target=0.5, **phases), "action": action}
        method, refusal = _build(parameterization=parameterization, **fields)
        if method is None:
            names = [type(part).__name__ for part in (parameterization, *fields.values())]
            assert sum(f"{name}(" in refusal for name in names) >= 2, refusal
            continue
        built += 1
        torch.manual_seed(0)
        model = Mixed()
        adapted = lrkit.attach(model, method, targets=r"block\..*", train_also=())
        before = [p.detach().clone() for p in adapted.parameters()]
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01)
        x = torch.randn(4, 5)
        if scheduler().at_start:
            adapted.calibrate([x], loss=lambda x, model=model: model(x).square().mean())
        adapted.bind(optimizer, total_steps=6)
        for _ in range(6):
            (model(x).square().mean() + adapted.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        decisions = adapted.history
        assert decisions and decisions[-1].kept == decisions[-1].budget == decisions[-1].units // 2
        assert any(not torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))
        adapted.detach()
    can = {
        Prune: isinstance(parameterization, SVD | VectorScaled),
        Freeze: getattr(parameterization, "train", "both") != "none",
    }[type(action)]
    # Every metric but magnitude reads any unit; magnitude is for components alone.
    assert built == (0 if not can else 30 if isinstance(action, Prune) else 25)


# ---- plain data that is wrong ----------------------------------------------------------------------------------------

ADALORA = to_plain(methods.adalora(), Registry(discover=False))

BAD_PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt part": (
        {"parametrization": "svd"},
        r'no setting "parametrization" \(did you mean "parameterization"\?\)',
    ),
    "no parameterization": ({"metric": "magnitude"}, "needs a parameterization"),
    "empty": ({}, "needs a parameterization"),
    "misspelt name": ({"parameterization": "svdd"}, r'unknown parameterization "svdd" \(did you mean "svd"\?\)'),
    "another kind's name": ({"parameterization": "cubic"}, 'unknown parameterization "cubic"'),
    "misspelt setting": (
        {"parameterization": {"name": "svd", "rnk": 3}},
        r'parameterization has no setting "rnk" \(did you mean "rank"\?\)',
    ),
    "setting of another component": (
        {"parameterization": {"name": "lora", "orthogonality": 0.1}},
        'parameterization has no setting "orthogonality".*there are rank, alpha, dropout',
    ),
    "setting of another action": (
        {**ADALORA, "action": {"name": "prune", "together": True}},
        'action has no setting "together"',
    ),
    "setting where there are none": (
        {"parameterization": {"name": "full", "rank": 3}},
        'has no setting "rank".*it has none',
    ),
    "a table without a name": ({"parameterization": {"rank": 3}}, "parameterization must be a name, or a table"),
    "a number": ({"parameterization": 3}, "parameterization must be a name, or a table.*not 3"),
    "a list": ({"parameterization": ["svd"]}, "parameterization must be a name, or a table"),
    "no policy": ({"parameterization": "svd", "metric": "magnitude"}, "scheduler and action missing"),
    "a name in also": ({**ADALORA, "also": ["prune"]}, r"also\.0 must be a table with metric, scheduler and action"),
    "half a policy in also": ({**ADALORA, "also": [{"metric": "magnitude"}]}, r"also\.0 lacks scheduler and action"),
    "misspelt in also": (
        {**ADALORA, "also": [{"metric": "magnitude", "schedule": "cubic", "action": "prune"}]},
        r'also\.0 has no setting "schedule" \(did you mean "scheduler"\?\)',
    ),
    "misspelt setting in also": (
        {**ADALORA, "also": [{"metric": {"name": "sensitivity", "beta": 1}, "scheduler": "cubic", "action": "prune"}]},
        r'also\.0\.metric has no setting "beta" \(did you mean "beta1"\?\)',
    ),
    "misspelt name in also": (
        {**ADALORA, "also": [{"metric": "magnitud", "scheduler": "cubic", "action": "prune"}]},
        r'unknown metric "magnitud" \(did you mean "magnitude"\?\)',
    ),
    "a number as also": ({**ADALORA, "also": 5}, "also must"),
    "a table as also": ({**ADALORA, "also": {"metric": "magnitude"}}, "also"),
    "a rank above": (
        {**ADALORA, "parameterization": {"name": "svd", "rank": 4}},
        r"Cubic\.target = 8 is above the initial rank 4 of SVD",
    ),
    "out of range": (
        {"parameterization": {"name": "svd", "rank": 0}},
        r"SVD\.rank must be an int of at least 1, not 0",
    ),
}


@pytest.mark.parametrize("case", BAD_PLAIN)
def test_wrong_plain_data_is_refused_in_one_line(case: str) -> None:
    plain, message = BAD_PLAIN[case]
    with pytest.raises(LrkitError, match=message) as caught:
        from_plain(plain)
    assert "\n" not in str(caught.value)


COERCED: list[tuple[str, Any]] = [
    *(("parameterization.rank", value) for value in (4.5, 8.0, "8", True, None, [8], {"a": "8"}, 1e300)),
    *(("parameterization.alpha", value) for value in ("16", True, [16.0])),
    *(("parameterization.init_std", value) for value in ("0.02", True, None)),
    *(("parameterization.orthogonality_norm", value) for value in ("Squared", "square", 1, None, True)),
    *(("metric.beta1", value) for value in ("0.85", True, False, None)),
    *(("metric.measure", value) for value in ("before", 0, None)),
    *((f"scheduler.{name}", v) for name in ("target", "warmup", "final") for v in ("8", True, False, None, [8])),
    *(("scheduler.interval", value) for value in ("8", True, None)),
    *(("scheduler.first_step", value) for value in (True, False, 1.0, "1", 2, None)),
]


@pytest.mark.parametrize(("path", "value"), COERCED, ids=lambda v: v if isinstance(v, str) else repr(v))
def test_no_value_is_coerced(path: str, value: Any) -> None:
    with pytest.raises(LrkitError) as caught:
        from_plain(with_setting(ADALORA, path, value))
    assert path.rpartition(".")[2] in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@attrs.frozen(kw_only=True)
class Unchecked(Magnitude):
    """A metric of a plug-in that validates nothing itself: its annotations are what there is."""

    count: int = 1
    rate: float = 0.5
    label: str = "a"
    on: bool = False
    mode: Literal["slow", "fast", 1] = "slow"
    either: float | int = 0.5
    maybe: int | None = None
    several: tuple[int, ...] = ()


UNCHECKED: dict[str, tuple[list[Any], list[Any]]] = {
    "count": ([0, 8, -1, 10**30], [8.0, 4.5, "8", True, None, [8]]),
    "rate": ([0.5, 1e300], ["0.5", True, None, [0.5]]),
    "label": (["", "8", "none"], [8, True, None, 0.5, ["a"]]),
    "on": ([True, False], [0, 1, "true", None, 1.0]),
    "mode": (["fast", 1], ["Fast", True, 1.0, None, "1", ["fast"]]),
    "either": ([8, 8.0, 0.5], ["8", True, None]),
    "maybe": ([None, 3], [3.0, "3", True, "none"]),
    "several": ([[], [1, 2]], [[1.5], [True], ["1"], 1, None, "12"]),
}


@pytest.mark.parametrize("setting", UNCHECKED)
def test_values_are_as_annotated_where_the_class_itself_checks_nothing(setting: str) -> None:
    registry = Registry(discover=False)
    registry.add("unchecked 1.0", "unchecked", _Offers(lrkit_metrics={"unchecked": Unchecked}))
    plain = with_component(ADALORA, "metric", "unchecked", registry)
    right, wrong = UNCHECKED[setting]
    for value in right:
        plain["metric"][setting] = value
        method = from_plain(plain, registry)
        got = getattr(method.metric, setting)
        assert repr(got) == repr(tuple(value) if isinstance(value, list) else value)
        back = json.loads(json.dumps(to_plain(method, registry)))
        assert repr(back["metric"][setting]) == repr(value)
        same(from_plain(back, registry), method)
    for value in wrong:
        plain["metric"][setting] = value
        with pytest.raises(LrkitError, match=rf"metric\.{setting} must be "):
            from_plain(plain, registry)


@pytest.mark.parametrize("value", [0, 1, "true", "false", 1.0, None], ids=repr)
@pytest.mark.parametrize("name", ["aflora", "elora"])
def test_a_flag_is_true_or_false(name: str, value: Any) -> None:
    plain = to_plain(lrkit.registry.current().get("method", name)())
    path = {"aflora": "action.together", "elora": "parameterization.shared"}[name]
    with pytest.raises(LrkitError, match=path.rpartition(".")[2]):
        from_plain(with_setting(plain, path, value))


@pytest.mark.parametrize(
    ("cls", "setting"),
    [
        (SVD, {"rank": 4.5}),
        (SVD, {"rank": 8.0}),
        (SVD, {"rank": "8"}),
        (SVD, {"rank": True}),
        (SVD, {"alpha": "16"}),
        (SVD, {"alpha": True}),
        (SVD, {"alpha": float("nan")}),
        (LoRA, {"alpha": float("inf")}),
        (LoRA, {"dropout": 1.0}),
        (LoRA, {"dropout": True}),
        (VectorScaled, {"shared": 1, "train": "none"}),
        (VectorScaled, {"train": "FFN"}),
        (Sensitivity, {"smoothed": 1}),
        (SensitivityUncertainty, {"beta1": 1.0}),
        (RatioUncertainty, {"epsilon": 0.0}),
        (Cubic, {"target": True}),
        (Cubic, {"target": 8.0}),
        (Cubic, {"target": -1}),
        (Cubic, {"warmup": 1.5}),
        (Cubic, {"final": "0.5"}),
        (Cubic, {"interval": 0}),
        (Cubic, {"first_step": True}),
        (Freeze, {"together": 0}),
    ],
    ids=str,
)
def test_a_component_takes_no_value_that_cannot_be_meant(cls: type, setting: dict[str, Any]) -> None:
    name, value = next(iter(setting.items()))
    with pytest.raises(LrkitError, match=re.escape(f"{cls.__name__}.{name} must be ")) as caught:
        cls(**setting)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["target", "start", "warmup", "final", "interval"])
def test_an_int_stays_an_int_and_a_float_a_float_where_they_differ(name: str) -> None:
    for value in (1, 1.0):
        ADALORA_SMALL = with_setting(ADALORA, "scheduler.target", 1) if name == "start" else ADALORA
        plain = json.loads(json.dumps(with_setting(ADALORA_SMALL, f"scheduler.{name}", value)))
        got = getattr(from_plain(plain).scheduler, name)
        assert type(got) is type(value) and got == value
        back = json.loads(json.dumps(to_plain(from_plain(plain))))["scheduler"][name]
        assert type(back) is type(value)


# ---- one setting, one component --------------------------------------------------------------------------------------

HYBRID = to_plain(
    attrs.evolve(
        methods.aflora(rank=4),
        also=(
            Policy(metric=Magnitude(), scheduler=Linear(target=3), action=Prune()),
            Policy(metric=Sensitivity(), scheduler=Cubic(target=2), action=Prune()),
        ),
    ),
    Registry(discover=False),
)


@pytest.mark.parametrize(
    ("plain", "path", "value"),
    [
        (ADALORA, "parameterization.rank", 9),
        (ADALORA, "parameterization.alpha", 16.0),
        (ADALORA, "metric.beta2", 0.5),
        (ADALORA, "scheduler.target", 0.25),
        (HYBRID, "action.together", True),
        (HYBRID, "also.0.scheduler.target", 1),
        (HYBRID, "also.1.metric.smoothed", True),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_one_setting_is_changed_and_nothing_else(plain: dict[str, Any], path: str, value: Any) -> None:
    before = json.dumps(plain)
    changed = with_setting(plain, path, value)
    assert json.dumps(plain) == before, "the data given is left as it was"
    node: Any = json.loads(before)
    *owners, key = path.split(".")
    at = node
    for name in owners:
        at = at[int(name)] if isinstance(at, list) else at[name]
    assert at[key] != value
    at[key] = value
    assert changed == node
    same(from_plain(changed), from_plain(node))


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("parameterization.rnk", 'did you mean "parameterization.rank"?'),
        ("parametrization.rank", 'did you mean "parameterization"?'),
        ("metric.betta1", 'did you mean "metric.beta1"?'),
        ("rank", "did you mean parameterization.rank?"),
        ("target", "did you mean scheduler.target?"),
        ("scheduler.rank", "did you mean parameterization.rank?"),
        ("beta1", "did you mean metric.beta1?"),
        ("also.0.metric.beta1", 'no "0"'),
        ("parameterization.rank.deeper", "parameterization.rank"),
        ("parameterization.", "parameterization has rank"),
        (".rank", "rank"),
        ("", "no setting"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_one(path: str, hint: str) -> None:
    with pytest.raises(LrkitError) as caught:
        with_setting(ADALORA, path, 3)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["parameterization", "metric", "also", "parameterization.name", "metric.name"])
def test_a_component_is_not_a_setting(path: str) -> None:
    with pytest.raises(LrkitError, match=f'no setting "{path}"'):
        with_setting(ADALORA, path, "lora")


def test_a_setting_of_a_part_that_is_not_there() -> None:
    with pytest.raises(LrkitError) as caught:
        with_setting(to_plain(methods.lora()), "scheduler.target", 4)
    assert 'did you mean "scheduler"' not in str(caught.value), "the name is right; it is the part that is missing"
    assert "scheduler" in str(caught.value)


def test_a_scheduler_swapped_in_takes_over_the_times_and_amounts() -> None:
    plain = to_plain(methods.adalora(rank=9, target_rank=5, warmup=11, final=0.25, interval=17))
    plain = with_setting(with_setting(plain, "scheduler.first_step", 0), "scheduler.start", 0.75)
    before = json.dumps(plain)
    swapped = from_plain(with_component(plain, "scheduler", "linear"))
    same(
        swapped,
        attrs.evolve(
            from_plain(plain),
            scheduler=Linear(target=5, start=0.75, warmup=11, final=0.25, interval=17, first_step=0),
        ),
    )
    assert json.dumps(plain) == before


def test_a_metric_swapped_in_takes_over_the_betas() -> None:
    plain = to_plain(methods.adalora(beta1=0.25, beta2=0.75))
    plain = with_setting(plain, "metric.measure", "after-step")
    metric = from_plain(with_component(plain, "metric", "ratio-uncertainty")).metric
    assert metric == RatioUncertainty(beta1=0.25, beta2=0.75, measure="after-step")
    assert metric.epsilon == RatioUncertainty().epsilon
    # one that has no β2, and one that has none at all
    assert from_plain(with_component(plain, "metric", "sensitivity")).metric == Sensitivity(
        beta1=0.25, measure="after-step"
    )
    assert from_plain(with_component(plain, "metric", "magnitude")).metric == Magnitude(measure="after-step")


def test_a_value_whose_type_does_not_fit_is_left_at_the_default() -> None:
    # SVD may have no α; LoRA's must be a number.
    plain = to_plain(methods.svd_lora(rank=5))
    assert plain["parameterization"]["alpha"] is None
    same(from_plain(with_component(plain, "parameterization", "lora")), methods.lora(rank=5))
    plain = to_plain(methods.svd_lora(rank=5, alpha=3.0))
    same(from_plain(with_component(plain, "parameterization", "lora")), methods.lora(rank=5, alpha=3.0))

    @attrs.frozen(kw_only=True)
    class Steps(Cubic):
        warmup: int = attrs.field(default=7)
        final: float = attrs.field(default=0.5, validator=real(0.0, 1.0))

    registry = Registry(discover=False)
    registry.add("steps 1.0", "steps", _Offers(lrkit_schedulers={"steps": Steps}))
    plain = to_plain(methods.adalora(warmup=0.25, final=0.75))
    scheduler = from_plain(with_component(plain, "scheduler", "steps", registry), registry).scheduler
    assert scheduler == Steps(target=8, interval=0.002, final=0.75)
    plain = to_plain(methods.adalora(warmup=3, final=0.75))
    scheduler = from_plain(with_component(plain, "scheduler", "steps", registry), registry).scheduler
    assert scheduler == Steps(target=8, interval=0.002, warmup=3, final=0.75)


def test_a_component_in_also_is_swapped() -> None:
    swapped = with_component(HYBRID, "also.1.scheduler", "linear")
    assert from_plain(swapped).also[1].scheduler == Linear(target=2)
    assert {k: v for k, v in swapped.items() if k != "also"} == {k: v for k, v in HYBRID.items() if k != "also"}
    assert swapped["also"][0] == HYBRID["also"][0]


def test_a_component_is_put_in_and_left_out() -> None:
    plain = to_plain(methods.svd_lora(rank=12))
    for part in ("metric", "scheduler", "action"):
        plain = with_component(plain, part, to_plain(methods.adalora())[part]["name"])
    assert from_plain(plain).policies == (Policy(metric=SensitivityUncertainty(), scheduler=Cubic(), action=Prune()),)
    for part in ("metric", "scheduler", "action"):
        plain = with_component(plain, part, None)
    same(from_plain(plain), Method(parameterization=SVD(rank=12, orthogonality=0.1)))


@pytest.mark.parametrize(
    ("kind", "name", "setting", "value"),
    [
        ("metric", "ratio-uncertainty", "epsilon", 1e-3),
        ("metric", "sensitivity", "smoothed", True),
        ("parameterization", "vector-scaled", "d_init", 0.5),
    ],
)
def test_a_setting_that_only_the_component_swapped_in_has_can_be_set(
    kind: str, name: str, setting: str, value: Any
) -> None:
    plain = with_setting(with_component(ADALORA, kind, name), f"{kind}.{setting}", value)
    assert getattr(getattr(from_plain(plain), kind), setting) == value


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("metrics", "magnitude", r'no component "metrics" \(did you mean "metric"\?\)'),
        ("metric", "magnitud", r'unknown metric "magnitud" \(did you mean "magnitude"\?\)'),
        ("metric", "cubic", 'unknown metric "cubic"'),
        ("parameterization.rank", "lora", 'no component "parameterization.rank"'),
        ("also", "prune", 'no component "also"'),
        ("also.0", "prune", r"also\.0"),
        ("also.0.metric", "magnitude", r"also\.0\.metric"),
        ("", "prune", 'no component ""'),
    ],
)
def test_an_unknown_component_is_refused(path: str, name: str, message: str) -> None:
    with pytest.raises(LrkitError, match=message) as caught:
        with_component(ADALORA, path, name)
    assert "\n" not in str(caught.value)


@given(drawn_methods(), st.data())
def test_any_swap_of_a_registered_component_gives_a_method_or_a_refusal(method: Method, data: Any) -> None:
    """Whatever is swapped in, what both have is taken over, and nothing else is carried along."""
    registry = lrkit.registry.current()
    kind = data.draw(st.sampled_from(FIELDS))
    name = data.draw(st.sampled_from(registry.names(kind)))
    plain = to_plain(method)
    swapped = with_component(plain, kind, name)
    assert {k: v for k, v in swapped.items() if k != kind} == {k: v for k, v in plain.items() if k != kind}
    fields = {field.name for field in attrs.fields(registry.get(kind, name))}
    old = plain[kind] or {}
    assert set(swapped[kind]) <= {"name", *fields}
    # When Magnitude measures is its own, and goes neither with a swap away from it nor with one to it.
    own = {"measure"} if "magnitude" in (name, old.get("name")) else set()
    for setting in own & fields:
        assert swapped[kind][setting] == attrs.fields_dict(registry.get(kind, name))[setting].default
    for setting in fields & set(old) - own:
        if (setting, old[setting], name) == ("alpha", None, "lora"):
            assert swapped[kind].get("alpha") in (None, LoRA().alpha), "LoRA has no scale of None: its default"
        else:
            assert swapped[kind][setting] == old[setting]
    try:
        built = from_plain(swapped)
    except LrkitError as error:
        refusal = str(error)
    else:
        there_and_back(built)
        return
    assert "\n" not in refusal


def test_a_swap_to_magnitude_keeps_magnitude_measured_after_the_step():
    """Before the step a masked component's λ is zero: measured there, none could ever come back."""
    plain = to_plain(lrkit.methods.adalora())
    assert plain["metric"]["measure"] == "before-step"
    swapped = with_component(plain, "metric", "magnitude")
    assert swapped["metric"]["measure"] == "after-step"
    assert with_component(swapped, "metric", "sensitivity")["metric"]["measure"] == "before-step"


# ---- composed by name ------------------------------------------------------------------------------------------------


def test_composed_as_in_code() -> None:
    """Arguments come first, then swaps, then settings: the method is the one that the same calls in code give."""
    plain = compose(
        "adalora",
        {"metric.epsilon": 1e-3, "target_rank": 4, "beta2": 0.5, "action.ties": "threshold"},
        {"metric": "ratio-uncertainty", "scheduler": {"name": "linear", "warmup": 3}},
    )
    base = methods.adalora(target_rank=4, beta2=0.5)
    same(
        from_plain(plain),
        attrs.evolve(
            base,
            metric=RatioUncertainty(beta1=0.85, beta2=0.5, epsilon=1e-3),
            scheduler=Linear(target=4, warmup=3, final=0.5, interval=0.002),
            action=Prune(ties="threshold"),
        ),
    )


def test_composed_from_plain_data() -> None:
    """A method that is plain data already has no arguments, and is left as it was."""
    before = json.dumps(ADALORA)
    changed = compose(ADALORA, {"scheduler.target": 3}, {"metric": "magnitude"})
    assert json.dumps(ADALORA) == before
    assert changed == with_setting(with_component(ADALORA, "metric", "magnitude"), "scheduler.target", 3)
    assert compose(ADALORA) == ADALORA
    with pytest.raises(LrkitError, match=r'no setting "target_rank"'):
        compose(ADALORA, {"target_rank": 3})


@given(drawn_methods(), drawn_methods())
def test_composed_by_swaps_alone(one: Method, other: Method) -> None:
    """A swap of each part, with all of its settings, gives the other method's parts, whatever was there."""
    plain, wanted = to_plain(one), to_plain(other)
    assert compose(plain, swaps={kind: wanted[kind] for kind in FIELDS}) == {**wanted, "also": plain["also"]}


@pytest.mark.parametrize(
    ("settings", "swaps", "message"),
    [
        ({"rnk": 3}, {}, r'method "adalora" has no argument "rnk" \(did you mean "rank"\?\)'),
        ({"rank": "8"}, {}, r"adalora rank must be int, not '8'"),
        ({"target_rank": -3}, {}, r"^adalora with target_rank=-3: Cubic\.target must be an int"),
        ({"rank": 4}, {}, r"^Cubic\.target = 8 is above the initial rank 4"),
        ({"metric.epsilon": 1.0}, {}, r'no setting "metric\.epsilon"'),
        ({}, {"metric": "magnitud"}, r'unknown metric "magnitud" \(did you mean "magnitude"\?\)'),
        ({}, {"metrc": "magnitude"}, r'no component "metrc" \(did you mean "metric"\?\)'),
        ({}, {"metric": 3}, r"metric must be a name, or a table with a name and settings, not 3"),
        ({}, {"metric": {"beta1": 0.5}}, r"metric must be a name, or a table with a name and settings"),
        ({}, {"metric": {"name": 3}}, r"metric must be a name, or a table with a name and settings"),
        ({}, {"metric": {"name": "sensitivity", "beta": 1}}, r'did you mean "metric\.beta1"'),
    ],
)
def test_nothing_that_cannot_be_meant(settings: dict[str, Any], swaps: dict[str, Any], message: str) -> None:
    """A wrong argument, setting or swap is refused in one line, with the nearest right one."""
    with pytest.raises(LrkitError, match=message) as caught:
        compose("adalora", settings, swaps)
    assert "\n" not in str(caught.value)


def test_choices_are_told_plainly() -> None:
    """A value that is none of a few is refused with these, and not with a Python annotation."""
    with pytest.raises(LrkitError, match=r"^x must be 'number' \| 'probability' \| None, not 'chance'$"):
        as_annotated("chance", Literal["number", "probability"] | None, "x")


def test_unknown_fates_are_refused() -> None:
    """An action that says no fate, or one that there is not, is refused when the method is built."""

    @attrs.frozen(kw_only=True)
    class Gone(Prune):
        fate = "gone"

    with pytest.raises(
        LrkitError, match=r"^action .*Gone\(.*fate must be one of masked, dimmed, frozen, removed, not 'gone'"
    ):
        attrs.evolve(methods.adalora(), action=Gone())
