"""Faulty parameterizations, each found by the clause that is meant."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from faulty import COMMON, Gated, Gates, Specimens, variant
from torch import nn

import lrkit

fault = Specimens("parameterization")


PARTS = "parts are what is there"
START = "starts at the model"
LEFT = "layers are left as they are"
LEARNS = "every trained parameter learns"
DOWN = "loss goes down"
SEED = "same seed same start"
SHAPES = "any leading shape"
PENALTY = "penalty is a scalar"
DTYPES = "other dtypes or refused"
CONV = "conv1d or refused"
MERGE = "merge gives the same outputs"
DETACH = "detach gives the model back"
SAVED = "saved and loaded"
MASKED = "masked components contribute nothing"
CUT = "can be cut"
EVERYWHERE = "trains or is refused everywhere"
RESUME = "resumes exactly"


def gates(module: type[nn.Module] | None = None, **changes: Any) -> Any:
    return variant(Gates, **({} if module is None else {"module": module}), **changes)


def with_parts(*parts: lrkit.Part) -> property:
    return property(lambda self: parts)


CORE, A, B = Gates().parts


@fault(PARTS, EVERYWHERE, CUT, RESUME, MASKED, SAVED)
def parameterization_with_a_part_that_is_not_there():
    return gates(parts=with_parts(CORE, A, lrkit.Part("C", axis=1)))


@fault(PARTS, CUT, MASKED, EVERYWHERE, RESUME, SAVED)
def parameterization_with_the_wrong_axis():
    return gates(parts=with_parts(CORE, A, attrs.evolve(B, axis=0)))


@fault(PARTS)
def parameterization_that_forgot_its_components():
    return gates(components=property(lambda self: 0))


@fault(PARTS)
def parameterization_that_says_it_does_not_train():
    return gates(parts=with_parts(CORE, attrs.evolve(A, trains=False), B))


@fault(PARTS)
def parameterization_with_a_part_twice():
    return gates(parts=with_parts(CORE, A, B, attrs.evolve(B)))


@fault(START)
def parameterization_that_does_not_start_at_the_model():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            nn.init.constant_(self.core, 0.1)

    return gates(Module)


@fault(LEFT, START, DETACH)
def parameterization_that_takes_from_the_weight():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            with torch.no_grad():
                base.weight -= 0.01

    return gates(Module)


@fault(LEFT)
def parameterization_that_hides_the_layer():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            del self.base
            self.__dict__["base"] = base

    return gates(Module)


@fault(LEARNS, DOWN)
def parameterization_that_is_dead():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            nn.init.zeros_(self.A)

    return gates(Module)


@fault(LEARNS)
def parameterization_with_an_idle_vector():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            self.idle = nn.Parameter(torch.zeros(3, dtype=base.weight.dtype))

    return gates(Module)


@fault(DOWN)
def parameterization_with_a_rate_below_zero():
    return gates(learning_rate=-0.01)


@fault(SEED, "leaves global state alone")
def parameterization_that_draws_from_numpy():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            with torch.no_grad():
                self.A.copy_(torch.from_numpy(np.random.randn(*self.A.shape) * 0.1))

    return gates(Module)


@fault(SAVED, RESUME, MASKED, CUT)
def parameterization_with_a_random_buffer():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            self.register_buffer("turn", torch.randn(rank, rank, dtype=base.weight.dtype) * 0.1, persistent=False)

        def forward(self, x):
            return self.base(x) + ((x @ self.A.t()) * self.core) @ (self.B + self.B @ self.turn).t()

        merge = property(doc="none")

    return gates(Module)


@fault(SEED, MERGE, SAVED, SHAPES, MASKED, CUT, "leaves global state alone")
def parameterization_that_is_random_in_evaluation():
    class Module(Gated):
        def forward(self, x):
            return self.base(x) + ((nn.functional.dropout(x, 0.5, True) @ self.A.t()) * self.core) @ self.B.t()

    return gates(Module)


@fault(SHAPES)
def parameterization_for_three_dimensions():
    class Module(Gated):
        def forward(self, x):
            return self.base(x) + torch.einsum("bni,ri,r,or->bno", x, self.A, self.core, self.B)

    return gates(Module)


@fault(SHAPES, DOWN)
def parameterization_that_looks_at_the_batch():
    class Module(Gated):
        def forward(self, x):
            return super().forward(x) + self.core.sum() * x.mean(dim=0).sum()

        merge = property(doc="none")

    return gates(Module)


@fault(PENALTY)
def parameterization_with_a_penalty_for_each_layer():
    return gates(penalty=lambda self, modules: torch.stack([m.A.square().mean() for m in modules]).sum().view(1))


@fault(DTYPES, START)
def parameterization_for_float32():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            for name in ("A", "B", "core"):
                setattr(self, name, nn.Parameter(getattr(self, name).detach().float()))

    return gates(Module)


@fault(DTYPES)
def parameterization_that_widens_outputs():
    class Module(Gated):
        def forward(self, x):
            y = super().forward(x)
            return y.float() if y.dtype == torch.bfloat16 else y

        def __init__(self, base, rank):
            super().__init__(base, rank)

    return gates(Module)


@fault(CONV)
def parameterization_that_takes_conv1d_for_a_linear():
    return gates(build=lambda self, target: self.module(target.layer, self.rank))


@fault(MERGE)
def parameterization_that_merges_half():
    class Module(Gated):
        @torch.no_grad()
        def merge(self):
            self.base.weight += 0.5 * (self.B * self.core) @ self.A
            return self.base

    return gates(Module)


@fault(DETACH)
def parameterization_that_leaves_a_hook():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            base.register_forward_hook(lambda module, args, y: y + ((args[0] @ self.A.t()) * self.core) @ self.B.t())

        def forward(self, x):
            return self.base(x)

        merge = property(doc="none")

    return gates(Module)


@fault(MASKED, CUT)
def parameterization_whose_core_is_no_gate():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            nn.init.zeros_(self.B)

        def forward(self, x):
            return self.base(x) + (x @ self.A.t() * (1 + self.core)) @ self.B.t()

        merge = property(doc="none")

    return gates(Module)


@fault(MASKED)
def parameterization_whose_core_cannot_come_back():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            nn.init.constant_(self.core, 0.1)
            nn.init.zeros_(self.B)

        def forward(self, x):
            return self.base(x) + ((x @ self.A.t()) * self.core.square()) @ self.B.t()

        merge = property(doc="none")

    return gates(Module)


@fault(CUT)
def parameterization_that_remembers_its_rank():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            self.rank = rank

        def forward(self, x):
            return self.base(x) + ((x @ self.A.t()).view(*x.shape[:-1], self.rank) * self.core) @ self.B.t()

    return gates(Module)


@fault(CUT)
def parameterization_scaled_by_its_rank():
    class Module(Gated):
        def forward(self, x):
            return self.base(x) + ((x @ self.A.t()) * self.core) @ self.B.t() * (8 / len(self.core))

        merge = property(doc="none")

    return gates(Module)


@pytest.mark.parametrize("name", fault.made)
def test_found_by_its_clause(name):
    """Each fault is found by the clauses that are meant, and by no other."""
    fault.check(name)


def test_every_clause_finds():
    """Each clause of a parameterization finds a fault, or is one that every kind has."""
    assert fault.missing() <= COMMON
