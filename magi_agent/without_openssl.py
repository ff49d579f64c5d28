"""Keeps OpenSSL out of the process that imports this before anything else; for the service, not for ``magictl``.

A reverse proxy speaks TLS in the agent's place: the agent itself answers on a unix socket and on plain TCP, and asks
servers on this host. Python loads OpenSSL all the same, since asyncio and aiohttp offer TLS, and since hashlib would
rather have OpenSSL's digests than Python's own. That takes six megabytes, and would have what faces the network carry
the code of a protocol that nobody speaks to it.

All of them know how to do without, as a Python may have been built without it: a ``None`` in ``sys.modules`` makes an
import raise ``ModuleNotFoundError`` (https://docs.python.org/3/reference/import.html#the-module-cache). hashlib then
has all the digests that every Python has, SHA-256 among them; BLAKE2, which files are told apart by, is Python's own
at all times. Packages that need OpenSSL as a whole are imported in parts (parts_of_packages.py).

Should the agent ever have to speak TLS, nothing may import this any more. Taking the entries out later is not enough:
what was imported until then goes on without.
"""

import sys
from typing import Final

_LEFT_OUT: Final = ("ssl", "_hashlib")

for _name in _LEFT_OUT:
    # What was imported before this stays.
    sys.modules.setdefault(_name, None)  # type: ignore[arg-type]
