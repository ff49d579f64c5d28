"""The address by which a caller reached the agent, for answers that somebody else is to follow."""

import ipaddress
import re
from typing import Final

from aiohttp import web

from magi_agent.api.exchange import CALLER
from magi_agent.errors import InvalidRequest

_NAME: Final = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?")
_MOST_NAME: Final = 253
_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?")
_PORTS: Final = range(1, 1 << 16)
_MOST_SHOWN: Final = 100


class InvalidHost(InvalidRequest):
    """What the request says of the host it is for is no name or address with or without a port."""

    error = "InvalidHost"


def asked_host(request: web.Request) -> str:
    """``host`` or ``host:port``, as the caller asked for it: what a proxy says that is believed, else ``Host``.

    It is the caller's own word, and nothing that is not a name, an address and a port. Raises ``InvalidHost``.
    """
    forwarded = request[CALLER].place.host
    header, said = ("Host", request.headers.get("Host", "")) if forwarded is None else ("X-Forwarded-Host", forwarded)
    if not _is_host(said):
        raise InvalidHost(
            f"{header} must be a name or an address, with or without a port, such as magi.example.org:8000, "
            f"not {said[:_MOST_SHOWN]!r}",
            {"header": header},
        )
    return said


def _is_host(said: str) -> bool:
    found = _HOST.fullmatch(said)
    if found is None or (found[3] is not None and int(found[3]) not in _PORTS):
        return False
    if found[1] is None:
        return len(found[2]) <= _MOST_NAME and _NAME.fullmatch(found[2]) is not None
    try:
        ipaddress.IPv6Address(found[1])
    except ValueError:
        return False
    return True
