"""The checks of the eleven endpoints, one method each.

A check sends what the endpoint is for, and compares status, headers and shape of the answer with the contract. What it
changes it puts back before it ends; what it could not put back stays in the undo list.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from magi_agent.cli import contract
from magi_agent.cli.answers import models_of, record, texts
from magi_agent.cli.client import Client, Json, Reply
from magi_agent.cli.exits import CommandError
from magi_agent.cli.shapes import Shape, exactly, list_of, text
from magi_agent.cli.target import Target, choose
from magi_agent.cli.undo import Step, UndoList
from magi_agent.vocabulary import Tier

ANSWER_SECONDS = 30.0
RESCAN_SECONDS = 900.0
NO_SUCH_MODEL = "magictl-check-no-such-model"
_OK, _CREATED, _BAD, _MISSING, _CONFLICT = 200, 201, 400, 404, 409


@dataclass
class Finding:
    """What one check found."""

    status: int | None = None
    """The HTTP status of the endpoint's first answer."""
    seconds: float = 0.0
    """How long that answer took."""
    problems: list[str] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the eleven, and its check."""

    name: str
    method: str
    path: str
    check: Callable[["EndpointChecks", Finding], None]


class InterruptedCheckError(Exception):
    """The person wants the check to end."""


class EndpointChecks:
    """The checks, and what they learn from each other. ``go_on`` is asked before each request."""

    def __init__(self, client: Client, undo: UndoList, go_on: Callable[[], bool]) -> None:
        self._client = client
        self._undo = undo
        self._go_on = go_on
        self._models: dict[str, Mapping[str, object]] = {}
        self._profiles: list[str] = []
        self._profile_name = f"magictl check {secrets.token_hex(4)}"
        self._slug = self._profile_name.replace(" ", "-")

    def run(self, endpoint: Endpoint) -> Finding:
        """Run one check. Raises ``InterruptedCheckError`` between two requests where ``go_on`` says no."""
        finding = Finding()
        try:
            endpoint.check(self, finding)
        except CommandError as error:
            finding.problems.append(error.message)
        return finding

    def registry(self, finding: Finding) -> None:
        """GET /registry."""
        reply = self._expect(finding, "GET", "/registry", _OK, contract.REGISTRY)
        body = record(reply.body)
        self._models = dict(models_of(body))
        for model_id, model in self._models.items():
            if model.get("modelId") != model_id:
                finding.problems.append(f".models.{model_id}.modelId is another id")
        ports = body.get("portRange")
        if isinstance(ports, list) and len(ports) != 2:
            finding.problems.append(".portRange is not a pair")
        finding.note = f"{len(self._models)} models" if self._models else "no models"

    def servers(self, finding: Finding) -> None:
        """GET /servers."""
        body = record(self._expect(finding, "GET", "/servers", _OK, contract.SERVERS).body)
        listed = body.get("servers")
        if isinstance(listed, list):
            ready = sum(record(server).get("isReady") is True for server in listed)
            if body.get("totalServers") != len(listed):
                finding.problems.append(f".totalServers is {body.get('totalServers')}, and {len(listed)} are listed")
            if body.get("readyServers") != ready:
                finding.problems.append(f".readyServers is {body.get('readyServers')}, and {ready} of them are ready")
            finding.note = f"{len(listed)} listed, {ready} ready"

    def profiles(self, finding: Finding) -> None:
        """GET /profiles."""
        body = self._expect(finding, "GET", "/profiles", _OK, contract.PROFILE_NAMES).body
        self._profiles = texts(body)
        if self._profiles != sorted(self._profiles):
            finding.problems.append("the slugs are not sorted")
        finding.note = ", ".join(self._profiles[:4]) + (", ..." if len(self._profiles) > 4 else "")

    def profile(self, finding: Finding) -> None:
        """GET /profiles/development."""
        if "development" in self._profiles:
            self._expect(finding, "GET", "/profiles/development", _OK, contract.PROFILE)
            return
        finding.note = "no such profile here: its 404 was checked"
        missing = contract.error("ProfileNotFound", {"availableProfiles": list_of(text)})
        self._expect(finding, "GET", "/profiles/development", _MISSING, missing)

    def tiers(self, finding: Finding) -> None:
        """GET /tiers/{tier}."""
        body = self._expect(finding, "GET", "/tiers/powerful", _OK, list_of(contract.MODEL)).body
        listed = body if isinstance(body, list) else []
        others = [item for item in listed if record(item).get("effectiveTier") != Tier.POWERFUL]
        if others:
            finding.problems.append(f"{len(others)} of the models listed are of another tier")
        self._expect(finding, "GET", "/tiers/gigantic", _BAD, _invalid_tier("gigantic"))
        finding.note = f"{len(listed)} powerful"

    def tier(self, finding: Finding) -> None:
        """PUT /{modelId}/tier."""
        model = self._target(finding, "tier", {"tier": "fast"})
        if model is None:
            return
        new = next(tier.value for tier in Tier if tier not in {model.effective_tier, model.tier_override})
        self._undo.add(model.tier_step())
        path = model.path("tier")
        self._expect(finding, "PUT", path, _OK, contract.tier_set(model.model_id, new), {"tier": new})
        self._expect_choices(finding, model, {"tierOverride": new, "effectiveTier": new})
        self._expect(finding, "PUT", path, _BAD, _invalid_tier("gigantic"), {"tier": "gigantic"})
        self._put_back(finding, model, f"{new} and back")

    def thinking(self, finding: Finding) -> None:
        """PUT /{modelId}/thinking; ``true`` may set the tier override too, so both are put back."""
        model = self._target(finding, "thinking", {"thinking": True})
        if model is None:
            return
        self._undo.add(model.tier_step())
        self._undo.add(model.thinking_step())
        moves = model.tier_override is None
        shape = contract.thinking_set(model.model_id, True, tier_changed=moves)
        self._expect(finding, "PUT", model.path("thinking"), _OK, shape, {"thinking": True})
        expected: dict[str, object] = {"thinkingOverride": True, "effectiveThinking": True}
        expected["tierOverride"] = Tier.POWERFUL.value if moves else model.tier_override
        self._expect_choices(finding, model, expected)
        self._put_back(finding, model, "true and back")

    def enabled(self, finding: Finding) -> None:
        """PUT /{modelId}/enabled; turned over only where nothing can come of it, else set to what it is."""
        model = self._target(finding, "enabled", {"enabled": False})
        if model is None:
            return
        new = not model.enabled if model.can_be_enabled_for_a_moment else model.enabled
        self._undo.add(model.enabled_step())
        shape = contract.enabled_set(model.model_id, new)
        self._expect(finding, "PUT", model.path("enabled"), _OK, shape, {"enabled": new})
        self._expect_choices(finding, model, {"enabled": new})
        word = "true" if new else "false"
        self._put_back(finding, model, f"{word} and back" if new != model.enabled else f"{word}, as it was")

    def rescan(self, finding: Finding) -> None:
        """POST /rescan."""
        reply = self._expect(finding, "POST", "/rescan", _OK, contract.RESCAN, seconds=RESCAN_SECONDS)
        finding.note = f"{record(reply.body).get('modelsFound')} found"

    def create_profile(self, finding: Finding) -> None:
        """POST /profiles."""
        path = f"/profiles/{self._slug}"
        self._undo.add(Step(f"the profile {self._slug}", "DELETE", f"/api/models{path}"))
        body: Json = {"name": self._profile_name, "description": "made by magictl check"}
        shape = contract.profile_created(self._profile_name, self._slug)
        reply = self._expect(finding, "POST", "/profiles", _CREATED, shape, body)
        if reply.status == _CREATED and not reply.headers.get("location", "").endswith(path):
            finding.problems.append(f"the header Location does not end in {path}")
        if reply.status == _CREATED:
            self._expect(finding, "GET", path, _OK, contract.PROFILE)
            self._expect(finding, "POST", "/profiles", _CONFLICT, contract.error("ProfileExists"), body)
        finding.note = self._slug

    def delete_profile(self, finding: Finding) -> None:
        """DELETE /profiles/{name}."""
        path = f"/profiles/{self._slug}"
        shape = contract.profile_deleted(self._profile_name, self._slug)
        reply = self._expect(finding, "DELETE", path, _OK, shape)
        missing = contract.error("ProfileNotFound", {"availableProfiles": list_of(text)})
        if reply.status == _OK:
            self._expect(finding, "DELETE", path, _MISSING, missing)
        finding.note = self._slug

    def _target(self, finding: Finding, what: str, body: Json) -> Target | None:
        """Return the model to try on. Where there is none, check the endpoint's 404 instead."""
        if self._models:
            return choose(self._models)
        finding.note = "no models here: its 404 was checked"
        missing = contract.error("ModelNotFound")
        self._expect(finding, "PUT", f"/{NO_SUCH_MODEL}/{what}", _MISSING, missing, body)
        return None

    def _expect(
        self,
        finding: Finding,
        method: str,
        path: str,
        status: int,
        shape: Shape,
        body: Json = None,
        seconds: float = ANSWER_SECONDS,
    ) -> Reply:
        """Send one request and note what is not as expected; the first of a check is the one that is timed."""
        if not self._go_on():
            raise InterruptedCheckError
        begun = time.monotonic()
        reply = self._client.ask(method, f"/api/models{path}", body, timeout=seconds)
        is_first = finding.status is None
        if is_first:
            finding.status, finding.seconds = reply.status, time.monotonic() - begun
        problems = list(_differences(reply, status, shape))
        finding.problems += problems if is_first else [f"{method} {path}: {problem}" for problem in problems]
        return reply

    def _expect_choices(self, finding: Finding, model: Target, expected: Mapping[str, object]) -> None:
        """Note where the registry does not show what was just set."""
        if finding.problems:
            return
        shown = dict(models_of(self._client.get("/api/models/registry"))).get(model.model_id, {})
        for name, value in expected.items():
            problems = exactly(value)(shown.get(name), f"afterwards, {name} of the model")
            finding.problems += problems

    def _put_back(self, finding: Finding, model: Target, done: str) -> None:
        """Put back what was tried on ``model``, and make sure that it is so."""
        finding.problems += self._undo.put_back()
        self._expect_choices(finding, model, model.choices)
        finding.note = f"{model.model_id}: {done}"


def _differences(reply: Reply, status: int, shape: Shape) -> Iterator[str]:
    if reply.status != status:
        said = record(reply.body).get("message")
        yield f"status {reply.status}, not {status}" + (f": {said}" if isinstance(said, str) else "")
        return
    if not reply.headers.get("content-type", "").startswith("application/json"):
        yield f"the header Content-Type is {reply.headers.get('content-type')!r}, not application/json"
    for name in ("X-Request-ID", "X-Response-Time"):
        if not reply.headers.get(name.lower()):
            yield f"the header {name} is missing"
    yield from shape(reply.body, "")


def _invalid_tier(tier: str) -> Shape:
    return contract.error("InvalidTier", {"tier": exactly(tier), "validTiers": list_of(contract.TIER)})


ENDPOINTS = (
    Endpoint("registry", "GET", "/api/models/registry", EndpointChecks.registry),
    Endpoint("servers", "GET", "/api/models/servers", EndpointChecks.servers),
    Endpoint("profiles", "GET", "/api/models/profiles", EndpointChecks.profiles),
    Endpoint("profile", "GET", "/api/models/profiles/development", EndpointChecks.profile),
    Endpoint("tiers", "GET", "/api/models/tiers/powerful", EndpointChecks.tiers),
    Endpoint("tier", "PUT", "/api/models/{id}/tier", EndpointChecks.tier),
    Endpoint("thinking", "PUT", "/api/models/{id}/thinking", EndpointChecks.thinking),
    Endpoint("enabled", "PUT", "/api/models/{id}/enabled", EndpointChecks.enabled),
    Endpoint("rescan", "POST", "/api/models/rescan", EndpointChecks.rescan),
    Endpoint("create profile", "POST", "/api/models/profiles", EndpointChecks.create_profile),
    Endpoint("delete profile", "DELETE", "/api/models/profiles/{name}", EndpointChecks.delete_profile),
)
"""In the order in which they are checked."""
