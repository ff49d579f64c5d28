"""A client of one listener of an agent in this process, and what tests ask of its answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from magi_agent.agent import Agent
from magi_agent.api.services import Services

PATIENCE_OF_TESTS = 60.0
"""Seconds; what never comes fails the test after that. Generous: the machine may be loaded."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        """The answer's JSON."""
        assert self.headers["Content-Type"].startswith("application/json"), self.headers
        return json.loads(self.content)

    def success(self, status: int = 200) -> Any:
        """The body of an answer that must be a success."""
        assert self.status == status, f"{self.status}: {self.content[:2000]!r}"
        return self.body

    def failure(self, status: int, error: str) -> dict[str, Any]:
        """The details of an answer that must be this error, in the one form that all errors have."""
        body = self.body
        assert (self.status, body.get("error")) == (status, error), f"{self.status}: {self.content[:2000]!r}"
        assert list(body) == ["error", "message", "details"]
        assert body["message"]
        details: dict[str, Any] = body["details"]
        assert isinstance(details, dict)
        return details


@dataclass(frozen=True, slots=True)
class Api:
    """An agent that runs in this process, and a session to one of its listeners."""

    agent: Agent
    session: aiohttp.ClientSession
    base: str

    @property
    def services(self) -> Services:
        return self.agent.services

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request; ``body`` goes as JSON, ``data`` as it is."""
        url = URL(self.base + path, encoded=True)
        given = {"data": data} if data is not None else {"json": body} if body is not None else {}
        async with self.session.request(method, url, headers=headers, allow_redirects=False, **given) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    async def get(self, path: str) -> Any:
        """The body of what must be there."""
        return (await self.ask("GET", path)).success()

    async def model(self, model_id: str) -> dict[str, Any]:
        """A model as the registry's answer has it."""
        found: dict[str, Any] = (await self.get("/api/models/registry"))["models"][model_id]
        return found

    async def state(self, model_id: str) -> str:
        """The state of a model's server."""
        return str((await self.get(f"/api/models/servers/{model_id}"))["state"])

    async def until_state(self, model_id: str, *states: str) -> None:
        """Wait until a model's server is in one of these states."""

        async def there() -> bool:
            return await self.state(model_id) in states

        await until(there, f"{model_id} is {' or '.join(states)}")


async def until(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = PATIENCE_OF_TESTS) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.01)
