"""`magictl settings`: shown with where each comes from, changed one by one or all at once, applied when asked."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from magi_agent.runtime_settings.reading import ADAPTER
from magi_agent.runtime_settings.settings import setting_names
from tests.cli.conftest import Magictl
from tests.cli.stand_in import Answer, StandIn, error, profile, server
from tests.cli.terminal import lines_left, shown, surroundings, without_control


def chosen(agent: StandIn, model_id: str = "tiny-chat") -> dict[str, object]:
    """What was chosen for a model, without what was not."""
    return {key: value for key, value in agent.models[model_id]["runtimeSettings"].items() if value is not None}


@pytest.fixture
def busy(agent: StandIn) -> StandIn:
    """An agent with settings in each layer."""
    agent.host = {"nGpuLayers": -1, "flashAttention": "auto"}
    agent.models["tiny-chat"]["runtimeSettings"] |= {"ctxSize": 8192, "memoryMax": 24 << 30, "flashAttention": "on"}
    agent.profiles["evening"] = {**profile("evening"), "runtimeSettings": {"tiny-chat": {"ctxSize": 4096}}}
    agent.active = "evening"
    return agent


def test_what_holds_is_shown_with_where_it_comes_from(busy: StandIn, magictl: Magictl) -> None:
    told = magictl("settings", "tiny-chat")

    assert told.status == 0
    assert told.out == (
        "tiny-chat\n"
        "\n"
        "Settings\n"
        "  n_gpu_layers     all  (the host's default)\n"
        "  ctx_size         4k  (from the profile; the model's own is 8k)\n"
        "  flash_attention  on  (set for the model)\n"
        "  memory_max       24G  (set for the model)\n"
    )
    assert magictl("settings", "tiny-chat", "--json").json["sources"]["nGpuLayers"] == "host"


def test_what_will_hardly_do_is_said_when_it_is_chosen_and_when_it_is_shown(agent: StandIn, magictl: Magictl) -> None:
    agent.warnings = {"tiny-chat": ["memory_max is 5 MiB, and that is little", "and so is memory_high"]}

    told = (magictl("settings", "tiny-chat", "memory_max=5M"), magictl("settings", "tiny-chat"))

    for each in told:
        assert (each.status, each.err) == (
            0, "! memory_max is 5 MiB, and that is little\n! and so is memory_high\n"
        )  # fmt: skip
        assert "  memory_max" in each.out


def test_where_nothing_is_set_that_is_said(agent: StandIn, magictl: Magictl) -> None:
    assert "nothing is set: llama-server's own defaults hold" in magictl("settings", "tiny-chat").out


def test_what_is_named_changes_and_the_rest_stays(busy: StandIn, magictl: Magictl) -> None:
    told = magictl("settings", "tiny-chat", "nThreads=8", "ctx_size=16k", "--unset", "flashAttention")

    assert told.status == 0
    assert told.out.splitlines()[0] == "✓ tiny-chat has 3 settings of its own"
    assert "  ctx_size               16k\n" in told.out
    assert told.err == "! the active profile says otherwise of ctx_size\n"
    assert chosen(busy) == {"ctxSize": 16384, "memoryMax": 24 << 30, "nThreads": 8}


def test_unset_counts_for_several_and_a_word_beside_it_too(busy: StandIn, magictl: Magictl) -> None:
    magictl("settings", "tiny-chat", "--unset", "ctx_size", "--unset", "memory_max", "mmap=off")

    assert chosen(busy) == {"flashAttention": "on", "mmap": False}


def test_clear_leaves_nothing_but_what_is_named_beside_it(busy: StandIn, magictl: Magictl) -> None:
    assert magictl("settings", "tiny-chat", "--clear").out == "✓ tiny-chat has no settings of its own\n"
    assert chosen(busy) == {}

    magictl("settings", "tiny-chat", "batch_size=64")
    magictl("settings", "tiny-chat", "--clear", "n_threads=2")
    assert chosen(busy) == {"nThreads": 2}


def test_a_file_replaces_all_and_what_json_printed_can_be_given_back(
    busy: StandIn, magictl: Magictl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"ctx_size": null, "n_threads": 4}')
    printed = magictl("settings", "tiny-chat", "--json").out

    assert magictl("settings", "old-14b", "--file", str(file)).status == 0
    assert chosen(busy, "old-14b") == {"nThreads": 4}

    monkeypatch.setattr("sys.stdin", io.StringIO(printed))
    assert magictl("settings", "qwen2.5-7b", "--file", "-").status == 0
    assert chosen(busy, "qwen2.5-7b") == {"ctxSize": 8192, "memoryMax": 24 << 30, "flashAttention": "on"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON: "),
        ("[1]", "holds no JSON object of settings"),
        ("\udcff", "is no JSON: "),
        (None, "cannot read "),
    ],
)
def test_a_file_that_is_none_is_said(
    agent: StandIn, magictl: Magictl, tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "settings.json"
    if content is not None:
        file.write_bytes(content.encode(errors="surrogateescape"))

    told = magictl("settings", "tiny-chat", "--file", str(file))

    assert told.status == 1
    assert said in told.err
    assert agent.seen == []


@pytest.mark.parametrize("depth", [*range(200, 1200, 25), 100_000])
def test_a_file_that_is_nested_too_deeply_is_refused(
    agent: StandIn, magictl: Magictl, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """Whether it is Python's JSON reader, its writer or the agent that has enough of it first."""
    agent.always(*error(422, "ValidationError", "1 setting is not valid"))
    monkeypatch.setattr("sys.stdin", io.StringIO('{"ctx_size": ' + "[" * depth + "]" * depth + "}"))

    told = magictl("settings", "tiny-chat", "--file", "-")

    assert told.status == 1
    assert told.err.count("\n") == 1


def test_what_runs_with_others_is_said_and_left_alone(busy: StandIn, magictl: Magictl) -> None:
    busy.servers["tiny-chat"] = server("tiny-chat")

    told = magictl("settings", "tiny-chat", "mmap=off")

    assert told.err.splitlines()[-2:] == [
        "! restart due: its settings have changed", "  to do it: magictl restart tiny-chat"
    ]  # fmt: skip
    assert [path for method, path in busy.seen if method == "POST"] == []


def test_now_restarts_what_runs_and_only_that(busy: StandIn, magictl: Magictl) -> None:
    still = magictl("settings", "tiny-chat", "mmap=off", "--now")
    assert still.status == 0
    assert [path for method, path in busy.seen if method == "POST"] == []

    busy.servers["tiny-chat"] = server("tiny-chat")
    told = magictl("settings", "tiny-chat", "mmap=on", "--now")
    assert told.status == 0
    assert "✓ tiny-chat ready on port 8080 (" in told.out
    assert "restart due" not in told.err
    assert [path for method, path in busy.seen if method == "POST"] == [
        "/api/models/servers/tiny-chat/restart?wait=600"
    ]


def test_now_alone_restarts_what_is_due_and_else_shows(busy: StandIn, magictl: Magictl) -> None:
    busy.servers["tiny-chat"] = server("tiny-chat")
    assert magictl("settings", "tiny-chat", "--now").out.startswith("tiny-chat\n\nSettings\n")
    assert [path for method, path in busy.seen if method == "POST"] == []

    busy.servers["tiny-chat"] = server("tiny-chat", restartRequired=True)
    assert magictl("settings", "tiny-chat", "--now").out.startswith("✓ tiny-chat ready on port 8080 (")


def test_now_fails_when_the_restart_does(agent: StandIn, magictl: Magictl) -> None:
    agent.servers["tiny-chat"] = server("tiny-chat")

    def cannot_start(method: str, path: str, right: Answer) -> Answer:
        return error(500, "StartFailed", "it ended at once") if method == "POST" else right

    agent.fault = cannot_start

    told = magictl("settings", "tiny-chat", "mmap=on", "--now")

    assert (told.status, told.err) == (1, "magictl: it ended at once\n")


def test_what_the_agent_refuses_is_said_setting_by_setting(agent: StandIn, magictl: Magictl) -> None:
    faults = [
        {"field": "ctxSize", "message": "must be at most 100"},
        {"field": "lora.0.path", "message": "is outside of the model folders"},
        {"field": "", "message": "do not go together"},
    ]
    agent.always(*error(422, "ValidationError", "3 settings are not valid", errors=faults))

    told, as_json = magictl("settings", "tiny-chat", "--clear"), magictl("settings", "tiny-chat", "--clear", "--json")

    assert told.status == as_json.status == 1
    assert told.err == (
        "magictl: 3 settings are not valid\n"
        "  ctx_size: must be at most 100\n"
        "  lora.0.path: is outside of the model folders\n"
        "  do not go together\n"
    )
    assert as_json.error["details"]["errors"] == faults


def test_an_unknown_model_gets_a_suggestion(agent: StandIn, magictl: Magictl) -> None:
    for words in ([], ["mmap=on"], ["--clear"]):
        told = magictl("settings", "tiny", *words)

        assert (told.status, told.err) == (4, "magictl: no model has the id 'tiny'; did you mean tiny-chat?\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name the model, or --list; see: magictl settings --help"),
        (["ctx_size=8k"], "name the model, or --list"),
        (["tiny-chat", "ctxsize8k"], "'ctxsize8k' is no KEY=VALUE"),
        (["tiny-chat", "ctxsiz=8k"], "no setting is called 'ctxsiz'; did you mean ctx_size?\n"),
        (["tiny-chat", "--unset", "nothing"], "no setting is called 'nothing'"),
        (["tiny-chat", "--file", "x", "--clear"], "--file takes the place of all"),
        (["tiny-chat", "--file", "x", "mmap=on"], "--file takes the place of all"),
        (["tiny-chat", "--list"], "--list goes with nothing else"),
    ],
)
def test_wrong_usage_asks_the_agent_nothing(agent: StandIn, magictl: Magictl, words: list[str], said: str) -> None:
    told = magictl("settings", *words)

    assert told.status == 2
    assert said in told.err
    assert told.err.count("\n") == 1
    assert agent.seen == []


def test_every_setting_is_described_without_an_agent(magictl: Magictl) -> None:
    told = magictl("settings", "--list")

    assert told.status == 0
    assert [line.split()[0] for line in told.out.splitlines()[2:]] == list(setting_names())
    assert magictl("settings", "--list", "--json").json == ADAPTER.json_schema()


def test_on_a_terminal_the_descriptions_stand_beside_their_names() -> None:
    status, output = shown("settings", "--list", columns=80, environment=surroundings())

    assert status == 0
    lines = lines_left(without_control(output).replace("\r", ""))
    assert max(len(line) for line in lines) <= 80
    assert "  ctx_size               Context in tokens, shared by all slots; 0 for what the" in lines
    assert "                         model was trained with." in lines


def test_json_of_a_change_is_the_agents_answer(agent: StandIn, magictl: Magictl) -> None:
    answer = magictl("settings", "tiny-chat", "n_threads=3", "--json").json

    assert answer["runtimeSettings"]["nThreads"] == 3
    assert json.dumps(answer["restartReasons"]) == "[]"
