"""What Prometheus is told to scrape of this agent: each ready model by itself.

The form is that of its HTTP service discovery (https://prometheus.io/docs/prometheus/latest/http_sd/). Labels that
begin with ``__`` are gone after relabelling: ``__meta_magi_`` is for what an operator may pick labels from.
"""

from collections.abc import Iterator
from typing import Final

from pydantic import Field

from magi_agent.api.forwarding import Place
from magi_agent.api.representations import readable
from magi_agent.api.schemas import Answer
from magi_agent.metrics.server_samples import MODEL
from magi_agent.registry.model import Model
from magi_agent.vocabulary import StartPolicy

MODEL_METRICS: Final = "/metrics/models/"
"""Where the metrics of each model's server are, by the model's id."""


class ScrapeTargets(Answer):
    """One model, as Prometheus is to scrape it."""

    targets: list[str] = Field(description="the one address by which this list was asked for")
    labels: dict[str, str] = Field(description="`model`, where its metrics are, and `__meta_magi_…` of what it is")


def scrape_targets(model: Model, start_policy: StartPolicy, host: str, place: Place) -> ScrapeTargets:
    """One ready model at ``host``, which is where its caller sees this API, as ``place`` says it."""
    labels = {MODEL: model.model_id, "__metrics_path__": f"{place.prefix}{MODEL_METRICS}{model.model_id}"}
    if place.is_secure:
        labels["__scheme__"] = "https"
    labels |= {f"__meta_magi_{name}": readable(value) for name, value in _facts(model, start_policy)}
    return ScrapeTargets(targets=[host], labels=labels)


def _facts(model: Model, start_policy: StartPolicy) -> Iterator[tuple[str, str]]:
    """What is known of a model, by the end of its label's name."""
    yield "tier", model.effective_tier
    yield "family", model.facts.family
    yield "quantization", model.facts.quantization
    if model.facts.size_params:
        yield "parameters", f"{model.facts.size_params:g}B"
    yield "start_policy", start_policy
