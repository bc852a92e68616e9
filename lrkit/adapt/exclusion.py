"""Layers that are left out of those that `targets` chose, by the same grammar."""

from collections.abc import Sequence

from lrkit.adapt.targets import together
from lrkit.errors import LrkitError, cut, listing, nearest, pattern, shown
from lrkit.parameterizations.base import Target
from lrkit.patterns import compiled


def leave_out(targets: Sequence[Target], exclude: str | Sequence[str]) -> list[Target]:
    """Return the targets without those that `exclude` names, in their order. They know of each other as `together` has it.

    Args:
        targets: the layers that were chosen.
        exclude: a regular expression that must match a layer's whole name, or a list of names or name suffixes at a dot; an
            empty list for none.

    Raises:
        LrkitError: an entry matches no layer that was chosen (with the nearest name), or no layer is left.
    """
    if not isinstance(exclude, str) and not (
        isinstance(exclude, Sequence) and all(isinstance(entry, str) for entry in exclude)
    ):
        raise LrkitError(f"exclude must be a regular expression or a list of names, not {shown(exclude)}")
    names = [target.name for target in targets]
    out: set[str] = set()
    if isinstance(exclude, str):
        regex = compiled(exclude, "exclude")
        out = {name for name in names if regex.fullmatch(name)}
        if not out:
            raise LrkitError(
                f'exclude="{cut(exclude, 160)}" matches none of the {len(names)} layers that targets chose (a regular '
                f"expression must match the whole name); they are {_kinds(names)}"
            )
    else:
        for entry in exclude:
            found = {name for name in names if name == entry or name.endswith(f".{entry}")}
            if not found:
                endings = {name.rpartition(".")[2] for name in names} | set(names)
                raise LrkitError(
                    f'exclude: "{cut(entry, 160)}" matches none of the {len(names)} layers that targets chose'
                    f"{nearest(entry, endings)}; they are {_kinds(names)}"
                )
            out |= found
    if not out:
        return list(targets)
    if len(out) == len(names):
        raise LrkitError(f"exclude leaves out all {len(names)} layers that targets chose: nothing is left to adapt")
    return together(target for target in targets if target.name not in out)


def _kinds(names: Sequence[str]) -> str:
    return listing(list(dict.fromkeys(map(pattern, names))))
