"""What the agent says before a start that a model will need, against what its unit then uses.

Both sample models, over contexts and types of the KV cache. The estimate is that of `GET /api/models/{id}/memory`
before the start, by the header's facts and the settings alone; the use is that of the same path once the server has
answered a prompt longer than a physical batch, so that it has touched all it has reserved. Both are anonymous memory
plus mapped weights.
"""

from __future__ import annotations

import http.client
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locations import GEMMA, LLAMA_SERVER, SMOLLM2

from tests.agent_process import AgentProcess, ended, wait_until
from tests.bench.figures import at_most, print_rows, print_targets
from tests.bench.ports import free_ports, is_free

CONTEXTS = (1024, 4096, None)
CACHE_TYPES = ("f16", "q8_0", "q4_0")
MOST_ERROR = 0.15
_PROMPT_TOKENS = 700
_WAIT_SECONDS = 120
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """One start: what was said before it and what was used after it, in bytes."""

    model: str
    context: int | None
    """As it was set; ``None`` where it was not."""
    cache_type: str
    estimated: int
    used: int

    @property
    def error(self) -> float:
        """By how much of the use the estimate is off; above 0 where it is too high."""
        return (self.estimated - self.used) / self.used


def compare(agent: AgentProcess, model_id: str, context: int | None, cache_type: str) -> Comparison:
    """Estimate, start, ask, measure, stop."""
    path = f"/api/models/{model_id}"
    settings = {"ctxSize": context, "cacheTypeK": cache_type, "cacheTypeV": cache_type}
    agent.must("PUT", f"{path}/settings", {name: value for name, value in settings.items() if value is not None})
    before = agent.must("GET", f"{path}/memory")
    assert before["used"] is None, before
    agent.must("POST", f"/api/models/servers/{model_id}/start?wait={_WAIT_SECONDS}")
    server = agent.must("GET", path)["server"]
    assert server["isReady"], server
    _ask(server["port"])
    after = agent.must("GET", f"{path}/memory")
    agent.must("POST", f"/api/models/servers/{model_id}/stop?wait={_WAIT_SECONDS}")
    wait_until(lambda: is_free(server["port"]), "the port is free")
    assert after["used"] is not None, after
    return Comparison(model_id, context, cache_type, before["estimated"]["hostBytes"], after["used"]["hostBytes"])


def agent_for(folder: Path, model_files: dict[str, Path], ports: tuple[int, int]) -> AgentProcess:
    """An agent for copies of model files, so that models and units have names like no other's."""
    models = folder / "models"
    models.mkdir()
    for name, file in model_files.items():
        shutil.copyfile(file, models / f"{name}.gguf")
    return AgentProcess(folder, models, ports, LLAMA_SERVER.resolve())


def measure() -> dict[str, Any]:
    """Start both models with each context and cache type. Beside a systemd user manager only."""
    low, high = sorted(free_ports(2))
    with tempfile.TemporaryDirectory(prefix="magi-bench-memory-") as name:
        files = {"bench-memory-smollm2": SMOLLM2, "bench-memory-gemma": GEMMA}
        agent = agent_for(Path(name), files, (low, high))
        with ended(agent, "magi-llama-bench-memory-*.service"):
            agent.start()
            agent.wait_settled()
            compared = [
                compare(agent, model_id, context, cache_type)
                for model_id in agent.must("GET", "/api/models/registry")["models"]
                for context in CONTEXTS
                for cache_type in CACHE_TYPES
            ]
            agent.stop()
    worst = max(abs(each.error) for each in compared)
    return {
        "starts": [{**asdict(each), "error": each.error} for each in compared],
        "targets": [at_most("estimate against use, worst error", worst * 100, MOST_ERROR * 100, "%")],
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print one row a start, then the target."""
    print("memory on the host: estimated before the start, used after a long prompt")
    print_rows(
        ["", "context", "KV cache", "estimated, MiB", "used, MiB", "error"],
        [
            [
                start["model"],
                "trained" if start["context"] is None else f"{start['context']:,}",
                start["cache_type"],
                f"{start['estimated'] / _MIB:,.1f}",
                f"{start['used'] / _MIB:,.1f}",
                f"{start['error']:+.1%}",
            ]
            for start in figures["starts"]
        ],
    )
    print_targets(figures["targets"])


def _ask(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_WAIT_SECONDS)
    try:
        body = {"prompt": "one " * _PROMPT_TOKENS, "n_predict": 4}
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
    finally:
        connection.close()
