"""Clients who ask the API all the time, by new connections, while something happens to the agent."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tests.system.host import SOCKET, Background, Host

_ENOUGH = 3
LONGEST_ANSWER_MS = 15_000
"""An agent that is started afresh answers within this, also who connected while there was none."""


@dataclass(frozen=True, slots=True)
class Clients:
    """One client on each listener of the agent."""

    by_path: dict[str, Background]

    def nobody_was_refused(self, broken: int, fine: tuple[int, ...] = (200,)) -> None:
        """Fail unless each could connect each time, and got an answer, at the latest when asking a second time.

        ``broken`` is how often each may have had its connection closed without an answer, ``fine`` what the answers
        may be.
        """
        for path, client in self.by_path.items():
            client.until_lines(_ENOUGH)
            lines = client.stop()
            wrong = [line for line in lines if not line.startswith(tuple(f"answered {status} " for status in fine))]
            assert not any(line.startswith("refused") for line in lines), f"{path}: {wrong}"
            assert all(line.startswith("broken") for line in wrong), f"{path}: {wrong}"
            assert len(wrong) <= broken, f"{path}: {wrong}"
            for first, second in itertools.pairwise(lines):
                assert not (first in wrong and second in wrong), f"{path}: twice in a row, {wrong}"
            longest = max(int(line.split()[2]) for line in lines if line not in wrong)
            assert longest <= LONGEST_ANSWER_MS, f"{path}: an answer took {longest} ms"


@contextlib.contextmanager
def clients_of(host: Host) -> Iterator[Clients]:
    """Have clients ask, on the unix socket and on TCP, until the block is left."""
    with (
        host.background("ask_often", f"unix:{SOCKET}", "/api/models/servers") as unix,
        host.background("ask_often", "tcp:127.0.0.1:8000", "/health/live") as tcp,
    ):
        clients = Clients({"unix": unix, "tcp": tcp})
        host.until(
            lambda: all(client.count("answered") for client in clients.by_path.values()), "both are answered", 10
        )
        yield clients
