"""What ``magictl doctor`` looks at of the ports: those that models are given, and the agent's own."""

from collections.abc import Iterator
from typing import Final

from magi_agent.cli.answers import text
from magi_agent.cli.doctor_findings import Finding, failed, ok, unknown, warning
from magi_agent.cli.doctor_patient import Patient
from magi_agent.cli.phrasing import number
from magi_agent.host.listeners import listeners, owned_by
from magi_agent.host.systemctl import SystemctlFailed, properties
from magi_agent.servers.launch import SLICE
from magi_agent.servers.port_holder import holder_of
from magi_agent.vocabulary import ServerAccess

_MOST_PORTS: Final = 512
_MOST_HOLDERS: Final = 5


def ports(patient: Patient) -> Iterator[Finding]:
    """Whether the range of ports is free, but for those that servers of ours hold."""
    settings = patient.settings
    if settings and settings.server_access is ServerAccess.SOCKET:
        yield ok("servers listen on unix sockets and need no port")
        return
    told = patient.registry.get("portRange")
    pair = [int(port) for port in map(number, told) if port is not None] if isinstance(told, list) else []
    if len(pair) != 2:
        if settings is None:
            yield unknown("the range of ports is not known without the configuration")
            return
        pair = list(settings.port_range)
    low, high = pair
    looked_at = range(low, min(high, low + _MOST_PORTS - 1) + 1)
    ours, strangers = _held(looked_at, patient)
    given = {number(model.get("port")): model_id for model_id, model in patient.models.items()}
    for port in strangers[:_MOST_HOLDERS]:
        model_id = given.get(port)
        holder = holder_of(port)
        if model_id:
            yield failed(
                f"port {port} of {model_id} is held by {holder}", f"stop that, or: magictl port {model_id} auto"
            )
        else:
            also = ", and given to no model" if patient.registry else ""
            yield warning(f"port {port} is held by {holder}{also}")
    if len(strangers) > _MOST_HOLDERS:
        yield warning(f"{len(strangers) - _MOST_HOLDERS} more ports are held by others")
    free = len(looked_at) - len(ours) - len(strangers)
    said = f"ports {low} to {high}: {free} free, {len(ours)} held by servers of ours"
    if low + _MOST_PORTS <= high:
        said += f" (of the first {_MOST_PORTS})"
    if free or ours or not strangers:
        yield ok(said)
    else:
        yield failed(said, "magictl port-range LO-HI")
    yield from _own_port(patient)


def _own_port(patient: Patient) -> Iterator[Finding]:
    """Whether somebody else has the agent's port, which an agent without socket units makes its own socket at."""
    settings = patient.settings
    if settings is None or settings.tcp is None or patient.answers or not listeners(settings.tcp.port):
        return
    if patient.unit_or_none.get("ActiveState") == "active" or _has_socket_units(patient):
        return
    yield failed(
        f"port {settings.tcp.port}, the agent's own, is held by {holder_of(settings.tcp.port)}",
        f"stop that, or set tcp below [api] in {patient.config}",
    )


def _has_socket_units(patient: Patient) -> bool:
    try:
        return bool(patient.socket_units)
    except SystemctlFailed:
        return False


def _held(looked_at: range, patient: Patient) -> tuple[list[int], list[int]]:
    """The ports that servers of ours listen on, and those that others do."""
    try:
        group = properties(patient.servers_scope, SLICE, "ControlGroup").get("ControlGroup", "")
    except SystemctlFailed:
        group = ""
    running = {number(server.get("port")) for server in patient.servers if text(server.get("state")) != "stopped"}
    ours: list[int] = []
    strangers: list[int] = []
    for port in looked_at:
        if not listeners(port):
            continue
        is_ours = owned_by(port, group)
        # Where the kernel does not tell, the agent does.
        (ours if is_ours or (is_ours is None and port in running) else strangers).append(port)
    return ours, strangers
