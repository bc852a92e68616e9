"""Ask how a parameterization begins: its parts, the model that it starts at, and the layers that it takes."""

from collections.abc import Mapping
from typing import Any

import torch

from lrkit.adapt.adapted import attach
from lrkit.adapt.targets import find_targets
from lrkit.method import Method
from lrkit.ranks import rank_at
from lrkit.testing.base import clause
from lrkit.testing.comparisons import gap
from lrkit.testing.findings import calling, expect
from lrkit.testing.parameterization.clauses import ParameterizationClauses
from lrkit.testing.parameterization.subjects import attached
from lrkit.testing.tiny import batch, seed_torch, tiny
from lrkit.units import Part


class Beginning(ParameterizationClauses):
    """The clauses about fresh adapters, before a first step."""

    @clause
    def test_parts_are_what_is_there(self, component: Any) -> None:
        """`parts` names tensors of every adapter, with `components` entries along their axis; a core is [components]."""
        parts = component.parts
        good = isinstance(parts, tuple) and all(isinstance(part, Part) for part in parts)
        expect(good, f"parts must be a tuple of lrkit.Part, not {parts!r}")
        names = [part.name for part in parts]
        expect(len(set(names)) == len(names), f"parts names a tensor twice: {', '.join(names)}")
        expect(sum(part.core for part in parts) <= 1, "parts has more than one core")
        _, adapted = attached(component)
        rank = component.components
        good = rank is None or isinstance(rank, Mapping) or (isinstance(rank, int) and rank >= 0)
        expect(
            good,
            f"components must be an int of at least 0, a table, or None if it follows from the layer, not {rank!r}",
        )
        trained = {id(p) for p in adapted.parameters()}
        trains = dict.fromkeys(names, False)
        for layer, adapter in adapted.adapters.items():
            for part in parts:
                with calling(f"{layer}: the part {part.name}"):
                    tensor = part.of(adapter)
                trains[part.name] |= id(tensor) in trained
                if part.axis is not None:
                    first = next(other for other in parts if other.axis is not None)
                    wanted = first.of(adapter).shape[first.axis] if rank is None else rank_at(rank, layer)
                    expect(
                        -tensor.ndim <= part.axis < tensor.ndim and tensor.shape[part.axis] == wanted,
                        f"{layer}: the part {part.name} {list(tensor.shape)} must have {wanted} entries (`components`) "
                        f"along its axis {part.axis}",
                    )
                expect(
                    not part.core or (part.axis == 0 and tensor.ndim == 1),
                    f"{layer}: a core is one scalar for each component, axis 0 of [components]; {part.name} is "
                    f"{list(tensor.shape)} with axis {part.axis}",
                )
        for part in parts:
            does = "trains" if trains[part.name] else "does not train in any layer"
            expect(
                trains[part.name] == part.trains,
                f"the part {part.name} is declared with trains={part.trains}, and it {does}",
            )

    @clause
    def test_starts_at_the_model(self, component: Any) -> None:
        """Fresh adapters change no output: ΔW = 0."""
        x, _ = batch(torch.float64)
        plain = tiny(torch.float64).eval()(x)
        model, _ = attached(component, dtype=torch.float64)
        with calling("forward"):
            outputs = model(x)
        expect(outputs.shape == plain.shape, f"outputs are {list(outputs.shape)}, without it {list(plain.shape)}")
        moved = gap(outputs, plain)
        expect(
            moved <= 1e-6 * plain.detach().abs().max().item(),
            f"with fresh adapters outputs differ by {moved:.2g}: ΔW must be 0",
        )

    @clause
    def test_layers_are_left_as_they_are(self, component: Any) -> None:
        """Building adapters changes no weight of the model, and each layer's parameters stay in it, as the same objects."""
        model = tiny()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        objects = dict(model.named_parameters())
        seed_torch(8)
        with calling("attach"):
            adapted = attach(model, Method(parameterization=component))
        for name, p in objects.items():
            expect(torch.equal(p, before[name]), f"building adapters changes the model's own {name}")
        there = {id(p) for p in model.parameters()}
        lost = [name for name, p in objects.items() if id(p) not in there]
        expect(
            not lost,
            f"{', '.join(lost[:2])} is in the model no more: keep the layer as a submodule (self.base = target.layer), so "
            "that it moves and is saved with the model",
        )
        names = {target.name for target in component.choose(find_targets(tiny(), "all-linear"))}
        missing, extra = sorted(names - set(adapted.adapters)), sorted(set(adapted.adapters) - names)
        expect(
            not missing,
            f"adapt must give each target its module, by the target's name: {', '.join(missing[:2])} is missing",
        )
        expect(not extra, f"adapt gives a module for {', '.join(extra[:2])}, which is no target (see `choose`)")
