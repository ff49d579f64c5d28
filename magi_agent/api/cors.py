"""Cross-origin requests of browsers, for the origins that the operator names: https://fetch.spec.whatwg.org/#cors-protocol."""

from typing import Final

from aiohttp import web
from multidict import CIMultiDict

from magi_agent.configuration import Configuration

_METHODS: Final = "GET, HEAD, POST, PUT, DELETE"
_REQUEST_HEADERS: Final = "Authorization, Content-Type, If-None-Match, Last-Event-ID, X-Request-ID"
_RESPONSE_HEADERS: Final = (
    "ETag, Location, Retry-After, X-Magi-Draft-Model, X-Magi-Model, X-Magi-Score, X-Magi-Tier, "
    "X-RateLimit-Limit-Requests, X-RateLimit-Remaining-Requests, X-RateLimit-Reset-Requests, X-Request-ID, "
    "X-Response-Time"
)
_PREFLIGHT_SECONDS: Final = "600"


class CrossOrigin:
    """Says to browsers which other sites may use this API; with no origins configured, it says nothing at all."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks whether it may; ``None`` for any other request."""
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        if not self._allows(request):
            return None
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": _METHODS,
                "Access-Control-Allow-Headers": _REQUEST_HEADERS,
                "Access-Control-Max-Age": _PREFLIGHT_SECONDS,
            },
        )

    def mark(self, request: web.Request, headers: CIMultiDict[str]) -> None:
        """Put on an answer what lets the browser show it to the page that asked."""
        if not self._configuration.settings.cors_origins:
            return
        headers.add("Vary", "Origin")
        if self._allows(request):
            headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
            headers["Access-Control-Expose-Headers"] = _RESPONSE_HEADERS

    def _allows(self, request: web.Request) -> bool:
        return request.headers.get("Origin") in self._configuration.settings.cors_origins
