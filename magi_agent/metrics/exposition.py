"""The two text forms that Prometheus reads, and which of them a caller is given.

OpenMetrics 1.0: https://github.com/prometheus/OpenMetrics/blob/v1.0.0/specification/OpenMetrics.md; the older one:
https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

_OPEN_METRICS: Final[Callable[..., bytes]] = generate_openmetrics


class Form(StrEnum):
    """A text form, by its ``Content-Type``."""

    OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    TEXT = "text/plain; version=0.0.4; charset=utf-8"

    @property
    def media_type(self) -> str:
        """The type without its parameters."""
        return self.partition(";")[0]


def form_of(accept: str) -> Form:
    """The form for a caller who sends this ``Accept``: OpenMetrics, unless only the older one is asked for."""
    asked = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    if Form.TEXT.media_type in asked and Form.OPEN_METRICS.media_type not in asked:
        return Form.TEXT
    return Form.OPEN_METRICS


class _Families:
    """A collector of what was collected already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        """Nothing, for the registry has no other collector to tell it from."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The families."""
        return self._families


def rendered(families: Sequence[Metric], form: Form) -> bytes:
    """The families as text; takes some milliseconds for a thousand samples."""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    if form is Form.TEXT:
        return generate_latest(registry)
    # Names are valid already; escaped, llama-server's would lose their colon.
    return _OPEN_METRICS(registry, escaping=ALLOWUTF8)
