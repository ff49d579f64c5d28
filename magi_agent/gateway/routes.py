"""The paths that programs use models by, and what becomes of a request on them."""

import asyncio
import re
import time
from functools import partial
from typing import Final, cast

from aiohttp import web
from aiohttp.helpers import parse_mimetype
from pydantic_core import to_json

from magi_agent.api.access import SAFE_METHODS, Forbidden
from magi_agent.api.connection import connection_of
from magi_agent.api.exchange import (
    ANSWER_HEADERS,
    CALLER,
    BadRequest,
    PayloadTooLarge,
    RequestTimeout,
    answer,
    received,
)
from magi_agent.api.routes import Access, Handler, Route
from magi_agent.api.services import Services
from magi_agent.errors import ModelNotFound, NotFound, ServiceUnavailable
from magi_agent.gateway.automatic import AUTO, Automatic, Choice
from magi_agent.gateway.awaited import AwaitedAnswer
from magi_agent.gateway.context_length import context_length
from magi_agent.gateway.lanes import Lanes, QueueFull
from magi_agent.gateway.model_field import ModelField, UnreadableBody, form_field, model_field
from magi_agent.gateway.model_names import ModelNames, NoName, UnknownName
from magi_agent.gateway.model_use import ModelUse
from magi_agent.gateway.openai_errors import NATIVE_PATHS
from magi_agent.gateway.relay import (
    Relay,
    RelayedAnswer,
    ServerAnswer,
    ServerEnded,
    ServerFailed,
    ServerSilent,
    ServerUnreachable,
)
from magi_agent.gateway.senses import NOTHING, Sense, needed
from magi_agent.gateway.staged import TwoStages
from magi_agent.gateway.tiers import PREFIX, Kind, kind_for
from magi_agent.gateway.token_rates import RateLimitExceeded, TokenRates
from magi_agent.registry.model import Model
from magi_agent.servers.connections import ServerConnections
from magi_agent.vocabulary import Tier

MODEL_HEADER: Final = "X-Magi-Model"
"""The id of the model that a request went to."""
_TAG: Final = "gateway"
_CHAT: Final = "/v1/chat/completions"
_LARGE: Final = 64 * 1024
"""Bytes of a body from which on it is read in a thread."""
_BODY_SECONDS: Final = 300.0
"""For a body to arrive: images, over a slow line."""
_MULTIPART: Final = "multipart/form-data"
_INFERENCE: Final = re.compile(rf"/v1/.+|/health|{'|'.join(NATIVE_PATHS)}")
"""What may be asked of a server by whom the models are for; the rest shows or changes how it is run."""
_PLAIN: Final = re.compile(r"(?:/[A-Za-z0-9_-]+)+")
"""Paths that nobody can take for another one, whatever they make of dots and of what is percent-encoded."""
_V1: Final = {
    "chat/completions": "Answer in a conversation",
    "completions": "Go on with a text",
    "responses": "Answer, in the form of OpenAI's Responses API",
    "messages": "Answer, in the form of Anthropic's Messages API",
    "messages/count_tokens": "Count the tokens of a conversation, in the form of Anthropic's API",
    "embeddings": "Texts as vectors",
    "rerank": "Sort documents by how well they answer a question",
    "audio/transcriptions": "Write down what is said in a recording",
}
_ERRORS: Final = (
    *(UnreadableBody, BadRequest, RequestTimeout, PayloadTooLarge),
    *(NotFound, NoName, UnknownName, ServerFailed, ServerSilent, QueueFull, RateLimitExceeded, ServiceUnavailable),
)


class GatewayRoutes:
    """The handlers of the gateway."""

    def __init__(self, services: Services, connections: ServerConnections, lanes: Lanes) -> None:
        self._services = services
        self._names = ModelNames(services.registry, services.effective)
        self._lanes = lanes
        self._rates = TokenRates(services.configuration)
        self._automatic = Automatic(self._names, services.tiers, services.active_profile)
        self._tallies = services.tallies
        self._relay = Relay(connections, lambda: services.settings.gateway_timeout)

    def routes(self) -> tuple[Route, ...]:
        """The routes, each with all that is to be known of it."""
        return (
            Route(
                "GET",
                "/v1/models",
                self.list_models,
                Access.KNOWN,
                "The models that can be asked for",
                _TAG,
                {200: None},
            ),
            Route(
                "GET",
                "/v1/models/{model}",
                self.get_offered_model,
                Access.KNOWN,
                "One of the models that can be asked for, by any of its names",
                _TAG,
                {200: None},
                errors=(UnknownName, ServiceUnavailable),
            ),
            *(self._route("POST", f"/v1/{path}", self._by_body, summary) for path, summary in _V1.items()),
            self._route("POST", "/v1/{path}", self._by_body, "Whatever else the model's llama-server serves below /v1"),
            *(self._route("POST", path, self._by_body, f"llama-server's own {path}") for path in NATIVE_PATHS),
            *(
                self._route(
                    method, "/api/proxy/{modelId}/{path}", self._by_path, "Any path of the server of a model named here"
                )
                for method in ("GET", "POST")
            ),
        )

    async def list_models(self, _: web.Request) -> web.Response:
        """GET /v1/models."""
        return answer(to_json({"object": "list", "data": self._entries()}))

    async def get_offered_model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{model}."""
        name, entries = request.match_info["model"], {str(entry["id"]): entry for entry in self._entries()}
        entry = entries.get(name) or entries.get(self._names.model(name).model_id)
        if entry is None:
            raise UnknownName(f"{name} is not enabled: GET /v1/models lists what can be asked for", {"model": name})
        return answer(to_json(entry))

    def _entries(self) -> list[dict[str, object]]:
        tiers = [self._tier_entry(tier, models) for tier in Tier if (models := self._services.tiers.of(tier))]
        return [*(self._entry(model) for model in self._offered()), *tiers, *self._auto_entry()]

    def _offered(self) -> list[Model]:
        models = self._services.registry.models.values()
        return [model for model in models if model.choices.enabled or self._services.servers.is_wanted(model.model_id)]

    def _entry(self, model: Model) -> dict[str, object]:
        facts = model.facts
        kind, senses = self._services.tiers.kind_of(model), self._services.tiers.senses(model)
        capabilities = {
            **{each.value: each is kind for each in Kind},
            **{sense.value: sense in senses for sense in Sense},
            "thinking": model.effective_thinking,
        }
        return {
            "id": model.model_id,
            "object": "model",
            "created": 0,
            "owned_by": "magi-agent",
            "aliases": self._names.names_of(model),
            "state": self._services.servers.state(model.model_id),
            "tier": model.effective_tier,
            "context_length": context_length(facts, self._services.effective.of(model)),
            "capabilities": [name for name, has_it in capabilities.items() if has_it],
        }

    def _auto_entry(self) -> list[dict[str, object]]:
        models = [model for tier in Tier for model in self._services.tiers.of(tier)]
        if not models or not self._automatic.is_meant(AUTO):
            return []
        return [{**self._tier_entry(models[0].effective_tier, models), "id": AUTO, "tier": None}]

    def _tier_entry(self, tier: Tier, models: list[Model]) -> dict[str, object]:
        entries = [self._entry(model) for model in models]
        lengths = [length for entry in entries if isinstance(length := entry["context_length"], int)]
        capabilities = dict.fromkeys(name for entry in entries for name in cast("list[str]", entry["capabilities"]))
        return {
            **self._entry(self._services.tiers.best(models)),
            "id": f"{PREFIX}{tier}",
            "aliases": [],
            # What each of them can take.
            "context_length": min(lengths, default=None),
            "capabilities": list(capabilities),
            "models": [model.model_id for model in models],
        }

    async def _by_body(self, request: web.Request) -> web.StreamResponse:
        came_at = time.monotonic()
        _check_plain(request.rel_url.raw_path)
        body = await received(request, self._services.settings.gateway_max_body, _BODY_SECONDS)
        field = await self._field(request, body)
        tiers, kind, needs = self._services.tiers, Kind.COMPLETION, NOTHING
        tier = tiers.tier(field.name)
        is_automatic = self._automatic.is_meant(field.name)
        if tier is None and not is_automatic:
            model = self._names.model(field.name)
        else:
            kind, needs = kind_for(request.path), await self._needed(request.path, body)
            if tier is not None:
                model = await tiers.choose(tier, kind, needs)
            else:
                choice = await self._automatic.choose(body, kind, needs, is_chat=request.path == _CHAT)
                tier, model = choice.tier, choice.model
                request[ANSWER_HEADERS].update(choice.headers())
                if (staged := await self._in_two_stages(request, body, field, choice, needs)) is not None:
                    return staged

        async def asked() -> ServerAnswer:
            renamed = field.renamed(body, model.model_id)
            return await self._asked(request, model, request.rel_url.raw_path_qs, renamed, came_at)

        async def asked_or_again() -> ServerAnswer:
            try:
                return await asked()
            except ServerUnreachable:
                return await asked()

        response: web.StreamResponse
        if self._streams_later(field, model, came_at):
            response = AwaitedAnswer(model.model_id, asked_or_again)
        else:
            try:
                response = RelayedAnswer(await asked())
            except ServerUnreachable:
                # Nothing was begun: another one of its tier is asked, or the same one, which is waited for now.
                other = tiers.another(tier, kind, model, needs) if tier is not None else None
                model = other or model
                if self._streams_later(field, model, came_at):
                    response = AwaitedAnswer(model.model_id, asked)
                else:
                    response = RelayedAnswer(await asked())
        response.headers[MODEL_HEADER] = model.model_id
        return response

    def _streams_later(self, field: ModelField, model: Model, came_at: float) -> bool:
        """Whether a stream is asked for that begins before its model is ready. Raises ``QueueFull``."""
        try:
            return field.wants_stream and self._lanes.has_to_wait(model)
        except QueueFull as error:
            self._tallies.refused(model.model_id, came_at, error)
            raise

    async def _in_two_stages(
        self, request: web.Request, body: bytes, field: ModelField, choice: Choice, needs: frozenset[Sense]
    ) -> web.StreamResponse | None:
        """What two models make of a request; ``None`` where one is to answer it."""
        if choice.drafter is None:
            return None

        async def ask(model: Model, sent: bytes) -> ServerAnswer:
            return await self._asked(request, model, request.rel_url.raw_path_qs, sent, time.monotonic())

        try:
            # Where the second one is not to be had, a draft would be for nothing.
            self._lanes.has_to_wait(choice.model)
            has_to_wait = self._lanes.has_to_wait(choice.drafter.model)
        except QueueFull:
            return None
        stages = TwoStages(
            choice.model,
            choice.drafter,
            named=lambda model: field.renamed(body, model.model_id),
            ask=ask,
            another=lambda than: self._services.tiers.another(choice.tier, Kind.COMPLETION, than, needs),
        )
        response = await stages.response(wants_stream=field.wants_stream, has_to_wait=has_to_wait)
        if response is not None:
            response.headers[MODEL_HEADER] = stages.model.model_id
        return response

    async def _by_path(self, request: web.Request) -> web.StreamResponse:
        came_at = time.monotonic()
        path = "/" + request.rel_url.raw_path.split("/", 4)[4]
        _check_plain(path)
        if not _INFERENCE.fullmatch(path) and Access.ADMIN not in request[CALLER].access:
            raise Forbidden(f"{path} of a server is for admins: it shows or changes how the server is run")
        model = self._services.registry.model(request.match_info["modelId"])
        most = self._services.settings.gateway_max_body
        body = await received(request, most, _BODY_SECONDS) if request.can_read_body else None
        query = request.rel_url.raw_query_string
        asked = f"{path}?{query}" if query else path
        try:
            return RelayedAnswer(await self._asked(request, model, asked, body, came_at))
        except ServerUnreachable:
            if request.method in SAFE_METHODS:
                raise
            return RelayedAnswer(await self._asked(request, model, asked, body, came_at))

    async def _asked(
        self, request: web.Request, model: Model, path: str, body: bytes | None, came_at: float
    ) -> ServerAnswer:
        """The answer of a model's server, which is waited for; it is in use until that answer is left.

        A GET or a HEAD only looks: it waits for no model, and a monitor that comes again and again keeps none up.
        """
        only_looks = request.method in SAFE_METHODS
        tally = self._tallies.of(model.model_id, came_at, counts=not only_looks)
        use = ModelUse(tally)
        try:
            reach = self._lanes.looked_at(model) if only_looks else await use.let_in(self._lanes.entered(model))
            tally.let_in()
            answer = await self._relay.pass_on(request, model.model_id, reach, path, body, tally)
        except BaseException as error:  # who asked may have left, too; it goes on its way
            if isinstance(error, ServerUnreachable | ServerEnded):
                # Before the next one is let through in its place.
                self._lanes.refused(model.model_id, may_live=isinstance(error, ServerEnded))
            use.end(error)
            raise
        answer.hold(use)
        return answer

    def _route(self, method: str, path: str, act: Handler, summary: str) -> Route:
        async def handle(request: web.Request) -> web.StreamResponse:
            connection = connection_of(request)
            # Where the agent stops meanwhile, it lets this end first; where the client leaves, so does its request.
            connection.asks_model = True
            connection.cancel_when_lost()
            caller = request[CALLER]
            if caller.token is not None:
                self._rates.count(caller.token, request[ANSWER_HEADERS])
            if not self._services.opening.is_open:
                await self._services.opening.wait()
            return await act(request)

        words = re.findall(r"[a-zA-Z0-9]+", path)
        handle.__name__ = "_".join((method.lower(), *words))
        errors = (*_ERRORS, ModelNotFound, Forbidden) if "{modelId}" in path else _ERRORS
        return Route(method, path, handle, Access.INFER, summary, _TAG, {200: None}, errors=errors)

    @staticmethod
    async def _field(request: web.Request, body: bytes) -> ModelField:
        read = model_field
        if request.content_type == _MULTIPART:
            boundary = parse_mimetype(request.headers["Content-Type"]).parameters.get("boundary", "")
            read = partial(form_field, boundary=boundary)
        return await asyncio.to_thread(read, body) if len(body) > _LARGE else read(body)

    @staticmethod
    async def _needed(path: str, body: bytes) -> frozenset[Sense]:
        return await asyncio.to_thread(needed, path, body) if len(body) > _LARGE else needed(path, body)


def _check_plain(path: str) -> None:
    if not _PLAIN.fullmatch(path):
        raise NotFound(f"no llama-server has a path like {path}", {"path": path})
