"""The host over HTTP: real processors, memory and disks, the GPU in software, and drivers that are not here made up."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from magi_agent.host.gpu_devices import Tree
from magi_agent.host.nvidia_driver import NvidiaDriver
from magi_agent.servers import admission
from magi_agent.servers.questions import Question
from tests.api.client import until
from tests.api.conftest import Serve, systemctl
from tests.conftest import SystemdUser
from tests.servers.system import script

MIB = 1024 * 1024


ABOUT_ALL = frozenset({"devices", "nvidiaDriver"})
"""Reasons that are no figure's."""


def with_reasons(answer: Any) -> None:
    """Every figure that is null has a reason beside it, and none that is there has."""
    if isinstance(answer, Mapping):
        if "unavailable" in answer:
            null = {key for key, value in answer.items() if value is None}
            limits = {"highBytes", "maxBytes"} & null
            assert null - limits == set(answer["unavailable"]) - ABOUT_ALL, answer
        for value in answer.values():
            with_reasons(value)
    elif isinstance(answer, list):
        for value in answer:
            with_reasons(value)


async def test_the_host_is_told_as_the_kernel_has_it(serve: Serve, models: Path) -> None:
    api = await serve()
    reply = await api.ask("GET", "/api/host")

    assert reply.status == 200
    host = reply.body
    with_reasons(host)
    assert (host["hostname"], host["kernel"]) == (socket.gethostname(), os.uname().release)
    assert host["systemdVersion"].startswith(str(api.agent.services.manager.version()))
    assert host["bootedAt"].endswith("Z")
    assert abs(host["uptimeSeconds"] - (time.time() - psutil.boot_time())) < 60
    assert host["cpu"]["threads"] == os.cpu_count()
    memory = host["memory"]
    assert memory["totalBytes"] == psutil.virtual_memory().total
    assert 0 < memory["roomBytes"] <= memory["availableBytes"]
    assert sum(limit["isBinding"] for limit in memory["limits"]) <= 1
    [disk] = host["disks"]
    status = os.statvfs(models)
    assert (disk["folder"], disk["totalBytes"]) == (str(models), status.f_blocks * status.f_frsize)
    assert 0 < disk["freeBytes"] <= disk["totalBytes"]


@pytest.fixture
def limited_slice(systemd_user: SystemdUser) -> Iterator[int]:
    """A limit on the servers' slice, as an operator sets it; in bytes."""
    limit = 256 * MIB
    for high in (limit, None):
        value = "infinity" if high is None else str(high)
        systemctl("set-property", "--runtime", "magi-llama.slice", f"MemoryHigh={value}")
        if high is not None:
            yield high


async def test_a_limit_on_the_servers_slice_binds_also_while_nothing_is_in_it(serve: Serve, limited_slice: int) -> None:
    api = await serve()
    memory = (await api.ask("GET", "/api/host")).body["memory"]

    with_reasons(memory)
    [limit] = [each for each in memory["limits"] if each["unit"] == "magi-llama.slice"]
    assert (limit["highBytes"], limit["maxBytes"], limit["isBinding"]) == (limited_slice, None, True)
    assert limit["controlGroup"].endswith("/magi.slice/magi-llama.slice")
    assert memory["roomBytes"] == limit["roomBytes"] <= limited_slice < memory["availableBytes"]
    metrics = (await api.ask("GET", "/metrics")).content.decode()
    [told] = [line for line in metrics.splitlines() if line.startswith("magi_host_memory_room_bytes ")]
    assert 0 < float(told.split()[1]) <= limited_slice


async def test_what_a_start_may_need_is_told_as_admission_has_it(serve: Serve) -> None:
    api = await serve("api-host", "api-wide", memory_reserve="300M")

    def sums(memory: Mapping[str, Any]) -> None:
        left = memory["roomBytes"] - memory["promisedBytes"] - memory["reserveBytes"]
        assert memory["roomForStartBytes"] == max(0, left)

    before = (await api.ask("GET", "/api/host")).body["memory"]
    assert (before["promisedBytes"], before["reserveBytes"]) == (0, 300 * MIB)
    sums(before)

    # Its buffers for large batches are promised to it until the first long prompt comes.
    wide = {"ctxSize": 100_000, "parallelSlots": 1, "ubatchSize": 2048, "batchSize": 2048}
    (await api.ask("PUT", "/api/models/api-host/settings", wide)).success()
    (await api.ask("POST", "/api/models/servers/api-host/start?wait=60")).success()
    with_one = (await api.ask("GET", "/api/host")).body["memory"]
    assert with_one["promisedBytes"] > MIB
    sums(with_one)
    too_much = {"ctxSize": 100_000_000, "parallelSlots": 1, "batchSize": 4096, "ubatchSize": 4096}
    (await api.ask("PUT", "/api/models/api-wide/settings", too_much)).success()
    refusal = (await api.ask("POST", "/api/models/servers/api-wide/start")).failure(409, "InsufficientMemory")
    assert refusal["promisedBytes"] == pytest.approx(with_one["promisedBytes"], rel=0.1)
    assert refusal["reserveBytes"] == with_one["reserveBytes"]

    (await api.ask("POST", "/api/models/servers/api-host/stop?wait=60")).success()
    assert (await api.ask("GET", "/api/host")).body["memory"]["promisedBytes"] == 0


async def test_who_only_looks_at_what_is_promised_holds_up_no_start(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve("api-host")
    looks, outstanding = 0, admission.Admission._outstanding

    async def counted(self: admission.Admission, but: Collection[str]) -> Any:
        nonlocal looks
        looks += not but
        return await outstanding(self, but)

    monkeypatch.setattr(admission.Admission, "_outstanding", counted)
    monkeypatch.setattr(admission, "_FRESH", 60.0)
    await asyncio.gather(*(api.ask("GET", "/api/host") for _ in range(20)))
    assert looks == 1
    # What changes what is promised is seen at once.
    (await api.ask("POST", "/api/models/servers/api-host/start?wait=60")).success()
    assert (await api.ask("GET", "/api/host")).body["memory"]["promisedBytes"] > 0
    assert looks == 2


async def test_where_more_is_kept_in_reserve_than_there_is_no_start_has_room(serve: Serve) -> None:
    memory = (await (await serve(memory_reserve="1000T")).ask("GET", "/api/host")).body["memory"]
    assert (memory["roomForStartBytes"], memory["reserveBytes"]) == (0, 1000 << 40)
    assert memory["roomBytes"] > 0


async def test_where_nobody_tells_what_is_promised_that_is_null_and_the_rest_is_there(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve()
    monkeypatch.setattr(admission, "_PATIENCE", 0.05)
    async with api.agent._admission._turn:
        host = (await api.ask("GET", "/api/host")).body
    with_reasons(host)
    assert host["memory"]["promisedBytes"] is host["memory"]["roomForStartBytes"] is None
    assert host["memory"]["roomBytes"] > 0
    assert (await api.ask("GET", "/api/host")).body["memory"]["promisedBytes"] == 0


async def test_a_gpu_is_what_the_configured_llama_server_lists(serve: Serve, software_gpu: Path) -> None:
    api = await serve(llama_server_path=str(software_gpu))
    host = (await api.ask("GET", "/api/host")).body

    with_reasons(host)
    gpu = host["gpus"][0]
    assert (gpu["index"], gpu["backend"]) == ("Vulkan0", "Vulkan")
    assert gpu["name"].startswith("llvmpipe")
    assert gpu["memoryTotalBytes"] % MIB == 0
    assert 0 < gpu["memoryFreeBytes"] <= gpu["memoryTotalBytes"]
    assert gpu["memoryFreeIsLive"] is False
    assert gpu["pciAddress"] is gpu["temperatureCelsius"] is gpu["models"] is None
    assert host["llamaServer"] == str(software_gpu)

    # Once is enough, until somebody wants it anew.
    again = (await api.ask("GET", "/api/host")).body
    assert again["devicesListedAt"] == host["devicesListedAt"]
    anew = (await api.ask("GET", "/api/host?refresh=true")).body
    assert anew["devicesListedAt"] > host["devicesListedAt"]
    assert anew["gpus"][0]["index"] == "Vulkan0"


async def test_another_llama_server_is_asked_by_its_name(serve: Serve, software_gpu: Path) -> None:
    api = await serve(llama_server_alternatives=f"software={software_gpu}")

    usual = (await api.ask("GET", "/api/host")).body
    other = (await api.ask("GET", "/api/host?binary=software")).body
    assert "Vulkan0" not in {gpu["index"] for gpu in usual["gpus"]}
    assert other["gpus"][0]["index"] == "Vulkan0"
    refused = await api.ask("GET", "/api/host?binary=none-such")
    assert (refused.status, refused.body["error"]) == (422, "ValidationError")
    assert "software" in refused.body["message"]


async def test_a_new_llama_server_is_asked_anew(serve: Serve, tmp_path: Path) -> None:
    listing = 'if [ "$1" = --list-devices ]; then printf "Available devices:\\n  CUDA{}: x (9 MiB, 5 MiB free)\\n"; fi'
    program = script(tmp_path / "program", listing.format(0))
    api = await serve(llama_server_path=str(program))

    assert (await api.ask("GET", "/api/host")).body["gpus"][0]["index"] == "CUDA0"
    script(tmp_path / "next", listing.format(1)).rename(program)
    assert (await api.ask("GET", "/api/host")).body["gpus"][0]["index"] == "CUDA1"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('echo "error: invalid argument: $1" >&2; exit 1', "invalid argument: --list-devices"),
        ("exit 0", "prints no list of devices"),
    ],
)
async def test_a_llama_server_that_does_not_list_is_a_reason(serve: Serve, tmp_path: Path, line: str, why: str) -> None:
    api = await serve(llama_server_path=str(script(tmp_path / "program", line)))
    host = (await api.ask("GET", "/api/host")).body

    with_reasons(host)
    assert why in host["unavailable"]["devices"]
    assert [gpu["index"] for gpu in host["gpus"] if gpu["index"]] == []
    assert host["memory"]["totalBytes"] > 0


async def test_only_who_may_do_everything_has_devices_asked_for_again(serve: Serve, listener: str) -> None:
    if listener == "unix":
        pytest.skip("there, whoever may do anything may do everything")
    api = await serve(tcp_access="read")

    assert (await api.ask("GET", "/api/host")).status == 200
    refused = await api.ask("GET", "/api/host?refresh=true")
    assert (refused.status, refused.body["error"]) == (403, "Forbidden")


def made_up_driver(folder: Path, version: str) -> Tree:
    """A kernel with NVIDIA's driver and two GPUs of which one is not listed by llama-server."""
    tree = Tree(folder / "proc", folder / "sys", folder / "dev")
    (tree.proc / "driver" / "nvidia").mkdir(parents=True)
    (tree.proc / "driver" / "nvidia" / "version").write_text(
        f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Sun May 12 19:39:15 UTC 2024\n"
    )
    for slot in ("41", "c1"):
        card = tree.sys / "bus" / "pci" / "devices" / f"0000:{slot}:00.0"
        card.mkdir(parents=True)
        (card / "vendor").write_text("0x10de\n")
        (card / "class").write_text("0x030200\n")
        (card / "driver").symlink_to("../../../drivers/nvidia")
    return tree


def figures(address: str, **changes: Any) -> dict[str, Any]:
    return {
        "pciAddress": address, "uuid": f"GPU-{address}", "name": "NVIDIA A100", "memoryTotalBytes": 40960 * MIB,
        "memoryFreeBytes": 40000 * MIB, "temperatureCelsius": 40, "utilizationPercent": 0, "processes": {}, **changes,
    }  # fmt: skip


async def test_the_models_on_a_gpu_are_told_by_the_processes_that_its_driver_names(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve("api-on-gpu")
    started = await api.ask("POST", "/api/models/servers/api-on-gpu/start?wait=60")
    pid = started.body["server"]["pid"]
    asked: list[Question] = []

    async def answer_of(question: Question, binary: Path | None = None) -> str:
        asked.append(question)
        busy = figures("0000:C1:00.0", processes={"1": 5, str(pid): 5}, memoryFreeBytes=0)
        return {
            Question.DEVICES: "Available devices:\n  CUDA0: NVIDIA A100 (40000 MiB, 1 MiB free)\n",
            Question.FIGURES: json.dumps({"gpus": [figures("0000:41:00.0"), busy], "problem": None}),
            Question.ORDER: json.dumps({"order": ["0000:C1:00.0"], "problem": None}),
        }[question]

    host = api.agent._host

    async def is_measured() -> bool:
        return bool((await api.get("/api/models/api-on-gpu/memory"))["need"]["basis"] == "measured")

    # What a server needs is looked up once more when it is ready, and whoever asks meanwhile is told the same.
    await until(is_measured, "what it uses is measured", 60)
    await asyncio.gather(*host._listing.values())
    host._tree = made_up_driver(tmp_path, "535.183.01")
    monkeypatch.setattr(api.agent._launcher, "answer_of", answer_of)

    first, second = (await api.ask("GET", "/api/host?refresh=true")).body["gpus"]
    assert (first["index"], first["pciAddress"], first["models"]) == ("CUDA0", "0000:c1:00.0", ["api-on-gpu"])
    assert (first["memoryFreeBytes"], first["memoryFreeIsLive"], first["unavailable"]) == (0, True, {})
    assert (second["index"], second["pciAddress"], second["models"]) == (None, "0000:41:00.0", [])
    assert second["unavailable"]["index"].endswith("lists no such device")
    assert sorted(asked) == [Question.DEVICES, Question.FIGURES, Question.ORDER]
    for _ in range(20):
        await api.ask("GET", "/api/host")
    assert asked.count(Question.FIGURES) < 10, "once a second at most"
    assert asked.count(Question.DEVICES) == asked.count(Question.ORDER) == 1


async def test_a_driver_that_cannot_be_asked_is_left_alone_for_a_while(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve()
    asked: list[Question] = []

    async def answer_of(question: Question, binary: Path | None = None) -> str:
        asked.append(question)
        return "Available devices:\n" if question is Question.DEVICES else "{}"

    api.agent._host._tree = made_up_driver(tmp_path, "535.183.01")
    monkeypatch.setattr(api.agent._launcher, "answer_of", answer_of)
    for _ in range(3):
        host = (await api.ask("GET", "/api/host")).body
        with_reasons(host)
        assert [gpu["memoryFreeBytes"] for gpu in host["gpus"]] == [None, None]
        assert "its answer is not as it should be" in host["gpus"][0]["unavailable"]["memoryFreeBytes"]
    assert asked.count(Question.FIGURES) == 1


async def test_a_driver_whose_halves_differ_is_a_problem_in_health_and_journal(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = tmp_path / "libcuda.so.535.216.01"
    monkeypatch.setattr("magi_agent.host.nvidia_driver.installed_library", lambda _: library)
    cache = tmp_path / "ld.so.cache"
    cache.touch()
    api = await serve()
    host = api.agent._host
    host._tree = made_up_driver(tmp_path, "535.183.01")
    host._driver = NvidiaDriver(host._tree, cache)
    host._problem.forget()

    [said] = [each for each in (await api.ask("GET", "/health/ready")).body["problems"] if "NVIDIA" in each]
    assert "535.183.01" in said
    assert "535.216.01" in said
    assert said.endswith("reboot this host")
    assert (await api.ask("GET", "/api/host")).body["unavailable"]["nvidiaDriver"] == said
    for _ in range(2):
        host._problem.forget()
        assert await host.nvidia_problem() == said
    assert [record.message for record in caplog.records if record.message == said] == [said]


def test_libraries_are_looked_for_again_when_the_loaders_cache_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = ["535.183.01"]
    looked: list[str] = []

    def installed(name: str) -> Path:
        looked.append(name)
        return tmp_path / f"libcuda.so.{versions[-1]}"

    monkeypatch.setattr("magi_agent.host.nvidia_driver.installed_library", installed)
    cache = tmp_path / "ld.so.cache"
    cache.write_text("1")
    driver = NvidiaDriver(made_up_driver(tmp_path, "535.183.01"), cache)
    assert [driver.problem() for _ in range(3)] == [None] * 3
    assert len(looked) == 1
    versions.append("535.216.01")
    cache.write_text("12")
    assert "535.216.01" in (driver.problem() or "")
    assert NvidiaDriver(Tree(proc=tmp_path / "none"), cache).problem() is None


async def test_a_driver_that_hangs_in_sysfs_keeps_nobody_waiting_for_long(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Tree(tmp_path / "proc", tmp_path / "sys", tmp_path / "dev")
    card = tree.sys / "bus" / "pci" / "devices" / "0000:0b:00.0"
    card.mkdir(parents=True)
    for name, text in {"vendor": "0x1002", "class": "0x030000"}.items():
        (card / name).write_text(f"{text}\n")
    (card / "driver").symlink_to("../../../drivers/amdgpu")
    # A pipe that nobody writes to is read for ever.
    os.mkfifo(card / "gpu_busy_percent")
    api = await serve()
    host = api.agent._host
    host._tree = tree
    host._card_figures._patience = 0.3

    for _ in range(3):
        answer = (await api.ask("GET", "/api/host")).body
        with_reasons(answer)
        [gpu] = answer["gpus"]
        assert (gpu["pciAddress"], gpu["vendor"]) == ("0000:0b:00.0", "AMD")
        assert gpu["unavailable"]["utilizationPercent"] == "its driver has not answered"
    # Whoever reads goes on, and there is one of them.
    waiting = [thread.name for thread in threading.enumerate() if thread.name == "sysfs of GPUs"]
    assert len(waiting) == 1
    (card / "gpu_busy_percent").open("w").close()


async def test_without_systemd_the_rest_is_told(serve: Serve) -> None:
    api = await serve()
    await api.agent._manager.close()
    host = (await api.ask("GET", "/api/host?refresh=true")).body

    with_reasons(host)
    assert host["systemdVersion"] is None
    assert "connection to systemd" in host["unavailable"]["devices"]
    assert host["memory"]["totalBytes"] > 0


async def test_a_server_that_fails_has_the_driver_looked_at(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("magi_agent.servers.launcher._RETRY_PAUSE", 0.05)
    monkeypatch.setattr("magi_agent.host.nvidia_driver.installed_library", lambda _: Path("/x/libcuda.so.535.216.01"))
    api = await serve("api-no-gpu", llama_server_path=str(script(tmp_path / "failing", "exit 1")))
    host = api.agent._host
    host._driver = NvidiaDriver(made_up_driver(tmp_path, "535.183.01"), tmp_path / "none")
    host._problem.forget()
    assert (await api.ask("POST", "/api/models/servers/api-no-gpu/start?wait=60")).status == 500

    async def said() -> bool:
        return any("its libraries are 535.216.01" in record.message for record in caplog.records)

    await until(said, "the journal names the versions")
