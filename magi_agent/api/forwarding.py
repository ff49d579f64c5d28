"""What comes through a reverse proxy: how that is told, what the proxy says of its client, and what it may do.

That somebody passed a request on is taken at anybody's word, since saying so costs the rights one would have without
it; what a user sends that is named as a proxy's is passed on whatever it says. What a proxy says of its clients is
believed from trusted peers only, and what it passes on without a token may do what the operator says of that proxy.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from multidict import istr

from magi_agent.api.peers import Peer
from magi_agent.settings.settings import UNIX, ProxyRight

_MARKS: Final = frozenset(
    {
        istr("X-Forwarded-For"),
        istr("Forwarded"),
        istr("X-Forwarded-Proto"),
        istr("X-Forwarded-Host"),
        istr("X-Forwarded-Prefix"),
        istr("X-Forwarded-Port"),
        istr("X-Forwarded-Server"),
        istr("X-Real-IP"),
        istr("X-Client-IP"),
        istr("CF-Connecting-IP"),
        istr("Via"),
    }
)
_PREFIX: Final = re.compile(r"(?:/[A-Za-z0-9._~-]+)+/?")
_MAX_PREFIX: Final = 200
_OF_ONE_CLIENT: Final = 64
"""Bits that the addresses of one IPv6 client may have in common."""


def is_passed_on(request: web.BaseRequest) -> bool:
    """Whether the request came through a proxy."""
    return not request.headers.keys().isdisjoint(_MARKS)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client sees this API, as far as a proxy that is believed says so."""

    prefix: str = ""
    """The path below which it is, without a slash at its end; empty where it is the root."""
    host: str | None = None
    """The host that the client asked for, as it was said."""
    is_secure: bool = False
    """Whether the client speaks TLS."""


DIRECT: Final = Place()
"""Without a proxy, or with one that is not believed."""


class TrustedProxies:
    """The peers whose ``X-Forwarded-*`` headers count."""

    def __init__(self, trusted: Iterable[str]) -> None:
        """``trusted`` are addresses, networks, and the word ``unix`` for every peer on the unix socket."""
        trusted = tuple(trusted)
        self._unix = UNIX in trusted
        self._networks = [ipaddress.ip_network(word, strict=False) for word in trusted if word != UNIX]

    def trusts(self, peer: Peer) -> bool:
        """Whether what this peer says of its clients is believed."""
        if peer.is_local:
            return self._unix
        return peer.address is not None and any(peer.address in network for network in self._networks)

    def place(self, request: web.BaseRequest, peer: Peer) -> Place:
        """Where the client sees this API."""
        if not self.trusts(peer):
            return DIRECT
        headers = request.headers
        is_secure = headers.get("X-Forwarded-Proto", "").lower() == "https"
        return Place(_prefix(headers.get("X-Forwarded-Prefix", "")), headers.get("X-Forwarded-Host"), is_secure)

    def client(self, request: web.BaseRequest, peer: Peer) -> str:
        """For the log: the client behind a trusted proxy, and the proxy; else the peer."""
        address = self._behind(request, peer)
        return peer.name if address is None else f"{address} through {peer.name}"

    def whom(self, request: web.BaseRequest, peer: Peer) -> str:
        """Who it counts for, where each may have so much at a time: as far as the proxy is believed, its client."""
        address = self._behind(request, peer)
        if isinstance(address, ipaddress.IPv6Address):
            # One client may have all addresses of a network of this size.
            return str(ipaddress.ip_network((address, _OF_ONE_CLIENT), strict=False))
        return peer.whom if address is None else str(address)

    def _behind(self, request: web.BaseRequest, peer: Peer) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        said = request.headers.get("X-Forwarded-For")
        if said is None or not self.trusts(peer):
            return None
        # The last one is what the proxy itself saw; those before it are what its client claimed.
        try:
            return ipaddress.ip_address(said.rpartition(",")[2].strip())
        except ValueError:
            return None


def _prefix(said: str) -> str:
    if len(said) > _MAX_PREFIX or not _PREFIX.fullmatch(said):
        return ""
    parts = said.strip("/").split("/")
    return "" if any(part in (".", "..") for part in parts) else "/" + "/".join(parts)


class ProxyRights:
    """What may be done through each proxy without a token, as the operator says."""

    def __init__(self, rights: Iterable[ProxyRight], user_ids: Mapping[str, int]) -> None:
        """``user_ids`` are those of the users that ``rights`` name; a user without one is nobody's peer."""
        self._users: dict[int, ProxyRight] = {}
        self._networks: list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ProxyRight]] = []
        self._unix: ProxyRight | None = None
        for right in rights:
            if right.proxy == UNIX:
                self._unix = right
            elif right.user is None:
                self._networks.append((ipaddress.ip_network(right.proxy, strict=False), right))
            elif right.user in user_ids:
                self._users[user_ids[right.user]] = right

    @property
    def names_users(self) -> bool:
        """Whether some user of this host is named as a proxy's."""
        return bool(self._users)

    def is_proxy(self, peer: Peer) -> bool:
        """Whether everything of this peer comes through a proxy: it runs as a user that is named as one's."""
        return peer.uid in self._users

    def of(self, peer: Peer) -> ProxyRight | None:
        """What is said of the proxy that this peer is; ``None`` for nothing."""
        if peer.uid is not None and peer.uid in self._users:
            return self._users[peer.uid]
        if peer.is_local:
            return self._unix
        if peer.address is None:
            return None
        return next((right for network, right in self._networks if peer.address in network), None)
