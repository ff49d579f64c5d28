"""``magi-launcher``: the privileged part, started by its socket unit. Not for people to run."""

import asyncio
import os
import pwd
import signal
import socket
import sys
from pathlib import Path
from typing import Final

from magi_agent.configuration import ConfigurationSources
from magi_agent.errors import ConfigurationError, MagiError
from magi_agent.launcher.service import LauncherService
from magi_agent.log_output import set_up_logging
from magi_agent.systemd.socket_activation import inherited_sockets
from magi_agent.vocabulary import Scope

IDENTIFIER: Final = "magi-launcher"
AGENT_USER: Final = "magi-agent"
_STATE_DIRECTORY: Final = Path("/var/lib/magi-launcher")
_IDLE_SECONDS: Final = 300.0
_LOG_LEVEL: Final = "info"
_USAGE: Final = 64
"""EX_USAGE of sysexits.h."""
_CONFIGURATION: Final = 78
"""EX_CONFIG of sysexits.h."""


def main() -> int:
    """Answer on the socket that systemd handed over, until nobody asks; returns the exit status."""
    if len(sys.argv) > 1:
        sys.stderr.write("magi-launcher takes no arguments; magi-launcher.socket starts it\n")
        return _USAGE
    try:
        handed_over = inherited_sockets(os.environ)
        if len(handed_over) != 1 or handed_over[0][1].family != socket.AF_UNIX:
            sys.stderr.write("magi-launcher is started by magi-launcher.socket, which hands it one unix socket\n")
            return _USAGE
        sources = ConfigurationSources({}, os.environ)
        scope = _set_up(sources)
        service = LauncherService(
            handed_over[0][1],
            sources.read,
            scope,
            _callers(),
            Path(os.environ.get("STATE_DIRECTORY") or _STATE_DIRECTORY),
            _IDLE_SECONDS,
        )
        asyncio.run(_serve(service))
    except MagiError as error:
        sys.stderr.write(f"magi-launcher: {error}\n")
        return _CONFIGURATION
    return 0


def _set_up(sources: ConfigurationSources) -> Scope:
    """Set up the log, and return whose systemd it is; where the configuration is bad, who asks is told so."""
    try:
        settings = sources.read()
    except ConfigurationError:
        set_up_logging(_LOG_LEVEL, IDENTIFIER)
        return Scope.SYSTEM
    set_up_logging(settings.log_level, IDENTIFIER)
    return settings.systemd_scope


async def _serve(service: LauncherService) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, service.end.set)
    await service.run()


def _callers() -> frozenset[int]:
    try:
        return frozenset({0, pwd.getpwnam(AGENT_USER).pw_uid})
    except KeyError:
        return frozenset({0})


if __name__ == "__main__":
    sys.exit(main())
