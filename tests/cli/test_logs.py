"""`magictl logs`: what a real unit wrote, from a real journal."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from magi_agent.cli.logs import journal_command
from magi_agent.vocabulary import Scope
from tests.cli.stand_in import StandIn, error, model
from tests.cli.terminal import MAGICTL, on_terminal, piped, shown, surroundings, without_control
from tests.conftest import SystemdUser

MODEL = "cli-logs-speaker.q4_1"


class Speaker:
    """A unit named as a model's server, that says what it is told to."""

    def __init__(self, journal: Path, folder: Path) -> None:
        self.unit = f"magi-llama-{MODEL}.service"
        self._journal = journal
        self._lines = folder / "lines"
        self._properties = [f"--unit={self.unit}", f"--property=SyslogIdentifier=magi-llama-{MODEL}"]

    def say(self, *lines: str) -> None:
        """Run the unit; return when the journal has what it said."""
        self._lines.write_text("".join(f"{line}\n" for line in lines))
        before = self._count()
        subprocess.run(
            ["systemd-run", "--user", "--wait", "--collect", "--quiet", *self._properties, "cat", str(self._lines)],
            check=True,
            timeout=60,
        )
        deadline = time.monotonic() + 20
        while self._count() < before + len(lines):
            assert time.monotonic() < deadline, "the journal does not have the lines"
            time.sleep(0.02)

    def _count(self) -> int:
        command = ["journalctl", "-D", str(self._journal), "-q", "-o", "json", "-t", f"magi-llama-{MODEL}"]
        return subprocess.run(command, capture_output=True, timeout=30, check=False).stdout.count(b"\n")


@pytest.fixture
def speaker(systemd_user: SystemdUser, tmp_path: Path) -> Iterator[Speaker]:
    speaker = Speaker(systemd_user.journal, tmp_path)
    yield speaker
    subprocess.run(["systemctl", "--user", "stop", speaker.unit], capture_output=True, timeout=30, check=False)


@pytest.fixture
def environment(agent: StandIn, systemd_user: SystemdUser) -> dict[str, str]:
    agent.add(model(MODEL))
    return surroundings(MAGI_URL=agent.url, MAGI_JOURNAL_DIRECTORY=str(systemd_user.journal), TZ="UTC")


def said(output: str) -> list[str]:
    """The messages of what journalctl writes for people."""
    return [line.partition("]: ")[2] for line in output.splitlines()]


def test_the_last_lines_of_a_server_are_shown_oldest_first(speaker: Speaker, environment: dict[str, str]) -> None:
    mark = f"run {time.monotonic_ns()}"
    speaker.say(*(f"{mark} line {number}" for number in range(60)))

    ended = piped("logs", MODEL, environment=environment)
    three = piped("logs", MODEL, "-n", "3", environment=environment)

    assert ended.returncode == 0
    assert ended.stderr == ""
    assert ended.stdout.count("\n") == 50
    # systemd's own word that the unit ended counts among the fifty, where it is in the journal.
    shown_of_it = [line for line in said(ended.stdout) if mark in line]
    assert len(shown_of_it) >= 45
    assert shown_of_it == [f"{mark} line {number}" for number in range(60 - len(shown_of_it), 60)]
    assert three.stdout.count("\n") == 3


def test_with_json_each_line_is_one_object(speaker: Speaker, environment: dict[str, str]) -> None:
    mark = f"run {time.monotonic_ns()}"
    speaker.say(mark)

    ended = piped("logs", MODEL, "--json", environment=environment)

    entries = [json.loads(line) for line in ended.stdout.splitlines()]
    [entry] = [entry for entry in entries if entry["MESSAGE"] == mark]
    assert entry["SYSLOG_IDENTIFIER"] == f"magi-llama-{MODEL}"


def test_since_narrows_and_is_passed_on_as_journalctl_knows_it(speaker: Speaker, environment: dict[str, str]) -> None:
    mark = f"run {time.monotonic_ns()}"
    speaker.say(*(f"{mark} {number}" for number in range(80)))

    everything = piped("logs", MODEL, "--since", "1 hour ago", environment=environment)
    nothing = piped("logs", MODEL, "--since", "2099-01-01", environment=environment)
    wrong = piped("logs", MODEL, "--since", "the day before", environment=environment)

    assert sum(mark in line for line in everything.stdout.splitlines()) == 80
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert wrong.returncode == 1
    assert "the day before" in wrong.stderr


def test_follow_goes_on_until_ctrl_c(speaker: Speaker, environment: dict[str, str]) -> None:
    mark = f"run {time.monotonic_ns()}"
    speaker.say(f"{mark} before")

    with on_terminal("logs", MODEL, "-f", environment=environment) as terminal:
        terminal.wait_for(lambda output: f"{mark} before" in output, "what was said before")
        speaker.say(f"{mark} meanwhile")
        terminal.wait_for(lambda output: f"{mark} meanwhile" in output, "what is said meanwhile")
        terminal.type("\x03")
        terminal.end()

    assert "Traceback" not in terminal.text


def test_follow_ends_with_its_reader(speaker: Speaker, environment: dict[str, str]) -> None:
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


def test_log_lines_that_would_take_over_the_terminal_are_harmless(
    speaker: Speaker, environment: dict[str, str]
) -> None:
    speaker.say("evil\x1b]0;owned\x07\x1b[2J")

    _, output = shown("logs", MODEL, "-n", "1", environment=environment)

    assert "\x1b]0;" not in output
    assert "\x1b[2J" not in output


def test_when_nothing_was_logged_a_person_is_told_and_a_pipe_is_empty(
    agent: StandIn, environment: dict[str, str]
) -> None:
    agent.add(model("cli-logs-silent"))

    status, output = shown("logs", "cli-logs-silent", environment=environment)
    in_pipe = piped("logs", "cli-logs-silent", environment=environment)

    assert status == 0
    assert "No entries" in without_control(output)
    assert (in_pipe.returncode, in_pipe.stdout) == (0, "")


def test_the_log_can_be_read_when_the_agent_is_down(
    speaker: Speaker, environment: dict[str, str], tmp_path: Path
) -> None:
    mark = f"run {time.monotonic_ns()}"
    speaker.say(mark)
    down = {**environment, "MAGI_URL": "127.0.0.1:1", "MAGI_SYSTEMD_SCOPE": "user"}

    ended = piped("logs", MODEL, environment=down)

    assert ended.returncode == 0
    assert mark in ended.stdout
    assert ended.stderr == "magictl: nobody listens at http://127.0.0.1:1; reading the journal without the agent\n"


def test_the_log_can_be_read_when_the_agent_has_no_answer_now(
    agent: StandIn, speaker: Speaker, environment: dict[str, str]
) -> None:
    mark = f"run {time.monotonic_ns()}"
    speaker.say(mark)
    agent.always(*error(503, "ServiceUnavailable", "systemd does not answer"))

    ended = piped("logs", MODEL, environment={**environment, "MAGI_SYSTEMD_SCOPE": "user"})
    agent.always(*error(403, "Forbidden", "you may not"))
    refused = piped("logs", MODEL, environment=environment)

    assert mark in ended.stdout
    assert ended.stderr == "magictl: systemd does not answer; reading the journal without the agent\n"
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", "magictl: you may not\n")


@pytest.mark.parametrize("url", ["http://192.0.2.7:8000", "https://magi.example.org/agent", "http://[2001:db8::1]"])
def test_of_an_agent_elsewhere_not_this_hosts_journal_is_shown(environment: dict[str, str], url: str) -> None:
    ended = piped("logs", MODEL, "--url", url, environment=environment)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("magictl: the logs are in the journal of the agent's host, and http")
    assert ended.stderr.count("\n") == 1


def test_loopback_and_a_socket_are_this_host(environment: dict[str, str], tmp_path: Path) -> None:
    for words in (["--url", "http://localhost:1"], ["--url", "[::1]:1"], ["--socket", str(tmp_path / "none")]):
        ended = piped("logs", MODEL, *words, environment={**environment, "MAGI_SYSTEMD_SCOPE": "user"})

        assert ended.returncode == 0
        assert "reading the journal without the agent" in ended.stderr


@pytest.mark.parametrize("name", ["cli-logs-nobody", "../x", "x y", "a\nb", "UPPER", "_PID=1", "registry", ""])
def test_an_unknown_id_ends_with_status_4(environment: dict[str, str], name: str) -> None:
    ended = piped("logs", name, environment=environment)

    assert ended.returncode == 4
    assert "no model has the id" in ended.stderr


def test_a_part_of_an_id_gets_a_suggestion(environment: dict[str, str]) -> None:
    assert f"did you mean {MODEL}?" in piped("logs", "cli-logs", environment=environment).stderr


def test_without_journalctl_it_says_so(agent: StandIn, environment: dict[str, str], tmp_path: Path) -> None:
    ended = piped("logs", MODEL, environment={**environment, "PATH": str(tmp_path)})

    assert ended.returncode == 1
    assert ended.stderr == "magictl: there is no journalctl here; the logs are in systemd's journal\n"


@pytest.fixture
def command() -> Callable[..., list[str]]:
    def compose(**changes: object) -> list[str]:
        told: dict[str, object] = {
            "lines": 50, "follow": False, "since": None, "as_json": False, "to_person": True, "directory": None
        }  # fmt: skip
        return journal_command("m", changes.pop("scope", Scope.SYSTEM), changes.pop("user", 0), **(told | changes))  # type: ignore[arg-type]

    return compose


def test_in_the_system_scope_only_the_journals_own_fields_count(command: Callable[..., list[str]]) -> None:
    """Any process may claim an identifier; a field that begins with an underscore is the journal's own word."""
    assert command() == [
        "journalctl", "--no-pager", "--output=short-iso", "--no-hostname", "--lines=50",
        "_SYSTEMD_UNIT=magi-llama-m.service", "+", "UNIT=magi-llama-m.service", "_PID=1",
    ]  # fmt: skip


def test_in_the_user_scope_only_the_same_users_processes_count(command: Callable[..., list[str]]) -> None:
    assert command(scope=Scope.USER, user=1000)[5:] == [
        "_SYSTEMD_USER_UNIT=magi-llama-m.service", "_UID=1000", "+",
        "USER_UNIT=magi-llama-m.service", "_UID=1000", "+",
        "SYSLOG_IDENTIFIER=magi-llama-m", "_UID=1000",
    ]  # fmt: skip


def test_every_option_reaches_journalctl(command: Callable[..., list[str]]) -> None:
    words = command(lines=None, follow=True, since="-1h", as_json=True, to_person=False, directory="/j")

    assert words[:7] == [
        "journalctl", "--no-pager", "--output=json", "--quiet", "--directory=/j", "--since=-1h", "--follow"
    ]  # fmt: skip
