"""What it costs to ask a model through the agent, beside asking its server directly, and through llama.cpp's router.

One program (the llama-server of the workbench), one set of models, the same settings: the router is told the options
that the agent's servers run with. "Directly" is the agent's own server at its port. All three are asked over TCP on
loopback, in turns, so that whatever else the machine does meets them alike; nobody asks two of them at a time. Beside
them stands a proxy of a few lines on the agent's own HTTP library (bare_proxy.py), the floor of the first two figures.

* Time to the first byte of an answer, one at a time, of a toy model that answers at once: of `/tokenize`, of a
  completion of one token, and of a streamed chat, where it is its first event's. What is more than directly is the
  way's. Of each way p50 and p99, and those of the direct one taken off.
* `/tokenize` with a few words, by 8 clients: requests a second, and the processor time that each costs on the way.
* Tokens a second of 1, 8 and 32 streams of SmolLM2 in 32 slots. One thread generates; on a host whose models are in
  its GPU, the processors are as free for the rest. The ratio is that of runs that follow on each other.
* From a request to the first token where the model has to be started for it, its file in the page cache; beside it the
  same server started by hand, asked every 10 ms whether it is ready. The agent has found out that this server has
  nothing to fit into memory, and tells it so; a second router is told the same, beside the one that is not.
* The same where another model has to leave before: the agent by its reserve of memory, the router by `--models-max 1`.
  Of a context that the agent counts some 3 GB for.

Before and after all that, the ways are asked the same questions, and have to answer the same bytes. A llama-server that
cannot be a router is said to be none, and what would be held against it is left out.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from locations import CHECKOUT, LLAMA_SERVER, SMOLLM2
from toy_model import write_toy_model

from tests.agent_process import AgentProcess, ended, wait_until
from tests.bench.asking import Asker, Said, question
from tests.bench.ending import end
from tests.bench.figures import at_least, at_most, print_rows, print_targets, shown, spread_of
from tests.bench.launches import Launch, by_hand
from tests.bench.load import WrongAnswer
from tests.bench.ports import free_ports, is_free
from tests.bench.process_figures import cpu_seconds, resident_megabytes
from tests.bench.router import Router, has_router, running_router
from tests.bench.same_answers import differing

FIRST_BYTES = 1000
TOKENIZE_ROUNDS, TOKENIZE_SECONDS = 5, 1.5
STREAMS = {1: (10, 64), 8: (5, 48), 32: (5, 48)}
"""Rounds, and tokens that each is given, by how many clients stream at once.

To connect and to ask is in the time, as it is in its users'; with a few tokens, there would be little else.
"""
STARTS, SWITCHES = 8, 4
_TOKENIZERS = 8
_WARM_UP = 20
_TOY, _STREAMED, _SWITCHED = "bench-gateway-toy", "bench-gateway-streamed", ("bench-gateway-one", "bench-gateway-two")
_SLOTS = {_TOY: 8, _STREAMED: 32, **dict.fromkeys(_SWITCHED, 4)}
_CONTEXTS = {_TOY: 4096, _STREAMED: 8192, **dict.fromkeys(_SWITCHED, 150_000)}
_ROOM = 5 << 30
"""Bytes that may be used: for one of those that are switched, which the agent counts 3.4 GB for, and not for two."""
_TRIES = 4
"""For one switch: other programs of the host may take or give back as much meanwhile."""
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
_WAIT = 60
_POINTS = ("p50", "p99")
_TALK = {"messages": [{"role": "user", "content": "Name three colours."}], "stream": True, "temperature": 0}


@dataclass(slots=True)
class _Ways:
    """The ways to the models: the agent with its servers, and a router where there is one."""

    agent: AgentProcess
    port: int
    """The agent's."""
    binary: Path
    spare_ports: tuple[int, int]
    """Others are the models', though nobody listens there while these are down."""
    launches: dict[str, Launch] = field(default_factory=dict)
    router: Router | None = None

    def to(self, model_id: str) -> dict[str, int]:
        """The ports at which a model is asked, each by its way, which has it up then."""
        _must(asyncio.run(_ask_once(self.port, _chat(model_id))))
        ports = {"direct": int(self.agent.must("GET", f"/api/models/{model_id}")["port"]), "agent": self.port}
        if self.router is not None:
            _must(asyncio.run(_ask_once(self.router.port, _chat(model_id))))
            self._check_alike(model_id, self.router)
            ports["router"] = self.router.port
        return ports

    def _check_alike(self, model_id: str, router: Router) -> None:
        (pid,) = router.children()
        ours, theirs = self.launches[model_id].settings(), Launch.of(pid).settings()
        if ours != theirs:
            raise RuntimeError(f"the router runs {model_id} with {theirs}, the agent with {ours}")

    def stop(self, model_id: str) -> None:
        """Have the agent stop a model's server."""
        self.agent.must("POST", f"/api/models/servers/{model_id}/stop?wait={_WAIT}")

    def leave_room(self) -> None:
        """Have the agent keep in reserve all memory that is free now, but for the room."""
        assert self.agent.process is not None
        available = psutil.virtual_memory().available
        if available <= _ROOM:
            raise RuntimeError(f"{available >> 20} MB of memory are available, and this needs {_ROOM >> 20}")
        (self.agent.folder / "agent.toml").write_text(f'[servers]\nmemory_reserve = "{available - _ROOM}"\n')
        reloads = self._reloads()
        self.agent.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self._reloads() > reloads, "the agent has read its configuration again")

    def _reloads(self) -> int:
        return self.agent.log.read_text().count("the configuration was ")

    def up(self) -> list[str]:
        """The models that the agent has up."""
        servers = self.agent.must("GET", "/api/models/servers")["servers"]
        return [server["modelId"] for server in servers if server["isRunning"]]

    def processes(self) -> dict[str, int]:
        """Those that stand between a client and a server."""
        assert self.agent.process is not None
        ours = {"agent": self.agent.process.pid}
        return ours if self.router is None else {**ours, "router": self.router.pid}


def measure(
    first_bytes: int = FIRST_BYTES,
    tokenize: tuple[int, float] = (TOKENIZE_ROUNDS, TOKENIZE_SECONDS),
    streams: Mapping[int, tuple[int, int]] = STREAMS,
    starts: int = STARTS,
    switches: int = SWITCHES,
) -> dict[str, Any]:
    """Ask by all ways and return figures. Beside a systemd user manager only."""
    with tempfile.TemporaryDirectory(prefix="magi-bench-gateway-") as name, _ways(Path(name)) as ways:
        pids = ways.processes()
        before = {side: (resident_megabytes(pid), cpu_seconds(pid)) for side, pid in pids.items()}
        began = time.monotonic()
        # One after the other: the router has room for one model at a time, as it has to for the switches.
        toy = ways.to(_TOY)
        differ = asyncio.run(differing(toy, _TOY))
        (bare_port,) = free_ports(1)
        with _bare_proxy(bare_port, toy["direct"]) as bare:
            sides = {**toy, "bare": bare_port}
            first = {what: asyncio.run(_first_bytes(sides, _ASKED[what], first_bytes)) for what in _ASKED}
            tokenized = asyncio.run(_tokenized({**toy, "bare": bare_port}, {**pids, "bare": bare}, *tokenize))
        differ += asyncio.run(differing(toy, _TOY))
        streamed = ways.to(_STREAMED)
        differ += asyncio.run(differing(streamed, _STREAMED))
        flowing = {str(clients): asyncio.run(_flowing(streamed, pids, clients, *n)) for clients, n in streams.items()}
        for model_id in ways.up():
            ways.stop(model_id)
        cold = _cold(ways, starts)
        switched = _switched(ways, switches)
        took = time.monotonic() - began
        processes = {
            side: {
                "megabytesBefore": before[side][0],
                "megabytes": resident_megabytes(pid),
                "percent": (cpu_seconds(pid) - before[side][1]) / took * 100,
            }
            for side, pid in pids.items()
        }
    figures = {
        "router": "router" in pids,
        "differing": differ,
        "first": first,
        "tokenize": tokenized,
        "streams": flowing,
        "cold": cold,
        "switch": switched,
        "processes": processes,
        "seconds": took,
    }
    return {**figures, "targets": targets(figures)}


def targets(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What the figures are held against: the router's where there is one, and the direct way's."""
    differ = at_most("questions that are not answered with the same bytes", len(figures["differing"]), 0, "")
    flowing = [
        at_least(f"tokens/s of {clients} streams, as a share of direct", one["share"]["agent"]["median"], 0.98, "")
        for clients, one in figures["streams"].items()
    ]
    if not figures["router"]:
        return [differ, *flowing]
    rates = figures["tokenize"]["perSecond"]
    added = {what: one["added"] for what, one in figures["first"].items()}
    beside = [
        *(
            at_most(f"time added to the first byte of {what}, p50, as a multiple of a bare aiohttp proxy's",
                    each["agent"]["p50"] / each["bare"]["p50"], 1.0, "")
            for what, each in added.items()
        ),
        *(
            at_most(f"time added to the first byte of {what}, {point}, as a multiple of the router's",
                    each["agent"][point] / each["router"][point], 1.0, "")
            for what, each in added.items()
            for point in _POINTS
        ),
        at_least("/tokenize a second, as a multiple of the router's",
                 rates["agent"]["median"] / rates["router"]["median"], 1.0, ""),
    ]  # fmt: skip
    later = [
        at_most(f"{words}, as a multiple of the router's",
                figures[key]["agent"]["median"] / figures[key]["router"]["median"], 1.0, "")
        for key, words in (("cold", "cold request to first token"), ("switch", "switch to first token"))
    ]  # fmt: skip
    return [differ, *beside, *flowing, *later]


def print_table(figures: dict[str, Any]) -> None:
    """Print the ways beside each other, then the targets."""
    print("a model asked directly, through the agent, and through llama.cpp's router; median (lowest to highest)")
    if not figures["router"]:
        print("this llama-server cannot be a router (it has no --models-preset): skipped")
    sides = ["direct", "agent", *(["router"] if figures["router"] else [])]
    floored = [*sides, "bare"]
    tokenized = figures["tokenize"]
    rows: list[list[str]] = []
    for what, first in figures["first"].items():
        rows += [
            [f"{what}: first byte, ms, p50, p99", *(_points(first[side]) for side in floored)],
            ["of that added, ms", "-", *(_points(first["added"][side]) for side in floored[1:])],
        ]
    rows += [
        [f"/tokenize a second, {_TOKENIZERS} clients", *(shown(tokenized["perSecond"][side], 0) for side in floored)],
        ["processor time of one on the way, µs", "-", *(f"{tokenized['cpuMicroseconds'][s]:.0f}" for s in floored[1:])],
    ]  # fmt: skip
    for clients, one in figures["streams"].items():
        rows += [
            [f"tokens/s, {clients} at once", *(shown(one["perSecond"][side], 0) for side in sides)],
            ["as a share of direct", "-", *(shown(one["share"][side], 3) for side in sides[1:])],
            ["processor time of a token on the way, µs", "-", *(f"{one['cpuMicroseconds'][s]:.0f}" for s in sides[1:])],
        ]
    rows += [
        ["cold request to first token, ms", *(shown(figures["cold"][side], 0) for side in sides)],
        *([["where the router is told not to fit", "-", "-", shown(figures["cold"]["toldRouter"], 0)]]
          if figures["router"] else []),
        ["switch to first token, ms", "-", *(shown(figures["switch"][side], 0) for side in sides[1:])],
        *(
            [f"{words} of the process on the way", "-",
             *(f"{figures['processes'][side][key]:.1f}" for side in sides[1:])]
            for key, words in (("megabytesBefore", "MB before all that"), ("megabytes", "MB after"),
                               ("percent", f"% of a processor over {figures['seconds']:.0f} s"))
        ),
    ]  # fmt: skip
    titles = {"direct": "direct (cold: by hand)", "bare": "bare aiohttp proxy"}
    print_rows(["", *(titles.get(side, side) for side in floored)], rows)
    if figures["differing"]:
        print("not the same bytes as directly: " + ", ".join(figures["differing"]))
    print_targets(figures["targets"])


def _points(milliseconds: Mapping[str, float]) -> str:
    return ", ".join(f"{milliseconds[point]:.2f}" for point in _POINTS)


@contextmanager
def _ways(folder: Path) -> Iterator[_Ways]:
    models = folder / "models"
    models.mkdir()
    write_toy_model(models / f"{_TOY}.gguf", chat_template=_TEMPLATE)
    for model_id in (_STREAMED, *_SWITCHED):
        shutil.copyfile(SMOLLM2, models / f"{model_id}.gguf")
        with (models / f"{model_id}.gguf").open("ab") as file:
            # Behind the tensors nobody reads, and no two files are the same.
            file.write(model_id.encode())
    port, router_port, hand, told, *ports = free_ports(4 + len(_SLOTS))
    binary = LLAMA_SERVER.resolve()
    settings = {
        "MAGI_TCP": f"127.0.0.1:{port}",
        "MAGI_TCP_ACCESS": "infer",
    }
    agent = AgentProcess(folder, models, (min(ports), max(ports)), binary, settings)
    with ended(agent, "magi-llama-bench-gateway-*.service"), ExitStack() as stack:
        agent.start()
        agent.wait_settled(_WAIT)
        ways = _Ways(agent, port, binary, (hand, told))
        for model_id, slots in _SLOTS.items():
            choices = {"nThreads": 1, "ctxSize": _CONTEXTS[model_id], "parallelSlots": slots, "startPolicy": "onDemand"}
            agent.must("PUT", f"/api/models/{model_id}/settings", choices)
            agent.must("PUT", f"/api/models/{model_id}/enabled", {"enabled": True})
            # By a request: llama-server forgets a SIGTERM between its first healthy answer and its main loop.
            _must(asyncio.run(_ask_once(port, _chat(model_id))))
            ways.launches[model_id] = Launch.of(int(agent.must("GET", f"/api/models/{model_id}")["server"]["pid"]))
            ways.stop(model_id)
        if has_router(binary):
            running = running_router(binary, ways.launches, folder, router_port, most=1)
            ways.router = stack.enter_context(running)
        yield ways
        agent.stop()


@contextmanager
def _bare_proxy(port: int, upstream: int) -> Iterator[int]:
    """Have one before a server; gives its process id."""
    command = [sys.executable, "-m", "tests.bench.bare_proxy", str(port), str(upstream)]
    process = subprocess.Popen(command, cwd=CHECKOUT)
    try:
        wait_until(lambda: not is_free(port), "the bare proxy listens")
        yield process.pid
    finally:
        end(process)


async def _first_bytes(ports: Mapping[str, int], request: bytes, rounds: int) -> dict[str, Any]:
    """Milliseconds to the first byte of the answer to a question."""
    askers = {side: Asker(port) for side, port in ports.items()}
    took: dict[str, list[float]] = {side: [] for side in ports}
    for number in range(_WARM_UP + rounds):
        for side in _turned(list(ports), number):
            said = await askers[side].must(request)
            if number >= _WARM_UP:
                took[side].append(said.first * 1e3)
    for asker in askers.values():
        asker.close()
    points: dict[str, Any] = {}
    for side, milliseconds in took.items():
        percentiles = statistics.quantiles(milliseconds, n=100, method="inclusive")
        points[side] = {"p50": percentiles[49], "p99": percentiles[98]}
    more = {
        side: {point: points[side][point] - points["direct"][point] for point in _POINTS}
        for side in ports
        if side != "direct"
    }
    return {**points, "added": more, "runs": rounds}


async def _tokenized(ports: Mapping[str, int], pids: Mapping[str, int], rounds: int, seconds: float) -> dict[str, Any]:
    """Answers a second, and the processor time that each costs the process on the way."""
    request = question("/tokenize", {"model": _TOY, "content": "some text"})
    expected = (await _ask_once(ports["direct"], request)).body
    rates: dict[str, list[float]] = {side: [] for side in ports}
    cost: dict[str, list[float]] = {side: [] for side in pids}

    async def client(asker: Asker, until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            if (said := await asker.must(request)).body != expected:
                raise WrongAnswer(f"not what the server says directly: {said.body[:300]!r}")
            count += 1
        return count

    for number in range(rounds):
        for side in _turned(list(ports), number):
            askers = [Asker(ports[side]) for _ in range(_TOKENIZERS)]
            await asyncio.gather(*(asker.must(request) for asker in askers))
            with _costing(pids.get(side)) as cpu:
                until = time.perf_counter() + seconds
                counts = await asyncio.gather(*(client(asker, until) for asker in askers))
            rates[side].append(sum(counts) / seconds)
            if side in cost:
                cost[side].append(cpu() / sum(counts) * 1e6)
            for asker in askers:
                asker.close()
    return {
        "perSecond": {side: spread_of(runs) for side, runs in rates.items()},
        "cpuMicroseconds": {side: statistics.median(runs) for side, runs in cost.items()},
    }


async def _flowing(
    ports: Mapping[str, int], pids: Mapping[str, int], clients: int, rounds: int, tokens: int
) -> dict[str, Any]:
    """Tokens a second of so many streams, and the processor time that each token costs the process on the way."""
    more = {"max_tokens": tokens, "ignore_eos": True, "stream_options": {"include_usage": True}}
    requests = [_chat(_STREAMED, **more, seed=number) for number in range(clients)]
    rates: dict[str, list[float]] = {side: [] for side in ports}
    cost: dict[str, list[float]] = {side: [] for side in pids}
    # The first round of all warms up: a server that has never had so many at once is slow with them.
    for number in range(-1, rounds):
        for side in _turned(list(ports), number):
            askers = [Asker(ports[side]) for _ in range(clients)]
            with _costing(pids.get(side)) as cpu:
                began = time.perf_counter()
                answers = await asyncio.gather(
                    *(asker.must(request) for asker, request in zip(askers, requests, strict=True))
                )
                took = time.perf_counter() - began
            for said in answers:
                check_whole(said, tokens)
            if number >= 0:
                rates[side].append(clients * tokens / took)
            if number >= 0 and side in cost:
                cost[side].append(cpu() / (clients * tokens) * 1e6)
            for asker in askers:
                asker.close()
    return {
        "perSecond": {side: spread_of(runs) for side, runs in rates.items()},
        "share": {
            side: spread_of(ours / theirs for ours, theirs in zip(rates[side], rates["direct"], strict=True))
            for side in ports
            if side != "direct"
        },
        "cpuMicroseconds": {side: statistics.median(runs) for side, runs in cost.items()},
    }


def _cold(ways: _Ways, rounds: int) -> dict[str, Any]:
    """Milliseconds from a request to the first token, where nothing is up."""
    hand, port = ways.spare_ports
    request = _chat(_STREAMED)

    def by_router(router: Router) -> float:
        first = _must(asyncio.run(_ask_once(router.port, request))).first
        router.unload(_STREAMED)
        return first

    def directly() -> float:
        began = time.perf_counter()
        with by_hand(ways.launches[_STREAMED], hand):
            ready = time.perf_counter() - began
            return ready + _must(asyncio.run(_ask_once(hand, request))).first

    def by_agent() -> float:
        first = _must(asyncio.run(_ask_once(ways.port, request))).first
        ways.stop(_STREAMED)
        return first

    asked: dict[str, Callable[[], float]] = {"direct": directly, "agent": by_agent}
    with ExitStack() as stack:
        if ways.router is not None:
            if ways.router.children():
                ways.router.unload(_STREAMED)
            told = running_router(ways.binary, ways.launches, ways.agent.folder, port, most=1, fits=False)
            asked |= {
                "router": partial(by_router, ways.router),
                "toldRouter": partial(by_router, stack.enter_context(told)),
            }
        return _in_turns({side: [] for side in asked}, lambda side: asked[side](), rounds)


def _switched(ways: _Ways, rounds: int) -> dict[str, Any]:
    """Milliseconds from a request to the first token, where the other model is up and has to leave."""
    took: dict[str, list[float]] = {side: [] for side in ways.processes()}
    there, wanted = _SWITCHED

    def by_agent() -> float:
        for _ in range(_TRIES):
            ways.leave_room()
            said = asyncio.run(_ask_once(ways.port, _chat(there)))
            if b'"insufficient_memory"' in said.body:
                continue
            said = asyncio.run(_ask_once(ways.port, _chat(wanted)))
            if b'"insufficient_memory"' not in said.body and ways.up() == [wanted]:
                ways.stop(wanted)
                return _must(said).first
            for model_id in ways.up():
                ways.stop(model_id)
        raise RuntimeError(f"{wanted} did not take the place of {there}; the last answer was {said.body[:500]!r}")

    def by_router(router: Router) -> float:
        _must(asyncio.run(_ask_once(router.port, _chat(there))))
        first = _must(asyncio.run(_ask_once(router.port, _chat(wanted)))).first
        if len(router.children()) != 1:
            raise RuntimeError(f"the router has {there} up beside {wanted}")
        # The memory is that of both sides.
        router.unload(wanted)
        return first

    def asked(side: str) -> float:
        return by_router(ways.router) if side == "router" and ways.router else by_agent()

    return _in_turns(took, asked, rounds)


def _in_turns(took: dict[str, list[float]], asked: Callable[[str], float], rounds: int) -> dict[str, Any]:
    """One round more than are counted: what comes first is in no cache."""
    for number in range(1 + rounds):
        for side in _turned(list(took), number):
            first = asked(side)
            if number:
                took[side].append(first * 1e3)
    return {side: spread_of(runs) for side, runs in took.items()}


def _turned(sides: list[str], number: int) -> list[str]:
    """The sides in another order each time, so that none always comes after the same."""
    at = number % len(sides)
    return [*sides[at:], *sides[:at]]


@contextmanager
def _costing(pid: int | None) -> Iterator[Callable[[], float]]:
    """Give what tells the processor time, in seconds, that a process took within the block."""
    before = cpu_seconds(pid) if pid else 0.0
    after = before
    yield lambda: after - before
    after = cpu_seconds(pid) if pid else 0.0


def _chat(model_id: str, **more: Any) -> bytes:
    return question("/v1/chat/completions", {"model": model_id, "max_tokens": 2, **_TALK, **more})


_ASKED = {
    "/tokenize": question("/tokenize", {"model": _TOY, "content": "some text"}),
    "one token": question("/v1/completions", {"model": _TOY, "prompt": "some text", "max_tokens": 1}),
    "a streamed chat": _chat(_TOY),
}
"""What the first byte is waited for of."""


async def _ask_once(port: int, request: bytes) -> Said:
    asker = Asker(port)
    try:
        return await asker.ask(request)
    finally:
        asker.close()


def _must(said: Said) -> Said:
    if said.status != 200 or b'"choices"' not in said.body:
        raise WrongAnswer(f"status {said.status}: {said.body[:300]!r}")
    return said


def check_whole(said: Said, tokens: int) -> None:
    """Raise ``WrongAnswer`` for a stream that has not all the tokens that were asked for, and an end."""
    if f'"completion_tokens":{tokens},'.encode() not in said.body or not said.body.endswith(b"data: [DONE]\n\n"):
        raise WrongAnswer(f"not {tokens} tokens and an end: {said.body[-500:]!r}")
