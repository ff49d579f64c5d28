"""What Prometheus reads."""

from typing import Final

from aiohttp import web

from magi_agent.api.large_body import SLICE, LargeBody
from magi_agent.api.routes import Access, Route
from magi_agent.api.services import Services
from magi_agent.metrics.exposition import Form, form_of

_TAG: Final = "agent"


class MetricsRoutes:
    """The handler for metrics."""

    def __init__(self, services: Services) -> None:
        self._metrics = services.metrics

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
        )

    async def get_metrics(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        form = form_of(",".join(request.headers.getall("Accept", [])))
        text = await self._metrics.text(form)
        # The header as it stands: aiohttp would put the parameters in another order.
        headers = {"Content-Type": form.value, "Vary": "Accept", "Cache-Control": "no-store"}
        return web.Response(body=LargeBody(text) if len(text) > SLICE else text, headers=headers)
