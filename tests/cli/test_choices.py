"""`magictl enable`, `disable`, `rescan`."""

from __future__ import annotations

import json

from tests.cli.conftest import Magictl
from tests.cli.stand_in import Answer, StandIn, error, server
from tests.cli.terminal import on_terminal, surroundings


def test_enable_and_disable_make_the_choice_and_start_nothing(agent: StandIn, magictl: Magictl) -> None:
    enabled = magictl("enable", "qwen2.5-7b", "old-14b")
    assert enabled.status == 0
    assert enabled.out == (
        "✓ qwen2.5-7b enabled; it does not run yet: magictl start qwen2.5-7b\n"
        "✓ old-14b enabled; it does not run yet: magictl start old-14b\n"
    )
    assert agent.models["qwen2.5-7b"]["enabled"] is agent.models["old-14b"]["enabled"] is True

    disabled = magictl("disable", "old-14b")
    assert disabled.out == "✓ old-14b disabled\n"
    assert agent.models["old-14b"]["enabled"] is False
    assert {method for method, _ in agent.seen} == {"PUT"}


def test_disable_of_what_runs_says_that_it_still_runs(agent: StandIn, magictl: Magictl) -> None:
    agent.servers["tiny-chat"] = server("tiny-chat")

    assert magictl("disable", "tiny-chat").out == "✓ tiny-chat disabled; it still runs: magictl stop tiny-chat\n"


def test_now_starts_and_stops_too_and_waits_for_it(agent: StandIn, magictl: Magictl) -> None:
    enabled = magictl("enable", "qwen2.5-7b", "--now")
    assert enabled.status == 0
    assert enabled.out.startswith("✓ qwen2.5-7b enabled\n✓ qwen2.5-7b ready on port 8080 (")

    disabled = magictl("disable", "qwen2.5-7b", "--now")
    assert disabled.out.startswith("✓ qwen2.5-7b disabled\n✓ qwen2.5-7b stopped (")
    assert [path for method, path in agent.seen if method == "POST"] == [
        "/api/models/servers/qwen2.5-7b/start?wait=600",
        "/api/models/servers/qwen2.5-7b/stop?wait=600",
    ]


def test_now_fails_when_the_start_does(agent: StandIn, magictl: Magictl) -> None:
    def cannot_start(method: str, path: str, right: Answer) -> Answer:
        return error(500, "StartFailed", "it ended at once") if method == "POST" else right

    agent.fault = cannot_start

    told = magictl("enable", "qwen2.5-7b", "--now")

    assert told.status == 1
    assert (told.out, told.err) == ("✓ qwen2.5-7b enabled\n", "magictl: it ended at once\n")


def test_json_is_one_document_for_each_model(agent: StandIn, magictl: Magictl) -> None:
    assert magictl("enable", "qwen2.5-7b", "--json").json == {
        "modelId": "qwen2.5-7b",
        "enabled": True,
        "message": "Model qwen2.5-7b enabled",
        "restartRequired": True,
    }
    decoder, text, documents = json.JSONDecoder(), magictl("disable", "qwen2.5-7b", "old-14b", "--json").out, []
    while text:
        document, end = decoder.raw_decode(text)
        documents.append(document["modelId"])
        text = text[end:].lstrip()
    assert documents == ["qwen2.5-7b", "old-14b"]


def test_one_unknown_id_does_not_keep_the_others_from_it(agent: StandIn, magictl: Magictl) -> None:
    told = magictl("enable", "qwen", "old-14b", "--now")

    assert told.status == 4
    assert "no model has the id 'qwen'; did you mean qwen2.5-7b?" in told.err
    assert agent.models["old-14b"]["enabled"] is True
    assert [path for method, path in agent.seen if method == "POST"] == ["/api/models/servers/old-14b/start?wait=600"]


def test_a_model_that_cannot_be_used_is_refused_in_the_agents_words(agent: StandIn, magictl: Magictl) -> None:
    agent.models["old-14b"] |= {"status": "invalid", "problem": "its header is cut"}

    told = magictl("enable", "old-14b")

    assert told.status == 1
    assert told.err == "magictl: model old-14b cannot be used: its header is cut\n"


def test_an_agent_that_is_gone_is_asked_once(magictl: Magictl) -> None:
    told = magictl("disable", "a", "b", "--url", "127.0.0.1:1")

    assert told.status == 3
    assert told.err.count("\n") == 1


def test_rescan_counts_what_it_found(agent: StandIn, magictl: Magictl) -> None:
    told = magictl("rescan")

    assert told.status == 0
    assert told.out.startswith("✓ 3 models found, 0 new, 0 gone (")
    assert magictl("rescan", "--json").json["modelsFound"] == 3


def test_a_failed_rescan_is_a_failure(agent: StandIn, magictl: Magictl) -> None:
    agent.always(*error(500, "RescanFailed", "cannot read /models"))

    told = magictl("rescan")

    assert (told.status, told.out, told.err) == (1, "", "magictl: cannot read /models\n")


def test_a_long_rescan_has_a_live_line_and_ctrl_c_leaves_it_to_the_agent(agent: StandIn) -> None:
    agent.hold("POST", "/rescan")

    with on_terminal("rescan", environment=surroundings(MAGI_URL=agent.url)) as terminal:
        terminal.wait_for(lambda output: "being read" in output, "the live line")
        terminal.type("\x03")
        assert terminal.end() == 1

    assert "the agent goes on reading the model folders" in terminal.text
