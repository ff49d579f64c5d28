"""The unit files that the package ships: what they promise, and what must agree with the code."""

from __future__ import annotations

import errno
import re
import subprocess
import tomllib
from pathlib import Path

import locations
import pytest

from magi_agent.settings.loading import load_settings
from magi_agent.systemd.sandbox import sandbox_entries
from magi_agent.systemd.transient import Sandbox
from magi_agent.vocabulary import Scope

UNITS = locations.CHECKOUT / "systemd"
DROP_IN = UNITS / "magi-llama-.service.d" / "50-sandbox.conf"
OLDEST_SYSTEMD = 252
LISTS = {"DeviceAllow", "SystemCallFilter"}
"""Settings that say more with each line; of the others the last line holds."""


def settings_of(file: Path, section: str) -> dict[str, list[str]]:
    """Every setting of a section of a unit file, with its values in order."""
    found: dict[str, list[str]] = {}
    current = ""
    for line in file.read_text().splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif current == section and line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def written(name: str, value: object) -> list[str]:
    """The value that a property has on the bus, as unit files say it: one string for each line."""
    match name, value:
        case ("RestrictNamespaces", 0):
            return ["yes"]
        case ("CapabilityBoundingSet" | "AmbientCapabilities", 0):
            return [""]
        case ("SystemCallErrorNumber", int(number)):
            return [errno.errorcode[number]]
        case ("DeviceAllow", list(devices)):
            return [f"{device} {access}" for device, access in devices]
        case (_, (bool(allowed), list(words))):
            return [("" if allowed else "~") + " ".join(words)]
        case (_, list(words)):
            return [" ".join(words)]
        case (_, True):
            return ["yes"]
        case (_, str(word)):
            return [word]
        case _:
            raise AssertionError(f"how is {name}={value!r} written in a unit file?")


def test_the_drop_in_is_the_sandbox_that_the_launcher_sends() -> None:
    table: dict[str, list[str]] = {}
    for entry in sandbox_entries(Sandbox.GPU, Scope.SYSTEM, OLDEST_SYSTEMD):
        table.setdefault(entry.name, []).extend(written(entry.name, entry.value))

    assert settings_of(DROP_IN, "Service") == table
    assert {name for name, values in table.items() if len(values) > 1} <= LISTS


def test_every_part_of_the_drop_in_says_what_it_is_for() -> None:
    paragraphs = DROP_IN.read_text().split("\n\n")

    assert len(paragraphs) > 8
    assert [text for text in paragraphs if not re.match(r"(\[\w+\]\n)?(Documentation=.*\n)?#", text)] == []


def test_a_server_waits_for_nvidias_nodes_and_does_not_depend_on_them() -> None:
    unit = settings_of(DROP_IN, "Unit")
    nodes = UNITS / "magi-nvidia-uvm.service"

    assert unit["Wants"] == unit["After"] == [nodes.name]
    assert unit.keys() == {"Documentation", "Wants", "After"}
    # A host without NVIDIA's driver pays nothing. Whether a node is missing the program itself finds out.
    conditions = {name: values for name, values in settings_of(nodes, "Unit").items() if name.startswith("Condition")}
    assert conditions == {"ConditionPathExists": ["/proc/driver/nvidia/version"]}
    # It is looked for only when the driver is loaded, which at the boot may take longer than to come so far.
    assert settings_of(nodes, "Unit")["Wants"] == ["modprobe@nvidia.service"]
    assert "modprobe@nvidia.service" in settings_of(nodes, "Unit")["After"][0].split()
    # Each server starts it: as many as there are.
    assert settings_of(nodes, "Unit")["StartLimitIntervalSec"] == ["0"]
    service = settings_of(nodes, "Service")
    assert float(service["TimeoutStartSec"][0]) + float(service["TimeoutStopSec"][0]) < 35
    # Not by a shell, here or there.
    assert service["ExecStart"] == ["/usr/libexec/magi-agent/magi-nvidia-nodes"]


def test_only_models_are_caught_by_the_drop_in() -> None:
    assert [unit.name for unit in UNITS.glob("magi-llama-*.*") if unit != DROP_IN.parent] == []


def exposure(unit: Path) -> float:
    """What `systemd-analyze security` says of a unit file, from 0 to 10."""
    report = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
        check=True,
        capture_output=True,
        text=True,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    ).stdout
    overall = re.search(r"Overall exposure level for \S+: ([\d.]+)", report)
    assert overall, report
    return float(overall[1])


class TestExposure:
    """Bounds for systemd 252, whose counting later versions hardly changed."""

    def test_of_the_agent(self) -> None:
        assert exposure(UNITS / "magi-agent.service") <= 1.5

    def test_of_the_launcher(self) -> None:
        assert exposure(UNITS / "magi-launcher.service") <= 1.8

    def test_of_a_server_that_may_use_gpus(self, tmp_path: Path) -> None:
        unit = tmp_path / "magi-llama-toy.service"
        unit.write_text("[Service]\nType=exec\nExecStart=/bin/true\nUser=magi-llama\nUMask=0077\n")
        (tmp_path / "magi-llama-toy.service.d").mkdir()
        (tmp_path / "magi-llama-toy.service.d" / DROP_IN.name).write_text(DROP_IN.read_text())

        assert exposure(unit) <= 1.8

    def test_of_what_makes_nvidias_device_nodes(self) -> None:
        # It has capabilities by its nature.
        assert exposure(UNITS / "magi-nvidia-uvm.service") <= 2.6

    def test_is_measured_with_the_drop_in(self, tmp_path: Path) -> None:
        unit = tmp_path / "magi-llama-toy.service"
        unit.write_text("[Service]\nType=exec\nExecStart=/bin/true\nUser=magi-llama\n")

        assert exposure(unit) > 8


class TestAgent:
    def test_what_the_configuration_and_the_units_both_name(self, tmp_path: Path) -> None:
        script = locations.CHECKOUT / "packaging" / "deb" / "agent-toml"
        shipped = tmp_path / "agent.toml"
        shipped.write_bytes(subprocess.check_output([script, locations.CHECKOUT / "etc" / "agent.toml"]))
        settings = load_settings({}, {}, shipped)
        service = settings_of(UNITS / "magi-agent.service", "Service")

        assert settings.registry_path.parent == Path("/var/lib") / service["StateDirectory"][0]
        assert settings.profiles_path == (Path("/etc/magi-agent/profiles"), Path("/var/lib/magi-agent/profiles"))
        assert service["WorkingDirectory"] == [str(settings.registry_path.parent)]
        assert settings.llama_server_user == "magi-llama"
        sockets = [settings_of(UNITS / f"magi-agent{kind}.socket", "Socket") for kind in ("", "-tcp")]
        assert [each["ListenStream"] for each in sockets] == [[str(settings.socket)], [str(settings.tcp)]]

    def test_only_those_keys_differ_from_the_defaults(self) -> None:
        script = locations.CHECKOUT / "packaging" / "deb" / "agent-toml"
        shipped = tomllib.loads(subprocess.check_output([script, locations.CHECKOUT / "etc" / "agent.toml"], text=True))

        assert {f"{section}.{key}" for section, keys in shipped.items() for key in keys} == {
            "registry.registry_path",
            "profiles.profiles_path",
            "servers.llama_server_user",
        }

    @pytest.mark.parametrize("unit", sorted(UNITS.glob("*.service")), ids=lambda unit: unit.name)
    def test_no_service_owns_the_folder_of_a_socket(self, unit: Path) -> None:
        """It would be removed, with the socket's file in it, whenever the service ends."""
        folders = {
            Path(address).parent
            for socket in UNITS.glob("*.socket")
            for address in settings_of(socket, "Socket")["ListenStream"]
            if address.startswith("/run/")
        }

        assert len(folders) == 2
        for owned in settings_of(unit, "Service").get("RuntimeDirectory", []):
            assert Path("/run") / owned not in folders

    def test_nothing_ties_the_models_to_the_agent(self) -> None:
        for section in ("Unit", "Service"):
            for values in settings_of(UNITS / "magi-agent.service", section).values():
                assert not any("magi-llama" in value for value in values)
