"""The files that runtime settings name: they must be there, and inside the model folders.

A server sees nothing else.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from magi_agent.runtime_settings.settings import NO_PROJECTOR, Fault, RuntimeSettings


def file_faults(settings: RuntimeSettings, folders: Sequence[Path], *, as_reader: bool = True) -> tuple[Fault, ...]:
    """What is wrong with the files that ``settings`` name; looks at the disk.

    Unless ``as_reader`` is true, only where they are: who asks need not be able to see them.
    """
    roots = [os.path.realpath(folder) for folder in folders]
    return tuple(
        Fault(name, message)
        for name, path in _named(settings)
        if (message := _fault_of(path, roots, as_reader)) is not None
    )


def _named(settings: RuntimeSettings) -> Iterator[tuple[str, str]]:
    for name in ("draft_model", "chat_template_file", "projector"):
        path = getattr(settings, name)
        if path is not None and path != NO_PROJECTOR:
            yield name, path
    for adapter in settings.lora or ():
        yield "lora", adapter.path


def _fault_of(path: str, roots: Sequence[str], as_reader: bool) -> str | None:
    real = os.path.realpath(path)
    if not any(real == root or real.startswith(f"{root.rstrip('/')}/") for root in roots):
        return f"{path} lies outside the model folders ({', '.join(roots)}), and the server sees nothing else"
    if not as_reader:
        return None
    if not os.path.isfile(real):  # noqa: PTH113  # the string is what there is
        return f"{path}: there is no such file"
    if not os.access(real, os.R_OK):
        return f"{path} cannot be read"
    return None
