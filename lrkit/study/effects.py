"""Effect sizes of paired differences: how large, in standard deviations of the differences. No torch here.

d = mean / standard deviation of the n differences (Cohen's d_z). Of few pairs it is too large on average: d √n follows a
noncentral t with n - 1 degrees of freedom and noncentrality δ √n, whose mean is δ √n / J, so J d has no bias (Hedges, 1981,
"Distribution Theory for Glass's Estimator of Effect Size and Related Estimators", Eq. 6e). With six pairs J is 0.84.

The interval holds every δ at which a d as large, or as small, as the one seen has a probability of 2.5 % or more. It
assumes that the differences are normal, which the sign-flip test does not: it tells how large an effect may be, and is not
a second test.
"""

import math
import statistics
from collections.abc import Sequence

_FAR = 200.0
"""From this noncentrality on, the chi distribution gives the interval to within a per cent or so."""


def effect_size(differences: Sequence[float]) -> float | None:
    """Return the mean difference over the differences' standard deviation; None for one difference, or if all are equal."""
    if len(differences) < 2:
        return None
    spread = statistics.stdev(differences)
    # equal but for the last bits, as differences of rounded scores are
    return statistics.fmean(differences) / spread if spread > 1e-9 * max(map(abs, differences)) else None


def correction(pairs: int) -> float:
    """Return Hedges' J, which takes the bias out of an effect size of so many pairs, at least three.

    J = Γ(ν/2) / (√(ν/2) Γ((ν - 1)/2)) with ν = pairs - 1.
    """
    half = (pairs - 1) / 2
    return math.exp(math.lgamma(half) - math.lgamma(half - 0.5)) / math.sqrt(half)


def corrected(differences: Sequence[float]) -> float | None:
    """Return the effect size without its small-sample bias, J d; None where d is, and for two differences."""
    effect = effect_size(differences)
    return None if effect is None or len(differences) < 3 else correction(len(differences)) * effect


def effect_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Compute the 95 % interval of the effect size, by the noncentral t distribution.

    Args:
        differences: paired differences [n], finite.

    Returns:
        (low, high), in standard deviations; None for fewer than three differences, or if all are equal.
    """
    effect = effect_size(differences)
    if effect is None or len(differences) < 3:
        return None
    from scipy.special import chdtri, nctdtrinc

    root = math.sqrt(len(differences))
    if abs(effect) * root > _FAR:
        # So far out the quantiles of noncentral t are those of the standard deviation alone, and cannot be computed.
        free = len(differences) - 1
        ends = [abs(effect) * math.sqrt(float(chdtri(free, p)) / free) for p in (0.975, 0.025)]
        return (ends[0], ends[1]) if effect >= 0 else (-ends[1], -ends[0])
    ends = [float(nctdtrinc(len(differences) - 1, p, abs(effect) * root)) / root for p in (0.975, 0.025)]
    if not all(map(math.isfinite, ends)):
        return None
    low, high = ends
    return (low, high) if effect >= 0 else (-high, -low)
