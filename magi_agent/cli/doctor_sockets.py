"""What ``magictl doctor`` looks at of the socket units that hand the API's listeners over to the agent."""

import contextlib
import ipaddress
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from magi_agent.cli.doctor_agent import AS_ROOT
from magi_agent.cli.doctor_findings import Finding, failed, ok, unknown
from magi_agent.cli.doctor_patient import UNIT, UP, Patient, SocketUnit
from magi_agent.host.listeners import Listener, listeners
from magi_agent.host.systemctl import SystemctlFailed
from magi_agent.servers.port_holder import holder_of
from magi_agent.vocabulary import Scope

_EVERY_ADDRESS: Final = ("0.0.0.0", "::")  # noqa: S104  # others are found there; nobody listens here
_ENABLED: Final = frozenset({"enabled", "enabled-runtime"})
_PASSING: Final = frozenset({"resources", "start-limit-hit", "trigger-limit-hit", "service-start-limit-hit"})
"""What a socket unit fails by that may be over by now, such as an address that somebody else had."""
_OF_A_PROCESS: Final = "(process "


def sockets(patient: Patient) -> Iterator[Finding]:
    """Whether the sockets that systemd is to make for the agent are there."""
    try:
        units = patient.socket_units
    except SystemctlFailed as error:
        yield unknown(f"systemd does not say how the agent's sockets are: {error}")
        return
    if not units:
        yield ok("no socket unit is the agent's: it makes its sockets itself")
        return
    trouble = [finding for name, unit in units.items() if (finding := _wrong(name, unit, patient))]
    yield from trouble
    if trouble:
        return
    made = [address for unit in units.values() if unit.state in UP for address in unit.addresses]
    if made:
        yield ok(f"systemd listens for the agent at {' and '.join(made)}")
    else:
        yield ok(f"{' and '.join(units)} are switched off")


def _wrong(name: str, unit: SocketUnit, patient: Patient) -> Finding | None:
    """What is wrong with a socket unit; ``None`` where it is as it should be, or switched off."""
    # One command for both, in this order: while the service stops, the socket's start is queued between its stop and
    # its start. A socket is not started while the service runs, and after a stop of the service alone, whoever connects
    # to another of its sockets has it started before the socket is.
    restart = f"{patient.control} restart {UNIT} {name}"
    loaded, result = unit.properties.get("LoadState"), unit.properties.get("Result")
    if loaded != "loaded":
        return failed(
            f"systemd does not take {name} as it is ({loaded})",
            f"systemctl status {name}, which says why; {patient.control} edit {name}; then: {restart}",
        )
    if unit.state in UP:
        unheard = [address for address in unit.addresses if _is_unheard(address)]
        if not unheard:
            return None
        return failed(f"{name} says {unheard[0]}, and nobody listens there: it was changed since its start", restart)
    has_failed = unit.state == "failed"
    if not has_failed and unit.properties.get("UnitFileState") not in _ENABLED:
        return None
    said = f"{name} has failed ({result})" if has_failed else f"{name} is enabled and {unit.state}"
    for address in unit.addresses:
        if obstacle := _obstacle(address, name, patient):
            held, first = obstacle
            return failed(f"{said}: {held}", f"{first}; then: {restart}")
    if not has_failed:
        return failed(said, restart)
    if result in _PASSING:
        return failed(f"{said}; nothing is in its way now", restart)
    journal = f"journalctl {'--user-unit' if patient.scope is Scope.USER else '-u'} {name} -e"
    return failed(said, f"{journal}; then: {restart}")


def _obstacle(address: str, name: str, patient: Patient) -> tuple[str, str] | None:
    """Who or what is where a socket unit wants to listen, and what to do about that."""
    if address.startswith("/"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(Path(address).lstat().st_mode):
                return f"{address} is there and is no socket", f"sudo mv {address} {address}.old"
        return None
    found = _in_the_way(address)
    if not found or _are_of(found, patient.unit.get("MainPID", "0")):
        return None
    host, _, port = address.rpartition(":")
    holder = holder_of(int(port))
    if _OF_A_PROCESS not in holder:
        # It may be the agent itself, which keeps what it was handed over until it is restarted.
        return f"somebody listens at {address}", f"see who: {AS_ROOT}"
    another = f"an empty ListenStream=, then ListenStream={host}: and another port"
    return (
        f"{address}, where it is to listen, is held by {holder}",
        f"stop that, or: {patient.control} edit {name} (below [Socket] {another})",
    )


def _in_the_way(address: str) -> list[Listener]:
    """Who listens where a socket at ``address`` would."""
    host, _, port = address.rpartition(":")
    try:
        wanted = ipaddress.ip_address(host.strip("[]").partition("%")[0])
        found = listeners(int(port))
    except ValueError:
        return []
    return [each for each in found if wanted.is_unspecified or each.address in {str(wanted), *_EVERY_ADDRESS}]


def _is_unheard(address: str) -> bool:
    return address.rpartition(":")[2].isdecimal() and not address.startswith("/") and not _in_the_way(address)


def _are_of(found: list[Listener], pid: str) -> bool:
    """Whether a process has these sockets, as far as whoever calls may see."""
    wanted = {f"socket:[{listener.inode}]" for listener in found}
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                wanted.discard(str(Path(entry.path).readlink()))
    return not wanted
