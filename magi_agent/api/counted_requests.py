"""Which route a request is counted under: never what a caller chose, so that counting is bounded."""

from collections.abc import Iterable

from magi_agent.api.routes import Route
from magi_agent.metrics.request_counts import NO_ROUTE, RequestCounts


class CountedRequests:
    """Counts requests by the route table."""

    def __init__(self, routes: Iterable[Route], counts: RequestCounts) -> None:
        self._paths: dict[object, str] = {route.handler: route.path for route in routes}
        self._counts = counts

    def began(self) -> None:
        """Count a request that is under way."""
        self._counts.under_way += 1

    def ended(self, method: str, handler: object, status: int | None, seconds: float) -> None:
        """Count its end; ``status`` is ``None`` where nobody waited for an answer."""
        self._counts.ended(method, self._paths.get(handler, NO_ROUTE), status, seconds)
