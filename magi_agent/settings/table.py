"""The one table of what can be set.

The file's sections and keys, the environment's names, the command line's options and the page that documents them all
come from it.
"""

import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.settings.settings import NOTHING, UNIX, ProxyRight, TcpAddress, is_network
from magi_agent.vocabulary import LimitSource, Scope, ServerAccess, TcpAccess, TokenScope

_MAX_SECONDS: Final = 7 * 86_400.0
_MOST_LINES: Final = 1_000_000
_MOST_BYTES: Final = 1 << 60
_MOST_REQUESTS: Final = 100_000
_LEAST_HEADROOM: Final = 0.1
_MOST_HEADROOM: Final = 10.0
_LOG_LEVELS: Final = ("debug", "info", "warning", "error")
_USER_NAME: Final = r"[A-Za-z_][A-Za-z0-9_.-]{0,31}"


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that can be set: its place in the file, its name in the environment, and what it may be."""

    name: str
    section: str
    variable: str
    default: str
    parse: Callable[[object], object]
    help: str

    @property
    def option(self) -> str:
        """Its option on the command line."""
        return "--" + self.name.replace("_", "-")


def _text(value: object, allowed: str = "a string without control characters") -> str:
    if not isinstance(value, str) or any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ValueError(f"must be {allowed}")
    return value


def _path(value: object, allowed: str = "a path") -> Path:
    text = _text(value, allowed)
    if not text:
        raise ValueError(f"must be {allowed}")
    return Path(os.path.abspath(os.path.expanduser(text)))  # noqa: PTH100, PTH111  # links stay as the operator wrote them


def _optional_path(value: object) -> Path | None:
    return None if value == "" else _path(value, "a path, or empty")


def _paths(value: object) -> tuple[Path, ...]:
    allowed = "one or more folders, separated by ':' or as a list"
    parts = value if isinstance(value, list) else _text(value, allowed).split(":")
    paths = tuple(dict.fromkeys(_path(part, allowed) for part in parts if part != ""))
    # What is joined by colons, in the environment and in answers, cannot hold one.
    if not paths or any(":" in str(path) for path in paths):
        raise ValueError(f"must be {allowed}")
    return paths


def _words(value: object, allowed: str) -> tuple[str, ...]:
    parts = value if isinstance(value, list) else _text(value, allowed).replace(",", " ").split()
    words = tuple(dict.fromkeys(_text(part, allowed) for part in parts))
    if any(not word or "," in word or len(word.split()) != 1 or word != word.strip() for word in words):
        raise ValueError(f"must be {allowed}")
    return words


def _named_paths(value: object) -> tuple[tuple[str, Path], ...]:
    allowed = "names and paths, such as 'canary=/opt/llama/llama-server', separated by ':' or as a table"
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        text = _text(value, allowed)
        pairs = [entry.partition("=")[::2] for entry in text.split(":")] if text else []
    if not all(re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name) and path for name, path in pairs):
        raise ValueError(f"must be {allowed}; a name has lower-case letters, digits, '-' and '_'")
    for name, path in pairs:
        if not str(path).startswith(("/", "~")):
            # Most likely it is another key of the section, below the table's heading.
            raise ValueError(f"must be {allowed}, each path absolute; {name} is {path!r}")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"must be {allowed}, each name once")
    return tuple((name, _path(path, allowed)) for name, path in pairs)


def _flags(value: object) -> tuple[str, ...]:
    from magi_agent.runtime_settings.passing import RESERVED

    allowed = "options of llama-server, such as '--no-warmup'"
    flags = _words(value, allowed)
    for flag in flags:
        if not re.fullmatch(r"--[a-z0-9][a-z0-9-]*", flag):
            raise ValueError(f"must be {allowed}")
        if flag in RESERVED:
            raise ValueError(f"must not name {flag}, which stands for a runtime setting or is set by the agent alone")
    return flags


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError("must be a number") from None


def _seconds(value: object) -> float:
    try:
        seconds = _number(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= _MAX_SECONDS:
        raise ValueError(f"must be a number of seconds above 0, at most {_MAX_SECONDS:.0f}")
    return seconds


def _seconds_or_none(value: object) -> float:
    """Seconds, of which 0 is allowed."""
    try:
        seconds = _number(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_SECONDS:
        raise ValueError(f"must be a number of seconds from 0 to {_MAX_SECONDS:.0f}")
    return seconds


def _whole(value: object, most: int, allowed: str) -> int:
    """A whole number from 0 to ``most``. Raises ``ValueError`` with what is ``allowed``."""
    try:
        number = _number(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= most or number != int(number):
        raise ValueError(f"must be {allowed}")
    return int(number)


def _lines(value: object) -> int:
    return _whole(value, _MOST_LINES, f"a number of lines from 0, for no limit, to {_MOST_LINES}")


def _requests(value: object) -> int:
    return _whole(value, _MOST_REQUESTS, f"a whole number of requests from 0 to {_MOST_REQUESTS}")


def _bytes(value: object) -> int:
    allowed = "bytes, 0 or more, such as 536870912, '512M' or '2G'"
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value, allowed)
    # In powers of 1024, as systemd reads it.
    found = re.fullmatch(r"(\d{1,19})([KMGT]?)", text.strip().removesuffix("iB").upper(), re.ASCII)
    count = int(found[1]) << " KMGT".index(found[2] or " ") * 10 if found else -1
    if not 0 <= count <= _MOST_BYTES:
        raise ValueError(f"must be {allowed}")
    return count


def _headroom(value: object) -> float:
    try:
        share = _number(value)
    except ValueError:
        share = -1.0
    if not _LEAST_HEADROOM <= share <= _MOST_HEADROOM:
        raise ValueError(f"must be a share from {_LEAST_HEADROOM:g} to {_MOST_HEADROOM:g}, such as 0.25 for a quarter")
    return share


def _billions(value: object) -> float:
    try:
        size = _number(value)
    except ValueError:
        size = -1.0
    if not 0 <= size < 1e6:
        raise ValueError("must be a size in billions of parameters, 0 or more")
    return size


def _port_range(value: object) -> tuple[int, int]:
    text = "-".join(map(str, value)) if isinstance(value, list) else value
    ports = re.fullmatch(r"\s*(\d{1,5})\s*-\s*(\d{1,5})\s*", text, re.ASCII) if isinstance(text, str) else None
    low, high = (int(ports[1]), int(ports[2])) if ports else (0, 0)
    if not 0 < low <= high < 65_536:
        raise ValueError("must be two ports from 1 to 65535, the lower first, such as '8080-8099'")
    return low, high


def _address(value: object, allowed: str = "an IP address, such as '127.0.0.1'") -> str:
    text = _text(value, allowed)
    if text == "localhost":
        return "127.0.0.1"
    try:
        bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        return str(ipaddress.ip_address(bare))
    except ValueError:
        raise ValueError(f"must be {allowed}") from None


def _tcp(value: object) -> TcpAddress | None:
    if value == "off":
        return None
    allowed = "'off' or address and port, such as '127.0.0.1:8000'"
    host, _, port = _text(value, allowed).rpartition(":")
    if not re.fullmatch(r"\d{1,5}", port, re.ASCII) or int(port) >= 65_536:
        raise ValueError(f"must be {allowed}")
    return TcpAddress(_address(host, allowed), int(port))


def _socket(value: object) -> Path | None:
    if value == "off":
        return None
    allowed = "'off' or a path of at most 107 bytes (the kernel's limit for unix sockets)"
    path = _path(value, allowed)
    if len(os.fsencode(path)) > 107:
        raise ValueError(f"must be {allowed}")
    return path


def _launcher_socket(value: object) -> Path | None:
    return None if value == "" else _socket(value)


def _networks(value: object) -> tuple[str, ...]:
    allowed = "addresses or networks of reverse proxies, or the word 'unix'"
    networks = _words(value, allowed)
    if not all(network == UNIX or is_network(network) for network in networks):
        raise ValueError(f"must be {allowed}")
    return networks


def _proxy_access(value: object) -> tuple[ProxyRight, ...]:
    words = (NOTHING, *TokenScope)
    allowed = f"reverse proxies and what they grant ({', '.join(words)}), such as 'www-data=read 127.0.0.1=none'"
    if isinstance(value, dict):
        pairs = [(name, scope if isinstance(scope, str) else "") for name, scope in value.items()]
    else:
        pairs = [(name, scope) for name, _, scope in (word.partition("=") for word in _words(value, allowed))]
    if not all(scope in words and (is_network(name) or re.fullmatch(_USER_NAME, name)) for name, scope in pairs):
        raise ValueError(f"must be {allowed}; a proxy is the user it runs as, its address or network, or 'unix'")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"must be {allowed}, each proxy once")
    return tuple(ProxyRight(name, None if scope == NOTHING else TokenScope(scope)) for name, scope in pairs)


def _origins(value: object) -> tuple[str, ...]:
    allowed = "origins of web pages, such as 'https://chat.example.org'"
    origins = _words(value, allowed)
    if not all(re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@*]+", origin) for origin in origins):
        raise ValueError(f"must be {allowed}")
    return origins


def _choice(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return str(value)

    return parse


def _scope(value: object) -> Scope:
    return Scope(_choice(*Scope)(value))


def _server_access(value: object) -> ServerAccess:
    return ServerAccess(_choice(*ServerAccess)(value))


def _memory_limits(value: object) -> LimitSource:
    return LimitSource(_choice(*LimitSource)(value))


def _tcp_access(value: object) -> TcpAccess:
    return TcpAccess(_choice(*TcpAccess)(value))


SETTINGS: Final[tuple[Setting, ...]] = (
    Setting(
        "model_scan_path", "discovery", "MODEL_SCAN_PATH", "/models", _paths, "folder(s) to scan, separated by ':'"
    ),
    Setting("rescan_interval", "discovery", "MAGI_RESCAN_INTERVAL", "300", _seconds, "seconds between two whole scans"),
    Setting(
        "powerful_min",
        "discovery",
        "MAGI_POWERFUL_MIN",
        "14",
        _billions,
        "billions of parameters from which a model is powerful",
    ),
    Setting(
        "fast_max",
        "discovery",
        "MAGI_FAST_MAX",
        "7",
        _billions,
        "billions of parameters below which a model of at most 4 bits is fast",
    ),
    Setting("registry_path", "registry", "REGISTRY_PATH", "data/model_registry.json", _path, "the registry file"),
    Setting(
        "llama_server_path",
        "servers",
        "LLAMA_SERVER_PATH",
        "/usr/local/bin/llama-server",
        _path,
        "the llama-server binary",
    ),
    Setting(
        "llama_server_alternatives",
        "servers",
        "MAGI_LLAMA_SERVER_ALTERNATIVES",
        "",
        _named_paths,
        "other binaries that a model may be run by, as NAME=PATH, separated by ':'",
    ),
    Setting(
        "allowed_flags",
        "servers",
        "MAGI_ALLOWED_FLAGS",
        "",
        _flags,
        "llama-server's flags that may be given as extra flags of a model",
    ),
    Setting(
        "llama_server_host", "servers", "LLAMA_SERVER_HOST", "127.0.0.1", _address, "address the llama-servers bind"
    ),
    Setting(
        "llama_server_user",
        "servers",
        "MAGI_LLAMA_SERVER_USER",
        "",
        _text,
        "user the llama-servers run as in the system scope; empty for a dynamic one",
    ),
    Setting(
        "server_access",
        "servers",
        "MAGI_SERVER_ACCESS",
        "port",
        _server_access,
        "how the llama-servers are reached: port, socket (by the agent alone) or key (a port, by whoever has its key)",
    ),
    Setting("port_range", "servers", "MAGI_PORT_RANGE", "8080-8099", _port_range, "ports given to models"),
    Setting(
        "port_limits",
        "servers",
        "MAGI_PORT_LIMITS",
        "1024-65535",
        _port_range,
        "ports that may ever be given; a range chosen by the API must lie within",
    ),
    Setting(
        "max_startup_time",
        "servers",
        "MAX_STARTUP_TIME",
        "120",
        _seconds,
        "seconds without progress until a server that is not ready counts as failed",
    ),
    Setting(
        "readiness_check_interval",
        "servers",
        "READINESS_CHECK_INTERVAL",
        "2",
        _seconds,
        "longest pause between readiness checks, seconds",
    ),
    Setting(
        "stop_timeout", "servers", "MAGI_STOP_TIMEOUT", "20", _seconds, "seconds a server has to stop before SIGKILL"
    ),
    Setting(
        "log_rate_limit_interval",
        "servers",
        "MAGI_LOG_RATE_LIMIT_INTERVAL",
        "30",
        _seconds,
        "seconds in which a server may log as many lines as log_rate_limit_burst says",
    ),
    Setting(
        "log_rate_limit_burst",
        "servers",
        "MAGI_LOG_RATE_LIMIT_BURST",
        "1000",
        _lines,
        "lines of a server that journald takes in that time, and more where its disk has room; 0 for no limit",
    ),
    Setting(
        "memory_reserve",
        "servers",
        "MAGI_MEMORY_RESERVE",
        "512M",
        _bytes,
        "bytes of the host's memory that no server gets, such as 512M or 2G",
    ),
    Setting(
        "memory_limits",
        "servers",
        "MAGI_MEMORY_LIMITS",
        "derived",
        _memory_limits,
        "limits of memory for each server: derived from what its model needs, or off",
    ),
    Setting(
        "memory_headroom",
        "servers",
        "MAGI_MEMORY_HEADROOM",
        "0.25",
        _headroom,
        "share of a model's anonymous memory that a derived limit adds to it, beside 512 MiB",
    ),
    Setting(
        "gateway_max_body",
        "gateway",
        "MAGI_GATEWAY_MAX_BODY",
        "64M",
        _bytes,
        "bytes that a request to a model may have, images and all, such as 64M",
    ),
    Setting(
        "gateway_timeout",
        "gateway",
        "MAGI_GATEWAY_TIMEOUT",
        "3600",
        _seconds,
        "seconds for which a server may say nothing while a request waits for its answer",
    ),
    Setting(
        "gateway_queue",
        "gateway",
        "MAGI_GATEWAY_QUEUE",
        "100",
        _requests,
        "requests that may wait for one model to start; those beyond are told to come again",
    ),
    Setting(
        "gateway_drain",
        "gateway",
        "MAGI_GATEWAY_DRAIN",
        "60",
        _seconds_or_none,
        "seconds that requests to models have to end when the agent stops; 0 for none",
    ),
    Setting(
        "profiles_path",
        "profiles",
        "PROFILES_PATH",
        "config/profiles",
        _paths,
        "folders of profiles, separated by ':'; the last is written to",
    ),
    Setting(
        "active_profile",
        "profiles",
        "ACTIVE_PROFILE",
        "development",
        _text,
        "profile applied at the first start and when this value changes",
    ),
    Setting(
        "tcp", "api", "MAGI_TCP", "127.0.0.1:8000", _tcp, "TCP listener, or 'off'; systemd's socket unit wins over it"
    ),
    Setting(
        "tcp_access",
        "api",
        "MAGI_TCP_ACCESS",
        "read",
        _tcp_access,
        "what a caller on loopback TCP may do: none, read, infer (and read) or full",
    ),
    Setting(
        "socket",
        "api",
        "MAGI_SOCKET",
        "/run/magi-agent/api.sock",
        _socket,
        "unix socket listener, or 'off'; systemd's socket unit wins over it",
    ),
    Setting(
        "tokens_path",
        "api",
        "MAGI_TOKENS_PATH",
        "/etc/magi-agent/tokens",
        _path,
        "file of the tokens that say who a caller is",
    ),
    Setting(
        "trusted_proxies",
        "api",
        "MAGI_TRUSTED_PROXIES",
        "",
        _networks,
        "addresses of reverse proxies whose X-Forwarded-* headers count; 'unix' for peers on the unix socket",
    ),
    Setting(
        "proxy_access",
        "api",
        "MAGI_PROXY_ACCESS",
        "www-data=none caddy=none nginx=none haproxy=none traefik=none",
        _proxy_access,
        "what comes through a reverse proxy without a token may do: the proxy's user or address, and a scope or none",
    ),
    Setting(
        "cors_origins", "api", "MAGI_CORS_ORIGINS", "", _origins, "origins that browsers may call from; none by default"
    ),
    Setting(
        "systemd_scope",
        "systemd",
        "MAGI_SYSTEMD_SCOPE",
        "system",
        _scope,
        "the systemd manager whose units the servers are: system or user",
    ),
    Setting(
        "launcher_socket",
        "systemd",
        "MAGI_LAUNCHER_SOCKET",
        "",
        _launcher_socket,
        "unix socket of the launcher, where the agent may not start units itself",
    ),
    Setting(
        "journal_directory",
        "systemd",
        "MAGI_JOURNAL_DIRECTORY",
        "",
        _optional_path,
        "folder of the journal, where it is not the host's own",
    ),
    Setting("log_level", "agent", "MAGI_LOG_LEVEL", "info", _choice(*_LOG_LEVELS), "debug, info, warning or error"),
)
