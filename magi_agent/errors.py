"""The errors the agent's parts raise on purpose, and what each one is on the wire.

::

    MagiError
    ├── ConfigurationError            the start is refused
    ├── AlreadyRunning                another agent owns the same state
    ├── NotFound (404)
    │   ├── ModelNotFound
    │   ├── ProfileNotFound
    │   └── OperationNotFound
    ├── InvalidRequest (400, 422)
    │   ├── InvalidTier
    │   └── ValidationFailed
    ├── Conflict (409)
    │   ├── Draining
    │   ├── InsufficientMemory
    │   ├── ModelNotUsable
    │   ├── NoFreePort
    │   ├── PortInUse
    │   ├── ProfileExists
    │   ├── ProfileActive
    │   ├── ProfileReadOnly
    │   └── SettingsNotUsable
    ├── Failure (500)
    │   ├── RescanFailed
    │   ├── RegistrySaveFailed
    │   ├── ProfileCreationFailed
    │   ├── ProfileSaveFailed
    │   ├── ProfileInvalid
    │   ├── ProbeFailed
    │   ├── StartFailed
    │   └── StopFailed
    ├── TooManyStreams (429)
    └── ServiceUnavailable (503)

``error`` is the stable word on the wire, ``status`` the HTTP status that goes with it, the message one
sentence a person can act on, and ``details`` what a program can use, with camelCase keys.
"""

from collections.abc import Mapping
from typing import ClassVar


class MagiError(Exception):
    """Something the agent foresaw. ``str()`` of it is the sentence for a person."""

    error: ClassVar[str] = "InternalServerError"
    status: ClassVar[int] = 500
    is_trouble: ClassVar[bool] = True
    """Whether an answer of 5xx that it makes is worth a line in the journal."""

    def __init__(self, message: str, details: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, object] = dict(details or {})
        self.retry_after: int | None = None
        """Seconds after which asking again makes sense, where that is known."""


class ConfigurationError(MagiError):
    """A setting is unknown or bad; the message names the key, where it stands and what is allowed."""

    error = "ConfigurationError"


class AlreadyRunning(MagiError):
    """Another agent holds the lock on the same state."""

    error = "AlreadyRunning"


class NotFound(MagiError):
    """What the request names is not there."""

    error = "NotFound"
    status = 404


class ModelNotFound(NotFound):
    """No model has this id."""

    error = "ModelNotFound"

    def __init__(self, model_id: str) -> None:
        super().__init__(
            f"no model has the id {model_id!r}; GET /api/models/registry lists them", {"modelId": model_id}
        )


class ProfileNotFound(NotFound):
    """No profile has this name."""

    error = "ProfileNotFound"

    def __init__(self, name: str, available: list[str]) -> None:
        super().__init__(f"no profile is called {name!r}", {"profileName": name, "availableProfiles": available})


class OperationNotFound(NotFound):
    """No operation has this id, or it is so old that it was forgotten."""

    error = "OperationNotFound"

    def __init__(self, operation_id: str) -> None:
        super().__init__(f"no operation has the id {operation_id!r}", {"operationId": operation_id})


class InvalidRequest(MagiError):
    """The request itself is wrong."""

    error = "InvalidRequest"
    status = 400


class InvalidTier(InvalidRequest):
    """Not one of the three tiers."""

    error = "InvalidTier"

    def __init__(self, tier: object, valid: list[str]) -> None:
        super().__init__(f"{tier!r} is no tier; use one of {', '.join(valid)}", {"tier": tier, "validTiers": valid})


class ValidationFailed(InvalidRequest):
    """A field is missing, unknown, or of the wrong kind."""

    error = "ValidationError"
    status = 422

    def __init__(self, errors: list[dict[str, str]]) -> None:
        first = errors[0] if errors else {"field": "", "message": "the request is not valid"}
        where = f"{first['field']}: " if first["field"] else ""
        super().__init__(f"{where}{first['message']}", {"errors": errors})


class Conflict(MagiError):
    """The request is well formed and cannot be met as things stand."""

    error = "Conflict"
    status = 409


class Draining(Conflict):
    """The host is being drained: nothing is started."""

    error = "Draining"

    def __init__(self, by: str) -> None:
        super().__init__(
            f"the host is being drained by {by}, and nothing is started meanwhile; PUT /api/drain or "
            "'magictl drain --off' ends it",
            {"by": by},
        )


class InsufficientMemory(Conflict):
    """The server does not fit into the memory there is; ``details`` has the arithmetic, in bytes."""

    error = "InsufficientMemory"


class ModelNotUsable(Conflict):
    """The model's files are not whole."""

    error = "ModelNotUsable"


class NoFreePort(Conflict):
    """Every port of the range is given to a model or held by another process."""

    error = "NoFreePort"


class PortInUse(Conflict):
    """The model's port is held by a process that is not its server."""

    error = "PortInUse"


class ProfileExists(Conflict):
    """A profile of this name is there already."""

    error = "ProfileExists"


class ProfileActive(Conflict):
    """The active profile cannot be deleted."""

    error = "ProfileActive"


class ProfileReadOnly(Conflict):
    """The profile lies in a folder that belongs to the operator."""

    error = "ProfileReadOnly"


class SettingsNotUsable(Conflict):
    """The runtime settings that hold for a model cannot be carried out; ``details.errors`` names each."""

    error = "SettingsNotUsable"


class Failure(MagiError):
    """The agent tried and could not."""

    error = "InternalServerError"
    status = 500


class RescanFailed(Failure):
    """No folder could be scanned."""

    error = "RescanFailed"


class RegistrySaveFailed(Failure):
    """The registry could not be written; the change was undone."""

    error = "RegistrySaveFailed"


class ProfileCreationFailed(Failure):
    """The new profile could not be written."""

    error = "ProfileCreationFailed"


class ProfileSaveFailed(Failure):
    """A profile could not be replaced or deleted on disk."""

    error = "ProfileSaveFailed"


class ProfileInvalid(Failure):
    """The profile's file cannot be read as a profile."""

    error = "ProfileInvalid"


class ProbeFailed(Failure):
    """A llama-server binary did not say what it can do."""

    error = "ProbeFailed"


class StartFailed(Failure):
    """A server did not become ready."""

    error = "StartFailed"


class StopFailed(Failure):
    """A server runs on, since nobody could have it stopped; that is tried again."""

    error = "StopFailed"


class TooManyStreams(MagiError):
    """The caller has as many streams open as one may have; others have a place still."""

    error = "TooManyStreams"
    status = 429

    def __init__(self, what: str, most: int, whom: str) -> None:
        """``what`` they are and how many of them ``whom`` may have at a time."""
        super().__init__(
            f"{whom} has {most} {what} open, which is the most that one may have; close one, or ask again later",
            {"most": most, "of": whom},
        )
        self.retry_after = 5


class ServiceUnavailable(MagiError):
    """A part the request needs cannot answer now; ``details.service`` names it."""

    error = "ServiceUnavailable"
    status = 503

    def __init__(self, service: str, message: str, retry_after: int | None = None) -> None:
        """``retry_after`` is the number of seconds after which asking again makes sense, where that is known."""
        super().__init__(message, {"service": service})
        self.retry_after = retry_after
