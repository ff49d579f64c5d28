"""The closed sets of words that files, the wire and the parts of the agent share.

Every member's value is the word as it stands on the wire and on disk.
"""

from enum import StrEnum
from typing import Final

RESERVED_IDS: Final = frozenset({"registry", "servers", "profiles", "tiers", "port-range", "rescan"})
"""Words that stand in the API's paths where a model's id does, and so are none."""
MAX_ID_LENGTH: Final = 180
"""The longest id whose model can be started: systemd makes a folder of the unit's name and 75 more bytes."""


class Tier(StrEnum):
    """How heavy a model is, from a front end's point of view."""

    FAST = "fast"
    BALANCED = "balanced"
    POWERFUL = "powerful"


class ThinkingMode(StrEnum):
    """Whether a model reasons before it answers."""

    NONE = "none"
    OPTIONAL = "optional"
    """The chat template lets the caller switch thinking on and off."""
    ALWAYS = "always"


class ModelStatus(StrEnum):
    """Whether a model's files can be used."""

    OK = "ok"
    INCOMPLETE = "incomplete"
    """Data or parts are not there yet: a copy or a download in progress, or a cut one."""
    INVALID = "invalid"
    """The files are damaged, unreadable, or of no kind that llama-server loads."""
    MISSING = "missing"
    """The files are gone."""


class StartPolicy(StrEnum):
    """When an enabled model is started."""

    ALWAYS_ON = "alwaysOn"
    ON_DEMAND = "onDemand"
    MANUAL = "manual"


class LimitSource(StrEnum):
    """What the limits of memory of a server's unit come from."""

    DERIVED = "derived"
    """What the model needs, where a person set none."""
    OFF = "off"
    """What a person set, and nothing else."""


class ServerState(StrEnum):
    """The one state a model's server is in."""

    STOPPED = "stopped"
    STARTING = "starting"
    """systemd is starting the unit; llama-server has not been executed yet."""
    LOADING = "loading"
    """llama-server runs and is not proven ready."""
    READY = "ready"
    DEGRADED = "degraded"
    STOPPING = "stopping"
    FAILED = "failed"
    COOLDOWN = "cooldown"
    """It failed, and the agent waits before it tries again."""
    STUCK = "stuck"
    """It outlived SIGKILL."""


class EventType(StrEnum):
    """What kind of thing an event of the API's stream tells."""

    MODELS_CHANGED = "modelsChanged"
    CHOICES_CHANGED = "choicesChanged"
    SERVER_CHANGED = "serverChanged"
    SERVER_PROGRESS = "serverProgress"
    SERVER_TROUBLED = "serverTroubled"
    PROFILES_CHANGED = "profilesChanged"
    PROFILE_ACTIVATED = "profileActivated"
    CONFIGURATION_RELOADED = "configurationReloaded"
    OPERATION_FINISHED = "operationFinished"
    DRAIN_CHANGED = "drainChanged"


class Scope(StrEnum):
    """Which systemd manager owns the servers' units."""

    SYSTEM = "system"
    USER = "user"


class ServerAccess(StrEnum):
    """How a llama-server is reached, and by whom."""

    PORT = "port"
    """A TCP port, by everybody who can connect to it."""
    SOCKET = "socket"
    """A unix socket in a folder that only the agent and the server may enter."""
    KEY = "key"
    """A TCP port, by those who have the server's key: the agent, and root."""


class TcpAccess(StrEnum):
    """What a caller on loopback TCP may do without a token."""

    NONE = "none"
    READ = "read"
    INFER = "infer"
    """Read, and use the models."""
    FULL = "full"


class TokenScope(StrEnum):
    """What the bearer of a token may do; only ``admin`` includes the others."""

    READ = "read"
    INFER = "infer"
    """Use the models, on the paths that OpenAI's clients know."""
    ADMIN = "admin"
