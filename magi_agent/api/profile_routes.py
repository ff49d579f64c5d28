"""Profiles: named sets of enabled models with their settings."""

from typing import Final
from urllib.parse import quote

from aiohttp import web
from pydantic_core import to_json

from magi_agent.api.exchange import answer, body_of, location
from magi_agent.api.representations import profile_answer, profile_of, readable
from magi_agent.api.routes import Access, Route
from magi_agent.api.schemas import MessageAnswer, ProfileAnswer, ProfileCreatedAnswer, ProfileRequest
from magi_agent.api.services import Services
from magi_agent.errors import (
    ProfileActive,
    ProfileCreationFailed,
    ProfileExists,
    ProfileInvalid,
    ProfileNotFound,
    ProfileReadOnly,
    ProfileSaveFailed,
    ValidationFailed,
)
from magi_agent.profiles.profiles import slug_of

_TAG: Final = "profiles"
_CHANGING: Final = (ProfileNotFound, ProfileReadOnly, ProfileSaveFailed)


class ProfileRoutes:
    """The handlers for profiles."""

    def __init__(self, services: Services) -> None:
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

    async def get_profile(self, request: web.Request) -> web.Response:
        """GET /api/models/profiles/{name}."""
        return answer(profile_answer(await self._profiles.profile(request.match_info["name"])))

    async def replace_profile(self, request: web.Request) -> web.Response:
        """PUT /api/models/profiles/{name}."""
        name = request.match_info["name"]
        profile = profile_of(await body_of(request, ProfileRequest))
        if slug_of(profile.name) != name:
            raise ValidationFailed(
                [{"field": "name", "message": f"is the name of another profile than {name!r}; POST makes a new one"}]
            )
        path = await self._profiles.replace(name, profile)
        return answer(
            ProfileCreatedAnswer(
                message=f"Profile '{profile.name}' replaced successfully", profile_name=name, path=readable(str(path))
            )
        )

    async def delete_profile(self, request: web.Request) -> web.Response:
        """DELETE /api/models/profiles/{name}."""
        name = request.match_info["name"]
        await self._profiles.delete(name)
        return answer(MessageAnswer(message=f"Profile '{name}' deleted successfully"))
