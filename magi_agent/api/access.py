"""Who may what: one function turns a request into a caller, another holds the caller against what a route asks for.

* A request with a bearer token has the rights of that token, wherever it comes from, and one with a token that is not
  known, or has ended, has none: never those that it would have without it. On the paths for programs that use models it
  may be brought as ``X-Api-Key`` too, as Anthropic's clients do; elsewhere that header is a proxy's matter. Two
  different tokens in one request are none.
* On the unix socket the kernel names the peer: root, the agent's own user and members of the group ``magi`` may do
  everything, others may read.
* On TCP a caller on loopback may do what ``api.tcp_access`` says, and one from elsewhere nothing. What counts is the
  real socket. A browser on this host is no loopback caller where a page of another site speaks through it: the host
  asked for, and the origin where one is named, must be this one.
* What a proxy passes on may do what ``api.proxy_access`` says of that proxy, and without a word of it nothing: the
  proxy's own user or address says nothing about its client.
"""

import grp
import ipaddress
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import ClassVar, Final

from aiohttp import web

from magi_agent.api.forwarding import DIRECT, Place, ProxyRights, TrustedProxies, is_passed_on
from magi_agent.api.peers import Peer, Peers
from magi_agent.api.routes import Access
from magi_agent.configuration import Configuration
from magi_agent.errors import MagiError
from magi_agent.gateway.openai_errors import is_for_openai_clients
from magi_agent.settings.settings import ProxyRight
from magi_agent.tokens import is_secret, written
from magi_agent.vocabulary import TcpAccess, TokenScope

GROUP: Final = "magi"
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_TCP: Final = {
    TcpAccess.NONE: Access.OPEN,
    TcpAccess.READ: Access.READ,
    TcpAccess.INFER: Access.READ_AND_INFER,
    TcpAccess.FULL: Access.ADMIN,
}
_SCOPES: Final = {TokenScope.READ: Access.READ, TokenScope.INFER: Access.INFER, TokenScope.ADMIN: Access.ADMIN}
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::\d+)?")
_API_KEY: Final = "X-Api-Key"
_CHALLENGE: Final = 'Bearer realm="magi-agent"'


class AccessDenied(MagiError):
    """The caller may not do this."""

    challenge: ClassVar[str] = _CHALLENGE
    """What ``WWW-Authenticate`` says of how one could do better: https://www.rfc-editor.org/rfc/rfc6750#section-3."""


class Unauthorized(AccessDenied):
    """Nobody knows who the caller is, and without that there is nothing for them here."""

    error = "Unauthorized"
    status = 401


class BadToken(Unauthorized):
    """The token is not one that holds."""

    challenge = f'{_CHALLENGE}, error="invalid_token"'


class Forbidden(AccessDenied):
    """The caller is known, and may not do this."""

    error = "Forbidden"
    status = 403
    challenge = f'{_CHALLENGE}, error="insufficient_scope"'


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request."""

    name: str
    """For the log, and for whoever wants to know who wished for something."""
    access: Access
    place: Place = DIRECT
    """Where the caller sees this API."""
    hint: str = ""
    """Where not everything is allowed: why, in one sentence."""
    token: str | None = None
    """The name of the token that says what they may do."""
    has_bad_token: bool = False
    """Whether they brought a token that does not hold."""
    is_foreign: bool = False
    """Whether a page of another site speaks through them, as far as can be told."""
    whom: str = ""
    """Who it counts for, where each may have so much at a time: a token, a user of this host, or an address."""

    @property
    def prefix(self) -> str:
        """The path below which the caller sees this API."""
        return self.place.prefix


Identify = Callable[[web.BaseRequest], Caller]


def group_id() -> int | None:
    """The id of the group whose members may do everything; ``None`` where there is no such group."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


def require(caller: Caller, access: Access) -> None:
    """Raise ``Unauthorized`` or ``Forbidden`` where ``caller`` may not do what needs ``access``."""
    if access in caller.access:
        return
    if caller.has_bad_token:
        raise BadToken(caller.hint)
    needs, has = _word(access), _word(caller.access)
    if caller.is_foreign:
        raise Forbidden(caller.hint, {"needs": needs, "has": has})
    if caller.access is Access.OPEN:
        raise Unauthorized(caller.hint)
    raise Forbidden(f"this needs {needs} access: {caller.hint}", {"needs": needs, "has": has})


class Admission:
    """Turns requests into callers, by what the configuration says at that moment."""

    def __init__(self, configuration: Configuration, group: int | None) -> None:
        """``group`` is the id of the group whose members may do everything."""
        self._configuration = configuration
        self._proxies_of: tuple[tuple[str, ...], tuple[ProxyRight, ...], Mapping[str, int]] = ((), (), {})
        self._trusted = TrustedProxies(())
        self._rights = ProxyRights((), {})
        self._peers = Peers()
        self._group = group
        self._own_uid = os.geteuid()

    def identify(self, request: web.BaseRequest) -> Caller:
        """Who makes this request, and what they may do."""
        peer = self._peers.of(request.transport)
        self._keep_up_with_proxies()
        passed_on = is_passed_on(request) or self._rights.is_proxy(peer)
        if brought := _brought(request):
            return self._with_token(request, peer, brought)
        if passed_on:
            return self._through_proxy(request, peer)
        if peer.is_local:
            return self._on_unix_socket(peer)
        return self._on_tcp(request, peer)

    def _keep_up_with_proxies(self) -> None:
        configuration, settings = self._configuration, self._configuration.settings
        proxies = settings.trusted_proxies, settings.proxy_access, configuration.user_ids
        if proxies != self._proxies_of:
            self._proxies_of = proxies
            self._trusted = TrustedProxies(settings.trusted_proxies)
            self._rights = ProxyRights(settings.proxy_access, configuration.user_ids)

    def _with_token(self, request: web.BaseRequest, peer: Peer, brought: Collection[str]) -> Caller:
        client, place = self._trusted.client(request, peer), self._trusted.place(request, peer)
        if len(brought) > 1:
            return Caller(client, Access.OPEN, place, _DIFFERENT, has_bad_token=True)
        (secret,) = brought
        token = self._configuration.tokens.find(secret) if is_secret(secret) else None
        if token is None:
            hint = "the token is not known here; 'magictl token list' says which there are, and a reload reads new ones"
            return Caller(client, Access.OPEN, place, hint, has_bad_token=True)
        name = f"token {token.name} from {client}"
        if token.has_ended(datetime.now(UTC)):
            assert token.until is not None  # noqa: S101  # nothing else ends
            hint = f"the token {token.name} ended at {written(token.until)}; make another with 'magictl token add'"
            return Caller(name, Access.OPEN, place, hint, has_bad_token=True)
        if token.unknown:
            hint = f"the token {token.name} has a key that this agent does not know, and that may limit it: use another"
            return Caller(name, Access.OPEN, place, hint, has_bad_token=True)
        hint = f"the token {token.name} has the scope {token.scope}"
        return Caller(name, _SCOPES[token.scope], place, hint, token.name, whom=f"token {token.name}")

    def _through_proxy(self, request: web.BaseRequest, peer: Peer) -> Caller:
        client, place = self._trusted.client(request, peer), self._trusted.place(request, peer)
        right = self._rights.of(peer)
        if right is None or right.scope is None:
            hint = f"what comes through a proxy ({peer.name}) has no rights of its own here; {_BEARER}, or have "
            return Caller(client, Access.OPEN, place, f"{hint}api.proxy_access say what this proxy grants")
        if self._is_cross_site(request, request.headers.get("Host", ""), place.host):
            return Caller(client, Access.OPEN, place, _CROSS_SITE, is_foreign=True)
        whom = self._trusted.whom(request, peer)
        return Caller(client, _SCOPES[right.scope], place, f"api.proxy_access has {right}; {_BEARER}", whom=whom)

    def _on_unix_socket(self, peer: Peer) -> Caller:
        if peer.uid in (0, self._own_uid) or self._group in peer.groups:
            return Caller(peer.name, Access.ADMIN, whom=peer.whom)
        return Caller(
            peer.name,
            Access.READ,
            whom=peer.whom,
            hint=f"user {peer.uid} may only read; members of the group {GROUP} may do everything "
            f"(as root: usermod -aG {GROUP} USER, then log in again)",
        )

    def _on_tcp(self, request: web.BaseRequest, peer: Peer) -> Caller:
        if not peer.is_loopback:
            return Caller(peer.name, Access.OPEN, hint=f"{peer.name} is beyond loopback; {_BEARER}")
        host = request.headers.get("Host", "")
        if not _names_loopback(host):
            # A page of another site may have its own name lead to this host: DNS rebinding.
            hint = f"the request is for {host!r}, which is not this host's loopback; ask for localhost, or {_BEARER}"
            return Caller(peer.name, Access.OPEN, hint=hint, is_foreign=True)
        if self._is_cross_site(request, host):
            return Caller(peer.name, Access.OPEN, hint=_CROSS_SITE, is_foreign=True)
        word = self._configuration.settings.tcp_access
        if peer.uid is None and self._rights.names_users and _TCP[word] not in Access.READ:
            # One that has closed its end already is nobody's any more, and may be a proxy's whose client left.
            hint = f"the kernel does not say whose connection this is, and it may be a proxy's; {_BEARER}"
            return Caller(peer.name, Access.READ, hint=hint, whom=peer.whom)
        return Caller(peer.name, _TCP[word], hint=_TCP_HINTS[word], whom=peer.whom)

    def _is_cross_site(self, request: web.BaseRequest, *hosts: str | None) -> bool:
        """Whether a page of a site that is neither one of ``hosts`` nor named by the operator has a browser ask."""
        origin = request.headers.get("Origin")
        allowed = self._configuration.settings.cors_origins
        return origin is not None and origin not in allowed and origin.partition("://")[2] not in hosts


_BY_SOCKET: Final = f"use the unix socket, as root or as a member of the group {GROUP}"
_BEARER: Final = "send a token ('Authorization: Bearer TOKEN'; 'magictl token add' makes one)"
_TCP_HINTS: Final = {
    word: f"api.tcp_access is {word.value!r}: a caller on TCP may not do this; {_BY_SOCKET}, or {_BEARER}"
    for word in TcpAccess
}
_DIFFERENT: Final = "Authorization and X-Api-Key bring different tokens: send one of them, or the same in both"
_CROSS_SITE: Final = "a page of another site may do nothing here; api.cors_origins names those that may"


def _word(access: Access) -> str:
    return (access.name or "").lower()


def _brought(request: web.BaseRequest) -> Collection[str]:
    """The tokens that a request brings, each once: those that are empty are none, and were meant to be."""
    headers = request.headers
    bearer = _bearer(headers.getall("Authorization")) if "Authorization" in headers else None
    if _API_KEY not in headers or not is_for_openai_clients(request.path):
        return () if bearer is None else (bearer,)
    keys = [key.strip() for key in headers.getall(_API_KEY)]
    key = keys[0] if len(keys) == 1 else ""
    if bearer is None:
        return (key,)
    # Clients that have a token and no key may send both headers all the same.
    return (bearer,) if key == bearer or keys == [""] else (bearer, key)


def _bearer(given: Sequence[str]) -> str | None:
    """The token in ``Authorization``; ``None`` where something else is there, which is a proxy's matter.

    It is empty, which no token is, where a request can only be meant to bring one.
    """
    scheme, blank, secret = given[0].strip().partition(" ")
    if scheme.lower() == "bearer" or not blank:
        return secret.strip() if len(given) == 1 else ""
    return None if len(given) == 1 else ""


@lru_cache(maxsize=16)
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
