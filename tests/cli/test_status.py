"""`magictl status`: one screen that says what runs, what is missing, and why."""

from __future__ import annotations

from tests.cli.conftest import Magictl
from tests.cli.stand_in import Answer, Fault, StandIn, error, failure, model, server


def lines(output: str) -> dict[str, str]:
    """The labelled lines, by their labels."""
    return {line.split()[0]: line[9:] for line in output.splitlines() if line[:1].strip()}


def test_a_healthy_agent_on_one_screen(agent: StandIn, magictl: Magictl) -> None:
    agent.servers["tiny-chat"] = server("tiny-chat")
    agent.health |= {"activeProfile": "production", "problems": [], "missing": {}, "unknownUnits": []}

    told = magictl("status")

    assert told.status == 0
    said = lines(told.out)
    assert said["agent"] == f"magi-agent 0.1.0, running  {agent.url}"
    assert said["health"] == "ready"
    assert said["models"] == "3 found, 1 enabled"
    assert said["folder"] == "/models"
    assert said["scanned"].startswith("2026-01-0")
    assert said["ports"] == "8080 to 8099, 3 of 20 given out"
    assert said["profile"] == "production"
    assert "tiny-chat  ready" in told.out


def test_draining_is_said_with_the_way_out_of_it(agent: StandIn, magictl: Magictl) -> None:
    agent.health["draining"] = False
    assert "draining" not in magictl("status").out

    agent.health["draining"] = True
    assert "draining: nothing is started; end it: magictl drain --off\n" in magictl("status").out


def test_what_is_missing_is_named_with_its_state(agent: StandIn, magictl: Magictl) -> None:
    agent.health = {
        "status": "not_ready",
        "missing": {"tiny-chat": "loading", "old-14b": "failed"},
        "problems": ["the profile 'x' does not exist", {"path": "/p/y.yaml", "problem": "line 3: no mapping"}],
        "unknownUnits": ["magi-llama-stray.service"],
        "activeProfile": None,
    }
    agent.add(model("half", status="incomplete", problem="cut"))

    told = magictl("status")

    assert told.status == 0
    assert lines(told.out)["health"] == "not ready"
    for line in (
        "missing: tiny-chat: loading",
        "missing: old-14b: failed",
        "problems: the profile 'x' does not exist",
        "problems: /p/y.yaml: line 3: no mapping",
        "unknown units: magi-llama-stray.service",
    ):
        assert f"         {line}\n" in told.out
    assert lines(told.out)["models"] == "4 found, 1 enabled, 1 not usable (see: magictl models)"


def test_json_holds_the_four_answers(agent: StandIn, magictl: Magictl) -> None:
    agent.health = {"status": "not_ready", "missing": {"tiny-chat": "loading"}}

    document = magictl("status", "--json").json

    assert document.keys() == {"agent", "health", "registry", "servers"}
    assert document["agent"]["name"] == "magi-agent"
    assert document["health"] == agent.health
    assert document["registry"]["portRange"] == [8080, 8099]
    assert "models" not in document["registry"]
    assert document["servers"] == {"totalServers": 0, "readyServers": 0, "servers": []}


def test_why_a_server_failed_is_said_without_its_log(agent: StandIn, magictl: Magictl) -> None:
    agent.servers["tiny-chat"] = server("tiny-chat", state="failed", isReady=False, failure=failure())

    told = magictl("status")

    assert told.out.endswith("\ntiny-chat: llama-server ended with exit status 1\n")


def test_what_an_agent_without_systemd_still_knows_is_shown(agent: StandIn, magictl: Magictl) -> None:
    agent.health = {"status": "not_ready", "problems": ["no connection to systemd"]}
    agent.fault = on_servers(error(503, "ServiceUnavailable", "systemd does not answer", service="systemd"))

    told, as_json = magictl("status"), magictl("status", "--json")

    assert told.status == as_json.status == 0
    assert "problems: no connection to systemd" in told.out
    assert lines(told.out)["models"] == "3 found, 1 enabled"
    assert lines(told.out)["servers"] == "systemd does not answer"
    assert as_json.json["servers"]["error"] == "ServiceUnavailable"


def test_a_registry_that_is_not_loaded_yet_is_told(agent: StandIn, magictl: Magictl) -> None:
    def fault(method: str, path: str, right: Answer) -> Answer:
        return error(503, "ServiceUnavailable", "it is being loaded") if path.endswith("/registry") else right

    agent.fault = fault

    assert lines(magictl("status").out)["models"] == "it is being loaded"


def on_servers(wrong: Answer) -> Fault:
    return lambda _, path, right: wrong if path.endswith("/servers") else right


def test_several_folders_and_no_scan_yet(agent: StandIn, magictl: Magictl) -> None:
    def unscanned(method: str, path: str, right: Answer) -> Answer:
        if path.endswith("/registry"):
            return 200, {**right[1], "scanPaths": ["/a", "/b"], "scanPath": "/a:/b", "lastScan": None}
        return right

    agent.fault = unscanned
    agent.health["scanning"] = True

    said = lines(magictl("status").out)

    assert said["folders"] == "/a, /b"
    assert said["scanned"] == "never; a scan is under way"
