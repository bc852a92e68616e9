"""EVA: A begins with the directions in which a layer's inputs vary most, and layers get ranks by how much these explain."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

import lrkit
from lrkit.metrics import Layer, LayerMetric, Seen
from lrkit.parameterizations import Target
from lrkit.parameterizations.adapter import started
from lrkit.ranks import Rank, as_ranks, divisor
from lrkit.settings import real
from lrkit_calibrated.allocation import Allocate
from lrkit_calibrated.lora import AllocatedLoRA

_SEED, _ITERATIONS = 42, 4
"""The seed and the iterations of PEFT's randomized SVD."""


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return a matrix's largest singular values and their right vectors, by a randomized SVD (Halko et al., 0909.4061).

    The steps are those of ``torch.svd_lowrank(matrix, 2 * count, niter=4)``; the random numbers come from a seed of its own,
    the same on every device.

    Args:
        matrix: [n, d].
        count: k; of a smaller matrix there are min(n, d).

    Returns:
        S [k] and V [k, d], each row of it with its largest entry above zero.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    a = (matrix if tall else matrix.t()).float()  # half the time of float64, of which only the draws are
    width = min(2 * count, *matrix.shape)
    seed = torch.Generator().manual_seed(_SEED)
    q, _ = torch.linalg.qr(a @ torch.randn(a.shape[1], width, dtype=matrix.dtype, generator=seed).to(a))
    for _ in range(_ITERATIONS):
        q, _ = torch.linalg.qr(a.t() @ q)
        q, _ = torch.linalg.qr(a @ q)
    u, s, vt = torch.linalg.svd(q.t() @ a, full_matrices=False)
    rows = (vt if tall else (q @ u).t())[:count]
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return s[:count], rows * largest.sign()


@attrs.frozen(kw_only=True)
class ExplainedVariance(LayerMetric):
    """The share of a layer's input variance that lies along the i-th principal direction, for its i-th component.

    Source: EVA, arXiv 2410.07170, section 3.2 and Algorithm 1; PEFT 0.21.2, ``tuners/lora/eva.py`` and
    ``utils/incremental_pca.py``. An incremental PCA (Ross et al., 2008): what is known of k directions and a batch of rows
    become one matrix, whose SVD gives the k directions anew. Kept per layer: k x d_in and k numbers, the mean [d_in], the
    number of rows and their scatter. No d_out x d_in.

    A batch with fewer rows than k is left out, as in PEFT. Several processes each take in their own rows, and their k
    directions are put together as two batches would be.

    Args:
        labelled: whether tokens without a label (-100) are left out (PEFT's ``use_label_mask``). Padding always is.
    """

    reads: ClassVar[Literal["inputs", "gradient"]] = "inputs"

    labelled: bool = True

    def begin(self, layer: Layer) -> dict[str, Tensor]:
        """Return k = min(units, d_in) directions and their singular values, zero at first; mean, number and scatter."""
        count = min(layer.units, layer.d_in)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=layer.device)

        return {
            "directions": zeros(count, layer.d_in),
            "values": zeros(count),
            "mean": zeros(layer.d_in),
            "rows": zeros(),
            "scatter": zeros(),
        }

    def observe(self, seen: Seen, state: Mapping[str, Tensor]) -> None:
        """Take in a batch of rows."""
        x = seen.x if seen.labelled is None or not self.labelled else seen.x[seen.labelled]
        if len(x) < len(state["values"]) or not len(x):
            return
        mean = x.mean(dim=0, dtype=torch.float64)
        # The random numbers are PEFT's: float32 for the first batch, and float64 for those that are joined to it.
        centre = x.mean(dim=0) if state["rows"] else mean
        batch, scatter = (x - centre).to(x.dtype), (x - mean).square().sum()
        for name, values in _joined(state, batch, centre, mean, len(x), scatter).items():
            state[name].copy_(values)

    def score(self, layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
        """Return S² over the scatter, [units]; zero for a component beyond d_in, and without rows."""
        ratio = state["values"].square() / torch.where(state["scatter"] > 0, state["scatter"], 1.0)
        return torch.nn.functional.pad(ratio.float(), (0, layer.units - len(ratio)))

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Put the directions of several together, one after the other."""
        merged = dict(states[0])
        for state in states[1:]:
            if state["rows"]:
                batch = state["values"][:, None] * state["directions"]
                merged = _joined(merged, batch, state["mean"], state["mean"], float(state["rows"]), state["scatter"])
        return merged


def _joined(
    state: Mapping[str, Tensor], batch: Tensor, centre: Tensor, mean: Tensor, rows: float, scatter: Tensor
) -> dict[str, Tensor]:
    """Return a state with a batch taken in.

    Args:
        state: what is known so far.
        batch: the batch without its mean [n, d_in], or as many rows with the same Gram matrix as matter.
        centre: the mean that was taken from it [d_in].
        mean: the batch's mean [d_in].
        rows: how many rows it has.
        scatter: the sum of its squares.
    """
    count, before = len(state["values"]), float(state["rows"])
    if before:
        # The means differ: one row more, as two heaps of rows have it.
        apart = (before * rows / (before + rows)) ** 0.5 * (state["mean"] - centre)
        batch = torch.vstack((state["values"][:, None] * state["directions"], batch.double(), apart))
        scatter = state["scatter"] + scatter + before * rows / (before + rows) * (state["mean"] - mean).square().sum()
        mean = (before * state["mean"] + rows * mean) / (before + rows)
    values, directions = leading(batch, count)
    short = count - len(values)
    return {
        "directions": torch.nn.functional.pad(directions.double(), (0, 0, 0, short)),
        "values": torch.nn.functional.pad(values.double(), (0, short)),
        "mean": mean,
        "rows": torch.full_like(state["rows"], before + rows),
        "scatter": scatter,
    }


@attrs.frozen(kw_only=True)
class EvaLoRA(AllocatedLoRA):
    """LoRA whose A begins with the principal directions of the layer's inputs, and B with zero.

    Source: EVA, arXiv 2410.07170, section 3.2. At first every layer has `rho` times the rank, as candidates: `Allocate`
    gives it as many components as are among the best of all.

    Args:
        rho: ρ: a layer is given at most ρ times its rank.
        whiten: whether each direction is divided by the root of its singular value (PEFT's ``whiten``).
        scale_of: ``"first-rank"``: α/r of the setting `rank` in all layers, PEFT's ``adjust_scaling_factors``.
            ``"new-rank"``: of the rank that the layer is given.
    """

    rho: float = attrs.field(default=2.0, validator=real(1.0))
    whiten: bool = False
    scale_of: Literal["new-rank", "first-rank"] = attrs.field(
        default="first-rank", validator=attrs.fields(AllocatedLoRA).scale_of.validator
    )

    def __attrs_post_init__(self) -> None:
        """Refuse ranks of a table that ρ makes no whole numbers of: a share of the candidates is the budget then."""
        super().__attrs_post_init__()
        ranks = () if isinstance(self.rank, int) else self.rank.values()
        if odd := [rank for rank in ranks if not float(rank * self.rho).is_integer()]:
            raise lrkit.LrkitError(
                f"{type(self).__name__}: rho {self.rho:g} times a table's rank {odd[0]} is no whole number of candidates, "
                "and the ranks' sum would not be the table's: take rho = 2"
            )

    @property
    def components(self) -> Rank:
        """Return ρ r."""
        if isinstance(self.rank, int):
            return round(self.rank * self.rho)
        return as_ranks({layer: round(rank * self.rho) for layer, rank in self.rank.items()})

    def build(self, target: Target) -> nn.Module:
        """Return the layer with ρ r candidates beside it, and the scale of r."""
        made = super(EvaLoRA, attrs.evolve(self, rank=self.components, rho=1.0)).build(target)
        if self.scale_of == "first-rank":
            adapter: Any = made
            adapter.scaling = self.alpha / divisor(target.scale_rank(self.rank, self.scale_by), self.scale)
        return made

    def fresh(
        self, module: nn.Module, count: int, generator: torch.Generator, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the first `count` directions as rows of A, and zeros for B. Without directions, as LoRA draws them."""
        drawn = super().fresh(module, count, generator, memory)
        if "directions" not in memory:
            return drawn
        if not memory["rows"]:
            warnings.warn(
                f"EVA: no batch had as many rows as a layer has candidates ({len(memory['values'])}), so that A begins at "
                "random and the ranks say nothing: calibrate by larger batches",
                lrkit.LrkitWarning,
                stacklevel=2,
            )
            return drawn
        found = int(
            (memory["values"][:count] > 0).sum()
        )  # fewer if the rows span less: then the others begin at random
        directions = memory["directions"][:found]
        if self.whiten:
            directions = directions / memory["values"][:found, None].clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        a, _ = self.parts
        drawn[a.name][: len(directions)] = started(module, a, directions.to(drawn[a.name]))
        return drawn


def eva(
    *,
    rank: Rank = 8,
    rho: float = 2.0,
    alpha: float = 16.0,
    dropout: float = 0.0,
    calibration: int = 8,
    whiten: bool = False,
    scale_of: Literal["new-rank", "first-rank"] = "first-rank",
    labelled: bool = True,
) -> lrkit.Method:
    """EVA (Paischer et al., arXiv 2410.07170): LoRA that begins along the principal directions of each layer's inputs.

    A few batches go through the model before it trains. Of all layers' directions those that explain the largest shares
    of their layers' variance are kept, `rank` per layer on average (Algorithm 1). A begins with them, B with zero.

    Known: ranks and directions, up to the sign, are those of PEFT 0.21.2 from the same batches, with padding and with tokens
    that have no label; the ranks' sum is r per layer; a resumed run is the run. What differs from PEFT:

    - All batches that are given count. PEFT stops a layer once its directions turn by less than τ from one batch to the next
      (cosine 0.99), and goes through the data again until all layers have stopped.
    - Layers that share an input each have their own SVD; PEFT computes one for all of them, of equal numbers. If the budget
      ends between their equal shares, the earlier layer has the component; in PEFT by a sort that is not stable.
    - PEFT's ``whiten`` divides in place, and so twice or three times where layers share an input; here it is once.
    - Of several processes each keeps k directions of its own rows, and these are joined; PEFT gathers all rows.

    Not known: the paper's scores, which have not been run here.

    Args:
        rank: r, a layer's rank on average.
        rho: ρ: a layer is given at most ρ r.
        alpha: α of the scale α/r.
        dropout: of the adapter's input.
        calibration: batches before the first step.
        whiten: whether directions are divided by the root of their singular values.
        scale_of: the r of the scale, ``"first-rank"`` or ``"new-rank"``.
        labelled: whether tokens without a label are left out.
    """
    return lrkit.Method(
        parameterization=EvaLoRA(rank=rank, rho=rho, alpha=alpha, dropout=dropout, whiten=whiten, scale_of=scale_of),
        metric=ExplainedVariance(labelled=labelled),
        scheduler=lrkit.schedulers.Once(
            target=rank if isinstance(rank, int) else min(1.0, 1 / rho), calibration=calibration
        ),
        action=Allocate(),
    )


METHODS: Mapping[str, Callable[..., lrkit.Method]] = {"eva": eva}
