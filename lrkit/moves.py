"""Replace a file in one move: a reader finds the old file or the new one, and never a part of it. No torch here."""

import contextlib
import os
import shutil
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


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Give a draft folder beside a folder that is to be, and give it its name when the block ends.

    As `replacing`, but nothing is replaced: if another process has made the folder meanwhile, that one stays.

    Args:
        folder: the folder, in one that exists. The draft is called ``.NAME.RANDOM``; a killed process leaves it behind.
    """
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield draft
        draft.chmod(0o777 & ~umask())
        for path in draft.iterdir():
            path.chmod(0o666 & ~umask())  # some writers make files for their owner alone
            with path.open("rb") as file:
                os.fsync(file.fileno())
        try:
            os.rename(draft, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a file's lock: True while it is held, False if another living process holds it and `wait` is False.

    The lock ends with its process, however that ends. On a file system without locks everybody gets True.
    """
    import fcntl

    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # this file system has no locks
            pass
        yield True


def umask() -> int:
    """Read which permissions this process withholds from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
