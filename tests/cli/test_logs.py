"""`magictl logs` and `magictl history`: what real units wrote, by a real agent."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent_process import AgentProcess, ended
from tests.api.speakers import Speaker
from tests.cli.terminal import MAGICTL, on_terminal, piped, shown, surroundings, without_control
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

PREFIX = "cli-logs"
MODEL = f"{PREFIX}-speaker.q4_1"
SILENT = f"{PREFIX}-silent"
RUNS = f"{PREFIX}-runs"


@pytest.fixture(scope="module")
def agent(
    tmp_path_factory: pytest.TempPathFactory,
    toy_model: MakeToyModel,
    llama_server: Path,
    unused_ports: PortRanges,
    systemd_user: SystemdUser,
) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp(PREFIX)
    for model_id in (MODEL, SILENT, RUNS):
        toy_model(folder / "models" / f"{model_id}.gguf")
    settings = {"MAGI_JOURNAL_DIRECTORY": str(systemd_user.journal)}
    agent = AgentProcess(folder, folder / "models", unused_ports(4), llama_server, settings)
    with ended(agent, f"magi-llama-{PREFIX}-*.service"):
        agent.start()
        agent.wait_settled()
        yield agent


class Voice:
    """The unit of the model that speaks."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker

    def say(self, *lines: str) -> str:
        """Have lines in the journal; returns the run's id."""
        (self._speaker.folder / "lines").write_text("".join(f"{line}\n" for line in lines))
        # By the shell itself: of a process that is gone when journald looks who it is, it cannot tell the run.
        return asyncio.run(
            self._speaker.say(f'while read -r line; do echo "$line"; done < {self._speaker.folder}/lines')
        )


@pytest.fixture
def speaker(systemd_user: SystemdUser, tmp_path: Path) -> Voice:
    return Voice(Speaker(MODEL, systemd_user.journal, tmp_path))


@pytest.fixture
def environment(agent: AgentProcess) -> dict[str, str]:
    return surroundings(MAGI_SOCKET=str(agent.socket), TZ="UTC")


def said(output: str) -> list[str]:
    """The messages of what is written for people, without the speaker's last word."""
    messages = [line[21:] for line in output.splitlines()]
    return [message for message in messages if not message.startswith("said ")]


def test_the_last_lines_of_a_server_are_shown_oldest_first(speaker: Voice, environment: dict[str, str]) -> None:
    mark = f"run {time.monotonic_ns()}"
    speaker.say(*(f"{mark} line {number}" for number in range(60)))

    usual = piped("logs", MODEL, environment=environment)
    few = piped("logs", MODEL, "-n", "3", environment=environment)

    assert (usual.returncode, usual.stderr) == (0, "")
    assert said(usual.stdout) == [f"{mark} line {number}" for number in range(11, 60)]
    assert usual.stdout[:20].strip() == time.strftime(
        "%Y-%m-%d %H:%M:%S", time.strptime(usual.stdout[:19], "%Y-%m-%d %H:%M:%S")
    )
    assert said(few.stdout) == [f"{mark} line 58", f"{mark} line 59"]


def test_since_until_priority_and_run_choose(speaker: Voice, environment: dict[str, str]) -> None:
    before = time.time()
    first = speaker.say("<3>bad", "<6>usual")
    second = speaker.say("<4>odd")

    def told(*words: str) -> list[str]:
        ended = piped("logs", MODEL, *words, environment=environment)
        assert ended.returncode == 0, ended.stderr
        return said(ended.stdout)

    since = f"@{before:.6f}"
    assert told("--since", since) == ["bad", "usual", "odd"]
    assert told("--since", since, "-n", "2") == ["odd"]
    assert told("--since", since, "-p", "warning") == ["bad", "odd"]
    assert told("--since", "2 min ago", "--until", since) == told("--since", "-2min", "--until", since)
    assert told("--since", "-2h", "--until", "1h ago") == []
    assert told("--run", first, "--since", since) == ["bad", "usual"]
    assert told("--run", "current") == ["odd"]
    assert told("--run", "previous") == ["bad", "usual"]
    assert told("--run", second[::-1], "--since", since) == []


def test_a_run_is_named_by_the_first_digits_of_its_id(agent: AgentProcess, environment: dict[str, str]) -> None:
    for verb in ("start", "restart", "stop"):
        agent.must("POST", f"/api/models/servers/{RUNS}/{verb}?wait=60")
    events = agent.must("GET", f"/api/models/{RUNS}/history")["events"]
    first, last = dict.fromkeys(event["invocationId"] for event in events)
    other = "0000" if not (first + last).startswith("0000") else "ffff"

    def entries(run: str) -> list[dict[str, str]]:
        ended = piped("logs", RUNS, "--json", "-n", "1000", "--run", run, environment=environment)
        assert ended.returncode == 0, ended.stderr
        return [json.loads(line) for line in ended.stdout.splitlines()]

    assert {entry["invocationId"] for entry in entries(first[:8].upper())} == {first}
    assert entries(last[:12]) == entries(last) != entries(first)

    unknown = piped("logs", RUNS, "--run", other, environment=environment)
    short = piped("logs", RUNS, "-f", "--run", last[:3], "--json", environment=environment)
    silent = piped("logs", SILENT, "--run", other, environment=environment)

    assert (unknown.returncode, unknown.stdout) == (1, "")
    said_of_it = f"no run of {RUNS} has an id that begins with {other}; these there are: {last[:8]} (20"
    assert said_of_it in unknown.stderr
    assert f", {first[:8]} (20" in unknown.stderr
    assert short.returncode == 1
    error = json.loads(short.stdout or short.stderr)
    assert error["error"] == "RunAmbiguous"
    assert error["details"]["candidates"][0] == last
    assert "; the journal knows of none" in silent.stderr
    whole = piped("logs", RUNS, "--run", last[::-1], environment=environment)
    assert (whole.returncode, whole.stdout) == (1, "")
    assert f"no run of {RUNS} has the id {last[::-1]}; these there are: {last[:8]} (20" in whole.stderr
    assert piped("logs", RUNS, "--run", last, "-n", "0", environment=environment).returncode == 0
    assert piped("logs", "cli-logs-nobody", "--run", other, environment=environment).returncode == 4


def test_more_than_one_answer_holds(speaker: Voice, environment: dict[str, str]) -> None:
    run = speaker.say(*(f"line {number}" for number in range(12_345)))

    some = piped("logs", MODEL, "-n", "12000", environment=environment)
    everything = piped("logs", MODEL, "--since", "-1h", "--run", run, environment=environment)

    assert said(some.stdout) == [f"line {number}" for number in range(346, 12_345)]
    assert said(everything.stdout) == [f"line {number}" for number in range(12_345)]


def test_json_is_one_object_for_each_line(speaker: Voice, environment: dict[str, str]) -> None:
    speaker.say("größe \x9b0m", "plain")

    ended = piped("logs", MODEL, "-n", "3", "--json", environment=environment)

    entries = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [entry["message"] for entry in entries][:2] == ["größe \x9b0m", "plain"]
    assert "\x9b" not in ended.stdout
    assert entries[0].keys() == {"at", "message", "priority", "pid", "invocationId", "source", "cursor"}


def test_follow_goes_on_until_ctrl_c(speaker: Voice, environment: dict[str, str]) -> None:
    mark = f"run {time.monotonic_ns()}"
    speaker.say(f"{mark} before")

    with on_terminal("logs", MODEL, "-f", environment=environment) as terminal:
        terminal.wait_for(lambda output: f"{mark} before" in output, "what was said before")
        speaker.say(f"{mark} meanwhile")
        terminal.wait_for(lambda output: f"{mark} meanwhile" in output, "what is said meanwhile")
        terminal.type("\x03")
        assert terminal.end() == 0

    assert "Traceback" not in terminal.text
    assert "interrupted" not in terminal.text


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_follow_lives_through_a_restart_of_the_agent(
    agent: AgentProcess, speaker: Voice, environment: dict[str, str], how: str
) -> None:
    mark = f"run {time.monotonic_ns()}"
    speaker.say(f"{mark} before")
    with on_terminal("logs", MODEL, "-f", "-n", "2", environment=environment) as terminal:
        terminal.wait_for(lambda output: f"{mark} before" in output, "what was said before")
        getattr(agent, how)()
        terminal.wait_for(lambda output: "trying again" in output, "that the agent is away")
        speaker.say(*(f"{mark} while it is away {number}" for number in range(5)))
        agent.start()
        agent.wait_settled()
        terminal.wait_for(lambda output: f"{mark} while it is away 4" in output, "what was said meanwhile")
        speaker.say(f"{mark} after")
        terminal.wait_for(lambda output: f"{mark} after" in output, "what is said after")

    assert terminal.text.count(mark) == 7
    assert terminal.text.count("trying again") == terminal.text.count("the agent is there again") == 1


def test_follow_ends_with_its_reader(speaker: Voice, environment: dict[str, str]) -> None:
    mark = f"run {time.monotonic_ns()}"
    speaker.say(mark)

    with subprocess.Popen(
        [str(MAGICTL), "logs", MODEL, "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()
            speaker.say(f"{mark} after the reader has gone")
            assert process.wait(30) != 0
        finally:
            process.kill()


def test_log_lines_that_would_take_over_the_terminal_are_harmless(speaker: Voice, environment: dict[str, str]) -> None:
    speaker.say("evil\x1b]0;owned\x07\x1b[2J")

    _, output = shown("logs", MODEL, "-n", "2", environment=environment)

    assert "evil" in output
    assert "\x1b]0;" not in output
    assert "\x1b[2J" not in output


def test_when_nothing_was_logged_a_person_is_told_and_a_pipe_is_empty(environment: dict[str, str]) -> None:
    status, output = shown("logs", SILENT, environment=environment)
    in_pipe = piped("logs", SILENT, environment=environment)

    assert status == 0
    assert f"nothing like that is in the log of {SILENT}" in without_control(output)
    assert (in_pipe.returncode, in_pipe.stdout) == (0, "")


def test_where_nobody_answers_it_is_said_where_the_log_is(tmp_path: Path) -> None:
    for words in ((), ("-f",)):
        here = piped("logs", MODEL, *words, environment=surroundings(MAGI_SOCKET=str(tmp_path / "none")))
        assert (here.returncode, here.stdout, here.stderr.count("\n")) == (3, "", 1)
        assert f"the log is there without it: journalctl -t magi-llama-{MODEL}" in here.stderr
    elsewhere = piped("logs", MODEL, "--url", "https://magi.invalid/agent")
    assert elsewhere.returncode == 3
    assert "journalctl -t" not in elsewhere.stderr


@pytest.mark.parametrize("words", [(), ("-f",)], ids=["once", "follow"])
def test_what_the_agent_refuses_is_said(
    agent: AgentProcess, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    for option, value, said_of_it in (
        ("--since", "whenever", "since: must be a time"),
        ("-p", "loud", "priority: must be one of emerg, alert"),
        ("--run", "last", "run: must be one of all, current, previous"),
    ):
        refused = piped("logs", MODEL, *words, option, value, environment=environment)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert said_of_it in refused.stderr
    assert piped("logs", MODEL, "-f", "--until", "now", environment=environment).returncode == 2


@pytest.mark.parametrize("name", ["cli-logs-nobody", "../x", "x y", "a\nb", "UPPER", "_PID=1", "registry", ""])
@pytest.mark.parametrize("command", ["logs", "history"])
def test_an_unknown_id_ends_with_status_4(environment: dict[str, str], command: str, name: str) -> None:
    ended = piped(command, name, environment=environment)

    assert ended.returncode == 4
    assert "no model has the id" in ended.stderr


def test_a_part_of_an_id_gets_a_suggestion(environment: dict[str, str]) -> None:
    assert f"did you mean {MODEL}?" in piped("logs", "cli-logs-sp", environment=environment).stderr


def test_the_history_of_a_server(agent: AgentProcess, environment: dict[str, str]) -> None:
    nothing = piped("history", SILENT, environment=environment)
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert f"nothing has happened to {SILENT}" in nothing.stderr

    agent.must("POST", f"/api/models/servers/{SILENT}/start?wait=60")
    agent.must("POST", f"/api/models/servers/{SILENT}/stop?wait=60")

    table = piped("history", SILENT, environment=environment)
    lines = table.stdout.splitlines()
    assert len(lines) == 4, table.stdout
    [header, started, ready, stopped] = lines
    assert header.split() == ["WHEN", "EVENT", "BY", "RUN", "WHAT"]
    assert "  started  uid 0 (pid " in started
    assert "is ready on port" in ready
    assert "  stopped  uid 0 (pid " in stopped
    answer = json.loads(piped("history", SILENT, "--json", environment=environment).stdout)
    assert [event["event"] for event in answer["events"]] == ["started", "ready", "stopped"]
    assert answer["events"][0]["invocationId"][:8] in started
    few = piped("history", SILENT, "-n", "1", environment=environment)
    assert len(few.stdout.splitlines()) == 2
    assert f"there is more: magictl history {SILENT} -n 10" in few.stderr
