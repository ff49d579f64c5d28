"""Limits of memory on a kernel that holds them: what they let live, and what they stop.

One machine for all of it, so each scenario has models of its own.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from vm_image import PARTS

from tests.system.host import SOCKET, Host, unit_of
from tests.vm.conftest import SLOW

MIB = 1 << 20


def start(host: Host, model: str, **settings: Any) -> dict[str, Any]:
    """Have a model's server run that reads its weights from the disk, and return what the API says once it is ready."""
    begin(host, model, **settings)
    return host.until_ready(model, SLOW)


def serving(host: Host) -> dict[str, Any]:
    """The server of a toy model that runs beside the others, and is to notice nothing of them."""
    known = host.server("toy")
    return known if known and known["isReady"] else start(host, "toy", ctxSize=8192)


def begin(host: Host, model: str, **settings: Any) -> None:
    host.add_model(f"{model}.gguf", model, within=SLOW)
    host.must("PUT", f"/api/models/{model}/settings", {"parallelSlots": 1, **settings}, within=SLOW)
    # Pages of a file count for the group that read it first, which is the shell that copied it.
    host.run("sh", "-c", "sync; echo 3 >/proc/sys/vm/drop_caches")
    host.ask("POST", f"/api/models/servers/{model}/start", within=SLOW)


def memory(host: Host, model: str) -> dict[str, Any]:
    told: dict[str, Any] = host.must("GET", f"/api/models/{model}/memory", within=SLOW)
    return told


def group_file(host: Host, model: str, name: str) -> str:
    return host.output("cat", f"/sys/fs/cgroup{host.property(unit_of(model), 'ControlGroup')}/{name}")


def figures_of(host: Host, model: str, name: str) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in group_file(host, model, name).splitlines()}


def complete(host: Host, server: dict[str, Any], prompt: str, tokens: int) -> None:
    asked = host.ask("POST", "/completion", {"prompt": prompt, "n_predict": tokens}, by=server["url"], within=SLOW)
    assert asked.status == 200, asked
    assert asked.body["content"]


def until_failed(host: Host, model: str) -> dict[str, Any]:
    def failed() -> dict[str, Any] | None:
        server = host.server(model)
        return server if server and server["failure"] and server["failure"]["advice"] else None

    return host.until(failed, f"{model} has failed; it is {host.server(model)}", within=3 * SLOW)


def test_a_model_that_serves_never_comes_near_its_limits(host: Host, figures: list[str]) -> None:
    server = start(host, "talker", ctxSize=1024)
    told = memory(host, "talker")
    limit = told["runningLimits"]["max"]
    assert limit["source"] == told["runningLimits"]["high"]["source"] == "derived"
    assert group_file(host, "talker", "memory.max") == str(limit["limitBytes"])
    assert group_file(host, "talker", "memory.high") == str(told["runningLimits"]["high"]["limitBytes"])
    assert group_file(host, "talker", "memory.swap.max") == "0"
    total = int(host.output("awk", "/MemTotal/ {print $2}", "/proc/meminfo")) * 1024
    assert told["need"]["hostBytes"] < limit["limitBytes"] < total

    before = figures_of(host, "talker", "memory.stat")
    for prompt in ("Seas, ships and the wind. ", "Three colors are red, "):
        complete(host, server, prompt * 4, tokens=2)
    after, events = figures_of(host, "talker", "memory.stat"), figures_of(host, "talker", "memory.events")

    faults = after["pgmajfault"] - before["pgmajfault"]
    figures.append(
        f"SmolLM2: need {told['need']['hostBytes'] // MIB} MiB, limit {limit['limitBytes'] // MIB} MiB; in use: "
        f"anonymous {after['anon'] // MIB}, files {after['file'] // MIB} MiB; once it was ready {faults} major faults, "
        f"memory.events high {events['high']}, max {events['max']}"
    )
    assert (events["high"], events["max"], events["oom_kill"]) == (0, 0, 0)
    assert after["workingset_refault_file"] == before["workingset_refault_file"]
    assert faults < 200
    again = host.server("talker")
    assert again
    assert (again["pid"], again["restartRequired"]) == (server["pid"], False)


def test_prompts_that_are_kept_are_no_leak(host: Host, figures: list[str]) -> None:
    server = serving(host)
    before = figures_of(host, "toy", "memory.stat")["anon"]
    for letter in "abcdef":
        complete(host, server, letter * 4000, tokens=1)
    after, events = figures_of(host, "toy", "memory.stat")["anon"], figures_of(host, "toy", "memory.events")

    figures.append(f"six prompts of 4000 tokens: anonymous memory grew by {(after - before) / MIB:.1f} MiB")
    assert after > before
    assert (events["high"], events["max"], events["oom_kill"]) == (0, 0, 0)


def test_the_figures_are_those_of_the_control_group(host: Host) -> None:
    serving(host)
    current = int(group_file(host, "toy", "memory.current"))
    anonymous = figures_of(host, "toy", "memory.stat")["anon"]
    server, told = host.server("toy"), memory(host, "toy")
    said = host.output("curl", "--silent", "--fail", "--unix-socket", SOCKET, "http://magi/metrics", within=SLOW)

    metrics = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in said.splitlines() if line[0] != "#"}
    assert server
    assert server["memoryBytes"] == pytest.approx(current, rel=0.1)
    assert told["used"]["source"] == "control group"
    assert told["used"]["anonymousBytes"] == pytest.approx(anonymous, rel=0.1)
    label = '{model="toy"}'
    assert metrics["magi_server_memory_bytes" + label] == pytest.approx(current, rel=0.1)
    assert metrics["magi_server_memory_anonymous_bytes" + label] == pytest.approx(anonymous, rel=0.1)
    assert metrics["magi_server_memory_max_bytes" + label] == told["runningLimits"]["max"]["limitBytes"]


def test_an_operators_limit_holds(host: Host) -> None:
    server = serving(host)
    host.run("systemctl", "set-property", "--runtime", unit_of("toy"), f"MemoryMax={900 * MIB}", within=SLOW)

    limits = memory(host, "toy")["runningLimits"]
    assert limits["max"] == {"limitBytes": 900 * MIB, "source": "operator"}
    assert group_file(host, "toy", "memory.max") == str(900 * MIB)
    again = host.server("toy")
    assert again
    assert (again["pid"], again["restartRequired"]) == (server["pid"], False)


def test_a_server_whose_limit_is_too_small_is_killed_and_told_so(host: Host) -> None:
    toy = serving(host)
    # The cache of so long a context is 128 MiB, which is filled with zeros before anything else.
    begin(host, "narrow", memoryMax=96 * MIB, ctxSize=1 << 19)

    failed = until_failed(host, "narrow")

    failure = failed["failure"]
    assert failed["state"] in {"failed", "cooldown"}
    assert failure["result"] == "oom-kill"
    assert failure["message"] == "it was killed because memory ran out, at its limit of 96 MiB (MemoryMax)"
    assert "magictl settings narrow memory_max=" in failure["advice"]
    assert host.property(unit_of("narrow"), "Result") == "oom-kill"
    again = host.server("toy")
    assert again
    assert (again["pid"], again["isReady"]) == (toy["pid"], True)
    assert host.ask("GET", "/health/live").status == 200
    host.must("POST", "/api/models/servers/narrow/stop", within=SLOW)


def test_a_leak_is_stopped_at_the_derived_limit_and_the_host_lives(host: Host, figures: list[str]) -> None:
    toy = serving(host)
    agent = host.main_pid("magi-agent.service")
    begin(host, "leaking", binary="leaky", ctxSize=256)
    limit = memory(host, "leaking")["limits"]["max"]["limitBytes"]
    began = time.monotonic()
    slowest = 0.0

    def is_killed() -> bool:
        nonlocal slowest
        asked = time.monotonic()
        assert host.answers(toy["url"])
        slowest = max(slowest, time.monotonic() - asked)
        return "Failed with result 'oom-kill'" in host.journal("--unit", unit_of("leaking"))

    host.until(is_killed, "the leak is stopped", within=2 * SLOW)

    lines = host.output("journalctl", "--output=json", "--unit", unit_of("leaking"), within=SLOW).splitlines()
    at = {str(entry["MESSAGE"]): int(entry["__REALTIME_TIMESTAMP"]) / 1e6 for entry in map(json.loads, reversed(lines))}
    killed = next(moment for text, moment in at.items() if "Failed with result 'oom-kill'" in text)
    figures.append(
        f"a leak: stopped at {limit // MIB} MiB {killed - at['the leak begins']:.1f} s after it began; meanwhile the "
        f"other server answered within {slowest:.1f} s"
    )
    assert time.monotonic() - began < 2 * SLOW
    killer = host.journal("-k", "--grep=oom-kill:constraint")
    assert f"oom_memcg=/magi.slice/magi-llama.slice/{unit_of('leaking')}" in killer or (
        f"/{unit_of('leaking')},task_memcg" in killer
    )
    assert "CONSTRAINT_NONE" not in killer
    host.run("sh", "-c", f"test $(systemctl show --property=MainPID --value magi-agent.service) = {agent}")
    again = host.server("toy")
    assert again
    assert (again["pid"], again["isReady"]) == (toy["pid"], True)

    failure = until_failed(host, "leaking")["failure"]
    assert failure["result"] == "oom-kill"
    assert f"at its limit of {limit / (1 << 30):.4g} GiB (MemoryMax)" in failure["message"]
    host.must("POST", "/api/models/servers/leaking/stop", within=SLOW)


@pytest.mark.parametrize("limits", [("MemoryHigh",), ("MemoryMax",), ("MemoryHigh", "MemoryMax")], ids="+".join)
def test_a_file_larger_than_the_limit_is_read_as_fast_as_without(
    host: Host, figures: list[str], limits: tuple[str, ...]
) -> None:
    file = f"{PARTS}/samples/large.gguf"
    size = int(host.output("stat", "--format=%s", file))

    def seconds(*properties: str) -> float:
        host.run("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches")
        words = [f"--property={word}" for word in properties]
        return float(
            host.output("systemd-run", "--quiet", "--wait", "--pipe", *words, "python3", f"{PARTS}/read_file.py", file)
        )

    free = min(seconds() for _ in range(2))
    limited = min(seconds(*(f"{name}={size // 3}" for name in limits)) for _ in range(2))
    figures.append(
        f"a file of {size // MIB} MiB, {'+'.join(limits)} a third of that: {limited / free:.2f} times as long"
    )
    assert limited < 3 * free + 1
