"""Ask what every metric must keep: finite scores per entry, from buffers that it declares, and nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from lrkit.metrics import Metric, Parts
from lrkit.testing.base import PartContract, clause
from lrkit.testing.comparisons import close, equal
from lrkit.testing.findings import Broken, calling, expect
from lrkit.testing.neighbours import builtin_actions, builtin_parameterizations, method_with, taken
from lrkit.testing.runs import POINTS, Run, decides, resumes


class _Loose(dict[str, Tensor]):
    """State that makes a buffer when it is asked for: only one clause asks whether buffers are declared."""

    def __init__(self, metric: Metric, size: int) -> None:
        super().__init__((name, torch.zeros(size)) for name in metric.buffers)
        self.size = size

    def __missing__(self, name: str) -> Tensor:
        self[name] = torch.zeros(self.size)
        return self[name]


class _Strict(Mapping[str, Tensor]):
    """State that records which buffers are read, and takes no new ones."""

    def __init__(self, metric: Metric, size: int) -> None:
        self.tensors = {name: torch.zeros(size) for name in metric.buffers}
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise Broken(f'it asks for state["{name}"]; `buffers` names {", ".join(self.tensors) or "none"}')
        self.read.add(name)
        return self.tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        raise Broken(f'it puts a new tensor into state["{name}"]: write in place, state["{name}"].copy_(...)')

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _stream(size: int = 257, steps: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Return weights and gradients [size] of a few steps, some of them zero."""
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for _ in range(steps):
        weight, grad = torch.randn(2, size, generator=generator) * torch.tensor([[0.5], [0.1]])
        weight[:7], grad[5:12] = 0.0, 0.0
        pairs.append((weight, grad))
    return pairs


def _observe(
    metric: Metric, state: Mapping[str, Tensor], pairs: Sequence[tuple[Tensor, Tensor]], first: int = 1
) -> None:
    for step, (weight, grad) in enumerate(pairs, first):
        with calling("observe"):
            metric.observe(weight.clone(), grad.clone(), state, step)


def _score(metric: Metric, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    with calling("score"):
        score = metric.score(weight, state)
    expect(isinstance(score, Tensor), f"score must return a tensor, not {type(score).__name__}")
    return score


def _parts(metric: Metric, scores: Sequence[Tensor], first: int = 0) -> Parts:
    """Return parts as the loop hands them over, with draws and memory of the blocks from number `first` on."""
    blocks, units = scores[0].shape[:2]
    drawn = torch.rand(first + blocks, units, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    # After three decisions, of which each unit has won some: a block's numbers are the same beside others and alone.
    memory = {name: torch.zeros(first + blocks, units) for name in metric.memory}
    for _ in range(3 if memory else 0):
        kept = torch.rand(8, units, generator=generator)[: first + blocks] < 0.5
        with calling("decided"):
            metric.decided(kept.flatten(), {name: values.view(-1) for name, values in memory.items()})
    return Parts(scores, lambda: drawn[first:], {name: values[first:] for name, values in memory.items()})


class MetricContract(PartContract):
    """The contract of a `lrkit.Metric`."""

    def _exercise(self, component: Any) -> None:
        pairs, state = _stream(), _Loose(component, 257)
        _observe(component, state, pairs)
        score = _score(component, pairs[-1][0], state)
        component.reduce(_parts(component, [score[:240].view(2, 4, 30), score[:8].view(2, 4, 1)]))

    @clause
    def test_reads_and_buffers_are_declared(self, component: Any) -> None:
        """`reads` is a word that lrkit knows; `buffers` are distinct names, all used, and no others."""
        kinds = ("all", "core", "component", "nothing")
        expect(component.reads in kinds, f"reads must be one of {', '.join(kinds)}, not {component.reads!r}")
        names = component.buffers
        good = isinstance(names, tuple | list) and all(isinstance(n, str) and n for n in names)
        expect(good and len(set(names)) == len(names), f"buffers must be a tuple of distinct names, not {names!r}")
        state = _Strict(component, 257)
        for step, (weight, grad) in enumerate(_stream(steps=12), 1):
            with calling("observe"):
                component.observe(weight, grad, state, step)
            _score(component, weight, state)
        unused = [name for name in names if name not in state.read]
        expect(not unused, f"buffers names {', '.join(unused)}, which neither observe nor score has used in 12 steps")

    @clause
    def test_score_is_finite_float32_for_each_entry(self, component: Any) -> None:
        """`score` gives float32 [N] for weights [N], finite if weights and gradients are, zeros included; also for N = 0."""
        for name, pairs in (
            ("random weights and gradients", _stream()),
            ("zero gradients", [(weight, torch.zeros_like(grad)) for weight, grad in _stream()]),
            ("zero weights", [(torch.zeros_like(weight), grad) for weight, grad in _stream()]),
            ("zero weights and gradients", [(torch.zeros(9), torch.zeros(9))]),
            ("no entries", [(torch.zeros(0), torch.zeros(0))]),
        ):
            size = pairs[0][0].numel()
            state = _Loose(component, size)
            _observe(component, state, pairs)
            score = _score(component, pairs[-1][0], state)
            expect(
                score.shape == (size,), f"{name}: score must be [{size}], one for each entry, not {list(score.shape)}"
            )
            expect(score.dtype == torch.float32, f"{name}: score must be torch.float32, not {score.dtype}")
            for what, values in (("score", score), *((f'state["{key}"]', value) for key, value in state.items())):
                bad = int((~torch.isfinite(values)).sum())
                expect(not bad, f"{name}: {what} is not finite in {bad} of {values.numel()} entries")

    @clause
    def test_each_entry_stands_for_itself(self, component: Any) -> None:
        """An entry's score follows from its own weights and gradients: not from its place, nor from its neighbours."""
        pairs = _stream()

        def scores(pick: Sequence[Tensor]) -> Tensor:
            pieces = []
            for index in pick:
                state = _Loose(component, len(index))
                _observe(component, state, [(weight[index], grad[index]) for weight, grad in pairs])
                pieces.append(_score(component, pairs[-1][0][index], state))
            return torch.cat(pieces)

        everything = torch.arange(257)
        whole = scores([everything])
        expect(
            close(scores(list(torch.split(everything, [1, 64, 100, 92]))), whole),
            "entries taken in chunks score differently than all at once: lrkit may hand over any part of them at a time",
        )
        shuffled = torch.randperm(257, generator=torch.Generator().manual_seed(3))
        expect(close(scores([shuffled]), whole[shuffled]), "entries in another order have other scores")

    @clause
    def test_score_changes_nothing(self, component: Any) -> None:
        """`score` leaves weights and state as they are, and says the same when it is asked again."""
        pairs, state = _stream(), _Loose(component, 257)
        _observe(component, state, pairs)
        weight = pairs[-1][0].clone()
        before = {name: tensor.clone() for name, tensor in state.items()}
        first = _score(component, weight, state).clone()
        expect(torch.equal(weight, pairs[-1][0]), "score writes to the weights it was given")
        changed = [name for name, tensor in before.items() if not equal(tensor, state[name])]
        expect(not changed, f"score writes to the state: {', '.join(changed)} has changed")
        again = _score(component, weight, state)
        expect(equal(first, again), "score says something else when it is asked again")

    @clause
    def test_observe_writes_to_its_state_alone(self, component: Any) -> None:
        """`observe` writes to the tensors of `state`, in place; weights and gradients stay as they are."""
        state = _Loose(component, 257)
        tensors = dict(state)
        for step, (weight, grad) in enumerate(_stream(), 1):
            w, g = weight.clone(), grad.clone()
            with calling("observe"):
                component.observe(w, g, state, step)
            expect(torch.equal(w, weight), "observe writes to the weights it was given")
            expect(torch.equal(g, grad), "observe writes to the gradients it was given")
            for name, tensor in tensors.items():
                expect(state[name] is tensor, f'observe replaces state["{name}"]: write in place, .copy_() or .lerp_()')
                expect(tensor.shape == (257,), f'observe changes the shape of state["{name}"]')

    @clause
    def test_remembers_in_its_buffers_alone(self, component: Any) -> None:
        """From the same buffers it goes on the same, bit for bit, whatever it was used for in between."""
        pairs, state = _stream(steps=6), _Loose(component, 257)
        _observe(component, state, pairs[:3])
        saved = {name: tensor.clone() for name, tensor in state.items()}
        _observe(component, state, pairs[3:], first=4)
        _score(component, pairs[0][0], state)
        through = _score(component, pairs[-1][0], state).clone()
        _observe(component, _Loose(component, 257), [(weight * 3, grad - 1) for weight, grad in pairs])
        for metric in (component, attrs.evolve(component)):
            again = _Loose(metric, 257)
            again.update({name: tensor.clone() for name, tensor in saved.items()})
            _observe(metric, again, pairs[3:], first=4)
            expect(
                equal(through, _score(metric, pairs[-1][0], again)),
                "from a saved state it goes on to other scores: something is remembered outside of `buffers`, or is random",
            )

    @clause
    def test_reduce_gives_each_unit_a_score(self, component: Any) -> None:
        """`reduce` takes parts [blocks, units, entries] to finite float32 scores [blocks, units], each block on its own."""
        generator = torch.Generator().manual_seed(4)
        parts = [torch.rand(3, 4, entries, generator=generator) for entries in (1, 24, 32)]
        for given in ([parts[0]], parts) if component.reads == "core" else ([parts[1]], parts):
            copies = [part.clone() for part in given]
            with calling("reduce"):
                scores = component.reduce(_parts(component, given))
            expect(
                isinstance(scores, Tensor) and scores.shape == (3, 4),
                f"reduce of parts [3, 4, entries] must be [3, 4], not {list(getattr(scores, 'shape', ()))}",
            )
            expect(scores.dtype == torch.float32, f"reduce must give torch.float32, not {scores.dtype}")
            expect(torch.isfinite(scores).all(), "reduce of finite scores is not finite")
            expect(all(map(torch.equal, copies, given)), "reduce writes to the parts it was given")
            with calling("reduce"):
                alone = component.reduce(_parts(component, [part[1:2].clone() for part in given], first=1))
            expect(
                close(alone, scores[1:2]),
                "reduce scores a block differently beside others: which blocks come together is by their shape alone",
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
        for action in builtin_actions():
            if component.reads in ("all", "nothing") or action.unit == "component":
                resumes(method_with(component, action=action), 10, POINTS)
