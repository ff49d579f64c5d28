"""An agent killed at any moment of a save leaves a registry that is whole, and no older than what it answered."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from magi_agent.registry.stored import read_registry

# For each line on its input it makes a child that saves for ever, and says each choice once it was answered; the
# number goes up, and so does every model's port. "gone" stands where the child is.
SAVE_FOR_EVER = """
import asyncio, os, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, ".")
from magi_agent.events import EventStream
from magi_agent.registry.registry import Registry
from tests.registry.model_facts import facts_at

async def save_for_ever():
    registry = Registry(Path(sys.argv[1]), EventStream())
    await registry.load()
    await registry.merge([facts_at(f"/m/m{number}.gguf") for number in range(200)], ())
    first = registry.model("m0").choices.port or 0
    print(os.getpid(), flush=True)
    for port in range(first + 1, 60_000):
        await registry.choose_for_all(lambda model: replace(model.choices, port=port), active_profile=str(port))
        print(port, flush=True)

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        asyncio.run(save_for_ever())
    os.waitpid(child, 0)
    print("gone", flush=True)
"""
ROUNDS = 30


def test_thirty_kills_lose_nothing_that_was_answered(tmp_path):
    path = tmp_path / "registry.json"
    random_ = random.Random(30)
    answered = 0
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for _ in range(ROUNDS):
            parent.stdin.write("\n")
            parent.stdin.flush()
            agent = int(parent.stdout.readline())
            time.sleep(random_.random() * 0.05)  # the moment is the matter here
            os.kill(agent, signal.SIGKILL)
            while (line := parent.stdout.readline().strip()) != "gone":
                answered = int(line)
            reading = read_registry(path.read_bytes())
            assert reading.problems == ()
            assert len(reading.content.models) == 200
            ports = {model.choices.port or 0 for model in reading.content.models.values()}
            assert len(ports) == 1
            # The one that was on its way may have arrived.
            assert ports <= {answered, answered + 1}
            answered = ports.pop()
            assert reading.content.active_profile == (str(answered) if answered else None)
            assert len(list(tmp_path.iterdir())) <= 2
        parent.stdin.close()
    assert answered > ROUNDS
