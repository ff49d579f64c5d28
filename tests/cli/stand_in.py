"""A stand-in for the agent, from the contract's own words, that can be told to answer wrongly.

It is here for what the real agent must never do: a wrong status, a wrong shape, a key in snake_case, a change that is
not made. It is checked itself: `magictl check` passes against it as long as it is told no fault.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, Any]
Fault = Callable[[str, str, Answer], Answer]
"""Takes method, path and the right answer, and returns the wrong one."""

TIERS = ["fast", "balanced", "powerful"]


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
        "nGpuLayers": None,
        "ctxSize": None,
        "nThreads": None,
        "batchSize": None,
        "modelId": model_id,
        "displayName": model_id,
        "effectiveTier": "balanced",
        "effectiveThinking": False,
        "architecture": "qwen2",
        "contextLength": 32768,
        "sizeBytes": 4_683_073_952,
        "parts": [f"/models/{model_id}.gguf"],
        "hasVision": False,
        "isEmbedding": False,
        "chatTemplate": True,
        "status": "ok",
        "problem": None,
        "parameterCount": 7_615_616_512,
        "activeParams": None,
        "thinkingMode": "none",
        "startPolicy": "alwaysOn",
        "runtimeSettings": {},
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
        "restartRequired": False,
        "restartReasons": [],
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


@dataclass
class StandIn:
    """The stand-in's state, and the faults it has been told."""

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: profile(name) for name in ("development", "fast-only", "production")}
    )
    fault: Fault | None = None
    headers: dict[str, str] = field(default_factory=lambda: {"X-Request-ID": "r1", "X-Response-Time": "0.001"})
    health: dict[str, Any] = field(default_factory=lambda: {"status": "ready"})
    seen: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Everything that a person may have chosen."""
        names = ("tierOverride", "thinkingOverride", "enabled", "port")
        return {model_id: tuple(one[name] for name in names) for model_id, one in self.models.items()}

    def answer(self, method: str, target: str, body: Any) -> Answer:
        """Answer one request, rightly or as the fault says."""
        path = urlsplit(target).path
        self.seen.append((method, target))
        right = self._right_answer(method, path, parse_qs(urlsplit(target).query), body)
        return self.fault(method, path, right) if self.fault else right

    def _right_answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Answer:
        match (method, path.strip("/").split("/")):
            case "GET", [""]:
                return 200, {"name": "magi-agent", "version": "0.1.0", "docs": "/api/docs", "status": "running"}
            case "GET", ["health", "ready"]:
                return (200 if self.health["status"] == "ready" else 503), self.health
            case "GET", ["api", "models", "registry"]:
                return 200, self._registry()
            case "GET", ["api", "models", "servers"]:
                listed = list(self.servers.values())
                ready = sum(one["isReady"] for one in listed)
                return 200, {"totalServers": len(listed), "readyServers": ready, "servers": listed}
            case "POST", ["api", "models", "servers", model_id, ("start" | "stop" | "restart") as verb]:
                return self._act(model_id, verb)
            case "POST", ["api", "models", "rescan"]:
                return 200, {
                    "message": "Re-scan completed successfully",
                    "modelsFound": len(self.models),
                    "modelsAdded": 0,
                    "modelsRemoved": 0,
                    "timestamp": "2026-01-02T03:04:05Z",
                }
            case "GET", ["api", "models", "tiers", tier]:
                if tier not in TIERS:
                    return error(400, "InvalidTier", tier=tier, validTiers=TIERS)
                return 200, [one for one in self.models.values() if one["effectiveTier"] == tier]
            case _, ["api", "models", "profiles", *rest]:
                return self._profile(method, rest, body)
            case "PUT", ["api", "models", model_id, choice]:
                return self._choose(model_id, choice, body)
            case "GET", ["api", "models", model_id] if model_id in self.models:
                return 200, self.models[model_id]
            case "GET", ["api", "models", model_id]:
                return error(404, "ModelNotFound", modelId=model_id)
        return error(404, "NotFound")

    def _registry(self) -> dict[str, Any]:
        return {
            "models": self.models,
            "scanPath": "/models",
            "scanPaths": ["/models"],
            "lastScan": "2026-01-02T03:04:05Z",
            "portRange": [8080, 8099],
            "tierThresholds": {"powerful_min": 14.0, "fast_max": 7.0},
        }

    def _act(self, model_id: str, verb: str) -> Answer:
        if model_id not in self.models:
            return error(404, "ModelNotFound", modelId=model_id)
        state = "stopped" if verb == "stop" else "ready"
        message = f"Model {model_id} is {state}"
        return 200, {"message": message, "modelId": model_id, "changed": True, "server": server(model_id, state=state)}

    def _profile(self, method: str, rest: list[str], body: Any) -> Answer:
        if method == "GET" and not rest:
            return 200, sorted(self.profiles)
        slug = rest[0] if rest else body["name"].lower().replace(" ", "-").replace("_", "-")
        if method == "POST":
            if slug in self.profiles:
                return error(409, "ProfileExists")
            self.profiles[slug] = profile(body["name"])
            path = f"/profiles/{slug}.yaml"
            message = f"Profile '{body['name']}' created successfully"
            return 201, {"message": message, "profileName": slug, "path": path}
        if slug not in self.profiles:
            return error(404, "ProfileNotFound", profileName=slug, availableProfiles=sorted(self.profiles))
        if method == "GET":
            return 200, self.profiles[slug]
        del self.profiles[slug]
        return 200, {"message": f"Profile '{slug}' deleted successfully"}

    def _choose(self, model_id: str, choice: str, body: Any) -> Answer:
        if model_id not in self.models:
            return error(404, "ModelNotFound", modelId=model_id)
        chosen = self.models[model_id]
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
            chosen["enabled"] = value
            message = f"Model {model_id} {'enabled' if value else 'disabled'}"
            said |= {"message": message, "restartRequired": bool(value)}
        chosen["effectiveTier"] = chosen["tierOverride"] or chosen["assignedTier"]
        thinking = chosen["thinkingOverride"]
        chosen["effectiveThinking"] = chosen["isThinkingModel"] if thinking is None else thinking
        return 200, said


def error(status: int, kind: str, **details: Any) -> Answer:
    """An error in the one form they have."""
    return status, {"error": kind, "message": f"{kind}: a sentence", "details": details}


@contextmanager
def standing_in(stand_in: StandIn) -> Iterator[StandIn]:
    """Serve ``stand_in`` on a port of its own until the block is left."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = stand_in.answer(self.command, self.path, body)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **stand_in.headers}
            if status == 201:
                headers["Location"] = f"{self.path}/{answer['profileName']}"
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815  # http.server finds them by these names

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        stand_in.url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            listener.shutdown()
            thread.join(5)
