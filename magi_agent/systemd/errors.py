"""What can go wrong between the agent and systemd.

::

    BusError (503, service "systemd")
    ├── BusDisconnected       there is no connection, or it ended while an answer was awaited
    ├── BusTimeout            no answer within the time allowed
    │   └── JobTimeout        the job was queued and did not end in time
    └── BusCallFailed         the other side answered with an error
        ├── AccessDenied      the caller may not do this
        ├── NoSuchUnit        systemd has no unit of this name
        └── UnitExists        a unit of this name is there already (a failed one keeps its name)
    JournalError (503, service "journal")    journalctl could not be run, or said no
"""

from magi_agent.errors import ServiceUnavailable


class BusError(ServiceUnavailable):
    """A call to systemd did not come to its end."""

    error = "ServiceUnavailable"

    def __init__(self, message: str) -> None:
        super().__init__("systemd", message)


class BusDisconnected(BusError):
    """There is no connection to the bus; whether a call in flight took effect is not known."""


class BusTimeout(BusError):
    """No answer came within the time allowed; whether the call took effect is not known."""


class JobTimeout(BusTimeout):
    """systemd took the job and did not finish it in time; it goes on with it."""


class BusCallFailed(BusError):
    """The other side answered with an error.

    ``name`` is the D-Bus error name (``org.freedesktop.systemd1.UnitExists``), ``text`` what it said.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{text} ({name})" if text else name)
        self.name = name
        self.text = text


class AccessDenied(BusCallFailed):
    """The caller may not do this."""


class NoSuchUnit(BusCallFailed):
    """systemd has no unit of this name loaded."""


class UnitExists(BusCallFailed):
    """A unit of this name is loaded already; a failed one keeps its name until its failure is reset."""


class JournalError(ServiceUnavailable):
    """The journal could not be read; the message is journalctl's own, and what to do about it."""

    error = "ServiceUnavailable"

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__("journal", message, retry_after)


_BY_NAME: dict[str, type[BusCallFailed]] = {
    "org.freedesktop.systemd1.UnitExists": UnitExists,
    "org.freedesktop.systemd1.NoSuchUnit": NoSuchUnit,
    "org.freedesktop.DBus.Error.AccessDenied": AccessDenied,
    "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired": AccessDenied,
}


def call_error(name: str, text: str) -> BusCallFailed:
    """Return the typed error for a D-Bus error reply."""
    return _BY_NAME.get(name, BusCallFailed)(name, text)
