"""`magictl doctor` on the agent's own units: real ones of the private manager, with a program that only waits."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from magi_agent.cli import doctor_agent, doctor_control_groups, doctor_ports, doctor_reach, doctor_sockets
from magi_agent.cli.address import SocketAddress
from magi_agent.cli.client import Client
from magi_agent.cli.doctor_findings import Finding, Result
from magi_agent.cli.doctor_patient import Patient
from magi_agent.host.control_groups import WANTED, Controllers
from magi_agent.vocabulary import Scope
from tests.conftest import PortRanges, SystemdUser

SERVICE, TCP, UNIX = "magi-agent.service", "magi-agent-tcp.socket", "magi-agent.socket"
WAITING = "ExecStart=/bin/sleep infinity\nExecStop=/bin/sleep 0.5"
"""It takes its time to stop, as an agent does."""
RESTART = f"systemctl --user restart {SERVICE} "


class Units:
    """The agent's units, as files of the private manager."""

    def __init__(self, runtime: Path, folder: Path, port: int) -> None:
        self._files = runtime / "systemd" / "user"
        self.folder = folder
        self.port = port
        self.path = folder / "api.sock"
        self.config = folder / "agent.toml"
        self.variables = folder / "variables"
        self.config.touch()

    def write(self, service: str = WAITING, tcp: str | None = None) -> None:
        unit = f"[Service]\n{service}\nEnvironmentFile=-{self.variables}\nEnvironment=MAGI_CONFIG={self.config}\n"
        sockets = {TCP: tcp or f"127.0.0.1:{self.port}", UNIX: str(self.path)}
        self._write({SERVICE: unit} | {name: self._socket(listen) for name, listen in sockets.items()})

    def drop_in(self, unit: str, text: str) -> None:
        self._write({f"{unit}.d/override.conf": text})

    def _write(self, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            (self._files / name).parent.mkdir(parents=True, exist_ok=True)
            (self._files / name).write_text(text)
        self.control("daemon-reload")

    def _socket(self, listen: str) -> str:
        return f"[Socket]\nListenStream={listen}\nService={SERVICE}\n[Install]\nWantedBy=sockets.target\n"

    def control(self, *words: str) -> int:
        return subprocess.run(["systemctl", "--user", *words], capture_output=True, timeout=60, check=False).returncode

    def state(self, unit: str) -> str:
        return subprocess.run(
            ["systemctl", "--user", "show", "--property=ActiveState", "--value", unit],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout.strip()  # fmt: skip

    def patient(self) -> Patient:
        return Patient(Client(SocketAddress(str(self.path))))

    def remove(self) -> None:
        self.control("kill", "--signal=KILL", SERVICE)
        self.control("stop", SERVICE, TCP, UNIX)
        self.control("disable", "--runtime", TCP, UNIX)
        for name in (SERVICE, TCP, UNIX):
            (self._files / name).unlink(missing_ok=True)
            shutil.rmtree(self._files / f"{name}.d", ignore_errors=True)
        self.control("daemon-reload")
        self.control("reset-failed")


@pytest.fixture
def units(systemd_user: SystemdUser, unused_ports: PortRanges, monkeypatch: pytest.MonkeyPatch) -> Iterator[Units]:
    monkeypatch.setenv("MAGI_SYSTEMD_SCOPE", "user")
    with tempfile.TemporaryDirectory(prefix="magi-doctor-test-") as folder:
        made = Units(systemd_user.runtime, Path(folder), unused_ports()[0])
        try:
            yield made
        finally:
            made.remove()


def of_sockets(units: Units) -> list[Finding]:
    return list(doctor_sockets.sockets(units.patient()))


def carried_out(mend: str | None) -> int:
    assert mend is not None
    return subprocess.run(shlex.split(mend), capture_output=True, timeout=60, check=False).returncode


def test_a_socket_whose_port_another_program_has_is_told_with_its_holder_and_what_works(units: Units) -> None:
    units.write()
    units.control("start", UNIX)
    with socket.create_server(("127.0.0.1", units.port)):
        assert units.control("start", TCP) != 0
        units.control("start", SERVICE)
        [found] = of_sockets(units)

    assert found.result is Result.FAILED
    address = f"127.0.0.1:{units.port}"
    assert found.found.startswith(f"{TCP} has failed (resources): {address}, where it is to listen, is held by python")
    assert f"(process {os.getpid()}" in found.found
    assert found.mend == (
        f"stop that, or: systemctl --user edit {TCP} (below [Socket] an empty ListenStream=, then "
        f"ListenStream=127.0.0.1: and another port); then: {RESTART}{TCP}"
    )
    [found] = of_sockets(units)
    assert found == Finding(Result.FAILED, f"{TCP} has failed (resources); nothing is in its way now", RESTART + TCP)
    assert units.control("start", TCP) != 0, "a socket can be started while its service runs"
    assert carried_out(found.mend) == 0
    assert of_sockets(units) == [Finding(Result.OK, f"systemd listens for the agent at {units.path} and {address}")]


def test_a_socket_that_was_stopped_is_missed_where_it_is_enabled_whoever_holds_what_it_had(units: Units) -> None:
    units.write()
    units.control("start", UNIX, TCP, SERVICE)
    units.control("stop", TCP)
    [found] = of_sockets(units)
    assert found == Finding(Result.OK, f"systemd listens for the agent at {units.path}")

    units.control("enable", "--runtime", TCP)
    [found] = of_sockets(units)
    assert found == Finding(Result.FAILED, f"{TCP} is enabled and inactive", RESTART + TCP)
    assert carried_out(found.mend) == 0
    assert [each.result for each in of_sockets(units)] == [Result.OK]


def test_a_socket_that_was_changed_since_its_start_is_told(units: Units, unused_ports: PortRanges) -> None:
    units.write()
    units.control("start", UNIX, TCP, SERVICE)
    other = unused_ports()[0]
    units.drop_in(TCP, f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{other}\n")

    [found] = of_sockets(units)

    said = f"{TCP} says 127.0.0.1:{other}, and nobody listens there: it was changed since its start"
    assert found == Finding(Result.FAILED, said, RESTART + TCP)
    assert carried_out(found.mend) == 0
    assert [each.result for each in of_sockets(units)] == [Result.OK]

    units.drop_in(TCP, "[Socket]\nListenStream=\n")
    [found] = of_sockets(units)
    assert found.found == f"systemd does not take {TCP} as it is (bad-setting)"


def test_what_is_in_a_socket_s_way_is_named(units: Units) -> None:
    units.write()
    units.path.mkdir()
    assert units.control("start", UNIX) != 0

    [found] = of_sockets(units)

    assert found.found == f"{UNIX} has failed (resources): {units.path} is there and is no socket"
    assert found.mend == f"sudo mv {units.path} {units.path}.old; then: {RESTART}{UNIX}"


def test_tcp_of_the_configuration_is_no_advice_where_socket_units_decide(units: Units) -> None:
    units.write()
    units.config.write_text(f"[api]\ntcp = '127.0.0.1:{units.port}'\n")
    with socket.create_server(("127.0.0.1", units.port)):
        told = [finding.found for finding in doctor_ports.ports(units.patient())]

    assert not any("the agent's own" in found for found in told), told


def test_asking_starts_no_agent_that_was_stopped(units: Units) -> None:
    units.write()
    units.control("start", UNIX)

    patient = units.patient()
    assert patient.agents_account is not None
    [found] = doctor_agent.agent(patient)
    [service] = [finding for finding in doctor_agent.service(patient) if finding.result is Result.FAILED]

    assert found.result is Result.UNKNOWN
    assert found.found.endswith(f"{SERVICE} does not run; it is not asked, as that would start it")
    assert service == Finding(Result.FAILED, f"{SERVICE} is inactive", "systemctl --user start magi-agent")
    time.sleep(0.3)
    assert units.state(SERVICE) == "inactive"


def test_a_service_that_fails_at_each_start_is_not_to_be_started_once_more(units: Units) -> None:
    units.write("ExecStart=/bin/false\nExecStopPost=/bin/sleep 20")
    units.control("start", "--no-block", SERVICE)
    deadline = time.monotonic() + 20
    while units.state(SERVICE) != "deactivating":
        assert time.monotonic() < deadline
        time.sleep(0.02)

    [found] = doctor_agent.service(units.patient())

    assert (found.result, found.found) == (Result.FAILED, f"{SERVICE} fails whenever it is started (exit-code)")
    assert found.mend == "journalctl --user-unit magi-agent -e; then: systemctl --user restart magi-agent"


def test_one_that_finishes_what_it_was_asked_before_it_stops_is_said_to(units: Units) -> None:
    units.write("ExecStart=/bin/sleep 600\nExecStop=/bin/sleep 20")
    units.control("start", SERVICE)
    units.control("stop", "--no-block", SERVICE)
    deadline = time.monotonic() + 20
    while units.state(SERVICE) != "deactivating":
        assert time.monotonic() < deadline
        time.sleep(0.02)

    [found] = doctor_agent.service(units.patient())

    assert (found.result, found.found) == (Result.WARNING, f"{SERVICE} is being stopped")


def test_servers_at_an_address_that_the_agent_s_sandbox_denies_are_told_with_the_drop_in(units: Units) -> None:
    units.write(f"{WAITING}\nIPAddressDeny=any\nIPAddressAllow=localhost")
    for host in ("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::"):
        units.config.write_text(f"[servers]\nllama_server_host = '{host}'\n")
        [found] = doctor_reach.reach(units.patient())
        assert found.result is Result.OK, host

    units.config.write_text("[servers]\nllama_server_host = '192.0.2.7'\n")
    [found] = doctor_reach.reach(units.patient())
    assert found.result is Result.WARNING
    assert found.found.startswith(f"servers are to listen at 192.0.2.7, and the sandbox of {SERVICE} lets the agent")
    assert found.mend == (
        f"systemctl --user edit {SERVICE} (below [Service] IPAddressAllow=192.0.2.7); "
        f"then: systemctl --user restart {SERVICE}"
    )

    units.drop_in(SERVICE, "[Service]\nIPAddressAllow=192.0.2.7\n")
    assert [each.result for each in doctor_reach.reach(units.patient())] == [Result.OK]
    units.config.write_text("[servers]\nllama_server_host = '192.0.2.8'\nserver_access = 'socket'\n")
    assert [each.result for each in doctor_reach.reach(units.patient())] == [Result.OK]


def test_the_file_that_counts_is_the_one_that_the_unit_names(units: Units) -> None:
    def judged() -> str:
        [found] = [each.found for each in doctor_agent.configuration(units.patient()) if each.result is Result.OK]
        return found

    units.write()
    assert judged() == f"{units.config}, which {SERVICE} names, is valid"
    by_file = units.folder / "by-file.toml"
    by_file.touch()
    units.variables.write_text(f"MAGI_CONFIG={by_file}\n")
    assert judged().startswith(f"{by_file}, which {SERVICE} names, is valid, with 1 variable of ")
    by_option = units.folder / "by-option.toml"
    by_option.touch()
    for written in (f"--config {by_option} --tcp off", f"--config={by_option}"):
        units.drop_in(SERVICE, f"[Service]\nExecStart=\nExecStart=/bin/sleep infinity {written}\n")
        assert judged().startswith(f"{by_option}, which {SERVICE} names, is valid")
    units.drop_in(SERVICE, "[Service]\nEnvironment=\nEnvironmentFile=\n")
    assert "the default, as magi-agent.service names no other" in judged()
    # Only in words like these is it the option.
    units.drop_in(
        SERVICE, f"[Service]\nEnvironment=\nEnvironmentFile=\nExecStart=\nExecStart=/bin/sleep x--config {by_option}\n"
    )
    assert "the default, as magi-agent.service names no other" in judged()


def test_what_a_variable_says_is_mended_where_it_is_said(units: Units) -> None:
    units.write()
    units.variables.write_text("MAGI_PORT_RANGE=nine\n")
    [found] = doctor_agent.configuration(units.patient())
    assert found.mend == f"sudoedit {units.variables}; then: systemctl --user restart magi-agent"

    units.variables.write_text("LLAMA_SERVER_PATH=/nowhere\n")
    units.config.write_text("[servers]\nport_range = 'nine'\n")
    [found] = doctor_agent.configuration(units.patient())
    assert found.mend == f"sudoedit {units.config}; then: systemctl --user reload-or-restart magi-agent"
    patient = units.patient()
    assert patient.changing("servers.llama_server_path").startswith(
        f"name another: LLAMA_SERVER_PATH in {units.variables}"
    )
    assert patient.changing("servers.port_range").startswith(f"name another: servers.port_range in {units.config};")

    units.variables.unlink()
    units.drop_in(SERVICE, "[Service]\nEnvironment=MAGI_PORT_RANGE=nine\n")
    [found] = doctor_agent.configuration(units.patient())
    assert found.mend is not None
    assert found.mend.startswith(f"systemctl --user edit {SERVICE} (below [Service] Environment=MAGI_PORT_RANGE=VALUE)")


ALL = Controllers(WANTED, is_unified=True)
NO_MEMORY = Controllers(("cpu", "io", "pids"), is_unified=True)
IN_LXC = "this is a container (lxc), which has what its host lets it have"
DELEGATE = "sudo systemctl edit user@.service (below [Service] Delegate=cpu io pids memory)"
FIRST_VERSION = Controllers(WANTED, is_unified=False)


@pytest.mark.parametrize(
    ("found", "at_root", "scope", "inside", "command_line", "mend"),
    [
        (NO_MEMORY, NO_MEMORY, Scope.SYSTEM, None, "quiet cgroup_disable=memory", "take cgroup_disable=memory"),
        (NO_MEMORY, NO_MEMORY, Scope.SYSTEM, None, "quiet", "boot a kernel that has them"),
        (NO_MEMORY, NO_MEMORY, Scope.SYSTEM, None, "cgroup_disable=pressure", "boot a kernel that has them"),
        (NO_MEMORY, NO_MEMORY, Scope.SYSTEM, "lxc", "cgroup_disable=memory", IN_LXC),
        (NO_MEMORY, ALL, Scope.USER, None, "", DELEGATE),
        (NO_MEMORY, NO_MEMORY, Scope.USER, "lxc", "", IN_LXC),
        (FIRST_VERSION, None, Scope.SYSTEM, None, "", "boot with systemd.unified_cgroup_hierarchy=1"),
        (FIRST_VERSION, None, Scope.SYSTEM, "lxc", "", "boot the host of this container (lxc) with"),
    ],
)  # fmt: skip
def test_controllers_that_are_not_there_are_had_where_they_can_be(
    found: Controllers, at_root: Controllers | None, scope: Scope, inside: str | None, command_line: str, mend: str
) -> None:
    told = doctor_control_groups.control_groups_finding(found, at_root, scope, inside, command_line)

    assert told.result is Result.WARNING
    assert told.mend is not None
    assert told.mend.startswith(mend)
