"""Optimizers that move weights beside their step: those that train an average, and those that wrap another."""

from torch.optim import Optimizer


def averaging(optimizer: Optimizer) -> str | None:
    """Say so if an optimizer swaps the weights for an average of them, in which no mask holds; None if it does not.

    Those that need no schedule (arXiv 2405.15682) do: their ``eval`` puts the average in, and their ``train`` takes it out.
    """
    if not all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
        return None
    return (
        f"{type(optimizer).__name__} keeps a second copy of the weights, which its eval() puts in, and components that are "
        "masked would be back in it: take another optimizer, or an action that freezes"
    )


def wrapping(given: object) -> str | None:
    """Say so if one of the optimizers that `bind` is given wraps another and has a state of its own; None if none does.

    For example Lookahead moves the weights once more after the step of the optimizer in it. One of accelerate's shows the
    state of the one in it.
    """
    for each in given if isinstance(given, list | tuple) else [given]:
        inner = getattr(each, "optimizer", None)
        own = getattr(each, "state", None)
        if isinstance(inner, Optimizer) and own is not None and own is not inner.state:
            return (
                f"{type(each).__name__} has a state of its own around {type(inner).__name__}, after whose step "
                "decisions are taken: if it moves the weights once more, components that are masked come back. Bind an "
                "optimizer that takes its step whole"
            )
    return None
