"""Figures that a llama-server tells of itself, once they are read and found sane."""

from dataclasses import dataclass
from typing import Final

MODEL: Final = "model"
"""The label that says whose figure it is; a server's own label of this name gives way to it."""


class UnreadableAnswer(ValueError):
    """The answer is not what Prometheus's text form is, or more than any llama-server says."""


@dataclass(frozen=True, slots=True)
class ServerSample:
    """One figure of a server."""

    name: str
    kind: str
    """``counter``, ``gauge`` or ``unknown``."""
    text: str
    """What the server says it is."""
    labels: tuple[tuple[str, str], ...]
    """Without the model's."""
    value: float
