"""Replace a file in one move: a reader finds the old file or the new one, and never a part of it. No torch here."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a draft beside a file, and put it in the file's place when the block ends.

    The draft is on the disk before it takes the file's name, and has the permissions of any new file. If the block
    raises, the draft is deleted and the old file stays.

    >>> with replacing(path) as draft:
    ...     draft.write_bytes(content)

    Args:
        path: the file, in a folder that exists. The draft is called ``.NAME.RANDOM``; a killed process leaves it behind.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        os.chmod(draft, 0o666 & ~umask())  # mkstemp makes files for their owner alone
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def umask() -> int:
    """Read which permissions this process withholds from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
