"""Export and import of all choices."""

from datetime import UTC, datetime
from typing import Final

from aiohttp import web

from magi_agent import __version__
from magi_agent.api.exchange import answer, body_of, fault_on_wire, flag_of
from magi_agent.api.representations import port_range_of, profile_of, profile_request, readable
from magi_agent.api.routes import DRY_RUN, Access, Route
from magi_agent.api.schemas import ChoicesBody, ExportBody, ImportAnswer
from magi_agent.api.services import Services
from magi_agent.errors import RegistrySaveFailed, ServiceUnavailable, ValidationFailed
from magi_agent.registry.model import Choices
from magi_agent.runtime_settings.settings import faults_of
from magi_agent.transfer import Export, ModelChoices

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
        export = await self._transfer.export()
        return answer(
            ExportBody(
                version=1,
                exported_at=datetime.now(UTC),
                agent_version=__version__,
                active_profile=export.active_profile,
                port_range=list(export.port_range) if export.port_range else None,
                models={
                    model_id: ChoicesBody(
                        filename=readable(sent.filename),
                        size_bytes=sent.size_bytes,
                        fingerprint=sent.fingerprint,
                        tier_override=sent.choices.tier_override,
                        thinking_override=sent.choices.thinking_override,
                        enabled=sent.choices.enabled,
                        port=sent.choices.port,
                        runtime_settings=sent.choices.runtime_settings,
                    )
                    for model_id, sent in export.models.items()
                },
                profiles={slug: profile_request(profile) for slug, profile in export.profiles.items()},
            )
        )

    async def import_choices(self, request: web.Request) -> web.Response:
        """POST /api/import."""
        body = await body_of(request, ExportBody)
        dry_run = flag_of(request, "dryRun")
        faults = [
            fault_on_wire(fault, f"models.{model_id}.runtimeSettings.")
            for model_id, sent in body.models.items()
            for fault in faults_of(sent.runtime_settings)
        ]
        if faults:
            raise ValidationFailed(faults)
        export = Export(
            {
                model_id: ModelChoices(
                    sent.filename,
                    sent.size_bytes,
                    sent.fingerprint,
                    Choices(sent.tier_override, sent.thinking_override, sent.enabled, sent.port, sent.runtime_settings),
                )
                for model_id, sent in body.models.items()
            },
            {slug: profile_of(profile) for slug, profile in body.profiles.items()},
            body.active_profile,
            port_range_of(body.port_range),
        )
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
                problems=[readable(problem) for problem in report.problems],
            )
        )
