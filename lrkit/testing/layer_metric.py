"""Ask what every layer metric must keep: a score per unit, from tensors that it names, whatever the cut of rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lrkit.metrics import Layer, LayerMetric, Seen
from lrkit.parameterizations import SVD, Target
from lrkit.testing.base import PartContract, clause
from lrkit.testing.comparisons import close, equal
from lrkit.testing.findings import calling, expect
from lrkit.testing.neighbours import builtin_actions, builtin_parameterizations, taken
from lrkit.testing.runs import POINTS, Run, decides, resumes

State = dict[str, Tensor]


def _layer(metric: LayerMetric, units: int = 4) -> Layer:
    """Return a layer 12 x 8 with an SVD adapter whose ΔW is not zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng(devices=[]):
        adapter = SVD(rank=units).build(Target("layer", nn.Linear(12, 8), 12, 8, "other"))
    with torch.no_grad():
        for p in adapter.parameters():  # the layer itself too, which is drawn from the program's generator
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    memory = {name: torch.zeros(units) for name in metric.memory}
    return Layer("layer", adapter, 12, 8, units, torch.device("cpu"), memory)


def _stream(batches: int = 4, rows: int = 9) -> list[tuple[Tensor, Tensor]]:
    """Return inputs [n, 12] and gradients [n, 8] of a few batches, some of them zero."""
    generator = torch.Generator().manual_seed(8)
    pairs = []
    for _ in range(batches):
        x, g = torch.randn(rows, 12, generator=generator), torch.randn(rows, 8, generator=generator) * 0.1
        x[:2], g[1:3] = 0.0, 0.0
        pairs.append((x, g))
    return pairs


def _begun(metric: LayerMetric, layer: Layer) -> State:
    with calling("begin"):
        state = metric.begin(layer)
    good = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    found = type(state).__name__
    if isinstance(state, dict) and not good:
        found = ", ".join(f"{k!r}: {type(v).__name__}" for k, v in state.items())
    expect(good, f"begin must return a dict of tensors by name, not {found}")
    return state


def _observe(
    metric: LayerMetric,
    state: Mapping[str, Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    step: int = 1,
    units: int = 4,
) -> None:
    layer = _layer(metric, units)
    for x, g in pairs:
        with calling("observe"):
            metric.observe(Seen(layer, x, g if metric.reads == "gradient" else None, None, step), state)


def _score(metric: LayerMetric, layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
    with calling("score"):
        score = metric.score(layer, state)
    expect(isinstance(score, Tensor), f"score must return a tensor, not {type(score).__name__}")
    expect(score.shape == (layer.units,), f"score must be [{layer.units}], one per unit, not {list(score.shape)}")
    return score


class LayerMetricContract(PartContract):
    """The contract of a `lrkit.LayerMetric`."""

    def _exercise(self, component: Any) -> None:
        layer = _layer(component)
        state = _begun(component, layer)
        _observe(component, state, _stream())
        _score(component, layer, state)
        component.merge([state, _begun(component, layer)])

    @clause
    def test_reads_and_memory_are_declared(self, component: Any) -> None:
        """`reads` is ``"inputs"`` or ``"gradient"``; `memory` is a tuple of distinct names."""
        kinds = ("inputs", "gradient")
        expect(component.reads in kinds, f'reads must be "inputs" or "gradient", not {component.reads!r}')
        names = component.memory
        good = isinstance(names, tuple) and all(isinstance(n, str) and n for n in names)
        expect(good and len(set(names)) == len(names), f"memory must be a tuple of distinct names, not {names!r}")

    @clause
    def test_begins_alike(self, component: Any) -> None:
        """`begin` gives the same tensors each time: every process begins by itself."""
        layer = _layer(component)
        one, other = _begun(component, layer), _begun(component, layer)
        odd = [name for name in one if name not in other or not equal(one[name], other[name])]
        expect(not odd and len(one) == len(other), f"begin gives another {', '.join(odd) or 'dict'} the second time")
        wider = _begun(component, _layer(component, units=5))
        for name, tensor in one.items():
            same = tensor.ndim == wider[name].ndim
            grown = [a for a, b in zip(tensor.shape, wider[name].shape, strict=False) if a != b]
            expect(same and grown in ([], [4]), f'"{name}" may have one slice per unit along one dimension, no more')

    @clause
    def test_score_is_finite_for_each_unit(self, component: Any) -> None:
        """`score` gives one finite number for each unit, of few or many, before any row and after some."""
        for units in (1, 4):
            layer = _layer(component, units)
            for name, pairs in (
                ("no rows", []),
                ("random rows", _stream()),
                ("no rows in a batch", [*_stream(1), *_stream(1, 0)]),
            ):
                state = _begun(component, layer)
                _observe(component, state, pairs, units=units)
                score = _score(component, layer, state)
                expect(bool(torch.isfinite(score.float()).all()), f"{name}: score is not finite")

    @clause
    def test_score_changes_nothing(self, component: Any) -> None:
        """`score` leaves the state as it is, and says the same when it is asked again."""
        layer = _layer(component)
        state = _begun(component, layer)
        _observe(component, state, _stream())
        before = {name: tensor.clone() for name, tensor in state.items()}
        first = _score(component, layer, state).clone()
        changed = [name for name, tensor in before.items() if not equal(tensor, state[name])]
        expect(not changed, f"score writes to the state: {', '.join(changed)} has changed")
        expect(equal(first, _score(component, layer, state)), "score says something else when it is asked again")

    @clause
    def test_observe_writes_to_its_state_alone(self, component: Any) -> None:
        """`observe` writes to the tensors of `state`, in place; rows stay as they are."""
        state = _begun(component, _layer(component))
        tensors, shapes = dict(state), {name: tensor.shape for name, tensor in state.items()}
        for x, g in _stream():
            rows = x.clone(), g.clone()
            _observe(component, state, [rows])
            expect(torch.equal(rows[0], x) and torch.equal(rows[1], g), "observe writes to the rows it was given")
            expect(state.keys() == tensors.keys(), "observe puts tensors into the state, or takes some out")
            for name, tensor in tensors.items():
                expect(state[name] is tensor, f'observe replaces state["{name}"]: write in place')
                expect(tensor.shape == shapes[name], f'observe changes the shape of state["{name}"]')

    @clause
    def test_remembers_in_its_state_alone(self, component: Any) -> None:
        """From the same state it goes on the same, bit for bit, whatever it was used for in between."""
        layer, pairs = _layer(component), _stream(6)
        state = _begun(component, layer)
        _observe(component, state, pairs[:3])
        saved = {name: tensor.clone() for name, tensor in state.items()}
        _observe(component, state, pairs[3:], 2)
        through = _score(component, layer, state).clone()
        _observe(component, _begun(component, layer), [(x * 3, g - 1) for x, g in pairs])
        for metric in (component, attrs.evolve(component)):
            again = {name: tensor.clone() for name, tensor in saved.items()}
            _observe(metric, again, pairs[3:], 2)
            expect(
                equal(through, _score(metric, layer, again)),
                "from a saved state it goes on to other scores: something is remembered outside of it, or is random",
            )

    @clause
    def test_any_cut_of_rows_is_the_same(self, component: Any) -> None:
        """If `merge` sums, rows score alike in one batch or in several (to 1e-5), and in several processes."""
        if type(component).merge is not LayerMetric.merge:
            return
        layer, pairs = _layer(component), _stream()
        rows = torch.cat([x for x, _ in pairs]), torch.cat([g for _, g in pairs])

        def score(cuts: list[int]) -> Tensor:
            state = _begun(component, layer)
            _observe(component, state, list(zip(torch.split(rows[0], cuts), torch.split(rows[1], cuts), strict=True)))
            return _score(component, layer, state).double()

        whole = score([36])
        for cuts in ([9] * 4, [1, 30, 5]):
            expect(
                torch.allclose(score(cuts), whole, rtol=1e-5, atol=1e-7),
                f"rows in batches of {cuts} score differently than all at once: if that is meant, override merge",
            )

    @clause
    def test_merges_processes(self, component: Any) -> None:
        """`merge` gives the same tensors by name, shape and type; processes that saw nothing change no score."""
        layer = _layer(component)
        state, other = _begun(component, layer), _begun(component, layer)
        _observe(component, state, _stream())
        _observe(component, other, _stream(2))
        want = _score(component, layer, state).clone()
        with calling("merge"):
            merged = component.merge([state, other])
        for name, tensor in state.items():
            like = merged.get(name) if isinstance(merged, dict) else None
            good = isinstance(like, Tensor) and like.shape == tensor.shape and like.dtype == tensor.dtype
            expect(good, f'merge must give "{name}" as {list(tensor.shape)} of {tensor.dtype}')
        _score(component, layer, merged)
        with calling("merge"):
            alone = component.merge([state, _begun(component, layer), _begun(component, layer)])
        expect(
            close(_score(component, layer, alone).float(), want.float()),
            "merged with processes that saw no rows it scores differently: begin with zeros, or override merge",
        )

    @clause
    def test_trains_or_is_refused_everywhere(self, component: Any) -> None:
        """With each of lrkit's parameterizations and actions it is refused with both sides named, or trains and decides."""
        for name, method in taken(component, parameterization=builtin_parameterizations(), action=builtin_actions()):
            with calling(name):
                run = Run(method, 10)
                run.to(10)
                decides(run)

    @clause
    def test_resumes_exactly(self, component: Any) -> None:
        """A run that is saved and resumed, before, between and after decisions, is bitwise the run."""
        for _, method in taken(component, action=builtin_actions()):
            resumes(method, 10, POINTS)
