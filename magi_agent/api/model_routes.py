"""Models: what there is, and what people choose for them."""

from dataclasses import replace
from typing import Final

from aiohttp import web

from magi_agent.api.etag import answer_unless_known
from magi_agent.api.exchange import CALLER, answer, body_of, flag_of, location, tier_named, wait_of
from magi_agent.api.model_documents import ModelDocuments
from magi_agent.api.representations import server_answer
from magi_agent.api.routes import APPLY, WAIT, Access, Route
from magi_agent.api.schemas import (
    EnabledAnswer,
    EnabledRequest,
    ModelAnswer,
    ModelWithServerAnswer,
    RegistryAnswer,
    RescanAnswer,
    ThinkingAnswer,
    ThinkingRequest,
    TierAnswer,
    TierRequest,
)
from magi_agent.api.services import Services
from magi_agent.api.systemd_reach import require_systemd
from magi_agent.errors import (
    Draining,
    InsufficientMemory,
    InvalidTier,
    ModelNotFound,
    ModelNotUsable,
    NoFreePort,
    RegistrySaveFailed,
    RescanFailed,
    ServiceUnavailable,
    SettingsNotUsable,
    StartFailed,
    StopFailed,
)
from magi_agent.registry.model import Choices, Model
from magi_agent.servers.preparation import not_usable
from magi_agent.vocabulary import StartPolicy, Tier

_TAG: Final = "models"
_SAVING: Final = (ModelNotFound, RegistrySaveFailed, ServiceUnavailable)


class ModelRoutes:
    """The handlers for models."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._documents = ModelDocuments(services.registry, services.effective, services.configuration)

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/api/models/registry",
                self.get_registry,
                Access.READ,
                "All models, and what decides about them",
                _TAG,
                {200: RegistryAnswer},
                errors=(ServiceUnavailable,),
                conditional=True,
            ),
            Route(
                "POST",
                "/api/models/rescan",
                self.rescan,
                Access.ADMIN,
                "Scan the model folders now",
                _TAG,
                {200: RescanAnswer},
                errors=(RescanFailed,),
            ),
            Route(
                "GET",
                "/api/models/tiers/{tier}",
                self.list_models_of_tier,
                Access.READ,
                "The models of one tier, by their effective tier",
                _TAG,
                {200: list[ModelAnswer]},
                errors=(InvalidTier, ServiceUnavailable),
                conditional=True,
            ),
            Route(
                "GET",
                "/api/models/{modelId}",
                self.get_model,
                Access.READ,
                "One model with its server",
                _TAG,
                {200: ModelWithServerAnswer},
                errors=(ModelNotFound, ServiceUnavailable),
            ),
            Route(
                "PUT",
                "/api/models/{modelId}/tier",
                self.set_tier,
                Access.ADMIN,
                "Override a model's tier, or clear the override",
                _TAG,
                {200: TierAnswer},
                body=TierRequest,
                errors=(InvalidTier, *_SAVING),
            ),
            Route(
                "PUT",
                "/api/models/{modelId}/thinking",
                self.set_thinking,
                Access.ADMIN,
                "Override whether a model thinks, or clear the override",
                _TAG,
                {200: ThinkingAnswer},
                body=ThinkingRequest,
                errors=_SAVING,
            ),
            Route(
                "PUT",
                "/api/models/{modelId}/enabled",
                self.set_enabled,
                Access.ADMIN,
                "Choose whether a model is in use",
                _TAG,
                {200: EnabledAnswer, 202: EnabledAnswer},
                body=EnabledRequest,
                errors=(
                    *(*_SAVING, ModelNotUsable, SettingsNotUsable, InsufficientMemory, NoFreePort, Draining),
                    *(StartFailed, StopFailed),
                ),
                query=(APPLY, WAIT),
            ),
        )

    async def get_registry(self, request: web.Request) -> web.Response:
        """GET /api/models/registry."""
        return answer_unless_known(request, await self._documents.registry())

    async def rescan(self, _: web.Request) -> web.Response:
        """POST /api/models/rescan."""
        found = await self._services.inventory.rescan()
        return answer(
            RescanAnswer(
                message="Re-scan completed successfully",
                models_found=found.models_found,
                models_added=found.models_added,
                models_removed=found.models_removed,
                timestamp=found.at,
            )
        )

    async def list_models_of_tier(self, request: web.Request) -> web.Response:
        """GET /api/models/tiers/{tier}."""
        return answer_unless_known(request, await self._documents.tier(tier_named(request.match_info["tier"])))

    async def get_model(self, request: web.Request) -> web.Response:
        """GET /api/models/{modelId}."""
        model = self._services.registry.model(request.match_info["modelId"])
        await require_systemd(self._services.manager)
        server = server_answer(await self._services.servers.server(model.model_id)).model_dump_json(by_alias=True)
        return answer(self._documents.model(model)[:-1] + b',"server":' + server.encode() + b"}")

    async def set_tier(self, request: web.Request) -> web.Response:
        """PUT /api/models/{modelId}/tier."""
        model = self._services.registry.model(request.match_info["modelId"])
        body = await body_of(request, TierRequest)
        tier = None if body.tier is None else tier_named(body.tier)
        model = await self._services.registry.choose(
            model.model_id, lambda choices: replace(choices, tier_override=tier)
        )
        return answer(
            TierAnswer(
                message=f"Tier updated for {model.model_id}",
                model_id=model.model_id,
                tier=tier,
            )
        )

    async def set_thinking(self, request: web.Request) -> web.Response:
        """PUT /api/models/{modelId}/thinking."""
        model = self._services.registry.model(request.match_info["modelId"])
        thinking = (await body_of(request, ThinkingRequest)).thinking
        tier_changed = False

        def change(choices: Choices) -> Choices:
            nonlocal tier_changed
            tier_changed = thinking is True and choices.tier_override is None
            tier = Tier.POWERFUL if tier_changed else choices.tier_override
            return replace(choices, thinking_override=thinking, tier_override=tier)

        model = await self._services.registry.choose(model.model_id, change)
        return answer(
            ThinkingAnswer(
                message=f"Thinking capability updated for {model.model_id}",
                model_id=model.model_id,
                thinking=thinking,
                tier_changed=tier_changed,
            )
        )

    async def set_enabled(self, request: web.Request) -> web.Response:
        """PUT /api/models/{modelId}/enabled."""
        model = self._services.registry.model(request.match_info["modelId"])
        enabled = (await body_of(request, EnabledRequest)).enabled
        apply, wait = flag_of(request, "apply"), wait_of(request)
        # What runs now is part of the answer, so it has to be known before anything is changed.
        await require_systemd(self._services.manager)
        if enabled and not model.is_usable:
            raise not_usable(model)
        if enabled and apply:
            self._services.servers.refuse_while_draining()

        def change(choices: Choices) -> Choices:
            if enabled:
                choices = self._services.preparation.with_port(choices)
            return replace(choices, enabled=enabled)

        model = await self._services.registry.choose(model.model_id, change)
        settled = await self._make_so(model, request[CALLER].name, wait) if apply else True
        return answer(
            EnabledAnswer(
                message=f"Model {model.model_id} {'enabled' if enabled else 'disabled'}",
                model_id=model.model_id,
                enabled=enabled,
                restart_required=settled and self._services.servers.differs_from_choice(model),
            ),
            status=200 if settled else 202,
            headers=None if settled else location(request, f"/api/models/servers/{model.model_id}"),
        )

    async def _make_so(self, model: Model, by: str, wait: float) -> bool:
        """Have a model's server be as its choice says; whether it is so already, and not only under way."""
        if not model.choices.enabled:
            return (await self._services.servers.stop(model.model_id, by=by, wait=wait)).settled
        if self._services.effective.start_policy(model) is not StartPolicy.ALWAYS_ON:
            # In use, and up only when a request or a person asks for it: there is nothing to start now.
            return True
        return (await self._services.servers.start(model.model_id, by=by, wait=wait)).settled
