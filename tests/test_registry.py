"""The registry: plug-ins by the same hooks as the built-ins, and what is wrong with one told in one line."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from torch import Tensor, nn

import lrkit
from lrkit import from_plain, hookimpl, hookspecs, to_plain
from lrkit.actions import Action, Fate, Freeze, Prune
from lrkit.errors import LrkitError
from lrkit.hookspecs import KINDS, hook_of
from lrkit.metrics import GradientUncertainty, Magnitude, Metric
from lrkit.parameterizations import LoRA, Parameterization
from lrkit.registry import BUILT_IN as MODULES
from lrkit.registry import PluginWarning, Registry
from lrkit.schedulers import Linear, Scheduler
from lrkit.tasks import Task

HOOKS = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("lrkit_")]
BUILT_IN = {
    (kind, name): value
    for kind in KINDS
    for module in map(importlib.import_module, MODULES)
    for name, value in getattr(module, hook_of(kind), dict)().items()
}


def module(**functions: Callable[..., Any]) -> types.ModuleType:
    """A plug-in module with these functions in it."""
    made = types.ModuleType("plugin")
    for name, function in functions.items():
        setattr(made, name, function)
    return made


def offering(**offers: Any) -> types.ModuleType:
    """A plug-in module whose hooks return what is given: ``offering(lrkit_metrics={"mine": Mine})``."""
    return module(**{hook: hookimpl(lambda offered=offered: offered) for hook, offered in offers.items()})


def load(*plugins: tuple[str, Any]) -> tuple[Registry, list[str]]:
    """A registry with these plug-ins (distribution, plug-in) beside the built-ins, and the lines it warned with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry(((who, "entry", plugin) for who, plugin in plugins), discover=False)
    assert all(issubclass(warning.category, PluginWarning) for warning in caught)
    assert [str(warning.message) for warning in caught] == [str(problem) for problem in registry.problems]
    return registry, [str(problem) for problem in registry.problems]


# ---- one plug-in of every kind, all good -----------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Halved(LoRA):
    """LoRA at half the rank unless told."""

    rank: int = 4


@attrs.frozen(kw_only=True)
class Alternating(Metric):
    """Every other entry matters."""

    buffers: ClassVar[tuple[str, ...]] = ()
    offset: int = 0

    def score(self, weight: Tensor, state: Any) -> Tensor:
        return (weight != 0).float()


@attrs.frozen(kw_only=True)
class Square(Scheduler):
    """(1 - u)²."""

    def decay(self, progress: float) -> float:
        return (1 - progress) ** 2


@attrs.frozen(kw_only=True)
class Null(Action):
    """Sets the core of losers to zero."""

    fate: ClassVar[Fate] = "masked"

    @property
    def unit(self) -> Any:
        return "component"

    def apply(self, blocks: Any, kept: Tensor, optimizer: Any) -> None:
        Prune().apply(blocks, kept, optimizer)


def halved(*, rank: int = 2) -> lrkit.Method:
    """A method."""
    return lrkit.Method(parameterization=Halved(rank=rank))


def reviews(rest: str | None) -> Task:
    """A task."""
    raise NotImplementedError


def threads(workers: int) -> Executor:
    """An executor."""
    return ThreadPoolExecutor(workers)


class Dense(lrkit.layers.Linear):
    """A kind of layer of a plug-in."""


GOOD: dict[str, dict[str, Any]] = {
    "lrkit_parameterizations": {"halved": Halved},
    "lrkit_metrics": {"alternating": Alternating},
    "lrkit_schedulers": {"square": Square},
    "lrkit_actions": {"idle": Null},
    "lrkit_methods": {"halved": halved},
    "lrkit_layers": {"dense": Dense},
    "lrkit_tasks": {"reviews": reviews},
    "lrkit_executors": {"threads": threads},
    "lrkit_studies": {"four-rows": 'title = "Four rows"\nbase = "lora"\n'},
}


def test_every_hook_has_a_kind_a_test_and_a_description() -> None:
    assert sorted(HOOKS) == sorted(GOOD) == sorted(hook_of(kind) for kind in KINDS)
    for hook in HOOKS:
        specification = getattr(hookspecs, hook)
        about = inspect.getdoc(specification)
        assert about and about.endswith(".") and "by name" in about, f"{hook}: say what it returns"
        assert not inspect.signature(specification).parameters, f"{hook}: returns what it offers, no register callback"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_in_the_documentation(hook: str) -> None:
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *(p for p in (root / "docs").rglob("*.md") if "_build" not in p.parts)]
    assert any(hook in page.read_text(encoding="utf-8") for page in pages if page.exists())


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_offers_by_name(hook: str) -> None:
    registry, lines = load(("good 1.0", offering(**{hook: GOOD[hook]})))
    assert lines == []
    kind = next(kind for kind in KINDS if hook_of(kind) == hook)
    (name, value), *_ = GOOD[hook].items()
    assert registry.get(kind, name) is value
    assert registry.names(kind) == [*(n for k, n in BUILT_IN if k == kind), name], "built-ins first"
    offer = registry.offers(kind)[-1]
    assert (offer.kind, offer.name, offer.value, offer.distribution, offer.plugin) == (
        kind, name, value, "good 1.0", "entry",
    )  # fmt: skip
    assert {(o.kind, o.name): o.value for o in registry.offers() if o is not offer} == BUILT_IN


def test_the_built_ins_come_through_the_same_hooks() -> None:
    registry, lines = load()
    assert lines == []
    assert {(o.kind, o.name): o.value for o in registry.offers()} == BUILT_IN
    assert {o.distribution for o in registry.offers()} == {f"lrkit {lrkit.__version__}"}
    names = {kind: registry.names(kind) for kind in KINDS}
    assert names == {
        "parameterization": ["full", "lora", "svd", "vector-scaled", "dora"],
        "metric": [
            "magnitude",
            "sensitivity",
            "sensitivity-uncertainty",
            "gradient-uncertainty",
            "ratio-uncertainty",
            "random",
        ],
        "scheduler": ["constant", "linear", "quadratic", "cubic", "once"],
        "action": ["prune", "freeze", "switch", "zero"],
        "method": ["full", "lora", "dora", "svd-lora", "elora", "adalora", "aflora"],
        "layer": names["layer"],
        "task": ["movies", "glue", "teacher", "squad", "squad_v2", "xsum", "cnn_dailymail", "gsm8k"],
        "executor": names["executor"],  # what is offered here is free
        "study": names["study"],
    }


def test_a_plug_in_may_be_an_object_and_offer_several_kinds() -> None:
    class Plugin:
        @hookimpl
        def lrkit_metrics(self) -> dict[str, type[Metric]]:
            return {"alternating": Alternating}

        @hookimpl
        def lrkit_schedulers(self) -> dict[str, type[Scheduler]]:
            return {"square": Square}

        @hookimpl(specname="lrkit_actions")
        def by_another_name(self) -> dict[str, type[Action]]:
            return {"idle": Null}

    registry, lines = load(("good 1.0", Plugin()))
    assert lines == []
    assert registry.get("metric", "alternating") is Alternating
    assert registry.get("scheduler", "square") is Square
    assert registry.get("action", "idle") is Null


def test_a_hook_may_offer_nothing() -> None:
    registry, lines = load(("good 1.0", offering(lrkit_metrics={})))
    assert lines == []
    assert {(o.kind, o.name): o.value for o in registry.offers()} == BUILT_IN


def test_a_method_of_plug_in_parts_composes_trains_and_goes_to_plain_data() -> None:
    import torch

    registry, lines = load(("good 1.0", offering(**GOOD)))
    assert lines == []
    plain = {
        "parameterization": {"name": "svd", "rank": 4},
        "metric": {"name": "alternating", "offset": 3},
        "scheduler": {"name": "square", "target": 2},
        "action": "idle",
    }
    method = from_plain(plain, registry)
    assert (type(method.metric), type(method.scheduler), type(method.action)) == (Alternating, Square, Null)
    assert from_plain(to_plain(method, registry), registry) == method
    assert registry.get("method", "halved")(rank=3).parameterization == Halved(rank=3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)  # type: ignore[no-any-return]

    model = Model()
    adapted = lrkit.attach(model, method, targets=["linear"], train_also=())
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=3)
    for _ in range(3):
        (model(torch.ones(2, 3)).square().mean() + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [d.kept for d in adapted.history][-1] == 2
    assert int((adapted.adapters["linear"].core == 0).sum()) == 2


# ---- broken plug-ins -------------------------------------------------------------------------------------------------


class NotDerived:
    """Has what a metric has, but is none."""

    def score(self, weight: Tensor, state: Any) -> Tensor:
        return weight


class Undecorated(Magnitude):
    """Inherits all from a frozen class, and forgets the decorator."""

    power: int = 2


@attrs.frozen(kw_only=True)
class Unwritten(Scheduler):
    """Forgets `decay`."""


@attrs.frozen(kw_only=True)
class UnwrittenTwice(Parameterization):
    """Forgets `parts` and `build`."""


def _raise(error: BaseException) -> Any:
    raise error


def _unmarked() -> dict[str, type[Metric]]:
    return {"alternating": Alternating}


class WithProperty:
    """A plug-in object with a property that raises when anybody looks."""

    @property
    def lrkit_anything(self) -> Any:
        raise RuntimeError("do not look")

    @hookimpl
    def lrkit_metrics(self) -> dict[str, type[Metric]]:
        return {"alternating": Alternating}


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "misspelt and marked": (
        lambda: offering(lrkit_metric={"alternating": Alternating}),
        r'there is no hook "lrkit_metric" \(did you mean "lrkit_metrics"\?\)',
    ),
    "misspelt and not marked": (
        lambda: module(lrkit_schedular=_unmarked),
        r'there is no hook "lrkit_schedular" \(did you mean "lrkit_schedulers"\?\)',
    ),
    "misspelt in front and marked": (
        lambda: offering(lrkt_metrics={"alternating": Alternating}),
        r'there is no hook "lrkt_metrics" \(did you mean "lrkit_metrics"\?\)',
    ),
    "misspelt beside a good one": (
        lambda: offering(lrkit_metrics={"alternating": Alternating}, lrkit_parametrizations={"halved": Halved}),
        r'there is no hook "lrkit_parametrizations" \(did you mean "lrkit_parameterizations"\?\)',
    ),
    "misspelt specname": (
        lambda: module(mine=hookimpl(_unmarked_copy(), specname="lrkit_metrix")),
        r'there is no hook "lrkit_metrix" \(did you mean "lrkit_metrics"\?\)',
    ),
    "not marked": (
        lambda: module(lrkit_metrics=_unmarked),
        r'"lrkit_metrics" is not marked with @lrkit\.hookimpl',
    ),
    "marked by another project": (
        lambda: module(lrkit_metrics=_foreign_mark()),
        r'"lrkit_metrics" is not marked with @lrkit\.hookimpl',
    ),
    "no hook at all": (lambda: module(), "offers nothing|has no hook"),
    "a hook raises": (
        lambda: module(lrkit_metrics=hookimpl(lambda: _raise(RuntimeError("no licence\nfound")))),
        "a hook raised RuntimeError: no licence found",
    ),
    "a hook raises bad input": (
        lambda: module(lrkit_metrics=hookimpl(lambda: _raise(LrkitError("no licence")))),
        "no licence",
    ),
    "a hook exits": (
        lambda: module(lrkit_metrics=hookimpl(lambda: _raise(SystemExit("no licence")))),
        "a hook raised SystemExit: no licence",
    ),
    "returns a list": (
        lambda: offering(lrkit_metrics=[Alternating]),
        "lrkit_metrics must return a mapping from names to metrics, not list",
    ),
    "returns a class": (
        lambda: offering(lrkit_metrics=Alternating),
        "lrkit_metrics must return a mapping from names to metrics, not (type|ABCMeta)",
    ),
    "returns nothing": (
        lambda: offering(lrkit_methods=None),
        "lrkit_methods must return a mapping from names to methods, not NoneType",
    ),
    "a generator": (
        lambda: module(lrkit_tasks=hookimpl(_generator)),
        "lrkit_tasks must return a mapping from names to tasks, not generator",
    ),
    "a name that is none": (lambda: offering(lrkit_metrics={3: Alternating}), "must have names as keys, not 3"),
    "a name with a comma": (
        lambda: offering(lrkit_metrics={"a,b": Alternating}),
        "is no word for a value, unlike 'a,b'",
    ),
    **{
        f"a name that is {name}": (lambda name=name: offering(lrkit_metrics={name: Alternating}), f"unlike '{name}'")
        for name in ("none", "1", "1.5", "True", "-x", "../x", "a//b")
    },
    "an empty name": (lambda: offering(lrkit_metrics={"": Alternating}), "must have names as keys, not ''"),
    "not derived": (
        lambda: offering(lrkit_metrics={"odd": NotDerived}),
        'lrkit_metrics: "odd" must be a class derived from Importance, not .*NotDerived',
    ),
    "derived from another kind": (
        lambda: offering(lrkit_metrics={"odd": Linear}),
        'lrkit_metrics: "odd" must be a class derived from Importance, not .*Linear',
    ),
    "an instance": (
        lambda: offering(lrkit_actions={"odd": Freeze()}),
        'lrkit_actions: "odd" must be a class derived from Action, not Freeze\\(',
    ),
    "a factory": (
        lambda: offering(lrkit_metrics={"odd": lambda: Alternating()}),
        'lrkit_metrics: "odd" must be a class derived from Importance, not ',
    ),
    "not attrs": (
        lambda: offering(lrkit_metrics={"odd": Undecorated}),
        r'lrkit_metrics: "odd": decorate class Undecorated with @attrs\.frozen\(kw_only=True\)',
    ),
    "abstract": (
        lambda: offering(lrkit_schedulers={"odd": Unwritten}),
        'lrkit_schedulers: "odd": class Unwritten does not write decay',
    ),
    "abstract twice": (
        lambda: offering(lrkit_parameterizations={"odd": UnwrittenTwice}),
        'lrkit_parameterizations: "odd": class UnwrittenTwice does not write build, parts',
    ),
    "a method that is one already": (
        lambda: offering(lrkit_methods={"odd": lrkit.methods.lora()}),
        'lrkit_methods: "odd" must be callable, not Method\\(',
    ),
    "a task that is a name": (
        lambda: offering(lrkit_tasks={"odd": "glue/rte"}),
        "lrkit_tasks: \"odd\" must be callable, not 'glue/rte'",
    ),
    "an executor that is a number": (lambda: offering(lrkit_executors={"odd": 4}), '"odd" must be callable, not 4'),
    "one bad name among good ones": (
        lambda: offering(lrkit_metrics={"alternating": Alternating, "odd": NotDerived}),
        '"odd" must be a class derived from Importance',
    ),
    "one bad hook among good ones": (
        lambda: offering(lrkit_metrics={"alternating": Alternating}, lrkit_tasks=3),
        "lrkit_tasks must return a mapping",
    ),
    "a register callback": (
        lambda: module(lrkit_metrics=hookimpl(lambda register: register("odd", Alternating))),
        "register",
    ),
    "a class for a plug-in": (
        lambda: type("Plugin", (), {"lrkit_metrics": hookimpl(lambda self: {"alternating": Alternating})}),
        "self",
    ),
    "a property that raises": (WithProperty, "do not look"),
    "a number": (lambda: 42, ""),
}


def _unmarked_copy() -> Callable[[], dict[str, type[Metric]]]:
    return lambda: {"alternating": Alternating}


def _foreign_mark() -> Callable[[], dict[str, type[Metric]]]:
    import pluggy

    return pluggy.HookimplMarker("datasette")(_unmarked_copy())  # type: ignore[no-any-return]


def _generator() -> Iterator[Any]:
    yield {}


@attrs.frozen(kw_only=True)
class Before(Magnitude):
    """Of a good plug-in that is loaded first."""


@attrs.frozen(kw_only=True)
class After(Magnitude):
    """Of a good plug-in that is loaded last."""


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plug_in_gives_one_line_and_the_rest_goes_on(case: str) -> None:
    make, message = BROKEN[case]
    registry, lines = load(
        ("first 1.0", offering(lrkit_metrics={"before": Before})),
        ("broken-dist 2.3", make()),
        ("last 1.0", offering(lrkit_metrics={"after": After})),
    )
    assert len(lines) == 1
    (line,) = lines
    assert "\n" not in line
    assert line.startswith('plug-in "entry" of broken-dist 2.3: ')
    assert re.search(message, line.partition(": ")[2])
    (problem,) = registry.problems
    assert (problem.distribution, problem.plugin) == ("broken-dist 2.3", "entry")
    assert registry.get("metric", "before") is Before
    assert registry.get("metric", "after") is After
    here = {(o.kind, o.name): o.value for o in registry.offers()}
    assert here == {**BUILT_IN, ("metric", "before"): Before, ("metric", "after"): After}
    # Who asks for what it may have offered is told why it is not there.
    with pytest.raises(LrkitError, match=r'unknown metric "alternating".*broken-dist 2\.3') as caught:
        registry.get("metric", "alternating")
    assert "\n" not in str(caught.value)


def test_a_hook_that_raises_leaves_its_traceback_to_be_looked_at() -> None:
    registry, _ = load(("broken 1.0", module(lrkit_metrics=hookimpl(lambda: _raise(RuntimeError("no licence"))))))
    assert "Traceback" in registry.problems[0].detail
    assert "_raise" in registry.problems[0].detail


def test_several_broken_plug_ins_give_a_line_each() -> None:
    registry, lines = load(*((f"broken-{n} 1.0", make()) for n, (make, _) in enumerate(BROKEN.values())))
    assert [problem.distribution for problem in registry.problems] == [f"broken-{n} 1.0" for n in range(len(BROKEN))]
    assert len(lines) == len(BROKEN)
    assert {(o.kind, o.name): o.value for o in registry.offers()} == BUILT_IN


def test_two_functions_for_one_hook_are_both_heard() -> None:
    """pluggy allows it by specname; what one of them offers must not vanish in silence."""
    plugin = module(
        one=hookimpl(lambda: {"before": Before}, specname="lrkit_metrics"),
        two=hookimpl(lambda: {"after": After}, specname="lrkit_metrics"),
    )
    registry, lines = load(("twice 1.0", plugin))
    assert lines or {"before", "after"} <= set(registry.names("metric"))


# ---- names that two claim --------------------------------------------------------------------------------------------


def test_a_built_in_name_cannot_be_taken() -> None:
    registry, lines = load(
        ("thief 1.0", offering(lrkit_metrics={"magnitude": Alternating, "alternating": Alternating}))
    )
    assert registry.get("metric", "magnitude") is Magnitude
    assert registry.get("metric", "alternating") is Alternating, "its other names are its own"
    (line,) = lines
    assert line == (f'plug-in "entry" of thief 1.0: metric "magnitude" is already offered by lrkit {lrkit.__version__}')
    assert registry.name_of("metric", Magnitude) == "magnitude"
    assert len([o for o in registry.offers("metric") if o.name == "magnitude"]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_two_plug_ins_claim_raises_with_both_named(kind: str) -> None:
    hook = hook_of(kind)
    ((name, value),) = GOOD[hook].items()
    other = attrs.frozen(kw_only=True)(type("Other", (value,), {})) if isinstance(value, type) else lambda *_: None
    other = f"{value}seeds = 2\n" if isinstance(value, str) else other
    registry, lines = load(
        ("one 1.0", offering(**{hook: {name: value, "of-one": value}})),
        ("two 2.0", offering(**{hook: {name: other, "of-two": other}})),
    )
    (line,) = lines
    assert line == f'plug-in "entry" of two 2.0: {kind} "{name}" is already offered by one 1.0'
    with pytest.raises(LrkitError) as caught:
        registry.get(kind, name)  # type: ignore[arg-type]
    assert f'{kind} "{name}"' in str(caught.value)
    assert "one 1.0" in str(caught.value) and "two 2.0" in str(caught.value)
    # everything else works
    assert registry.get(kind, "of-one") is value  # type: ignore[arg-type]
    assert registry.get(kind, "of-two") is other  # type: ignore[arg-type]
    # a study is a path, made anew at each call; all others are equal only to themselves
    assert {key: registry.get(*key) for key in BUILT_IN} == BUILT_IN
    assert registry.names(kind).count(name) == 1  # type: ignore[arg-type]


def test_one_name_in_two_kinds_is_no_collision() -> None:
    registry, lines = load(
        ("one 1.0", offering(lrkit_metrics={"halved": Alternating})),
        ("two 1.0", offering(lrkit_methods={"halved": halved})),
    )
    assert lines == []
    assert registry.get("metric", "halved") is Alternating
    assert registry.get("method", "halved") is halved


def test_a_name_that_three_claim_names_all_three() -> None:
    registry, lines = load(*((f"d{n} 1.0", offering(lrkit_metrics={"alternating": Alternating})) for n in range(3)))
    assert [problem.distribution for problem in registry.problems] == ["d1 1.0", "d2 1.0"], "a line each"
    assert len(lines) == 2
    with pytest.raises(LrkitError, match=r"d0 1\.0.*d1 1\.0.*d2 1\.0"):
        registry.get("metric", "alternating")


def test_one_plug_in_under_two_entry_points_is_told_once() -> None:
    """A distribution may list a module twice by mistake: one line, and what it offers is there."""
    plugin = offering(lrkit_metrics={"alternating": Alternating})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry([("d 1.0", "one", plugin), ("d 1.0", "two", plugin)], discover=False)
    assert len(caught) == len(registry.problems) <= 1
    assert registry.get("metric", "alternating") is Alternating


# ---- looking up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("metric", "magnitud", r'unknown metric "magnitud" \(did you mean "magnitude"\?\); there are magnitude, '),
        ("metric", "Magnitude", r'\(did you mean "magnitude"\?\)'),
        ("method", "ada-lora", r'\(did you mean "adalora"\?\)'),
        (
            "action",
            "zzz",
            r'unknown action "zzz"; there are prune, freeze, switch, zero; others come with plug-ins',
        ),
        ("metric", None, r'unknown metric "None"'),
        ("metric", ["magnitude"], r"unknown metric "),
        ("metric", "", r'unknown metric ""'),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(kind: Any, name: Any, message: str) -> None:
    with pytest.raises(LrkitError, match=message):
        load()[0].get(kind, name)


def test_a_class_has_the_name_it_is_registered_under() -> None:
    registry, _ = load(("good 1.0", offering(lrkit_metrics={"alternating": Alternating})))
    assert registry.name_of("metric", Alternating) == "alternating"
    assert registry.name_of("metric", GradientUncertainty) == "gradient-uncertainty"
    with pytest.raises(LrkitError, match=r"scheduler .*Square is not registered: .*lrkit_schedulers"):
        registry.name_of("scheduler", Square)


def test_a_component_is_added_in_this_process() -> None:
    registry = Registry(discover=False)
    registry.add("notebook", "mine", offering(lrkit_metrics={"alternating": Alternating}))
    assert registry.problems == []
    assert registry.get("metric", "alternating") is Alternating
    assert "alternating" not in Registry(discover=False).names("metric"), "a registry of its own: nothing is global"


# ---- entry points ----------------------------------------------------------------------------------------------------


@pytest.fixture
def distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes installed distributions, as pip leaves them behind, to a folder on sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str, version: str = "1.0", points: str | None = None) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        package = f"zz_{name.replace('-', '_')}"
        (folder / "entry_points.txt").write_text(f"[lrkit]\n{points or f'{name} = {package}'}\n")
        (tmp_path / f"{package}.py").write_text(source)
        monkeypatch.delitem(sys.modules, package, raising=False)

    return write


METRIC = """
import attrs, lrkit

@attrs.frozen(kw_only=True)
class Mine(lrkit.metrics.Magnitude):
    pass

@lrkit.hookimpl
def lrkit_metrics():
    return {"mine-of-NAME": Mine}
"""


def discover() -> tuple[Registry, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry()
    return registry, [str(w.message) for w in caught if issubclass(w.category, PluginWarning)]


def test_installed_plug_ins_are_found_by_their_entry_points(distributions: Callable[..., None]) -> None:
    distributions("beta-plugin", METRIC.replace("NAME", "beta"), version="2.5")
    distributions("alpha-plugin", METRIC.replace("NAME", "alpha"))
    registry, lines = discover()
    assert not [line for line in lines if "alpha-plugin" in line or "beta-plugin" in line]
    offers = {o.name: o for o in registry.offers("metric") if o.name.startswith("mine-of-")}
    assert list(offers) == ["mine-of-alpha", "mine-of-beta"], "in the order of their names, on every machine"
    assert offers["mine-of-beta"].distribution == "beta-plugin 2.5"
    assert offers["mine-of-beta"].plugin == "beta-plugin"
    assert "mine-of-beta" not in load()[0].names("metric"), "discover=False"


@pytest.mark.parametrize(
    ("source", "points", "message"),
    [
        ("import no_such_module_at_all", None, "cannot be imported: ModuleNotFoundError: No module named"),
        ("raise RuntimeError('no\\nlicence')", None, "cannot be imported: RuntimeError: no licence"),
        ("raise SystemExit(3)", None, "cannot be imported: SystemExit: 3"),
        ("import pytest; pytest.importorskip('zz_nowhere')", None, "cannot be imported: Skipped: could not import"),
        (
            "import lrkit; lrkit.registry.current.__wrapped__()",
            None,
            "cannot be imported: LrkitError: lrkit's registry was asked for while",
        ),
        (
            "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd",
            None,
            "cannot be imported: Odd: (its message cannot be read)",
        ),
        ("def f(:", None, "cannot be imported: SyntaxError"),
        ("import lrkit; lrkit.metrics.Nothing", None, "cannot be imported: AttributeError"),
        ("assert False", None, "cannot be imported: AssertionError"),
        ("", "bad = zz_bad:missing", "cannot be imported: AttributeError"),
        ("", "bad = zz_not_there", "cannot be imported: ModuleNotFoundError"),
        ("", "bad = zz_bad:", "cannot be imported: "),
    ],
    ids=[
        "module",
        "raises",
        "exits",
        "skips",
        "asks",
        "unreadable",
        "syntax",
        "lrkit",
        "assertion",
        "attribute",
        "absent",
        "malformed",
    ],
)
def test_a_plug_in_that_raises_on_import_gives_one_line_and_the_rest_goes_on(
    distributions: Callable[..., None], source: str, points: str | None, message: str
) -> None:
    distributions("bad", source, version="6.7", points=points)
    distributions("a-good", METRIC.replace("NAME", "a"))
    distributions("z-good", METRIC.replace("NAME", "z"))
    registry, lines = discover()
    (line,) = [line for line in lines if "bad 6.7" in line]
    assert line.startswith(f'plug-in "bad" of bad 6.7: {message}')
    assert "\n" not in line
    assert {"mine-of-a", "mine-of-z"} <= set(registry.names("metric"))
    assert {key: registry.get(*key) for key in BUILT_IN} == BUILT_IN
    assert "Traceback" in next(p for p in registry.problems if p.distribution == "bad 6.7").detail


def test_the_registry_of_the_process_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lrkit.current() is lrkit.current()
    asked: list[str] = []
    original = importlib.metadata.entry_points
    monkeypatch.setattr("lrkit.vetting._entry_points", lambda **how: asked.append(how["group"]) or original(**how))
    lrkit.current()
    assert asked == []
    discover()
    assert asked == ["lrkit"]
