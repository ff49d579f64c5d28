"""An agent that was taken over: somebody who runs as its user, and asks the launcher for what they want."""

from __future__ import annotations

import json
from typing import Any

from tests.system.host import STRANGER, Host, unit_of

_AGENT = "magi-agent"
_LAUNCHER = "magi-launcher.service"
_ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as channel:
    channel.settimeout(60)
    channel.connect("/run/magi-launcher/launcher.sock")
    channel.sendall(sys.stdin.buffer.read())
    print(channel.makefile().readline())
"""
_SECRET = "/srv/secrets/secret.gguf"


def ask(host: Host, *, user: str = _AGENT, **fields: Any) -> dict[str, Any]:
    """What the launcher answers."""
    said = host.run("python3", "-c", _ASK, user=user, stdin=json.dumps(fields) + "\n", within=70).stdout
    answer: dict[str, Any] = json.loads(said)
    return answer


def start(host: Host, path: str, model_id: str = "late", **other: Any) -> dict[str, Any]:
    """What the launcher answers to who wants a model started from ``path``."""
    fields = {"display_name": "x", "model_path": path, "projector_path": None, "port": 8099, "settings": {}, **other}
    return ask(host, verb="start", model_id=model_id, **fields)


def times_loaded(host: Host, unit: str) -> int:
    """How often the unit's server has loaded its model since the host's boot."""
    return host.journal(f"--unit={unit}", "--boot").count("model loaded")


def test_a_link_that_is_swapped_behind_the_launchers_back_leads_nowhere(serving: Host) -> None:
    serving.run("install", "-D", "--mode=0644", serving.parts.samples / "toy.gguf", _SECRET)
    serving.run("ln", "--symbolic", "toy.gguf", "/models/late.gguf")
    assert start(serving, "/models/late.gguf") == {"result": "done"}
    unit = unit_of("late")
    serving.until(lambda: times_loaded(serving, unit) == 1, "it is loaded", 20)

    serving.run("ln", "--symbolic", "--force", "--no-target-directory", _SECRET, "/models/late.gguf")
    serving.run("systemctl", "kill", "--signal=SIGKILL", unit)
    serving.until(lambda: serving.property(unit, "ActiveState") == "failed", "systemd has given up", 30)

    assert times_loaded(serving, unit) == 1
    assert ask(serving, verb="clear", model_id="late") == {"result": "done"}
    refused = start(serving, "/models/late.gguf")["error"]
    assert refused["kind"] == "Refused"
    assert "leads out of the model folders" in refused["message"]


def test_nothing_but_servers_of_models_can_be_had(serving: Host) -> None:
    for fields in (
        {"verb": "exec", "argv": ["/bin/sh"]},
        {"verb": "stop", "model_id": "../ssh"},
        {"verb": "probe", "binary": "/bin/sh"},
        {"verb": "probe", "question": "devices", "binary": "/bin/sh"},
        {"verb": "probe", "question": "figures", "binary": "/opt/llama.cpp/llama-server"},
        {"verb": "probe", "question": "--version", "binary": "/opt/llama.cpp/llama-server"},
        {"verb": "start", "model_id": "x", "user": "root"},
    ):
        assert ask(serving, **fields)["error"]["kind"] == "Refused", fields
    for path, other in (
        ("/etc/shadow", {}),
        ("/var/lib/magi-agent/x.gguf", {}),
        ("/models/../etc/x.gguf", {}),
        ("/models/toy.gguf", {"port": 22}),
        ("/models/toy.gguf", {"settings": {"extra_flags": ["--host=0.0.0.0"]}}),
        ("/models/toy.gguf", {"settings": {"binary": "/bin/sh"}}),
    ):
        assert start(serving, path, **other)["error"]["kind"] in {"Refused", "SettingsNotUsable"}, (path, other)
    assert serving.property(unit_of("late"), "LoadState") == "not-found"


def test_nobody_else_may_ask(serving: Host) -> None:
    for user in (STRANGER, "magi-llama"):
        ran = serving.run("python3", "-c", _ASK, user=user, stdin="{}\n", check=False)
        assert "PermissionError" in ran.stderr
    assert serving.property(unit_of("toy"), "ActiveState") == "active"


def test_a_server_sees_the_model_folders_and_no_other_files_of_people(serving: Host) -> None:
    serving.run("install", "-D", "--mode=0644", serving.parts.samples / "toy.gguf", _SECRET)
    serving.write("/home/alice/letter", "dear")
    serving.write("/var/lib/other/data", "1")
    inside = ["nsenter", f"--target={serving.main_pid(unit_of('toy'))}", "--mount", "--"]
    assert serving.output(*inside, "ls", "/models") == "toy.gguf"
    for path in (_SECRET, "/home/alice/letter", "/var/lib/other/data", "/var/lib/magi-agent/model_registry.json"):
        serving.run("test", "-e", path)
        assert serving.run(*inside, "test", "-e", path, check=False).returncode == 1, path
    assert serving.run(*inside, "sh", "-c", "echo x > /models/x", check=False).returncode != 0
    assert serving.run(*inside, "sh", "-c", "echo x > /etc/x", check=False).returncode != 0


def test_a_folder_that_is_swapped_behind_the_launchers_back_leads_nowhere(serving: Host) -> None:
    shipped = serving.run("cat", "/etc/magi-agent/agent.toml").stdout
    serving.write(
        "/etc/magi-agent/agent.toml",
        shipped.replace("[discovery]\n", '[discovery]\nmodel_scan_path = "/models:/srv/models"\n'),
    )
    toy = serving.parts.samples / "toy.gguf"
    serving.run("install", "-D", "--mode=0644", toy, "/srv/models/late.gguf")
    serving.run("install", "-D", "--mode=0644", toy, "/srv/models/beside/projector.gguf")
    serving.write("/home/bob/letters/letter", "dear")
    serving.run("chmod", "0700", "/home/bob")
    chosen = {"projector": "none"}
    answer = start(
        serving, "/srv/models/late.gguf", projector_path="/srv/models/beside/projector.gguf", settings=chosen
    )
    assert answer == {"result": "done"}
    unit = unit_of("late")
    serving.until(lambda: times_loaded(serving, unit) == 1, "it is loaded", 20)

    serving.run("rm", "--recursive", "/srv/models/beside")
    serving.run("ln", "--symbolic", "/home/bob/letters", "/srv/models/beside")
    serving.run("systemctl", "kill", "--signal=SIGKILL", unit)
    # A main process that has only just been forked is still in PID 1's own namespace: its word tells that it is not.
    serving.until(lambda: times_loaded(serving, unit) == 2, "systemd has started it again, and it is loaded", 20)

    inside = ["nsenter", f"--target={serving.main_pid(unit)}", "--mount", "--"]
    serving.run("test", "-e", "/srv/models/beside/letter")
    assert serving.run(*inside, "test", "-e", "/srv/models/beside/letter", check=False).returncode == 1
