"""What the launcher does for an agent: the same as the agent would do itself, where it may."""

from __future__ import annotations

import asyncio
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from magi_agent.errors import ModelNotUsable, ProbeFailed, SettingsNotUsable
from magi_agent.launcher.client import RemoteLauncher
from magi_agent.launcher.messages import Refused, Unreachable
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.launch import NO_DEVICE, LaunchSpecification, Wanted, specification_of, unit_name
from magi_agent.servers.llama_server import binary_identity_of, differences, memory_limits_of
from magi_agent.servers.memory_limits import MemoryLimits, limits_with_set
from magi_agent.servers.questions import Question
from magi_agent.systemd.jobs import JobResult
from magi_agent.systemd.manager import SystemdManager
from magi_agent.vocabulary import Scope
from tests.agent_process import wait_until
from tests.launcher.conftest import PREFIX, Running, unit_property


def launch(running: Running, path: Path, runtime: RuntimeSettings | None = None) -> LaunchSpecification:
    wanted = Wanted(path.stem, "a toy", str(path), None, running.ports[0], runtime or RuntimeSettings())
    return specification_of(wanted, running.settings(), None, None)


async def test_a_server_is_started_stopped_and_its_failure_forgotten(running: Running, model: Path) -> None:
    async with SystemdManager(Scope.USER) as manager:
        await manager.wait_connected(10)
        launcher = RemoteLauncher(manager, running.path)
        unit = unit_name(model.stem)

        assert await launcher.start(launch(running, model, RuntimeSettings(ctx_size=256))) is JobResult.DONE
        status = manager.get(unit)
        assert status is not None
        assert status.active_state == "active"
        assert status.argv[0] == running.options["llama_server_path"]
        assert status.argv[status.argv.index("--ctx-size") + 1] == "256"
        assert f"LLAMA_ARG_MODEL={model}" in status.environment
        assert unit_property(unit, "NoNewPrivileges", "ProtectSystem", "Slice") == {
            "NoNewPrivileges": "yes", "ProtectSystem": "strict", "Slice": "magi-llama.slice"
        }  # fmt: skip

        await asyncio.to_thread(
            subprocess.run, ["systemctl", "--user", "kill", "--signal=SIGKILL", unit], check=True, timeout=30
        )
        assert await launcher.stop(model.stem, 3) is JobResult.DONE
        await launcher.clear(model.stem)
        assert manager.get(unit) is None
        # What is not there is stopped and cleared already.
        assert await launcher.stop(model.stem, 3) is JobResult.DONE
        await launcher.clear(model.stem)


async def test_a_server_is_told_the_gpus_that_the_agent_chose(
    running: Running, model: Path, software_gpu: Path
) -> None:
    running.options["llama_server_path"] = str(software_gpu)
    async with SystemdManager(Scope.USER) as manager:
        await manager.wait_connected(10)
        launcher = RemoteLauncher(manager, running.path)
        for devices in (("Vulkan0",), NO_DEVICE):
            chosen = replace(launch(running, model), devices=devices)
            assert await launcher.start(chosen) is JobResult.DONE
            status = manager.get(unit_name(model.stem))
            assert status is not None
            assert status.argv[status.argv.index("--device") + 1] == devices[0]
            # Another day's choice is no difference; what somebody else told it is.
            today = replace(launch(running, model), binary_identity=binary_identity_of(status.environment))
            assert differences(today, status.argv, status.environment) == ()
            assert await launcher.stop(model.stem, 3) is JobResult.DONE


async def test_a_server_with_nothing_to_fit_is_told_so(running: Running, model: Path) -> None:
    async with SystemdManager(Scope.USER) as manager:
        await manager.wait_connected(10)
        launcher = RemoteLauncher(manager, running.path)
        for is_fitted in (True, False):
            assert await launcher.start(replace(launch(running, model), is_fitted=is_fitted)) is JobResult.DONE
            status = manager.get(unit_name(model.stem))
            assert status is not None
            assert ("LLAMA_ARG_FIT=off" in status.environment) is is_fitted
            assert await launcher.stop(model.stem, 3) is JobResult.DONE


@pytest.mark.parametrize("chosen", [{}, {"memory_max": 3 << 30}, {"memory_max": 5}, {"memory_high": 1 << 30}], ids=str)
async def test_limits_that_were_derived_are_the_units_and_set_ones_win(
    running: Running, model: Path, chosen: dict[str, Any]
) -> None:
    settings = RuntimeSettings(**chosen)
    derived = MemoryLimits(high=(2 << 30) - (1 << 20), max=2 << 30)
    wanted = replace(launch(running, model, settings), memory_limits=limits_with_set(derived, settings))
    async with SystemdManager(Scope.USER) as manager:
        await manager.wait_connected(10)
        launcher = RemoteLauncher(manager, running.path)

        assert await launcher.start(wanted) is JobResult.DONE
        held = unit_property(unit_name(model.stem), "MemoryHigh", "MemoryMax", "MemorySwapMax")
        unit = manager.get(unit_name(model.stem))
        await launcher.stop(model.stem, 3)

    limits = wanted.memory_limits
    assert limits is not None
    high = "infinity" if limits.high is None else str(limits.high)
    # systemd counts in pages, and takes less than one for one.
    assert held | {"MemoryMax": str(limits.max)} == {
        "MemoryHigh": high, "MemoryMax": str(limits.max), "MemorySwapMax": "0"
    }  # fmt: skip
    assert int(held["MemoryMax"]) == pytest.approx(limits.max, abs=4096)
    assert unit is not None
    assert memory_limits_of(unit.environment) == limits


async def test_a_limit_of_the_settings_wins_over_what_the_agent_derived(running: Running, model: Path) -> None:
    request = running.start_of(model, settings={"memory_max": 3 << 30}, memory_limits={"high": 1 << 30, "max": 2 << 30})

    assert (await running.ask("start", **request))["result"] == "done"

    assert unit_property(unit_name(model.stem), "MemoryHigh", "MemoryMax") == {
        "MemoryHigh": str(1 << 30), "MemoryMax": str(3 << 30)
    }  # fmt: skip
    environment = unit_property(unit_name(model.stem), "Environment")["Environment"].replace("\\", "")
    assert f'MAGI_UNIT_MEMORY={{"memory_high":{1 << 30},"memory_max":{3 << 30}}}' in environment


async def test_a_binary_is_asked_what_it_can_do(running: Running, tmp_path: Path) -> None:
    async with SystemdManager(Scope.USER) as manager:
        await manager.wait_connected(10)
        launcher = RemoteLauncher(manager, running.path)

        assert "--ctx-size" in await launcher.probe(Path(running.options["llama_server_path"]))
        with pytest.raises(ProbeFailed, match="no configured llama-server"):
            await launcher.probe(Path("/bin/sh"))
        running.options["llama_server_alternatives"] = f"broken={tmp_path}/not-there"
        with pytest.raises(ProbeFailed, match="not-there"):
            await launcher.probe(tmp_path / "not-there")


async def test_a_binary_is_asked_for_its_devices_and_nvidias_driver_for_its_gpus(
    running: Running, software_gpu: Path
) -> None:
    running.options["llama_server_alternatives"] = f"software={software_gpu}"
    async with SystemdManager(Scope.USER) as manager:
        await manager.wait_connected(10)
        launcher = RemoteLauncher(manager, running.path)

        assert "Vulkan0: llvmpipe" in await launcher.answer_of(Question.DEVICES, software_gpu)
        for question in (Question.FIGURES, Question.ORDER):
            assert json.loads(await launcher.answer_of(question)).keys() >= {"problem"}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"question": "version"}, "question: Input should be 'options', 'devices', 'figures' or 'order'"),
        ({"question": "--version"}, "question: Input should be"),
        ({"question": "devices"}, "who asks for devices names a binary"),
        ({"question": "devices", "binary": "/bin/sh"}, "no configured llama-server"),
        ({"question": "figures", "binary": "/bin/sh"}, "names no binary"),
        ({"question": "figures", "argv": ["/bin/sh"]}, "argv: Extra inputs are not permitted"),
        ({"question": ["figures"]}, "question: "),
    ],
)
async def test_no_other_question_is_asked(running: Running, fields: dict[str, object], why: str) -> None:
    with pytest.raises(Refused, match=why):
        await running.ask("probe", **fields)


async def test_what_goes_wrong_is_told_as_what_it_is(running: Running, model: Path) -> None:
    async with SystemdManager(Scope.USER) as manager:
        await manager.wait_connected(10)
        launcher = RemoteLauncher(manager, running.path)

        with pytest.raises(SettingsNotUsable, match="extra_flags: --temp is not allowed") as error:
            await launcher.start(launch(running, model, RuntimeSettings(extra_flags=("--temp=1",))))
        assert error.value.details["errors"][0]["field"] == "extra_flags"  # type: ignore[index]
        odd = running.models / f"{PREFIX}-odd\udcff.gguf"
        with pytest.raises(ModelNotUsable, match="UTF-8"):
            await launcher.start(replace(launch(running, odd), model_id=model.stem))
        with pytest.raises(ModelNotUsable, match="does not start model lau-one: port 1 is outside"):
            await launcher.start(replace(launch(running, model), port=1))
        for verb in (launcher.clear, lambda model_id: launcher.stop(model_id, 3)):
            with pytest.raises(Unreachable, match="the launcher does not"):
                await verb("../x")
        nobody = RemoteLauncher(manager, running.path.with_name("nobody.sock"))
        with pytest.raises(Unreachable, match=r"nobody.sock: No such file or directory; see: systemctl status"):
            await nobody.stop(model.stem, 3)


async def test_one_of_a_name_is_started_once(running: Running, model: Path) -> None:
    first = await running.ask("start", **running.start_of(model))
    assert first == {"result": "done"}
    again = json.loads(await running.send(json.dumps({"verb": "start", **running.start_of(model)}).encode() + b"\n"))
    assert again["error"]["kind"] == "BusError"
    assert "UnitExists" in again["error"]["message"]


async def test_what_the_operator_takes_back_holds_at_once(running: Running, model: Path) -> None:
    assert await running.ask("start", **running.start_of(model, settings={"ctx_size": 256})) == {"result": "done"}
    assert await running.ask("stop", model_id=model.stem) == {"result": "done"}
    running.options["model_scan_path"] = f"{running.models}-elsewhere"
    with pytest.raises(Refused, match="leads out of the model folders"):
        await running.ask("start", **running.start_of(model))


async def test_a_bad_configuration_is_said(running: Running, model: Path) -> None:
    running.options["port_range"] = "nonsense"
    with pytest.raises(Refused, match="--port-range: must be two ports"):
        await running.ask("start", **running.start_of(model))
    del running.options["port_range"]


async def test_what_was_begun_is_brought_to_its_end(running: Running, model: Path) -> None:
    line = json.dumps({"verb": "start", **running.start_of(model)}).encode() + b"\n"
    _, writer = await asyncio.open_unix_connection(running.path)
    writer.write(line)
    await asyncio.sleep(0.05)
    # The agent leaves, and the launcher is told to.
    writer.close()
    running.service.end.set()

    await asyncio.to_thread(
        wait_until,
        lambda: unit_property(unit_name(model.stem), "ActiveState")["ActiveState"] == "active",
        "the server runs",
    )


async def test_it_ends_when_nobody_asks(running: Running, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.service, "_idle_seconds", 0.3)
    # It waits as before for the first question.
    await running.ask("clear", model_id=model.stem)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 10
    while loop.time() < deadline:
        try:
            _, writer = await asyncio.open_unix_connection(running.path)
        except ConnectionRefusedError:
            break
        writer.close()
        await asyncio.sleep(0.5)
    else:
        pytest.fail("it serves on")
