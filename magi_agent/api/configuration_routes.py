"""Where the agent's own configuration comes from."""

import os
from typing import Final

from aiohttp import web

from magi_agent.api.exchange import answer
from magi_agent.api.representations import readable
from magi_agent.api.routes import Access, Route
from magi_agent.api.schemas import ConfigurationAnswer
from magi_agent.api.services import Services
from magi_agent.settings.table import SETTINGS

_TAG: Final = "agent"
_OPTIONS: Final = {setting.name: setting.option for setting in SETTINGS}


class ConfigurationRoutes:
    """The handler for the configuration."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/configuration",
                self.get_configuration,
                Access.READ,
                "Which file, variables and options the agent goes by",
                _TAG,
                {200: ConfigurationAnswer},
            ),
        )

    async def get_configuration(self, _: web.Request) -> web.Response:
        """GET /api/configuration."""
        sources = self._services.configuration.sources
        return answer(
            ConfigurationAnswer(
                pid=os.getpid(),
                file=readable(str(sources.file)) if sources else None,
                variables={name: readable(value) for name, value in sources.variables.items()} if sources else {},
                options={_OPTIONS[name]: readable(value) for name, value in sources.options.items()} if sources else {},
            )
        )
