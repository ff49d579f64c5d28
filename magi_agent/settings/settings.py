"""The settings, as one frozen object."""

import ipaddress
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

from magi_agent.runtime_settings.defaults import RuntimeDefaults
from magi_agent.vocabulary import LimitSource, Scope, ServerAccess, TcpAccess, TokenScope

DEFAULTS_SECTION: Final = "defaults"
"""The section with the runtime settings of all models, and in sections below it those of a tier's."""
UNIX: Final = "unix"
"""Where a reverse proxy is named: whoever is at the other end of the unix socket."""
NOTHING: Final = "none"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Where the TCP listener binds."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it."""
        return ipaddress.ip_address(self.host).is_loopback


@dataclass(frozen=True, slots=True)
class ProxyRight:
    """What a caller may do who comes through a reverse proxy, and brings no token."""

    proxy: str
    """The user that the proxy runs as, its address or network, or the word ``unix`` for any on the unix socket."""
    scope: TokenScope | None
    """``None`` for nothing at all."""

    def __str__(self) -> str:
        return f"{self.proxy}={self.scope or NOTHING}"

    @property
    def user(self) -> str | None:
        """The user it is about; ``None`` where it is about an address, a network or the unix socket."""
        return None if self.proxy == UNIX or is_network(self.proxy) else self.proxy


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything an operator can set. Times are in seconds."""

    model_scan_path: tuple[Path, ...]
    rescan_interval: float
    powerful_min: float
    fast_max: float
    registry_path: Path
    llama_server_path: Path
    llama_server_alternatives: tuple[tuple[str, Path], ...]
    """Name and path of each other binary that a model may be run by."""
    allowed_flags: tuple[str, ...]
    llama_server_host: str
    llama_server_user: str
    server_access: ServerAccess
    port_range: tuple[int, int]
    port_limits: tuple[int, int]
    max_startup_time: float
    readiness_check_interval: float
    stop_timeout: float
    log_rate_limit_interval: float
    log_rate_limit_burst: int
    memory_reserve: int
    """Bytes of the host's memory that no server gets."""
    memory_limits: LimitSource
    memory_headroom: float
    """Share of a model's anonymous memory that a derived limit adds to it."""
    gateway_max_body: int
    """Bytes of a request to a model."""
    gateway_timeout: float
    """For which a server may say nothing while a request waits for it."""
    gateway_queue: int
    """Requests that may wait for one model to start."""
    gateway_drain: float
    """Seconds that requests to models have to end when the agent stops."""
    profiles_path: tuple[Path, ...]
    active_profile: str
    tcp: TcpAddress | None
    tcp_access: TcpAccess
    socket: Path | None
    tokens_path: Path
    trusted_proxies: tuple[str, ...]
    proxy_access: tuple[ProxyRight, ...]
    cors_origins: tuple[str, ...]
    systemd_scope: Scope
    launcher_socket: Path | None
    """Where the launcher listens; ``None`` where the agent itself speaks to systemd."""
    journal_directory: Path | None
    log_level: str
    defaults: RuntimeDefaults = field(default_factory=RuntimeDefaults)
    """Runtime settings that hold where nobody chose; only the file says them."""

    @property
    def binaries(self) -> tuple[Path, ...]:
        """Every configured llama-server."""
        return self.llama_server_path, *(path for _, path in self.llama_server_alternatives)

    def binary(self, name: str | None) -> Path | None:
        """The llama-server of this name, the usual one for ``None``; ``None`` where there is no such name."""
        return self.llama_server_path if name is None else dict(self.llama_server_alternatives).get(name)

    @property
    def state_directory(self) -> Path:
        """Where the agent keeps what it must not lose: the registry's folder."""
        return self.registry_path.parent


def is_network(text: str) -> bool:
    """Whether this is an address or a network."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def within(ports: tuple[int, int], limits: tuple[int, int]) -> bool:
    """Whether a range of ports lies within another."""
    return limits[0] <= ports[0] and ports[1] <= limits[1]


def _shown_defaults(defaults: RuntimeDefaults) -> dict[str, str]:
    if defaults == RuntimeDefaults():
        return {}
    from magi_agent.runtime_settings.reading import written

    layers = {"": defaults.host, **{f"{tier}.": settings for tier, settings in defaults.tiers.items()}}
    return {
        f"{DEFAULTS_SECTION}.{prefix}{name}": value if isinstance(value, str) else json.dumps(value)
        for prefix, settings in layers.items()
        for name, value in written(settings).items()
    }


def _in_units(count: int) -> str:
    exponent = next((exponent for exponent in (4, 3, 2, 1) if count and not count % (1 << exponent * 10)), 0)
    return f"{count >> exponent * 10}{' KMGT'[exponent].strip()}"


def shown(settings: Settings) -> dict[str, str]:
    """Each setting's value as an operator would write it, by name; the defaults by ``defaults.`` and their names."""
    shown: dict[str, str] = {}
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name in ("port_range", "port_limits"):
            shown[each.name] = f"{value[0]}-{value[1]}"
        elif each.name == "llama_server_alternatives":
            shown[each.name] = ":".join(f"{name}={path}" for name, path in value)
        elif each.name in ("memory_reserve", "gateway_max_body"):
            shown[each.name] = _in_units(value)
        elif each.name == "defaults":
            shown |= _shown_defaults(value)
        elif isinstance(value, tuple):
            shown[each.name] = (":" if each.name.endswith("_path") else " ").join(map(str, value))
        elif value is None:
            shown[each.name] = "off" if each.name in ("tcp", "socket") else ""
        else:
            shown[each.name] = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    return shown
