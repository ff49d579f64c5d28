"""How busy each server is: what ``magictl top`` and a front end's live view ask for again and again."""

from datetime import datetime
from typing import Final

from aiohttp import web
from pydantic import Field

from magi_agent.api.exchange import answer
from magi_agent.api.representations import readable
from magi_agent.api.routes import Access, Route
from magi_agent.api.schemas import Answer
from magi_agent.api.services import Services
from magi_agent.api.systemd_reach import require_systemd
from magi_agent.errors import ServiceUnavailable
from magi_agent.servers.pictures import Server
from magi_agent.servers.usage import ServerUsage
from magi_agent.vocabulary import ServerState

_NOT_READY: Final = ServerUsage()


class ServerUsageAnswer(Answer):
    """One server's figures; null is what is not known, or what there is only of a server that is ready."""

    model_id: str
    state: ServerState
    uptime_seconds: int
    memory_bytes: int | None
    cpu_seconds: float | None = Field(description="since it started; of all its threads")
    slots_total: int | None = Field(description="requests that it can work on at a time")
    slots_busy: int | None
    requests_waiting: int | None = Field(description="for a slot")
    prompt_tokens: int | None = Field(description="processed since it started")
    generated_tokens: int | None = Field(description="since it started, those of requests under way included")
    problem: str | None = Field(description="why a server that is ready did not say how busy it is")


class UsageAnswer(Answer):
    """How busy the servers are."""

    at: datetime = Field(description="when the servers were asked for slots and tokens: every two seconds at most")
    servers: list[ServerUsageAnswer]


class UsageRoutes:
    """The handler for usage."""

    def __init__(self, services: Services) -> None:
        self._servers = services.servers
        self._usage = services.usage
        self._manager = services.manager

    def routes(self) -> tuple[Route, ...]:
        """The route, with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/usage",
                self.get_usage,
                Access.READ,
                "How busy each server is: memory, processor time, slots and tokens",
                "servers",
                {200: UsageAnswer},
                errors=(ServiceUnavailable,),
            ),
        )

    async def get_usage(self, _: web.Request) -> web.Response:
        """GET /api/usage."""
        await require_systemd(self._manager)
        servers = await self._servers.list()
        usages = await self._usage.all()
        return answer(
            UsageAnswer(
                at=usages.at,
                servers=[_answer(server, usages.servers.get(server.model_id, _NOT_READY)) for server in servers],
            )
        )


def _answer(server: Server, usage: ServerUsage) -> ServerUsageAnswer:
    known = usage if server.is_ready else _NOT_READY
    return ServerUsageAnswer(
        model_id=server.model_id,
        state=server.state,
        uptime_seconds=server.uptime_seconds,
        memory_bytes=server.memory_bytes,
        cpu_seconds=server.cpu_seconds,
        slots_total=known.slots_total,
        slots_busy=known.slots_busy,
        requests_waiting=known.requests_waiting,
        prompt_tokens=known.prompt_tokens,
        generated_tokens=known.generated_tokens,
        problem=readable(known.problem) if known.problem else None,
    )
