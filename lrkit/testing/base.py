"""What the contracts are made of: clauses, a tiny model, runs of it, and what every component keeps."""

import abc
import copy
import functools
import inspect
import itertools
import json
import math
import re
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit import actions, metrics, parameterizations, schedulers
from lrkit.actions import Action
from lrkit.adapt.adapted import attach
from lrkit.compose import from_plain, to_plain
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.hookspecs import Kind
from lrkit.method import Method
from lrkit.metrics import Metric
from lrkit.parameterizations import Parameterization
from lrkit.process import as_it_was, global_state
from lrkit.registry import current
from lrkit.schedulers import Scheduler


@attrs.frozen
class Finding:
    """One clause that a component does not keep.

    Args:
        clause: the clause's name, such as ``"score changes nothing"``.
        message: what was expected, and what came instead.
    """

    clause: str
    message: str


class Broken(AssertionError):
    """A clause is not kept."""


def raised(error: BaseException) -> str:
    """What was raised, in one line."""
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def calling(what: str) -> Iterator[None]:
    """Whatever is raised inside becomes a broken clause that says where."""
    try:
        yield
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"{what} {raised(error)}") from error


def expect(holds: object, message: str) -> None:
    """A clause is broken, for this reason, unless it holds."""
    if not holds:
        raise Broken(message)


@contextmanager
def _untouched(but: str = "") -> Iterator[None]:
    before = global_state()
    yield
    after = global_state()
    for name, value in before.items():
        expect(
            name == but or str(value) == str(after[name]),
            f"{name} has changed: what is global belongs to the user's program, and a resumed run would not be the same",
        )


def clause(test: Callable[[Any, Any], None]) -> Callable[[Any], None]:
    """A test method over every component of its class, with the component named in what is raised."""

    @functools.wraps(test)
    def run(self: "Contract") -> None:
        for component in self.components():
            with as_it_was(), warnings.catch_warnings(), self._lent(component):
                torch.set_num_threads(1)  # on tensors as small as these, several threads mostly wait for each other
                warnings.simplefilter("error", LrkitWarning)
                # A schedule may go down to nothing, whatever action it stands beside here.
                warnings.filterwarnings("ignore", ".* no component is left", LrkitWarning)
                warnings.filterwarnings("ignore", "the penalty's gradient is larger than the task's", LrkitWarning)
                try:
                    test(self, component)
                except Broken as broken:
                    if _elsewhere(component):
                        continue  # a method of no layers: the tiny model has nothing for it, and shows nothing of it
                    raise Broken(f"{title(component)}: {broken}") from broken.__cause__
                except Exception as error:
                    if _elsewhere(component):
                        continue
                    raise Broken(f"{title(component)}: {raised(error)}") from error

    # pytest would take the wrapped function's parameter for a fixture.
    del run.__wrapped__
    return run


def _elsewhere(component: Any) -> bool:
    """Whether a parameterization, or a method's, has places of its own and takes no targets."""
    try:
        part = component if isinstance(component, Parameterization) else component().parameterization
        return isinstance(part, Parameterization) and not part.takes_targets
    except Exception:  # whatever a component that is called without arguments may raise
        return False


def title(component: object) -> str:
    """A component in words."""
    return getattr(component, "__name__", None) or repr(component)


class TinyModel(nn.Module):
    """Two blocks with attention and FFN by name, wide and tall layers, one without a bias, and a head.

    Args:
        linear: what makes a layer: ``nn.Linear``, or a function of the same arguments.
    """

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.layer = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": nn.ModuleDict(
                        {"query": linear(32, 24), "value": linear(32, 24, bias=False), "output": linear(24, 32)}
                    ),
                    "ffn": nn.ModuleDict({"up": linear(32, 40), "down": linear(40, 32)}),
                }
            )
            for _ in range(2)
        )
        self.classifier = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, 2] of x [batch, length, 6]."""
        x = self.embed(x)
        for block in self.layer:
            attention, ffn = block["attention"], block["ffn"]  # type: ignore[index]
            x = x + attention["output"](torch.tanh(attention["query"](x)) * attention["value"](x))
            x = x + ffn["down"](torch.tanh(ffn["up"](x)))
        logits: Tensor = self.classifier(x.mean(dim=1))
        return logits


def seed_torch(seed: int) -> None:
    """Seed torch's global generator on the CPU, where all of this runs: for all devices it takes ten times as long."""
    torch.default_generator.manual_seed(seed)


def tiny(dtype: torch.dtype = torch.float32, linear: Callable[..., nn.Module] = nn.Linear) -> TinyModel:
    """The tiny model with the same weights each time."""
    seed_torch(0)
    return TinyModel(linear).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs [16, 5, 6] and labels [16] that follow from them; the same each time."""
    x = torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), (x[:, 0, 0] * x[:, 1, 1] > 0).long()


def is_rate(rate: object) -> bool:
    """Whether an optimizer takes it for a learning rate."""
    return isinstance(rate, int | float) and 0 < rate < math.inf


class Run:
    """A method on the tiny model, one optimizer step at a time; the same in each process and at each resume."""

    def __init__(self, method: Method, total_steps: int, *, seed: int = 0, **options: Any) -> None:
        self.model = tiny()
        seed_torch(seed)
        self.adapted = attach(self.model, method, **options)
        rate = method.parameterization.learning_rate
        rate = rate if is_rate(rate) else 1e-3  # a clause of its own says so
        self.seed, self.optimizer = seed, torch.optim.AdamW(self.adapted.parameters(), lr=rate, foreach=True)
        self.adapted.bind(self.optimizer, total_steps=total_steps)

    def step(self) -> float:
        """One optimizer step; the loss before it, without the penalty."""
        seed_torch(100 + self.adapted.step)  # for dropout, the same at each resume
        x, labels = batch()
        loss = F.cross_entropy(self.model(x), labels)
        (loss + self.adapted.penalty()).backward()  # type: ignore[no-untyped-call]
        seed_torch(200 + 50 * self.seed + self.adapted.step)  # for what draws where it should not: another one
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def to(self, step: int) -> list[float]:
        """Steps until so many have been taken; their losses."""
        return [self.step() for _ in range(self.adapted.step, step)]

    def state(self) -> tuple[Any, Any]:
        """The method's state and the optimizer's."""
        return self.adapted.state_dict(), copy.deepcopy(self.optimizer.state_dict())

    def load(self, state: tuple[Any, Any]) -> None:
        """Take over what `state` gave."""
        self.adapted.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])


def resumes(method: Method, total_steps: int, points: Sequence[int]) -> Run:
    """Train through; then begin anew at each point from what was saved there. Every tensor must be bitwise the same."""
    run, states = Run(method, total_steps), {}
    for step in range(total_steps):
        if step in points:
            states[step] = run.state()
        run.step()
    for point, state in states.items():
        # With another random start, so that what is not in the state cannot agree by chance.
        again = Run(method, total_steps, seed=1)
        again.load(state)
        again.to(total_steps)
        ours, theirs = run.model.state_dict(), again.model.state_dict()
        odd = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        expect(
            not odd,
            f"a run resumed at step {point} of {total_steps} is another one: {len(odd)} tensors differ at the end, such as "
            f'"{odd[0] if odd else ""}". What is needed to go on must lie in parameters or in a metric\'s buffers',
        )
        expect(
            run.adapted.history == again.adapted.history,
            f"a run resumed at step {point} of {total_steps} takes other decisions",
        )
    return run


POINTS = (1, 5, 9)  # of 10 steps with decisions after 4, 6 and 8
_CUBIC = schedulers.Cubic(target=0.5, warmup=2, final=2, interval=2)


def method_with(component: Any, **others: Any) -> Method:
    """The component with lrkit's own in the other places, as `others` has them."""
    parts: dict[str, Any] = {
        "parameterization": parameterizations.SVD(rank=4),
        "metric": metrics.SensitivityUncertainty(),
        "scheduler": _CUBIC,
        "action": actions.Prune(),
    }
    return Method(**{**parts, kind_of(component): component, **others})


BASES: dict[Kind, type] = {
    "parameterization": Parameterization,
    "metric": Metric,
    "scheduler": Scheduler,
    "action": Action,
}


def kind_of(component: object) -> str:
    """What a part of a method is."""
    return next(kind for kind, base in BASES.items() if isinstance(component, base))


def builtin_parameterizations() -> list[Parameterization]:
    """lrkit's own, at a rank that fits the tiny model."""
    return [
        parameterizations.SVD(rank=4),
        parameterizations.VectorScaled(rank=4),
        parameterizations.LoRA(rank=4),
        parameterizations.Full(),
    ]


def builtin_metrics() -> list[Metric]:
    """lrkit's own."""
    return [
        metrics.Magnitude(),
        metrics.Sensitivity(),
        metrics.SensitivityUncertainty(),
        metrics.GradientUncertainty(),
        metrics.RatioUncertainty(),
    ]


def builtin_actions() -> list[Action]:
    """lrkit's own."""
    return [actions.Prune(), actions.Freeze(), actions.Zero()]


def or_refused(build: Callable[[], Method], *sides: object) -> Method | None:
    """What it builds; None where it is refused, in one line that names both sides."""
    try:
        return build()
    except LrkitError as error:
        names = [type(side).__name__ for side in sides]
        expect(
            "\n" not in str(error) and sum(name in str(error) for name in names) >= 2,
            f"a refusal must be one line that names both sides ({' and '.join(names)}), not: {error}",
        )
        return None


def decides(run: Run, exact: bool = True) -> None:
    """Each decision took the scheduler's budget, and the last one has been taken."""
    method, layers = run.adapted.method, run.adapted.controller.policies[0].layers
    scheduler = method.policies[0].scheduler
    total = run.adapted.total_steps or 0
    taken = [d for d in run.adapted.history if d.policy == 0]
    times = scheduler.over(total, units=1, layers=1)
    due = [step for step in range(1, total + 1) if times.due(step) and step <= times.last]
    expect([d.step for d in taken] == due, f"decisions at {[d.step for d in taken]}, due {due}")
    for earlier, later in itertools.pairwise(taken):
        expect(
            later.before == earlier.kept,
            f"step {earlier.step} leaves {earlier.kept} units, and step {later.step} finds {later.before}",
        )
    for d in taken:
        budget = scheduler.over(total, units=d.units, layers=layers).budget(d.step)
        # An action that asks for no number goes by all.
        expect(
            d.budget == budget or (not exact and d.budget == d.units),
            f"the decision at step {d.step} has budget {d.budget}, the scheduler {budget}",
        )
        expect(not exact or d.kept == d.budget, f"the decision at step {d.step} keeps {d.kept} of a budget {d.budget}")
        if method.policies[0].action.final:
            expect(not d.returned, f"losing is final, and at step {d.step} {d.returned[0:1]} came back")


def equal(one: Tensor, two: Tensor) -> bool:
    """Bit for bit; where both are not a number, equal too."""
    return one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num())


def close(one: Tensor, two: Tensor) -> bool:
    """The same but for the last places of float32."""
    # Vectorised and single functions of libm differ in the last place: a chunk's edge may show it.
    scale = two.detach().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if two.numel() else 0.0
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-4, atol=1e-6 * scale, equal_nan=True)


def near(one: Tensor, two: Tensor) -> bool:
    """The same outputs, computed along another way in float32."""
    return torch.allclose(one, two, rtol=1e-4, atol=1e-5 * max(1.0, two.detach().abs().max().item()))


def gap(one: Tensor, two: Tensor) -> float:
    """The largest difference."""
    return (one - two).detach().abs().max().item()


class Contract(abc.ABC):
    """What every component keeps. Subclass the contract of its kind, and set `component`."""

    component: Any = None
    """The component under test, or a tuple of several, with the settings that matter."""

    def components(self) -> list[Any]:
        """All that is under test."""
        given = inspect.getattr_static(self, "component")
        if hasattr(type(given), "__get__") and not inspect.isfunction(given):
            given = self.component  # a property, a staticmethod
        expect(given is not None, f"{type(self).__name__}.component is not set: component = MyComponent()")
        return list(given) if isinstance(given, tuple | list) else [given]

    def _lent(self, component: Any) -> typing.ContextManager[None]:
        return nullcontext()

    @abc.abstractmethod
    def _exercise(self, component: Any) -> None:
        """Call all that lrkit calls."""

    def _documented(self, component: Any) -> tuple[str, str]:
        """The docstring that must name a source, and all those that may name settings."""
        own = inspect.cleandoc(component.__doc__ or "")
        return own, own

    def _settings(self, component: Any) -> list[str]:
        return list(inspect.signature(component).parameters)

    @clause
    def test_docstring_names_settings_and_source(self, component: Any) -> None:
        """The docstring says what it is, names every setting, and gives a source: ``Source: ...``, arXiv, DOI or URL."""
        own, everything = self._documented(component)
        expect(own, "it has no docstring of its own")
        expect(
            re.search(r"\bsources?:|arxiv[ :]*\d{4}\.\d{4,5}|\b10\.\d{4,}/|https?://", own, re.IGNORECASE),
            "its docstring gives no source: add a line such as `Source: arXiv 2303.10512, Eq. 8.`, or `Source: none.`",
        )
        unsaid = [name for name in self._settings(component) if not re.search(rf"\b{re.escape(name)}\b", everything)]
        expect(not unsaid, f"its docstring does not name the setting {', '.join(unsaid)}")

    @clause
    def test_leaves_global_state_alone(self, component: Any) -> None:
        """No random generator, default dtype, number of threads or gradient mode is changed by using it."""
        with _untouched(), suppress(Exception):  # what it raises is another clause's matter
            self._exercise(component)


class PartContract(Contract):
    """What metrics, schedulers, actions and parameterizations keep alike."""

    def _lent(self, component: Any) -> typing.ContextManager[None]:
        """Registered for as long as a clause runs: to save a run, its components must have names."""
        kind = typing.cast(Kind, kind_of(component))
        return current().lend(kind, f"{type(component).__qualname__} under test", type(component))

    def _host(self, component: Any) -> Method:
        """A method that it is a part of."""
        return method_with(component)

    def _documented(self, component: Any) -> tuple[str, str]:
        own = vars(type(component)).get("__doc__") or ""
        return own, "\n".join(cls.__doc__ or "" for cls in type(component).__mro__)

    def _settings(self, component: Any) -> list[str]:
        return [field.name for field in attrs.fields(type(component))]

    @clause
    def test_settings_are_frozen_and_keyword_only(self, component: Any) -> None:
        """Its class is decorated with ``@attrs.frozen(kw_only=True)``: configuration that cannot change in a run."""
        cls = type(component)
        expect("__attrs_attrs__" in vars(cls), f"decorate class {cls.__name__} with @attrs.frozen(kw_only=True)")
        positional = [field.name for field in attrs.fields(cls) if field.init and not field.kw_only]
        expect(not positional, f"settings must be keyword-only: {', '.join(positional)} can be given by position")
        for field in attrs.fields(cls):
            before = getattr(component, field.name)
            try:
                setattr(component, field.name, before)
            except attrs.exceptions.FrozenInstanceError:
                continue
            raise Broken(f"the setting {field.name} can be changed: decorate it with @attrs.frozen(kw_only=True)")

    @clause
    def test_settings_have_defaults(self, component: Any) -> None:
        """Its class can be built without arguments, since a swap is by name: ``--swap metric=mine``."""
        with calling(f"{type(component).__name__}()"):
            type(component)()

    @clause
    def test_equal_by_value(self, component: Any) -> None:
        """Two with the same settings are equal and have one hash; a setting is no list or dict."""
        twin = attrs.evolve(component)
        expect(twin == component, "a second one with the same settings is not equal to it")
        with calling("hash()"):
            expect(hash(twin) == hash(component), "a second one with the same settings has another hash")

    @clause
    def test_settings_survive_plain_data(self, component: Any) -> None:
        """Its settings go to JSON and come back equal: strings, numbers, True, False, None, and tuples of these."""
        method = self._host(component)
        with calling("to_plain"):
            plain = to_plain(method)
        with calling("json.dumps of its settings"):
            text = json.dumps(plain)
        with calling("from_plain"):
            back = from_plain(json.loads(text))
        expect(back == method, f"through plain data it becomes {getattr(back, kind_of(component))!r}")

    @clause
    def test_settings_refuse_what_cannot_be_meant(self, component: Any) -> None:
        """A misspelt setting, or a value that does not fit, is a `LrkitError`; annotations can be resolved."""
        kind = kind_of(component)
        method = self._host(component)
        with calling("typing.get_type_hints, which --set goes by,"):
            hints = typing.get_type_hints(type(component))
        for name in self._settings(component):
            expect(name in hints, f"the setting {name} has no type annotation, so --set cannot check it")
            for wrong in ({"a": "table"}, "no such value", -1, 1.5):
                plain = to_plain(method)
                plain[kind][name] = wrong
                try:
                    from_plain(plain)
                except LrkitError as error:
                    expect("\n" not in str(error), f"{name}={wrong!r} is refused in more than one line: {error}")
                except Exception as error:
                    raise Broken(f"{name}={wrong!r} {raised(error)}; expected a LrkitError in one line") from error
            misspelt = to_plain(method)
            misspelt[kind][f"{name}_"] = 1
            try:
                from_plain(misspelt)
            except LrkitError as error:
                expect(name in str(error), f'the error about "{name}_" does not name "{name}": {error}')
            else:
                expect(f"{name}_" in hints, f'the misspelt setting "{name}_" is taken in silence')
