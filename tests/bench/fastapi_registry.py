"""The peer: the registry's answer from FastAPI and uvicorn, as its own documentation says to do it.

    python -m tests.bench.fastapi_registry SOCKET DOCUMENT

DOCUMENT is a file with an answer of the agent's; its models are held as pydantic objects and answered as such, with
`response_model`. Only the type of the settings, a dataclass with half a hundred fields, is the agent's own. uvicorn
runs with uvloop and httptools, one process, and writes no access log.
"""

from __future__ import annotations

import sys
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from magi_agent.runtime_settings.settings import RuntimeSettings


class Tier(StrEnum):
    """How capable a model is."""

    FAST = "fast"
    BALANCED = "balanced"
    POWERFUL = "powerful"


class ThinkingMode(StrEnum):
    """Whether a model thinks."""

    NONE = "none"
    OPTIONAL = "optional"
    ALWAYS = "always"


class StartPolicy(StrEnum):
    """When a model is up."""

    ALWAYS_ON = "alwaysOn"
    ON_DEMAND = "onDemand"
    MANUAL = "manual"


class Status(StrEnum):
    """Whether a model's files are whole."""

    OK = "ok"
    INCOMPLETE = "incomplete"
    INVALID = "invalid"
    MISSING = "missing"


class CamelModel(BaseModel):
    """snake_case in Python, camelCase on the wire."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, protected_namespaces=())


class Model(CamelModel):
    """One model."""

    file_path: str
    filename: str
    family: str
    version: str | None
    size_params: float
    quantization: str
    is_thinking_model: bool
    thinking_override: bool | None
    is_instruct: bool
    is_coder: bool
    assigned_tier: Tier
    tier_override: Tier | None
    port: int | None
    enabled: bool
    n_gpu_layers: int | None
    ctx_size: int | None
    n_threads: int | None
    batch_size: int | None
    model_id: str
    display_name: str
    effective_tier: Tier
    effective_thinking: bool
    architecture: str | None
    context_length: int | None
    size_bytes: int
    parts: list[str]
    projector_path: str | None
    projectors: list[str]
    has_vision: bool
    has_audio: bool
    is_embedding: bool
    is_reranker: bool
    chat_template: bool
    status: Status
    problem: str | None
    parameter_count: int | None
    active_params: float | None
    thinking_mode: ThinkingMode
    start_policy: StartPolicy
    runtime_settings: RuntimeSettings


class TierThresholds(BaseModel):
    """Sizes at which tiers change."""

    powerful_min: float
    fast_max: float


class Registry(CamelModel):
    """All models."""

    models: dict[str, Model]
    scan_path: str
    last_scan: datetime | None
    port_range: tuple[int, int]
    tier_thresholds: TierThresholds
    scan_paths: list[str]
    allowed_flags: list[str]


def application(held: Registry) -> FastAPI:
    """Return an application that answers with the models of `held`."""
    app = FastAPI()

    @app.get("/api/models/registry", response_model=Registry)
    async def registry() -> Registry:
        return Registry(
            models=held.models,
            scan_path=held.scan_path,
            last_scan=held.last_scan,
            port_range=held.port_range,
            tier_thresholds=held.tier_thresholds,
            scan_paths=held.scan_paths,
            allowed_flags=held.allowed_flags,
        )

    return app


def main() -> None:
    """Serve on the socket that the command line names."""
    socket, document = sys.argv[1:]
    app = application(Registry.model_validate_json(Path(document).read_bytes()))
    uvicorn.run(app, uds=socket, loop="uvloop", http="httptools", log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
