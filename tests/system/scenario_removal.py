"""What removing the package ends, and what purging it leaves."""

from __future__ import annotations

import re

import pytest

from tests.system.host import TCP, Host, unit_of

_STATE = "/var/lib/magi-agent"
_NOT_OURS = re.compile(
    r"/(dev|proc|run|sys|tmp)/|/var/(backups|cache|log|tmp)/|/var/lib/(apt|dpkg|systemd|dbus)/|/models/"
    # The users stay, as Debian's policy has it: files may be theirs.
    r"|/etc/(group|gshadow|passwd|shadow|subuid|subgid)-?$|/etc/\.pwd\.lock$"
)


def _files(host: Host) -> set[str]:
    listed = host.output("find", "/", "-xdev", "-not", "-path", "/proc/*")
    return {path for path in listed.splitlines() if not _NOT_OURS.match(f"{path}")}


def _sums(host: Host, folder: str) -> str:
    return host.output("find", folder, "-type", "f", "-exec", "sha256sum", "{}", "+")


def test_removing_the_package_stops_the_models_and_keeps_what_people_chose(serving: Host) -> None:
    serving.must("PUT", "/api/models/toy/tier", {"tier": "powerful"})
    serving.write("/etc/default/magi-agent", "# Ours.\n")
    url = serving.until_ready("toy", within=5)["url"]

    serving.apt("remove", "magi-agent", within=60)

    assert {unit: state for unit, state in serving.units().items() if state != "inactive"} == {}
    assert serving.ask("GET", "/health", by=url).status == 0
    assert serving.ask("GET", "/", by=TCP).status == 0
    assert serving.run("pgrep", "--list-full", "llama-server|magi", check=False).stdout == ""
    assert serving.output("cat", "/etc/default/magi-agent") == "# Ours."

    serving.apt("install", serving.parts.package)
    serving.until_ready("toy", within=30)
    assert serving.models()["toy"]["tierOverride"] == "powerful"
    assert serving.output("cat", "/etc/default/magi-agent") == "# Ours."


def test_purging_the_package_leaves_nothing_but_the_models(bare: Host) -> None:
    before = _files(bare)
    bare.apt("install", bare.parts.package)
    bare.add_model("toy.gguf", "toy")
    models = _sums(bare, "/models")
    bare.must("PUT", "/api/models/toy/enabled?apply=true", {"enabled": True}, within=30)
    bare.until_ready("toy", within=30)
    bare.must("POST", "/api/models/profiles", {"name": "Ours", "enabledModels": ["toy"]})
    bare.run("magictl", "token", "add", "front-end", "--scope", "read")
    assert _files(bare) - before

    bare.apt("purge", "magi-agent", within=60)

    assert _files(bare) - before == set()
    assert before - _files(bare) == set()
    assert _sums(bare, "/models") == models
    assert bare.units() == {}
    assert bare.output("systemctl", "--failed", "--plain", "--no-legend") == ""
    assert bare.run("dpkg-query", "--show", "magi-agent", check=False).stdout == ""


def test_models_below_the_agents_own_state_outlive_a_purge(serving: Host) -> None:
    serving.run("install", "-D", "--mode=0644", "-t", f"{_STATE}/models", serving.parts.samples / "other.gguf")
    # As a download program keeps weights: without a name that says what they are.
    serving.write(f"{_STATE}/.cache/huggingface/blobs/0123abcd", "weights")
    serving.apt("purge", "magi-agent", within=60)
    assert sorted(serving.output("find", _STATE, "-type", "f").splitlines()) == [
        f"{_STATE}/.cache/huggingface/blobs/0123abcd",
        f"{_STATE}/models/other.gguf",
    ]
    assert unit_of("toy") not in serving.units()


def _fail_for_good(host: Host, unit: str) -> None:
    """End a server again and again, until systemd no longer starts it."""

    def failed() -> bool:
        # Between two attempts there is nothing to kill.
        host.run("systemctl", "kill", "--signal=KILL", unit, check=False)
        return host.property(unit, "ActiveState") == "failed"

    host.until(failed, "systemd has given up", 30)


@pytest.mark.parametrize("how", ["remove", "purge"])
def test_a_model_that_has_failed_leaves_no_unit_behind(serving: Host, how: str) -> None:
    unit = unit_of("toy")
    _fail_for_good(serving, unit)

    serving.apt(how, "magi-agent", within=60)

    assert serving.units("magi-llama-*") == {}
    assert serving.property(unit, "LoadState") == "not-found"
    assert serving.run("systemctl", "cat", unit, check=False).returncode != 0
    assert serving.output("systemctl", "--failed", "--plain", "--no-legend") == ""
