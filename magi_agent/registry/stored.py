"""The registry file: what is in it, and how this and earlier versions of it are read.

Version 2 is JSON with snake_case keys: ``version``, ``last_scan``, ``active_profile``, ``applied_profile_setting`` and
``models``, each model by its id with ``facts`` and ``choices``. A file without ``version`` was written by an earlier
MAGI; it holds facts and choices in one flat object a model, and its ids were made by another rule.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from magi_agent.discovery.facts import FileIdentity, ModelFacts
from magi_agent.registry.ids import id_for
from magi_agent.registry.model import Choices, Model, RuntimeSettings
from magi_agent.vocabulary import ModelStatus, StartPolicy, ThinkingMode, Tier

VERSION: Final = 2


class DamagedRegistry(ValueError):
    """The file is no registry."""


class NewerRegistry(ValueError):
    """The file was written by a newer agent."""


@dataclass(frozen=True, slots=True)
class RegistryContent:
    """All that the registry file holds."""

    models: Mapping[str, Model] = field(default_factory=dict)
    last_scan: datetime | None = None
    active_profile: str | None = None
    applied_profile_setting: str | None = None
    """The value of ``ACTIVE_PROFILE`` that was applied last."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A registry file as read: its content, and what of it could not be."""

    content: RegistryContent
    version: int
    problems: tuple[str, ...] = ()


class _Stored(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Identity(_Stored):
    device: int
    inode: int
    size: int
    mtime_ns: int


class _Facts(_Stored):
    file_path: str
    filename: str
    display_name: str = ""
    family: str = "unknown"
    version: str | None = None
    size_params: float = 0.0
    quantization: str = "unknown"
    thinking_mode: ThinkingMode = ThinkingMode.NONE
    is_instruct: bool = False
    is_coder: bool = False
    assigned_tier: Tier = Tier.BALANCED
    architecture: str | None = None
    context_length: int | None = None
    size_bytes: int = 0
    parts: tuple[str, ...] = ()
    projector_path: str | None = None
    has_vision: bool = False
    is_embedding: bool = False
    has_chat_template: bool = False
    status: ModelStatus = ModelStatus.OK
    problem: str | None = None
    parameter_count: int | None = None
    active_params: float | None = None
    identity: _Identity | None = None
    fingerprint: str | None = None

    def value(self) -> ModelFacts:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        if self.identity:
            fields["identity"] = FileIdentity(**self.identity.model_dump())
        return ModelFacts(**fields)


class _RuntimeSettings(_Stored):
    n_gpu_layers: int | None = None
    ctx_size: int | None = None
    n_threads: int | None = None
    batch_size: int | None = None

    def value(self) -> RuntimeSettings:
        return RuntimeSettings(self.n_gpu_layers, self.ctx_size, self.n_threads, self.batch_size)


class _Choices(_Stored):
    tier_override: Tier | None = None
    thinking_override: bool | None = None
    enabled: bool = False
    port: int | None = Field(None, ge=1, le=65_535)
    start_policy: StartPolicy = StartPolicy.ALWAYS_ON
    runtime_settings: _RuntimeSettings = Field(default_factory=_RuntimeSettings)

    def value(self) -> Choices:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Choices(**{**fields, "runtime_settings": self.runtime_settings.value()})


class _Model(_Stored):
    facts: _Facts
    choices: _Choices = Field(default_factory=_Choices)
    present: bool = True
    former_id: str | None = None


class _FirstModel(_Stored):
    """A model in the flat form of an earlier MAGI."""

    file_path: str
    tier_override: Tier | None = None
    thinking_override: bool | None = None
    enabled: bool = False
    port: int | None = Field(None, ge=1, le=65_535)
    n_gpu_layers: int | None = None
    ctx_size: int | None = None
    n_threads: int | None = None
    batch_size: int | None = None


class _Head(_Stored):
    version: int = 1
    last_scan: datetime | None = None
    active_profile: str | None = None
    applied_profile_setting: str | None = None
    models: dict[str, Any]


_HEAD: Final = TypeAdapter(_Head)


def read_registry(data: bytes) -> Reading:
    """Read a registry file of any version.

    Raises ``DamagedRegistry`` where nothing of it can be read, ``NewerRegistry`` where a newer agent wrote it. A
    single model that cannot be read is left out and named in ``problems``.
    """
    try:
        head = _HEAD.validate_python(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise DamagedRegistry(_first_line(error)) from None
    if head.version > VERSION:
        raise NewerRegistry(f"it has version {head.version}, and this agent knows versions up to {VERSION}")
    models: dict[str, Model] = {}
    problems = []
    for model_id, entry in head.models.items():
        try:
            if head.version < 2:
                model = _carried_over(model_id, entry, models)
            else:
                stored = _Model.model_validate(entry)
                model = Model(model_id, stored.facts.value(), stored.choices.value(), stored.present, stored.former_id)
        except ValidationError as error:
            problems.append(f"model {model_id!r}: {_first_line(error)}")
        else:
            models[model.model_id] = model
    content = RegistryContent(models, head.last_scan, head.active_profile, head.applied_profile_setting)
    return Reading(content, head.version, tuple(problems))


def _carried_over(former_id: str, entry: object, taken: Mapping[str, Model]) -> Model:
    """A model of an earlier MAGI: its choices wait, under its path, for a scan to find the file."""
    old = _FirstModel.model_validate(entry)
    flat = entry if isinstance(entry, dict) else {}
    known = {name: flat[name] for name in ("filename", "family", "version", "quantization") if name in flat}
    try:
        facts = _Facts.model_validate(
            {"filename": old.file_path.rpartition("/")[2], **known, "file_path": old.file_path}
        )
    except ValidationError:
        facts = _Facts(file_path=old.file_path, filename=old.file_path.rpartition("/")[2])
    choices = Choices(
        tier_override=old.tier_override,
        thinking_override=old.thinking_override,
        enabled=old.enabled,
        port=old.port,
        runtime_settings=RuntimeSettings(old.n_gpu_layers, old.ctx_size, old.n_threads, old.batch_size),
    )
    missing = replace(
        facts.value(), status=ModelStatus.MISSING, problem="not found yet since the registry was carried over"
    )
    return Model(id_for(old.file_path, taken), missing, choices, present=False, former_id=former_id)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0]


class RegistryWriter:
    """Turns content into the file's bytes; a model that did not change since the last time is not written out anew."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[Model, str]] = {}

    def written(self, content: RegistryContent) -> bytes:
        """The file for ``content``."""
        lines: dict[str, tuple[Model, str]] = {}
        for model_id, model in content.models.items():
            known = self._lines.get(model_id)
            lines[model_id] = known if known and known[0] is model else (model, _model_json(model))
        self._lines = lines
        head = {
            "version": VERSION,
            "last_scan": content.last_scan.isoformat() if content.last_scan else None,
            "active_profile": content.active_profile,
            "applied_profile_setting": content.applied_profile_setting,
        }
        models = ",\n".join(f"{json.dumps(model_id)}: {line}" for model_id, (_, line) in lines.items())
        return f'{json.dumps(head)[:-1]}, "models": {{\n{models}\n}}}}\n'.encode()


def _model_json(model: Model) -> str:
    facts = {name: getattr(model.facts, name) for name in _Facts.model_fields}
    if identity := model.facts.identity:
        facts["identity"] = {name: getattr(identity, name) for name in _Identity.model_fields}
    if not math.isfinite(model.facts.size_params):
        facts["size_params"] = 0.0
    choices = {name: getattr(model.choices, name) for name in _Choices.model_fields}
    runtime = model.choices.runtime_settings
    choices["runtime_settings"] = {name: getattr(runtime, name) for name in _RuntimeSettings.model_fields}
    entry: dict[str, object] = {"facts": facts, "choices": choices, "present": model.present}
    if model.former_id:
        entry["former_id"] = model.former_id
    return json.dumps(entry)
