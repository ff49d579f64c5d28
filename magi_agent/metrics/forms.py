"""The two text forms that Prometheus reads, and which of them a caller is given.

OpenMetrics 1.0: https://github.com/prometheus/OpenMetrics/blob/v1.0.0/specification/OpenMetrics.md; the older one:
https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format.
"""

from enum import StrEnum


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
