"""What is asked in probes: real units with the servers' sandbox, and a closed list of questions."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from magi_agent.errors import ProbeFailed
from magi_agent.host.listed_devices import listed_devices
from magi_agent.host.nvidia_nodes import is_loaded
from magi_agent.host.nvml_figures import read_figures, read_order
from magi_agent.servers.launcher import DirectLauncher, probe_of
from magi_agent.servers.questions import Question, argv_of_question
from magi_agent.systemd.manager import SystemdManager
from magi_agent.vocabulary import Scope
from tests.conftest import SystemdUser
from tests.host.nvidia_stand_in import make_libraries
from tests.servers.system import script, systemctl
from tests.systemd.units import until


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


async def test_a_llama_server_lists_the_gpu_in_software(
    systemd_user: SystemdUser, tmp_path: Path, software_gpu: Path
) -> None:
    async with SystemdManager(Scope.USER) as manager:
        await manager.wait_connected(10)
        launcher = DirectLauncher(manager, tmp_path)
        text = await launcher.answer_of(Question.DEVICES, software_gpu)

    [device] = listed_devices(text) or ()
    assert (device.name, device.backend, device.number) == ("Vulkan0", "Vulkan", 0)
    assert device.description.startswith("llvmpipe (LLVM ")
    assert device.memory_total is not None
    assert device.memory_total > 0
    assert is_empty(tmp_path)


async def test_nvidias_driver_is_asked_in_a_unit_and_says_why_there_is_nothing(
    systemd_user: SystemdUser, tmp_path: Path
) -> None:
    if is_loaded("/proc"):
        pytest.skip("this host has a driver of NVIDIA's")
    async with SystemdManager(Scope.USER) as manager:
        await manager.wait_connected(10)
        launcher = DirectLauncher(manager, tmp_path)
        figures = read_figures(await launcher.answer_of(Question.FIGURES))
        order = await launcher.answer_of(Question.ORDER)

    assert (figures.gpus, figures.problem) == ([], "NVML Shared Library Not Found")
    with pytest.raises(ValueError, match="libcuda"):
        read_order(order)


async def test_a_question_that_hangs_holds_up_no_other_and_leaves_nothing(
    systemd_user: SystemdUser, tmp_path: Path, llama_server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = script(tmp_path / "hanging", 'if [ "$1" = --list-devices ]; then echo looking; exec sleep 600; fi')
    monkeypatch.setattr("magi_agent.servers.launcher._PROBE_TIMEOUT", 2.0)
    (tmp_path / "state").mkdir()
    async with SystemdManager(Scope.USER, pattern="magi-probe*.service") as manager:
        await manager.wait_connected(10)
        launcher = DirectLauncher(manager, tmp_path / "state")
        waiting = asyncio.create_task(launcher.answer_of(Question.DEVICES, hanging))
        await until(lambda: manager.get("magi-probe-devices.service"), "the question is asked")
        assert "--ctx-size" in await launcher.probe(llama_server)
        assert not waiting.done()
        with pytest.raises(ProbeFailed, match="hanging --list-devices failed: looking"):
            await waiting
    assert await systemctl("list-units", "--all", "--plain", "--no-legend", "magi-probe*.service") == ""
    assert is_empty(tmp_path / "state")


def test_only_what_is_listed_can_be_asked() -> None:
    binary = Path("/opt/llama-server")
    program = Path(argv_of_question(Question.FIGURES, None)[2])

    assert program.name == "nvml_program.py"
    assert argv_of_question(Question.DEVICES, binary) == ("/opt/llama-server", "--list-devices")
    assert argv_of_question(Question.FIGURES, binary) == (sys.executable, "-I", str(program), "--figures")
    assert argv_of_question(Question.ORDER, None)[3:] == ("--cuda-order",)
    with pytest.raises(ValueError, match="devices"):
        argv_of_question(Question.DEVICES, None)


def test_nodes_of_gpus_are_there_before_gpus_are_asked_for() -> None:
    units = {
        (question, scope): probe_of(
            Path("/opt/llama-server") if question.needs_binary else None, Path("/state/output"), None, scope, question
        )
        for question in Question
        for scope in Scope
    }
    assert {key for key, unit in units.items() if unit.wants} == {
        (question, Scope.SYSTEM) for question in (Question.DEVICES, Question.FIGURES, Question.ORDER)
    }
    assert len({unit.name for unit in units.values()}) == len(Question)


async def test_figures_of_a_made_up_driver_come_out_of_the_unit(systemd_user: SystemdUser, tmp_path: Path) -> None:
    make_libraries(tmp_path)
    texts = {}
    async with SystemdManager(Scope.USER) as manager:
        await manager.wait_connected(10)
        for question in (Question.FIGURES, Question.ORDER):
            output = tmp_path / question
            unit = probe_of(None, output, None, Scope.USER, question)
            shown = (*unit.read_only_paths, PurePosixPath(tmp_path))
            # Where the driver would be installed, the loader finds it by itself.
            unit = replace(unit, environment={"LD_LIBRARY_PATH": str(tmp_path)}, read_only_paths=shown)
            result = await manager.start_transient(unit, limit=30)
            texts[question] = output.read_text()
            assert result.ok, texts[question]

    figures = read_figures(texts[Question.FIGURES])
    assert figures.problem is None
    first, second = figures.gpus
    assert first.pci_address == "0000:41:00.0"
    assert (first.uuid, first.name) == ("GPU-11111111-2222", "NVIDIA A100-SXM4-40GB")
    assert (first.memory_total_bytes, first.memory_free_bytes) == (42_949_672_960, 42_000_000_000)
    assert (first.temperature_celsius, first.utilization_percent) == (41, 7)
    assert first.processes == {4711: 1000, 4712: 0, 4713: None}
    assert second.processes == {4711: 500, 4712: 0, 4713: None}
    assert (second.memory_total_bytes, second.memory_free_bytes) == (None, None)
    assert second.reasons == dict.fromkeys(("memoryTotalBytes", "memoryFreeBytes"), "Not Supported")
    assert read_order(texts[Question.ORDER]) == ("0000:c1:00.0", "0000:41:00.0")
    assert json.loads(texts[Question.ORDER])["order"][0] == "0000:C1:00.0"
