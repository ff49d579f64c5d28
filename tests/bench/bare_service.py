"""The least that a service on the agent's libraries is: it imports them, says READY, and waits for its end.

    python -m tests.bench.bare_service

The floor of the agent's start and memory: what no code of the agent's own can save. What the agent leaves out of its
libraries is left out here too.
"""

from __future__ import annotations

from magi_agent import without_openssl  # noqa: F401

# isort: split

import os
import signal

os.environ["FROZENLIST_NO_EXTENSIONS"] = "1"

import aiohttp.web  # noqa: F401
import click  # noqa: F401
import dbus_next.aio  # noqa: F401
import pydantic
import sdnotify
import yaml  # noqa: F401

from magi_agent.parts_of_packages import only_parts_of

only_parts_of("watchfiles")

import watchfiles._rust_notify  # noqa: E402, F401


class _Answer(pydantic.BaseModel):
    """One model, so that pydantic's own parts are there."""

    name: str


def main() -> None:
    """Say READY and wait for SIGTERM."""
    _Answer(name="bare")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    sdnotify.SystemdNotifier().notify("READY=1")
    signal.sigwait([signal.SIGTERM])


if __name__ == "__main__":
    main()
