"""Writing a file so that a reader, or the next start, sees the old content or the new, whole."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(
    path: Path, data: bytes, *, mode: int = 0o640, durable: bool = True, owner: tuple[int, int] = (-1, -1)
) -> None:
    """Replace ``path`` by ``data``, which is on disk when this returns.

    ``owner`` is the user and the group that ``path`` has from then on; -1 for this process's own.

    A temporary file beside it is written, fsynced and renamed over it, and the folder is fsynced. Folders that are
    missing are made. What may be lost with the power need not be ``durable``: then nothing is fsynced. Raises
    ``OSError``, in which case ``path`` is as it was (unless it is the folder's own fsync that fails). Blocks: call it
    from a thread.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The folder is opened first: after the rename, that it cannot be would come too late.
    with _opened(path.parent) as folder:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                # In this order: between the two, no other group may read what is not for it. Where nothing is to
                # change, the call is not made: a sandboxed service may not, and is refused even that.
                if owner != (-1, -1):
                    os.fchown(file.fileno(), *owner)
                os.fchmod(file.fileno(), mode)
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105  # the same call by its system name
        except BaseException:  # whatever it was, nothing half written is left; it goes on its way
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
        if durable:
            os.fsync(folder)


def sync_folder(folder: Path) -> None:
    """Make a rename or removal in ``folder`` survive a power cut."""
    with _opened(folder) as descriptor:
        os.fsync(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that a killed writer of ``path`` left beside it."""
    remove_leftovers_of(path.parent, glob.escape(path.name))


def remove_leftovers_of(folder: Path, names: str) -> None:
    """The same for all files of ``folder`` whose names match a pattern, also those that were never made."""
    for leftover in folder.glob(f".{names}.*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
