"""Ask what a parameterization computes: on inputs of any shape and dtype, on transposed layers, and as a penalty."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrkit.adapt.adapted import attach
from lrkit.errors import LrkitError
from lrkit.method import Method
from lrkit.testing.base import clause
from lrkit.testing.comparisons import close, near
from lrkit.testing.findings import Broken, calling, expect, expect_one_line, raised
from lrkit.testing.parameterization.clauses import ParameterizationClauses
from lrkit.testing.parameterization.subjects import conv1d, merges, stirred
from lrkit.testing.tiny import batch, seed_torch, tiny


class Computing(ParameterizationClauses):
    """The clauses about forward and penalty."""

    @clause
    def test_any_leading_shape(self, component: Any) -> None:
        """An adapter takes [tokens, d_in] and [batch, length, d_in], one row or many, as the layer does."""
        _, adapted = stirred(component)
        for name, adapter in adapted.adapters.items():
            d_in = dict(tiny().named_modules())[name].in_features
            x = torch.randn(2, 3, int(d_in), generator=torch.Generator().manual_seed(10))
            with calling(f"{name}: forward"):
                y = adapter(x)
                flat, row = adapter(x.flatten(0, 1)), adapter(x[:1, :1])
            expect(y.shape[:2] == (2, 3) and close(flat, y.flatten(0, 1)), f"{name}: [6, d_in] and [2, 3, d_in] differ")
            expect(close(row, y[:1, :1]), f"{name}: one row alone has another output than among others")

    @clause
    def test_penalty_is_a_scalar(self, component: Any) -> None:
        """`penalty` gives a finite scalar, or None; it changes nothing."""
        _, adapted = stirred(component)
        before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
        with calling("penalty"):
            penalty = component.penalty(list(adapted.adapters.values()))
        if penalty is not None:
            good = isinstance(penalty, Tensor) and penalty.numel() == 1 and penalty.ndim == 0
            expect(
                good and bool(torch.isfinite(penalty)),
                f"penalty must be a finite scalar tensor or None, not {penalty!r}",
            )
        for name, p in adapted.named_parameters():
            expect(torch.equal(p, before[name]), f"penalty changes {name}")

    @clause
    def test_other_dtypes_or_refused(self, component: Any) -> None:
        """It trains in float64, bfloat16 and under autocast, with outputs in the model's dtype; or refuses in one line."""
        cases = ((torch.float64, False), (torch.bfloat16, False), (torch.float32, True))
        for dtype, cast in cases:
            name = "autocast" if cast else str(dtype).removeprefix("torch.")
            seed_torch(8)
            model = tiny(dtype)
            try:
                adapted = attach(model, Method(parameterization=component))
            except LrkitError as error:
                expect_one_line(error, f"{name}: refused")
                continue
            optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
            adapted.bind(optimizer, total_steps=2)
            # Tensors that train are at least float32. If every tensor of a model trains, all of the model is.
            now = {p.dtype for p in model.parameters()}
            own = dtype if dtype in now else max(now, key=lambda each: each.itemsize)
            x, labels = batch(own)
            wanted = torch.bfloat16 if cast else own
            for _ in range(2):
                with calling(f"{name}: forward or backward"), torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    outputs = model(x)
                    loss = F.cross_entropy(outputs.float(), labels) + adapted.penalty().float()
                with calling(f"{name}: backward or the optimizer's step"):
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                expect(outputs.dtype == wanted, f"{name}: outputs are {outputs.dtype}, the model's are {wanted}")
                expect(bool(torch.isfinite(outputs).all()), f"{name}: outputs are not finite")

    @clause
    def test_conv1d_or_refused(self, component: Any) -> None:
        """GPT-2's transposed ``Conv1D`` is adapted, with outputs as before and after merging; or refused in one line."""
        model = tiny(linear=conv1d).eval()
        x, _ = batch()
        plain = model(x)
        seed_torch(8)
        try:
            adapted = attach(model, Method(parameterization=component))
        except LrkitError as error:
            expect_one_line(error)
            return
        except Exception as error:
            raise Broken(f"attach to Conv1D layers {raised(error)}; expected a LrkitError in one line") from error
        with calling("forward on Conv1D layers"):
            outputs = model(x)
        expect(near(outputs, plain), "with fresh adapters on Conv1D layers outputs differ: ΔW must be 0")
        F.cross_entropy(outputs, batch()[1]).backward()  # type: ignore[no-untyped-call]
        merges(model, adapted, "on Conv1D layers ")
