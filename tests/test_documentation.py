"""What the documentation says is so: every setting is in it, and every example works against a real agent."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import locations
import pytest

from magi_agent.settings import SETTINGS
from tests.agent_process import AgentProcess, ended, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

DOCS = locations.CHECKOUT / "docs"
MODEL = "documented"


def test_every_setting_is_in_the_table_as_the_code_has_it() -> None:
    text = (DOCS / "configuration.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+\.\w+` \| ", line)]

    assert rows == [
        f"| `{setting.section}.{setting.name}` | `{setting.variable}` | `{setting.option}` | "
        f"{f'`{setting.default}`' if setting.default else ''} | {setting.help} |"
        for setting in SETTINGS
    ]


@pytest.fixture
def agent(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> Iterator[AgentProcess]:
    toy_model(tmp_path / "models" / f"{MODEL}.gguf")
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(2), llama_server)
    agent.settings["MAGI_TCP"] = f"127.0.0.1:{unused_ports()[0]}"
    with ended(agent, f"magi-llama-{MODEL}.service"):
        agent.start()
        wait_until(lambda: not agent.ask("GET", "/health/ready").body["scanning"], "the first scan")
        yield agent


def test_every_example_of_the_api_works_as_it_stands(agent: AgentProcess) -> None:
    examples = re.findall(r"^\$ (curl .*)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert len(examples) > 20
    variables = {
        "S": str(agent.socket),
        "T": f"http://{agent.settings['MAGI_TCP']}",
        "ID": MODEL,
        "PATH": "/usr/bin:/bin",
    }
    answers = {}
    for example in examples:
        run = subprocess.run(
            ["bash", "-c", f"{example} --silent --show-error --write-out '\n%{{http_code}}'"],
            env=variables, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        body, _, status = run.stdout.rpartition("\n")
        assert status in ("200", "201"), f"{example}: {run.stdout} {run.stderr}"
        answers[example] = json.loads(body)

    started = next(
        answer for example, answer in answers.items() if "start?wait" in example and "restart" not in example
    )
    assert started["server"]["state"] == "ready"


def test_every_path_of_the_documentation_is_in_the_openapi_document_and_the_other_way(agent: AgentProcess) -> None:
    document = agent.must("GET", "/api/openapi.json")
    text = (DOCS / "api.md").read_text().replace("$ID", "{id}").replace("night-shift", "{name}")
    for path in document["paths"]:
        word = "{name}" if "profiles" in path else "{tier}" if "tiers" in path else "{id}"
        said = re.sub(r"\{\w+\}", word, path)
        assert said in text or path == "/api/docs", path
    for method, path in re.findall(r"^\| `(GET|PUT|POST|DELETE) (/\S+)` \|", text, re.MULTILINE):
        served = {re.sub(r"\{\w+\}", "{}", known): methods for known, methods in document["paths"].items()}
        assert method.lower() in served[re.sub(r"\{\w+\}", "{}", path)], (method, path)
