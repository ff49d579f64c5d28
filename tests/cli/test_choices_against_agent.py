"""The commands for choices, `magictl show` and its like against a real agent, with toy models on a real systemd."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.agent_process import AgentProcess, ended, unit_property, units, wait_until
from tests.cli.terminal import MAGICTL, lines_left, on_terminal, piped, shown, surroundings, without_control
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

PREFIX = "cli-choices"
CHAT, DRAFT = f"{PREFIX}-chat", f"{PREFIX}-draft"
PATTERN = f"magi-llama-{PREFIX}-*.service"
UNIT = f"magi-llama-{CHAT}.service"


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory,
    toy_model: MakeToyModel,
    llama_server: Path,
    unused_ports: PortRanges,
    systemd_user: SystemdUser,
) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("cli-choices")
    models = folder / "models"
    toy_model(models / f"{CHAT}.gguf")
    toy_model(models / f"{DRAFT}.gguf", name="draft", seed=2)
    agent = AgentProcess(folder, models, unused_ports(5), llama_server, {"MAGI_ALLOWED_FLAGS": "--no-warmup"})
    with ended(agent, PATTERN):
        agent.start()
        agent.wait_settled()
        yield agent


@pytest.fixture
def agent(service: AgentProcess) -> Iterator[AgentProcess]:
    """The agent with nothing chosen, no profile and nothing running, before and after."""
    before = service.must("GET", "/api/export")
    yield service
    service.must("PUT", "/api/drain", {"draining": False})
    service.must("PUT", "/api/models/port-range", {"portRange": None})
    service.must("POST", "/api/import", before)
    for model_id in (CHAT, DRAFT):
        service.must("PUT", f"/api/models/{model_id}/enabled", {"enabled": False})
    wait_until(
        lambda: service.must("POST", "/api/models/servers/stop-all?wait=30")["status"] == "succeeded", "all stopped"
    )


@pytest.fixture
def environment(agent: AgentProcess, systemd_user: SystemdUser) -> dict[str, str]:
    return surroundings(MAGI_SOCKET=str(agent.socket), MAGI_JOURNAL_DIRECTORY=str(systemd_user.journal))


def chosen(agent: AgentProcess, model_id: str) -> dict[str, Any]:
    settings = agent.must("GET", f"/api/models/{model_id}/settings")["runtimeSettings"]
    return {key: value for key, value in settings.items() if value is not None}


def arguments() -> list[str]:
    """The command line of the server that runs."""
    return Path(f"/proc/{unit_property(UNIT, 'MainPID')}/cmdline").read_text().split("\0")


def listens_after(place: int) -> Callable[[str], bool]:
    """The condition that a log says behind ``place`` that its server listens."""
    return lambda output: "listening on http" in output[place:]


def test_settings_are_chosen_shown_and_applied(agent: AgentProcess, environment: dict[str, str]) -> None:
    told = piped("settings", CHAT, "ctx_size=1k", "nThreads=1", "memory_max=2G", environment=environment)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.splitlines()[0] == f"✓ {CHAT} has 3 settings of its own"
    assert chosen(agent, CHAT) == {"ctxSize": 1024, "nThreads": 1, "memoryMax": 2 << 30}

    assert piped("start", CHAT, environment=environment).returncode == 0
    assert "--ctx-size\n1024" in "\n".join(arguments())
    assert unit_property(UNIT, "MemoryMax") == str(2 << 30)

    changed = piped("settings", CHAT, "ctx_size=512", "--unset", "n_threads", environment=environment)
    assert changed.returncode == 0
    assert "! restart due: " in changed.stderr
    assert f"to do it: magictl restart {CHAT}" in changed.stderr
    assert "restart due" in piped("show", CHAT, environment=environment).stdout

    applied = piped("settings", CHAT, "parallel_slots=1", "--now", environment=environment)
    assert applied.returncode == 0, applied.stderr
    assert f"✓ {CHAT} ready on port " in applied.stdout
    assert "--ctx-size\n512" in "\n".join(arguments())

    sheet = piped("settings", CHAT, environment=environment).stdout
    assert "  ctx_size        512  (set for the model)\n" in sheet
    assert "  memory_max      2G  (set for the model)\n" in sheet
    assert json.loads(piped("settings", CHAT, "--json", environment=environment).stdout) == agent.must(
        "GET", f"/api/models/{CHAT}/settings"
    )

    cleared = piped("settings", CHAT, "--clear", environment=environment)
    assert cleared.stdout == f"✓ {CHAT} has no settings of its own\n"
    assert chosen(agent, CHAT) == {}


def test_what_the_host_does_not_take_is_said_setting_by_setting(
    agent: AgentProcess, environment: dict[str, str]
) -> None:
    for words, field in (
        (["extra_flags=--temp=0.5"], "extra_flags"),
        (["extra_flags=--no-such-flag-at-all"], "extra_flags"),
        (["draft_model=/etc/passwd"], "draft_model"),
        (["n_threads=5000"], "n_threads"),
        (["memory_high=2G", "memory_max=1G"], "memory_high"),
        (["binary=canary"], "binary"),
    ):
        told = piped("settings", CHAT, *words, environment=environment)

        assert told.returncode == 1, words
        assert field in told.stderr
        assert chosen(agent, CHAT) == {}


def test_what_differs_is_restarted_and_nothing_else(agent: AgentProcess, environment: dict[str, str]) -> None:
    assert piped("restart", "--changed", environment=environment).stdout == "no server is due for a restart\n"
    assert piped("start", CHAT, DRAFT, environment=environment).returncode == 0
    assert piped("settings", CHAT, "ctx_size=256", environment=environment).returncode == 0
    before = unit_property(f"magi-llama-{DRAFT}.service", "MainPID")

    told = piped("restart", "--changed", environment=environment)

    assert (told.returncode, told.stdout) == (0, f"✓ {CHAT} ready\n")
    assert "--ctx-size\n256" in "\n".join(arguments())
    assert unit_property(f"magi-llama-{DRAFT}.service", "MainPID") == before


def test_behind_the_first_that_fails_no_other_is_restarted(agent: AgentProcess, environment: dict[str, str]) -> None:
    assert piped("start", CHAT, DRAFT, environment=environment).returncode == 0
    assert piped("settings", CHAT, "chat_template={% no template", environment=environment).returncode == 0
    assert piped("settings", DRAFT, "ctx_size=256", environment=environment).returncode == 0
    before = unit_property(f"magi-llama-{DRAFT}.service", "MainPID")

    told = piped("restart", "--changed", environment=environment)

    assert told.returncode == 1
    failed, skipped = told.stdout.splitlines()
    assert failed.startswith(f"✗ {CHAT} ")
    assert skipped.startswith(f"- {DRAFT} skipped")
    assert unit_property(f"magi-llama-{DRAFT}.service", "MainPID") == before
    assert "  failed " in piped("show", CHAT, environment=environment).stdout


def test_tier_thinking_and_port_are_chosen_and_given_back(agent: AgentProcess, environment: dict[str, str]) -> None:
    def model() -> dict[str, Any]:
        answer: dict[str, Any] = agent.must("GET", f"/api/models/{CHAT}")
        return answer

    low, high = agent.port_range
    for words, key, value in (
        (["thinking", CHAT, "on"], "tierOverride", "powerful"),
        (["tier", CHAT, "fast"], "tierOverride", "fast"),
        (["tier", CHAT, "auto"], "tierOverride", None),
        (["thinking", CHAT, "auto"], "thinkingOverride", None),
        (["port", CHAT, str(high)], "port", high),
        (["port", CHAT, "auto"], "port", None),
    ):
        told = piped(*words, environment=environment)

        assert told.returncode == 0, told.stderr
        assert model()[key] == value

    assert piped("port", CHAT, str(high), environment=environment).returncode == 0
    taken = piped("port", DRAFT, str(high), environment=environment)
    assert taken.returncode == 1
    assert CHAT in taken.stderr
    assert piped("port", DRAFT, "1", environment=environment).returncode == 1

    narrowed = piped("port-range", f"{low}-{high - 1}", environment=environment)
    assert (narrowed.returncode, narrowed.stdout) == (0, f"✓ ports are given from {low}-{high - 1}\n")
    assert CHAT in narrowed.stderr
    assert piped("port-range", environment=environment).stdout == f"{low}-{high - 1}\n"
    assert piped("port-range", "default", environment=environment).returncode == 0
    assert piped("port-range", environment=environment).stdout == f"{low}-{high}\n"


def test_a_profile_is_made_planned_activated_edited_and_deleted(
    agent: AgentProcess, environment: dict[str, str], tmp_path: Path
) -> None:
    assert piped("enable", CHAT, "--now", environment=environment).returncode == 0
    made = piped("profile", "create", "Only Chat", "--from-current", environment=environment)
    assert (made.returncode, made.stdout.split("  ")[0]) == (0, "✓ only-chat with 1 model")
    assert piped("profile", "create", "other", "--model", DRAFT, environment=environment).returncode == 0

    plan = piped("profile", "activate", "other", "--dry-run", environment=environment)
    assert plan.returncode == 0
    for step, model_id in (("start", DRAFT), ("stop", CHAT), ("enable", DRAFT), ("disable", CHAT)):
        assert f"  {step:<12}  {model_id}\n" in plan.stdout
    assert agent.must("GET", "/api/models/profiles/active")["name"] is None

    done = piped("profile", "activate", "other", environment=environment)
    assert done.returncode == 0, done.stderr
    assert f"✓ {DRAFT} ready\n" in done.stdout
    assert f"✓ {CHAT} stopped\n" in done.stdout
    assert units(PATTERN).get(f"magi-llama-{DRAFT}.service") == "active"
    assert [line.split()[:2] for line in piped("profile", "list", environment=environment).stdout.splitlines()] == [
        ["PROFILE", "ACTIVE"], ["only-chat", "no"], ["other", "yes"]
    ]  # fmt: skip
    assert piped("profile", "active", environment=environment).stdout.startswith("other\n")

    editor = tmp_path / "editor"
    editor.write_text(
        f'#!/bin/sh\nsed -i "s/^runtime_settings: .*/runtime_settings: {{{DRAFT}: {{ctx_size: 256}}}}/" "$1"\n'
    )
    editor.chmod(0o755)
    edited = piped("profile", "edit", "other", environment={**environment, "EDITOR": str(editor)})
    assert edited.returncode == 0, edited.stderr
    sheet = piped("settings", DRAFT, environment=environment).stdout
    assert "256  (from the profile)" in sheet
    assert re.search(
        r"^  ctx_size +256$", piped("profile", "show", "other", environment=environment).stdout, re.MULTILINE
    )

    again = piped("profile", "activate", "other", environment=environment)
    assert again.returncode == 0
    assert "nothing had to change" in again.stdout
    assert "magictl restart --changed" in again.stderr

    refused = piped("profile", "delete", "other", environment=environment)
    assert refused.returncode == 1
    assert piped("profile", "activate", "only-chat", environment=environment).returncode == 0
    assert piped("profile", "delete", "other", environment=environment).stdout == "✓ other deleted\n"
    unknown = piped("profile", "show", "only", environment=environment)
    assert (unknown.returncode, unknown.stderr.endswith("did you mean only-chat?\n")) == (4, True)


def test_while_the_host_is_drained_nothing_is_started(agent: AgentProcess, environment: dict[str, str]) -> None:
    assert piped("drain", environment=environment).returncode == 0

    refused = piped("start", CHAT, environment=environment)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "draining: nothing is started" in piped("status", environment=environment).stdout
    assert units(PATTERN).get(UNIT) != "active"

    assert piped("drain", "--off", environment=environment).returncode == 0
    assert piped("start", CHAT, environment=environment).returncode == 0


def test_what_is_enabled_is_there_for_litellm(agent: AgentProcess, environment: dict[str, str]) -> None:
    assert piped("enable", CHAT, environment=environment).returncode == 0

    printed = piped("export", "litellm", "--api-base", "http://gpu-1:8000", environment=environment)

    assert printed.returncode == 0, printed.stderr
    listed = {one["model_name"]: one for one in yaml.safe_load(printed.stdout)["model_list"]}
    assert CHAT in listed
    assert any(name.startswith("tier:") for name in listed)
    assert "auto" in listed
    chat = listed[CHAT]
    assert chat["litellm_params"]["api_base"] == "http://gpu-1:8000/v1"
    assert chat["model_info"]["mode"] == "chat"
    assert chat["model_info"]["max_input_tokens"] > 0
    supports = {f"supports_{what}" for what in ("vision", "audio_input", "reasoning")}
    assert set(chat["model_info"]) == {"mode", "max_input_tokens", *supports}


def test_all_choices_go_into_a_file_and_come_back(
    agent: AgentProcess, environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "choices.json"
    assert piped("settings", CHAT, "ctx_size=256", environment=environment).returncode == 0
    assert piped("tier", DRAFT, "powerful", environment=environment).returncode == 0
    assert piped("export", str(file), environment=environment).returncode == 0
    low, high = agent.port_range
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "portRange": [low + 1, high]}))
    assert piped("settings", CHAT, "--clear", environment=environment).returncode == 0
    assert piped("tier", DRAFT, "auto", environment=environment).returncode == 0

    planned = piped("import", str(file), "--dry-run", environment=environment)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.endswith(f"2 models would change, 0 as before, ports from {low + 1} to {high}\n")
    assert chosen(agent, CHAT) == {}

    assert piped("import", str(file), environment=environment).returncode == 0
    assert chosen(agent, CHAT) == {"ctxSize": 256}
    assert agent.must("GET", f"/api/models/{DRAFT}")["tierOverride"] == "powerful"


def test_a_pasted_command_line_becomes_settings_that_a_server_runs_with(
    agent: AgentProcess, environment: dict[str, str]
) -> None:
    pasted = (
        f"llama-server -m {agent.models}/{CHAT}.gguf --port 9999 --host 0.0.0.0 \\\n  -c 768 -t 1 -np 1 --no-mmap"
        " --no-warmup --seed 7\n"
    )
    told = subprocess.run(
        [str(MAGICTL), "import", "-"],
        input=pasted, capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip
    assert told.returncode == 0
    # What agent.toml allows already is taken over, what it does not is suggested.
    assert told.stderr == (f"  once agent.toml allows the flags: magictl settings {CHAT} extra_flags=--seed=7\n")
    assert told.stdout.endswith(f"✓ {CHAT} has 5 settings of this\n")
    assert chosen(agent, CHAT) == {
        "ctxSize": 768, "nThreads": 1, "parallelSlots": 1, "mmap": False, "extraFlags": ["--no-warmup"]
    }  # fmt: skip

    assert piped("start", CHAT, environment=environment).returncode == 0
    words = arguments()
    assert words[words.index("--ctx-size") + 1] == "768"
    assert "--no-warmup" in words
    assert "9999" not in words
    assert "0.0.0.0" not in words


def test_a_model_on_one_sheet(agent: AgentProcess, environment: dict[str, str]) -> None:
    assert piped("start", CHAT, environment=environment).returncode == 0

    status, output = shown("show", CHAT, columns=80, environment=environment)
    as_json = json.loads(piped("show", CHAT, "--json", environment=environment).stdout)

    assert status == 0
    lines = lines_left(without_control(output).replace("\r", ""))
    assert lines[0] == f"{CHAT}  ready"
    assert [line for line in lines if line in {"Model", "Choices", "Settings", "Server"}] == [
        "Model", "Choices", "Settings", "Server"
    ]  # fmt: skip
    assert all(len(line) <= 80 or str(agent.models) in line for line in lines)
    assert f"  unit           {UNIT}" in lines
    assert as_json["model"]["modelId"] == as_json["settings"]["modelId"] == CHAT


def test_a_shell_is_offered_what_the_agent_has(agent: AgentProcess, environment: dict[str, str]) -> None:
    agent.must("POST", "/api/models/profiles", {"name": f"{PREFIX}-profile"})
    asking = {**environment, "_MAGICTL_COMPLETE": "bash_complete"}

    models = piped(environment={**asking, "COMP_WORDS": f"magictl show {PREFIX}", "COMP_CWORD": "2"})
    profiles = piped(environment={**asking, "COMP_WORDS": f"magictl profile show {PREFIX}", "COMP_CWORD": "3"})
    agent.must("DELETE", f"/api/models/profiles/{PREFIX}-profile")

    assert models.stdout == f"plain,{CHAT}\nplain,{DRAFT}\n"
    assert profiles.stdout == f"plain,{PREFIX}-profile\n"


def test_a_followed_log_goes_on_with_the_next_agent(agent: AgentProcess, environment: dict[str, str]) -> None:
    assert piped("start", CHAT, environment=environment).returncode == 0
    with on_terminal("logs", CHAT, "-f", "-n", "1", environment=environment) as terminal:
        terminal.wait_for(lambda output: "\n" in output, "the last line so far")
        agent.stop()
        os.kill(int(unit_property(UNIT, "MainPID")), signal.SIGKILL)  # systemd starts it again
        listens_anew = listens_after(len(terminal.output))
        agent.start()
        terminal.wait_for(listens_anew, "what was said while no agent was there")
        listens_anew = listens_after(len(terminal.output))
        os.kill(int(unit_property(UNIT, "MainPID")), signal.SIGKILL)
        terminal.wait_for(listens_anew, "what is said since")
        terminal.type("\x03")
        terminal.end()
    agent.wait_settled()
