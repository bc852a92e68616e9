"""A claim as a study file states it."""

from collections.abc import Sequence

import attrs

from lrkit.errors import LrkitError, nearest, shown
from lrkit.settings import real


@attrs.frozen(kw_only=True)
class Claim:
    """One row scores better than another. `lrkit.study.claims` has the rule for its verdict.

    Args:
        name: a short name, unique in the study.
        says: the claim in one sentence.
        source: whoever makes it, or denies it, and where.
        higher: label of the row that is said to score better: higher, or lower if that is better, as of a perplexity.
        lower: label of the other row.
        margin: the smallest advantage that would matter, in units of the primary score; None for the study's.
    """

    name: str
    says: str
    source: str
    higher: str
    lower: str
    margin: float | None = attrs.field(default=None, validator=attrs.validators.optional(real(0.0, above=True)))


def check_claims(claims: Sequence[Claim], rows: Sequence[str]) -> None:
    """Raise LrkitError if a claim names a row that is not there, or two have one name."""
    names = [claim.name for claim in claims]
    for claim in claims:
        if names.count(claim.name) > 1:
            raise LrkitError(f'two claims are called "{claim.name}"')
        for row in (claim.higher, claim.lower):
            if row not in rows:
                hint = f"{nearest(row, rows)}; there are {', '.join(map(shown, rows))}"
                raise LrkitError(f'claim "{claim.name}": there is no row "{row}"{hint}')
        if claim.higher == claim.lower:
            raise LrkitError(f'claim "{claim.name}" compares row "{claim.higher}" with itself')
