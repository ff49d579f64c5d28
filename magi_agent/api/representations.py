"""From the agent's values to what goes over the wire, and back."""

import math

from magi_agent.api.exchange import MOST_ERRORS, fault_on_wire
from magi_agent.api.schemas import (
    FailureAnswer,
    LoadBalancingBody,
    ModelAnswer,
    OperationAnswer,
    OperationPartAnswer,
    ProfileAnswer,
    ProfileRequest,
    ServerAnswer,
    TierConfigBody,
    TwoStageBody,
)
from magi_agent.errors import ValidationFailed
from magi_agent.profiles.profile import DEFAULT_TIERS, LoadBalancing, Profile, TierConfig, TwoStage
from magi_agent.registry.model import Model
from magi_agent.runtime_settings.settings import RuntimeSettings, faults_of, wire_name
from magi_agent.servers.failure import Failure
from magi_agent.servers.operations import Operation
from magi_agent.servers.pictures import Server
from magi_agent.vocabulary import ServerState, StartPolicy


def readable(path: str) -> str:
    """A path as JSON can carry it: bytes that are no UTF-8 are shown as the replacement character."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


def model_answer(model: Model, start_policy: StartPolicy) -> ModelAnswer:
    """A model as it stands on the wire; ``start_policy`` is the one that holds for it."""
    facts, choices = model.facts, model.choices
    return ModelAnswer(
        file_path=readable(facts.file_path),
        filename=readable(facts.filename),
        family=facts.family,
        version=facts.version,
        size_params=facts.size_params,
        quantization=facts.quantization,
        is_thinking_model=model.is_thinking_model,
        thinking_override=choices.thinking_override,
        is_instruct=facts.is_instruct,
        is_coder=facts.is_coder,
        assigned_tier=facts.assigned_tier,
        tier_override=choices.tier_override,
        port=choices.port,
        enabled=choices.enabled,
        n_gpu_layers=choices.runtime_settings.n_gpu_layers,
        ctx_size=choices.runtime_settings.ctx_size,
        n_threads=choices.runtime_settings.n_threads,
        batch_size=choices.runtime_settings.batch_size,
        model_id=model.model_id,
        display_name=readable(facts.display_name or facts.filename),
        effective_tier=model.effective_tier,
        effective_thinking=model.effective_thinking,
        architecture=facts.architecture,
        context_length=facts.context_length,
        size_bytes=facts.size_bytes,
        parts=[readable(part) for part in facts.parts],
        projector_path=readable(facts.projector_path) if facts.projector_path else None,
        projectors=[readable(path) for path in facts.projectors],
        has_vision=facts.has_vision,
        has_audio=facts.has_audio,
        is_embedding=facts.is_embedding,
        is_reranker=facts.is_reranker,
        chat_template=facts.has_chat_template,
        status=facts.status,
        problem=readable(facts.problem) if facts.problem else None,
        parameter_count=facts.parameter_count,
        active_params=facts.active_params,
        thinking_mode=facts.thinking_mode,
        start_policy=start_policy,
        runtime_settings=choices.runtime_settings,
    )


def server_answer(server: Server) -> ServerAnswer:
    """A server as it stands on the wire."""
    return ServerAnswer(
        model_id=server.model_id,
        display_name=readable(server.display_name),
        port=server.port,
        pid=server.pid,
        is_ready=server.is_ready,
        is_running=server.is_running,
        uptime_seconds=server.uptime_seconds,
        tier=server.tier,
        is_thinking=server.is_thinking,
        unit=server.unit,
        state=server.state,
        url=server.url,
        restarts=server.restarts,
        memory_bytes=server.memory_bytes,
        cpu_seconds=server.cpu_seconds,
        failure=_failure_answer(server.failure) if server.failure else None,
        retry_in_seconds=round(server.retry_in, 1) if server.retry_in is not None else None,
        restart_required=bool(server.restart_reasons),
        restart_reasons=[readable(reason) for reason in server.restart_reasons],
    )


def _failure_answer(failure: Failure) -> FailureAnswer:
    return FailureAnswer(
        at=failure.at,
        result=failure.result,
        message=readable(failure.message),
        advice=None if failure.advice is None else readable(failure.advice),
        exit_status=failure.exit_status,
        signal=failure.signal,
        restarts=failure.restarts,
        invocation_id=failure.invocation_id,
        log_lines=[readable(line) for line in failure.log_lines],
    )


def operation_answer(operation: Operation, states: dict[str, ServerState]) -> OperationAnswer:
    """An operation as it stands on the wire; ``states`` are the models' servers' of this moment."""
    return OperationAnswer(
        id=operation.operation_id,
        kind=operation.kind,
        status=operation.status,
        started_at=operation.started_at,
        finished_at=operation.finished_at,
        models={
            model_id: OperationPartAnswer(status=part.status, state=states[model_id], message=readable(part.message))
            for model_id, part in operation.parts.items()
        },
    )


def profile_answer(profile: Profile) -> ProfileAnswer:
    """A profile as it stands on the wire."""
    return ProfileAnswer(
        name=profile.name,
        description=profile.description,
        enabled_models=list(profile.enabled_models),
        tier_config=[
            TierConfigBody(
                name=tier.name,
                max_score=tier.max_score if math.isfinite(tier.max_score) else None,
                expected_time_seconds=tier.expected_time_seconds,
                description=tier.description,
            )
            for tier in profile.tier_config
        ],
        two_stage=TwoStageBody(
            enabled=profile.two_stage.enabled,
            stage1_tier=profile.two_stage.stage1_tier,
            stage2_tier=profile.two_stage.stage2_tier,
            stage1_max_tokens=profile.two_stage.stage1_max_tokens,
        ),
        load_balancing=LoadBalancingBody(
            enabled=profile.load_balancing.enabled,
            strategy=profile.load_balancing.strategy,
            health_check_interval=profile.load_balancing.health_check_interval,
        ),
        runtime_settings=dict(profile.runtime_settings),
    )


def port_range_of(ports: list[int] | None) -> tuple[int, int] | None:
    """A range of ports from the wire. Raises ``ValidationFailed`` where the first is not the lower."""
    if ports is None:
        return None
    low, high = ports
    if low > high:
        raise ValidationFailed([{"field": "portRange", "message": "must be two ports, the lower first"}])
    return low, high


def said_settings(settings: RuntimeSettings) -> dict[str, object]:
    """The settings that somebody spoke about, by their names on the wire."""
    return {wire_name(name): value for name, value in settings.said()}


def profile_export(profile: Profile) -> dict[str, object]:
    """A profile as it can be sent again, without what nobody spoke about."""
    return {
        **profile_answer(profile).model_dump(mode="json", by_alias=True, exclude={"runtime_settings"}),
        "runtimeSettings": {model_id: said_settings(said) for model_id, said in profile.runtime_settings.items()},
    }


def profile_faults(request: ProfileRequest, within: str = "") -> list[dict[str, str]]:
    """The settings of a profile that do not go together; ``within`` is where the profile stands in the body."""
    return [
        fault_on_wire(fault, f"{within}runtimeSettings.{model_id}.")
        for model_id, settings in request.runtime_settings.items()
        for fault in faults_of(settings)
    ]


def profile_of(request: ProfileRequest) -> Profile:
    """A profile from the wire. Raises ``ValidationFailed`` for settings that do not go together."""
    if faults := profile_faults(request):
        raise ValidationFailed(faults[:MOST_ERRORS])
    tiers: tuple[TierConfig, ...] = DEFAULT_TIERS
    if request.tier_config is not None:
        tiers = tuple(
            TierConfig(
                tier.name,
                math.inf if tier.max_score is None else tier.max_score,
                tier.expected_time_seconds,
                tier.description,
            )
            for tier in request.tier_config
        )
    return Profile(
        request.name,
        request.description,
        tuple(request.enabled_models),
        tiers,
        TwoStage(**request.two_stage.model_dump()),
        LoadBalancing(**request.load_balancing.model_dump()),
        dict(request.runtime_settings),
    )
