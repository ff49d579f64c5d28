"""Who may what: one function turns a request into a caller, another holds the caller against what a route asks for.

* On the unix socket the kernel names the peer: root, the agent's own user and members of the group ``magi`` may do
  everything, others may read.
* On TCP a caller on loopback may do what ``api.tcp_access`` says, and one from elsewhere nothing. What counts is the
  real socket. A browser on this host is no loopback caller where a page of another site speaks through it: the host
  asked for, and on changes the origin, must be this one.
* What a proxy passes on has the rights of nobody: the proxy's own user or address says nothing about its client.
"""

import grp
import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from magi_agent.api.forwarding import TrustedProxies, is_passed_on
from magi_agent.api.peers import Peer, Peers
from magi_agent.api.routes import Access
from magi_agent.configuration import Configuration
from magi_agent.errors import MagiError
from magi_agent.vocabulary import TcpAccess

GROUP: Final = "magi"
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_TCP: Final = {TcpAccess.NONE: Access.OPEN, TcpAccess.READ: Access.READ, TcpAccess.FULL: Access.ADMIN}
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::\d+)?")


class Unauthorized(MagiError):
    """Nobody knows who the caller is, and without that there is nothing for them here."""

    error = "Unauthorized"
    status = 401


class Forbidden(MagiError):
    """The caller is known, and may not do this."""

    error = "Forbidden"
    status = 403


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request."""

    name: str
    """For the log, and for whoever wants to know who wished for something."""
    access: Access
    prefix: str = ""
    """The path below which the caller sees this API."""
    hint: str = ""
    """Where not everything is allowed: why, in one sentence."""


Identify = Callable[[web.BaseRequest], Caller]


def group_id() -> int | None:
    """The id of the group whose members may do everything; ``None`` where there is no such group."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


def require(caller: Caller, access: Access) -> None:
    """Raise ``Unauthorized`` or ``Forbidden`` where ``caller`` may not do what needs ``access``."""
    if caller.access >= access:
        return
    if caller.access is Access.OPEN:
        raise Unauthorized(caller.hint)
    raise Forbidden(caller.hint, {"needs": access.name.lower(), "has": caller.access.name.lower()})


class Admission:
    """Turns requests into callers, by what the configuration says at that moment."""

    def __init__(self, configuration: Configuration, group: int | None) -> None:
        """``group`` is the id of the group whose members may do everything."""
        self._configuration = configuration
        self._trusted: tuple[str, ...] = ()
        self._proxies = TrustedProxies(())
        self._peers = Peers()
        self._group = group
        self._own_uid = os.geteuid()

    def identify(self, request: web.BaseRequest) -> Caller:
        """Who makes this request, and what they may do."""
        peer = self._peers.of(request.transport)
        if is_passed_on(request):
            proxies = self._trusted_proxies()
            return Caller(
                proxies.client(request, peer),
                Access.OPEN,
                proxies.prefix(request, peer),
                "what comes through a proxy has no rights of its own here, and there are no tokens yet; " + _ADVICE,
            )
        if peer.uid is not None:
            return self._on_unix_socket(peer)
        return self._on_tcp(request, peer)

    def _trusted_proxies(self) -> TrustedProxies:
        trusted = self._configuration.settings.trusted_proxies
        if trusted != self._trusted:
            self._trusted, self._proxies = trusted, TrustedProxies(trusted)
        return self._proxies

    def _on_unix_socket(self, peer: Peer) -> Caller:
        if peer.uid in (0, self._own_uid) or self._group in peer.groups:
            return Caller(peer.name, Access.ADMIN)
        return Caller(
            peer.name,
            Access.READ,
            hint=f"user {peer.uid} may only read; members of the group {GROUP} may do everything "
            f"(as root: usermod -aG {GROUP} USER, then log in again)",
        )

    def _on_tcp(self, request: web.BaseRequest, peer: Peer) -> Caller:
        if not peer.is_loopback:
            hint = f"{peer.name} is beyond loopback, and there are no tokens yet; {_ADVICE}"
            return Caller(peer.name, Access.OPEN, hint=hint)
        host = request.headers.get("Host", "")
        if not _names_loopback(host):
            # A page of another site may have its own name lead to this host: DNS rebinding.
            hint = f"the request is for {host!r}, which is not this host's loopback; ask for localhost"
            return Caller(peer.name, Access.OPEN, hint=hint)
        word = self._configuration.settings.tcp_access
        if request.method not in SAFE_METHODS and self._is_cross_site(request, host):
            hint = "a page of another site may not change anything; api.cors_origins names those that may"
            return Caller(peer.name, min(Access.READ, _TCP[word]), hint=hint)
        hint = f"api.tcp_access is {word.value!r}: a caller on TCP may not do this; {_ADVICE}"
        return Caller(peer.name, _TCP[word], hint=hint)

    def _is_cross_site(self, request: web.BaseRequest, host: str) -> bool:
        origin = request.headers.get("Origin")
        allowed = self._configuration.settings.cors_origins
        return origin is not None and origin not in allowed and origin.partition("://")[2] != host


_ADVICE: Final = f"use the unix socket, as root or as a member of the group {GROUP}"


def _names_loopback(host: str) -> bool:
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = found[1].strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
