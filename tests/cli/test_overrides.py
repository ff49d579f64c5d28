"""`magictl tier`, `thinking`, `port`, `port-range`, `drain`: one choice each."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.conftest import Magictl
from tests.cli.stand_in import StandIn, read_only, server


@pytest.mark.parametrize(
    ("words", "key", "value", "said"),
    [
        (["tier", "tiny-chat", "powerful"], "tierOverride", "powerful", "✓ tiny-chat: tier powerful\n"),
        (["tier", "tiny-chat", "auto"], "tierOverride", None, "✓ tiny-chat: the tier that discovery finds\n"),
        (["thinking", "tiny-chat", "off"], "thinkingOverride", False, "✓ tiny-chat does not think\n"),
        (["thinking", "tiny-chat", "auto"], "thinkingOverride", None, "✓ tiny-chat thinks if discovery says so\n"),
        (["port", "tiny-chat", "8090"], "port", 8090, "✓ tiny-chat: port 8090\n"),
        (["port", "tiny-chat", "auto"], "port", None, "✓ tiny-chat gets a port when it is started\n"),
    ],
)
def test_a_choice_is_made(
    agent: StandIn, magictl: Magictl, words: list[str], key: str, value: object, said: str
) -> None:
    agent.models["tiny-chat"] |= {"tierOverride": "fast", "thinkingOverride": True}

    told = magictl(*words)

    assert (told.status, told.out, told.err) == (0, said, "")
    assert agent.models["tiny-chat"][key] is value or agent.models["tiny-chat"][key] == value
    assert [method for method, _ in agent.seen] == ["PUT"]


def test_a_model_that_thinks_now_may_get_another_tier_which_is_said(agent: StandIn, magictl: Magictl) -> None:
    assert magictl("thinking", "tiny-chat", "on").out == "✓ tiny-chat thinks, and its tier is powerful now\n"
    assert magictl("thinking", "tiny-chat", "on").out == "✓ tiny-chat thinks\n"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["tier", "tiny-chat", "fast"], "tier"),
        (["thinking", "tiny-chat", "on"], "tierChanged"),
        (["port", "tiny-chat", "8090"], "restartRequired"),
        (["port-range", "8080-8090"], "outside"),
        (["port-range"], "portRange"),
        (["drain"], "draining"),
    ],
)
def test_json_is_the_agents_answer(agent: StandIn, magictl: Magictl, words: list[str], key: str) -> None:
    told = magictl(*words, "--json")

    assert told.status == 0
    assert key in told.json


@pytest.mark.parametrize("words", [["tier", "tiny", "fast"], ["thinking", "tiny", "on"], ["port", "tiny", "8090"]])
def test_an_unknown_model_gets_a_suggestion(agent: StandIn, magictl: Magictl, words: list[str]) -> None:
    told = magictl(*words)

    assert (told.status, told.err) == (4, "magictl: no model has the id 'tiny'; did you mean tiny-chat?\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tier", "x", "huge"], "'huge' is not one of"),
        (["thinking", "x", "maybe"], "'maybe' is not one of"),
        (["port", "x", "0"], "'0' is no port; give one from 1 to 65535, or auto"),
        (["port", "x", "65536"], "'65536' is no port"),
        (["port", "x", "٨٠٨٠"], "is no port"),
        (["port", "x", "1" * 5000], "is no port"),
        (["port-range", "8080"], "'8080' is no range of ports; give one like 8080-8099, or default"),
        (["port-range", "8099-8080"], "is no range of ports"),
        (["port-range", "1-70000"], "is no range of ports"),
    ],
)
def test_wrong_usage_asks_the_agent_nothing(agent: StandIn, magictl: Magictl, words: list[str], said: str) -> None:
    told = magictl(*words)

    assert told.status == 2
    assert said in told.err
    assert agent.seen == []


def test_a_port_that_another_has_is_refused_in_the_agents_words(agent: StandIn, magictl: Magictl) -> None:
    told = magictl("port", "tiny-chat", "8081")

    assert (told.status, told.err) == (1, "magictl: port 8081 is that of qwen2.5-7b\n")


def test_what_runs_keeps_its_port_until_it_is_restarted(agent: StandIn, magictl: Magictl) -> None:
    agent.servers["tiny-chat"] = server("tiny-chat")

    told = magictl("port", "tiny-chat", "8090")

    assert told.err == "! it runs with another port; to change it: magictl restart tiny-chat\n"


def test_the_port_range_is_shown_chosen_and_given_back(agent: StandIn, magictl: Magictl) -> None:
    assert magictl("port-range").out == "8080-8099\n"

    told = magictl("port-range", "8081-8090")
    assert told.out == "✓ ports are given from 8081-8090\n"
    assert told.err == "! outside of it, and kept: the ports of tiny-chat\n"
    assert magictl("port-range").out == "8081-8090\n"

    assert magictl("port-range", "default").out == "✓ ports are given from 8080-8099\n"
    assert agent.bodies[-1] == {"portRange": None}


def test_draining_begins_and_ends(agent: StandIn, magictl: Magictl) -> None:
    told = magictl("drain")
    assert told.out.startswith("✓ draining: nothing is started  since 2026-01-02 ")
    assert "end the draining: magictl drain --off" in told.err
    assert agent.draining is True

    assert magictl("drain", "--off").out == "✓ models can be started again\n"
    assert agent.draining is False


def test_a_start_while_draining_is_refused_in_the_agents_words(agent: StandIn, magictl: Magictl) -> None:
    agent.always(409, {"error": "Draining", "message": "the host is being drained", "details": {}})

    assert magictl("start", "tiny-chat").err == "magictl: the host is being drained\n"


@pytest.mark.parametrize(
    "words", [["tier", "tiny-chat", "fast"], ["port", "tiny-chat", "auto"], ["port-range", "default"], ["drain"]]
)
def test_one_who_may_read_only_changes_nothing(agent: StandIn, magictl: Magictl, words: list[str]) -> None:
    agent.fault = read_only
    told: Any = magictl(*words)

    assert told.status == 1
    assert "use the unix socket" in told.err
