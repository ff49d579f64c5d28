"""What the agent tells the service manager above it: sd_notify(3), sd_watchdog_enabled(3).

This is the only module that imports sdnotify. It adds what sdnotify 0.3.2 lacks: a text that is not Latin-1 loses the
whole message there without a word, ``READY=1`` with it.
"""

import asyncio
import logging
import os
import socket
import time
import unicodedata
from collections.abc import Callable, MutableMapping
from typing import Final

from sdnotify import SystemdNotifier

_SEND_TIMEOUT: Final = 0.1
"""Seconds. Only a manager that does not read lets a message wait at all."""
_MAX_TEXT: Final = 1000
"""Characters of a status; systemd drops messages of more than 4096 bytes."""
_LIKENESS: Final = str.maketrans(
    {"\u2013": "-", "\u2014": "-", "\u2018": "'", "\u2019": "'", "\u2192": "->", "ß": "ss"}
)
"""What Unicode's own decomposition leaves as it is."""

Probe = Callable[[], bool | str]
"""Says ``True`` while all is well; ``False``, or in words what is wrong, when it is not."""

_LOG: Final = logging.getLogger(__name__)


class Notifier:
    """Talks to the manager that ``NOTIFY_SOCKET`` names; does nothing where there is none.

    The variables are taken out of ``environment``, so that no program this process executes takes them for its own.
    Nothing raises: a message that cannot be sent is a line in the log.
    """

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        variables = os.environ if environment is None else environment
        self._systemd = _connected_to(variables.pop("NOTIFY_SOCKET", ""))
        interval = _watchdog_interval(variables.pop("WATCHDOG_USEC", ""), variables.pop("WATCHDOG_PID", ""))
        self.watchdog_interval = interval if self._systemd is not None else None
        """Seconds within which the manager wants ``watchdog``, again and again; ``None`` where it does not."""

    def ready(self, status: str | None = None) -> None:
        """Say that the service does its work: at the end of the start, and of a reload."""
        self._send("READY=1", status)

    def reloading(self) -> None:
        """Say that the configuration is being read again; ``ready`` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str | None = None) -> None:
        """Say that the service has begun to stop."""
        self._send("STOPPING=1", status)

    def needs(self, seconds: float) -> None:
        """Ask for so many seconds for the start or the stop that goes on, from now on, where the unit allows fewer."""
        self._send(f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}")

    def status(self, text: str) -> None:
        """Say in one line how things are; ``systemctl status`` shows it."""
        self._send("", text)

    def watchdog(self) -> None:
        """Say that the service is alive."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Say nothing any more. Closing twice does no harm."""
        systemd, self._systemd = self._systemd, None
        self.watchdog_interval = None
        if systemd is not None:
            systemd.socket.close()

    def _send(self, state: str, status: str | None = None) -> None:
        if self._systemd is None:
            return
        message = "\n".join(filter(None, (state, f"STATUS={_line(status)}" if status is not None else "")))
        try:
            self._systemd.notify(message)
        except OSError as error:
            _LOG.warning("the service manager could not be told %s: %s", message.partition("\n")[0], error)


class Watchdog:
    """Tells the manager that the service is alive, as long as the probe says so.

    It runs in the event loop, so a loop that does not turn says nothing; neither does one whose probe finds something
    wrong. After ``notifier.watchdog_interval`` seconds of silence the manager ends the service.
    """

    def __init__(self, notifier: Notifier, probe: Probe) -> None:
        self._notifier = notifier
        self._probe = probe
        self._alive = True

    async def run(self) -> None:
        """Go on until cancelled; return at once where nobody wants to know."""
        while (interval := self._notifier.watchdog_interval) is not None:
            self._look()
            await asyncio.sleep(interval / 2)

    def _look(self) -> None:
        verdict = _verdict(self._probe)
        was_alive, self._alive = self._alive, verdict is True
        if self._alive:
            self._notifier.watchdog()
            if not was_alive:
                _LOG.warning("the service is alive again")
        elif was_alive:
            reason = verdict or "the liveness probe says no"
            _LOG.error("the watchdog is told nothing any more: %s", reason)
            self._notifier.status(f"Not alive: {reason}")


class _Connection(SystemdNotifier):  # type: ignore[misc]
    """sdnotify's sender, to an address that is given; its own way leaves a socket behind where none listens."""

    def __init__(self, address: str) -> None:
        self.debug = True
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self.socket.settimeout(_SEND_TIMEOUT)
            self.socket.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        except OSError:
            self.socket.close()
            raise


def _connected_to(address: str) -> _Connection | None:
    if not address:
        return None
    try:
        return _Connection(address)
    except OSError as error:
        _LOG.warning("the service manager cannot be told anything at %s: %s", address, error)
        return None


def _watchdog_interval(microseconds: str, pid: str) -> float | None:
    meant_for_us = not pid or pid == str(os.getpid())
    return int(microseconds) / 1_000_000 if meant_for_us and microseconds.isdecimal() and int(microseconds) else None


def _verdict(probe: Probe) -> bool | str:
    try:
        return probe()
    except Exception as error:  # noqa: BLE001  # see below
        # What nobody foresaw is no sign of life, and the watchdog is the last that may stop looking.
        return f"the liveness probe failed with {error!r}"


def _line(text: str) -> str:
    """Return the text as one line of ASCII: accents dropped, what has no likeness a question mark."""
    printable = "".join(character if character.isprintable() else " " for character in text.translate(_LIKENESS))
    plain = "".join(c for c in unicodedata.normalize("NFKD", printable) if not unicodedata.combining(c))
    return plain.encode("ascii", "replace").decode("ascii")[:_MAX_TEXT]
