"""The REST contract's shapes of Model, Server, Profile and the other answers of the eleven endpoints."""

from magi_agent.cli.shapes import (
    Shape,
    anything,
    decimal,
    exactly,
    flag,
    list_of,
    map_of,
    moment,
    one_of,
    or_null,
    record_of,
    text,
    whole,
)
from magi_agent.vocabulary import ModelStatus, ServerState, StartPolicy, ThinkingMode, Tier

TIER = one_of(Tier)

_MODEL_AS_EVER: dict[str, Shape] = {
    "filePath": text,
    "filename": text,
    "family": text,
    "version": or_null(text),
    "sizeParams": decimal,
    "quantization": text,
    "isThinkingModel": flag,
    "thinkingOverride": or_null(flag),
    "isInstruct": flag,
    "isCoder": flag,
    "assignedTier": TIER,
    "tierOverride": or_null(TIER),
    "port": or_null(whole),
    "enabled": flag,
    "nGpuLayers": or_null(whole),
    "ctxSize": or_null(whole),
    "nThreads": or_null(whole),
    "batchSize": or_null(whole),
    "modelId": text,
}

MODEL = record_of(
    {
        **_MODEL_AS_EVER,
        "displayName": text,
        "effectiveTier": TIER,
        "effectiveThinking": flag,
        "architecture": or_null(text),
        "contextLength": or_null(whole),
        "sizeBytes": whole,
        "parts": list_of(text),
        "hasVision": flag,
        "isEmbedding": flag,
        "chatTemplate": flag,
        "status": one_of(ModelStatus),
        "problem": or_null(text),
        "parameterCount": or_null(whole),
        "activeParams": or_null(decimal),
        "thinkingMode": one_of(ThinkingMode),
        "startPolicy": one_of(StartPolicy),
        "runtimeSettings": record_of({}),
    },
    ordered=tuple(_MODEL_AS_EVER),
)

REGISTRY = record_of(
    {
        "models": map_of(MODEL),
        "scanPath": text,
        "lastScan": or_null(moment),
        "portRange": list_of(whole),
        "tierThresholds": record_of({"powerful_min": decimal, "fast_max": decimal}, snake_case=True),
        "scanPaths": list_of(text),
    }
)

SERVER = record_of(
    {
        "modelId": text,
        "displayName": text,
        "port": or_null(whole),
        "pid": or_null(whole),
        "isReady": flag,
        "isRunning": flag,
        "uptimeSeconds": whole,
        "tier": TIER,
        "isThinking": flag,
        "unit": text,
        "state": one_of(ServerState),
        "url": or_null(text),
        "restarts": whole,
        "memoryBytes": or_null(whole),
        "cpuSeconds": or_null(decimal),
        "failure": anything,
        "restartRequired": flag,
        "restartReasons": list_of(text),
    }
)

SERVERS = record_of({"totalServers": whole, "readyServers": whole, "servers": list_of(SERVER)})

PROFILE_NAMES = list_of(text)

PROFILE = record_of(
    {
        "name": text,
        "description": text,
        "enabledModels": list_of(text),
        "tierConfig": list_of(
            record_of({"name": text, "maxScore": or_null(decimal), "expectedTimeSeconds": decimal, "description": text})
        ),
        "twoStage": record_of({"enabled": flag, "stage1Tier": TIER, "stage2Tier": TIER, "stage1MaxTokens": whole}),
        "loadBalancing": record_of(
            {
                "enabled": flag,
                "strategy": one_of(("round_robin", "least_loaded", "random")),
                "healthCheckInterval": decimal,
            }
        ),
        "runtimeSettings": map_of(record_of({})),
    }
)

RESCAN = record_of(
    {
        "message": exactly("Re-scan completed successfully"),
        "modelsFound": whole,
        "modelsAdded": whole,
        "modelsRemoved": whole,
        "timestamp": moment,
    }
)


def error(kind: str, details: dict[str, Shape] | None = None) -> Shape:
    """Return the shape of an error: the one form they all have."""
    return record_of({"error": exactly(kind), "message": text, "details": record_of(details or {})})


def tier_set(model_id: str, tier: str | None) -> Shape:
    """Return the shape of the answer of PUT /{modelId}/tier."""
    return record_of(
        {
            "message": exactly(f"Tier updated for {model_id}"),
            "modelId": exactly(model_id),
            "tier": exactly(tier),
            "override": exactly(True),
        }
    )


def thinking_set(model_id: str, thinking: bool, *, tier_changed: bool) -> Shape:
    """Return the shape of the answer of PUT /{modelId}/thinking."""
    return record_of(
        {
            "message": exactly(f"Thinking capability updated for {model_id}"),
            "modelId": exactly(model_id),
            "thinking": exactly(thinking),
            "override": exactly(True),
            "tierChanged": exactly(tier_changed),
        }
    )


def enabled_set(model_id: str, enabled: bool) -> Shape:
    """Return the shape of the answer of PUT /{modelId}/enabled."""
    return record_of(
        {
            "message": exactly(f"Model {model_id} {'enabled' if enabled else 'disabled'}"),
            "modelId": exactly(model_id),
            "enabled": exactly(enabled),
            "restartRequired": flag,
        }
    )


def profile_created(name: str, slug: str) -> Shape:
    """Return the shape of the answer of POST /profiles."""
    return record_of({"message": _said_of(name, slug, "created"), "profileName": exactly(slug), "path": text})


def profile_deleted(name: str, slug: str) -> Shape:
    """Return the shape of the answer of DELETE /profiles/{name}."""
    return record_of({"message": _said_of(name, slug, "deleted")})


def _said_of(name: str, slug: str, done: str) -> Shape:
    """Return the shape of a message on a profile: the contract's ``<name>`` may be either of its names."""
    return exactly(f"Profile '{name}' {done} successfully", f"Profile '{slug}' {done} successfully")
