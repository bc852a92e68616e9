"""Slices of fused projections in PEFT's formats, which know whole projections alone: their factors as blocks of one pair."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrkit.layers import Slice
from lrkit.parameterizations.adapter import oriented_weight
from lrkit.peft.files import Factors


def joined(factors: Mapping[str, Factors], layers: Mapping[str, nn.Module]) -> dict[str, Factors]:
    """Return each projection's ΔW as factors: its slices' A one below the other, and their B as blocks, zero elsewhere.

    So the rank of a projection is the sum of its slices' ranks. All other layers' factors stay as they are.

    Args:
        factors: ΔW of each layer that has a rank, with core values.
        layers: layer name to the layer, or to the slice.
    """
    found: dict[str, Factors] = {}
    shared: dict[str, list[tuple[Slice, Factors]]] = {}
    for name, each in factors.items():
        layer = layers[name]
        if isinstance(layer, Slice):
            place = name.rpartition(".")[0]
            shared.setdefault(place, []).append((layer, each))
            found[place] = each  # in the model's order
        else:
            found[name] = each
    return found | {place: _block(slices) for place, slices in shared.items()}


def _block(slices: list[tuple[Slice, Factors]]) -> Factors:
    scaling = slices[0][1].scaling
    b = slices[0][1].b.new_zeros(slices[0][0].layout.rows, sum(each.rank for _, each in slices))
    cores: list[Tensor] = []
    for layer, each in slices:
        assert each.core is not None
        first = sum(map(len, cores))
        rows = layer.rows(b)[..., first : first + each.rank]
        rows.copy_(each.b.view(rows.shape))
        cores.append(each.core * (each.scaling / scaling))
    return Factors(torch.cat([each.a for _, each in slices]), b, torch.cat(cores), scaling, _magnitude(slices))


def _magnitude(slices: list[tuple[Slice, Factors]]) -> Tensor | None:
    """Return m of all rows of a projection: those that no slice adapts keep the norms that they have."""
    if all(each.magnitude is None for _, each in slices):
        return None
    norms: Tensor = torch.linalg.vector_norm(oriented_weight(slices[0][0].owner), dim=1).to(slices[0][1].b.dtype)
    for layer, each in slices:
        assert each.magnitude is not None
        rows = layer.rows(norms)
        rows.copy_(each.magnitude.view(rows.shape))
    return norms
