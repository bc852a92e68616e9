"""A layer metric's memory of a policy's layers: the sums and sketches of what goes through them, and scores from these."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.layers import beneath
from lrkit.loop.layout import GradientOf, own_gradient
from lrkit.loop.pieces import Look, as_is
from lrkit.loop.remembered import Carried, Observed, Peers, carried_over, none_of, unchanged
from lrkit.loop.resizing import Resized
from lrkit.metrics import Layer, LayerMetric, Seen
from lrkit.units import Block

State = dict[str, Tensor]


@attrs.frozen(eq=False)
class Standing:
    """The layers of which units are ranked, and the units of each.

    Args:
        blocks: all blocks of the policy.
        present: for each block whether it is still ranked.
    """

    blocks: Sequence[Block]
    present: Sequence[bool]

    @functools.cached_property
    def device(self) -> torch.device:
        """The device of the policy's tensors."""
        return self.blocks[0].tensors[0].device if self.blocks else torch.device("cpu")

    @functools.cached_property
    def units(self) -> int:
        """How many units there are, in all blocks."""
        return sum(block.count for block in self.blocks)

    @functools.cached_property
    def places(self) -> dict[str, list[slice]]:
        """Layer name to where its units lie among all: one slice per block that is ranked."""
        found: dict[str, list[slice]] = {}
        start = 0
        for block, there in zip(self.blocks, self.present, strict=True):
            if there:
                found.setdefault(_layer_of(block), []).append(slice(start, start + block.count))
            start += block.count
        return found

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Layer name to its adapter."""
        return {_layer_of(b): b.module for b, there in zip(self.blocks, self.present, strict=True) if there}

    def layer(self, name: str, memory: Mapping[str, Tensor], more: int = 0) -> Layer:
        """Return one layer as a metric sees it; with `more` units than it has, to see which tensors have one slice each."""
        module, places = self.modules[name], self.places[name]
        base, kind = beneath(module)
        sizes = None if kind is None else kind.sizes(base)
        assert sizes is not None
        own = {key: torch.cat([values[place] for place in places]) for key, values in memory.items()}
        count = sum(place.stop - place.start for place in places) + more
        return Layer(name, module, sizes.d_in, sizes.d_out, count, self.device, own)


class Streams:
    """A layer metric's tensors of each layer, and its memory of units.

    Args:
        metric: the metric.
        layout: the layers that are ranked.
        state: layer name to its tensors; as the metric begins by default.
        memory: what is remembered of each unit, by name [units]; zero by default.
        observations: how many steps have been observed.

    Raises:
        LrkitError: a layer's input cannot be shown as rows.
    """

    by_gradient: ClassVar[bool] = False  # rows come before anybody knows whom the gradients reach

    def __init__(
        self,
        metric: LayerMetric,
        layout: Standing,
        state: Mapping[str, State] | None = None,
        memory: Mapping[str, Tensor] | None = None,
        observations: int = 0,
    ) -> None:
        self.metric, self.layout, self.observations = metric, layout, observations
        self.memory = none_of(metric, layout) if memory is None else dict(memory)
        self.state = {name: self._begun(name) for name in layout.modules} if state is None else dict(state)
        self._own: dict[str, State] = {}  # what this process has seen in this step, if there are several
        self._seen: set[str] = set()
        self._finite: Tensor | None = None

    @classmethod
    def lay(cls, blocks: Sequence[Block], present: Sequence[bool], reads: str, look: Look = as_is) -> Standing:
        """Note which layers are ranked: those of rank 0 as well, since they may get components."""
        for block, there in zip(blocks, present, strict=True):
            layer, kind = beneath(block.module)
            reason = "it is no layer of a known kind" if kind is None else kind.no_rows(layer)
            if there and reason is not None:
                raise LrkitError(
                    f"{block.name} cannot be ranked by a metric that reads {reads!r} of layers: {reason}. Leave it out by "
                    "exclude or targets"
                )
        return Standing(blocks, present)

    @classmethod
    def restored(
        cls, metric: LayerMetric, layout: Standing, saved: Mapping[str, Tensor], observations: int
    ) -> "Streams":
        """Make those of a saved run from the tensors that `saved` gave, or from none if the policy has ended."""
        state = {
            name: {
                key: saved[f"layer.{name}.{key}"].to(layout.device, copy=True)
                for key in metric.begin(layout.layer(name, {}))
            }
            for name in layout.modules
        }
        memory = {name: saved[f"memory.{name}"].to(layout.device, copy=True) for name in metric.memory if saved}
        return cls(metric, layout, state, memory, observations)

    @classmethod
    def blank(cls, metric: LayerMetric, layout: Standing) -> dict[str, Tensor]:
        """Return tensors of the names, shapes and types that `saved` has."""
        return cls(metric, layout).saved()

    def saved(self) -> dict[str, Tensor]:
        """Return all tensors by the names that a state has for them."""
        state = {f"layer.{name}.{key}": t for name, tensors in self.state.items() for key, t in tensors.items()}
        return {**state, **{f"memory.{name}": values for name, values in self.memory.items()}}

    def held(self) -> list[Tensor]:
        """Return all tensors that this process holds for it: for counting bytes."""
        return list(self.saved().values())

    def kept_of(self, name: str) -> State:
        """Return what is kept of one layer: its tensors by name."""
        return self.state.get(name, {})

    @property
    def reads(self) -> dict[str, nn.Module]:
        """The layers whose rows are read, by name: their adapters."""
        return self.layout.modules

    # ---- what goes through ----

    @torch.no_grad()
    def take(self, name: str, x: Tensor, g: Tensor | None, labelled: Tensor | None, peers: Peers | None) -> None:
        """Take in rows of a layer. Arguments as in `Seen`; `peers` are the processes that train together, if there are."""
        if name not in self.state:
            return
        finite = torch.isfinite(torch.stack([rows.sum() for rows in (x, g) if rows is not None])).all()
        waits = finite.device.type != "cpu"
        self._finite = finite if self._finite is None else self._finite & finite
        self._seen.add(name)
        if not waits and not finite:
            return
        if peers is None:
            state = self.state[name]
        else:
            state = self._own[name] if name in self._own else self._own.setdefault(name, self._begun(name))
        # Avoid a device sync: if a number is not finite, the tensors are rolled back on the device.
        before = {key: values.clone() for key, values in state.items()} if waits else {}
        layer = self.layout.layer(name, self.memory)
        self.metric.observe(Seen(layer, x, g, labelled, self.observations + 1), state)
        for key, values in before.items():
            state[key].copy_(torch.where(finite, state[key], values))

    def observe(
        self, scale: Tensor | None, of: GradientOf = own_gradient, *, scoring: bool = False, peers: Peers | None = None
    ) -> Observed:
        """End one optimizer step: what each process has seen becomes one. Only `peers` is asked for."""
        if not self.state:
            return Observed()
        self.observations += 1
        if peers is not None:
            self._merge(peers)
        shown, self._seen = frozenset(self._seen), set()
        finite = self._finite is None or self.layout.device.type != "cpu" or bool(self._finite)
        if self.layout.device.type == "cpu":
            self._finite = None
        return Observed(finite, silent=not shown, shown=shown)

    @torch.no_grad()
    def _merge(self, peers: Peers) -> None:
        own = {name: self._own.get(name) or self._begun(name) for name in self.state}
        places = [(name, key) for name, tensors in own.items() for key in tensors]
        told: dict[tuple[str, str], Tensor] = {}
        for dtype in dict.fromkeys(own[name][key].dtype for name, key in places):
            alike = [place for place in places if own[place[0]][place[1]].dtype == dtype]
            flat = torch.cat([own[name][key].reshape(-1) for name, key in alike])
            pieces = torch.split(peers.tell(flat), [own[name][key].numel() for name, key in alike], dim=1)
            told |= dict(zip(alike, pieces, strict=True))
        for name, tensors in self.state.items():
            theirs = [
                {key: told[name, key][rank].view(t.shape) for key, t in tensors.items()} for rank in range(peers.count)
            ]
            self.state[name] = self.metric.merge([tensors, *theirs])
        self._own = {}

    def skipped(self) -> bool:
        """Say whether rows on a device were not finite since the last call."""
        flag, self._finite = self._finite, None
        return flag is not None and not flag

    # ---- scores ----

    def entries(self) -> Tensor:
        """Refuse: there are no entry-wise scores."""
        raise LrkitError(f"{self.metric!r} scores layers' units, and the action asks for scores of entries")

    @torch.no_grad()
    def scores(self, draw: Callable[[], Tensor]) -> Tensor:
        """Return unit scores [units], -inf for a unit that is out for good. Nothing is left to chance."""
        scores = torch.full((self.layout.units,), -torch.inf, device=self.layout.device)
        for name, places in self.layout.places.items():
            layer = self.layout.layer(name, self.memory)
            found = self.metric.score(layer, self.state[name])
            if not isinstance(found, Tensor) or found.shape != (layer.units,):
                raise LrkitError(
                    f"{self.metric!r}: the score of {name} must be [{layer.units}], one for each of its units, not "
                    f"{list(getattr(found, 'shape', ()))}"
                )
            pieces = torch.split(found.to(scores), [place.stop - place.start for place in places])
            for place, piece in zip(places, pieces, strict=True):
                scores[place] = piece
        return scores

    def decided(self, kept: Tensor) -> None:
        """Let the metric take in a decision."""
        self.metric.decided(kept, self.memory)

    # ---- following ----

    def follow(
        self, layout: Standing, resized: Mapping[int, Resized] | None = None, units: Carried = unchanged
    ) -> "Streams":
        """Return the same over other layers: after a freeze, a thaw or a resize. A layer that is new begins anew.

        Args:
            layout: the layers that are ranked now.
            resized: how tensors were resized, by their ``id``.
            units: how numbers of units follow.
        """
        memory = carried_over(self.memory, units)
        made = Streams(self.metric, layout, {}, memory, self.observations)
        for name in layout.modules:
            made.state[name] = self._followed(name, layout, units) if name in self.state else made._begun(name)
        made._seen, made._finite, made._own = self._seen, self._finite, self._own
        return made

    def _followed(self, name: str, layout: Standing, carried: Carried) -> State:
        numbers = torch.arange(1, self.layout.units + 1)
        before = torch.cat([numbers[place] for place in self.layout.places[name]]).tolist()
        after = torch.cat([carried(numbers, 0)[place] for place in layout.places[name]]).tolist()
        if before == after:
            return self.state[name]
        # Where each of the layer's units was among them before; -1 for one that is fresh.
        found = [before.index(n) if n in before else -1 for n in after]
        index = torch.tensor(found, dtype=torch.long, device=self.layout.device)
        begun, wider = self._begun(name), self.metric.begin(self.layout.layer(name, {}, more=1))
        new = self.metric.begin(layout.layer(name, {}))
        state = dict(self.state[name])
        for key, values in self.state[name].items():
            axes = [i for i, (a, b) in enumerate(zip(begun[key].shape, wider[key].shape, strict=True)) if a != b]
            for axis in axes[:1]:
                stays = index >= 0
                there = stays.nonzero().flatten()
                state[key] = new[key].index_copy(axis, there, values.index_select(axis, index[stays]))
        return state

    def moved(self, layout: Standing) -> "Streams":
        """Return the same over the same layers on another device."""
        state = {name: {key: t.to(layout.device) for key, t in tensors.items()} for name, tensors in self.state.items()}
        memory = {name: values.to(layout.device) for name, values in self.memory.items()}
        return Streams(self.metric, layout, state, memory, self.observations)

    def _begun(self, name: str) -> State:
        return self.metric.begin(self.layout.layer(name, {}))


def _layer_of(block: Block) -> str:
    """Return the name of a block's layer."""
    return block.name.removesuffix(f".{block.parts[0].name}") if block.kind == "matrix" else block.name
