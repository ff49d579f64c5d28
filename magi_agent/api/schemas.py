"""What goes over the wire: one pydantic model for each body, in the wire's own order of fields.

Keys are camelCase on the wire; requests may also use snake_case. These models validate requests, shape answers, and
are what the OpenAPI document is generated from.
"""

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from magi_agent.profiles.profile import LoadBalancingStrategy
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.effective import Source
from magi_agent.servers.operations import OperationStatus
from magi_agent.vocabulary import ModelStatus, ServerState, StartPolicy, ThinkingMode, Tier

ModelId = Annotated[str, Field(max_length=300)]
UserPort = Annotated[int, Field(ge=1024, le=65_535)]
"""A port that needs no privilege."""
MOST_MODELS: Final = 100_000
"""Models in an export."""
MOST_PROFILES: Final = 10_000
"""Profiles in an export."""
PortRange = Annotated[list[UserPort], Field(min_length=2, max_length=2)]
"""The first port and the last."""


class Answer(BaseModel):
    """A body the agent sends."""

    model_config = ConfigDict(
        defer_build=True, alias_generator=to_camel, populate_by_name=True, frozen=True, protected_namespaces=()
    )


class Request(BaseModel):
    """A body the agent receives: nothing unknown in it, nothing of another type."""

    model_config = ConfigDict(
        defer_build=True,
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
    )


class ErrorAnswer(Answer):
    """Every error, on every path."""

    error: str = Field(description="a stable word")
    message: str = Field(description="one sentence a person can act on")
    details: dict[str, Any] = Field(description="what a program can use; always an object")


class RootAnswer(Answer):
    """What answers here."""

    name: str
    version: str
    docs: str
    status: str


class ModelAnswer(Answer):
    """One model: facts and choices."""

    file_path: str
    filename: str
    family: str
    version: str | None
    size_params: float = Field(description="billions of parameters, as people call it")
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
    context_length: int | None = Field(description="tokens")
    size_bytes: int
    parts: list[str] = Field(description="paths of all files of a split set; one for a plain file")
    projector_path: str | None = Field(description="the multimodal projector chosen")
    projectors: list[str] = Field(description="paths of all projectors that go with it, the chosen one first")
    has_vision: bool
    has_audio: bool = Field(description="the projector chosen has an encoder for sound")
    is_embedding: bool = Field(description="not for chat: it embeds, or it ranks")
    is_reranker: bool
    chat_template: bool
    status: ModelStatus
    problem: str | None
    parameter_count: int | None = Field(description="the exact sum over the tensors")
    active_params: float | None = Field(description="billions, of a mixture of experts")
    thinking_mode: ThinkingMode
    start_policy: StartPolicy
    runtime_settings: RuntimeSettings


class TierThresholdsAnswer(BaseModel):
    """Sizes, in billions of parameters, at which tiers change. These two keys are snake_case on the wire."""

    powerful_min: float
    fast_max: float


class RegistryAnswer(Answer):
    """Every model the agent knows."""

    models: dict[str, ModelAnswer]
    scan_path: str
    last_scan: datetime | None
    port_range: tuple[int, int]
    tier_thresholds: TierThresholdsAnswer
    scan_paths: list[str]
    allowed_flags: list[str] = Field(description="flags of llama-server that the setting extraFlags may name")


class OpenAIError(Answer):
    """What is wrong, on the paths of the OpenAI API."""

    message: str = Field(description="one sentence a person can act on")
    type: str = Field(description="the kind of error")
    param: None = Field(description="null")
    code: str | None = Field(description="a stable word")
    details: dict[str, Any] = Field(description="what a program can use; always an object")


class OpenAIErrorAnswer(Answer):
    """Every error of the agent's own on the paths of the OpenAI API; a llama-server's own errors pass as they are."""

    error: OpenAIError


class AnthropicsErrorAnswer(OpenAIErrorAnswer):
    """The same on the paths of Anthropic's API, with that API's words for `error.type`."""

    type: Literal["error"]


class RescanAnswer(Answer):
    """What a scan found."""

    message: str
    models_found: int
    models_added: int
    models_removed: int
    timestamp: datetime


class TierRequest(Request):
    """A tier for a model; null clears the override."""

    tier: str | None = Field(json_schema_extra={"enum": [*Tier, None]})


class TierAnswer(Answer):
    """The tier override is set."""

    message: str
    model_id: str
    tier: Tier | None
    override: Literal[True] = Field(True, description="that it is a person's word now, which null is too")


class ThinkingRequest(Request):
    """Whether a model thinks; null clears the override."""

    thinking: bool | None


class ThinkingAnswer(Answer):
    """The thinking override is set."""

    message: str
    model_id: str
    thinking: bool | None
    override: Literal[True] = Field(True, description="that it is a person's word now, which null is too")
    tier_changed: bool


class EnabledRequest(Request):
    """Whether a model is in use."""

    enabled: bool


class EnabledAnswer(Answer):
    """The choice is made."""

    message: str
    model_id: str
    enabled: bool
    restart_required: bool = Field(description="whether what runs now differs from the choice")


class FailureAnswer(Answer):
    """Why a server failed last."""

    at: datetime
    result: str
    message: str
    advice: str | None
    exit_status: int | None
    signal: str | None
    restarts: int
    invocation_id: str | None
    log_lines: list[str]


class ServerAnswer(Answer):
    """One model's server."""

    model_id: str
    display_name: str
    port: int | None
    pid: int | None
    is_ready: bool
    is_running: bool
    uptime_seconds: int
    tier: Tier
    is_thinking: bool
    unit: str
    state: ServerState
    url: str | None = Field(description="where it is reached: http://…, or unix: and the path of its socket")
    restarts: int
    memory_bytes: int | None
    cpu_seconds: float | None
    failure: FailureAnswer | None
    retry_in_seconds: float | None = Field(description="until a server that failed is tried again")
    restart_required: bool
    restart_reasons: list[str]


class ServersAnswer(Answer):
    """Every model that should run or has a loaded unit."""

    total_servers: int
    ready_servers: int
    servers: list[ServerAnswer]


class ModelWithServerAnswer(ModelAnswer):
    """One model with its server."""

    server: ServerAnswer


class ServerActionAnswer(Answer):
    """What a verb on one server came to."""

    message: str
    model_id: str
    changed: bool = Field(description="whether anything had to be done")
    server: ServerAnswer


class OperationPartAnswer(Answer):
    """What an operation does for one model."""

    status: OperationStatus
    state: ServerState
    message: str


class OperationAnswer(Answer):
    """An action on several models."""

    id: str
    kind: str
    status: OperationStatus
    started_at: datetime
    finished_at: datetime | None
    models: dict[str, OperationPartAnswer]


class TierConfigBody(Request):
    """Up to which complexity score a request goes to a tier; null for no limit."""

    name: str = Field(min_length=1, max_length=100)
    max_score: float | None = Field(None, allow_inf_nan=False)
    expected_time_seconds: float = Field(5.0, ge=0, le=86_400, allow_inf_nan=False)
    description: str = Field("", max_length=2000)


class TwoStageBody(Request):
    """A draft by one tier, refined by a larger one, for chats with ``auto`` that are worth more than the first."""

    enabled: bool = False
    stage1_tier: Tier = Tier.BALANCED
    stage2_tier: Tier = Tier.POWERFUL
    stage1_max_tokens: int = Field(500, ge=1, le=1_000_000, description="tokens of the draft")


class LoadBalancingBody(Request):
    """How the servers of one tier share its requests."""

    enabled: bool = True
    strategy: LoadBalancingStrategy = LoadBalancingStrategy.ROUND_ROBIN
    health_check_interval: float = Field(30.0, gt=0, le=86_400, allow_inf_nan=False, description="seconds")


class ProfileRequest(Request):
    """A new profile, or what replaces one."""

    name: str = Field(max_length=200)
    description: str = Field("", max_length=10_000)
    enabled_models: list[ModelId] = Field(default_factory=list, max_length=10_000)
    tier_config: list[TierConfigBody] | None = Field(None, max_length=100)
    two_stage: TwoStageBody = Field(default_factory=TwoStageBody)
    load_balancing: LoadBalancingBody = Field(default_factory=LoadBalancingBody)
    runtime_settings: dict[ModelId, RuntimeSettings] = Field(default_factory=dict, max_length=10_000)


class ProfileAnswer(Answer):
    """A named set of enabled models with their settings."""

    name: str
    description: str
    enabled_models: list[str]
    tier_config: list[TierConfigBody]
    two_stage: TwoStageBody
    load_balancing: LoadBalancingBody
    runtime_settings: dict[str, RuntimeSettings]


class ProfileCreatedAnswer(Answer):
    """The profile is on disk."""

    message: str
    profile_name: str
    path: str


class MessageAnswer(Answer):
    """It is done."""

    message: str


class LiveAnswer(Answer):
    """The agent's loop turns."""

    status: Literal["alive"] = "alive"


class ReadyAnswer(Answer):
    """Whether each server that should be up is ready."""

    status: Literal["ready", "not_ready"]
    version: str
    systemd_scope: str
    systemd_connected: bool
    models: int
    enabled_models: int
    servers_wanted: int
    servers_ready: int
    missing: dict[str, ServerState] = Field(description="models whose server should be up and is not, and its state")
    scanning: bool = Field(description="whether the first scan is still under way")
    active_profile: str | None
    problems: list[str] = Field(description="what is wrong, in sentences")
    draining: bool = Field(description="whether nothing is started any more")
    unknown_units: list[str] = Field(description="units of ours that belong to no known model")


class AvailabilityAnswer(Answer):
    """Whether requests for a model, or for a tier, would be answered here."""

    status: Literal["ready", "not_ready"]


class SettingsAnswer(Answer):
    """How a model's server is run."""

    model_id: str
    runtime_settings: RuntimeSettings = Field(description="what was chosen for the model")
    effective: RuntimeSettings = Field(description="what holds: the profile's, the model's, its tier's, the host's")
    sources: dict[str, Source] = Field(description="where each setting that holds was said")
    warnings: list[str] = Field(description="what holds and will hardly do, as a limit of memory below the need")


class SettingsChangedAnswer(SettingsAnswer):
    """The settings are on disk."""

    message: str
    restart_required: bool
    restart_reasons: list[str]


class PortRequest(Request):
    """A port for a model; null takes its port back."""

    port: int | None = Field(ge=1, le=65_535)


class PortAnswer(Answer):
    """The port is given, or taken back."""

    message: str
    model_id: str
    port: int | None
    restart_required: bool


class PortRangeRequest(Request):
    """Ports to give, from and to; null for the configured ones."""

    port_range: PortRange | None


class PortRangeAnswer(Answer):
    """The ports that models get from now on."""

    message: str
    port_range: list[int] = Field(min_length=2, max_length=2)
    outside: list[str] = Field(description="ids of models that keep a port outside the range")


class DrainRequest(Request):
    """Whether nothing is to be started."""

    draining: bool


class ConfigurationAnswer(Answer):
    """Where the agent's configuration comes from: an option wins over a variable, and that over the file."""

    pid: int = Field(description="the agent's process")
    file: str | None = Field(description="the configuration file, there or not; null where there is no such thing")
    variables: dict[str, str] = Field(description="of its environment, those that set something")
    options: dict[str, str] = Field(description="of its command line, likewise: `--port-range`, and what is given")


class DrainAnswer(Answer):
    """Whether the host is being drained."""

    message: str
    draining: bool
    since: datetime | None
    by: str | None


class PlanAnswer(Answer):
    """What activating a profile changes; ids of models."""

    message: str
    profile: str = Field(description="the profile's slug")
    dry_run: bool
    enable: list[str]
    disable: list[str]
    start: list[str]
    stop: list[str]
    restart: list[str] = Field(description="run on with other settings than the profile's, until they are restarted")
    keep: list[str] = Field(description="run already, and are not touched")
    absent: list[str] = Field(description="named in the profile, and not there now; in use when they come back")
    unknown: list[str] = Field(description="named in the profile, and no model's id")
    unusable: dict[str, str] = Field(description="models whose files are not whole, and why")
    insufficient_memory: dict[str, str] = Field(
        description="in a dry run, models that would not fit into memory once what stops is gone, and why"
    )
    settings_not_usable: dict[str, str] = Field(
        description="in a dry run, models that could not be started with their settings, and why"
    )
    warnings: dict[str, list[str]] = Field(
        description="models with settings that will hardly do, as a limit of memory below the need; they are started"
    )
    operation_id: str | None = Field(description="by which starts and stops can be followed")


class ActiveProfileAnswer(Answer):
    """The profile that is active."""

    name: str | None = Field(description="its slug; null for none")
    profile: ProfileAnswer | None
    problem: str | None = Field(description="why it does not hold")


class ChoicesBody(Request):
    """What people chose for one model, and how it is told where it has another id."""

    filename: str = Field("", max_length=4096)
    size_bytes: int = Field(0, ge=0)
    fingerprint: str | None = Field(None, max_length=200)
    tier_override: Tier | None = None
    thinking_override: bool | None = None
    enabled: bool = False
    port: int | None = Field(None, ge=1, le=65_535)
    runtime_settings: RuntimeSettings = Field(default_factory=RuntimeSettings)


class ExportBody(Request):
    """All choices of a host, to be kept or carried to another."""

    version: Literal[1]
    exported_at: datetime | None = None
    agent_version: str = Field("", max_length=100)
    active_profile: str | None = Field(None, max_length=300)
    port_range: PortRange | None = Field(None, description="null for the configured one; absent leaves it as it is")
    models: dict[ModelId, ChoicesBody] = Field(default_factory=dict, max_length=MOST_MODELS)
    profiles: dict[str, ProfileRequest] = Field(default_factory=dict, max_length=MOST_PROFILES)


class ImportAnswer(Answer):
    """What an import changed, or would change."""

    message: str
    dry_run: bool
    changed: list[str] = Field(description="ids of models whose choices are others now")
    unchanged: list[str]
    unknown: list[str] = Field(description="ids in the export that are no model here")
    profiles: list[str] = Field(description="slugs of profiles that are new or others now")
    port_range: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        description="the ports that models get from now on; null: as before"
    )
    problems: list[str] = Field(description="what could not be taken over, and why")
