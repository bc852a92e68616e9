"""The things that do not change while a run is trained: the method, the adapters, and what they were at first."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import attrs
from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.loop.policy import PolicyState
from lrkit.loop.tally import Tally
from lrkit.method import Method
from lrkit.units import Block, Part, blocks_of, maps_of, rank_of, ranked

BESIDE = ""
"""The place in a count of the tensors that train in no layer and are not the head's."""


@attrs.frozen(eq=False)
class Run:
    """A method on the adapters of one model.

    Args:
        method: the method.
        model: the model that they are in.
        modules: layer name to adapter.
        trained: ``id`` of every parameter that trains when the run begins.
        others: what trains beside the adapters.
        ranks: layer name to the components that it stores at first; 0 for an adapter without any.
        blocks: the units of each policy at first.
        starts: layer name to trainable parameters at first; under `BESIDE` those in no layer, without the head.
    """

    method: Method
    model: nn.Module
    modules: Mapping[str, nn.Module]
    trained: set[int]
    others: Sequence[nn.Parameter]
    ranks: Mapping[str, int]
    blocks: Sequence[Sequence[Block]]
    starts: Mapping[str, int]

    @classmethod
    def of(
        cls,
        method: Method,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        trained: set[int],
        others: Sequence[nn.Parameter] = (),
        body: Sequence[Block] = (),
    ) -> "Run":
        """Look at adapters as they are at first. `body` are the transformer's blocks as units; the others as in `Run`.

        Raises:
            LrkitError: a policy has no unit to act on, or layers that share matrices would have to be cut.
        """
        parts = method.parameterization.parts
        blocks = []
        for policy in method.policies:
            found = blocks_of(modules, parts, policy.action.unit, trained, body)
            if not any(block.count for block in found):
                where = "the layers that were chosen" if policy.action.unit != "block" else type(model).__name__
                raise LrkitError(
                    f"{type(policy.action).__name__} has nothing to act on: no unit of kind {policy.action.unit!r} trains "
                    f"in {where}"
                )
            blocks.append(found)
        ranks = {name: rank_of(module, parts) for name, module in modules.items()}
        run = cls(method, model, modules, trained, others, ranks, blocks, {})
        run = attrs.evolve(run, starts=run.tally().counts)
        if any(policy.action.fate == "removed" for policy in method.policies):
            run.check_cuttable()
        resizing = next((p.action for p in method.policies if p.action.fate == "removed" or p.action.grows), None)
        stacks = [name for name, module in modules.items() if maps_of(module) > 1]
        if resizing is not None and stacks:
            raise LrkitError(
                f"{resizing!r} cuts or adds components, and all experts of {stacks[0]} have one tensor, as many of each: "
                'mask them by Prune(cut="never") and cut after training by compact(), or leave experts out by exclude'
            )
        return run

    @property
    def parts(self) -> list[Part]:
        """The parts that run over rank components."""
        return ranked(self.method.parameterization.parts)

    @property
    def grows(self) -> bool:
        """Whether a policy adds components."""
        return any(policy.action.grows for policy in self.method.policies)

    @property
    def penalized(self) -> bool:
        """Whether a penalty can reach adapters that the loss does not."""
        return self.method.parameterization.penalty_weight is not None

    def check_cuttable(self) -> None:
        """Raise LrkitError if layers share matrices: each has a mask of its own, and they cannot be cut."""
        tensors = [id(part.of(module)) for module in self.modules.values() for part in self.parts]
        if len(set(tensors)) < len(tensors):
            raise LrkitError("layers share their matrices, and each has a mask of its own: they cannot be cut")

    def tally(self) -> Tally:
        """Count what trains in each layer now, and under `BESIDE` what does in none."""
        head = {id(p) for p in self.others}
        beside = [p for p in self.model.parameters() if id(p) not in head]
        return Tally(self.modules, self.method.parameterization.parts, self.trained, {BESIDE: beside})

    def policies(self, off: Collection[int] = ()) -> list[PolicyState]:
        """Make the state of each policy as it is at first, without statistics; `off` is what somebody froze by hand."""
        each = enumerate(zip(self.method.policies, self.blocks, strict=True))
        parts = self.method.parameterization.parts
        return [PolicyState(index, policy, blocks, parts, off) for index, (policy, blocks) in each]

    def anew(self, others: Sequence[nn.Parameter]) -> "Run":
        """Return the same run, with all parameters looked up again: others may stand in their places now.

        Args:
            others: what trains beside the adapters, as it is now.
        """
        blocks = [[attrs.evolve(block) for block in each] for each in self.blocks]
        return attrs.evolve(self, others=others, blocks=blocks)

    def tensors_of(self, layers: Iterable[str]) -> set[int]:
        """Return the ``id`` of each parameter of some layers, by their names."""
        return {id(p) for name in layers for p in self.modules[name].parameters()}

    def froze(self, tensor: Tensor) -> bool:
        """Say whether a tensor trained when the run began and was frozen on the way."""
        return id(tensor) in self.trained and not tensor.requires_grad and tensor.numel() > 0

    def places(self) -> dict[int, tuple[str, int]]:
        """Return layer name and axis of each tensor that has one slice per component, by the tensor's ``id``."""
        return {id(part.of(m)): (name, part.axis or 0) for name, m in self.modules.items() for part in self.parts}

    def idle(self, ranks: Mapping[str, int]) -> set[int]:
        """Return the ``id`` of each tensor of the layers that began with rank 0, and have it at these ranks, too."""
        names = [name for name in self.modules if self.parts and not self.ranks[name] and not ranks[name]]
        return self.tensors_of(names)

    def shapes(self, ranks: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
        """Return the shapes that component-wise tensors have at other ranks, by the tensor's ``id``."""
        shapes: dict[int, tuple[int, ...]] = {}
        for name, module in self.modules.items():
            for part in self.parts if name in ranks else ():
                sizes = list(part.of(module).shape)
                sizes[part.axis or 0] = ranks[name]
                shapes[id(part.of(module))] = tuple(sizes)
        return shapes
