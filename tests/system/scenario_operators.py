"""What operators know of systemd holds for the models: status, logs, stop, the slice, reload, drop-ins."""

from __future__ import annotations

import re

from tests.system.host import STRANGER, Host, unit_of

_AGENT = "magi-agent.service"
_LAUNCHER = "magi-launcher.service"
_CONFIGURATION = "/etc/magi-agent/agent.toml"
_MOST = {_AGENT: 1.5, _LAUNCHER: 1.8, unit_of("toy"): 1.8}
"""The greatest exposure, of 10, that `systemd-analyze security` may find."""


def test_systemctl_and_journalctl_tell_about_a_model(serving: Host) -> None:
    unit = unit_of("toy")
    status = serving.output("systemctl", "status", "--no-pager", unit)
    assert "active (running)" in status
    assert "/usr/local/bin/llama-server" in status
    assert "model loaded" in serving.journal(f"--unit={unit}", "--boot")
    assert "server of toy is ready" in serving.journal("--boot", "MAGI_MODEL=toy")
    assert serving.property(unit, "Slice") == "magi-llama.slice"
    assert serving.output("systemctl", "is-active", "magi-llama.slice") == "active"


def test_stopping_the_slice_stops_every_model_and_nobody_fights_it(serving: Host) -> None:
    serving.add_model("other.gguf", "other")
    serving.must("POST", "/api/models/servers/other/start?wait=30", within=35)
    serving.until_ready("other", within=10)

    serving.run("systemctl", "stop", "magi-llama.slice", within=40)
    assert serving.units("magi-llama-*.service") == {}
    serving.run("systemctl", "restart", _AGENT)
    serving.until_api_answers(within=15)
    assert serving.units("magi-llama-*.service") == {}

    assert "enabled, and not wanted now; to start: magictl start toy" in serving.output("magictl", "status")
    assert "until somebody starts it (magictl start toy;" in serving.journal(f"--unit={_AGENT}", "--boot")
    serving.run("magictl", "start", "toy", "other", within=60)
    for model in ("toy", "other"):
        serving.until_ready(model, within=10)


def test_a_reload_takes_the_configuration_and_touches_no_model(serving: Host) -> None:
    pids = {unit: serving.main_pid(unit) for unit in (_AGENT, unit_of("toy"))}
    shipped = serving.run("cat", _CONFIGURATION).stdout
    serving.write(_CONFIGURATION, shipped.replace("[defaults]\n", "[defaults]\nctx_size = 256\n"))

    serving.run("systemctl", "reload", _AGENT)

    def restart_is_due() -> bool:
        server = serving.server("toy")
        return server is not None and "should be 256" in " ".join(server["restartReasons"])

    serving.until(restart_is_due, "the new default is a reason to restart", 10)
    assert {unit: serving.main_pid(unit) for unit in pids} == pids

    serving.write(_CONFIGURATION, "[defaults]\nctx_size = 'much'\n")
    serving.run("systemctl", "reload", _AGENT)
    serving.until(lambda: "ctx_size" in serving.output("systemctl", "status", "--no-pager", _AGENT), "it is said", 10)
    assert {unit: serving.main_pid(unit) for unit in pids} == pids


def test_a_drop_in_of_the_operator_holds_for_every_model(serving: Host) -> None:
    serving.write("/etc/systemd/system/magi-llama-.service.d/90-ours.conf", "[Service]\nNice=7\n")
    serving.run("systemctl", "daemon-reload")
    serving.must("POST", "/api/models/servers/toy/restart?wait=30", within=35)
    serving.until_ready("toy", within=10)
    assert serving.output("ps", "-o", "ni=", "-p", str(serving.main_pid(unit_of("toy")))).strip() == "7"


def test_a_folder_that_the_agent_may_not_read_is_named_with_the_command_that_helps(installed: Host) -> None:
    installed.run("install", "-D", "--mode=0644", "-t", "/models/private/deep", installed.parts.samples / "toy.gguf")
    installed.run("chmod", "0700", "/models/private")
    installed.must("POST", "/api/models/rescan")

    def said() -> str:
        return installed.output("journalctl", "--boot", "--output=cat", "--no-pager", f"--unit={_AGENT}")

    installed.until(lambda: "/models/private" in said(), "the journal names the folder", 10)
    command = next(iter(re.findall(r"(?:chmod|chgrp|setfacl) [^;`'\n]*/models/private\b", said())), None)
    assert command is not None, said()
    assert "/models/private" in installed.run("magictl", "status", check=False).stdout

    installed.run("sh", "-c", command.replace("sudo ", ""))
    installed.must("POST", "/api/models/rescan")
    installed.until(lambda: installed.models().get("toy", {}).get("status") == "ok", "the model is listed", 10)


def test_the_doctor_finds_a_new_host_healthy_and_says_what_was_broken(serving: Host) -> None:
    healthy = serving.run("magictl", "doctor", check=False)
    assert healthy.returncode == 0, healthy.stdout

    serving.run("chmod", "0700", "/models")
    serving.run("systemctl", "stop", "magi-launcher.socket")
    ill = serving.run("magictl", "doctor", check=False)
    assert ill.returncode == 1, ill.stdout
    wrong = " ".join(line for line in ill.stdout.splitlines() if line.startswith("✗"))
    assert "/models" in wrong, ill.stdout
    assert "launcher" in wrong, ill.stdout


def test_every_unit_is_confined_as_promised(serving: Host) -> None:
    # The launcher runs while it is needed.
    serving.must("POST", "/api/models/servers/toy/restart?wait=30", within=35)
    exposures = {}
    for unit in _MOST:
        said = serving.output("systemd-analyze", "security", "--no-pager", unit)
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
        assert found, said
        exposures[unit] = float(found[1])
    assert {unit: exposure for unit, exposure in exposures.items() if exposure > _MOST[unit]} == {}, exposures


def test_users_of_the_host_see_no_more_of_a_model_than_they_should(serving: Host) -> None:
    unit = unit_of("toy")
    shown = serving.output("systemctl", "show", unit, user=STRANGER)
    assert "ActiveState=active" in shown
    assert serving.run("systemctl", "stop", unit, user=STRANGER, check=False).returncode != 0
    assert serving.run("ls", "/var/lib/magi-agent", user=STRANGER, check=False).returncode != 0
    assert serving.run("curl", "--unix-socket", "/run/magi-launcher/launcher.sock", "http://x/", user=STRANGER,
                       check=False).returncode == 7  # fmt: skip
    assert serving.property(unit, "ActiveState") == "active"
