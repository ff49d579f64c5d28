"""Where the agent is: a unix socket or a URL, and how the two are chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import SplitResult, quote, urlsplit

SYSTEM_SOCKET = "/run/magi-agent/api.sock"
DEFAULT_URL = "http://127.0.0.1:8000"

_KEPT_IN_PATHS = "/%:@!$&'()*+,;=~"
"""What may stand in a path as it is (RFC 3986)."""


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """A unix socket, by its path."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class UrlAddress:
    """An HTTP or HTTPS address; ``prefix`` is the path below which a reverse proxy serves the agent."""

    secure: bool
    host: str
    port: int
    prefix: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.prefix}"


Address = SocketAddress | UrlAddress


def parse_url(url: str) -> UrlAddress:
    """Read ``url``; a scheme may be left out.

    Raises ``ValueError`` with a sentence for the person who typed it.
    """
    text = url.strip()
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is no URL: {error}") from None
    if parts.scheme not in {"http", "https"}:
        raise ValueError(f"{url!r} must begin with http:// or https://; for a unix socket use --socket PATH")
    if not parts.hostname:
        raise ValueError(f"{url!r} names no host")
    if port == 0 or not _is_host(parts.hostname):
        raise ValueError(f"{url!r} is no URL: there can be no such host or port")
    _refuse_what_an_address_lacks(url, parts)
    secure = parts.scheme == "https"
    prefix = quote(parts.path.rstrip("/"), safe=_KEPT_IN_PATHS)
    return UrlAddress(secure, parts.hostname, port or (443 if secure else 80), prefix)


def is_on_this_host(address: Address) -> bool:
    """Return whether ``address`` can only be this host's: a unix socket, or its loopback interface."""
    if isinstance(address, SocketAddress):
        return True
    if address.host == "localhost":
        return True
    try:
        return ip_address(address.host).is_loopback
    except ValueError:
        return False


def _is_host(name: str) -> bool:
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return name.isprintable() and " " not in name


def _refuse_what_an_address_lacks(url: str, parts: SplitResult) -> None:
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL with a user name or password in it would show in the process list; leave them out")
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} has a query or a fragment; give the address only")


def default_address(environment: Mapping[str, str]) -> Address:
    """Choose where to look when no option says so.

    In order: ``MAGI_URL``; ``MAGI_SOCKET`` unless it is ``off`` (the agent's own setting of that name has this
    value too); the system's socket; the user's own; loopback TCP. Raises ``ValueError`` for a bad ``MAGI_URL``.
    """
    if url := environment.get("MAGI_URL", "").strip():
        try:
            return parse_url(url)
        except ValueError as error:
            raise ValueError(f"MAGI_URL: {error}") from None
    path = environment.get("MAGI_SOCKET", "").strip()
    if path and path.lower() != "off":
        return SocketAddress(path)
    candidates = [SYSTEM_SOCKET]
    if runtime := environment.get("XDG_RUNTIME_DIR", ""):
        candidates.append(f"{runtime}/magi-agent/api.sock")
    for candidate in candidates:
        if _is_there(candidate):
            return SocketAddress(candidate)
    return parse_url(DEFAULT_URL)


def _is_there(path: str) -> bool:
    try:
        Path(path).stat()
    except PermissionError:
        # A folder that we may not enter is there; asking it gives the error that tells what to do about it.
        return True
    except OSError:
        return False
    return True
