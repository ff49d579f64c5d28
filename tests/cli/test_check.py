"""`magictl check`: finds what the contract forbids, says it, and leaves every choice as it was."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.cli.conftest import Magictl
from tests.cli.stand_in import HELD_SECONDS, Answer, BreakOff, StandIn, error, model, read_only, server
from tests.cli.terminal import MAGICTL, on_terminal, piped, shown, surroundings

NAMES = ["registry", "servers", "profiles", "profile", "tiers", "tier", "thinking", "enabled", "rescan"]
NAMES += ["create profile", "delete profile"]
PROFILES = {"development", "fast-only", "production"}


@pytest.fixture
def busy(agent: StandIn) -> StandIn:
    """An agent whose models have choices of every kind, and one that runs."""
    agent.add(
        model("overridden", tierOverride="fast", effectiveTier="fast", thinkingOverride=False, enabled=True),
        model("thinker", isThinkingModel=True, thinkingMode="always", effectiveThinking=True, effectiveTier="powerful"),
        model("half", status="incomplete", problem="cut", port=None, sizeBytes=1),
    )
    agent.servers["tiny-chat"] = server("tiny-chat")
    return agent


def assert_as_before(agent: StandIn, choices: dict[str, tuple[Any, ...]]) -> None:
    assert agent.choices() == choices
    assert agent.profiles.keys() == PROFILES


def changes(agent: StandIn) -> list[tuple[str, str]]:
    return [(method, path) for method, path in agent.seen if method != "GET"]


def failed(document: dict[str, Any]) -> dict[str, list[str]]:
    """The problems, by check."""
    return {check["name"]: check["problems"] for check in document["checks"] if check["result"] == "failed"}


def test_an_agent_that_keeps_to_the_contract_passes(busy: StandIn, magictl: Magictl) -> None:
    before = busy.choices()

    told = magictl("check")

    assert told.status == 0
    assert told.err == ""
    lines = told.out.splitlines()
    assert lines[0] == f"magi-agent 0.1.0 at {busy.url}"
    assert [line[:4] for line in lines[2:13]] == [f"✓ {number:2}" for number in range(1, 12)]
    assert [line.split()[2:5] for line in lines[2:13]] == [
        ["GET", "/api/models/registry", "200"],
        ["GET", "/api/models/servers", "200"],
        ["GET", "/api/models/profiles", "200"],
        ["GET", "/api/models/profiles/development", "200"],
        ["GET", "/api/models/tiers/powerful", "200"],
        ["PUT", "/api/models/{id}/tier", "200"],
        ["PUT", "/api/models/{id}/thinking", "200"],
        ["PUT", "/api/models/{id}/enabled", "200"],
        ["POST", "/api/models/rescan", "200"],
        ["POST", "/api/models/profiles", "201"],
        ["DELETE", "/api/models/profiles/{name}", "200"],
    ]
    assert [line.split() for line in lines[-4:]] == [
        ["Total", "11"], ["Passed", "11"], ["Failed", "0"], ["Rate", "100", "%"],
    ]  # fmt: skip
    assert_as_before(busy, before)


def test_it_starts_and_stops_nothing_and_touches_no_model_in_use(busy: StandIn, magictl: Magictl) -> None:
    magictl("check")

    touched = {path.split("/")[3] for method, path in changes(busy) if method == "PUT"}
    assert touched == {"qwen2.5-7b"}
    assert not any("/servers/" in path or "apply" in path for _, path in busy.seen)


def test_the_endpoints_are_asked_in_the_order_of_the_contract(busy: StandIn, magictl: Magictl) -> None:
    magictl("check")

    first = list(dict.fromkeys(path.rpartition("/")[2] for _, path in busy.seen[1:]))
    assert first[:9] == [
        "registry", "servers", "profiles", "development", "powerful", "gigantic", "tier", "thinking", "enabled"
    ]  # fmt: skip
    assert first[9] == "rescan"
    assert first[10].startswith("magictl-check-")


def test_json_is_one_document_with_every_check(busy: StandIn, magictl: Magictl) -> None:
    document = magictl("check", "--json").json

    assert [check["name"] for check in document["checks"]] == NAMES
    assert all(check["result"] == "passed" and check["problems"] == [] for check in document["checks"])
    assert {key: document[key] for key in ("total", "passed", "failed", "skipped", "rate")} == {
        "total": 11, "passed": 11, "failed": 0, "skipped": 0, "rate": 100.0
    }  # fmt: skip
    assert document["address"] == busy.url
    assert document["interrupted"] is False
    assert document["leftBehind"] == []


def on(method: str, ending: str, change: Callable[[Any], Any]) -> Callable[[str, str, Answer], Answer]:
    """The fault of answering one endpoint with a body that is changed."""

    def fault(seen: str, path: str, right: Answer) -> Answer:
        if seen == method and path.endswith(ending) and right[0] < 300:
            return right[0], change(right[1])
        return right

    return fault


def each_model(change: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda body: {**body, "models": {name: {**one, **change} for name, one in body["models"].items()}}


def without(key: str) -> Callable[[Any], Any]:
    return lambda body: {name: value for name, value in body.items() if name != key}


def instead(**values: Any) -> Callable[[Any], Any]:
    return lambda body: {**body, **values}


def reordered(body: Any) -> Any:
    return {**body, "models": {name: dict(reversed(one.items())) for name, one in body["models"].items()}}


@pytest.mark.parametrize(
    ("fault", "check", "problem"),
    [
        (on("GET", "/registry", each_model({"size_bytes": 1})), "registry", "size_bytes is not camelCase"),
        (on("GET", "/registry", each_model({"SizeBytes": 1})), "registry", "SizeBytes is not camelCase"),
        (on("GET", "/registry", each_model({"port": "8080"})), "registry", ".port is a string, not an integer"),
        (on("GET", "/registry", each_model({"isCoder": 1})), "registry", ".isCoder is a number, not a boolean"),
        (on("GET", "/registry", each_model({"status": "fine"})), "registry", ".status is 'fine', not one of ok,"),
        (on("GET", "/registry", each_model({"port": 2**64 - 1})), "registry", "must be null"),
        (on("GET", "/registry", each_model({"modelId": "x"})), "registry", ".models.tiny-chat.modelId is another id"),
        (on("GET", "/registry", each_model({"runtimeSettings": {"ctx_size": 1}})), "registry", "ctx_size is not camel"),
        (on("GET", "/registry", each_model({"more": [{"bad_key": 1}]})), "registry", ".more[0].bad_key is not camelC"),
        (on("GET", "/registry", reordered), "registry", "are not in the order of the contract"),
        (on("GET", "/registry", without("portRange")), "registry", ".portRange is missing"),
        (on("GET", "/registry", without("scanPaths")), "registry", ".scanPaths is missing"),
        (on("GET", "/registry", instead(portRange=[1, 2, 3])), "registry", ".portRange is not a pair"),
        (on("GET", "/registry", instead(models=[])), "registry", ".models is a list, not an object"),
        (on("GET", "/registry", instead(lastScan="2026-01-02T03:04:05+01:00")), "registry", "not a time in UTC with Z"),
        (on("GET", "/registry", instead(tierThresholds={"powerfulMin": 1})), "registry", ".powerful_min is missing"),
        (on("GET", "/servers", instead(totalServers=7)), "servers", ".totalServers is 7, and 1 are listed"),
        (on("GET", "/servers", instead(readyServers=0)), "servers", ".readyServers is 0, and 1 of them are ready"),
        (on("GET", "/servers", instead(servers=[server("x", state="up")])), "servers", ".state is 'up', not one of"),
        (on("GET", "/servers", instead(servers=[{}])), "servers", ".servers[0].modelId is missing"),
        (on("GET", "/profiles", sorted), "", ""),
        (on("GET", "/profiles", lambda slugs: slugs[::-1]), "profiles", "the slugs are not sorted"),
        (on("GET", "/profiles", lambda _: [1]), "profiles", "[0] is a number, not a string"),
        (on("GET", "/profiles", lambda slugs: {"profiles": slugs}), "profiles", "the answer is an object, not a list"),
        (on("GET", "/development", without("twoStage")), "profile", ".twoStage is missing"),
        (on("GET", "/development", instead(tierConfig=[{"max_score": 1}])), "profile", "max_score is not camelCase"),
        (on("GET", "/powerful", lambda _: [model("small")]), "tiers", "1 of the models listed are of another"),
        (on("GET", "/powerful", lambda _: {}), "tiers", "the answer is an object, not a list"),
        (on("PUT", "/tier", instead(override="yes")), "tier", ".override is 'yes', not true"),
        (on("PUT", "/tier", instead(message="ok")), "tier", ".message is 'ok', not 'Tier updated for qwen2.5-7b'"),
        (on("PUT", "/thinking", instead(tierChanged=False)), "thinking", ".tierChanged is false, not true"),
        (on("PUT", "/thinking", without("modelId")), "thinking", ".modelId is missing"),
        (on("PUT", "/enabled", instead(restartRequired=None)), "enabled", ".restartRequired is null, not a boolean"),
        (on("PUT", "/enabled", instead(enabled=False)), "enabled", ".enabled is false, not true"),
        (on("POST", "/rescan", instead(modelsFound="3")), "rescan", ".modelsFound is a string, not an integer"),
        (on("POST", "/rescan", instead(timestamp="now")), "rescan", ".timestamp is 'now', not a time"),
        (on("POST", "/profiles", instead(profileName="other")), "create profile", ".profileName is 'other', not 'mag"),
        (on("POST", "/profiles", without("path")), "create profile", ".path is missing"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_named_with_its_place(
    busy: StandIn, magictl: Magictl, fault: Any, check: str, problem: str
) -> None:
    before = busy.choices()
    busy.fault = fault

    told = magictl("check", "--json")

    found = failed(told.json)
    assert set(found) == ({check} if check else set()), found
    assert any(problem in one for one in found.get(check, [""])), found
    assert told.status == (1 if check else 0)
    assert told.json["leftBehind"] == []
    assert_as_before(busy, before)


@pytest.mark.parametrize(
    ("method", "ending", "wrong", "check"),
    [
        ("GET", "/registry", error(503, "ServiceUnavailable"), "registry"),
        ("GET", "/servers", error(500, "InternalServerError"), "servers"),
        ("GET", "/profiles", (204, {}), "profiles"),
        ("GET", "/development", error(404, "ProfileNotFound"), "profile"),
        ("GET", "/powerful", error(400, "InvalidTier"), "tiers"),
        ("GET", "/gigantic", (200, []), "tiers"),
        ("PUT", "/tier", error(500, "RegistrySaveFailed"), "tier"),
        ("PUT", "/thinking", (201, {}), "thinking"),
        ("PUT", "/enabled", error(409, "NoFreePort"), "enabled"),
        ("POST", "/rescan", error(500, "RescanFailed"), "rescan"),
        ("POST", "/profiles", (200, {}), "create profile"),
        ("DELETE", "", error(409, "ProfileActive"), "delete profile"),
    ],
)
def test_a_wrong_status_is_named(
    busy: StandIn, magictl: Magictl, method: str, ending: str, wrong: Answer, check: str
) -> None:
    """It is wrong in the answer only: the change is made, and must be put back all the same."""
    before = busy.choices()
    busy.fault = lambda seen, path, right: wrong if seen == method and path.endswith(ending) else right

    told = magictl("check", "--json")

    found = failed(told.json)
    assert told.status == 1
    assert f"status {wrong[0]}, not " in found[check][0]
    if wrong[0] >= 400:
        assert found[check][0].endswith(f": {wrong[1]['message']}")
    assert_as_before(busy, before)


@pytest.mark.parametrize("choice", ["tier", "thinking", "enabled"])
def test_a_change_that_is_said_and_not_made_is_found(busy: StandIn, magictl: Magictl, choice: str) -> None:
    busy.ignored = {choice}

    found = failed(magictl("check", "--json").json)

    assert choice in found
    assert "afterwards, " in found[choice][0]


def test_a_profile_that_is_said_and_not_made_is_found(busy: StandIn, magictl: Magictl) -> None:
    def forget(method: str, path: str, right: Answer) -> Answer:
        if method == "POST" and path.endswith("/profiles"):
            busy.profiles.pop(right[1].get("profileName"), None)
        return right

    busy.fault = forget

    found = failed(magictl("check", "--json").json)

    assert found.keys() == {"create profile", "delete profile"}


@pytest.mark.parametrize("missing", ["X-Request-ID", "X-Response-Time"])
def test_headers_belong_to_the_contract(busy: StandIn, magictl: Magictl, missing: str) -> None:
    del busy.headers[missing]

    found = failed(magictl("check", "--json").json)

    assert set(found) == set(NAMES)
    assert found["registry"] == [f"the header {missing} is missing"]


def test_a_body_that_is_said_not_to_be_json_is_found(busy: StandIn, magictl: Magictl) -> None:
    busy.headers["Content-Type"] = "text/plain"

    found = failed(magictl("check", "--json").json)

    assert found["servers"] == ["the header Content-Type is 'text/plain', not application/json"]


@pytest.mark.parametrize("wrong", [b"{", b"", b"<html>"])
def test_broken_json_in_the_middle_fails_that_check_only(busy: StandIn, magictl: Magictl, wrong: bytes) -> None:
    before = busy.choices()
    busy.fault = lambda _, path, right: (200, wrong) if path.endswith("/servers") else right

    told = magictl("check", "--json")

    assert failed(told.json).keys() == {"servers"}
    assert_as_before(busy, before)


def test_an_answer_after_which_the_connection_ends_is_put_back_all_the_same(busy: StandIn, magictl: Magictl) -> None:
    """The change is made, and nobody hears of it."""
    before = busy.choices()

    def close(method: str, path: str, right: Answer) -> Answer:
        if len(changes(busy)) in {1, 5, 9, 12}:
            raise BreakOff
        return right

    busy.fault = close

    told = magictl("check")

    assert told.status == 1
    assert "no answer from" in told.out
    assert_as_before(busy, before)


def test_a_change_whose_answer_is_lost_fails_that_check_only(busy: StandIn, magictl: Magictl) -> None:
    before = busy.choices()

    def close(method: str, path: str, right: Answer) -> Answer:
        if len(changes(busy)) == 1:
            raise BreakOff
        return right

    busy.fault = close

    told = magictl("check", "--json")

    assert failed(told.json).keys() == {"tier"}
    assert_as_before(busy, before)


def test_what_could_not_be_put_back_is_told_with_the_way_to_do_it(busy: StandIn, magictl: Magictl) -> None:
    puts = 0

    def refuse_the_second(method: str, path: str, right: Answer) -> Answer:
        nonlocal puts
        if method == "PUT" and path.endswith("/enabled"):
            puts += 1
            if puts > 1:
                busy.models["qwen2.5-7b"]["enabled"] = True
                return error(500, "RegistrySaveFailed", "the disk is full")
        return right

    busy.fault = refuse_the_second

    told, as_json = magictl("check"), magictl("check", "--json")

    assert told.status == as_json.status == 1
    sentence = (
        "enabled of qwen2.5-7b was not put back (the disk is full); "
        'to do it: PUT /api/models/qwen2.5-7b/enabled {"enabled": false}'
    )
    assert told.err == f"magictl: {sentence}\n"
    assert as_json.json["leftBehind"] == []  # By now the model is enabled, and the check leaves it so.


def test_an_agent_that_dies_in_the_middle_is_told_of(busy: StandIn, magictl: Magictl) -> None:
    def die(method: str, path: str, right: Answer) -> Answer:
        if any(path.endswith("/thinking") for _, path in busy.seen):
            raise BreakOff
        return right

    busy.fault = die

    told = magictl("check", "--json")

    assert told.status == 1
    assert told.json["passed"] == 6
    assert any("thinking of qwen2.5-7b was not put back" in left for left in told.json["leftBehind"])
    assert told.error["error"] == "NotPutBack"


def test_with_read_access_only_it_says_so_and_claims_nothing(busy: StandIn, magictl: Magictl) -> None:
    before = busy.choices()
    busy.fault = read_only

    told, as_json = magictl("check"), magictl("check", "--json")

    assert told.status == as_json.status == 1
    assert set(failed(as_json.json)) == set(NAMES[5:])
    assert as_json.json["passed"] == 5
    assert as_json.json["leftBehind"] == []
    assert "status 403, not 200: a caller on TCP may not do this; use the unix socket" in told.out
    assert told.err == (
        f"! read access only by {busy.url}: 6 of 11 could not be checked; "
        "root and members of the group magi may do everything by --socket\n"
    )
    assert_as_before(busy, before)


def test_without_any_access_it_ends_at_once(busy: StandIn, magictl: Magictl) -> None:
    busy.always(*error(401, "Unauthorized", "api.tcp_access is 'none'; use the unix socket"))

    told = magictl("check")

    assert (told.status, told.out) == (1, "")
    assert told.err == "magictl: api.tcp_access is 'none'; use the unix socket\n"
    assert len(busy.seen) == 1


def test_without_models_what_cannot_be_tried_is_skipped_and_counts_as_neither(busy: StandIn, magictl: Magictl) -> None:
    busy.models.clear()

    told, as_json = magictl("check"), magictl("check", "--json")

    assert told.status == as_json.status == 0
    assert told.out.count("no models here: only its 404 was checked") == 3
    assert [line.split() for line in told.out.splitlines()[-5:]] == [
        ["Total", "11"], ["Passed", "8"], ["Failed", "0"], ["Skipped", "3"], ["Rate", "72.7", "%"],
    ]  # fmt: skip
    skipped = {check["name"] for check in as_json.json["checks"] if check["result"] == "skipped"}
    assert skipped == {"tier", "thinking", "enabled"}
    assert as_json.json["skipped"] == 3


def test_without_models_the_404_must_still_be_right(busy: StandIn, magictl: Magictl) -> None:
    busy.models.clear()
    busy.fault = lambda method, _, right: (404, {"detail": "no"}) if method == "PUT" else right

    told = magictl("check", "--json")

    assert told.status == 1
    assert set(failed(told.json)) == {"tier", "thinking", "enabled"}


def test_without_the_profile_development_it_is_skipped(busy: StandIn, magictl: Magictl) -> None:
    del busy.profiles["development"]

    told = magictl("check", "--json")

    assert told.status == 0
    assert told.json["checks"][3]["result"] == "skipped"


def test_a_registry_that_was_not_read_is_not_taken_for_an_empty_one(busy: StandIn, magictl: Magictl) -> None:
    busy.fault = lambda _, path, right: error(503, "ServiceUnavailable") if path.endswith("/registry") else right

    told = magictl("check")

    assert told.status == 1
    assert told.out.count("the registry was not read: only its 404 was checked") == 3
    assert "no models here" not in told.out


def test_where_no_model_can_be_used_choices_are_tried_on_one_all_the_same(agent: StandIn, magictl: Magictl) -> None:
    agent.models.clear()
    agent.add(model("cut", status="incomplete", problem="cut", port=None), model("bad", status="invalid", problem="x"))
    before = agent.choices()

    told = magictl("check", "--json")

    assert told.status == 0
    assert told.json["passed"] == 11
    assert told.json["checks"][7]["note"] == "bad: false, as it was"
    assert agent.choices() == before


def test_where_every_model_is_in_use_and_none_can_be_used_enabling_is_skipped(agent: StandIn, magictl: Magictl) -> None:
    agent.models.clear()
    agent.add(model("cut", status="missing", problem="its file is gone", enabled=True))
    before = agent.choices()

    told = magictl("check", "--json")

    assert told.status == 0
    assert told.json["checks"][7]["result"] == "skipped"
    assert told.json["checks"][7]["note"] == ("every model is in use, and none can be used: only its 404 was checked")
    assert agent.choices() == before


def test_where_every_model_is_in_use_the_choice_is_said_again(agent: StandIn, magictl: Magictl) -> None:
    for one in agent.models.values():
        one["enabled"] = True
    before = agent.choices()

    told = magictl("check", "--json")

    assert told.status == 0
    assert told.json["checks"][7]["note"].endswith(": true, as it was")
    assert agent.choices() == before


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"tierOverride": "fast", "effectiveTier": "fast"},
        {"tierOverride": "powerful", "effectiveTier": "powerful"},
        {"thinkingOverride": True, "effectiveThinking": True},
        {"thinkingOverride": False},
        {"thinkingOverride": True, "effectiveThinking": True, "tierOverride": "fast", "effectiveTier": "fast"},
        {"enabled": True},
        {"assignedTier": "powerful", "effectiveTier": "powerful"},
        {"port": None},
    ],
)
def test_choices_of_every_kind_are_put_back(agent: StandIn, magictl: Magictl, choices: dict[str, Any]) -> None:
    agent.models = {"one": model("one", **choices)}
    before = agent.choices()

    told = magictl("check", "--json")

    assert told.json["passed"] == 11, failed(told.json)
    assert_as_before(agent, before)


def interrupted(agent: StandIn, at: tuple[str, str], number: int, words: list[str]) -> tuple[int, str, str]:
    """Send a signal while a request is under way; let it be answered then."""
    agent.hold(*at)
    process = subprocess.Popen(
        [str(MAGICTL), "check", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings(MAGI_URL=agent.url),
    )
    try:
        agent.wait_for(*at)
        process.send_signal(number)
        assert process.stderr is not None
        said = "" if words else process.stderr.readline()
        agent.held.set()
        out, err = process.communicate(timeout=40)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, said + err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "at", [("PUT", "/tier"), ("PUT", "/thinking"), ("PUT", "/enabled"), ("POST", "/rescan"), ("POST", "/profiles")]
)
def test_an_interrupt_at_any_moment_leaves_everything_as_it_was(
    busy: StandIn, at: tuple[str, str], number: signal.Signals
) -> None:
    before = busy.choices()

    status, out, err = interrupted(busy, at, number, [])

    assert status == 1
    assert err.splitlines() == [
        "interrupted: ending the request under way, then putting everything back",
        "magictl: interrupted; the checks not made count as failed",
    ]
    assert "Failed" in out
    assert_as_before(busy, before)


def test_an_interrupt_is_told_in_json_too(busy: StandIn) -> None:
    before = busy.choices()
    with subprocess.Popen(
        [str(MAGICTL), "check", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings(MAGI_URL=busy.url),
    ) as process:

        def interrupt_it(method: str, path: str, right: Answer) -> Answer:
            if path.endswith("/thinking"):
                busy.fault = None
                process.send_signal(signal.SIGINT)
            return right

        busy.fault = interrupt_it
        try:
            out, err = process.communicate(timeout=40)
        finally:
            process.kill()

    document = json.loads(out)
    assert process.returncode == 1
    assert document["interrupted"] is True
    assert (document["passed"], document["failed"]) == (6, 5)
    assert [check["name"] for check in document["checks"]] == NAMES[:6]
    assert json.loads(err)["error"] == "Interrupted"
    assert_as_before(busy, before)


def test_a_second_interrupt_breaks_the_request_off_and_still_puts_back(busy: StandIn) -> None:
    """The agent holds the request, makes the change when everybody has gone, and then gets what undoes it."""
    before = busy.choices()
    busy.hold("POST", "/rescan")

    begun = time.monotonic()
    with on_terminal("check", environment=surroundings(MAGI_URL=busy.url)) as terminal:
        busy.wait_for("POST", "/rescan")
        terminal.type("\x03")
        terminal.wait_for(lambda output: "putting everything back" in output, "the word on the first interrupt")
        terminal.type("\x03")
        assert terminal.end() == 1
    assert time.monotonic() - begun < HELD_SECONDS - 5

    assert "interrupted; the checks not made count as failed" in terminal.text
    assert_as_before(busy, before)


def test_a_reader_that_goes_away_leaves_everything_as_it_was(busy: StandIn) -> None:
    before = busy.choices()

    subprocess.run(
        ["bash", "-c", f"{MAGICTL} check | head -n 8"],
        capture_output=True,
        env=surroundings(MAGI_URL=busy.url),
        timeout=60,
        check=True,
    )

    assert_as_before(busy, before)


def test_on_a_terminal_good_is_green_and_bad_is_red(busy: StandIn) -> None:
    environment = surroundings(MAGI_URL=busy.url)
    busy.fault = lambda _, path, right: (200, {}) if path.endswith("/powerful") else right

    status, coloured = shown("check", environment=environment)
    _, plain = shown("check", environment={**environment, "NO_COLOR": "1"})
    in_pipe = piped("check", environment=environment)

    assert status == 1
    assert "\x1b[32m✓" in coloured
    assert "\x1b[1;31m✗" in coloured
    assert "\x1b[31mthe answer is an object, not a list" in coloured
    assert "\x1b" not in plain
    assert "\x1b" not in in_pipe.stdout
    assert "✗  5 GET    /api/models/tiers/powerful" in in_pipe.stdout


def test_many_problems_are_cut_for_a_person_and_whole_in_json(busy: StandIn, magictl: Magictl) -> None:
    busy.fault = on("GET", "/registry", each_model({f"bad_{number}": 1 for number in range(20)}))

    told, as_json = magictl("check"), magictl("check", "--json")

    problems = failed(as_json.json)["registry"]
    assert len(problems) == 120
    assert sum(problem in told.out for problem in problems) == 8
    assert "and 112 more (--json lists all)" in told.out
