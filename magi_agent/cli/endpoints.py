"""The checks of the eleven endpoints, one method each.

A check sends what the endpoint is for, and compares status, headers and shape of the answer with the contract. What it
changes it puts back before it ends; what it could not put back stays in the undo list.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from magi_agent.cli import contract
from magi_agent.cli.answers import models_of, record, texts
from magi_agent.cli.client import Client, Json, Reply
from magi_agent.cli.exits import CommandError
from magi_agent.cli.interrupts import Interrupts
from magi_agent.cli.phrasing import counted
from magi_agent.cli.rescan import RESCAN_SECONDS
from magi_agent.cli.shapes import Shape, exactly, list_of, text
from magi_agent.cli.target import Target, choose
from magi_agent.cli.undo import Step, UndoList
from magi_agent.vocabulary import Tier

ANSWER_SECONDS = 30.0
NO_SUCH_MODEL = "magictl-check-no-such-model"
_OK, _CREATED, _BAD, _MISSING, _CONFLICT = 200, 201, 400, 404, 409


class Result(StrEnum):
    """What a check can come to."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass
class Finding:
    """What one check found."""

    status: int | None = None
    """The HTTP status of the endpoint's first answer."""
    seconds: float = 0.0
    """How long that answer took."""
    problems: list[str] = field(default_factory=list)
    skipped: bool = False
    """Whether what the endpoint is for could not be tried; ``note`` says why, and what was checked instead."""
    note: str = ""

    @property
    def result(self) -> "Result":
        """What it comes to."""
        if self.problems:
            return Result.FAILED
        return Result.SKIPPED if self.skipped else Result.PASSED


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the eleven, and its check."""

    name: str
    method: str
    path: str
    check: Callable[["EndpointChecks", Finding], None]


class EndpointChecks:
    """The checks, and what they learn from each other."""

    def __init__(self, client: Client, undo: UndoList, interrupts: Interrupts) -> None:
        self._client = client
        self._undo = undo
        self._interrupts = interrupts
        self._models: dict[str, Mapping[str, object]] = {}
        self._why_no_model = "the registry was not read"
        self._profiles: list[str] | None = None
        self._profile_name = f"magictl check {secrets.token_hex(4)}"
        self._slug = self._profile_name.replace(" ", "-")

    def run(self, endpoint: Endpoint) -> Finding:
        """Run one check. Raises ``InterruptedCheckError``."""
        finding = Finding()
        try:
            endpoint.check(self, finding)
        except CommandError as error:
            finding.problems.append(error.message)
        return finding

    def registry(self, finding: Finding) -> None:
        """GET /registry."""
        reply = self._expect(finding, "GET", "/registry", _OK, contract.REGISTRY)
        if reply.status != _OK:
            return
        body = record(reply.body)
        self._models = dict(models_of(body))
        self._why_no_model = "no models here"
        for model_id, model in self._models.items():
            if model.get("modelId") != model_id:
                finding.problems.append(f".models.{model_id}.modelId is another id")
        ports = body.get("portRange")
        if isinstance(ports, list) and len(ports) != 2:
            finding.problems.append(".portRange is not a pair")
        finding.note = counted(len(self._models), "model")

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
        reply = self._expect(finding, "GET", "/profiles", _OK, contract.PROFILE_NAMES)
        if reply.status != _OK:
            return
        slugs = texts(reply.body)
        self._profiles = slugs if slugs == reply.body else None
        if slugs != sorted(slugs):
            finding.problems.append("the slugs are not sorted")
        finding.note = ", ".join(slugs[:4]) + (", ..." if len(slugs) > 4 else "")

    def profile(self, finding: Finding) -> None:
        """GET /profiles/development."""
        if self._profiles is None or "development" in self._profiles:
            self._expect(finding, "GET", "/profiles/development", _OK, contract.PROFILE)
            return
        finding.skipped = True
        finding.note = "no such profile here: only its 404 was checked"
        missing = contract.error("ProfileNotFound", {"availableProfiles": list_of(text)})
        self._expect(finding, "GET", "/profiles/development", _MISSING, missing)

    def tiers(self, finding: Finding) -> None:
        """GET /tiers/{tier}."""
        reply = self._expect(finding, "GET", "/tiers/powerful", _OK, list_of(contract.MODEL))
        listed = reply.body if isinstance(reply.body, list) else []
        others = [item for item in listed if record(item).get("effectiveTier") != Tier.POWERFUL]
        if others:
            finding.problems.append(f"{len(others)} of the models listed are of another tier")
        if reply.status == _OK:
            self._expect(finding, "GET", "/tiers/gigantic", _BAD, _invalid_tier("gigantic"))
            finding.note = f"{len(listed)} powerful"

    def tier(self, finding: Finding) -> None:
        """PUT /{modelId}/tier."""
        if not self._models:
            self._skip(finding, self._why_no_model, "tier", {"tier": "fast"})
            return
        model = self._target(finding)
        new = next(tier.value for tier in Tier if tier not in {model.effective_tier, model.tier_override})
        self._undo.add(model.tier_step())
        path = model.path("tier")
        shape = contract.tier_set(model.model_id, new)
        if self._expect(finding, "PUT", path, _OK, shape, {"tier": new}).status == _OK:
            self._expect_choices(finding, model, {"tierOverride": new, "effectiveTier": new})
            self._expect(finding, "PUT", path, _BAD, _invalid_tier("gigantic"), {"tier": "gigantic"})
        self._put_back(finding, model, f"{new} and back")

    def thinking(self, finding: Finding) -> None:
        """PUT /{modelId}/thinking; ``true`` may set the tier override too, so both are put back."""
        if not self._models:
            self._skip(finding, self._why_no_model, "thinking", {"thinking": True})
            return
        model = self._target(finding)
        self._undo.add(model.tier_step())
        self._undo.add(model.thinking_step())
        moves = model.tier_override is None
        shape = contract.thinking_set(model.model_id, True, tier_changed=moves)
        if self._expect(finding, "PUT", model.path("thinking"), _OK, shape, {"thinking": True}).status == _OK:
            tier = Tier.POWERFUL.value if moves else model.tier_override
            expected = {"thinkingOverride": True, "effectiveThinking": True, "tierOverride": tier}
            self._expect_choices(finding, model, expected)
        self._put_back(finding, model, "true and back")

    def enabled(self, finding: Finding) -> None:
        """PUT /{modelId}/enabled; turned over only where nothing can come of it, else set to what it is."""
        model = self._target(finding) if self._models else None
        if model is None or (model.enabled and not model.usable):
            # Even to say again that a model is in use takes one that can be used.
            reason = self._why_no_model if model is None else "every model is in use, and none can be used"
            self._skip(finding, reason, "enabled", {"enabled": False})
            return
        new = not model.enabled if model.can_be_enabled_for_a_moment else model.enabled
        self._undo.add(model.enabled_step())
        shape = contract.enabled_set(model.model_id, new)
        if self._expect(finding, "PUT", model.path("enabled"), _OK, shape, {"enabled": new}).status == _OK:
            self._expect_choices(finding, model, {"enabled": new})
        word = "true" if new else "false"
        self._put_back(finding, model, f"{word} and back" if new != model.enabled else f"{word}, as it was")

    def rescan(self, finding: Finding) -> None:
        """POST /rescan."""
        reply = self._expect(finding, "POST", "/rescan", _OK, contract.RESCAN, seconds=RESCAN_SECONDS)
        if reply.status == _OK:
            finding.note = f"{record(reply.body).get('modelsFound')} found"

    def create_profile(self, finding: Finding) -> None:
        """POST /profiles."""
        path = f"/profiles/{self._slug}"
        self._undo.add(
            Step(f"the profile {self._slug}", "DELETE", f"/api/models{path}", None, self._profile_is_not_there)
        )
        body: Json = {"name": self._profile_name, "description": "made by magictl check"}
        shape = contract.profile_created(self._profile_name, self._slug)
        reply = self._expect(finding, "POST", "/profiles", _CREATED, shape, body)
        if reply.status == _CREATED:
            if not reply.headers.get("location", "").endswith(path):
                finding.problems.append(f"the header Location does not end in {path}")
            self._expect(finding, "GET", path, _OK, contract.PROFILE)
            self._expect(finding, "POST", "/profiles", _CONFLICT, contract.error("ProfileExists"), body)
        finding.note = self._slug

    def _profile_is_not_there(self, client: Client) -> bool:
        slugs = client.request("GET", "/api/models/profiles").body
        return isinstance(slugs, list) and self._slug not in slugs

    def delete_profile(self, finding: Finding) -> None:
        """DELETE /profiles/{name}."""
        path = f"/profiles/{self._slug}"
        shape = contract.profile_deleted(self._profile_name, self._slug)
        reply = self._expect(finding, "DELETE", path, _OK, shape)
        missing = contract.error("ProfileNotFound", {"availableProfiles": list_of(text)})
        if reply.status == _OK:
            self._expect(finding, "DELETE", path, _MISSING, missing)
        finding.note = self._slug

    def _target(self, finding: Finding) -> Target:
        """Return the model to try on, after what an earlier check had to leave behind is put back."""
        finding.problems += self._undo.put_back()
        return choose(self._models)

    def _skip(self, finding: Finding, reason: str, choice: str, body: Json) -> None:
        """Check no more of an endpoint than its 404, for want of a model to try it on."""
        finding.skipped = True
        finding.note = f"{reason}: only its 404 was checked"
        missing = contract.error("ModelNotFound")
        self._expect(finding, "PUT", f"/{NO_SUCH_MODEL}/{choice}", _MISSING, missing, body)

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
        begun = time.monotonic()
        with self._interrupts.request():
            reply = self._client.ask(method, f"/api/models{path}", body, timeout=seconds)
        is_first = finding.status is None
        if is_first:
            finding.status, finding.seconds = reply.status, time.monotonic() - begun
        problems = list(_differences(reply, status, shape))
        finding.problems += problems if is_first else [f"{method} {path}: {problem}" for problem in problems]
        return reply

    def _expect_choices(self, finding: Finding, model: Target, expected: Mapping[str, object]) -> None:
        """Note where the registry does not show what was just set."""
        with self._interrupts.request():
            registry = self._client.get("/api/models/registry", "models")
        shown = dict(models_of(registry)).get(model.model_id, {})
        for name, value in expected.items():
            finding.problems += exactly(value)(shown.get(name), f"afterwards, {name} of the model")

    def _put_back(self, finding: Finding, model: Target, done: str) -> None:
        """Put back what was tried on ``model``, and make sure that it is so."""
        finding.problems += self._undo.put_back()
        if not finding.problems:
            self._expect_choices(finding, model, model.choices)
        finding.note = model.model_id if finding.problems else f"{model.model_id}: {done}"


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
