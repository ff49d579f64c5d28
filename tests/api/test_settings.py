"""The endpoints for runtime settings and ports, on real units."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from magi_agent.runtime_settings.settings import RuntimeSettings, wire_name
from magi_agent.servers import narrow_limits
from tests.api.client import Api
from tests.api.conftest import Serve

WAIT = "wait=60"
ALL_UNSET = {wire_name(field.name): None for field in dataclasses.fields(RuntimeSettings)}


async def put(api: Api, path: str, body: Any) -> Any:
    return (await api.ask("PUT", path, body)).success()


async def test_settings_are_replaced_and_kept(serve: Serve, tmp_path: Path) -> None:
    api = await serve("api-set")
    assert await api.get("/api/models/api-set/settings") == {
        "modelId": "api-set",
        "runtimeSettings": ALL_UNSET,
        "effective": ALL_UNSET,
        "sources": {},
        "warnings": [],
    }

    changed = await put(
        api, "/api/models/api-set/settings", {"ctxSize": 512, "parallel_slots": 2, "startPolicy": "manual"}
    )

    assert (changed["message"], changed["modelId"]) == ("Settings updated for api-set", "api-set")
    assert changed["runtimeSettings"] == {**ALL_UNSET, "ctxSize": 512, "parallelSlots": 2, "startPolicy": "manual"}
    assert changed["sources"] == {"ctxSize": "model", "parallelSlots": "model", "startPolicy": "model"}
    assert (changed["restartRequired"], changed["restartReasons"]) == (False, [])
    model = await api.model("api-set")
    assert (model["ctxSize"], model["startPolicy"]) == (512, "manual")
    assert model["runtimeSettings"] == changed["runtimeSettings"]
    stored = json.loads((tmp_path / "state" / "registry.json").read_text())
    assert stored["models"]["api-set"]["choices"]["runtime_settings"] == {
        "ctx_size": 512, "parallel_slots": 2, "start_policy": "manual",
    }  # fmt: skip

    replaced = await put(api, "/api/models/api-set/settings", {"nThreads": 1, "ctxSize": None})

    assert replaced["runtimeSettings"] == {**ALL_UNSET, "nThreads": 1}
    assert (await api.model("api-set"))["startPolicy"] == "alwaysOn"


async def test_a_limit_of_memory_below_the_need_is_taken_and_told_of(
    serve: Serve, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve("api-tight")
    path = "/api/models/api-tight/settings"
    need = (await api.get("/api/models/api-tight/memory"))["need"]
    own = need["hostBytes"] - need["mappedBytes"]

    async def told(**settings: int) -> list[str]:
        changed = await put(api, path, settings)
        assert changed["runtimeSettings"] == {**ALL_UNSET, **settings}, "it is no reason to refuse"
        warnings: list[str] = changed["warnings"]
        assert (await api.get(path))["warnings"] == warnings
        assert (await api.get("/api/models/api-tight/memory"))["warnings"] == warnings
        return warnings

    assert await told(memoryMax=need["hostBytes"], memoryHigh=need["hostBytes"]) == []
    [weights] = await told(memoryMax=own)
    assert weights.startswith("memory_max is ")
    assert "its weights do not all stay in memory" in weights
    [killed] = await told(memoryMax=own - 1)
    assert "estimated): it is killed as soon as it has taken so much (oom-kill); raise memory_max, or" in killed
    [slow] = await told(memoryMax=8 << 30, memoryHigh=own - 1)
    assert slow.startswith("memory_high is ")
    assert "it is slowed down, until it hardly moves" in slow
    assert len(await told(memoryMax=own - 1, memoryHigh=own - 1)) == 2
    # What holds counts, whoever said it, and what nobody can reckon is no reason for a word, nor for an error.
    assert await told(memoryMax=own - 1, ctxSize=2048) != []
    monkeypatch.setattr(narrow_limits, "_PATIENCE", 0.0)
    assert (await put(api, path, {"memoryMax": 1}))["warnings"] == []


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"ctxSize": -1}, "ctxSize", "greater than or equal to 0"),
        ({"ctx_size": "4096"}, "ctxSize", "valid integer"),
        ({"ctxsize": 1}, "ctxsize", "no such setting; did you mean ctx_size?"),
        ({"ctxSize": 1, "ctx_size": 2}, "ctxSize", "given twice"),
        ({"lora": [{"path": "/a", "scale": "x"}]}, "lora.0.scale", "valid number"),
        ({"memoryHigh": 2, "memoryMax": 1}, "memoryHigh", "at most"),
        ({"numaPolicy": "bind"}, "numaNodes", "must be given"),
        ({"chatTemplate": "a\nb"}, "chatTemplate", "chat_template_file"),
        ({"binary": "canary"}, "binary", "llama_server_alternatives"),
        ({"extraFlags": ["--no-warmup"]}, "extraFlags", "allowed_flags"),
        ({"extraFlags": ["--host=0.0.0.0"]}, "extraFlags", "no extra flag"),
        ({"draftModel": "/etc/passwd"}, "draftModel", "outside the model folders"),
        ({"draftModel": "../x.gguf"}, "draftModel", "absolute path"),
    ],
)
async def test_bad_settings_change_nothing(serve: Serve, body: dict[str, Any], field: str, message: str) -> None:
    api = await serve("api-bad")
    await put(api, "/api/models/api-bad/settings", {"ctxSize": 512})

    details = (await api.ask("PUT", "/api/models/api-bad/settings", body)).failure(422, "ValidationError")

    assert details["errors"][0]["field"] == field
    assert message in details["errors"][0]["message"]
    assert (await api.get("/api/models/api-bad/settings"))["runtimeSettings"] == {**ALL_UNSET, "ctxSize": 512}


async def test_a_changed_setting_is_a_reason_to_restart_and_applied_at_once_if_asked(serve: Serve) -> None:
    api = await serve("api-apply")
    started = (await api.ask("POST", f"/api/models/servers/api-apply/start?{WAIT}")).success()["server"]

    changed = await put(api, "/api/models/api-apply/settings", {"ctxSize": 256, "pinned": True})

    assert changed["restartRequired"]
    assert changed["restartReasons"] == ["ctx-size: runs with the default, should be 256"]
    server = await api.get("/api/models/servers/api-apply")
    assert (server["pid"], server["restartReasons"]) == (started["pid"], changed["restartReasons"])

    applied = await put(api, f"/api/models/api-apply/settings?apply=true&{WAIT}", {"ctxSize": 512})

    assert (applied["restartRequired"], applied["restartReasons"]) == (False, [])
    server = await api.get("/api/models/servers/api-apply")
    assert server["state"] == "ready"
    assert server["pid"] != started["pid"]
    async with aiohttp.ClientSession() as session, session.get(f"{server['url']}/props") as props:
        assert (await props.json())["default_generation_settings"]["n_ctx"] == 512
    same = await put(api, f"/api/models/api-apply/settings?apply=true&{WAIT}", {"ctxSize": 512})
    assert not same["restartRequired"]
    assert (await api.get("/api/models/servers/api-apply"))["pid"] == server["pid"], "nothing to apply, nothing done"
    begun = await api.ask("PUT", "/api/models/api-apply/settings?apply=true", {})
    begun.success(202)
    assert begun.headers["Location"] == "/api/models/servers/api-apply"
    await api.until_state("api-apply", "ready")


async def test_an_alias_names_one_model_only(serve: Serve) -> None:
    api = await serve("api-first", "api-second")
    await put(api, "/api/models/api-first/settings", {"aliases": ["gpt-4o", "default"]})

    for taken in ("gpt-4o", "api-first"):
        details = (await api.ask("PUT", "/api/models/api-second/settings", {"aliases": [taken]})).failure(
            422, "ValidationError"
        )
        assert details["errors"] == [{"field": "aliases", "message": f"'{taken}' names api-first already"}]

    await put(api, "/api/models/api-first/settings", {"aliases": ["api-first", "default"]})


async def test_a_port_is_chosen_and_taken_back(serve: Serve) -> None:
    api = await serve("api-port", "api-other")
    low, high = (await api.get("/api/models/registry"))["portRange"]

    chosen = await put(api, "/api/models/api-port/port", {"port": high})

    assert chosen == {
        "message": "Port updated for api-port", "modelId": "api-port", "port": high, "restartRequired": False,
    }  # fmt: skip
    details = (await api.ask("PUT", "/api/models/api-other/port", {"port": high})).failure(409, "PortInUse")
    assert details["modelId"] == "api-port"
    for outside in (low - 1, high + 1):
        (await api.ask("PUT", "/api/models/api-other/port", {"port": outside})).failure(422, "ValidationError")
    with socket.socket() as held:
        held.bind(("127.0.0.1", low))
        held.listen()
        details = (await api.ask("PUT", "/api/models/api-other/port", {"port": low})).failure(409, "PortInUse")
        assert "python" in details["holder"]
    assert (await put(api, "/api/models/api-port/port", {"port": None}))["port"] is None
    assert (await put(api, "/api/models/api-other/port", {"port": high}))["port"] == high
    (await api.ask("PUT", "/api/models/api-none/port", {"port": high})).failure(404, "ModelNotFound")


async def test_another_port_of_a_model_that_runs_asks_for_a_restart(serve: Serve) -> None:
    api = await serve("api-moves")
    server = (await api.ask("POST", f"/api/models/servers/api-moves/start?{WAIT}")).success()["server"]
    _, high = (await api.get("/api/models/registry"))["portRange"]

    assert (await put(api, "/api/models/api-moves/port", {"port": high}))["restartRequired"]

    runs = await api.get("/api/models/servers/api-moves")
    assert (runs["pid"], runs["port"]) == (server["pid"], server["port"])
    moved = (await api.ask("POST", f"/api/models/servers/api-moves/restart?{WAIT}")).success()["server"]
    assert (moved["port"], moved["restartRequired"]) == (high, False)


async def test_a_port_may_be_changed_back_while_the_server_still_listens_on_it(serve: Serve) -> None:
    api = await serve("api-back")
    server = (await api.ask("POST", f"/api/models/servers/api-back/start?{WAIT}")).success()["server"]
    _, high = (await api.get("/api/models/registry"))["portRange"]
    await put(api, "/api/models/api-back/port", {"port": high})

    back = await put(api, "/api/models/api-back/port", {"port": server["port"]})

    assert (back["port"], back["restartRequired"]) == (server["port"], False)


async def test_settings_that_repair_a_server_which_failed_are_applied_at_once(serve: Serve, models: Path) -> None:
    api = await serve("api-mend")
    (models / "broken.jinja").write_text("{% if %}")
    await put(api, "/api/models/api-mend/settings", {"chatTemplateFile": str(models / "broken.jinja")})
    (await api.ask("POST", f"/api/models/servers/api-mend/start?{WAIT}")).failure(500, "StartFailed")
    assert await api.state("api-mend") == "cooldown"

    await put(api, f"/api/models/api-mend/settings?apply=true&{WAIT}", {})

    assert await api.state("api-mend") == "ready"


async def test_two_requests_for_one_port_do_not_both_get_it(serve: Serve) -> None:
    names = [f"api-race-{number}" for number in range(6)]
    api = await serve(*names)
    _, high = (await api.get("/api/models/registry"))["portRange"]

    replies = await asyncio.gather(*(api.ask("PUT", f"/api/models/{name}/port", {"port": high}) for name in names))

    assert sorted(reply.status for reply in replies) == [200, *[409] * 5]


async def test_ports_of_models_that_went_can_be_taken_back(serve: Serve, models: Path) -> None:
    names = [f"api-many-{number}" for number in range(4)]
    api = await serve(*names)
    for name in names:
        (await api.ask("PUT", f"/api/models/{name}/enabled", {"enabled": True})).success()
        (await api.ask("PUT", f"/api/models/{name}/enabled", {"enabled": False})).success()
    (models / "api-many-0.gguf").rename(models / "api-many-0.gguf.part")
    (models / "api-many-1.gguf").rename(models / "api-late.gguf.part")
    (await api.ask("POST", "/api/models/rescan")).success()
    (models / "api-late.gguf.part").unlink()
    source = models / "api-many-2.gguf"
    content = bytearray(source.read_bytes())
    (models / "api-late.gguf").write_bytes(content + b"\0" * 4096)
    (await api.ask("POST", "/api/models/rescan")).success()
    late = next(name for name in (await api.get("/api/models/registry"))["models"] if "late" in name)

    refused = await api.ask("PUT", f"/api/models/{late}/enabled", {"enabled": True})

    details = refused.failure(409, "NoFreePort")
    assert sorted(details["givenToModelsThatWent"]) == ["api-many-0", "api-many-1"]
    assert "magictl port api-many-0 auto" in refused.body["message"]
    assert (await put(api, "/api/models/api-many-0/port", {"port": None}))["port"] is None
    (await api.ask("PUT", f"/api/models/{late}/enabled", {"enabled": True})).success()


async def test_the_range_of_ports_is_a_choice_that_is_kept(serve: Serve) -> None:
    api = await serve("api-range")
    low, high = (await api.get("/api/models/registry"))["portRange"]
    (await api.ask("PUT", "/api/models/api-range/enabled", {"enabled": True})).success()
    assert (await api.model("api-range"))["port"] == low

    chosen = await put(api, "/api/models/port-range", {"portRange": [low + 1, high]})

    assert chosen == {"message": "Port range updated", "portRange": [low + 1, high], "outside": ["api-range"]}
    assert (await api.get("/api/models/registry"))["portRange"] == [low + 1, high]
    for bad in ([high, low], [80, high], [low], [low, 70_000], "8080-8099", None):
        if bad is not None:
            (await api.ask("PUT", "/api/models/port-range", {"portRange": bad})).failure(422, "ValidationError")
    assert (await api.get("/api/models/registry"))["portRange"] == [low + 1, high]
    assert (await put(api, "/api/models/port-range", {"portRange": None}))["portRange"] == [low, high]
