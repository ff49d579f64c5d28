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
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from magi_agent.discovery.facts import FileIdentity, ModelFacts
from magi_agent.registry.content import Content
from magi_agent.registry.ids import id_for
from magi_agent.registry.model import Choices, Model
from magi_agent.runtime_settings.reading import read_kept, written
from magi_agent.runtime_settings.settings import Fault, RuntimeSettings
from magi_agent.vocabulary import ModelStatus, ThinkingMode, Tier

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
    port_range: tuple[int, int] | None = None
    """The ports that models get, where a person chose others than the configuration's."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A registry file as read: its content, and what of it could not be."""

    content: RegistryContent
    version: int
    problems: tuple[str, ...] = ()


_Port = Annotated[int, Field(ge=1, le=65_535)]


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
    projectors: tuple[str, ...] = ()
    has_vision: bool = False
    has_audio: bool = False
    is_embedding: bool = False
    is_reranker: bool = False
    has_chat_template: bool = False
    status: ModelStatus = ModelStatus.OK
    problem: str | None = None
    parameter_count: int | None = None
    active_params: float | None = None
    identity: _Identity | None = None
    fingerprint: str | None = None
    sample: str | None = None

    def value(self) -> ModelFacts:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        if self.identity:
            fields["identity"] = FileIdentity(**self.identity.model_dump())
        return ModelFacts(**fields)


class _Choices(_Stored):
    tier_override: Tier | None = None
    thinking_override: bool | None = None
    enabled: bool = False
    port: int | None = Field(None, ge=1, le=65_535)
    runtime_settings: dict[str, Any] = Field(default_factory=dict)

    def value(self) -> tuple[Choices, tuple[Fault, ...]]:
        """The choices, and what is wrong with the runtime settings that are left out of them."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        settings, faults = read_kept(self.runtime_settings)
        return Choices(**{**fields, "runtime_settings": settings}), faults


class _Content(_Stored):
    size: int
    fingerprint: str
    sample: str | None = None

    def value(self) -> Content:
        return Content(self.size, self.fingerprint, self.sample)


class _Model(_Stored):
    facts: _Facts
    choices: _Choices = Field(default_factory=_Choices)
    present: bool = True
    former_id: str | None = None
    last_whole: _Content | None = None
    copy_number: int = Field(0, ge=0)


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
    port_range: tuple[_Port, _Port] | None = None
    models: dict[str, Any]


_HEAD: Final = TypeAdapter(_Head)


def read_registry(data: bytes) -> Reading:
    """Read a registry file of any version.

    Raises ``DamagedRegistry`` where nothing of it can be read, ``NewerRegistry`` where a newer agent wrote it. A
    single model that cannot be read is left out and named in ``problems``, as is a single runtime setting.
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
                choices, faults = stored.choices.value()
                model = Model(
                    model_id,
                    stored.facts.value(),
                    choices,
                    stored.present,
                    stored.former_id,
                    stored.last_whole.value() if stored.last_whole else None,
                    stored.copy_number,
                )
                problems += [
                    f"model {model_id!r}: its runtime setting {fault.name} is left out: {fault.message}"
                    for fault in faults
                ]
        except ValidationError as error:
            problems.append(f"model {model_id!r}: {_first_line(error)}")
        else:
            models[model.model_id] = model
    content = RegistryContent(
        models, head.last_scan, head.active_profile, head.applied_profile_setting, head.port_range
    )
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
        runtime_settings=_settings_of(old),
    )
    missing = replace(
        facts.value(), status=ModelStatus.MISSING, problem="not found yet since the registry was carried over"
    )
    return Model(id_for(old.file_path, taken), missing, choices, present=False, former_id=former_id)


def _settings_of(old: _FirstModel) -> RuntimeSettings:
    """The settings of an earlier MAGI, without those that no llama-server takes."""
    settings, _ = read_kept(
        {
            "n_gpu_layers": old.n_gpu_layers,
            "ctx_size": old.ctx_size,
            "n_threads": old.n_threads,
            "batch_size": old.batch_size,
        }
    )
    return settings


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0]


_FACTS_UNSAID: Final = {name: field.default for name, field in _Facts.model_fields.items()}
_CHOICES_UNSAID: Final = {name: field.default for name, field in _Choices.model_fields.items()}


class RegistryWriter:
    """Turns content into the file's bytes; a model that did not change since the last time is not written out anew."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[Model, bytes]] = {}

    def written(self, content: RegistryContent) -> bytes:
        """The file for ``content``."""
        lines: dict[str, tuple[Model, bytes]] = {}
        for model_id, model in content.models.items():
            known = self._lines.get(model_id)
            lines[model_id] = known if known and known[0] is model else (model, _model_line(model))
        self._lines = lines
        head = {
            "version": VERSION,
            "last_scan": content.last_scan.isoformat() if content.last_scan else None,
            "active_profile": content.active_profile,
            "applied_profile_setting": content.applied_profile_setting,
            "port_range": content.port_range,
        }
        models = [line for _, line in lines.values()] or [b""]
        # Joined once: with many models the file has megabytes, and each copy of it is felt.
        models[0] = f'{json.dumps(head)[:-1]}, "models": {{\n'.encode() + models[0]
        models[-1] += b"\n}}\n"
        return b",\n".join(models)


def _model_line(model: Model) -> bytes:
    facts = _said(model.facts, _FACTS_UNSAID)
    if identity := model.facts.identity:
        facts["identity"] = {name: getattr(identity, name) for name in _Identity.model_fields}
    if not math.isfinite(model.facts.size_params):
        del facts["size_params"]
    choices = _said(model.choices, _CHOICES_UNSAID)
    choices["runtime_settings"] = written(model.choices.runtime_settings)
    entry: dict[str, object] = {"facts": facts, "choices": choices, "present": model.present}
    if model.former_id:
        entry["former_id"] = model.former_id
    if model.last_whole:
        entry["last_whole"] = {name: getattr(model.last_whole, name) for name in _Content.model_fields}
    if model.copy_number:
        entry["copy_number"] = model.copy_number
    return f"{json.dumps(model.model_id)}: {json.dumps(entry)}".encode()


def _said(value: ModelFacts | Choices, unsaid: Mapping[str, object]) -> dict[str, object]:
    """The fields that are not what a reader takes for them where the file does not say; most are, of most models."""
    return {name: said for name, default in unsaid.items() if (said := getattr(value, name)) != default}
