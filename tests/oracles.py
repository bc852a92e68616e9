"""Slow float64 oracles for AdaLoRA (arXiv 2303.10512) and AFLoRA (arXiv 2403.13269).

Written from the papers' formulas alone, with numpy and plain loops; nothing here imports or follows lrkit.
Weights and gradients come in with the rank component first: Q as it is [r, d_in], P transposed [r, d_out], λ [r].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# ---------------------------------------------------------------- schedules


def budget(t: int, *, total: int, warmup: int, final: int, b0: float, bT: float) -> int:
    """AdaLoRA's b(t), cubic, truncated: b0 before t_i, bT from T - t_f on (paper's Eq. 14, its misprint put right)."""
    if t >= total - final:
        return int(bT)
    if t < warmup:
        return int(b0)
    return int(bT + (b0 - bT) * (1 - (t - warmup) / (total - warmup - final)) ** 3)


def budget_exact(t: int, *, total: int, warmup: int, final: int, b0: int, bT: int, power: int = 3) -> Fraction:
    """The same in rational arithmetic, before truncation, for any power of the decay (1: linear, 3: cubic)."""
    if t >= total - final:
        return Fraction(bT)
    if t < warmup:
        return Fraction(b0)
    return bT + (b0 - bT) * (1 - Fraction(t - warmup, total - warmup - final)) ** power


def freezing_fraction(t: int, *, total: int, warmup: int, final: int) -> float:
    """AFLoRA's r(t): the share of the projection matrices that is frozen."""
    if t >= total - final:
        return 1.0
    if t < warmup:
        return 0.0
    return 1 - (1 - (t - warmup) / (total - warmup - final)) ** 3


def is_due(t: int, *, total: int, warmup: int, final: int, interval: int, ending: str = "fixed") -> bool:
    """Whether units are chosen after step t: past the warm-up on multiples of ΔT, and in any case at T - t_f.

    The released code chooses at T - t_f only where ΔT divides it, and then after every step, by scores that do not move
    any more: one choice at T - t_f + 1 that holds is the same. "open" never stops choosing; "every-step" (LoSparse's
    released code) chooses at T - t_f only where ΔT divides it, and then after every step.
    """
    end = total - final
    regular = t > warmup and t % interval == 0
    if ending == "released":
        return (t <= end and regular) or t == end + 1
    if ending == "open":
        return t in (end, total) or regular
    if ending == "every-step":
        return t > end or regular or t == total
    return t == end or (t < end and regular)


def is_measured(t: int, *, total: int, final: int, ending: str = "fixed") -> bool:
    """Whether the statistics move at step t: up to T - t_f; in the released code and PEFT to the step before."""
    return ending in ("open", "every-step") or t < total - final or (t == total - final and ending == "fixed")


# ---------------------------------------------------------------- entry-wise scores

KINDS = ("sensitivity", "sensitivity-smoothed", "sensitivity-uncertainty", "gradient-uncertainty", "ratio-uncertainty")


def importance(kind: str, w: Array, g: Array, epsilon: float = 0.0) -> Array:
    """I(w): what a metric measures at one step, each entry."""
    out = np.empty(w.shape)
    for index in np.ndindex(*w.shape):
        if kind.startswith("sensitivity"):
            out[index] = abs(float(w[index]) * float(g[index]))
        elif kind == "gradient-uncertainty":
            out[index] = abs(float(g[index]))
        elif kind == "ratio-uncertainty":
            out[index] = abs(float(g[index])) / (abs(float(w[index])) + epsilon)
        else:
            raise KeyError(kind)
    return out


class Statistics:
    """I, Ī and Ū of one tensor. From zero, no bias correction; Ū uses the Ī that was just updated."""

    def __init__(
        self, kind: str, shape: tuple[int, ...], beta1: float = 0.85, beta2: float = 0.85, epsilon: float = 0.0
    ):
        self.kind, self.beta1, self.beta2, self.epsilon = kind, beta1, beta2, epsilon
        self.last, self.mean, self.uncertainty = np.zeros(shape), np.zeros(shape), np.zeros(shape)

    def observe(self, w: Array, g: Array) -> None:
        now = importance(self.kind, np.asarray(w, np.float64), np.asarray(g, np.float64), self.epsilon)
        for index in np.ndindex(*now.shape):
            mean = self.beta1 * self.mean[index] + (1 - self.beta1) * now[index]
            self.uncertainty[index] = self.beta2 * self.uncertainty[index] + (1 - self.beta2) * abs(now[index] - mean)
            self.mean[index] = mean
        self.last = now

    def score(self) -> Array:
        if self.kind == "sensitivity":
            return self.last
        if self.kind == "sensitivity-smoothed":
            return self.mean
        return self.mean * self.uncertainty


# ---------------------------------------------------------------- unit scores and their choice


def triplet_scores(parts: Sequence[Array]) -> list[float]:
    """S_i: the sum over parts of the mean over component i's slice. parts: λ [r], Pᵀ [r, d_out], Q [r, d_in]."""
    scores = []
    for i in range(len(parts[0])):
        score = 0.0
        for part in parts:
            entries = [float(x) for x in np.ravel(part[i])]
            score += sum(entries) / len(entries)
        scores.append(score)
    return scores


def matrix_score(matrix: Array) -> float:
    """mean(s) over a whole matrix."""
    entries = [float(x) for x in np.ravel(matrix)]
    return sum(entries) / len(entries)


def keep_top(scores: Sequence[float], count: int) -> list[bool]:
    """Exactly `count` units kept, the highest; among equals the lower index is kept first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = set(order[:count])
    return [i in kept for i in range(len(scores))]


def choices_agree(kept: Sequence[bool], scores: Sequence[float], count: int, tolerance: float = 2e-5) -> bool:
    """Whether `kept` is keep_top's choice, up to pairs that single precision cannot tell apart (never exact ties)."""
    want = keep_top(scores, count)
    if list(kept) == want:
        return True
    if sum(kept) != count:
        return False
    wrongly_in = [scores[i] for i in range(len(scores)) if kept[i] and not want[i]]
    wrongly_out = [scores[i] for i in range(len(scores)) if want[i] and not kept[i]]
    return all(0 < b - a <= tolerance * b for a in wrongly_in for b in wrongly_out)


# ---------------------------------------------------------------- orthogonality


def gram_error(factor: Array) -> Array:
    """F Fᵀ - I for F [r, d], its rows to be orthonormal."""
    factor = np.asarray(factor, np.float64)
    r, d = factor.shape
    out = np.zeros((r, r))
    for i in range(r):
        for j in range(r):
            out[i, j] = sum(float(factor[i, k]) * float(factor[j, k]) for k in range(d)) - (1.0 if i == j else 0.0)
    return out


def orthogonality_squared(factors: Sequence[Array]) -> float:
    """Eq. 4 without γ: the sum over matrices of the squared Frobenius norm of the Gram error."""
    return sum(float((gram_error(f) ** 2).sum()) for f in factors)


def orthogonality_mean(factors: Sequence[Array]) -> float:
    """The released code's: the mean over matrices of the un-squared norm."""
    return sum(float((gram_error(f) ** 2).sum()) ** 0.5 for f in factors) / len(factors)


def orthogonality_squared_gradient(factors: Sequence[Array]) -> list[Array]:
    """d/dF ‖F Fᵀ - I‖² = 4 (F Fᵀ - I) F."""
    return [4 * gram_error(f) @ np.asarray(f, np.float64) for f in factors]


def orthogonality_mean_gradient(factors: Sequence[Array]) -> list[Array]:
    """d/dF ‖F Fᵀ - I‖ / n = 2 (F Fᵀ - I) F / (n ‖F Fᵀ - I‖)."""
    out = []
    for f in factors:
        error = gram_error(f)
        out.append(2 * error @ np.asarray(f, np.float64) / (np.sqrt((error**2).sum()) * len(factors)))
    return out


# ---------------------------------------------------------------- whole runs

Observed = Sequence[Mapping[str, tuple[Array, Array]]]  # for each module: part name -> (weight, gradient)


class AdaLoRARun:
    """Algorithm 1 over recorded weights and gradients, one call a step, t = 1 .. T.

    `ranks`: the initial rank of each module. bT is the target rank times the number of modules.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        target_rank: int,
        *,
        total: int,
        warmup: int,
        final: int,
        interval: int,
        kind: str = "sensitivity-uncertainty",
        beta1: float = 0.85,
        beta2: float = 0.85,
        ending: str = "fixed",
    ):
        self.ending = ending
        self.ranks, self.kind, self.betas = list(ranks), kind, (beta1, beta2)
        self.when = {"total": total, "warmup": warmup, "final": final}
        self.interval = interval
        self.b0, self.bT = sum(ranks), target_rank * len(ranks)
        self.statistics: dict[tuple[int, str], Statistics] = {}
        self.cores: list[Array] = []
        self.t = 0

    def scores(self) -> list[float]:
        """Every unit's score after the steps so far."""
        flat: list[float] = []
        for m in range(len(self.ranks)):
            if self.kind == "magnitude":
                flat += [abs(float(x)) for x in self.cores[m]]
            else:
                # every part that ever had a gradient: one that has none any more keeps its last score
                flat += triplet_scores([s.score() for (of, _), s in self.statistics.items() if of == m])
        return flat

    def step(self, observed: Observed) -> tuple[int, list[float]] | None:
        """Takes one step's weights and gradients; when a choice is due, the budget and every unit's score."""
        self.t += 1
        self.cores = [module["core"][0] for module in observed]
        measured = is_measured(self.t, total=self.when["total"], final=self.when["final"], ending=self.ending)
        for m, module in enumerate(observed if measured else ()):
            for part, (w, g) in module.items():
                key = (m, part)
                if key not in self.statistics:
                    kind = "sensitivity" if self.kind == "magnitude" else self.kind
                    self.statistics[key] = Statistics(kind, np.shape(w), *self.betas)
                self.statistics[key].observe(w, g)
        if not is_due(self.t, **self.when, interval=self.interval, ending=self.ending):
            return None
        return budget(self.t, **self.when, b0=self.b0, bT=self.bT), self.scores()


class AFLoRARun:
    """AFLoRA's freezing over recorded gradients: the lowest r(t) of all projection matrices, each for good.

    One call a step with {matrix name: gradient}; frozen matrices may be absent. `groups` names what freezes as one
    (default: each matrix by itself); a group's score is the mean of its matrices' scores.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        total: int,
        warmup: int,
        final: int,
        interval: int = 1,
        groups: Mapping[str, Sequence[str]] | None = None,
        beta1: float = 0.85,
        beta2: float = 0.95,
    ):
        self.groups = dict(groups) if groups is not None else {name: [name] for name in shapes}
        self.when = {"total": total, "warmup": warmup, "final": final}
        self.interval = interval
        self.statistics = {n: Statistics("gradient-uncertainty", s, beta1, beta2) for n, s in shapes.items()}
        self.frozen_at: dict[str, int] = {}
        self.t = 0

    def step(self, gradients: Mapping[str, Array]) -> None:
        self.t += 1
        for name, g in gradients.items():
            self.statistics[name].observe(np.zeros(np.shape(g)), g)
        if not is_due(self.t, **self.when, interval=self.interval):
            return
        total = len(self.groups)
        kept = budget(self.t, **self.when, b0=total, bT=0)  # total * (1 - r(t)), truncated
        active = [group for group in self.groups if group not in self.frozen_at]
        scores = [
            sum(matrix_score(self.statistics[n].score()) for n in self.groups[group]) / len(self.groups[group])
            for group in active
        ]
        for group, keep in zip(active, keep_top(scores, min(kept, len(active))), strict=True):
            if not keep:
                self.frozen_at[group] = self.t


class ReleasedAFLoRARun:
    """The released AFLoRA's freezing over recorded gradients, one call a step, the first step number 0.

    I is the mean of abs(grad) over the window of ΔT steps that went before, and Ī and Ū move when a window is full. A
    matrix freezes when its mean is under the element-wise quantile over the matrices that still train. `groups` names
    what freezes as one, by the average of the matrices' means.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        total: int,
        warmup: int,
        final: int,
        window: int,
        groups: Mapping[str, Sequence[str]],
        beta1: float = 0.85,
        beta2: float = 0.95,
    ):
        self.groups = {group: list(names) for group, names in groups.items()}
        self.when = {"total": total, "warmup": warmup, "final": final}
        self.size = window
        self.statistics = {n: Statistics("gradient-uncertainty", s, beta1, beta2) for n, s in shapes.items()}
        self.windows: dict[str, list[Array]] = {name: [] for name in shapes}
        self.frozen_at: dict[str, int] = {}
        self.t = -1

    def step(self, gradients: Mapping[str, Array]) -> None:
        self.t += 1
        for name, g in gradients.items():
            if len(self.windows[name]) == self.size:
                mean = sum(abs(seen) for seen in self.windows[name]) / self.size
                self.statistics[name].observe(np.zeros(np.shape(g)), np.asarray(mean))
                self.windows[name] = []
            self.windows[name].append(np.asarray(g, np.float64))
        if not is_due(self.t, **self.when, interval=self.size, ending="released"):
            return
        active = [group for group in self.groups if group not in self.frozen_at]
        entries = sorted(
            float(x) for group in active for n in self.groups[group] for x in np.ravel(self.statistics[n].score())
        )
        low = int(len(entries) * freezing_fraction(self.t, **self.when))
        if low == 0:
            return
        for group in active:
            means = [matrix_score(self.statistics[n].score()) for n in self.groups[group]]
            if sum(means) / len(means) < entries[low - 1]:
                self.frozen_at[group] = self.t
