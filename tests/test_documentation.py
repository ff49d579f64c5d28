"""What the documentation says is so: every setting is in it, and every example works against a real agent."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import locations
import pytest

from magi_agent.runtime_settings.reading import ADAPTER
from magi_agent.runtime_settings.settings import setting_names, wire_name
from magi_agent.settings.table import SETTINGS
from magi_agent.tokens import Token, digest_of, line_of, new_secret
from magi_agent.vocabulary import TokenScope
from tests.agent_process import AgentProcess, ended, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

DOCS = locations.CHECKOUT / "docs"
MODEL = "documented"
TOKEN = new_secret()


def test_every_setting_is_in_the_table_as_the_code_has_it() -> None:
    text = (DOCS / "configuration.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+\.\w+` \| ", line)]

    assert rows == [
        f"| `{setting.section}.{setting.name}` | `{setting.variable}` | `{setting.option}` | "
        f"{f'`{setting.default}`' if setting.default else ''} | {setting.help} |"
        for setting in SETTINGS
    ]


def test_every_runtime_setting_is_in_its_table_as_the_schema_has_it() -> None:
    text = (DOCS / "configuration.md").read_text().partition("## Defaults of runtime settings")[2]
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+` \| ", line)]
    properties = ADAPTER.json_schema()["properties"]

    assert rows == [
        f"| `{name}` | `{wire_name(name)}` | {allowed(properties[wire_name(name)])} | "
        f"{properties[wire_name(name)]['description']} |"
        for name in setting_names()
    ]


def allowed(schema: Mapping[str, Any]) -> str:
    """What a value may be, for a person, where the schema says more than its type."""
    [kind] = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    if "$ref" in kind:
        return {"StartPolicy": "`alwaysOn`, `onDemand`, `manual`", "LoraAdapter": "`path`, `scale`"}[
            kind["$ref"].rpartition("/")[2]
        ]
    match kind["type"]:
        case "string":
            return ", ".join(f"`{word}`" for word in kind["enum"]) if "enum" in kind else "text"
        case "array":
            return f"list: {allowed(kind['items'])}"
        case "boolean":
            return "`true`, `false`"
        case _:
            low = kind.get("minimum", kind.get("exclusiveMinimum"))
            return f"{'above' if 'exclusiveMinimum' in kind else 'from'} {low:g}"


@pytest.fixture
def agent(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> Iterator[AgentProcess]:
    toy_model(tmp_path / "models" / f"{MODEL}.gguf")
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(2), llama_server)
    agent.settings["MAGI_TCP"] = f"127.0.0.1:{unused_ports()[0]}"
    (tmp_path / "tokens").write_text(f"{line_of(Token('docs', TokenScope.ADMIN, digest_of(TOKEN)))}\n")
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
        "TOKEN": TOKEN,
        "PATH": "/usr/bin:/bin",
    }
    answers = {}
    for example in examples:
        # What goes on until it is ended.
        goes_on = " -N " in example
        ending = "--max-time 1" if goes_on else "--show-error"
        run = subprocess.run(
            ["bash", "-c", f"{example} --silent {ending} --write-out '\n%{{http_code}}'"],
            env=variables, cwd=agent.folder, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        body, _, status = run.stdout.rpartition("\n")
        assert status in ("200", "201"), f"{example}: {run.stdout} {run.stderr}"
        if not goes_on:
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
        said = re.sub(r"\{(?!path\})\w+\}", word, path)
        assert said in text or path == "/api/docs", path
    for method, path in re.findall(r"^\| `(GET|PUT|POST|DELETE) (/\S+)` \|", text, re.MULTILINE):
        served = {re.sub(r"\{\w+\}", "{}", known): methods for known, methods in document["paths"].items()}
        assert method.lower() in served[re.sub(r"\{\w+\}", "{}", path)], (method, path)
