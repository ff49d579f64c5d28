"""`magictl` as a whole: its help, its options on either side, its exit statuses, its manners at the end of a pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from magi_agent.cli.address import default_address, parse_url
from magi_agent.cli.magictl import _COMMANDS
from tests.cli.conftest import Magictl
from tests.cli.stand_in import StandIn, model, standing_in
from tests.cli.terminal import MAGICTL, as_nobody, piped, shown, surroundings

COMMANDS = ["status", "models", "servers", "show", "start", "stop", "restart", "enable", "disable", "settings", "tier"]
COMMANDS += [
    "thinking",
    "port",
    "port-range",
    "profile",
    "rescan",
    "scan",
    "logs",
    "host",
    "drain",
    "export",
    "import",
    "token",
    "check",
    "doctor",
]
COMMANDS += ["completion"]


def test_the_help_names_every_command_in_a_line_that_is_whole(magictl: Magictl) -> None:
    told = magictl("--help")

    assert told.status == 0
    assert list(_COMMANDS) == COMMANDS
    listed = told.out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines()] == COMMANDS
    assert "..." not in listed


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_examples_and_the_options_all_have(magictl: Magictl, command: str) -> None:
    for option in ("--help", "-h"):
        told = magictl(command, option)

        assert told.status == 0
        assert f"magictl {command}" in told.out.partition("Examples:")[2]
        for name in ("--socket", "--url", "--json"):
            assert name in told.out


def test_without_a_command_there_is_help_and_status_2(magictl: Magictl) -> None:
    told = magictl()

    assert told.status == 2
    assert told.out == ""
    assert "Commands:" in told.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sing"], "no such command 'sing'; see: magictl --help"),
        (["models", "--tier", "huge"], "'huge' is not one of 'fast', 'balanced', 'powerful'"),
        (["models", "--loud"], "no such option '--loud'"),
        (["start"], "name the models to start, or --all; see: magictl start --help"),
        (["stop", "one", "--all"], "name the models to stop, or --all"),
        (["restart"], "name the models to restart, or --changed; see"),
        (["restart", "one", "--changed"], "name the models to restart, or --changed; see"),
        (["profile", "sing"], "no such command 'sing'; see: magictl profile --help"),
        (["start", "one", "--wait", "0"], "0 is not in the range"),
        (["start", "one", "--wait", "4000"], "4000 is not in the range"),
        (["enable"], "missing argument"),
        (["logs", "one", "-n", "-1"], "-1 is not in the range"),
        (["status", "--socket", "/a", "--url", "b"], "give --socket or --url, not both"),
        (["status", "--socket", ""], "--socket needs a path"),
    ],
)
def test_wrong_usage_is_one_line_on_standard_error_and_status_2(magictl: Magictl, words: list[str], said: str) -> None:
    told = magictl(*words)

    assert told.status == 2
    assert told.out == ""
    assert told.err.startswith("magictl: ")
    assert said in told.err
    assert told.err.count("\n") == 1


def test_with_json_wrong_usage_is_a_json_document_too(magictl: Magictl) -> None:
    for words in (["models", "--tier", "huge", "--json"], ["--json", "sing"]):
        told = magictl(*words)

        assert told.status == 2
        assert told.error["error"] == "UsageError"
        assert told.error["details"] == {}


def test_options_count_on_either_side_of_the_command(agent: StandIn, magictl: Magictl) -> None:
    elsewhere = StandIn()
    elsewhere.add(model("elsewhere"))
    with standing_in(elsewhere):
        before = magictl("--url", elsewhere.url, "--json", "models")
        after = magictl("models", "--url", elsewhere.url, "--json")

    assert before.json["models"].keys() == after.json["models"].keys() == {"elsewhere"}


def test_over_a_unix_socket_all_is_the_same(magictl: Magictl, tmp_path: Path) -> None:
    stand_in = StandIn()
    stand_in.add(model("by-socket"))
    path = tmp_path / "api.sock"
    with standing_in(stand_in, path):
        assert "by-socket" in magictl("models", "--socket", str(path)).out
        assert str(path) in magictl("status", "--socket", str(path)).out


def test_the_status_comes_out_of_the_installed_command(agent: StandIn) -> None:
    environment = surroundings(MAGI_URL=agent.url)

    assert piped("models", environment=environment).returncode == 0
    assert piped("start", "nobody", environment=environment).returncode == 4
    assert piped("start", environment=environment).returncode == 2
    assert piped("models", "--url", "127.0.0.1:1").returncode == 3
    agent.always(500, {"error": "RescanFailed", "message": "no folder", "details": {}})
    assert piped("rescan", environment=environment).returncode == 1


def test_the_version_is_told() -> None:
    told = piped("--version")

    assert told.returncode == 0
    assert told.stdout.startswith("magictl 0.")


def test_a_reader_that_has_had_enough_ends_it_without_a_word(agent: StandIn) -> None:
    agent.add(*(model(f"model-{number:05}") for number in range(2000)))
    command = f"{MAGICTL} models | head -n 1; echo ${{PIPESTATUS[0]}}"

    ended = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env=surroundings(MAGI_URL=agent.url),
        timeout=60,
        check=False,
    )

    header, status = ended.stdout.splitlines()
    assert header.startswith("MODEL")
    assert status == "1"
    assert ended.stderr == ""


def test_output_that_cannot_be_written_is_an_error_in_one_line(agent: StandIn) -> None:
    for words in (["models"], ["models", "--json"], ["status"]):
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run(
                [str(MAGICTL), *words],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env=surroundings(MAGI_URL=agent.url),
                timeout=60,
                check=False,
            )

        assert ended.returncode == 1
        assert ended.stderr == "magictl: cannot write the output: No space left on device\n"


def test_closed_standard_streams_do_no_harm(agent: StandIn) -> None:
    for closing in (">&-", "2>&-", ">&- 2>&-"):
        ended = subprocess.run(
            ["bash", "-c", f"{MAGICTL} models {closing}"],
            capture_output=True,
            text=True,
            env=surroundings(MAGI_URL=agent.url),
            timeout=60,
            check=False,
        )

        assert ended.returncode == 0
        assert ended.stderr == ""


def test_a_character_set_without_our_marks_still_tells_good_from_bad(agent: StandIn) -> None:
    environment = surroundings(MAGI_URL=agent.url, PYTHONIOENCODING="ascii")

    good = piped("enable", "qwen2.5-7b", environment=environment)
    agent.models["tiny-chat"]["displayName"] = "Tîny"
    as_json = piped("models", "--json", environment=environment)

    assert good.stdout.startswith("+ qwen2.5-7b enabled")
    assert json.loads(as_json.stdout)["models"]["tiny-chat"]["displayName"] == "Tîny"


def test_ctrl_c_ends_a_short_command_in_one_line(agent: StandIn) -> None:
    agent.hold("GET", "/registry")
    process = subprocess.Popen(
        [str(MAGICTL), "models"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings(MAGI_URL=agent.url),
    )
    try:
        agent.wait_for("GET", "/registry")
        process.send_signal(2)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()

    assert (process.returncode, out, err.strip()) == (1, "", "magictl: interrupted")


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["status"],
        ["models"],
        ["servers", "--json"],
        ["start", "tiny-chat"],
        ["show", "tiny-chat"],
        ["settings", "tiny-chat", "ctx_size=8k"],
        ["profile", "activate", "production"],
        ["export"],
    ],
)
def test_a_short_command_in_a_pipe_imports_nothing_heavy(agent: StandIn, words: list[str]) -> None:
    """Each of these costs more than all the rest: rich 60 ms, pydantic 150 ms, the scanner 80 ms."""
    program = (
        "import sys; from magi_agent.cli.magictl import main; status = main(sys.argv[1:]);"
        "print(*sorted(name for name in sys.modules), file=sys.stderr); sys.exit(status)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env=surroundings(MAGI_URL=agent.url),
        timeout=60,
        check=True,
    )

    loaded = {name.partition(".")[0] for name in ended.stderr.split()}
    assert "click" in loaded
    assert loaded.isdisjoint({"rich", "pydantic", "aiohttp", "asyncio", "dbus_next", "psutil", "watchfiles", "yaml"})
    assert "magi_agent.discovery" not in ended.stderr


def test_on_a_terminal_the_help_uses_the_width_there_is() -> None:
    for columns in (60, 80, 200):
        status, output = shown("models", "--help", columns=columns)

        assert status == 0
        assert all(len(line) <= min(columns, 100) for line in output.replace("\r", "").splitlines())


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost:80"),
        ("host:8000/", "http://host:8000"),
        ("https://models.example/magi/", "https://models.example:443/magi"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://host/a b/ü", "http://host:80/a%20b/%C3%BC"),
        (" http://host ", "http://host:80"),
    ],
)
def test_a_url_is_read_as_a_person_means_it(url: str, address: str) -> None:
    assert str(parse_url(url)) == address


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host", "must begin with http:// or https://"),
        ("unix:///run/api.sock", "use --socket PATH"),
        ("http://", "names no host"),
        ("", "names no host"),
        ("http://ho st", "no such host"),
        ("http://ho\x1bst", "no such host"),
        ("http://a..b", "no such host"),
        ("http://" + "a" * 70, "no such host"),
        ("http://host:0", "no such host or port"),
        ("http://host:99999", "Port out of range"),
        ("http://[::1", "is no URL"),
        ("http://user:secret@host", "would show in the process list"),
        ("http://host/?token=1", "a query or a fragment"),
    ],
)
def test_what_is_no_url_is_wrong_usage(magictl: Magictl, url: str, said: str) -> None:
    told = magictl("status", "--url", url)

    assert told.status == 2
    assert said in told.err
    assert "\x1b" not in told.err
    assert "secret" not in told.err


def test_the_agent_is_looked_for_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = tmp_path / "system.sock"
    monkeypatch.setattr("magi_agent.cli.address.SYSTEM_SOCKET", str(system))
    own = tmp_path / "magi-agent" / "api.sock"
    own.parent.mkdir()
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}

    assert str(default_address({})) == "http://127.0.0.1:8000"
    assert str(default_address(runtime)) == "http://127.0.0.1:8000"
    own.touch()
    assert str(default_address(runtime)) == str(own)
    system.touch()
    assert str(default_address(runtime)) == str(system)
    assert str(default_address({"MAGI_SOCKET": "off"})) == str(system)
    assert str(default_address({"MAGI_SOCKET": "/my.sock"})) == "/my.sock"
    assert str(default_address({"MAGI_SOCKET": "/my.sock", "MAGI_URL": "host:1"})) == "http://host:1"
    with pytest.raises(ValueError, match=r"^MAGI_URL: 'ftp://x' must begin"):
        default_address({"MAGI_URL": "ftp://x"})


def test_a_socket_in_a_folder_that_may_not_be_entered_is_not_passed_over(open_folder: Path) -> None:
    closed = open_folder / "magi-agent"
    closed.mkdir(mode=0o700)
    (closed / "api.sock").touch()

    ended = as_nobody("status", environment=surroundings(XDG_RUNTIME_DIR=str(open_folder)))

    assert ended.returncode == 3
    assert f"no permission to use {closed}/api.sock" in ended.stderr
