"""Export and import of all choices."""

import asyncio
import logging
from datetime import UTC, datetime
from typing import Final

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import to_json

from magi_agent import __version__
from magi_agent.api.exchange import answer, flag_of
from magi_agent.api.export_body import export_of
from magi_agent.api.representations import profile_export, readable, said_settings
from magi_agent.api.routes import DRY_RUN, Access, Route
from magi_agent.api.schemas import ExportBody, ImportAnswer
from magi_agent.api.services import Services
from magi_agent.errors import RegistrySaveFailed, ServiceUnavailable
from magi_agent.transfer import Export

_LOG: Final = logging.getLogger(__name__)
_TAG: Final = "agent"


class TransferRoutes:
    """The handlers for export and import."""

    def __init__(self, services: Services) -> None:
        self._transfer = services.transfer

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/export",
                self.export_choices,
                Access.READ,
                "All choices of this host, as POST /api/import takes them",
                _TAG,
                {200: ExportBody},
                errors=(ServiceUnavailable,),
            ),
            Route(
                "POST",
                "/api/import",
                self.import_choices,
                Access.ADMIN,
                "Take over the choices of an export; models it does not name, and what runs, are not touched",
                _TAG,
                {200: ImportAnswer},
                body=ExportBody,
                errors=(RegistrySaveFailed, ServiceUnavailable),
                query=(DRY_RUN,),
            ),
        )

    async def export_choices(self, _: web.Request) -> web.Response:
        """GET /api/export."""
        return answer(await asyncio.to_thread(_written, await self._transfer.export()))

    async def import_choices(self, request: web.Request) -> web.Response:
        """POST /api/import."""
        dry_run = flag_of(request, "dryRun")
        export = await export_of(request)
        report = await self._transfer.take_in(export, dry_run=dry_run)
        count = len(report.changed)
        return answer(
            ImportAnswer(
                message=f"{count} models' choices {'would change' if dry_run else 'changed'}",
                dry_run=dry_run,
                changed=list(report.changed),
                unchanged=list(report.unchanged),
                unknown=list(report.unknown),
                profiles=list(report.profiles),
                port_range=list(report.port_range) if report.port_range else None,
                problems=[readable(problem) for problem in report.problems],
            )
        )


def _written(export: Export) -> bytes:
    """An export as JSON, of the shape of ``ExportBody``; of runtime settings it has those that were spoken about."""
    profiles = {}
    for slug, profile in export.profiles.items():
        try:
            profiles[slug] = profile_export(profile)
        except ValidationError as error:
            _LOG.error("profile %s is left out of the export: %s", slug, error)
    return to_json(
        {
            "version": 1,
            "exportedAt": datetime.now(UTC),
            "agentVersion": __version__,
            "activeProfile": export.active_profile,
            "portRange": export.port_range,
            "models": {
                model_id: {
                    "filename": readable(sent.filename),
                    "sizeBytes": sent.size_bytes,
                    "fingerprint": sent.fingerprint,
                    "tierOverride": sent.choices.tier_override,
                    "thinkingOverride": sent.choices.thinking_override,
                    "enabled": sent.choices.enabled,
                    "port": sent.choices.port,
                    "runtimeSettings": said_settings(sent.choices.runtime_settings),
                }
                for model_id, sent in export.models.items()
            },
            "profiles": profiles,
        }
    )
