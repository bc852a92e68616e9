"""Tiny models with a parameterization's adapters on them, and the question of merging, which several clauses ask."""

from typing import Any

import torch
from torch import nn

from lrkit.adapt.adapted import Adapted, attach
from lrkit.errors import LrkitError
from lrkit.method import Method
from lrkit.testing.comparisons import gap, near
from lrkit.testing.findings import Broken, calling, expect, expect_one_line, raised
from lrkit.testing.runs import Run
from lrkit.testing.tiny import TinyModel, batch, seed_torch, tiny


def attached(component: Any, **options: Any) -> tuple[TinyModel, Adapted]:
    """Return the tiny model in evaluation, with fresh adapters; `options` are those of `tiny`."""
    model = tiny(**options).eval()
    seed_torch(8)
    with calling("attach to the tiny model"):
        adapted = attach(model, Method(parameterization=component))
    return model, adapted


def stirred(component: Any) -> tuple[TinyModel, Adapted]:
    """Return the tiny model in evaluation, with adapters that were trained for a few steps and then moved at random."""
    run = Run(Method(parameterization=component), 10)
    run.to(3)
    with torch.no_grad():
        for p in run.adapted.adapter_parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(9)).to(p) * 0.05)
    return run.model.eval(), run.adapted


def conv1d(d_in: int, d_out: int, bias: bool = True) -> nn.Module:
    """Return GPT-2's transposed layer, by the arguments of ``nn.Linear``. It always has a bias."""
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(d_out, d_in)  # type: ignore[no-untyped-call]
    return layer


def merges(model: nn.Module, adapted: Adapted, place: str = "") -> None:
    """Check that a model merges into one with the same outputs, or that merging is refused in one line.

    Args:
        model: a model with adapters on it.
        adapted: its handle.
        place: words for the message, for example ``"on Conv1D layers "``.
    """
    with torch.no_grad():
        for p in adapted.adapter_parameters():
            p.add_(0.02)
    x, _ = batch()
    outputs = model(x)
    try:
        merged = adapted.merge()
    except LrkitError as error:
        expect_one_line(error, f"{place}merge is refused")
        return
    except Exception as error:
        raise Broken(f"{place}merge {raised(error)}") from error
    expect(near(merged(x), outputs), f"{place}after merge outputs differ by {gap(merged(x), outputs):.2g}")
