"""What is used of Prometheus's library for Python: families of metrics, and what writes and reads them.

Its other half serves and sends metrics itself, by HTTP and TLS; the package as a whole cannot be imported without
OpenSSL, which the agent leaves out. This is imported by the first scrape, in a thread: where nobody scrapes, nobody
pays for it.
"""

from magi_agent.parts_of_packages import only_parts_of

only_parts_of("prometheus_client")

from prometheus_client.metrics_core import (  # noqa: E402  # only_parts_of comes first
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.openmetrics.exposition import ALLOWUTF8, generate_latest  # noqa: E402  # likewise
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402  # likewise
from prometheus_client.process_collector import ProcessCollector  # noqa: E402  # likewise
from prometheus_client.utils import floatToGoString  # noqa: E402  # likewise

__all__ = [
    "ALLOWUTF8",
    "CounterMetricFamily",
    "GaugeMetricFamily",
    "HistogramMetricFamily",
    "InfoMetricFamily",
    "Metric",
    "ProcessCollector",
    "SummaryMetricFamily",
    "floatToGoString",
    "generate_latest",
    "text_string_to_metric_families",
]
