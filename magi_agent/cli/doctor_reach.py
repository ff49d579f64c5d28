"""What ``magictl doctor`` looks at of the way to the servers: whether the agent's sandbox lets it connect to them."""

import ipaddress
from collections.abc import Iterator
from typing import Final

from magi_agent.cli.answers import text
from magi_agent.cli.doctor_findings import Finding, ok, unknown, warning
from magi_agent.cli.doctor_patient import UNIT, Patient
from magi_agent.host.systemctl import SystemctlFailed, properties
from magi_agent.settings.settings import TcpAddress
from magi_agent.vocabulary import ServerAccess

_ALLOW: Final = "IPAddressAllow"
_DENY: Final = "IPAddressDeny"
_SLICE: Final = "Slice"
_MOST_SLICES: Final = 16
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def reach(patient: Patient) -> Iterator[Finding]:
    """Whether the agent may connect to the address that the servers listen at."""
    settings = patient.settings
    if settings is None:
        yield unknown("where the servers listen is not known without the configuration")
        return
    if settings.server_access is ServerAccess.SOCKET:
        yield ok("servers listen on unix sockets")
        return
    host = settings.llama_server_host
    address = _connected_to(host)
    try:
        allowed, denied = _networks(patient)
    except SystemctlFailed as error:
        yield unknown(f"systemd does not say where {UNIT} may connect to: {error}")
        return
    if _is_in(address, denied) and not _is_in(address, allowed) and not _is_reached(address, patient):
        yield warning(
            f"servers are to listen at {host}, and the sandbox of {UNIT} lets the agent connect to "
            f"{' and '.join(allowed) or 'no address'} alone: it would find none of them ready",
            f"{patient.control} edit {UNIT} (below [Service] {_ALLOW}={address}); "
            f"then: {patient.control} restart {UNIT}",
        )
        return
    yield ok(f"servers listen at {host}, where the agent may connect to them")


def _connected_to(host: str) -> _Address:
    """Where the agent connects to a server: those at all addresses it reaches by loopback."""
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        return ipaddress.ip_address("::1" if address.version == 6 else "127.0.0.1")
    return address


def _networks(patient: Patient) -> tuple[list[str], list[str]]:
    """What the agent's unit and the slices above it allow and deny together (systemd.resource-control(5))."""
    allowed: list[str] = []
    denied: list[str] = []
    unit = patient.unit
    for _ in range(_MOST_SLICES):
        allowed += unit.get(_ALLOW, "").split()
        denied += unit.get(_DENY, "").split()
        if not unit.get(_SLICE):
            break
        unit = properties(patient.scope, unit[_SLICE], _ALLOW, _DENY, _SLICE)
    return allowed, denied


def _is_in(address: _Address, networks: list[str]) -> bool:
    return any(address in ipaddress.ip_network(network, strict=False) for network in networks)


def _is_reached(address: _Address, patient: Patient) -> bool:
    """Whether a server is ready there: systemd enforces this where the kernel lets it alone."""
    there = f"http://{TcpAddress(str(address), 0)}".removesuffix("0")
    return any(
        server.get("isReady") is True and text(server.get("url")).startswith(there) for server in patient.servers
    )
