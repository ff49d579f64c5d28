"""A stand-in for the agent, from the contract's own words, that can be told to answer wrongly.

It is here for what the real agent must never do: a wrong status, a wrong shape, a key in snake_case, a change that is
not made. It is checked itself: `magictl check` passes against it as long as it is told no fault.
"""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from magi_agent.runtime_settings.settings import setting_names, wire_name

Answer = tuple[int, Any]
Fault = Callable[[str, str, Answer], Answer]
"""Takes method, path and the right answer, and returns the wrong one; what it returns as bytes is sent as it is."""

TIERS = ["fast", "balanced", "powerful"]
_OLD_SETTINGS = {"nGpuLayers": None, "ctxSize": None, "nThreads": None, "batchSize": None}
_NO_SETTINGS = {wire_name(name): None for name in setting_names()}
HELD_SECONDS = 30.0
"""How long a request is held at most, and one that should come is waited for."""


class BreakOff(Exception):
    """What a fault raises to have the connection closed: at once, or in the midst of the answer's body."""

    def __init__(self, *, in_body: bool = False) -> None:
        super().__init__("told to break off")
        self.in_body = in_body


def model(model_id: str, **changes: Any) -> dict[str, Any]:
    """A Model as the contract has it."""
    return {
        "filePath": f"/models/{model_id}.gguf",
        "filename": f"{model_id}.gguf",
        "family": "qwen",
        "version": "2.5",
        "sizeParams": 7.0,
        "quantization": "q4_k_m",
        "isThinkingModel": False,
        "thinkingOverride": None,
        "isInstruct": True,
        "isCoder": False,
        "assignedTier": "balanced",
        "tierOverride": None,
        "port": 8080,
        "enabled": False,
        **_OLD_SETTINGS,
        "modelId": model_id,
        "displayName": model_id,
        "effectiveTier": "balanced",
        "effectiveThinking": False,
        "architecture": "qwen2",
        "contextLength": 32768,
        "sizeBytes": 4_683_073_952,
        "parts": [f"/models/{model_id}.gguf"],
        "projectorPath": None,
        "projectors": [],
        "hasVision": False,
        "hasAudio": False,
        "isEmbedding": False,
        "isReranker": False,
        "chatTemplate": True,
        "status": "ok",
        "problem": None,
        "parameterCount": 7_615_616_512,
        "activeParams": None,
        "thinkingMode": "none",
        "startPolicy": "alwaysOn",
        "runtimeSettings": dict(_NO_SETTINGS),
        **changes,
    }


def server(model_id: str, **changes: Any) -> dict[str, Any]:
    """A Server as the contract has it."""
    return {
        "modelId": model_id,
        "displayName": model_id,
        "port": 8080,
        "pid": 4711,
        "isReady": True,
        "isRunning": True,
        "uptimeSeconds": 7385,
        "tier": "balanced",
        "isThinking": False,
        "unit": f"magi-llama-{model_id}.service",
        "state": "ready",
        "url": "http://127.0.0.1:8080",
        "restarts": 0,
        "memoryBytes": 5_100_000_000,
        "cpuSeconds": 12.5,
        "failure": None,
        "retryInSeconds": None,
        "restartRequired": False,
        "restartReasons": [],
        **changes,
    }


def failure(**changes: Any) -> dict[str, Any]:
    """Why a server failed."""
    return {
        "at": "2026-01-02T03:04:05Z",
        "result": "exit-code",
        "message": "llama-server ended with exit status 1",
        "advice": None,
        "exitStatus": 1,
        "signal": None,
        "restarts": 3,
        "invocationId": "0123456789abcdef",
        "logLines": ["loading the model", "error: out of memory"],
        **changes,
    }


def profile(name: str) -> dict[str, Any]:
    """A Profile with the contract's defaults."""
    tiers = zip(TIERS, (3.0, 7.0, None), (2, 5, 15), strict=True)
    return {
        "name": name,
        "description": "",
        "enabledModels": [],
        "tierConfig": [
            {"name": tier, "maxScore": score, "expectedTimeSeconds": seconds, "description": ""}
            for tier, score, seconds in tiers
        ],
        "twoStage": {"enabled": False, "stage1Tier": "balanced", "stage2Tier": "powerful", "stage1MaxTokens": 500},
        "loadBalancing": {"enabled": True, "strategy": "round_robin", "healthCheckInterval": 30},
        "runtimeSettings": {},
    }


def error(status: int, kind: str, message: str = "", **details: Any) -> Answer:
    """An error in the one form they have."""
    return status, {"error": kind, "message": message or f"{kind}: a sentence", "details": details}


@dataclass
class StandIn:
    """The stand-in's state, and the faults it has been told."""

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: profile(name) for name in ("development", "fast-only", "production")}
    )
    health: dict[str, Any] = field(default_factory=lambda: {"status": "ready", "systemdScope": "user"})
    operations: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By model; there is no such path for a model that is not in it, as with an agent of the time before."""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """By model: what it says of its settings."""
    active: str | None = None
    """The active profile's slug."""
    host: dict[str, Any] = field(default_factory=dict)
    """The host's default settings, as on the wire."""
    ports: list[int] = field(default_factory=lambda: [8080, 8099])
    draining: bool = False
    offered: list[dict[str, Any]] = field(default_factory=list)
    """What the gateway lists."""
    imported: list[Any] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    """What was sent, request by request, beside ``seen``."""
    fault: Fault | None = None
    ignored: set[str] = field(default_factory=set)
    """Choices that it says it made, and does not make."""
    headers: dict[str, str] = field(default_factory=lambda: {"X-Request-ID": "r1", "X-Response-Time": "0.001"})
    seen: list[tuple[str, str]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)
    held: threading.Event = field(default_factory=threading.Event)
    """Set when a request that was to be held may be answered; see ``hold``."""
    url: str = ""
    _to_hold: tuple[str, str] = ("", "")

    def add(self, *models: dict[str, Any]) -> None:
        """Have these models too."""
        self.models |= {one["modelId"]: one for one in models}

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Everything that a person may have chosen."""
        names = ("tierOverride", "thinkingOverride", "enabled", "port")
        return {model_id: tuple(one[name] for name in names) for model_id, one in self.models.items()}

    def wait_for(self, method: str, ending: str) -> None:
        """Wait until such a request has come; fail after a while."""

        def has_come() -> bool:
            return any(seen == method and path.endswith(ending) for seen, path in self.seen)

        with self.arrived:
            assert self.arrived.wait_for(has_come, HELD_SECONDS), f"no {method} …{ending} came: {self.seen}"

    def always(self, status: int, body: Any) -> None:
        """Answer every request in this way."""
        self.fault = lambda *_: (status, body)

    def hold(self, method: str, ending: str) -> None:
        """Do what such requests ask for, and answer them, only when ``held`` is set."""
        self._to_hold = method, ending

    def answer(self, method: str, target: str, body: Any) -> Answer:
        """Answer one request, rightly or as the fault says."""
        path = urlsplit(target).path
        with self.arrived:
            self.seen.append((method, target))
            self.bodies.append(body)
            self.arrived.notify_all()
        if method == self._to_hold[0] and path.endswith(self._to_hold[1]):
            self.held.wait(HELD_SECONDS)
        right = self._right_answer(method, path, body, urlsplit(target).query)
        return self.fault(method, path, right) if self.fault else right

    def _right_answer(self, method: str, path: str, body: Any, query: str) -> Answer:
        match (method, [unquote(part) for part in path.strip("/").split("/")]):
            case "GET", [""]:
                return 200, {"name": "magi-agent", "version": "0.1.0", "docs": "/api/docs", "status": "running"}
            case "GET", ["health" | "v1" as what, "ready" | "models"]:
                return self._told(what)
            case "GET", ["api", "operations", operation_id] if operation_id in self.operations:
                return 200, self.operations[operation_id]
            case _, ["api", ("drain" | "export" | "import") as what]:
                return self._host(method, what, body, query)
            case "PUT", ["api", "models", "port-range"]:
                self.ports = body["portRange"] or [8080, 8099]
                outside = [name for name, one in self.models.items() if not self._in_range(one["port"])]
                return 200, {"message": "Port range set", "portRange": self.ports, "outside": outside}
            case _, ["api", "models", model_id, ("settings" | "memory") as what] if model_id in self.models:
                return self._memory(model_id) if what == "memory" else self._settings(method, model_id, body)
            case "PUT", ["api", "models", model_id, "port"] if model_id in self.models:
                return self._port(model_id, body["port"])
            case "POST", ["api", "models", "profiles", slug, "activate"]:
                return self._activate(slug, dry_run="dryRun=true" in query)
            case _, ["api", "models", "servers", *rest]:
                return self._server(method, rest)
            case _, ["api", "models", "profiles", *rest]:
                return self._profile(method, rest, body)
            case _, ["api", "models", *rest]:
                return self._model(method, rest, body)
            case _:
                return error(404, "NotFound")

    def _told(self, what: str) -> Answer:
        if what == "v1":
            return 200, {"object": "list", "data": self.offered}
        return (200 if self.health["status"] == "ready" else 503), self.health

    def _model(self, method: str, rest: list[str], body: Any) -> Answer:
        match method, rest:
            case "GET", ["registry"]:
                return 200, self._registry()
            case "POST", ["rescan"]:
                return 200, {
                    "message": "Re-scan completed successfully",
                    "modelsFound": len(self.models),
                    "modelsAdded": 0,
                    "modelsRemoved": 0,
                    "timestamp": "2026-01-02T03:04:05Z",
                }
            case "GET", ["tiers", tier]:
                if tier not in TIERS:
                    return error(400, "InvalidTier", tier=tier, validTiers=TIERS)
                return 200, [one for one in self.models.values() if one["effectiveTier"] == tier]
            case _, [model_id, *_] if model_id not in self.models:
                return no_such_model(model_id)
            case "PUT", [model_id, choice]:
                return self._choose(model_id, choice, body)
            case "GET", [model_id]:
                return 200, {**self.models[model_id], "server": self.servers.get(model_id, server(model_id))}
            case _:
                return error(404, "NotFound")

    def _registry(self) -> dict[str, Any]:
        return {
            "models": self.models,
            "scanPath": "/models",
            "lastScan": "2026-01-02T03:04:05Z",
            "portRange": self.ports,
            "tierThresholds": {"powerful_min": 14.0, "fast_max": 7.0},
            "scanPaths": ["/models"],
            "allowedFlags": [],
        }

    def _server(self, method: str, rest: list[str]) -> Answer:
        match method, rest:
            case "GET", []:
                listed = list(self.servers.values())
                ready = sum(one["isReady"] is True for one in listed)
                return 200, {"totalServers": len(listed), "readyServers": ready, "servers": listed}
            case "POST", [("start-all" | "stop-all" | "restart-changed") as kind]:
                return 202, self._operation(kind)
            case "POST", [model_id, ("start" | "stop" | "restart") as verb]:
                return self._act(model_id, verb)
            case _:
                return error(404, "NotFound")

    def _operation(self, kind: str) -> dict[str, Any]:
        state = "stopped" if kind == "stop-all" else "ready"
        part = {"status": "succeeded", "state": state, "message": f"is {state}"}
        chosen = [one["modelId"] for one in self.models.values() if one["enabled"]]
        if kind == "restart-changed":
            chosen = [one["modelId"] for one in self.servers.values() if one["restartRequired"]]
        operation = {
            "id": f"op{len(self.operations)}",
            "kind": kind,
            "status": "succeeded",
            "startedAt": "2026-01-02T03:04:05Z",
            "finishedAt": "2026-01-02T03:04:06Z",
            "models": {model_id: dict(part) for model_id in chosen},
        }
        self.operations[str(operation["id"])] = operation
        return operation

    def _act(self, model_id: str, verb: str) -> Answer:
        if model_id not in self.models:
            return no_such_model(model_id)
        state = "stopped" if verb == "stop" else "ready"
        message = f"Model {model_id} is {state}"
        self.servers[model_id] = server(model_id, state=state, isReady=state == "ready")
        return 200, {"message": message, "modelId": model_id, "changed": True, "server": self.servers[model_id]}

    def _profile(self, method: str, rest: list[str], body: Any) -> Answer:
        if method == "GET" and not rest:
            return 200, sorted(self.profiles)
        if method == "GET" and rest == ["active"]:
            return 200, {"name": self.active, "profile": self.profiles.get(self.active or ""), "problem": None}
        slug = rest[0] if rest else body["name"].lower().replace(" ", "-").replace("_", "-")
        if method == "POST":
            if slug in self.profiles:
                return error(409, "ProfileExists")
            self.profiles[slug] = {**profile(body["name"]), **body}
            path = f"/profiles/{slug}.yaml"
            message = f"Profile '{body['name']}' created successfully"
            return 201, {"message": message, "profileName": slug, "path": path}
        if slug not in self.profiles:
            return error(404, "ProfileNotFound", profileName=slug, availableProfiles=sorted(self.profiles))
        if method == "GET":
            return 200, self.profiles[slug]
        if method == "PUT":
            self.profiles[slug] = {**profile(slug), **{wire_name(key): value for key, value in body.items()}}
            path, message = f"/profiles/{slug}.yaml", f"Profile '{slug}' replaced successfully"
            return 200, {"message": message, "profileName": slug, "path": path}
        if slug == self.active:
            return error(409, "ProfileActive", f"profile {slug!r} is active; activate another first")
        del self.profiles[slug]
        return 200, {"message": f"Profile '{slug}' deleted successfully"}

    def _activate(self, slug: str, *, dry_run: bool) -> Answer:
        if slug not in self.profiles:
            return error(404, "ProfileNotFound", profileName=slug, availableProfiles=sorted(self.profiles))
        named = self.profiles[slug]["enabledModels"]
        wanted = {name for name in named if name in self.models}
        enabled = {name for name, one in self.models.items() if one["enabled"]}
        running = {name for name, one in self.servers.items() if one["isRunning"]}
        plan = {
            "message": f"Profile '{slug}' {'would be activated' if dry_run else 'is active'}",
            "profile": slug,
            "dryRun": dry_run,
            "enable": sorted(wanted - enabled),
            "disable": sorted(enabled - wanted),
            "start": sorted(wanted - running),
            "stop": sorted(running - wanted),
            "restart": sorted(running & wanted & self.profiles[slug]["runtimeSettings"].keys()),
            "keep": sorted(running & wanted),
            "absent": [],
            "unknown": sorted(set(named) - wanted),
            "unusable": {name: "it is cut" for name in wanted if self.models[name]["status"] != "ok"},
            "insufficientMemory": {},
            "settingsNotUsable": {},
            "warnings": {name: said for name, said in self.warnings.items() if name in wanted},
            "operationId": None,
        }
        if dry_run:
            return 200, plan
        self.active = slug
        for name, one in self.models.items():
            one["enabled"] = name in wanted
        operation = self._operation("activate")
        return 202, {**plan, "operationId": operation["id"]}

    def _memory(self, model_id: str) -> Answer:
        if model_id not in self.memory:
            return 404, {"error": "NotFound", "message": "there is nothing here", "details": {}}
        return 200, self.memory[model_id]

    def _settings(self, method: str, model_id: str, body: Any) -> Answer:
        chosen = self.models[model_id]
        if method == "PUT":
            body = {wire_name(key): value for key, value in body.items()}
            unknown = [key for key in body if key not in _NO_SETTINGS]
            if unknown:
                faults = [{"field": key, "message": "is no setting"} for key in unknown]
                return error(422, "ValidationError", "the request is not valid", errors=faults)
            chosen["runtimeSettings"] = {**_NO_SETTINGS, **body}
        own = {key: value for key, value in chosen["runtimeSettings"].items() if value is not None}
        by_profile = self.profiles[self.active]["runtimeSettings"].get(model_id, {}) if self.active else {}
        layers = {"host": self.host, "model": own, "profile": by_profile}
        answer = {
            "modelId": model_id,
            "runtimeSettings": chosen["runtimeSettings"],
            "effective": {**_NO_SETTINGS, **self.host, **own, **by_profile},
            "sources": {key: source for source, layer in layers.items() for key in layer},
            "warnings": self.warnings.get(model_id, []),
        }
        if method == "GET":
            return 200, answer
        runs = model_id in self.servers
        reasons = ["its settings have changed"] if runs else []
        return 200, {"message": "Settings set", **answer, "restartRequired": runs, "restartReasons": reasons}

    def _in_range(self, port: int | None) -> bool:
        return port is None or self.ports[0] <= port <= self.ports[1]

    def _port(self, model_id: str, port: int | None) -> Answer:
        for other, one in self.models.items():
            if port is not None and one["port"] == port and other != model_id:
                return error(409, "PortInUse", f"port {port} is that of {other}", modelId=other)
        if not self._in_range(port):
            return error(422, "ValidationError", f"port {port} is outside of {self.ports}")
        self.models[model_id]["port"] = port
        runs = model_id in self.servers
        return 200, {"message": "Port set", "modelId": model_id, "port": port, "restartRequired": runs}

    def _host(self, method: str, what: str, body: Any, query: str) -> Answer:
        match method, what:
            case "PUT", "drain":
                self.draining = body["draining"]
                since = "2026-01-02T03:04:05Z" if self.draining else None
                return 200, {"message": "Draining", "draining": self.draining, "since": since, "by": "a test"}
            case "GET", "export":
                models = {name: {"enabled": one["enabled"]} for name, one in self.models.items()}
                return 200, {"version": 1, "models": models, "profiles": self.profiles, "activeProfile": self.active}
            case "POST", "import":
                dry_run = "dryRun=true" in query
                if not dry_run:
                    self.imported.append(body)
                known = [name for name in body["models"] if name in self.models]
                return 200, {
                    "message": "Imported",
                    "dryRun": dry_run,
                    "changed": known,
                    "unchanged": [],
                    "unknown": [name for name in body["models"] if name not in self.models],
                    "profiles": sorted(body.get("profiles", {})),
                    "problems": [],
                }
            case _:
                return error(405, "MethodNotAllowed")

    def _choose(self, model_id: str, choice: str, body: Any) -> Answer:
        chosen = self.models[model_id]
        before = dict(chosen)
        value = body[choice]
        said: dict[str, Any] = {"modelId": model_id, choice: value}
        if choice == "tier":
            if value is not None and value not in TIERS:
                return error(400, "InvalidTier", tier=value, validTiers=TIERS)
            chosen["tierOverride"] = value
            said |= {"message": f"Tier updated for {model_id}", "override": True}
        elif choice == "thinking":
            moves = value is True and chosen["tierOverride"] is None
            chosen["thinkingOverride"] = value
            chosen["tierOverride"] = "powerful" if moves else chosen["tierOverride"]
            message = f"Thinking capability updated for {model_id}"
            said |= {"message": message, "override": True, "tierChanged": moves}
        else:
            if value and chosen["status"] != "ok":
                return error(409, "ModelNotUsable", f"model {model_id} cannot be used: {chosen['problem']}")
            chosen["enabled"] = value
            message = f"Model {model_id} {'enabled' if value else 'disabled'}"
            said |= {"message": message, "restartRequired": value is not (model_id in self.servers)}
        chosen["effectiveTier"] = chosen["tierOverride"] or chosen["assignedTier"]
        thinking = chosen["thinkingOverride"]
        chosen["effectiveThinking"] = chosen["isThinkingModel"] if thinking is None else thinking
        if choice in self.ignored:
            self.models[model_id] = before
        return 200, said


def no_such_model(model_id: str) -> Answer:
    """The agent's word on an id that no model has."""
    message = f"no model has the id {model_id!r}; GET /api/models/registry lists them"
    return error(404, "ModelNotFound", message, modelId=model_id)


def read_only(method: str, path: str, right: Answer) -> Answer:
    """The fault of an agent that lets its caller read only."""
    if method == "GET":
        return right
    return error(403, "Forbidden", "a caller on TCP may not do this; use the unix socket", needs="admin", has="read")


@contextmanager
def standing_in(stand_in: StandIn, path: Path | None = None) -> Iterator[StandIn]:
    """Serve ``stand_in`` on a port of its own, or on a unix socket at ``path``, until the block is left."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            try:
                status, answer = stand_in.answer(self.command, self.path, body)
            except BreakOff as order:
                self.close_connection = True
                if order.in_body:
                    self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"models": {')
                return
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **stand_in.headers}
            if status == 201 and "profileName" in answer:
                headers["Location"] = f"{self.path}/{answer['profileName']}"
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815  # http.server finds them by these names

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with _OnUnixSocket(str(path), Handler) if path else _OnTcp(("127.0.0.1", 0), Handler) as listener:
        stand_in.url = str(path) if path else f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            stand_in.held.set()
            listener.shutdown()
            thread.join(5)


class _OnUnixSocket(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that goes away is what some tests are for."""


class _OnTcp(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing, as above."""
