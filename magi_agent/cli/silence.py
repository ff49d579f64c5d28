"""An agent that takes a connection and does not answer: said after a second, with what systemd knows of it.

Where systemd holds the sockets, everybody is connected whether the agent runs or not, and waits while it is started,
again and again where it cannot start.
"""

import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from magi_agent.cli.address import SYSTEM_SOCKET, Address, SocketAddress
from magi_agent.cli.exits import UnreachableError
from magi_agent.vocabulary import Scope

_SAID_AFTER: Final = 1.0
"""Seconds without an answer that nobody needs to be told of."""
_LOOK_EVERY: Final = 0.5
_FAILURES: Final = 2
"""How often it must have failed to start: once may have been a crash, after which it comes up."""
_UNIT: Final = "magi-agent.service"
_ASKED: Final = ("LoadState", "ActiveState", "SubState", "Result", "ExecMainStatus", "InvocationID", "StatusText")
_UP: Final = frozenset({"active", "reloading", "refreshing"})
_STOPPING: Final = "deactivating"
_LONGEST_STOP: Final = 300.0
"""Seconds of an old agent's stop, in which it finishes what it was asked, that are nobody's limit."""


@dataclass(slots=True)
class _Service:
    """What was seen of the agent's service while it did not answer."""

    scope: Scope
    invocation: str = ""
    failures: int = 0
    last_result: str = ""
    state: str = ""
    is_up: bool = False
    is_stopping: bool = False
    is_failed: bool = False

    def look(self) -> bool:
        """Ask systemd; tells whether it has such a service."""
        # Hardly anybody comes here, and all would pay for the import.
        from magi_agent.host.systemctl import SystemctlFailed, properties

        try:
            found = properties(self.scope, _UNIT, *_ASKED)
        except SystemctlFailed:
            return False
        if found.get("LoadState", "not-found") == "not-found":
            return False
        active, result = found.get("ActiveState", ""), found.get("Result", "")
        invocation = found.get("InvocationID", "")
        self.is_up = active in _UP
        self.is_stopping = active == _STOPPING and result == "success"
        if self.invocation and invocation != self.invocation:
            # The run that was seen last has ended, and another was begun.
            self.failures += 1
        self.invocation = invocation
        if result not in {"", "success"}:
            status = found.get("ExecMainStatus", "")
            self.last_result = f"{result}, status {status}" if result == "exit-code" else result
        self.is_failed = active == "failed" or (self.failures >= _FAILURES and not self.is_up)
        self.state = f"{active} ({found.get('SubState', '')})"
        if text := found.get("StatusText"):
            self.state += f": {text}"
        return True


class Silence:
    """Waits for the first answer of an agent."""

    def __init__(
        self, address: Address, say: Callable[[str], None], environment: Mapping[str, str] | None = None
    ) -> None:
        """``say`` tells a person one line; ``environment`` is that of the process."""
        self._address = address
        self._say = say
        self._scope = _scope_of(address, os.environ if environment is None else environment)
        self._said = False

    def until_answered(self, channel: socket.socket, seconds: float, *, quiet: bool) -> float:
        """Return when there is something to read, or after so many seconds; how many of them are left.

        Those do not count in which an agent stops that finishes what it was asked before: the next one answers.

        ``quiet`` is to say nothing of a wait that the agent needs for what it does. Raises ``UnreachableError`` where
        the agent cannot start.
        """
        deadline = time.monotonic() + seconds
        if _is_readable(channel, min(_SAID_AFTER, seconds)):
            return deadline - time.monotonic()
        service = _Service(self._scope) if self._scope else None
        spared = 0.0
        while (left := deadline - time.monotonic()) > 0:
            if service is not None and not service.look():
                service = None
            if service is not None and service.is_failed:
                raise self._cannot_start(service)
            self._tell(service, quiet=quiet)
            if service is None or service.is_up:
                # From here on it takes its time, which systemd knows nothing of.
                break
            began = time.monotonic()
            is_there = _is_readable(channel, min(_LOOK_EVERY, left))
            if service.is_stopping and spared < _LONGEST_STOP:
                spared += time.monotonic() - began
                deadline += time.monotonic() - began
            if is_there:
                break
        return deadline - time.monotonic()

    def _tell(self, service: _Service | None, *, quiet: bool) -> None:
        if self._said or quiet:
            return
        self._said = True
        where = f"{_UNIT} is {service.state}" if service else f"nothing comes from {self._address} yet"
        self._say(f"waiting for the agent: {where}; Ctrl-C gives up")

    def _cannot_start(self, service: _Service) -> UnreachableError:
        user = " --user" if service.scope is Scope.USER else ""
        last = f" ({service.last_result})" if service.last_result else ""
        again = f"; it failed {service.failures} times while this waited" if service.failures else ""
        return UnreachableError(
            f"the agent at {self._address} cannot start: {_UNIT} is {service.state}{last}{again}; "
            f"see: systemctl{user} status {_UNIT}; journalctl{user} -u {_UNIT} -e",
            {"address": str(self._address), "reason": "failed", "unit": _UNIT, "state": service.state},
        )


def _scope_of(address: Address, environment: Mapping[str, str]) -> Scope | None:
    """Whose service answers at an address, as far as the address tells."""
    if not isinstance(address, SocketAddress):
        return None
    if address.path == SYSTEM_SOCKET:
        return Scope.SYSTEM
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    return Scope.USER if runtime and address.path == f"{runtime}/magi-agent/api.sock" else None


def _is_readable(channel: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
