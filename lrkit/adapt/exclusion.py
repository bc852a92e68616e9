"""Layers that are left out of those that `targets` chose, by the same grammar."""

from collections.abc import Sequence

from lrkit.adapt.grammar import entries
from lrkit.adapt.targets import together
from lrkit.errors import LrkitError, cut, listing, nearest, pattern
from lrkit.parameterizations.base import Target


def leave_out(targets: Sequence[Target], exclude: str | Sequence[str]) -> list[Target]:
    """Return the targets without those that `exclude` names, in their order. They know of each other as `together` has it.

    Args:
        targets: the layers that were chosen.
        exclude: a regular expression that must match a layer's whole name, or a list of names or name suffixes at a dot; an
            empty list for none.

    Raises:
        LrkitError: an entry matches no layer that was chosen (with the nearest name), or no layer is left.
    """
    names = [target.name for target in targets]
    out: set[str] = set()
    for entry, fits in entries(exclude, "exclude", "a regular expression or a list of names"):
        found = set(filter(fits, names))
        if not found:
            whole = isinstance(exclude, str)
            endings = () if whole else {name.rpartition(".")[2] for name in names} | set(names)
            raise LrkitError(
                f'exclude: "{cut(entry, 160)}" matches none of the {len(names)} layers that targets chose'
                f"{' (a regular expression must match the whole name)' if whole else nearest(entry, endings)}; "
                f"they are {listing(list(dict.fromkeys(map(pattern, names))))}"
            )
        out |= found
    if not out:
        return list(targets)
    if len(out) == len(names):
        raise LrkitError(f"exclude leaves out all {len(names)} layers that targets chose: nothing is left to adapt")
    return together(target for target in targets if target.name not in out)
