"""What the host has, as the packaged agent tells it: in its own sandbox, asking by the launcher."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tests.host.nvidia_stand_in import make_libraries
from tests.system.host import Host
from tests.system.scenario_launcher import ask

_LIMIT = 256 * 1024 * 1024
_SLICE = "magi-llama.slice"


def test_the_agents_sandbox_hides_nothing_that_is_told_of_the_host(serving: Host) -> None:
    host = serving.must("GET", "/api/host?refresh=true", within=30)

    # llama-server was run by the launcher, as the servers are; there is no GPU for it.
    assert "devices" not in host["unavailable"]
    assert [gpu["index"] for gpu in host["gpus"] if gpu["index"]] == []
    assert host["systemdVersion"] == serving.output("systemctl", "--version").split("(")[1].split(")")[0]
    assert host["hostname"] == serving.output("hostname").strip()
    memory = host["memory"]
    assert 0 < memory["roomBytes"] <= memory["availableBytes"] < memory["totalBytes"]
    [disk] = host["disks"]
    assert (disk["folder"], disk["unavailable"]) == ("/models", {})
    assert host["cpu"]["threads"] == int(serving.output("nproc", "--all"))
    assert "llama-server" in serving.run("magictl", "host", "--json").stdout


def _highs(host: Host) -> list[int]:
    limits = host.must("GET", "/api/host", within=30)["memory"]["limits"]
    return [limit["highBytes"] for limit in limits if limit["unit"] == _SLICE]


def test_limits_of_the_slice_are_told_as_an_operator_sets_them(serving: Host) -> None:
    serving.run("systemctl", "set-property", "--runtime", _SLICE, f"MemoryHigh={_LIMIT}")
    try:
        serving.until(lambda: _highs(serving) == [_LIMIT], "the limit is told", 5)
    finally:
        serving.run("systemctl", "set-property", "--runtime", _SLICE, "MemoryHigh=infinity")


def test_nvidias_driver_is_asked_as_the_servers_user(serving: Host) -> None:
    if serving.run("test", "-e", "/proc/driver/nvidia", check=False).returncode == 0:
        return
    told = json.loads(ask(serving, verb="probe", question="figures")["text"])
    assert told == {"gpus": [], "problem": "NVML Shared Library Not Found"}
    order = json.loads(ask(serving, verb="probe", question="order")["text"])
    assert "libcuda.so.1" in order["problem"]
    assert serving.units("magi-probe*") == {}
    # Nor are they all over the journal.
    assert serving.journal("--unit=magi-probe-figures.service", "--quiet").strip() == ""
    assert serving.output("find", "/var/lib/magi-launcher", "-name", ".probe*") == ""


def test_figures_of_a_driver_come_out_of_the_servers_sandbox(serving: Host, tmp_path: Path) -> None:
    if serving.run("sh", "-c", "ldconfig -p | grep -q libnvidia-ml", check=False).returncode == 0:
        return
    for library in make_libraries(tmp_path):
        coded = base64.b64encode(library.read_bytes()).decode()
        serving.run("sh", "-c", f"base64 -d >/usr/lib/{library.name}", stdin=coded)
    serving.run("ldconfig")
    try:
        told = json.loads(ask(serving, verb="probe", question="figures")["text"])
        assert told["problem"] is None
        assert [(gpu["pciAddress"], gpu["memoryFreeBytes"]) for gpu in told["gpus"]] == [
            ("00000000:41:00.0", 42_000_000_000),
            ("00000000:C1:00.0", None),
        ]
        order = json.loads(ask(serving, verb="probe", question="order")["text"])
        assert order == {"order": ["0000:C1:00.0", "0000:41:00.0"], "problem": None}
    finally:
        serving.run("rm", "/usr/lib/libnvidia-ml.so.1", "/usr/lib/libcuda.so.1")
        serving.run("ldconfig")
