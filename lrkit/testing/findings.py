"""Say that a clause is broken: what was expected, and what came instead."""

from collections.abc import Iterator
from contextlib import contextmanager

import attrs


@attrs.frozen
class Finding:
    """One clause that a component does not keep.

    Args:
        clause: the clause's name, such as ``"score changes nothing"``.
        message: what was expected, and what came instead.
    """

    clause: str
    message: str


class Broken(AssertionError):
    """A clause is not kept."""


def expect(holds: object, message: str) -> None:
    """Break the clause, for this reason, if something does not hold."""
    if not holds:
        raise Broken(message)


def expect_one_line(error: BaseException, refused: str = "refused") -> None:
    """Break the clause if a refusal has more than one line."""
    expect("\n" not in str(error), f"{refused} in more than one line: {error}")


@contextmanager
def calling(name: str) -> Iterator[None]:
    """Turn every error of the block into a broken clause that names the call."""
    try:
        yield
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"{name} {raised(error)}") from error


def raised(error: BaseException) -> str:
    """Return an error in one line, for example ``raised ValueError: rank must be above 0``."""
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}"


def title(component: object) -> str:
    """Return a component in words."""
    return getattr(component, "__name__", None) or repr(component)
