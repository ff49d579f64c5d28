"""What the agent may ask of the launcher, and what it is told: one JSON object in one line, each way.

A connection carries one question. Its end before the answer changes nothing: what was begun is brought to its end.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from magi_agent.errors import MagiError, ModelNotUsable, ProbeFailed, SettingsNotUsable
from magi_agent.host.listed_devices import MOST_DEVICES
from magi_agent.runtime_settings.known_options import MAX_HELP
from magi_agent.servers.launch import NO_DEVICE
from magi_agent.servers.memory_limits import LARGEST_LIMIT, SMALLEST_LIMIT
from magi_agent.servers.questions import Question
from magi_agent.systemd.errors import BusError, JobTimeout
from magi_agent.vocabulary import MAX_ID_LENGTH, RESERVED_IDS

MAX_REQUEST: Final = 256 * 1024
"""Bytes. The longest thing in a request is a chat template."""
MAX_ANSWER: Final = 2 * MAX_HELP
"""Bytes. The longest answer is what a llama-server says of its options."""

ModelId = Annotated[str, StringConstraints(pattern=r"\A[a-z0-9]([a-z0-9._-]*[a-z0-9])?\z", max_length=MAX_ID_LENGTH)]
"""As the registry makes them, so fit for a unit's name."""
_MOST_SETTINGS: Final = 64
_Line = Annotated[str, StringConstraints(max_length=512)]
_Device = Annotated[str, StringConstraints(pattern=r"\A([A-Za-z][A-Za-z_]{0,30}[0-9]{1,3}|none)\z")]
"""One word: what ends an option, begins another, or lists several has other characters."""
_Bytes = Annotated[int, Field(ge=SMALLEST_LIMIT, le=LARGEST_LIMIT)]
_Path = Annotated[str, StringConstraints(pattern=r"\A[^\x00-\x1f\x7f]*\z", min_length=2, max_length=4096)]
"""The lengths are not the pattern's: pydantic's regex engine would take 8 MB to count so far."""


class Refused(MagiError):
    """The launcher does not do what it was asked: it is nothing that an operator could have configured."""

    error = "Refused"
    status = 403


class Unreachable(BusError):
    """There is no launcher to ask, or it left before it answered."""


class _Request(BaseModel):
    # Built at the first use: an agent without a launcher has none for the patterns, which take half a megabyte.
    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True, strict=True)


class MemoryLimitsRequest(_Request):
    """Limits of a unit's memory, in bytes, that follow from what the agent says the model needs."""

    high: _Bytes | None
    max: _Bytes | None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.high is not None and self.max is not None and self.high > self.max:
            raise ValueError("high is above max")
        return self


class StartRequest(_Request):
    """Make and start the unit of one model; a failed one of the same name gives way."""

    verb: Literal["start"]
    model_id: ModelId
    display_name: _Line
    model_path: _Path
    projector_path: _Path | None
    port: Annotated[int, Field(ge=1, le=65535)]
    settings: Annotated[dict[str, Any], Field(max_length=_MOST_SETTINGS)]
    """Runtime settings, as files hold them."""
    devices: Annotated[tuple[_Device, ...], Field(max_length=MOST_DEVICES)] = ()
    """The GPUs that the agent has chosen, by llama-server's names for them, or ``none`` alone."""
    is_fitted: bool = False
    """Whether llama-server has nothing to fit into memory by itself, by what the agent knows of GPUs."""
    memory_limits: MemoryLimitsRequest | None = None
    """What holds where the settings name no limit."""

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(devices)) < len(devices) or (NO_DEVICE[0] in devices and devices != NO_DEVICE):
            raise ValueError("names a device twice, or none beside others")
        return devices


class StopRequest(_Request):
    """Stop a model's unit, and answer when nothing of it runs."""

    verb: Literal["stop"]
    model_id: ModelId


class ClearRequest(_Request):
    """Forget that a model's unit failed."""

    verb: Literal["clear"]
    model_id: ModelId


class ProbeRequest(_Request):
    """Ask a configured llama-server for its options or devices, or NVIDIA's driver for its GPUs."""

    verb: Literal["probe"]
    question: Question = Question.OPTIONS
    binary: _Path | None = None
    """The llama-server; ``None`` for what is no question to one."""


Request = StartRequest | StopRequest | ClearRequest | ProbeRequest
_ADAPTER: Final[TypeAdapter[Request]] = TypeAdapter(
    Annotated[Request, Field(discriminator="verb")], config=ConfigDict(defer_build=True)
)
_KINDS: Final[Mapping[str, type[MagiError]]] = {
    kind.__name__: kind for kind in (Refused, ModelNotUsable, SettingsNotUsable, ProbeFailed)
}
_BUS_KINDS: Final[Mapping[str, type[BusError]]] = {kind.__name__: kind for kind in (JobTimeout, BusError)}


def read_request(line: bytes) -> Request:
    """The request in one line. Raises ``Refused``."""
    try:
        request = _ADAPTER.validate_json(line)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise Refused(f"this is no request: {f'{where}: ' if where else ''}{problem['msg']}") from None
    if not isinstance(request, ProbeRequest) and request.model_id in RESERVED_IDS:
        raise Refused(f"{request.model_id} is no model's id")
    return request


def written_request(verb: str, **fields: object) -> bytes:
    """A request as one line."""
    return json.dumps({"verb": verb, **fields}).encode() + b"\n"


def written_error(error: MagiError) -> bytes:
    """An answer that says what went wrong."""
    kinds: tuple[type[MagiError], ...] = (*_KINDS.values(), *_BUS_KINDS.values())
    kind = next((kind.__name__ for kind in kinds if isinstance(error, kind)), Refused.__name__)
    return written_answer(error={"kind": kind, "message": error.message, "details": error.details})


def written_answer(**fields: object) -> bytes:
    """An answer as one line."""
    return json.dumps(fields).encode() + b"\n"


def read_answer(line: bytes) -> dict[str, Any]:
    """The fields of an answer. Raises what the launcher says went wrong, and ``Unreachable`` for what is no answer."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise Unreachable("the launcher left without an answer; see: journalctl -u magi-launcher.service")
    error = answer.get("error")
    if not isinstance(error, dict):
        return answer
    message, kind = str(error.get("message")), str(error.get("kind"))
    if kind in _BUS_KINDS:
        raise _BUS_KINDS[kind](message)
    details = error.get("details")
    raise _KINDS.get(kind, Refused)(message, details if isinstance(details, dict) else None)
