"""`magictl models` and `magictl servers`: tables for people, the API's own answers for programs."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Magictl
from tests.cli.stand_in import StandIn, failure, model, server
from tests.cli.terminal import piped, shown, surroundings, without_control

HOSTILE = "evil\x1b[31m\x1b]0;owned\x07\r\n\x9b2J\u202egnp.\udcff"


def rows(table: str) -> dict[str, list[str]]:
    """The words of each row, by the first of them."""
    return {line.split()[0]: line.split() for line in table.splitlines() if line.strip()}


def test_models_are_a_table_with_what_a_person_asks_first(agent: StandIn, magictl: Magictl) -> None:
    told = magictl("models")

    assert told.status == 0
    assert told.err == ""
    table = rows(told.out)
    assert table["MODEL"] == [
        "MODEL", "FAMILY", "SIZE", "QUANT", "TIER", "THINKS", "CTX", "FILE", "ON", "PORT", "STATUS"
    ]  # fmt: skip
    assert table["tiny-chat"][2:] == [
        "135M", "q4_k_m", "balanced", "no", "32k", "98.0", "MB", "yes", "8080", "ok"
    ]  # fmt: skip
    assert table["old-14b"][2:] == [
        "14B", "q4_k_m", "powerful", "no", "32k", "9.0", "GB", "no", "8082", "ok"
    ]  # fmt: skip
    assert not any(line.endswith(" ") for line in told.out.splitlines())


def test_what_a_person_set_is_marked_and_the_mark_explained(agent: StandIn, magictl: Magictl) -> None:
    agent.models["qwen2.5-7b"] |= {"tierOverride": "fast", "effectiveTier": "fast", "thinkingOverride": True}

    told = magictl("models")

    assert rows(told.out)["qwen2.5-7b"][4:6] == ["fast*", "yes*"]
    assert told.err == "* set by hand\n"


def test_what_is_wrong_with_a_model_stands_below_the_table(agent: StandIn, magictl: Magictl) -> None:
    agent.add(model("half", status="incomplete", problem="1.2 of 9.0 GB are there", port=None))

    told = magictl("models")

    assert rows(told.out)["half"][-2:] == ["-", "incomplete"]
    assert told.out.endswith("\n\n1 problem\n  half: 1.2 of 9.0 GB are there\n")


@pytest.mark.parametrize(
    ("words", "listed"),
    [
        (["--enabled"], {"tiny-chat"}),
        (["--tier", "powerful"], {"old-14b"}),
        (["--tier", "balanced"], {"tiny-chat", "qwen2.5-7b"}),
        (["--enabled", "--tier", "powerful"], set()),
        ([], {"tiny-chat", "qwen2.5-7b", "old-14b"}),
    ],
)
def test_models_can_be_narrowed_in_both_forms(
    agent: StandIn, magictl: Magictl, words: list[str], listed: set[str]
) -> None:
    table, document = magictl("models", *words), magictl("models", *words, "--json")

    assert rows(table.out).keys() - {"MODEL"} == listed
    assert document.json["models"].keys() == listed
    assert document.json["portRange"] == [8080, 8099]
    if not listed:
        assert "none of the models is of that kind" in table.err


def test_json_is_the_answer_as_the_agent_gave_it(agent: StandIn, magictl: Magictl) -> None:
    agent.servers["tiny-chat"] = server("tiny-chat")

    assert magictl("models", "--json").json == agent.answer("GET", "/api/models/registry", None)[1]
    assert magictl("servers", "--json").json == agent.answer("GET", "/api/models/servers", None)[1]


def test_without_models_it_says_where_to_put_one(agent: StandIn, magictl: Magictl) -> None:
    agent.models.clear()

    told = magictl("models")

    assert (told.status, told.out) == (0, "")
    assert told.err == "no models found in /models; put a GGUF file there, then: magictl rescan\n"


def test_servers_are_a_table_with_their_state(agent: StandIn, magictl: Magictl) -> None:
    agent.servers = {
        "tiny-chat": server("tiny-chat"),
        "new": server("new", state="loading", isReady=False, uptimeSeconds=4, memoryBytes=None, restarts=2),
        "gone": server("gone", state="stopped", isReady=False, isRunning=False, pid=None, url=None, memoryBytes=None),
    }

    told = magictl("servers")

    assert told.status == 0
    table = rows(told.out)
    assert table["tiny-chat"][1:] == [
        "ready", "8080", "4711", "2h", "03m", "5.1", "GB", "0", "http://127.0.0.1:8080"
    ]  # fmt: skip
    assert table["new"][1:] == ["loading", "8080", "4711", "4s", "-", "2", "http://127.0.0.1:8080"]
    assert table["gone"][1:] == ["stopped", "8080", "-", "-", "-", "0", "-"]


def test_why_a_server_failed_stands_below_the_table_with_its_last_words(agent: StandIn, magictl: Magictl) -> None:
    agent.servers = {
        "tiny-chat": server("tiny-chat", restartRequired=True, restartReasons=["its port is another", "ctx size"]),
        "killed": server(
            "killed",
            state="cooldown",
            isReady=False,
            isRunning=False,
            retryInSeconds=12.4,
            failure=failure(result="oom-kill", message="the kernel killed it", exitStatus=None, signal="SIGKILL"),
        ),
    }

    told = magictl("servers")

    assert "tiny-chat: restart due: its port is another; ctx size" in told.out
    assert "ready (restart due)" in told.out
    below = told.out.partition("killed: ")[2]
    assert below == (
        "the kernel killed it (result oom-kill, SIGKILL)\n"
        "  │ loading the model\n  │ error: out of memory\n  the agent tries again in 12s\n"
    )


def test_only_the_last_of_a_long_log_is_shown(agent: StandIn, magictl: Magictl) -> None:
    lines = [f"line {number}" for number in range(50)]
    agent.servers["x"] = server("x", state="failed", failure=failure(logLines=lines))

    told = magictl("servers")

    assert [line for line in lines if f"│ {line}\n" in told.out] == lines[-10:]
    assert magictl("servers", "--json").json["servers"][0]["failure"]["logLines"] == lines


def test_without_servers_it_says_how_to_start_one(agent: StandIn, magictl: Magictl) -> None:
    told = magictl("servers")

    assert (told.status, told.out) == (0, "")
    assert "start one: magictl start ID" in told.err


@pytest.mark.parametrize("broken", [None, 1, "text", [], {}, True])
def test_a_value_of_another_kind_breaks_no_table(agent: StandIn, magictl: Magictl, broken: object) -> None:
    """An older or newer agent may answer with other things; each key in turn."""
    for key in model("x"):
        agent.models["odd"] = {**model("odd"), key: broken}
        assert magictl("models").status == 0
        assert magictl("status").status == 0
    del agent.models["odd"]
    for key in server("x"):
        agent.servers["odd"] = {**server("odd"), key: broken}
        assert magictl("servers").status == 0


def hostile_agent(agent: StandIn) -> None:
    """Every text of the agent's is one that would take over the terminal."""
    agent.models = {
        HOSTILE: {
            key: HOSTILE if isinstance(value, str) and key != "status" else value
            for key, value in model("x", status="invalid", problem=HOSTILE).items()
        }
    }
    agent.servers = {
        HOSTILE: {key: HOSTILE if isinstance(value, str) else value for key, value in server("x").items()}
        | {"failure": failure(message=HOSTILE, logLines=[HOSTILE]), "restartReasons": [HOSTILE]}
    }
    agent.health = {"status": "not_ready", "missing": {HOSTILE: HOSTILE}, "problems": [HOSTILE]}


@pytest.mark.parametrize("words", [["models"], ["servers"], ["status"], ["models", "--json"], ["servers", "--json"]])
def test_names_that_would_take_over_the_terminal_are_harmless(agent: StandIn, words: list[str]) -> None:
    hostile_agent(agent)
    environment = surroundings(MAGI_URL=agent.url)

    status, on_terminal = shown(*words, columns=200, environment=environment)
    in_pipe = piped(*words, environment=environment)

    assert status == in_pipe.returncode == 0
    for output in (without_control(on_terminal), in_pipe.stdout, in_pipe.stderr):
        assert all(letter.isprintable() or letter == "\n" for letter in output)
    assert "owned" in on_terminal
    assert "\x1b]0;" not in on_terminal
    assert "\x1b[31m\x1b]" not in on_terminal
    assert "\\u001b" in on_terminal if "--json" in words else "\\x1b" in on_terminal


def test_json_on_a_terminal_holds_nothing_a_terminal_obeys(agent: StandIn) -> None:
    """U+009B begins a control sequence as ESC [ does, and none of these is a control character to JSON."""
    agent.models["tiny-chat"]["displayName"] = "模型 \x9b2J\x7f\u202e\U000e0001"

    status, output = shown("models", "--json", environment=surroundings(MAGI_URL=agent.url))

    assert status == 0
    assert r'"displayName": "模型 \u009b2J\u007f\u202e\udb40\udc01"' in output
    assert json.loads(output)["models"] == agent.models


def test_hostile_names_come_through_json_unchanged(agent: StandIn) -> None:
    hostile_agent(agent)

    document = json.loads(piped("models", "--json", environment=surroundings(MAGI_URL=agent.url)).stdout)

    assert document["models"].keys() == {HOSTILE}


def test_on_a_terminal_the_table_has_colours(agent: StandIn) -> None:
    agent.servers["tiny-chat"] = server("tiny-chat")
    environment = surroundings(MAGI_URL=agent.url)

    _, coloured = shown("servers", columns=120, environment=environment)
    _, plain = shown("servers", columns=120, environment={**environment, "NO_COLOR": "1"})
    _, dumb = shown("servers", columns=120, environment={**environment, "TERM": "dumb"})

    assert "\x1b[32m" in coloured
    assert "\x1b[3" not in plain
    assert "\x1b" not in dumb
    assert rows(without_control(coloured)) == rows(without_control(plain)) == rows(without_control(dumb))


def test_in_a_pipe_there_is_neither_colour_nor_cut(agent: StandIn) -> None:
    agent.add(model("a-model-with-a-name-so-long-that-it-would-not-fit-on-any-terminal-of-eighty-columns-q4_k_m"))

    ended = piped("models", environment=surroundings(MAGI_URL=agent.url, COLUMNS="40"))

    assert "\x1b" not in ended.stdout
    assert "of-eighty-columns-q4_k_m  qwen" in ended.stdout


@pytest.mark.parametrize("columns", [200, 100, 80, 60, 40, 25])
def test_on_a_narrow_terminal_columns_give_way_and_are_named(agent: StandIn, magictl: Magictl, columns: int) -> None:
    agent.add(model("a-model-with-a-rather-long-name-instruct-q4_k_m"))
    environment = surroundings(MAGI_URL=agent.url)

    _, output = shown("models", columns=columns, environment=environment)
    table, _, below = without_control(output).partition("no room for: ")

    assert all(len(line.rstrip()) <= columns for line in table.splitlines())
    titles = table.splitlines()[0].split()
    assert {"MODEL", "ON", "STATUS"} <= set(titles)
    left_out = {word.strip(",") for word in below.partition("(")[0].split()}
    whole = rows(magictl("models").out)["MODEL"]
    assert set(titles) | left_out == set(whole)
    assert left_out.isdisjoint(titles)
