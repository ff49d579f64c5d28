"""What happened to servers, from the records in a real journal: of real agents, and of systemd where none was there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from magi_agent.servers.history import MESSAGE_ID, Happened, HistoryEvent, events_of
from magi_agent.systemd.journal_entries import JournalEntry
from tests.agent_process import AgentProcess, ended, unit_property, units, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

MODEL, BROKEN = "history-toy", "history-broken"
UNIT = f"magi-llama-{MODEL}.service"


@pytest.fixture
def agent(
    tmp_path: Path, toy_model: MakeToyModel, llama_server: Path, unused_ports: PortRanges, systemd_user: SystemdUser
) -> Iterator[AgentProcess]:
    toy_model(tmp_path / "models" / f"{MODEL}.gguf")
    # An architecture that no llama-server knows.
    toy_model(tmp_path / "models" / f"{BROKEN}.gguf", architecture="nonesuch")
    settings = {"MAGI_JOURNAL_DIRECTORY": str(systemd_user.journal), "MAGI_LOG_LEVEL": "error"}
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(4), llama_server, settings)
    with ended(agent, "magi-llama-history-*.service"):
        agent.start()
        agent.wait_settled()
        yield agent


def history(agent: AgentProcess, model_id: str = MODEL, limit: int = 100) -> list[dict[str, Any]]:
    answer = agent.must("GET", f"/api/models/{model_id}/history?limit={limit}")
    assert answer["modelId"] == model_id
    events: list[dict[str, Any]] = answer["events"]
    return events


def until_last(agent: AgentProcess, *wanted: tuple[str, str | None], model_id: str = MODEL) -> list[dict[str, Any]]:
    """Wait until the history ends with these events and who is behind them; ``None`` for whoever."""
    found: list[dict[str, Any]] = []

    def is_so() -> bool:
        found[:] = history(agent, model_id)[-len(wanted) :]
        told = [(event["event"], event["by"]) for event in found]
        return len(told) == len(wanted) and all(
            event == word and (who is None or str(by).startswith(who))
            for (event, by), (word, who) in zip(told, wanted, strict=True)
        )

    try:
        wait_until(is_so, f"the history ends with {wanted}", 60)
    except AssertionError as error:
        error.add_note(f"it has {history(agent, model_id)}")
        raise
    return found


def test_who_started_and_stopped_a_server_over_restarts_of_the_agent(agent: AgentProcess) -> None:
    assert history(agent) == []
    agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60")
    started, ready = until_last(agent, ("started", "uid 0 (pid "), ("ready", None))
    run = unit_property(UNIT, "InvocationID")
    assert list(started) == ["at", "event", "message", "by", "result", "exitStatus", "signal", "invocationId", "forced"]
    assert (started["forced"], ready["forced"]) == (False, None)
    assert (started["invocationId"], ready["invocationId"]) == (run, run)
    assert started["message"] == f"server of {MODEL} was started"
    assert abs((datetime.now(UTC) - datetime.fromisoformat(started["at"])).total_seconds()) < 120

    agent.must("POST", f"/api/models/servers/{MODEL}/restart?wait=60")
    stopped, _, _ = until_last(agent, ("stopped", "uid 0"), ("started", "uid 0"), ("ready", None))
    assert stopped["invocationId"] == run
    assert stopped["message"].endswith("was stopped, to be started anew")

    agent.stop()
    agent.start()
    agent.wait_settled()
    # Adoption starts nothing, and finds ready what was. systemctl's word is the operator's.
    assert len(history(agent)) == 5
    subprocess.run(["systemctl", "--user", "stop", UNIT], check=True, timeout=60)
    until_last(agent, ("ready", None), ("stopped", "systemctl"))

    agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60")
    agent.kill()
    subprocess.run(["systemctl", "--user", "stop", UNIT], check=True, timeout=60)
    agent.start()
    [*_, absent] = until_last(agent, ("started", "uid 0"), ("ready", None), ("stopped", "systemctl"))
    assert "while nobody looked" in absent["message"]

    answer = agent.must("GET", f"/api/models/{MODEL}/history?limit=2")
    assert [event["event"] for event in answer["events"]] == ["ready", "stopped"]
    assert answer["truncated"]
    assert not agent.must("GET", f"/api/models/{MODEL}/history")["truncated"]


def test_a_start_by_force_is_told_as_one_with_what_it_overruled(agent: AgentProcess) -> None:
    agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60&force=true")
    started, _ = until_last(agent, ("started", "uid 0 (pid "), ("ready", None))
    assert (started["forced"], started["message"]) == (True, f"server of {MODEL} was started, by force")
    agent.must("POST", f"/api/models/servers/{MODEL}/stop?wait=60")

    agent.stop()
    agent.settings["MAGI_MEMORY_RESERVE"] = "1000T"
    agent.start()
    agent.wait_settled()
    assert agent.ask("POST", f"/api/models/servers/{MODEL}/start").status == 409
    agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60&force=true")
    started, _ = until_last(agent, ("started", "uid 0 (pid "), ("ready", None))
    assert started["forced"]
    assert started["message"].startswith(f"server of {MODEL} was started, by force, though it needs ")
    assert "1024000.0 GiB are kept in reserve" in started["message"]
    # The word holds for the next run, and is told of that one too; a refusal is not.
    agent.must("POST", f"/api/models/servers/{MODEL}/restart?wait=60")
    assert until_last(agent, ("started", "uid 0"), ("ready", None))[0]["forced"]


def test_a_crash_and_systemds_own_restart(agent: AgentProcess) -> None:
    agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60")
    subprocess.run(["systemctl", "--user", "kill", "--signal=KILL", UNIT], check=True, timeout=60)

    [killed, again, _] = until_last(agent, ("failed", None), ("started", "systemd"), ("ready", None))

    assert (killed["result"], killed["signal"]) == ("signal", "SIGKILL")
    assert again["invocationId"] == unit_property(UNIT, "InvocationID") != killed["invocationId"]


def lines_of(agent: AgentProcess, run: str) -> list[str]:
    log = agent.must("GET", f"/api/models/servers/{BROKEN}/logs?run={run}")
    return [entry["message"] for entry in log["entries"]]


def test_a_failure_has_systemds_result_and_its_run(agent: AgentProcess) -> None:
    agent.ask("POST", f"/api/models/servers/{BROKEN}/start?wait=60")
    wait_until(lambda: any(event["event"] == "failed" for event in history(agent, BROKEN)), "it failed", 60)

    failed = next(event for event in history(agent, BROKEN) if event["event"] == "failed")
    assert (failed["result"], failed["exitStatus"], failed["signal"]) == ("exit-code", 1, None)
    assert failed["message"].startswith(f"server of {BROKEN} failed: ")
    # The journal may have an end before what was printed last.
    wait_until(lambda: any("nonesuch" in line for line in lines_of(agent, failed["invocationId"])), "its log is there")

    # It cools down, and whoever tries then is the agent.
    until_last(agent, ("started", "agent"), ("failed", None), ("started", "systemd"), model_id=BROKEN)
    agent.must("POST", f"/api/models/servers/{BROKEN}/stop?wait=60")
    wait_until(lambda: f"magi-llama-{BROKEN}.service" not in units(), "its unit is gone")


def test_only_what_the_agents_user_wrote_counts(agent: AgentProcess) -> None:
    before = len(history(agent))
    record = f"MESSAGE=forged\nMESSAGE_ID={MESSAGE_ID}\nMAGI_MODEL={MODEL}\nMAGI_EVENT=stopped\nMAGI_BY=root\n"
    for user in ("65534", "0"):
        subprocess.run(
            ["setpriv", f"--reuid={user}", "--clear-groups", "logger", "--journald"],
            input=record, text=True, check=True, timeout=30,
        )  # fmt: skip

    # The second, which could be the agent's own, is here for the first to have come by then.
    until_last(agent, ("stopped", "root"))

    assert len(history(agent)) == before + 1


def test_bad_questions(agent: AgentProcess) -> None:
    assert agent.ask("GET", "/api/models/no-such-model/history").body["error"] == "ModelNotFound"
    for limit in ("0", "1001", "x"):
        answer = agent.ask("GET", f"/api/models/{MODEL}/history?limit={limit}")
        assert (answer.status, answer.body["details"]["errors"][0]["field"]) == (422, "limit")


STARTED = "39f53479d3a045ac8e11786248231fbf"
ENDED_WELL = "7ad2d189f7e94e70a38c781354912448"
FAILED = "d9b373ed55a64feb8242e02dbe79a49c"
PROCESS_ENDED = "98e322203f7a4ed290d09fe03c09fe15"


def systemds(at: float, message_id: str, run: str, **fields: str) -> JournalEntry:
    return JournalEntry("systemd's", at, 6, 1, "", fields={"MESSAGE_ID": message_id, "INVOCATION_ID": run, **fields})


def agents(at: float, event: str, run: str | None = None, **fields: str) -> JournalEntry:
    known = {"MESSAGE_ID": MESSAGE_ID, "MAGI_EVENT": event, **({"MAGI_INVOCATION": run} if run else {}), **fields}
    return JournalEntry("the agent's", at, 6, 1, "", fields=known)


def told(*records: JournalEntry) -> list[tuple[float, str, str | None, str | None]]:
    return [(event.at.timestamp(), event.event.value, event.by, event.invocation_id) for event in events_of(records)]


def test_what_both_tell_is_told_once_in_the_agents_words() -> None:
    assert told(
        systemds(1, STARTED, "a"),
        agents(2, "started", "a", MAGI_BY="alice"),
        agents(3, "ready", "a"),
        systemds(4, ENDED_WELL, "a"),
        agents(5, "stopped", "a", MAGI_BY="bob"),
    ) == [(2.0, "started", "alice", "a"), (3.0, "ready", None, "a"), (5.0, "stopped", "bob", "a")]


def test_what_the_next_agent_finds_ready_became_so_once() -> None:
    assert told(agents(1, "ready", "a"), agents(2, "ready", "a"), agents(3, "ready", "b")) == [
        (1.0, "ready", None, "a"),
        (3.0, "ready", None, "b"),
    ]


def test_what_systemd_alone_saw() -> None:
    events = events_of(
        [
            systemds(1, PROCESS_ENDED, "a", EXIT_CODE="exited", EXIT_STATUS="3"),
            systemds(2, FAILED, "a", UNIT_RESULT="exit-code"),
            systemds(3, STARTED, "b"),
            systemds(4, PROCESS_ENDED, "b", EXIT_CODE="dumped", EXIT_STATUS="11"),
            systemds(5, FAILED, "b", UNIT_RESULT="core-dump"),
            systemds(6, ENDED_WELL, "c"),
        ]
    )

    def at(second: int) -> datetime:
        return datetime.fromtimestamp(second, UTC)

    say = "systemd's"
    assert events == [
        HistoryEvent(at(2), Happened.FAILED, say, result="exit-code", exit_status=3, invocation_id="a"),
        HistoryEvent(at(3), Happened.STARTED, say, by="systemd", invocation_id="b"),
        HistoryEvent(at(5), Happened.FAILED, say, result="core-dump", signal="SIGSEGV", invocation_id="b"),
        HistoryEvent(at(6), Happened.STOPPED, say, result="success", invocation_id="c"),
    ]


def test_a_crash_before_the_one_that_the_agent_tells_of_stays() -> None:
    assert told(
        systemds(1, FAILED, "a"),
        systemds(2, STARTED, "b"),
        agents(2.5, "started", "b", MAGI_BY="systemd"),
        systemds(3, FAILED, "b"),
        agents(4, "failed", "b"),
    ) == [(1.0, "failed", None, "a"), (2.5, "started", "systemd", "b"), (4.0, "failed", None, "b")]


def test_an_agent_that_was_away_says_who_and_systemd_says_when() -> None:
    assert told(systemds(1, ENDED_WELL, "a"), agents(9, "stopped", MAGI_BY="systemctl")) == [
        (1.0, "stopped", "systemctl", "a")
    ]
    # Where systemd's word is gone, the agent's stands.
    assert told(agents(9, "stopped", MAGI_BY="systemctl")) == [(9.0, "stopped", "systemctl", None)]
    # An end that the agent saw is none that it found out later.
    assert len(told(agents(1, "stopped", "a", MAGI_BY="alice"), agents(9, "stopped", MAGI_BY="systemctl"))) == 2


@pytest.mark.parametrize(
    ("said", "forced"), [({"MAGI_FORCED": "true"}, True), ({"MAGI_FORCED": "false"}, False), ({}, None),
                         ({"MAGI_FORCED": "perhaps"}, None)],
)  # fmt: skip
def test_of_a_start_by_an_older_agent_nobody_says_whether_it_was_forced(
    said: dict[str, str], forced: bool | None
) -> None:
    (event,) = events_of([agents(1, "started", "a", **said)])
    assert event.is_forced is forced


@pytest.mark.parametrize("fields", [{"MAGI_EVENT": "exploded"}, {"MESSAGE_ID": "0" * 32}, {}])
def test_a_record_that_nobody_knows_is_none(fields: dict[str, str]) -> None:
    assert events_of([JournalEntry("?", 1, 6, 1, "", fields=fields)]) == []
