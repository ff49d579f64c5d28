"""`magictl top`: its table from two looks, and the command against a real agent, on a terminal and in a pipe."""

from __future__ import annotations

import json
import signal
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from magi_agent.cli.usage_table import Sample, problems_of, sample_of, summary_of, usage_grid
from tests.agent_process import AgentProcess, ended
from tests.cli.terminal import on_terminal, piped, surroundings
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

MODEL = "top-toy"


def server(**changes: Any) -> dict[str, Any]:
    return {
        "modelId": "m", "state": "ready", "uptimeSeconds": 100, "memoryBytes": 1_500_000_000, "cpuSeconds": 10.0,
        "slotsTotal": 4, "slotsBusy": 1, "requestsWaiting": 0, "promptTokens": 100, "generatedTokens": 1000,
        "problem": None, **changes,
    }  # fmt: skip


def row(before: dict[str, Any], after: dict[str, Any], seconds: float = 2.0) -> dict[str, str]:
    first, second = Sample(0.0, 50.0, {"m": before}), Sample(seconds, 50.0 + seconds, {"m": after})
    grid = usage_grid(first, second)
    return {column.title: cell.text for column, cell in zip(grid.columns, grid.rows[0], strict=True)}


def test_what_grew_is_a_rate() -> None:
    later = server(uptimeSeconds=102, cpuSeconds=13.0, promptTokens=120, generatedTokens=1300, requestsWaiting=2)
    assert row(server(), later) == {
        "MODEL": "m", "STATE": "ready", "UPTIME": "1m 42s", "MEMORY": "1.5 GB", "CPU %": "150", "TOKENS/S": "150",
        "PROMPT/S": "10.0", "SLOTS": "1/4", "WAITING": "2",
    }  # fmt: skip


def test_a_server_that_began_anew_has_no_rate_yet() -> None:
    later = server(uptimeSeconds=1, cpuSeconds=0.5, promptTokens=3, generatedTokens=5)
    shown = row(server(), later)
    assert (shown["CPU %"], shown["TOKENS/S"], shown["PROMPT/S"]) == ("-", "-", "-")


def test_a_count_that_fell_is_no_negative_rate() -> None:
    assert row(server(), server(generatedTokens=900))["TOKENS/S"] == "0.0"


def test_what_is_not_known_is_not_shown_as_nothing() -> None:
    unknown = server(
        state="loading", memoryBytes=None, cpuSeconds=None, slotsTotal=None, slotsBusy=None, requestsWaiting=None,
        promptTokens=None, generatedTokens=None, uptimeSeconds=0,
    )  # fmt: skip
    shown = row(unknown, unknown)
    assert set(shown.values()) == {"m", "loading", "-"}
    assert row(server(), server(slotsTotal=None))["SLOTS"] == "1"


def test_a_look_that_the_agent_answered_from_memory_has_no_new_rate() -> None:
    assert row(server(), server(), seconds=0.1)["TOKENS/S"] == "-"


def test_all_in_a_line_and_what_is_wrong() -> None:
    sample = sample_of(
        {
            "at": "2026-01-02T03:04:05Z",
            "servers": [server(), server(modelId="n", state="failed", problem="it is tired")],
        },
        7.0,
    )
    assert summary_of(sample) == "2 servers, 1 ready, 3.0 GB in memory"
    assert problems_of(sample) == ["n: it is tired"]
    assert sample.taken == 7.0


@pytest.mark.parametrize("answer", [{}, {"at": 5, "servers": None}, {"at": "x", "servers": [1, {"modelId": 3}]}])
def test_an_answer_of_another_shape_breaks_nothing(answer: dict[str, Any]) -> None:
    sample = sample_of(answer, 0.0)
    usage_grid(sample, sample)
    summary_of(sample)


@pytest.fixture(scope="module")
def agent(
    tmp_path_factory: pytest.TempPathFactory,
    toy_model: MakeToyModel,
    llama_server: Path,
    unused_ports: PortRanges,
    systemd_user: SystemdUser,
) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("top")
    toy_model(folder / "models" / f"{MODEL}.gguf")
    agent = AgentProcess(folder, folder / "models", unused_ports(2), llama_server)
    with ended(agent, f"magi-llama-{MODEL}.service"):
        agent.start()
        agent.wait_settled()
        agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60")
        yield agent


@pytest.fixture
def environment(agent: AgentProcess) -> dict[str, str]:
    return surroundings(MAGI_SOCKET=str(agent.socket))


def test_in_a_pipe_it_is_one_table(environment: dict[str, str]) -> None:
    done = piped("top", environment=environment)
    assert done.returncode == 0, done.stderr
    head, shown = done.stdout.splitlines()
    assert [*head.split()][::4] == ["MODEL", "CPU", "SLOTS"]
    assert shown.split()[:2] == [MODEL, "ready"]
    assert "0/" in shown


def test_as_json_it_is_the_agents_answer(agent: AgentProcess, environment: dict[str, str]) -> None:
    told = json.loads(piped("top", "--json", environment=environment).stdout)
    assert told.keys() == agent.must("GET", "/api/usage").keys()
    assert told["servers"][0]["modelId"] == MODEL


def test_no_agent() -> None:
    assert piped("top", environment=surroundings(MAGI_SOCKET="/nonexistent")).returncode == 3


@pytest.mark.parametrize("end", ["q", "\x03", signal.SIGTERM])
def test_on_a_terminal_it_keeps_up_and_leaves_the_terminal_as_it_was(
    environment: dict[str, str], end: str | signal.Signals
) -> None:
    with on_terminal("top", columns=110, environment=environment) as terminal:
        before = termios.tcgetattr(terminal._screen)
        terminal.wait_for(lambda output: output.count(MODEL) >= 2, "it is drawn again")
        assert termios.tcgetattr(terminal._screen) != before, "keys come at once"
        assert "\x1b[?1049h" in terminal.output, "on a screen of its own"
        if isinstance(end, signal.Signals):
            terminal.process.send_signal(end)
        else:
            terminal.type(end)
        assert terminal.end() == 0
        assert termios.tcgetattr(terminal._screen) == before
        assert "\x1b[?1049l" in terminal.output
        assert "\x1b[?25h" in terminal.output, "the cursor is there again"


def test_an_agent_that_goes_away_is_said_and_waited_for(agent: AgentProcess, environment: dict[str, str]) -> None:
    with on_terminal("top", columns=110, environment=environment) as terminal:
        terminal.wait_for(lambda output: MODEL in output, "it is drawn")
        agent.stop()
        terminal.wait_for(lambda output: "is the agent up?" in output, "it says that the agent is away")
        length = len(terminal.output)
        agent.start()
        terminal.wait_for(lambda output: "ready" in output[length:].rpartition("is the agent up?")[2], "it is there")
        terminal.type("q")
        assert terminal.end() == 0
