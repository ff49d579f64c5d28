"""Profiles: named sets of enabled models with their settings."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final
from urllib.parse import quote

from aiohttp import web
from pydantic_core import to_json

from magi_agent.api.exchange import CALLER, answer, body_of, flag_of, location, wait_of
from magi_agent.api.representations import profile_answer, profile_of, readable
from magi_agent.api.routes import DRY_RUN, WAIT, Access, Route
from magi_agent.api.schemas import (
    ActiveProfileAnswer,
    MessageAnswer,
    PlanAnswer,
    ProfileAnswer,
    ProfileCreatedAnswer,
    ProfileRequest,
)
from magi_agent.api.services import Services
from magi_agent.api.systemd_reach import require_systemd
from magi_agent.errors import (
    Draining,
    MagiError,
    ProfileActive,
    ProfileCreationFailed,
    ProfileExists,
    ProfileInvalid,
    ProfileNotFound,
    ProfileReadOnly,
    ProfileSaveFailed,
    RegistrySaveFailed,
    ServiceUnavailable,
    ValidationFailed,
)
from magi_agent.profiles.active import Plan
from magi_agent.profiles.profiles import slug_of

_TAG: Final = "profiles"
_CHANGING: Final = (ProfileNotFound, ProfileReadOnly, ProfileSaveFailed)


class ProfileRoutes:
    """The handlers for profiles."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._profiles = services.profiles

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/models/profiles",
                self.list_profiles,
                Access.READ,
                "The slugs of all profiles, sorted",
                _TAG,
                {200: list[str]},
            ),
            Route(
                "POST",
                "/api/models/profiles",
                self.create_profile,
                Access.ADMIN,
                "Create a profile",
                _TAG,
                {201: ProfileCreatedAnswer},
                body=ProfileRequest,
                errors=(ProfileExists, ProfileCreationFailed),
            ),
            Route(
                "GET",
                "/api/models/profiles/active",
                self.get_active_profile,
                Access.READ,
                "The active profile",
                _TAG,
                {200: ActiveProfileAnswer},
            ),
            Route(
                "POST",
                "/api/models/profiles/{name}/activate",
                self.activate_profile,
                Access.ADMIN,
                "Make exactly a profile's models enabled and wanted; what runs and stays wanted is not touched",
                _TAG,
                {200: PlanAnswer, 202: PlanAnswer},
                errors=(ProfileNotFound, ProfileInvalid, Draining, RegistrySaveFailed, ServiceUnavailable),
                query=(DRY_RUN, WAIT),
            ),
            Route(
                "GET",
                "/api/models/profiles/{name}",
                self.get_profile,
                Access.READ,
                "One profile",
                _TAG,
                {200: ProfileAnswer},
                errors=(ProfileNotFound, ProfileInvalid),
            ),
            Route(
                "PUT",
                "/api/models/profiles/{name}",
                self.replace_profile,
                Access.ADMIN,
                "Replace a profile by another of the same name",
                _TAG,
                {200: ProfileCreatedAnswer},
                body=ProfileRequest,
                errors=_CHANGING,
            ),
            Route(
                "DELETE",
                "/api/models/profiles/{name}",
                self.delete_profile,
                Access.ADMIN,
                "Delete a profile",
                _TAG,
                {200: MessageAnswer},
                errors=(*_CHANGING, ProfileActive),
            ),
        )

    async def list_profiles(self, _: web.Request) -> web.Response:
        """GET /api/models/profiles."""
        return answer(to_json(await self._profiles.names()))

    async def create_profile(self, request: web.Request) -> web.Response:
        """POST /api/models/profiles."""
        profile = profile_of(await body_of(request, ProfileRequest))
        slug, path = await self._profiles.create(profile)
        return answer(
            ProfileCreatedAnswer(
                message=f"Profile '{profile.name}' created successfully", profile_name=slug, path=readable(str(path))
            ),
            status=201,
            headers=location(request, f"/api/models/profiles/{quote(slug, safe='')}"),
        )

    async def get_active_profile(self, _: web.Request) -> web.Response:
        """GET /api/models/profiles/active."""
        active = self._services.active_profile
        problem = active.problem
        try:
            profile = await active.profile()
        except MagiError as error:
            profile, problem = None, problem or error.message
        return answer(
            ActiveProfileAnswer(
                name=active.slug,
                profile=profile_answer(profile) if profile else None,
                problem=readable(problem) if problem else None,
            )
        )

    async def activate_profile(self, request: web.Request) -> web.Response:
        """POST /api/models/profiles/{name}/activate."""
        services, slug = self._services, request.match_info["name"]
        dry_run, wait = flag_of(request, "dryRun"), wait_of(request)
        # What starts and what stops is the answer, so what runs has to be known.
        await require_systemd(services.manager)
        if dry_run:
            plan = await services.active_profile.plan(slug)
            effective = services.effective.with_profile(plan.settings)
            not_fitting = await services.servers.not_fitting(plan.runs, effective, plan.places)
            starts = [model_id for model_id, run in plan.runs.items() if run]
            not_runnable = await services.servers.not_runnable(starts, effective)
            message = f"Profile '{slug}' would be activated"
            return answer(await self._plan_answer(plan, message, None, not_fitting, not_runnable))
        if services.servers.drain and any((await services.active_profile.plan(slug)).runs.values()):
            services.servers.refuse_while_draining()
        plan = await services.active_profile.activate(slug, by=request[CALLER].name)
        operation = services.servers.follow("activate", plan.runs)
        ended = await services.servers.operations.finished(operation, wait)
        return answer(
            await self._plan_answer(plan, f"Profile '{slug}' is active", operation.operation_id),
            status=200 if ended else 202,
            headers=None if ended else location(request, f"/api/operations/{operation.operation_id}"),
        )

    async def _plan_answer(
        self,
        plan: Plan,
        message: str,
        operation_id: str | None,
        not_fitting: Mapping[str, MagiError] = MappingProxyType({}),
        not_runnable: Mapping[str, MagiError] = MappingProxyType({}),
    ) -> PlanAnswer:
        services = self._services
        effective = services.effective.with_profile(plan.settings)
        narrow = await services.narrow_limits.of_each(plan.places, effective)
        return PlanAnswer(
            message=message,
            profile=plan.slug,
            dry_run=operation_id is None,
            enable=list(plan.enable),
            disable=list(plan.disable),
            start=[model_id for model_id, run in plan.runs.items() if run],
            stop=[model_id for model_id, run in plan.runs.items() if not run],
            restart=list(services.servers.changed_by(effective, plan.keep)),
            keep=list(plan.keep),
            absent=list(plan.absent),
            unknown=list(plan.unknown),
            unusable={model_id: readable(problem) for model_id, problem in plan.unusable.items()},
            insufficient_memory={model_id: readable(error.message) for model_id, error in not_fitting.items()},
            settings_not_usable={model_id: readable(error.message) for model_id, error in not_runnable.items()},
            warnings={model_id: list(warnings) for model_id, warnings in narrow.items()},
            operation_id=operation_id,
        )

    async def get_profile(self, request: web.Request) -> web.Response:
        """GET /api/models/profiles/{name}."""
        return answer(profile_answer(await self._profiles.profile(request.match_info["name"])))

    async def replace_profile(self, request: web.Request) -> web.Response:
        """PUT /api/models/profiles/{name}."""
        name = request.match_info["name"]
        profile = profile_of(await body_of(request, ProfileRequest))
        if profile.name != await self._name_of(name) and slug_of(profile.name) != name:
            raise ValidationFailed(
                [{"field": "name", "message": f"is the name of another profile than {name!r}; POST makes a new one"}]
            )
        path = await self._profiles.replace(name, profile)
        return answer(
            ProfileCreatedAnswer(
                message=f"Profile '{profile.name}' replaced successfully", profile_name=name, path=readable(str(path))
            )
        )

    async def _name_of(self, slug: str) -> str:
        """What a profile is called: a file that people made may have any name."""
        try:
            return (await self._profiles.profile(slug)).name
        except (ProfileNotFound, ProfileInvalid):
            return slug

    async def delete_profile(self, request: web.Request) -> web.Response:
        """DELETE /api/models/profiles/{name}."""
        name = request.match_info["name"]
        await self._profiles.delete(name)
        return answer(MessageAnswer(message=f"Profile '{name}' deleted successfully"))
