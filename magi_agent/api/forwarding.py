"""What a reverse proxy says about the request it passes on: believed from trusted peers only.

That somebody passed a request on is taken at anybody's word, since saying so only ever costs rights.
"""

import ipaddress
import re
from collections.abc import Iterable
from typing import Final

from aiohttp import web

from magi_agent.api.peers import Peer

_MARKS: Final = (
    "X-Forwarded-For",
    "Forwarded",
    "X-Forwarded-Proto",
    "X-Forwarded-Host",
    "X-Forwarded-Prefix",
    "X-Real-IP",
    "Via",
)
_PREFIX: Final = re.compile(r"(?:/[A-Za-z0-9._~-]+)+/?")
_MAX_PREFIX: Final = 200
_UNIX: Final = "unix"


def is_passed_on(request: web.BaseRequest) -> bool:
    """Whether the request came through a proxy."""
    headers = request.headers
    return any(mark in headers for mark in _MARKS)


class TrustedProxies:
    """The peers whose ``X-Forwarded-*`` headers count."""

    def __init__(self, trusted: Iterable[str]) -> None:
        """``trusted`` are addresses, networks, and the word ``unix`` for every peer on the unix socket."""
        trusted = tuple(trusted)
        self._unix = _UNIX in trusted
        self._networks = [ipaddress.ip_network(word, strict=False) for word in trusted if word != _UNIX]

    def trusts(self, peer: Peer) -> bool:
        """Whether what this peer says of its clients is believed."""
        if peer.uid is not None:
            return self._unix
        return peer.address is not None and any(peer.address in network for network in self._networks)

    def prefix(self, request: web.BaseRequest, peer: Peer) -> str:
        """The path below which the client sees this API, without a slash at its end; empty where it is the root."""
        said = request.headers.get("X-Forwarded-Prefix")
        if said is None or len(said) > _MAX_PREFIX or not _PREFIX.fullmatch(said) or not self.trusts(peer):
            return ""
        parts = said.strip("/").split("/")
        return "" if any(part in (".", "..") for part in parts) else "/" + "/".join(parts)

    def client(self, request: web.BaseRequest, peer: Peer) -> str:
        """For the log: the client behind a trusted proxy, and the proxy; else the peer."""
        said = request.headers.get("X-Forwarded-For")
        if said is None or not self.trusts(peer):
            return peer.name
        # The last one is what the proxy itself saw; those before it are what its client claimed.
        nearest = said.rpartition(",")[2].strip()
        try:
            return f"{ipaddress.ip_address(nearest)} through {peer.name}"
        except ValueError:
            return peer.name
