"""A thousand changes of settings, with the agent killed in between: what was answered holds, and nothing is half."""

from __future__ import annotations

import http.client
import os
import random
import threading
from pathlib import Path

import pytest

from tests.agent_process import AgentProcess, ended
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

CHANGES = int(os.environ.get("MAGI_TEST_CHANGES", "1000"))
SEED = int(os.environ.get("MAGI_TEST_SEED", str(random.randrange(1_000_000))))
CHANGES_A_KILL = 40
IDS = [f"changed-{number}" for number in range(3)]


def settings_of(number: int) -> dict[str, object]:
    """The settings of one change, any of which tells the number."""
    return {
        "ctxSize": number,
        "batchSize": number + 1,
        "aliases": [f"changed-alias-{number}"],
        "extraFlags": None,
        "memoryMax": number * 4096 + 1,
        "chatTemplate": f"{{# {number} #}}" * 20,
    }


@pytest.mark.timeout(600)
def test_a_thousand_changes_and_kills_between_them(
    tmp_path: Path,
    toy_model: MakeToyModel,
    llama_server: Path,
    unused_ports: PortRanges,
    systemd_user: SystemdUser,
) -> None:
    chance = random.Random(SEED)
    models = tmp_path / "models"
    models.mkdir()
    for model_id in IDS:
        toy_model(models / f"{model_id}.gguf")
    scope = {"MAGI_SYSTEMD_SCOPE": "user", "MAGI_JOURNAL_DIRECTORY": str(systemd_user.journal)}
    agent = AgentProcess(tmp_path, models, unused_ports(4), llama_server, scope)
    answered = dict.fromkeys(IDS, 0)
    made = kills = 0
    with ended(agent, "magi-llama-changed-*.service"):
        while made < CHANGES:
            agent.start()
            agent.wait_settled()
            for model_id in IDS:
                chosen = agent.must("GET", f"/api/models/{model_id}/settings")["runtimeSettings"]
                said = {name: value for name, value in chosen.items() if value is not None}
                # The one that was on its way when the agent died may have arrived.
                possible = [
                    {k: v for k, v in settings_of(n).items() if v is not None} for n in (answered[model_id], made + 1)
                ]
                assert said in (possible if answered[model_id] else [{}, possible[1]]), f"seed {SEED}"
                answered[model_id] = chosen["ctxSize"] or 0
            made = max(made, *answered.values())
            killer = threading.Timer(chance.uniform(0.0, 0.25), agent.kill)
            killer.start()
            try:
                for number in range(made + 1, made + 1 + CHANGES_A_KILL):
                    model_id = IDS[number % len(IDS)]
                    answer = agent.ask("PUT", f"/api/models/{model_id}/settings", settings_of(number))
                    assert answer.status == 200, answer.body
                    answered[model_id] = made = number
            except (OSError, http.client.HTTPException):
                pass  # killed
            killer.join()
            kills += 1
    assert kills >= CHANGES / CHANGES_A_KILL
