"""Events as they stand on the wire: one pydantic model for each kind.

Each carries its own id and kind, so that a line of JSON says as much as a server-sent event does.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, RootModel

from magi_agent.api.schemas import Answer
from magi_agent.vocabulary import ServerState

GapReason = Literal["agentRestarted", "tooOld", "unknownId", "tooSlow"]


class OneEvent(Answer):
    """What every event has."""

    id: str = Field(description="`<life of the agent>-<number>`; what Last-Event-ID takes")
    type: str
    at: datetime


class ModelsChangedEvent(OneEvent):
    """A scan found something new, changed or gone; ids of models."""

    type: Literal["modelsChanged"] = "modelsChanged"
    added: list[str]
    changed: list[str]
    removed: list[str]
    unlisted: int = Field(description="how many more there are than the lists have room for")


class ChoicesChangedEvent(OneEvent):
    """A person chose something for a model."""

    type: Literal["choicesChanged"] = "choicesChanged"
    model_id: str


class EventFailure(Answer):
    """Why a server is in the state that it is in."""

    result: str = Field(description="as in a server's `failure`")
    message: str


class ServerChangedEvent(OneEvent):
    """A model's server went from one state to another."""

    type: Literal["serverChanged"] = "serverChanged"
    model_id: str
    before: ServerState
    after: ServerState
    failure: EventFailure | None = Field(description="where a failure led to it; the server's own has the log lines")
    forced: bool = Field(description="whether it starts by force: also where it does not fit into memory")


class ServerProgressEvent(OneEvent):
    """A server that is not ready yet gets on; null is what cannot be known."""

    type: Literal["serverProgress"] = "serverProgress"
    model_id: str
    elapsed_seconds: float
    cpu_seconds: float | None
    memory_bytes: int | None = Field(description="of its control group, what is read of the model's file included")
    read_bytes: int | None = Field(description="from the disk; what the kernel has in memory is not read again")
    model_bytes: int | None = Field(description="the size of the model's files")


class ServerTroubledEvent(OneEvent):
    """Something could not be done about a model's server, and is tried again."""

    type: Literal["serverTroubled"] = "serverTroubled"
    model_id: str
    message: str


class ProfilesChangedEvent(OneEvent):
    """A profile was made, replaced or deleted."""

    type: Literal["profilesChanged"] = "profilesChanged"
    name: str


class ProfileActivatedEvent(OneEvent):
    """A profile is the active one from now on."""

    type: Literal["profileActivated"] = "profileActivated"
    name: str
    by: str


class ConfigurationReloadedEvent(OneEvent):
    """The configuration was read again, and was good; keys as the file has them."""

    type: Literal["configurationReloaded"] = "configurationReloaded"
    changed: list[str]
    awaiting_restart: list[str]


class OperationFinishedEvent(OneEvent):
    """An action on several models came to its end."""

    type: Literal["operationFinished"] = "operationFinished"
    operation_id: str
    kind: str
    succeeded: bool


class DrainChangedEvent(OneEvent):
    """Nothing is started any more, or that was taken back."""

    type: Literal["drainChanged"] = "drainChanged"
    draining: bool
    by: str


class GapEvent(OneEvent):
    """Events between the last one that the client has and this one are missing: what they changed is to be asked for.

    What comes after it is whole again.
    """

    type: Literal["gap"] = "gap"
    reason: GapReason
    message: str


class EventAnswer(
    RootModel[
        Annotated[
            ModelsChangedEvent
            | ChoicesChangedEvent
            | ServerChangedEvent
            | ServerProgressEvent
            | ServerTroubledEvent
            | ProfilesChangedEvent
            | ProfileActivatedEvent
            | ConfigurationReloadedEvent
            | OperationFinishedEvent
            | DrainChangedEvent
            | GapEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """One event."""
