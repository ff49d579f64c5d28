"""What a model needs of memory, and uses, over the wire: toy models, real units."""

from __future__ import annotations

import asyncio
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from magi_agent.host.gpu_devices import Tree
from magi_agent.memory.estimate import Device
from magi_agent.memory.need import Basis, MemoryNeed, NeedUnknown
from magi_agent.servers import memory_needs
from magi_agent.servers.preparation import StartPreparation
from magi_agent.servers.questions import Question, argv_of_question
from tests.api.client import Api, until
from tests.api.conftest import Serve, systemctl
from tests.api.test_host import made_up_driver
from tests.conftest import MakeToyModel
from tests.host.nvidia_stand_in import make_libraries
from tests.host.test_gpus import Sysfs

WAIT = "wait=60"
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)


async def memory(api: Api, model_id: str) -> dict[str, Any]:
    found: dict[str, Any] = await api.get(f"/api/models/{model_id}/memory")
    return found


async def test_a_model_that_does_not_run_needs_what_is_estimated(serve: Serve) -> None:
    api = await serve("api-mem")

    told = await memory(api, "api-mem")

    assert told.keys() == {
        "modelId",
        "need",
        "problem",
        "estimated",
        "used",
        "usedUnavailable",
        "limits",
        "runningLimits",
        "warnings",
    }
    assert told["modelId"] == "api-mem"
    assert (told["used"], told["usedUnavailable"]) == (None, "it does not run")
    assert told["problem"] is None
    need = told["need"]
    assert need["basis"] == "estimated"
    assert told["estimated"] == {"hostBytes": need["hostBytes"], "gpuBytes": 0}
    assert need["hostBytes"] == sum(part["hostBytes"] for part in need["parts"].values())
    # One block, 4 heads of 16; 512 tokens, in float16.
    assert need["parts"]["kvCache"] == {"hostBytes": 512 * 64 * 2 * 2, "gpuBytes": 0}
    assert need["contextTokens"] == 512
    assert need["slots"] == 4
    assert 0 < need["mappedBytes"] <= need["parts"]["weights"]["hostBytes"]


async def test_settings_decide(serve: Serve) -> None:
    api = await serve("api-mem")
    before = await memory(api, "api-mem")
    settings = {"ctxSize": 4096, "cacheTypeK": "q8_0", "cacheTypeV": "f32", "parallelSlots": 2}
    (await api.ask("PUT", "/api/models/api-mem/settings", settings)).success()

    after = await memory(api, "api-mem")

    assert after["need"]["parts"]["kvCache"]["hostBytes"] == 4096 * (64 // 32 * 34 + 64 * 4)
    assert after["need"]["hostBytes"] > before["need"]["hostBytes"]
    assert after["need"]["slots"] == 2


@ONE_LISTENER
async def test_what_a_server_uses_is_measured_and_stays_known(serve: Serve, tmp_path: Path) -> None:
    api = await serve("api-mem")
    (await api.ask("POST", f"/api/models/servers/api-mem/start?{WAIT}")).success()

    async def is_measured() -> bool:
        return bool((await memory(api, "api-mem"))["need"]["basis"] == "measured")

    await until(is_measured, "what it uses is measured")
    told = await memory(api, "api-mem")
    used = told["used"]
    assert used["hostBytes"] == used["anonymousBytes"] + used["mappedBytes"]
    assert used["gpuBytes"] == 0, "llama-server was asked for GPUs, and lists none"
    assert used["source"] in {"process", "control group"}
    assert told["usedUnavailable"] is None
    assert 0 < used["mappedBytes"] <= told["need"]["mappedBytes"]
    assert told["need"]["hostBytes"] >= used["anonymousBytes"]
    (await api.ask("POST", f"/api/models/servers/api-mem/stop?{WAIT}")).success()
    assert (await memory(api, "api-mem"))["need"] == told["need"]
    # Of other settings nothing is known yet.
    (await api.ask("PUT", "/api/models/api-mem/settings", {"ctxSize": 1024})).success()
    assert (await memory(api, "api-mem"))["need"]["basis"] == "estimated"
    (await api.ask("PUT", "/api/models/api-mem/settings", {})).success()
    assert (await memory(api, "api-mem"))["need"]["basis"] == "measured"
    assert (tmp_path / "state" / "memory.json").exists()


@dataclass
class Driver:
    """NVIDIA's driver with two GPUs, a stand-in: there is no such card here. What asks it is the real program."""

    libraries: Path
    variables: dict[str, str] = field(default_factory=dict)
    """What the stand-in goes by."""
    asked: list[Question] = field(default_factory=list)

    async def answer_of(self, question: Question, _: Path | None = None) -> str:
        self.asked.append(question)
        if question is Question.DEVICES:
            return listing("CUDA0: NVIDIA A100-SXM4-40GB", "CUDA1: NVIDIA A100-SXM4-40GB")
        environment = {"LD_LIBRARY_PATH": str(self.libraries), **self.variables}
        argv = argv_of_question(question, None)
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, env=environment, timeout=30)
        return done.stdout.decode()


def listing(*devices: str) -> str:
    return "".join(("Available devices:\n", *(f"  {device} (40000 MiB, 39000 MiB free)\n" for device in devices)))


async def gpu_bytes(api: Api, model_id: str) -> int | None:
    """What a model's server has of GPUs, by figures of now."""
    api.agent._host._figures.forget()
    api.agent._host._card_figures.forget()
    found: int | None = (await memory(api, model_id))["used"]["gpuBytes"]
    return found


async def put_gpus(api: Api, tree: Tree, answers: Any, patch: pytest.MonkeyPatch) -> None:
    """Have a host with GPUs from now on, under a server that runs: this llama-server could not be started on any."""
    host = api.agent._host
    await asyncio.gather(*host._listing.values())
    patch.setattr(host, "_tree", tree)
    patch.setattr(api.agent._launcher, "answer_of", answers)
    host._devices.forget()


@ONE_LISTENER
async def test_what_a_server_has_of_gpus_is_what_nvidias_driver_tells(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_libraries(tmp_path)
    api = await serve("api-mem", "api-other")
    pids = []
    for model_id in ("api-mem", "api-other"):
        started = await api.ask("POST", f"/api/models/servers/{model_id}/start?{WAIT}")
        pids.append(str(started.success()["server"]["pid"]))
    assert await gpu_bytes(api, "api-mem") == 0, "there is no GPU"
    driver = Driver(tmp_path)
    await put_gpus(api, made_up_driver(tmp_path, "535.183.01"), driver.answer_of, monkeypatch)
    estimated = (await memory(api, "api-mem"))["estimated"]

    driver.variables = {"TOLD": pids[0]}
    assert await gpu_bytes(api, "api-mem") == 1000 + 500
    assert await gpu_bytes(api, "api-other") == 0
    assert [gpu["models"] for gpu in (await api.get("/api/host"))["gpus"]] == [["api-mem"], ["api-mem"]]
    driver.variables = {"TOLD": pids[0], "UNTOLD": pids[1]}
    assert await gpu_bytes(api, "api-mem") == 1000 + 500
    assert await gpu_bytes(api, "api-other") is None
    why = (await memory(api, "api-other"))["used"]["gpuUnavailable"]
    assert why == f"CUDA0: its driver does not say how much process {pids[1]} has of it"
    driver.variables = {"LD_LIBRARY_PATH": "/nowhere"}
    assert await gpu_bytes(api, "api-mem") is None
    # Of what one placement took nothing is kept for another.
    told = await memory(api, "api-mem")
    assert (told["estimated"], told["need"]["gpuBasis"]) == (estimated, "estimated")


@ONE_LISTENER
async def test_however_many_ask_drivers_are_asked_once_a_second(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_libraries(tmp_path)
    api = await serve("api-mem", "api-other")
    for model_id in ("api-mem", "api-other"):
        (await api.ask("POST", f"/api/models/servers/{model_id}/start?{WAIT}")).success()
    driver = Driver(tmp_path)
    await put_gpus(api, made_up_driver(tmp_path, "535.183.01"), driver.answer_of, monkeypatch)
    driver.asked.clear()

    began = time.monotonic()
    await asyncio.gather(*(memory(api, model_id) for model_id in ("api-mem", "api-other") * 20))
    assert driver.asked.count(Question.FIGURES) <= 1 + (time.monotonic() - began)
    assert driver.asked.count(Question.DEVICES) == driver.asked.count(Question.ORDER) == 1


@ONE_LISTENER
@pytest.mark.parametrize(
    ("device", "size", "told"),
    [
        ("ROCm0: AMD Instinct MI100", 5_000_000, 5_000_000),
        ("ROCm0: AMD Instinct MI100", 0, 0),
        ("ROCm0: AMD Instinct MI100", "odd", None),
        # Its driver knows nothing of who uses it so.
        ("Vulkan0: AMD Instinct MI100 (RADV ARCTURUS)", 0, None),
    ],
)
async def test_what_a_server_has_of_gpus_is_what_amds_driver_tells(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, size: object, told: int | None
) -> None:
    api = await serve("api-mem")
    started = await api.ask("POST", f"/api/models/servers/api-mem/start?{WAIT}")
    sysfs = Sysfs(tmp_path / "kernel")
    sysfs.card("0000:0b:00.0", mem_info_vram_total=1 << 35, mem_info_vram_used=1 << 33)
    sysfs.node(1, 51110, 0x0B00)
    sysfs.process(started.success()["server"]["pid"], 51110, size)
    sysfs.process(1, 51110, 7)

    async def answer_of(question: Question, _: Path | None = None) -> str:
        return listing(device)

    await put_gpus(api, sysfs.tree, answer_of, monkeypatch)
    assert await gpu_bytes(api, "api-mem") == told


@ONE_LISTENER
async def test_a_while_after_it_is_measured_once_more(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_needs, "_LATER", 0.2)
    api = await serve("api-mem")
    (await api.ask("POST", f"/api/models/servers/api-mem/start?{WAIT}")).success()

    async def was_measured_twice() -> bool:
        entries = (api.agent.services.memory._store._entries or {}).values()
        return any(entry.anonymous_at_ready and entry.anonymous_later for entry in entries)

    await until(was_measured_twice, "it is measured a second time")


@ONE_LISTENER
async def test_what_llama_server_reports_is_read_where_it_says_it(serve: Serve) -> None:
    api = await serve("api-mem", allowed_flags="--verbosity")
    settings = {"extraFlags": ["--verbosity=4"], "ctxSize": 768}
    (await api.ask("PUT", "/api/models/api-mem/settings", settings)).success()
    (await api.ask("POST", f"/api/models/servers/api-mem/start?{WAIT}")).success()
    needs = api.agent.services.memory

    async def is_reported() -> bool:
        return any(entry.reported for entry in (needs._store._entries or {}).values())

    await until(is_reported, "what it reports is read")
    (entry,) = (needs._store._entries or {}).values()
    assert entry.reported is not None
    # Hundredths of a MiB are what is printed.
    assert abs(entry.reported.kv_cache.host - 768 * 64 * 2 * 2) < 20_000


@ONE_LISTENER
async def test_admission_can_ask_of_a_launch_that_is_not_made(serve: Serve) -> None:
    api = await serve("api-mem")
    services = api.agent.services
    need = await services.memory.need("api-mem")
    preparation: StartPreparation = services.preparation
    launch = preparation.launch_of(services.registry.models["api-mem"], 0)
    wide = replace(launch, runtime_settings=replace(launch.runtime_settings, ctx_size=8192))

    wider = await services.memory.need_of(wide)

    on_gpu = await services.memory.need_of(launch, [Device("CUDA0", 1 << 34, 1 << 34)])
    assert on_gpu.gpu_layers == 2
    assert on_gpu.kv_cache.gpu == need.kv_cache.host
    assert isinstance(need, MemoryNeed)
    assert need.basis is Basis.ESTIMATED
    assert wider.kv_cache.host == 16 * need.kv_cache.host
    with pytest.raises(NeedUnknown, match="cannot be read"):
        await services.memory.need_of(replace(launch, model_path="/nowhere.gguf"))


async def test_a_file_that_is_another_now_is_read_again(serve: Serve, models: Path, toy_model: MakeToyModel) -> None:
    api = await serve("api-mem")
    before = (await memory(api, "api-mem"))["need"]["contextTokens"]
    toy_model(models / "new.part", context_length=2048).replace(models / "api-mem.gguf")

    assert (await memory(api, "api-mem"))["need"]["contextTokens"] == 2048 != before


async def test_what_cannot_be_told_is_null_with_a_reason(serve: Serve, models: Path) -> None:
    api = await serve("api-mem")
    # Asked before it is noticed that the file is gone.
    await api.agent._nothing_new()
    (models / "api-mem.gguf").unlink()

    told = await memory(api, "api-mem")

    assert told["need"] is None
    assert told["estimated"] is None
    assert "cannot be read: No such file" in told["problem"]


async def test_a_model_that_there_is_not_has_no_need(serve: Serve) -> None:
    api = await serve()
    answer = await api.ask("GET", "/api/models/api-nobody/memory")
    assert (answer.status, answer.body["error"]) == (404, "ModelNotFound")


def held(model_id: str) -> dict[str, str]:
    """The limits of memory that systemd has for a model's unit."""
    names = ("MemoryHigh", "MemoryMax", "MemorySwapMax")
    shown = systemctl("show", f"magi-llama-{model_id}.service", *(f"--property={name}" for name in names)).decode()
    return dict(line.partition("=")[::2] for line in shown.splitlines())


@ONE_LISTENER
async def test_a_unit_has_the_limits_that_follow_from_the_need(serve: Serve) -> None:
    api = await serve("api-mem")
    told = await memory(api, "api-mem")
    assert told["runningLimits"] is None
    (await api.ask("POST", f"/api/models/servers/api-mem/start?{WAIT}")).success()

    after = await memory(api, "api-mem")

    most, high = told["limits"]["max"], told["limits"]["high"]
    assert most["source"] == high["source"] == "derived"
    assert told["need"]["hostBytes"] < high["limitBytes"] < most["limitBytes"]
    assert after["runningLimits"] == told["limits"]
    assert held("api-mem") == {
        "MemoryHigh": str(high["limitBytes"]),
        "MemoryMax": str(most["limitBytes"]),
        "MemorySwapMax": "0",
    }
    # Another need, and so another limit, is no reason to restart what runs.
    (await api.ask("PUT", "/api/models/api-mem/settings", {"idleTimeoutSeconds": 77})).success()
    server = (await api.get("/api/models/api-mem"))["server"]
    assert (server["restartRequired"], server["restartReasons"]) == (False, [])

    systemctl("set-property", "--runtime", "magi-llama-api-mem.service", f"MemoryMax={6 << 30}")
    limited = await memory(api, "api-mem")
    assert limited["runningLimits"] == {"max": {"limitBytes": 6 << 30, "source": "operator"}, "high": high}
    assert limited["warnings"] == after["warnings"] == []
    assert (await api.get("/api/models/api-mem"))["server"]["restartRequired"] is False


@ONE_LISTENER
async def test_a_limit_that_an_operator_gave_the_unit_is_told_of_where_it_is_too_narrow(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve("api-mem")
    (await api.ask("POST", f"/api/models/servers/api-mem/start?{WAIT}")).success()
    unit = "magi-llama-api-mem.service"
    # So wide that it does no harm where limits are held, and more than anybody has room for.
    systemctl("set-property", "--runtime", unit, f"MemoryMax={6 << 30}")
    need_of = api.services.memory.need

    async def far_more(model_id: str) -> MemoryNeed:
        return replace(await need_of(model_id), measured_anonymous=7 << 30)

    monkeypatch.setattr(api.services.memory, "need", far_more)
    [warning] = (await memory(api, "api-mem"))["warnings"]
    assert warning.startswith(f"MemoryMax of {unit} is 6.0 GiB, and the server needs 7.0 GiB of memory (")


@ONE_LISTENER
async def test_a_limit_that_is_set_wins(serve: Serve) -> None:
    api = await serve("api-mem")
    (await api.ask("PUT", "/api/models/api-mem/settings", {"memoryMax": 3 << 30})).success()
    (await api.ask("POST", f"/api/models/servers/api-mem/start?{WAIT}")).success()

    told = await memory(api, "api-mem")

    high = 3041 << 20  # a hundredth less, in whole MiB
    assert (
        told["limits"]
        == told["runningLimits"]
        == {
            "max": {"limitBytes": 3 << 30, "source": "set"},
            "high": {"limitBytes": high, "source": "derived"},
        }
    )
    assert held("api-mem") == {"MemoryHigh": str(high), "MemoryMax": str(3 << 30), "MemorySwapMax": "0"}


@ONE_LISTENER
async def test_where_no_limits_are_derived_only_set_ones_hold(serve: Serve) -> None:
    api = await serve("api-mem", memory_limits="off")
    (await api.ask("POST", f"/api/models/servers/api-mem/start?{WAIT}")).success()

    told = await memory(api, "api-mem")

    assert told["limits"] == told["runningLimits"] == {"high": None, "max": None}
    assert held("api-mem") == dict.fromkeys(("MemoryHigh", "MemoryMax", "MemorySwapMax"), "infinity")
