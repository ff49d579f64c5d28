"""`magictl host` against a real agent with the GPU in software, and with answers of other hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from magi_agent.cli.host import _memory
from tests.agent_process import AgentProcess, ended
from tests.cli.terminal import on_terminal, piped, surroundings
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

PATTERN = "magi-llama-cli-host-*.service"


@pytest.fixture(scope="module")
def environment(
    tmp_path_factory: pytest.TempPathFactory,
    toy_model: MakeToyModel,
    software_gpu: Path,
    unused_ports: PortRanges,
    systemd_user: SystemdUser,
) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("cli-host")
    toy_model(folder / "models" / "cli-host-toy.gguf")
    agent = AgentProcess(folder, folder / "models", unused_ports(2), software_gpu)
    with ended(agent, PATTERN):
        agent.start()
        agent.wait_settled()
        yield surroundings(MAGI_SOCKET=str(agent.socket))


def test_the_sheet_has_what_the_host_has(environment: dict[str, str]) -> None:
    told = piped("host", environment=environment)

    assert told.returncode == 0, told.stderr
    assert f"(of {psutil.virtual_memory().total / 1e9:.1f} GB)" in told.stdout
    [gpu] = [line for line in told.stdout.splitlines() if line.startswith("Vulkan0")]
    assert "llvmpipe" in gpu
    assert "Vulkan0: no pciAddress: it is no GPU on the PCI bus that is known" in told.stderr + told.stdout
    with on_terminal("host", environment=environment) as terminal:
        terminal.wait_for(lambda text: "llvmpipe" in text, "the GPU")
        assert terminal.end() == 0


def test_json_is_the_answer_of_the_api(environment: dict[str, str]) -> None:
    before = json.loads(piped("host", "--json", environment=environment).stdout)
    after = json.loads(piped("host", "--refresh", "--json", environment=environment).stdout)

    assert before["gpus"][0]["index"] == "Vulkan0"
    assert before["devicesListedAt"] < after["devicesListedAt"]


def test_a_llama_server_of_no_such_name_is_told(environment: dict[str, str]) -> None:
    told = piped("host", "--binary", "none such", environment=environment)

    assert told.returncode == 1
    assert "'none such' is none of servers.llama_server_alternatives" in told.stderr


def test_what_there_is_for_a_start_is_a_sum(environment: dict[str, str]) -> None:
    sheet = piped("host", environment=environment).stdout
    memory = json.loads(piped("host", "--json", environment=environment).stdout)["memory"]
    assert "  promised       0 B  (of it, to servers that have not taken it yet)" in sheet
    assert "  reserve        537 MB  (of it, for all else: memory_reserve)" in sheet
    assert memory["roomForStartBytes"] == memory["roomBytes"] - 512 * 1024 * 1024
    assert list(lines_of({**memory, "roomForStartBytes": 7_000_000_000}))[-1] == "for a start: 7.0 GB"


@pytest.mark.parametrize(
    ("memory", "line"),
    [
        ({"roomForStartBytes": 0}, "for a start: 0 B (what is started now would not fit)"),
        (
            {"roomForStartBytes": None, "unavailable": {"roomForStartBytes": "a file does not tell"}},
            "for a start: - (a file does not tell)",
        ),
    ],
)
def test_where_nothing_is_left_or_nobody_knows_that_is_said(memory: dict[str, object], line: str) -> None:
    assert list(lines_of({"roomBytes": 1, "promisedBytes": None, "reserveBytes": 2, **memory}))[-1] == line


def test_an_agent_of_before_says_no_more_than_the_room() -> None:
    assert list(lines_of({"roomBytes": 5_000_000_000})) == [
        "available: - (of -)",
        "room: 5.0 GB (of which memory_reserve is kept for all else)",
    ]


def lines_of(memory: dict[str, object]) -> Iterator[str]:
    for fact in _memory({"pressure": None, **memory}):
        yield f"{fact.label}: {fact.value.text} {fact.remark}".rstrip()
