"""Export of all choices, and import on the same host and on another."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from magi_agent.api import export_body
from magi_agent.profiles.profile import Profile, TierConfig
from magi_agent.profiles.profiles import Profiles
from tests.api.client import Api, Reply
from tests.api.conftest import Serve

CHOICES = {"tierOverride", "thinkingOverride", "enabled", "port", "runtimeSettings"}


async def import_large(api: Api, body: object) -> Reply:
    """Import what aiohttp's client would rather not send as JSON by itself."""
    data = io.BytesIO(json.dumps(body).encode())
    return await api.ask("POST", "/api/import", data=data, headers={"Content-Type": "application/json"})


async def choose(api: Api, low: int) -> None:
    for path, body in (
        ("api-one/tier", {"tier": "powerful"}),
        ("api-one/settings", {"ctxSize": 512, "lora": None, "aliases": ["the-one"], "cpuQuota": 1.5}),
        ("api-two/thinking", {"thinking": True}),
        ("api-two/enabled", {"enabled": True}),
        ("api-two/port", {"port": low + 2}),
    ):
        (await api.ask("PUT", f"/api/models/{path}", body)).success()
    profile = {"name": "Night Shift", "enabledModels": ["api-two"], "runtimeSettings": {"api-two": {"nThreads": 1}}}
    (await api.ask("POST", "/api/models/profiles", profile)).success(201)


async def test_what_is_exported_can_be_imported_where_nothing_was_chosen(serve: Serve, tmp_path: Path) -> None:
    api = await serve("api-one", "api-two", "api-three")
    low, high = (await api.get("/api/models/registry"))["portRange"]
    await choose(api, low)
    (await api.ask("PUT", "/api/models/port-range", {"portRange": [low + 1, high]})).success()

    export = await api.get("/api/export")

    assert (export["version"], sorted(export["models"]), list(export["profiles"])) == (
        1, ["api-one", "api-two"], ["night-shift"],
    )  # fmt: skip
    assert export["models"]["api-one"]["runtimeSettings"]["aliases"] == ["the-one"]
    await api.session.close()
    await api.agent.stop()
    for path in (tmp_path / "state").iterdir():
        path.unlink()
    (tmp_path / "profiles" / "night-shift.yaml").unlink()
    api = await serve("api-one", "api-two", "api-three")
    assert (await api.get("/api/export"))["models"] == {}

    trial = (await api.ask("POST", "/api/import?dryRun=true", export)).success()

    assert (trial["dryRun"], trial["changed"], trial["profiles"]) == (True, ["api-one", "api-two"], ["night-shift"])
    assert (await api.get("/api/export"))["models"] == {}, "a dry run changes nothing"
    assert await api.get("/api/models/profiles") == []

    report = (await api.ask("POST", "/api/import", export)).success()

    assert {**report, "message": trial["message"], "dryRun": True} == trial
    again = await api.get("/api/export")
    assert {**again, "exportedAt": export["exportedAt"]} == export
    repeated = (await api.ask("POST", "/api/import", export)).success()
    assert (repeated["changed"], repeated["profiles"], repeated["problems"]) == ([], [], [])
    assert (await api.get("/api/models/servers"))["totalServers"] == 0, "what runs is not touched"


async def test_a_model_of_another_id_is_told_by_its_content(serve: Serve, models: Path) -> None:
    api = await serve("api-here")
    (await api.ask("PUT", "/api/models/api-here/tier", {"tier": "fast"})).success()
    export = await api.get("/api/export")
    sent = export["models"].pop("api-here")
    sent["tierOverride"] = "powerful"
    export["models"] = {"called-otherwise-there": sent, "api-nowhere": {"enabled": True, "fingerprint": "00"}}

    report = (await api.ask("POST", "/api/import", export)).success()

    assert (report["changed"], report["unknown"]) == (["api-here"], ["api-nowhere"])
    assert (await api.model("api-here"))["tierOverride"] == "powerful"


async def test_a_port_that_is_given_here_stays_where_it_is(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    low, _ = (await api.get("/api/models/registry"))["portRange"]
    (await api.ask("PUT", "/api/models/api-one/port", {"port": low})).success()
    export = await api.get("/api/export")
    export["models"] = {"api-two": {"port": low, "enabled": True}}

    report = (await api.ask("POST", "/api/import", export)).success()

    assert report["problems"] == [f"api-two: port {low} is given to api-one here, so it keeps what it has"]
    two = await api.model("api-two")
    assert (two["enabled"], two["port"]) == (True, None)
    assert (await api.model("api-one"))["port"] == low


async def test_ports_may_change_places(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    low, _ = (await api.get("/api/models/registry"))["portRange"]
    for name, port in (("api-one", low), ("api-two", low + 1)):
        (await api.ask("PUT", f"/api/models/{name}/port", {"port": port})).success()
    export = await api.get("/api/export")
    export["models"]["api-one"]["port"], export["models"]["api-two"]["port"] = low + 1, low

    report = (await api.ask("POST", "/api/import", export)).success()

    assert (report["changed"], report["problems"]) == (["api-one", "api-two"], [])
    assert (await api.model("api-one"))["port"] == low + 1


async def test_no_port_is_given_twice_by_an_import_beside_another_choice(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    low, _ = (await api.get("/api/models/registry"))["portRange"]
    for _ in range(8):
        reply, report = await asyncio.gather(
            api.ask("PUT", "/api/models/api-one/port", {"port": low}),
            api.ask("POST", "/api/import", {"version": 1, "models": {"api-two": {"port": low}}}),
        )
        one, two = (await api.model("api-one"))["port"], (await api.model("api-two"))["port"]
        assert sorted((one or 0, two or 0)) == [0, low]
        assert (reply.status == 409) is (two == low)
        assert (report.success()["problems"] == []) is (two == low)
        for name in ("api-one", "api-two"):
            (await api.ask("PUT", f"/api/models/{name}/port", {"port": None})).success()


async def test_ports_that_no_model_can_have_are_left_out(serve: Serve) -> None:
    api = await serve("api-one", "api-two", "api-three")
    low, high = (await api.get("/api/models/registry"))["portRange"]
    (await api.ask("PUT", "/api/models/api-one/port", {"port": high})).success()
    with socket.create_server(("127.0.0.1", low)):
        body = {"version": 1, "models": {"api-one": {"port": 22}, "api-two": {"port": low}}}
        report = (await api.ask("POST", "/api/import", body)).success()

    assert report["problems"] == [
        f"api-one: port 22 is outside the range of ports, {low} to {high}, so it keeps what it has",
        f"api-two: port {low} is in use, so it keeps what it has",
    ]
    assert [(await api.model(name))["port"] for name in ("api-one", "api-two")] == [high, None]
    own = api.services.settings.tcp
    assert own is not None
    body = {"version": 1, "portRange": [own.port, own.port], "models": {"api-three": {"port": own.port}}}

    report = (await api.ask("POST", "/api/import", body)).success()

    assert report["problems"] == [f"api-three: port {own.port} is the agent's own, so it keeps what it has"]
    assert report["portRange"] == [own.port, own.port]
    assert (await api.model("api-three"))["port"] is None


async def test_a_port_is_lost_where_another_model_took_it_meanwhile(serve: Serve) -> None:
    api = await serve("api-a", "api-b", "api-c")
    low, _ = (await api.get("/api/models/registry"))["portRange"]
    for number, name in enumerate(("api-b", "api-c")):
        (await api.ask("PUT", f"/api/models/{name}/port", {"port": low + number})).success()
    body = {"version": 1, "models": {"api-a": {"port": low}, "api-b": {"port": low + 1}}}

    report = (await api.ask("POST", "/api/import", body)).success()

    assert report["problems"] == [f"api-b: port {low + 1} is given to api-c here, so it has none"]
    assert [(await api.model(f"api-{name}"))["port"] for name in "abc"] == [low, None, low + 1]


async def test_aliases_that_name_another_model_are_left_out(serve: Serve) -> None:
    api = await serve("api-one", "api-two", "api-three")
    (await api.ask("PUT", "/api/models/api-one/settings", {"aliases": ["first"]})).success()
    (await api.ask("PUT", "/api/models/api-two/settings", {"aliases": ["second"]})).success()
    body = {
        "version": 1,
        "models": {
            "api-two": {"runtimeSettings": {"aliases": ["both", "api-two"]}},
            "api-three": {"runtimeSettings": {"ctxSize": 512, "aliases": ["first", "second", "api-one", "both"]}},
        },
    }

    report = (await api.ask("POST", "/api/import", body)).success()

    problems = {
        "api-three: the alias 'first' names api-one here",
        "api-three: the alias 'api-one' names api-one here",
    }
    settings = {name: (await api.model(f"api-{name}"))["runtimeSettings"] for name in ("two", "three")}
    assert settings["three"]["ctxSize"] == 512
    assert settings["three"]["aliases"][0] == "second", "whoever had it gave it up"
    assert problems < set(report["problems"])
    assert len(report["problems"]) == 3, "one of two that are sent the same alias has it"
    names = [*settings["two"]["aliases"], *settings["three"]["aliases"]]
    assert sorted(names) == ["api-two", "both", "second"]
    repeated = (await api.ask("POST", "/api/import", await api.get("/api/export"))).success()
    assert (repeated["changed"], repeated["problems"]) == ([], [])


async def test_the_range_of_ports_changes_only_where_the_export_speaks_of_it(serve: Serve) -> None:
    api = await serve()
    low, high = (await api.get("/api/models/registry"))["portRange"]
    (await api.ask("PUT", "/api/models/port-range", {"portRange": [low + 1, high]})).success()

    report = (await api.ask("POST", "/api/import", {"version": 1})).success()

    assert report["portRange"] is None
    assert (await api.get("/api/models/registry"))["portRange"] == [low + 1, high]
    for dry_run, left in (("true", [low + 1, high]), ("false", [low, high])):
        body = {"version": 1, "portRange": None}
        report = (await api.ask("POST", f"/api/import?dryRun={dry_run}", body)).success()
        assert report["portRange"] == [low, high]
        assert (await api.get("/api/models/registry"))["portRange"] == left


async def test_the_choices_for_very_many_models_are_taken_in(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = await serve("api-one")
    (await api.ask("PUT", "/api/models/api-one/settings", {"ctxSize": 512})).success()
    (await api.ask("POST", "/api/models/profiles", {"name": "x", "runtimeSettings": {"a": {"mmap": False}}})).success(
        201
    )
    export = await api.get("/api/export")
    assert export["models"]["api-one"]["runtimeSettings"] == {"ctxSize": 512}
    assert export["profiles"]["x"]["runtimeSettings"] == {"a": {"mmap": False}}
    gone = {**export["models"]["api-one"], "fingerprint": "00"}
    export["models"] |= {f"api-gone-{number}": gone for number in range(8000)}
    assert len(json.dumps(export)) > 1 << 20

    report = (await import_large(api, export)).success()

    assert (report["unchanged"], len(report["unknown"])) == (["api-one"], 8000)
    monkeypatch.setattr(export_body, "MAX_EXPORT", 1 << 20)
    details = (await import_large(api, export)).failure(413, "PayloadTooLarge")
    assert details == {"maxBytes": 1 << 20}


async def test_others_are_served_while_a_large_import_is_read(serve: Serve) -> None:
    api = await serve()
    affinity = ",".join(["0-8191"] * 142)
    body = {"version": 1, "models": {f"api-{n}": {"runtimeSettings": {"cpuAffinity": affinity}} for n in range(2000)}}
    asked = asyncio.create_task(import_large(api, body))
    served = 0
    while not asked.done():
        await api.get("/health/live")
        served += 1
    assert len((await asked).success()["unknown"]) == 2000
    assert served > 20


async def test_only_so_many_errors_are_told(serve: Serve) -> None:
    api = await serve()
    for settings in ({"ctxSize": -1}, {"memoryHigh": 2, "memoryMax": 1}):
        models = {f"api-{n}": {"runtimeSettings": settings} for n in range(300)}
        body = {"version": 1, "models": models, "profiles": {"x": {"name": "x", "runtimeSettings": models["api-1"]}}}
        details = (await api.ask("POST", "/api/import", body)).failure(422, "ValidationError")
        assert len(details["errors"]) == 100
        assert details["errors"][0]["field"].startswith("models.api-0.runtimeSettings.")
        profile = {"name": "x", "runtimeSettings": {f"api-{n}": settings for n in range(300)}}
        details = (await api.ask("POST", "/api/models/profiles", profile)).failure(422, "ValidationError")
        assert len(details["errors"]) == 100


@pytest.mark.parametrize("data", ["{", "NaN", '{"version": NaN}', "[" * 100_000, "\udcff"])
async def test_what_is_no_json_is_no_export(serve: Serve, data: str) -> None:
    api = await serve()
    sent = data.encode(errors="surrogateescape")

    reply = await api.ask("POST", "/api/import", data=sent, headers={"Content-Type": "application/json"})

    assert reply.failure(400, "InvalidJson") == {}


async def test_profiles_come_back_under_the_slugs_they_had(serve: Serve, tmp_path: Path) -> None:
    api = await serve()
    folder = tmp_path / "profiles"
    folder.mkdir(exist_ok=True)
    names = {"team": "Our team", "Shift": "Night! (late)", "plain": "plain"}
    for slug, name in names.items():
        (folder / f"{slug}.yaml").write_text(f"profile: {{name: '{name}'}}\n")
    export = await api.get("/api/export")
    assert {slug: profile["name"] for slug, profile in export["profiles"].items()} == names
    assert (await api.ask("POST", "/api/import", export)).success()["profiles"] == []
    for slug in names:
        (folder / f"{slug}.yaml").unlink()

    report = (await api.ask("POST", "/api/import", export)).success()

    assert (report["profiles"], report["problems"]) == (sorted(names), [])
    assert await api.get("/api/models/profiles") == sorted(names)
    assert (await api.get("/api/export"))["profiles"] == export["profiles"]


async def test_profiles_are_read_once_however_many_are_taken_in(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = await serve()
    surveys = 0
    survey = Profiles.survey

    async def counted(profiles: Profiles) -> Any:
        nonlocal surveys
        surveys += 1
        return await survey(profiles)

    monkeypatch.setattr(Profiles, "survey", counted)
    body = {"version": 1, "profiles": {f"p-{n}": {"name": f"p {n}"} for n in range(20)}}

    assert len((await api.ask("POST", "/api/import", body)).success()["profiles"]) == 20

    assert surveys == 1


async def test_a_profile_that_cannot_be_told_costs_no_other(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    api = await serve()
    odd = Profile("odd", tier_config=(TierConfig("", 1.0, 1.0),))  # no file is read as one, nor should it

    async def own(_: Profiles) -> dict[str, Profile]:
        return {"day": Profile("day"), "odd": odd}

    monkeypatch.setattr(Profiles, "own", own)

    assert list((await api.get("/api/export"))["profiles"]) == ["day"]
    assert "profile odd is left out of the export" in caplog.text


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"version": 2},
        {"version": 1, "models": []},
        {"version": 1, "models": {"api-one": {"port": 0}}},
        {"version": 1, "models": {"api-one": {"runtimeSettings": {"ctxSize": -1}}}},
        {"version": 1, "models": {"api-one": {"runtimeSettings": {"memoryHigh": 2, "memoryMax": 1}}}},
        {"version": 1, "profiles": {"x": {"name": "x", "runtimeSettings": {"y": {"memoryHigh": 2, "memoryMax": 1}}}}},
        {"version": 1, "unknown": 1},
    ],
)
async def test_what_is_no_export_changes_nothing(serve: Serve, bad: dict[str, Any]) -> None:
    api = await serve("api-one")
    before = await api.get("/api/export")

    (await api.ask("POST", "/api/import", bad)).failure(422, "ValidationError")

    assert {**(await api.get("/api/export")), "exportedAt": None} == {**before, "exportedAt": None}


async def test_operators_profiles_and_missing_ones_are_named(serve: Serve, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "fixed.yaml").write_text("profile: {name: fixed}\n")
    api = await serve(profiles_path=f"{theirs}:{tmp_path / 'profiles'}")
    export = await api.get("/api/export")
    assert export["profiles"] == {}, "what the operator owns is not ours to give"
    export |= {
        "profiles": {"fixed": {"name": "fixed", "enabledModels": ["x"]}, "..": {"name": "x"}},
        "activeProfile": "gone",
    }

    report = (await api.ask("POST", "/api/import", export)).success()

    assert report["profiles"] == []
    assert len(report["problems"]) == 3
    assert all(any(word in problem for problem in report["problems"]) for word in ("fixed", "..", "gone"))
    assert json.loads(json.dumps(report["problems"]))
