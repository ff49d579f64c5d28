"""What Prometheus reads: the agent's own figures, and each ready server's by itself."""

from typing import Final

from aiohttp import web

from magi_agent.api.asked_host import InvalidHost, asked_host
from magi_agent.api.exchange import CALLER, answer, array
from magi_agent.api.large_body import SLICE, LargeBody
from magi_agent.api.routes import Access, Route
from magi_agent.api.scrape_targets import MODEL_METRICS, ScrapeTargets, scrape_targets
from magi_agent.api.services import Services
from magi_agent.api.systemd_reach import require_systemd
from magi_agent.errors import ModelNotFound, ServiceUnavailable
from magi_agent.gateway.relay import ServerFailed, ServerSilent
from magi_agent.metrics.forms import Form, form_of

_TAG: Final = "agent"
_NOT_KEPT: Final = {"Cache-Control": "no-store"}


class MetricsRoutes:
    """The handlers for metrics."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/metrics",
                self.get_metrics,
                Access.READ,
                "Figures of the agent, the host, the models and their servers, in OpenMetrics",
                _TAG,
                {200: Form.OPEN_METRICS.media_type},
            ),
            Route(
                "GET",
                "/metrics/targets",
                self.get_scrape_targets,
                Access.READ,
                "The models that are ready, as targets of Prometheus's HTTP service discovery",
                _TAG,
                {200: list[ScrapeTargets]},
                errors=(InvalidHost, ServiceUnavailable),
            ),
            Route(
                "GET",
                f"{MODEL_METRICS}{{modelId}}",
                self.get_model_metrics,
                Access.READ,
                "The metrics of one model's llama-server, as it tells them",
                _TAG,
                {200: Form.TEXT.media_type},
                errors=(ModelNotFound, ServiceUnavailable, ServerFailed, ServerSilent),
            ),
        )

    async def get_metrics(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        form = form_of(",".join(request.headers.getall("Accept", [])))
        return _text(await self._services.metrics.text(form), form, {"Vary": "Accept"})

    async def get_scrape_targets(self, request: web.Request) -> web.Response:
        """GET /metrics/targets."""
        services = self._services
        host, place = asked_host(request), request[CALLER].place
        models = services.registry.models
        await require_systemd(services.manager)
        # Who is told of no model forgets those that it knew; who is told nothing keeps them.
        await services.opening.wait()
        if not services.opening.is_open:
            raise ServiceUnavailable("servers", "it is not known yet which servers answer; try again in a moment")
        groups = [
            scrape_targets(models[model_id], services.effective.start_policy(models[model_id]), host, place)
            for model_id in sorted(services.servers.ready())
            if model_id in models
        ]
        return answer(array([group.model_dump_json().encode() for group in groups]), headers=_NOT_KEPT)

    async def get_model_metrics(self, request: web.Request) -> web.Response:
        """GET /metrics/models/{modelId}."""
        services = self._services
        model_id = services.registry.model(request.match_info["modelId"]).model_id
        told = await services.reports.metrics_of(model_id)
        if told is None:
            state = services.servers.state(model_id)
            raise ServiceUnavailable(model_id, f"model {model_id} is {state}: it has metrics while it is ready")
        if told.body is None:
            why = told.problem or f"it answered with status {told.status}"
            failed = ServerSilent if told.is_late else ServerFailed
            raise failed(f"the server of {model_id} did not tell its metrics: {why}", {"modelId": model_id})
        return _text(told.body, Form.TEXT, {"X-Content-Type-Options": "nosniff"})


def _text(text: bytes, form: Form, headers: dict[str, str]) -> web.Response:
    # The header as it stands: aiohttp would put the parameters in another order.
    headers = {"Content-Type": form.value, **_NOT_KEPT, **headers}
    return web.Response(body=LargeBody(text) if len(text) > SLICE else text, headers=headers)
