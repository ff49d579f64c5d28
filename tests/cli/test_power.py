"""`magictl start`, `stop`, `restart`: told to the agent, watched, and reported truly."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.agent_process import wait_until
from tests.cli.conftest import Magictl
from tests.cli.stand_in import Answer, StandIn, error, model, server
from tests.cli.terminal import MAGICTL, lines_left, on_terminal, piped, shown, surroundings


@pytest.mark.parametrize(("verb", "state"), [("start", "ready"), ("stop", "stopped"), ("restart", "ready")])
def test_a_verb_on_one_model_says_how_it_ended(agent: StandIn, magictl: Magictl, verb: str, state: str) -> None:
    told = magictl(verb, "tiny-chat")

    assert told.status == 0
    assert told.out.startswith(f"✓ tiny-chat {state}")
    assert (" on port 8080 (" in told.out) == (state == "ready")
    assert ("POST", f"/api/models/servers/tiny-chat/{verb}?wait=600") in agent.seen


def test_several_models_are_told_at_once_and_each_only_once(agent: StandIn, magictl: Magictl) -> None:
    told = magictl("start", "tiny-chat", "old-14b", "tiny-chat", "qwen2.5-7b")

    assert told.status == 0
    assert [line.split()[1] for line in told.out.splitlines()] == ["tiny-chat", "old-14b", "qwen2.5-7b"]
    assert len(agent.seen) == 3


def test_json_is_the_answer_for_each_model(agent: StandIn, magictl: Magictl) -> None:
    told = magictl("start", "tiny-chat", "--json")

    assert told.json["modelId"] == "tiny-chat"
    assert told.json["server"]["state"] == "ready"
    assert told.err == ""


def test_start_of_what_runs_says_so(agent: StandIn, magictl: Magictl) -> None:
    def already(method: str, path: str, right: Answer) -> Answer:
        return 200, {**right[1], "changed": False}

    agent.fault = already

    assert magictl("start", "tiny-chat").out == "✓ tiny-chat ready on port 8080 (was already)\n"


def test_start_of_one_that_does_without_its_gpu_says_so(agent: StandIn, magictl: Magictl) -> None:
    lack = {"result": "no-gpu", "message": "no GPU is used", "advice": "magictl host shows why", "logLines": []}
    degraded = server("tiny-chat", state="degraded", failure=lack)
    agent.fault = lambda _method, _path, right: (200, {**right[1], "server": degraded})

    told = magictl("start", "tiny-chat")

    assert told.status == 0
    assert told.out.startswith("✓ tiny-chat degraded on port 8080 (")
    assert told.err == "  no GPU is used (result no-gpu); magictl host shows why\n"


def test_without_waiting_it_ends_at_once_and_says_what_goes_on(agent: StandIn, magictl: Magictl) -> None:
    agent.fault = lambda _method, _path, right: (202, right[1])

    told = magictl("start", "tiny-chat", "--no-wait")

    assert told.status == 0
    assert told.out == "… tiny-chat: goes on loading; see how: magictl servers\n"
    assert agent.seen == [("POST", "/api/models/servers/tiny-chat/start")]


def test_a_wait_that_ends_before_the_model_is_ready_is_no_success(agent: StandIn, magictl: Magictl) -> None:
    agent.fault = lambda _method, _path, right: (202, right[1])

    told = magictl("start", "tiny-chat", "--wait", "7")

    assert told.status == 1
    assert told.err == "magictl: tiny-chat is not through after 7 s\n"
    assert "goes on loading" in told.out
    assert agent.seen == [("POST", "/api/models/servers/tiny-chat/start?wait=7")]


def test_a_failed_start_says_why_with_the_last_lines_of_the_log(agent: StandIn, magictl: Magictl) -> None:
    details = {"modelId": "tiny-chat", "result": "signal", "exitStatus": None, "signal": "SIGKILL"}
    agent.always(*error(500, "StartFailed", "model tiny-chat did not start", **details, logLines=["bad", "\x1b[2J"]))

    told, as_json = magictl("start", "tiny-chat"), magictl("start", "tiny-chat", "--json")

    assert told.status == 1
    assert told.out == ""
    assert told.err == "magictl: model tiny-chat did not start\n  SIGKILL\n  │ bad\n  │ \\x1b[2J\n"
    assert as_json.status == 1
    assert as_json.error["details"]["logLines"] == ["bad", "\x1b[2J"]


def test_an_unknown_id_gets_a_suggestion_and_status_4_and_the_others_go_on(agent: StandIn, magictl: Magictl) -> None:
    told = magictl("start", "tiny-chet", "old-14b", "zzz")

    assert told.status == 4
    assert "✓ old-14b ready" in told.out
    assert told.err.splitlines() == [
        "magictl: no model has the id 'tiny-chet'; did you mean tiny-chat?",
        "magictl: no model has the id 'zzz'; the ids are in: magictl models",
    ]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("tiny", ["tiny-chat"]),
        ("TINY-CHAT", ["tiny-chat"]),
        ("qwen", ["qwen2.5-7b"]),
        ("14b", ["old-14b"]),
        ("qwen2-7b", ["qwen2.5-7b"]),
        ("xyz", []),
    ],
)
def test_what_was_probably_meant_is_in_json_too(agent: StandIn, magictl: Magictl, typed: str, meant: list[str]) -> None:
    told = magictl("stop", typed, "--json")

    assert told.status == 4
    assert told.error["error"] == "ModelNotFound"
    assert told.error["details"]["suggestions"] == meant


def test_an_id_with_a_semicolon_is_named_whole(agent: StandIn, magictl: Magictl) -> None:
    assert "no model has the id 'a; b'; the ids are in" in magictl("start", "a; b").err


def test_an_agent_that_is_not_there_is_said_once(magictl: Magictl) -> None:
    told = magictl("start", "a", "b", "c", "--url", "127.0.0.1:1")

    assert told.status == 3
    assert told.err.count("\n") == 1


def test_all_models_in_use_are_started_as_one_operation(agent: StandIn, magictl: Magictl) -> None:
    agent.models["old-14b"]["enabled"] = True

    told = magictl("start", "--all")

    assert told.status == 0
    assert told.out == "✓ tiny-chat ready\n✓ old-14b ready\n"
    assert magictl("stop", "--all").out == "✓ tiny-chat stopped\n✓ old-14b stopped\n"
    assert magictl("stop", "--all", "--json").json["kind"] == "stop-all"


def test_an_operation_is_followed_until_it_ends(agent: StandIn, magictl: Magictl) -> None:
    looks = 0

    def slowly(method: str, path: str, right: Answer) -> Answer:
        nonlocal looks
        looks += 1
        if looks > 2:
            return right
        pending = {"status": "running", "state": "loading", "message": ""}
        return right[0], {**right[1], "status": "running", "models": {"tiny-chat": pending}}

    agent.fault = slowly

    assert magictl("start", "--all").out == "✓ tiny-chat ready\n"
    assert [path for _, path in agent.seen] == [
        "/api/models/servers/start-all", "/api/operations/op0", "/api/operations/op0"
    ]  # fmt: skip


def test_an_operation_that_failed_for_one_is_a_failure(agent: StandIn, magictl: Magictl) -> None:
    def partly(method: str, path: str, right: Answer) -> Answer:
        bad = {"status": "failed", "state": "failed", "message": "it did not start: out of memory"}
        return 202, {**right[1], "status": "failed", "models": {**right[1]["models"], "old-14b": bad}}

    agent.fault = partly

    told = magictl("start", "--all")

    assert told.status == 1
    assert told.out == "✓ tiny-chat ready\n✗ old-14b failed  it did not start: out of memory\n"
    assert told.err == "magictl: 1 model of 2 did not do it; why: magictl servers\n"
    assert magictl("start", "--all", "--json").status == 1


def test_an_operation_need_not_be_waited_for(agent: StandIn, magictl: Magictl) -> None:
    def never(method: str, path: str, right: Answer) -> Answer:
        pending = {"status": "running", "state": "loading", "message": ""}
        return right[0], {**right[1], "status": "running", "models": {"tiny-chat": pending}}

    agent.fault = never

    at_once = magictl("start", "--all", "--no-wait")
    assert at_once.status == 0
    assert "start-all goes on in the agent" in at_once.err
    assert magictl("start", "--all", "--wait", "1").status == 1


def test_changed_restarts_what_is_due_and_is_followed(agent: StandIn, magictl: Magictl) -> None:
    assert magictl("restart", "--changed").out == "no server is due for a restart\n"

    agent.servers["tiny-chat"] = server("tiny-chat", restartRequired=True)
    agent.servers["old-14b"] = server("old-14b")
    told = magictl("restart", "--changed")

    assert (told.status, told.out) == (0, "✓ tiny-chat ready\n")
    assert magictl("restart", "--changed", "--json").json["kind"] == "restart-changed"


def test_changed_says_what_was_skipped_behind_the_first_that_failed(agent: StandIn, magictl: Magictl) -> None:
    def stopped(method: str, path: str, right: Answer) -> Answer:
        parts = {
            "a": {"status": "succeeded", "state": "ready", "message": ""},
            "b": {"status": "failed", "state": "failed", "message": "out of memory"},
            "c": {"status": "skipped", "state": "ready", "message": "b failed before it"},
        }
        return 202, {**right[1], "status": "failed", "models": parts}

    agent.fault = stopped

    told = magictl("restart", "--changed")

    assert told.status == 1
    assert told.out == "✓ a ready\n✗ b failed  out of memory\n- c skipped  b failed before it\n"
    assert told.err == "magictl: 1 model of 3 did not do it; why: magictl servers\n"


def test_with_nothing_to_do_all_says_so(agent: StandIn, magictl: Magictl) -> None:
    agent.models.clear()

    assert magictl("stop", "--all").out == "there is nothing to stop\n"


def test_while_a_model_loads_a_live_line_shows_its_state(agent: StandIn) -> None:
    agent.hold("POST", "/start")
    agent.servers["tiny-chat"] = server("tiny-chat", state="loading", isReady=False)

    with on_terminal("start", "tiny-chat", environment=surroundings(MAGI_URL=agent.url)) as terminal:
        terminal.wait_for(lambda output: "loading" in output, "the live line")
        assert "tiny-chat loading " in terminal.text
        agent.held.set()
        assert terminal.end() == 0

    # The live line is gone from the screen, and the cursor is back on it.
    [line] = lines_left(terminal.output)
    assert line.startswith("✓ tiny-chat ready on port 8080 (")
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")


def test_a_name_in_a_live_line_cannot_take_over_the_terminal(agent: StandIn) -> None:
    agent.hold("POST", "/start")
    agent.servers["x"] = server("evil\x1b]0;owned\x07", state="\x1b[2J")

    with on_terminal("start", "evil\x1b]0;owned\x07", environment=surroundings(MAGI_URL=agent.url)) as terminal:
        terminal.wait_for(lambda output: output.count("owned") > 5, "the live line")

    assert "evil\\x1b]0;owned\\x07 \\x1b[2J" in terminal.text
    assert "\x1b]0;" not in terminal.output
    assert "\x1b[2J" not in terminal.output


def test_the_live_lines_of_many_models_fit_a_small_terminal(agent: StandIn) -> None:
    ids = [f"model-number-{number:02}-with-a-long-name-q4_k_m" for number in range(30)]
    agent.add(*(model(name) for name in ids))
    agent.hold("POST", "/start")

    def begun() -> list[str]:
        return [path for method, path in agent.seen if method == "POST"]

    with on_terminal("start", *ids, columns=40, lines=15, environment=surroundings(MAGI_URL=agent.url)) as terminal:
        wait_until(lambda: len(begun()) >= 8, "eight are under way")
        drawn = terminal.text.count("model-number")
        terminal.wait_for(lambda output: output.count("model-number") >= drawn + 16, "live lines, drawn twice")
        at_once = len(begun())
        agent.held.set()
        assert terminal.end() == 0

    assert at_once == 8, "so many are under way at once"
    for name in ids:
        assert f"✓ {name} ready" in terminal.text.replace("\n", "")


def test_in_a_pipe_and_with_json_there_is_no_live_line(agent: StandIn) -> None:
    environment = surroundings(MAGI_URL=agent.url)
    for words in (["start", "tiny-chat"], ["start", "tiny-chat", "--json"]):
        ended = piped(*words, environment=environment)
        assert ended.stderr == ""
        assert "\x1b" not in ended.stdout
    status, output = shown("start", "tiny-chat", "--json", environment=environment)
    assert status == 0
    assert "\x1b" not in output
    assert [path for _, path in agent.seen if "/servers/tiny-chat/" not in path] == []


def test_ctrl_c_ends_the_watching_and_says_that_the_loading_goes_on(agent: StandIn) -> None:
    agent.hold("POST", "/start")

    with on_terminal("start", "tiny-chat", environment=surroundings(MAGI_URL=agent.url)) as terminal:
        terminal.wait_for(lambda output: "tiny-chat" in output, "the live line")
        terminal.type("\x03")
        assert terminal.end() == 1

    assert "… tiny-chat: goes on loading in the agent; see how: magictl servers" in terminal.text
    assert "Traceback" not in terminal.text
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")


def test_ctrl_c_says_which_models_the_agent_was_never_told_of(agent: StandIn) -> None:
    ids = [f"model-{number:02}" for number in range(10)]
    agent.add(*(model(name) for name in ids))
    agent.hold("POST", "/stop")
    process = subprocess.Popen(
        [str(MAGICTL), "stop", *ids],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings(MAGI_URL=agent.url),
    )
    try:
        for name in ids[:8]:
            agent.wait_for("POST", f"/{name}/stop?wait=600")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 1
    assert out == ""
    going_on, untold = err.splitlines()
    assert going_on == f"… {', '.join(ids[:8])}: goes on stopping in the agent; see how: magictl servers"
    assert untold == f"! the agent was not told yet to stop {', '.join(ids[8:])}"


def test_ctrl_c_while_an_operation_is_followed(agent: StandIn) -> None:
    def never(method: str, path: str, right: Answer) -> Answer:
        if "start-all" not in path and "operations" not in path:
            return right
        pending = {"status": "running", "state": "loading", "message": ""}
        return right[0], {**right[1], "status": "running", "models": {"tiny-chat": pending}}

    agent.fault = never
    with on_terminal("start", "--all", environment=surroundings(MAGI_URL=agent.url)) as terminal:
        terminal.wait_for(lambda output: "loading" in output, "the live line")
        terminal.type("\x03")
        assert terminal.end() == 1

    assert "start-all goes on in the agent; see how: magictl servers" in terminal.text


def test_a_start_and_a_restart_can_be_forced_by_name(agent: StandIn, magictl: Magictl) -> None:
    assert magictl("start", "old-14b", "--force").status == 0
    assert magictl("restart", "tiny-chat", "--force", "--no-wait").status == 0
    several = magictl("start", "--all", "--force")

    assert several.status == 2
    assert "--force goes with the names of models" in several.err
    asked = [path for method, path in agent.seen if method == "POST"]
    assert asked == [
        "/api/models/servers/old-14b/start?wait=600&force=true",
        "/api/models/servers/tiny-chat/restart?force=true",
    ]


def test_a_refusal_for_memory_says_what_to_do(agent: StandIn, magictl: Magictl) -> None:
    advice = "stop another model, or start it nevertheless: magictl start --force old-14b"
    agent.always(*error(409, "InsufficientMemory", "model old-14b does not fit: 2 GiB are missing", advice=advice))

    told = magictl("start", "old-14b")

    assert told.err == f"magictl: model old-14b does not fit: 2 GiB are missing\n  {advice}\n"
