"""Models on a GPU in software, by a real agent and real llama-servers; and on a host that has none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import locations
import pytest

from magi_agent.host.gpu_devices import is_any_driver_up
from tests.agent_process import AgentProcess, ended, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

PATTERN, PATTERN_WITHOUT = "magi-llama-plc-*.service", "magi-llama-plcless-*.service"
MIB = 1 << 20


def _agent(
    folder: Path,
    ports: tuple[int, int],
    binary: Path,
    journal: Path,
    toy_model: MakeToyModel,
    toy: str,
    config: str = "",
) -> AgentProcess:
    models = folder / "models"
    models.mkdir()
    shutil.copyfile(locations.SMOLLM2, models / "plc-smollm2.gguf")
    toy_model(models / f"{toy}.gguf")
    (folder / "agent.toml").write_text(config)
    agent = AgentProcess(folder, models, ports, binary)
    agent.settings |= {"MAGI_JOURNAL_DIRECTORY": str(journal), "MAGI_ALLOWED_FLAGS": "--device,--verbosity,--no-warmup"}
    return agent


@pytest.fixture(scope="module")
def on_gpu(
    tmp_path_factory: pytest.TempPathFactory,
    unused_ports: PortRanges,
    systemd_user: SystemdUser,
    software_gpu: Path,
    toy_model: MakeToyModel,
) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("on-gpu")
    # A GPU in software warms up for seconds.
    config = '[defaults]\nextra_flags = ["--no-warmup"]\n'
    agent = _agent(folder, unused_ports(4), software_gpu, systemd_user.journal, toy_model, "plc-toy", config)
    with ended(agent, PATTERN):
        agent.start()
        agent.wait_settled()
        yield agent
        agent.stop()


@pytest.fixture
def without_gpu(
    tmp_path: Path, unused_ports: PortRanges, systemd_user: SystemdUser, llama_server: Path, toy_model: MakeToyModel
) -> Iterator[AgentProcess]:
    config = "[defaults]\nn_gpu_layers = 99\n"
    agent = _agent(tmp_path, unused_ports(4), llama_server, systemd_user.journal, toy_model, "plcless-toy", config)
    with ended(agent, PATTERN_WITHOUT):
        agent.start()
        agent.wait_settled()
        yield agent
        agent.stop()


def server(agent: AgentProcess, model_id: str) -> dict[str, Any]:
    found: dict[str, Any] = agent.must("GET", f"/api/models/servers/{model_id}")
    return found


def started(agent: AgentProcess, model_id: str, **settings: object) -> dict[str, Any]:
    """The server of a model that was started anew with some settings."""
    agent.must("POST", f"/api/models/servers/{model_id}/stop?wait=60")
    agent.must("PUT", f"/api/models/{model_id}/settings", settings)
    agent.must("POST", f"/api/models/servers/{model_id}/start?wait=30")
    # A driver that computes on a busy CPU takes its time to compile for it.
    wait_until(lambda: server(agent, model_id)["isReady"], "it is ready", seconds=120)
    return server(agent, model_id)


def argv(found: dict[str, Any]) -> list[str]:
    return Path(f"/proc/{found['pid']}/cmdline").read_text().split("\0")


def fits(found: dict[str, Any]) -> str | None:
    """What a server was told of fitting."""
    variables = Path(f"/proc/{found['pid']}/environ").read_text().split("\0")
    return dict(variable.partition("=")[::2] for variable in variables).get("LLAMA_ARG_FIT")


def devices(found: dict[str, Any]) -> str | None:
    words = argv(found)
    return words[words.index("--device") + 1] if "--device" in words else None


# Two agents beside one systemd disturb each other: these two have ended when the one with a GPU begins.


def test_layers_that_were_asked_for_by_a_default_and_are_not_there_are_a_lack(without_gpu: AgentProcess) -> None:
    found = started(without_gpu, "plcless-toy")
    assert found["state"] == "degraded"
    assert (found["isReady"], found["isRunning"]) == (True, True)
    assert found["failure"]["result"] == "no-gpu"
    assert found["failure"]["message"] == (
        f"no GPU is used though n_gpu_layers=99 asks for it: {without_gpu.llama_server} lists no device"
    )
    assert found["failure"]["advice"] == (
        "magictl host shows why; to have it on the CPU: magictl settings plcless-toy n_gpu_layers=0"
    )
    assert found["restartReasons"] == []
    health = without_gpu.ask("GET", "/health/ready")
    assert (health.status, health.body["status"], health.body["serversReady"]) == (200, "ready", 1)
    assert any("plcless-toy is degraded: no GPU is used" in problem for problem in health.body["problems"])
    metrics = without_gpu.text("/metrics")
    assert 'magi_server_state{model="plcless-toy",state="degraded"} 1.0' in metrics
    # So it is for an agent that finds it running.
    without_gpu.stop()
    without_gpu.start()
    wait_until(lambda: server(without_gpu, "plcless-toy")["state"] == "degraded", "it is degraded still")
    # What is to run on the CPU, runs as it should.
    assert started(without_gpu, "plcless-toy", nGpuLayers=0)["state"] == "ready"


def test_without_a_gpu_and_a_word_about_one_all_is_well(without_gpu: AgentProcess) -> None:
    (without_gpu.folder / "agent.toml").write_text("")
    without_gpu.stop()
    without_gpu.start()
    without_gpu.wait_settled()
    found = started(without_gpu, "plcless-toy")
    assert (found["state"], found["failure"], devices(found), fits(found)) == ("ready", None, None, None)
    # A context that is set is all that there was to fit, unless the host has a GPU that this build cannot use.
    assert fits(started(without_gpu, "plcless-toy", ctxSize=512)) == (None if is_any_driver_up() else "off")
    assert without_gpu.must("GET", "/api/models/plcless-toy/memory")["need"]["gpuBytes"] == 0


def test_a_model_is_placed_there_by_name(on_gpu: AgentProcess) -> None:
    found = started(on_gpu, "plc-smollm2", ctxSize=2048)
    assert found["state"] == "ready"
    assert found["failure"] is None
    assert devices(found) == "Vulkan0"
    assert fits(found) is None
    # What another day's choice would be is no reason to restart.
    assert found["restartReasons"] == []


def test_its_layers_lie_there(on_gpu: AgentProcess) -> None:
    found = started(on_gpu, "plc-smollm2", ctxSize=1024, extraFlags=["--verbosity=4", "--no-warmup"])
    lines = on_gpu.must("GET", "/api/models/servers/plc-smollm2/logs?lines=1000")["entries"]
    text = "\n".join(line["message"] for line in lines)
    assert "using device Vulkan0" in text
    assert re.search(r"Vulkan0 model buffer size\s+=\s+[1-9]\d", text), text
    assert found["state"] == "ready"


def test_what_it_takes_of_the_gpu_is_told_before_the_start_and_after(on_gpu: AgentProcess) -> None:
    on_gpu.must("POST", "/api/models/servers/plc-smollm2/stop?wait=60")
    on_gpu.must("PUT", "/api/models/plc-smollm2/settings", {"ctxSize": 4096})
    before = on_gpu.must("GET", "/api/models/plc-smollm2/memory")
    assert before["need"]["gpuBytes"] > 150 * MIB
    assert before["need"]["gpuLayers"] == 31
    assert before["need"]["parts"]["kvCache"] == {"hostBytes": 0, "gpuBytes": 4096 * 3 * 64 * 2 * 2 * 30}
    on_gpu.must("POST", "/api/models/servers/plc-smollm2/start?wait=60")
    after = on_gpu.must("GET", "/api/models/plc-smollm2/memory")
    assert after["need"]["gpuBytes"] == before["need"]["gpuBytes"]
    # No driver tells what one process has of it.
    assert after["used"]["gpuBytes"] is None


def test_what_does_not_fit_has_its_rest_on_the_cpu(on_gpu: AgentProcess) -> None:
    # 65536 tokens take 1.4 GiB, and the GPU has 2 GiB of which llama-server leaves one.
    found = started(on_gpu, "plc-smollm2", ctxSize=65536)
    need = on_gpu.must("GET", "/api/models/plc-smollm2/memory")["need"]
    assert found["state"] == "ready"
    assert devices(found) == "Vulkan0"
    on_gpu.must("POST", "/api/models/servers/plc-smollm2/stop?wait=60")
    need = on_gpu.must("GET", "/api/models/plc-smollm2/memory")["need"]
    assert 0 < need["gpuLayers"] < 31
    assert need["gpuBytes"] < 1024 * MIB


def test_what_the_operator_set_is_left_alone(on_gpu: AgentProcess) -> None:
    for settings in ({"nGpuLayers": 0}, {"tensorSplit": [1]}):
        found = started(on_gpu, "plc-smollm2", ctxSize=512, **settings)
        assert devices(found) is None, settings
        assert found["state"] == "ready"
    found = started(on_gpu, "plc-smollm2", extraFlags=["--device=none", "--no-warmup"], nGpuLayers=99)
    assert devices(found) == "none"
    assert on_gpu.must("GET", "/api/models/plc-smollm2/memory")["need"]["gpuBytes"] == 0
    assert found["state"] == "ready"


def test_layers_that_were_asked_for_and_are_there_are_no_lack(on_gpu: AgentProcess) -> None:
    # Told by name or not.
    for settings in ({"nGpuLayers": 99}, {"nGpuLayers": -1, "splitMode": "layer"}):
        found = started(on_gpu, "plc-smollm2", ctxSize=512, **settings)
        assert found["state"] == "ready"
        # With both set, there is nothing to fit; "all" is what llama-server fits by itself.
        assert fits(found) == ("off" if settings["nGpuLayers"] == 99 else None)


def test_a_gpu_that_is_not_there_is_no_place(on_gpu: AgentProcess) -> None:
    on_gpu.must("POST", "/api/models/servers/plc-smollm2/stop?wait=60")
    on_gpu.must("PUT", "/api/models/plc-smollm2/settings", {"gpus": ["0000:99:00.0"]})
    told = on_gpu.must("GET", "/api/models/plc-smollm2/memory")
    assert told["need"] is None
    assert "there is no GPU 0000:99:00.0 now" in told["problem"]
    answer = on_gpu.ask("POST", "/api/models/servers/plc-smollm2/start?wait=60")
    assert answer.status >= 400
    assert "gpus: there is no GPU 0000:99:00.0 now; there are: " in answer.body["message"]
    assert server(on_gpu, "plc-smollm2")["state"] == "stopped"
    on_gpu.must("POST", "/api/models/servers/plc-smollm2/stop?wait=60")
    refused = on_gpu.ask("PUT", "/api/models/plc-smollm2/settings", {"gpus": ["Vulkan0"]})
    assert refused.status == 422
    assert "magictl host" in refused.body["message"]
    on_gpu.must("PUT", "/api/models/plc-smollm2/settings", {})
