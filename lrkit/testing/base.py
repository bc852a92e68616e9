"""Ask what every component must keep, whatever its kind; and turn a question into a test."""

import abc
import functools
import inspect
import json
import re
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import attrs
import torch

from lrkit import registry
from lrkit.compose import from_plain, to_plain
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.method import Method
from lrkit.parameterizations import Parameterization
from lrkit.process import as_it_was, global_state
from lrkit.testing.findings import Broken, calling, expect, expect_one_line, raised, title
from lrkit.testing.neighbours import kind_of, method_with


@contextmanager
def _untouched() -> Iterator[None]:
    before = global_state()
    yield
    after = global_state()
    for name, value in before.items():
        expect(
            str(value) == str(after[name]),
            f"{name} has changed: what is global belongs to the user's program, and a resumed run would not be the same",
        )


def _elsewhere(component: Any) -> bool:
    """Return whether a parameterization, or a method's, has places of its own and takes no targets."""
    try:
        part = component if isinstance(component, Parameterization) else component().parameterization
        return isinstance(part, Parameterization) and not part.takes_targets
    except Exception:  # whatever a component that is called without arguments may raise
        return False


def clause(test: Callable[[Any, Any], None]) -> Callable[[Any], None]:
    """Make a test method of a question: ask it of each component of the class, and name the one that breaks it."""

    @functools.wraps(test)
    def run(self: "Contract") -> None:
        for component in self.components():
            with as_it_was(), warnings.catch_warnings(), self._lent(component):
                torch.set_num_threads(1)  # on tensors as small as these, several threads mostly wait for each other
                warnings.simplefilter("error", LrkitWarning)
                # A schedule may go down to nothing, whatever action it stands beside here.
                warnings.filterwarnings("ignore", ".* no component is left", LrkitWarning)
                warnings.filterwarnings("ignore", "the penalty's gradient is larger than the task's", LrkitWarning)
                # A schedule that begins at step 0 stands beside any metric here.
                warnings.filterwarnings("ignore", r"\w+ decides at step 0, when .* has seen nothing", LrkitWarning)
                try:
                    test(self, component)
                except Exception as error:
                    # If a method adapts no layers, the tiny model has nothing for it, and shows nothing of it.
                    if _elsewhere(component):
                        continue
                    says, cause = (error, error.__cause__) if isinstance(error, Broken) else (raised(error), error)
                    raise Broken(f"{title(component)}: {says}") from cause

    # pytest would take the wrapped function's parameter for a fixture.
    del run.__wrapped__
    return run


class Contract(abc.ABC):
    """The clauses of every component. Subclass the contract of its kind, and set `component`."""

    component: Any = None
    """The component under test, or a tuple of several, with the settings that matter."""

    def components(self) -> list[Any]:
        """List all that is under test."""
        given = inspect.getattr_static(self, "component")
        if hasattr(type(given), "__get__") and not inspect.isfunction(given):
            given = self.component  # a property, a staticmethod
        expect(given is not None, f"{type(self).__name__}.component is not set: component = MyComponent()")
        return list(given) if isinstance(given, tuple | list) else [given]

    def _lent(self, component: Any) -> AbstractContextManager[None]:
        return nullcontext()

    @abc.abstractmethod
    def _exercise(self, component: Any) -> None:
        """Call all that lrkit calls. For example, a metric observes a few steps, scores and reduces."""

    def _documented(self, component: Any) -> tuple[str, str]:
        """Return the docstring that must name a source, and all those that may name settings."""
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
        with _untouched(), suppress(Exception):  # an error is for another clause to find
            self._exercise(component)


class PartContract(Contract):
    """The clauses that metrics, schedulers, actions and parameterizations share."""

    def _lent(self, component: Any) -> AbstractContextManager[None]:
        """Register it for as long as a clause runs: to save a run, its components must have names."""
        name = f"{type(component).__qualname__} under test"
        return registry.current().lend(kind_of(component), name, type(component))

    def _host(self, component: Any) -> Method:
        """Return a method that it is a part of."""
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
                    expect_one_line(error, f"{name}={wrong!r} is refused")
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
