"""A model found by ``magictl scan``, with the keys that the API's Model has, in their order.

The API's own schemas would do, but importing them takes longer than a scan.
"""

from magi_agent.registry.model import Model
from magi_agent.runtime_settings.settings import setting_names, wire_name
from magi_agent.vocabulary import StartPolicy


def model_json(model: Model) -> dict[str, object]:
    """Return ``model`` as GET /api/models/registry would show it while nobody has made a choice for it."""
    facts, choices = model.facts, model.choices
    settings = choices.runtime_settings
    return {
        "filePath": _readable(facts.file_path),
        "filename": _readable(facts.filename),
        "family": facts.family,
        "version": facts.version,
        "sizeParams": facts.size_params,
        "quantization": facts.quantization,
        "isThinkingModel": model.is_thinking_model,
        "thinkingOverride": choices.thinking_override,
        "isInstruct": facts.is_instruct,
        "isCoder": facts.is_coder,
        "assignedTier": facts.assigned_tier.value,
        "tierOverride": choices.tier_override,
        "port": choices.port,
        "enabled": choices.enabled,
        "nGpuLayers": settings.n_gpu_layers,
        "ctxSize": settings.ctx_size,
        "nThreads": settings.n_threads,
        "batchSize": settings.batch_size,
        "modelId": model.model_id,
        "displayName": _readable(facts.display_name or facts.filename),
        "effectiveTier": model.effective_tier.value,
        "effectiveThinking": model.effective_thinking,
        "architecture": facts.architecture,
        "contextLength": facts.context_length,
        "sizeBytes": facts.size_bytes,
        "parts": [_readable(part) for part in facts.parts],
        "projectorPath": _readable(facts.projector_path) if facts.projector_path else None,
        "projectors": [_readable(path) for path in facts.projectors],
        "hasVision": facts.has_vision,
        "hasAudio": facts.has_audio,
        "isEmbedding": facts.is_embedding,
        "isReranker": facts.is_reranker,
        "chatTemplate": facts.has_chat_template,
        "status": facts.status.value,
        "problem": _readable(facts.problem) if facts.problem else None,
        "parameterCount": facts.parameter_count,
        "activeParams": facts.active_params,
        "thinkingMode": facts.thinking_mode.value,
        "startPolicy": (settings.start_policy or StartPolicy.ALWAYS_ON).value,
        "runtimeSettings": {wire_name(name): getattr(settings, name) for name in setting_names()},
    }


def _readable(path: str) -> str:
    """Return a path as JSON can carry it: bytes that are no UTF-8 as the replacement character."""
    return path.encode(errors="surrogateescape").decode(errors="replace")
