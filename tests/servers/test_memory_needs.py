"""The estimate before a start against what the unit then uses: both sample models, by a real agent.

`make bench` does the same over more contexts and cache types, and prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import locations
import pytest

from tests.agent_process import AgentProcess, ended, wait_until
from tests.bench.bench_memory import MOST_ERROR, agent_for, compare
from tests.conftest import PortRanges, SystemdUser

PATTERN = "magi-llama-memory-*.service"
SMOLLM2, GEMMA = "memory-smollm2", "memory-gemma"


@pytest.fixture(scope="module")
def agent(
    tmp_path_factory: pytest.TempPathFactory, unused_ports: PortRanges, systemd_user: SystemdUser
) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("memory")
    files = {SMOLLM2: locations.SMOLLM2, GEMMA: locations.GEMMA}
    agent = agent_for(folder, files, unused_ports(2))
    agent.settings |= {"MAGI_JOURNAL_DIRECTORY": str(systemd_user.journal)}
    with ended(agent, PATTERN):
        agent.start()
        agent.wait_settled()
        yield agent
        agent.stop()


@pytest.mark.parametrize(
    ("model_id", "context", "cache_type"),
    [(SMOLLM2, 1024, "q4_0"), (SMOLLM2, None, "f16"), (GEMMA, 4096, "q8_0"), (GEMMA, None, "f16")],
)
def test_the_estimate_lies_near_what_is_used(
    agent: AgentProcess, model_id: str, context: int | None, cache_type: str
) -> None:
    compared = compare(agent, model_id, context, cache_type)
    assert abs(compared.error) <= MOST_ERROR, compared


def test_what_was_measured_is_nearer_and_outlives_the_agent(agent: AgentProcess) -> None:
    compared = compare(agent, SMOLLM2, 2048, "f16")
    path = f"/api/models/{SMOLLM2}/memory"
    measured = agent.must("GET", path)["need"]
    assert measured["basis"] == "measured"
    assert measured["hostBytes"] == pytest.approx(compared.used, rel=0.1)
    agent.stop()
    agent.start()
    agent.wait_settled()
    assert agent.must("GET", path)["need"] == measured


def test_a_server_that_an_agent_before_started_is_measured_as_one_that_has_served(agent: AgentProcess) -> None:
    path = f"/api/models/{SMOLLM2}"
    agent.must("PUT", f"{path}/settings", {"ctxSize": 3072})
    agent.must("POST", f"/api/models/servers/{SMOLLM2}/start?wait=60")
    agent.stop()
    store = agent.folder / "state" / "memory.json"
    store.unlink(missing_ok=True)
    agent.start()
    agent.wait_settled()
    wait_until(lambda: agent.must("GET", f"{path}/memory")["need"]["basis"] == "measured", "it is measured")
    (entry,) = json.loads(store.read_bytes())["measured"].values()
    assert entry["anonymous_at_ready"] is None
    assert entry["anonymous_later"] > 0
    agent.must("POST", f"/api/models/servers/{SMOLLM2}/stop?wait=60")
    agent.must("PUT", f"{path}/settings", {})


def test_a_file_that_went_is_a_reason(agent: AgentProcess, tmp_path: Path) -> None:
    draft = agent.models / "memory-draft.gguf"
    draft.write_bytes(locations.SMOLLM2.read_bytes())
    wait_until(lambda: "memory-draft" in agent.must("GET", "/api/models/registry")["models"], "the draft is found")
    path = f"/api/models/{GEMMA}"
    alone = agent.must("GET", f"{path}/memory")["need"]
    agent.must("PUT", f"{path}/settings", {"draftModel": str(draft)})
    both = agent.must("GET", f"{path}/memory")["need"]
    assert alone["parts"]["draft"]["hostBytes"] == 0
    assert both["parts"]["draft"]["hostBytes"] > locations.SMOLLM2.stat().st_size
    draft.unlink()
    told = agent.must("GET", f"{path}/memory")
    assert told["need"] is None
    assert told["problem"] == f"{draft} cannot be read: No such file or directory"
