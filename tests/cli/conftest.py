"""What the tests of `magictl` share: a stand-in of the agent, and `magictl` called in this process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from magi_agent.cli.magictl import main
from tests.cli.stand_in import StandIn, model, standing_in


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of `magictl` ended, and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on standard output."""
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        """The one document on standard error."""
        return json.loads(self.err)


class Magictl(Protocol):
    """Runs `magictl` with these words."""

    def __call__(self, *words: str) -> Outcome: ...


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the environment says where an agent is, and none is where one is looked for."""
    for name in ("MAGI_URL", "MAGI_SOCKET", "MAGI_TOKEN_FILE", "XDG_RUNTIME_DIR", "MAGI_SYSTEMD_SCOPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("magi_agent.cli.address.SYSTEM_SOCKET", "/nonexistent/api.sock")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter and read, unlike those of ``tmp_path``."""
    with tempfile.TemporaryDirectory(prefix="magictl-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def magictl(capsys: pytest.CaptureFixture[str], nowhere: None) -> Magictl:
    def run(*words: str) -> Outcome:
        capsys.readouterr()
        status = main(list(words))
        written = capsys.readouterr()
        return Outcome(status, written.out, written.err)

    return run


@pytest.fixture
def agent(magictl: Magictl, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in with three models, where `magictl` looks for the agent."""
    stand_in = StandIn()
    stand_in.add(
        model("tiny-chat", sizeBytes=98_000_000, sizeParams=0.135, enabled=True),
        model("qwen2.5-7b", port=8081),
        model("old-14b", port=8082, sizeBytes=9_000_000_000, sizeParams=14.0, assignedTier="powerful"),
    )
    stand_in.models["old-14b"]["effectiveTier"] = "powerful"
    with standing_in(stand_in):
        monkeypatch.setenv("MAGI_URL", stand_in.url)
        yield stand_in
