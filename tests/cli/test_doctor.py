"""`magictl doctor`, and what a service without rights says: a real agent of a real user in a unit of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from magi_agent.cli import doctor as doctor_module
from magi_agent.cli import doctor_agent, doctor_folders, doctor_host, doctor_ports, doctor_programs
from magi_agent.cli.address import SocketAddress
from magi_agent.cli.client import Client
from magi_agent.cli.doctor_findings import Finding, Result
from magi_agent.cli.doctor_patient import Patient
from magi_agent.host.accounts import Account
from magi_agent.host.gpu_devices import Tree
from magi_agent.settings.loading import load_settings
from tests.agent_process import AgentProcess, ended, wait_until
from tests.cli.terminal import MAGICTL, as_nobody, piped, surroundings
from tests.conftest import MakeToyModel, PortRanges, SystemdUser
from tests.host.other_users import ALICE, GROUP, PASSWD, READERS, SERVERS, SERVICE, beside_other_users

MODEL = "doctored"
AGENT = """
import encodings.idna, importlib.readers, os, pwd, sys
import magi_agent.agent, magi_agent.log_output
from magi_agent.cli.agent import main
# All this as root, for the interpreter's own files may lie where only root can look.
entry = pwd.getpwnam("magi-agent")
os.initgroups("magi-agent", entry.pw_gid); os.setgid(entry.pw_gid); os.setuid(entry.pw_uid)
sys.exit(main([]))
"""
_MOUNTS = 'mount --bind "$1" /etc/passwd && mount --bind "$2" /etc/group && shift 2 && exec "$@"'
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `magictl doctor` found."""

    status: int
    findings: list[dict[str, Any]]

    def of(self, check: str) -> list[tuple[str, str, str | None]]:
        return [(each["result"], each["found"], each["mend"]) for each in self.findings if each["check"] == check]

    def one(self, check: str) -> tuple[str, str, str | None]:
        [found] = self.of(check)
        return found


def examined(environment: Mapping[str, str]) -> Outcome:
    ran = piped("doctor", "--json", environment=environment)
    assert ran.stderr == ""
    told = json.loads(ran.stdout)
    assert sum(told[result.value] for result in Result) == len(told["findings"])
    return Outcome(ran.returncode, told["findings"])


def findings(made: Iterable[Finding]) -> list[tuple[Result, str, str | None]]:
    return [(finding.result, finding.found, finding.mend) for finding in made]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="magi-doctor-test-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


class UnprivilegedService:
    """An agent of the user magi-agent, as `magi-agent.service` of the private manager."""

    def __init__(self, folder: Path, agent: AgentProcess) -> None:
        self.folder = folder
        self.agent = agent
        self.variables = folder / "variables"
        self.config = folder / "agent.toml"

    def start(self) -> None:
        passwd, group = self.folder / "passwd", self.folder / "group"
        passwd.write_text(Path("/etc/passwd").read_text() + PASSWD)
        group.write_text(Path("/etc/group").read_text() + GROUP)
        settings = {
            name: value
            for name, value in self.agent.environment().items()
            if name not in os.environ or os.environ[name] != value
        }
        self.variables.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        for path in (self.folder / "state", self.folder / "profiles"):
            path.mkdir()
            os.chown(path, SERVICE, SERVICE)
        os.chown(self.folder, SERVICE, SERVICE)
        subprocess.run(
            ["systemd-run", "--user", "--quiet", "--unit=magi-agent.service",
             f"--property=EnvironmentFile={self.variables}",
             f"--setenv=PYTHONPATH={os.environ.get('PYTHONPATH', '')}", f"--working-directory={self.folder}",
             "--setenv=MAGI_SYSTEMD_SCOPE=user",
             "unshare", "--mount", "--propagation=private", "sh", "-c", _MOUNTS, "sh", passwd, group,
             sys.executable, "-c", AGENT],
            check=True, timeout=60,
        )  # fmt: skip
        try:
            wait_until(self.is_up, "the agent answers", 40)
        except AssertionError as error:
            error.add_note(self.log())
            raise

    def log(self, since: float = 0) -> str:
        return subprocess.run(
            ["journalctl", f"--directory={os.environ['MAGI_JOURNAL_DIRECTORY']}", f"--since=@{since:.0f}",
             "--output=cat", "SYSLOG_IDENTIFIER=magi-agent", "+", "_SYSTEMD_USER_UNIT=magi-agent.service",
             "+", "USER_UNIT=magi-agent.service"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip

    def is_up(self) -> bool:
        try:
            return self.agent.ask("GET", "/health/live").status == 200
        except OSError:
            return False

    def problems(self) -> list[str]:
        said: list[str] = self.agent.ask("GET", "/health/ready").body["problems"]
        return [problem for problem in said if str(self.agent.models) in problem]

    def examined(self) -> Outcome:
        """What `magictl doctor` finds where the service's users are known."""
        ran = beside_other_users(self.folder, [str(MAGICTL), "doctor", "--json"], self.environment())
        assert ran.stderr == ""
        return Outcome(ran.returncode, json.loads(ran.stdout)["findings"])

    def environment(self) -> dict[str, str]:
        return surroundings(
            MAGI_SOCKET=str(self.agent.socket),
            MAGI_SYSTEMD_SCOPE="user",
            **{name: os.environ[name] for name in ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")},
        )


@pytest.fixture
def service(
    systemd_user: SystemdUser, open_folder: Path, unused_ports: PortRanges, llama_server: Path, toy_model: MakeToyModel
) -> Iterator[UnprivilegedService]:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    home = open_folder / "alice"
    toy_model(home / "models" / f"{MODEL}.gguf")
    for path in (home, home / "models", home / "models" / f"{MODEL}.gguf"):
        os.chown(path, ALICE, ALICE)
    state = open_folder / "agent"
    state.mkdir(mode=0o755)
    service = UnprivilegedService(state, AgentProcess(state, home / "models", unused_ports(2), llama_server))
    try:
        yield service
    finally:
        for verb in ("stop", "reset-failed"):
            subprocess.run(
                ["systemctl", "--user", verb, "magi-agent.service"], capture_output=True, timeout=60, check=False
            )


def test_a_folder_that_the_service_may_not_read_is_named_by_api_journal_status_and_doctor_with_what_grants_it(
    service: UnprivilegedService,
) -> None:
    home = service.agent.models.parent
    home.chmod(0o700)
    started = time.time()
    service.start()

    # It may not speak to root's manager, before which it does not begin to scan by itself.
    refused = service.agent.ask("POST", "/api/models/rescan")
    [problem] = service.problems()
    assert (refused.status, refused.body["error"]) == (500, "RescanFailed")
    assert problem in refused.body["message"]
    pattern = (
        rf"{home}/models: the folder cannot be read: the folder {home} does not let user magi-agent through; "
        rf"to allow it: (sudo (?:setfacl -m g:magi-llama:x|chgrp magi-llama) .*)"
    )
    found = re.fullmatch(pattern, problem)
    assert found, problem
    assert problem in service.log(started).splitlines()
    assert problem in piped("status", environment=service.environment()).stdout
    told = service.examined()
    assert told.status == 1
    result, said, mend = told.one("model folders")
    assert (result, mend) == ("failed", found[1])
    assert said == f"{home}/models: the folder {home} does not let user magi-agent through"

    assert beside_other_users(service.folder, ["sh", "-c", found[1].replace("sudo ", "")]).returncode == 0
    assert service.agent.must("POST", "/api/models/rescan")["modelsFound"] == 1
    assert service.problems() == []
    assert service.examined().one("model folders")[0] == "ok"


def test_the_service_s_unit_is_read_as_systemd_has_it_up_or_failed(service: UnprivilegedService) -> None:
    service.start()

    told = service.examined()
    assert re.fullmatch(r"magi-agent.service is active \(running\), process \d+", told.one("service")[1])
    goes_by = f"{service.config}, which the running agent goes by, is valid, with "
    assert told.one("configuration")[1].startswith(goes_by)
    assert told.one("users") == ("ok", "agent and servers run as user magi-agent", None)

    with service.variables.open("a") as file:
        file.write("MAGI_PORT_RNGE=1-2\nno assignment\n")
    told = service.examined()
    mend = f"sudoedit {service.variables}; then: systemctl --user restart magi-agent"
    assert told.of("configuration")[:2] == [
        ("warning", f"{service.variables}: 'no assignment' sets nothing; it should be NAME=VALUE", mend),
        ("warning", f"{service.variables}: no setting is called MAGI_PORT_RNGE", mend),
    ]
    with service.variables.open("a") as file:
        file.write("MAGI_PORT_RANGE=nine\n")
    told = service.examined()
    assert told.status == 1
    assert "environment variable MAGI_PORT_RANGE: must be two ports" in told.of("configuration")[-1][1]

    subprocess.run(["systemctl", "--user", "kill", "-s", "KILL", "magi-agent.service"], check=True, timeout=60)
    told = wait_until(lambda: service.examined().of("agent")[0][0] == "failed" and service.examined(), "it is down")
    assert told.status == 1
    assert told.one("service") == (
        "failed",
        "magi-agent.service has failed (signal)",
        "journalctl --user-unit magi-agent -e; then: systemctl --user restart magi-agent",
    )


def test_a_file_that_counts_from_the_next_start_on_is_told_beside_the_one_that_counts_now(
    service: UnprivilegedService,
) -> None:
    service.start()
    other = service.folder / "other.toml"
    other.write_text("[servers]\nport_rage = 1\n")
    with service.variables.open("a") as file:
        file.write(f"MAGI_CONFIG={other}\n")

    news, judged = service.examined().of("configuration")

    assert news == (
        "warning",
        f"the running agent goes by {service.config}, and the next start by {other}, which magi-agent.service names",
        "systemctl --user restart magi-agent.service",
    )
    assert judged[1].startswith(f"{service.config}, which the running agent goes by, is valid, with ")


@pytest.fixture
def agent(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> Iterator[AgentProcess]:
    toy_model(tmp_path / "models" / f"{MODEL}.gguf")
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(4), llama_server)
    with ended(agent, f"magi-llama-{MODEL}.service"):
        yield agent


def test_a_host_that_is_well(agent: AgentProcess) -> None:
    agent.start()
    agent.wait_settled()
    agent.must("PUT", f"/api/models/{MODEL}/enabled", {"enabled": True})
    assert agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60")["server"]["state"] == "ready"
    low, high = agent.port_range

    told = examined(agent.environment())

    assert told.status == 0, told.findings
    assert told.one("configuration") == (
        "ok",
        f"{agent.folder}/agent.toml, which the running agent goes by, is valid",
        None,
    )
    assert told.one("agent")[1].endswith(f" answers at {agent.socket}")
    assert told.one("model folders")[1].startswith(f"{agent.models}: 1 model file, readable by user ")
    assert told.one("ports") == ("ok", f"ports {low} to {high}: 3 free, 1 held by servers of ours", None)
    assert re.search(r": for \w+, all \d\d libraries found$", told.one("llama-server")[1])
    assert re.search(r": version \S+", told.one("devices")[1])
    shown = piped("doctor", environment=agent.environment())
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert len(lines) == len(told.findings) + 2
    assert {line[:2] for line in lines[:-2]} == {"✓ ", "! "}
    assert lines[-1].startswith("nothing is wrong")


@dataclass
class OptionedAgent(AgentProcess):
    """An agent that is started by hand with options."""

    options: tuple[str, ...] = ()

    def spawn(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(MAGICTL.parent / "magi-agent"), *self.options],
                env=self.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder,
            )  # fmt: skip


def test_what_an_agent_goes_by_that_was_started_by_hand_is_asked_of_it(
    systemd_user: SystemdUser, tmp_path: Path, unused_ports: PortRanges, llama_server: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "by-hand.toml").write_text("[servers]\nstop_timeout = 7\n")
    low, high = unused_ports(3)
    options = ("--config", "by-hand.toml", f"--port-range={low}-{high}")
    agent = OptionedAgent(tmp_path, tmp_path / "models", (low, low), llama_server, options=options)
    # Nothing of it is in the environment of whoever asks.
    environment = surroundings(MAGI_SOCKET=str(agent.socket), MAGI_SYSTEMD_SCOPE="user", **{
        name: os.environ[name] for name in ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")
    })  # fmt: skip
    config = tmp_path / "by-hand.toml"
    with ended(agent, "magi-llama-none-*.service"):
        agent.start()
        agent.wait_settled()

        told = examined(environment)

        assert told.one("configuration") == ("ok", f"{config}, which the running agent goes by, is valid", None)
        assert told.one("ports")[1].startswith(f"ports {low} to {high}: ")
        assert told.one("model folders")[1].startswith(f"{tmp_path}/models")
        assert told.one("tokens")[1] == "there are none: nobody uses the API by token"
        config.write_text("[servers]\nport_rage = 1\n")
        (result, said, mend) = examined(environment).one("configuration")
        assert (result, mend) == ("failed", f"sudoedit {config}")
        assert said.endswith(f" ({config}, which the running agent goes by)")

    # Without it, what a start would go by is what there is.
    (_, said, _) = examined(environment).one("configuration")
    assert said.startswith("there is no /etc/magi-agent/agent.toml, the default, as MAGI_CONFIG here names no other: ")


def test_where_the_agent_does_not_say_what_it_goes_by_that_is_said(open_folder: Path) -> None:
    patient = patient_of(open_folder)
    patient.__dict__.update(told={}, service_unit={}, _about={"name": "magi-agent", "version": "0.0.1"})

    unsaid, judged = findings(doctor_agent.configuration(patient))

    assert unsaid[0] is Result.UNKNOWN
    assert unsaid[1].startswith("the running agent does not say which configuration it goes by; ")
    assert judged[0] is Result.OK


def test_what_is_asked_of_llama_server_leaves_no_unit_behind(agent: AgentProcess) -> None:
    assert examined(agent.environment()).one("devices")[0] == "ok"

    listed = subprocess.run(
        ["systemctl", "--user", "list-units", "--all", "--plain", "--no-legend", "magi-doctor-*"],
        capture_output=True, text=True, timeout=30, check=True,
    ).stdout  # fmt: skip
    assert listed == ""
    assert list(Path(os.environ["XDG_RUNTIME_DIR"]).glob("magi-doctor-*")) == []


def test_devices_are_those_that_llama_server_lists_in_its_sandbox(agent: AgentProcess, tmp_path: Path) -> None:
    stand_in = tmp_path / "llama-server"
    stand_in.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--version) echo 'version: 4242 (abc)' >&2 ;;\n"
        "--list-devices)\n"
        "    echo 'Available devices:'\n"
        "    sed -n 's/^NoNewPrivs:./  CUDA0: NoNewPrivs is /p' /proc/self/status ;;\n"
        "esac\n"
    )
    stand_in.chmod(0o755)
    agent.llama_server = stand_in

    told = examined(agent.environment())

    assert told.one("devices") == ("ok", f"{stand_in}: version 4242 (abc); devices: CUDA0: NoNewPrivs is 1", None)
    assert told.one("llama-server") == ("warning", f"{stand_in} is a script: what it runs is not looked at", None)


def test_a_llama_server_that_cannot_be_run_says_why(agent: AgentProcess, tmp_path: Path) -> None:
    folder = tmp_path / "build"
    shutil.copytree(agent.llama_server.parent, folder)
    binary = folder / agent.llama_server.name
    (folder / "libmtmd.so.0").unlink()
    agent.llama_server = binary

    told = examined(agent.environment())

    assert told.status == 1
    [(result, said, mend)] = [each for each in told.of("llama-server") if each[0] == "failed"]
    assert said == f"{binary} needs libmtmd.so.0, which is not found, by way of libllama-server-impl.so"
    assert mend == "install the package that has libmtmd.so.0: apt-file search libmtmd.so.0"
    result, said, _ = told.one("devices")
    assert result == "failed"
    assert "libmtmd.so.0" in said


def test_a_back_end_that_cannot_be_loaded_is_told(agent: AgentProcess, tmp_path: Path) -> None:
    folder = tmp_path / "build"
    shutil.copytree(agent.llama_server.parent, folder)
    back_end = folder / "libggml-vulkan.so"
    content = back_end.read_bytes()
    back_end.unlink()
    back_end.write_bytes(content.replace(b"libvulkan.so.1\0", b"libcudart.so.1\0"))
    agent.llama_server = folder / agent.llama_server.name

    [(_, said, mend)] = [each for each in examined(agent.environment()).of("llama-server") if each[0] == "warning"]

    assert said == "libggml-vulkan.so is left out, as libcudart.so.1 is not found"
    assert mend == "install the package that has libcudart.so.1: apt-file search libcudart.so.1"


def test_a_llama_server_of_another_machine_or_a_newer_release_is_told(agent: AgentProcess, tmp_path: Path) -> None:
    folder = tmp_path / "build"
    shutil.copytree(agent.llama_server.parent, folder)
    binary = folder / agent.llama_server.name
    content = binary.read_bytes()
    agent.llama_server = binary
    other = bytearray(content)
    other[18:20] = struct.pack("<H", 183 if os.uname().machine != "aarch64" else 62)
    binary.write_bytes(other)
    said = [found for _, found, _ in examined(agent.environment()).of("llama-server")]
    assert f"{binary} is made for aarch64, and this host is {os.uname().machine}" in said

    binary.write_bytes(re.sub(rb"\0GLIBC_2\.\d\d\0", b"\0GLIBC_2.99\0", content, count=1))
    said = [found for _, found, _ in examined(agent.environment()).of("llama-server")]
    assert any(found.startswith(f"{binary} needs glibc 2.99, and this host has ") for found in said)

    binary.unlink()
    assert examined(agent.environment()).one("llama-server") == (
        "failed",
        f"there is no {binary}",
        f"install llama-server there, or name another: servers.llama_server_path in {agent.folder}/agent.toml",
    )


def test_a_port_held_by_another_program_is_named_with_the_program(agent: AgentProcess) -> None:
    agent.start()
    agent.wait_settled()
    agent.must("PUT", f"/api/models/{MODEL}/enabled", {"enabled": True})
    low, high = agent.port_range
    with socket.create_server(("127.0.0.1", low)), socket.create_server(("127.0.0.1", high)):
        told = examined(agent.environment())

    assert told.status == 1
    given, spare, rest = told.of("ports")
    assert (given[0], given[2]) == ("failed", f"stop that, or: magictl port {MODEL} auto")
    assert re.match(rf"port {low} of {MODEL} is held by python\S* \(process {os.getpid()}", given[1])
    assert spare[0] == "warning"
    assert rest == ("ok", f"ports {low} to {high}: 2 free, 0 held by servers of ours", None)


def test_who_is_not_told_of_the_models_is_not_told_that_a_port_is_no_models(
    open_folder: Path, unused_ports: PortRanges
) -> None:
    port = unused_ports()[0]
    patient = patient_of(open_folder, MAGI_PORT_RANGE=f"{port}-{port}")
    with socket.create_server(("127.0.0.1", port)):
        told = findings(doctor_ports.ports(patient))[0]

    assert re.fullmatch(rf"port {port} is held by python\S* \(process {os.getpid()}.*\)", told[1])


def test_the_agents_own_port_held_by_another_program_is_told(agent: AgentProcess, unused_ports: PortRanges) -> None:
    port = unused_ports()[0]
    agent.settings["MAGI_TCP"] = f"127.0.0.1:{port}"
    with socket.create_server(("127.0.0.1", port)):
        told = examined(agent.environment()).of("ports")[-1]

    assert told[0] == "failed"
    assert re.match(rf"port {port}, the agent's own, is held by python\S* \(process {os.getpid()}", told[1])


def test_a_configuration_that_is_not_valid_is_told_and_what_needs_none_is_checked(agent: AgentProcess) -> None:
    environment = agent.environment()
    (agent.folder / "agent.toml").write_text("[servers]\nport_rage = 1\n")

    told = examined(environment)

    assert told.status == 1
    result, said, mend = told.one("configuration")
    assert (result, mend) == ("failed", f"sudoedit {agent.folder}/agent.toml")
    assert f"{agent.folder}/agent.toml:2: servers.port_rage: unknown key" in said
    assert told.one("model folders")[0] == told.one("llama-server")[0] == "unknown"
    assert told.one("systemd")[0] == told.one("memory")[0] == "ok"


def test_without_agent_and_without_systemd_it_still_says_what_it_can() -> None:
    environment = surroundings(MAGI_URL="http://127.0.0.1:1", DBUS_SYSTEM_BUS_ADDRESS="unix:path=/nonexistent")

    told = examined(environment)

    assert told.status == 1
    assert told.one("agent")[0] == "failed"
    assert told.one("memory")[0] in {"ok", "warning"}
    assert {each["check"] for each in told.findings} == {label for label, _ in doctor_module._checks()}


@only_root
def test_without_root_it_says_what_it_could_not_look_at_and_that_root_can(open_folder: Path, tmp_path: Path) -> None:
    models = open_folder / "closed" / "models"
    models.mkdir(parents=True)
    models.parent.chmod(0o700)
    config = open_folder / "agent.toml"
    config.write_text(f"[discovery]\nmodel_scan_path = '{models}'\n")
    environment = surroundings(
        MAGI_URL="http://127.0.0.1:1", MAGI_CONFIG=str(config), DBUS_SYSTEM_BUS_ADDRESS="unix:path=/nonexistent"
    )

    ran = as_nobody("doctor", "--json", environment=environment)

    assert ran.returncode == 1, ran.stderr
    told = Outcome(ran.returncode, json.loads(ran.stdout)["findings"])
    assert told.one("model folders") == ("unknown", f"{models}: Permission denied", "sudo magictl doctor")
    assert told.one("devices")[0] == "unknown"
    assert told.one("devices")[2] == "sudo magictl doctor"
    config.chmod(0o600)
    told = Outcome(1, json.loads(as_nobody("doctor", "--json", environment=environment).stdout)["findings"])
    assert told.one("configuration") == ("unknown", f"{config} may not be read by you", "sudo magictl doctor")


def patient_of(
    folder: Path, *, agents: Account | None = None, servers: Account | None = None, **variables: str
) -> Patient:
    """What a doctor would know of a packaged service, whose two users this machine does not have."""
    patient = Patient(Client(SocketAddress(str(folder / "nobody.sock"))))
    config = folder / "agent.toml"
    config.touch()
    patient.__dict__.update(
        unit={}, unit_or_none={}, config=config, environment={},
        configured=load_settings({}, {"MODEL_SCAN_PATH": str(folder / "models"), **variables}, config),
        agents_account=agents or Account("user magi-agent", SERVICE, frozenset({SERVICE, READERS})),
        servers_account=servers or Account("user magi-llama", SERVERS, frozenset({READERS})),
    )  # fmt: skip
    return patient


@only_root
def test_each_of_the_two_users_is_looked_at_without_becoming_it(open_folder: Path) -> None:
    models = open_folder / "models"
    (models / "deep").mkdir(parents=True)
    for name, owner in (("service's.gguf", SERVICE), ("servers'.gguf", SERVERS), ("nobody's.gguf", 0)):
        path = models / "deep" / name
        path.touch(mode=0o600)
        os.chown(path, owner, 0)
    (models / "everybody's.gguf").touch(mode=0o644)
    patient = patient_of(open_folder)

    told = findings(doctor_folders.folders(patient))

    assert {(result, said) for result, said, _ in told} == {
        (Result.FAILED, f"{models}/deep/service's.gguf: its mode does not let user magi-llama read it"),
        (Result.FAILED, f"{models}/deep/servers'.gguf: its mode does not let user magi-agent read it"),
        (
            Result.FAILED,
            f"{models}/deep/nobody's.gguf: its mode does not let user magi-agent and user magi-llama read it",
        ),
    }
    for _, _, mend in told:
        assert mend is not None
        subprocess.run(mend.replace("sudo ", ""), shell=True, check=True)
    assert findings(doctor_folders.folders(patient)) == [
        (Result.OK, f"{models}: 4 model files, readable by user magi-agent and user magi-llama", None)
    ]


@only_root
def test_the_servers_need_no_way_through_folders_that_their_sandbox_puts_others_over(open_folder: Path) -> None:
    models = open_folder / "closed" / "models"
    models.mkdir(parents=True)
    (models / "x.gguf").touch(mode=0o644)
    models.chmod(0o755)
    models.parent.chmod(0o700)
    os.chown(models.parent, SERVICE, SERVICE)
    patient = patient_of(open_folder, MODEL_SCAN_PATH=str(models))

    assert [result for result, _, _ in findings(doctor_folders.folders(patient))] == [Result.OK]
    os.chown(models.parent, SERVERS, READERS)
    [(result, said, _)] = findings(doctor_folders.folders(patient))
    assert (result, said) == (
        Result.FAILED,
        f"{models}: the folder {models.parent} does not let user magi-agent through",
    )


def test_a_library_that_the_sandbox_hides_is_named(open_folder: Path, llama_server: Path) -> None:
    folder, elsewhere = open_folder / "build", open_folder / "elsewhere"
    shutil.copytree(llama_server.parent, folder)
    elsewhere.mkdir()
    patient = patient_of(open_folder, LLAMA_SERVER_PATH=str(folder / llama_server.name))
    assert [result for result, _, _ in findings(doctor_programs.binaries(patient))] == [Result.OK]

    library = folder / "libmtmd.so.0"
    library.rename(elsewhere / library.name)
    library.symlink_to(elsewhere / library.name)

    [(result, said, _)] = findings(doctor_programs.binaries(patient))
    assert result is Result.FAILED
    assert said.startswith(f"{elsewhere}/libmtmd.so.0, which {folder}/llama-server needs, is not seen in the servers'")


@only_root
def test_a_folder_that_is_missing_or_empty_is_told(open_folder: Path) -> None:
    patient = patient_of(open_folder)

    [(result, said, mend)] = findings(doctor_folders.folders(patient))
    assert (result, said) == (Result.FAILED, f"{open_folder}/models does not exist")
    assert mend is not None
    assert mend.startswith(f"sudo mkdir -p {open_folder}/models; or ")

    (open_folder / "models").mkdir(mode=0o755)
    [(result, _, mend)] = findings(doctor_folders.folders(patient))
    assert (result, mend) == (Result.WARNING, "put a GGUF file there, then: magictl rescan")


@only_root
def test_the_launchers_socket_is_there_and_the_service_may_call_it(open_folder: Path) -> None:
    root = Account("user root", 0, frozenset({0}))
    [(result, said, _)] = findings(doctor_agent.launcher(patient_of(open_folder, agents=root)))
    assert (result, said) == (Result.OK, "the agent is root and starts units itself; no launcher is needed")

    path = open_folder / "launcher.sock"
    patient = patient_of(open_folder, MAGI_LAUNCHER_SOCKET=str(path))
    [(result, said, mend)] = findings(doctor_agent.launcher(patient))
    assert (result, mend) == (Result.FAILED, "sudo systemctl enable --now magi-launcher.socket")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o660)
        [(result, said, mend)] = findings(doctor_agent.launcher(patient))
        assert (result, mend) == (Result.FAILED, "sudo systemctl restart magi-launcher.socket")
        assert "does not let user magi-agent use it" in said
        os.chown(path, 0, SERVICE)
        [(result, _, _)] = findings(doctor_agent.launcher(patient))
        assert result is Result.OK


@only_root
def test_the_file_of_tokens_is_for_the_service_alone(open_folder: Path) -> None:
    path = open_folder / "tokens"
    patient = patient_of(open_folder, MAGI_TOKENS_PATH=str(path))
    assert [result for result, _, _ in findings(doctor_agent.tokens(patient))] == [Result.OK]

    path.write_text("# none yet\n")
    path.chmod(0o640)
    [(result, said, mend)] = findings(doctor_agent.tokens(patient))
    assert (result, said) == (Result.FAILED, f"{path}: its mode does not let user magi-agent read it")
    assert mend == f"sudo chown root:magi-agent {path} && sudo chmod 0640 {path}"

    os.chown(path, 0, SERVICE)
    assert findings(doctor_agent.tokens(patient)) == [(Result.OK, f"{path} is well", None)]
    path.chmod(0o644)
    [(result, said, mend)] = findings(doctor_agent.tokens(patient))
    assert (result, mend) == (Result.WARNING, f"sudo chmod 0640 {path}")
    assert "every user of this host may read it" in said
    path.chmod(0o666)
    [(result, _, mend)] = findings(doctor_agent.tokens(patient))
    assert (result, mend) == (Result.FAILED, f"sudoedit {path}; then: sudo chmod 0640 {path}")
    path.chmod(0o640)
    path.write_text("one two\n")
    [(result, _, mend)] = findings(doctor_agent.tokens(patient))
    assert (result, mend) == (Result.FAILED, f"sudoedit {path}")
    path.write_text(f"newer read sha256:{'0f' * 32} hosts=10.0.0.0/8\n")
    [(result, said, mend)] = findings(doctor_agent.tokens(patient))
    assert (result, mend) == (Result.WARNING, f"sudoedit {path}")
    assert "the token newer has a key that this agent does not know" in said
    path.unlink()
    path.mkdir(mode=0o755)
    [(result, _, mend)] = findings(doctor_agent.tokens(patient))
    assert (result, mend) == (Result.FAILED, f"sudo mv {path} {path}.old")


def test_groups_that_the_users_are_not_in_are_named(open_folder: Path) -> None:
    groups = {name: number for name, number in (("render", 105), ("video", 44)) if _has_group(name)}
    patient = patient_of(open_folder, MAGI_LLAMA_SERVER_USER="magi-llama")
    if not groups:
        pytest.skip("neither render nor video is a group here")

    [(result, said, mend)] = findings(doctor_host.users(patient))

    names = " and ".join(groups)
    assert result is Result.WARNING
    assert f"user magi-llama, whom the servers run as, is not in {names}" in said
    assert mend == f"sudo usermod -aG {','.join(groups)} magi-llama"


def _has_group(name: str) -> bool:
    return any(line.startswith(f"{name}:") for line in Path("/etc/group").read_text().splitlines())


def test_a_user_of_the_configuration_that_is_not_there_is_told(open_folder: Path) -> None:
    patient = patient_of(open_folder, MAGI_LLAMA_SERVER_USER="nobody-is-called-so")
    patient.__dict__["servers_account"] = None

    [(result, said, mend)] = findings(doctor_host.users(patient))

    # The package's list of users makes no such one.
    assert (result, mend) == (
        Result.FAILED,
        f"name another: servers.llama_server_user in {open_folder}/agent.toml",
    )
    assert "nobody-is-called-so" in said
    if os.geteuid() == 0:
        [(_, said, _)] = findings(doctor_programs.devices(patient))
        assert said == "llama-server's version and devices: there is no user whom it would run as"
    patient = patient_of(open_folder, MAGI_LLAMA_SERVER_USER="magi-llama")
    patient.__dict__["servers_account"] = None
    [(_, _, mend)] = findings(doctor_host.users(patient))
    assert mend == "sudo systemd-sysusers"


@pytest.mark.parametrize(("free", "result"), [(100_000, Result.WARNING), (8_000_000, Result.OK)])
def test_little_free_memory_is_told(open_folder: Path, free: int, result: Result) -> None:
    patient = patient_of(open_folder)
    patient.tree = Tree(proc=open_folder, sys=open_folder)
    (open_folder / "meminfo").write_text(f"MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable: {free} kB\n")

    [(told, _, _)] = findings(doctor_host.memory(patient))

    assert told is result


def test_an_enabled_model_larger_than_what_is_free_is_named(open_folder: Path) -> None:
    patient = patient_of(open_folder)
    patient.tree = Tree(proc=open_folder, sys=open_folder)
    (open_folder / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
    patient.__dict__["servers"] = []
    patient.__dict__["registry"] = {
        "models": {
            "large": {"enabled": True, "sizeBytes": 40_000_000_000},
            "unused": {"enabled": False, "sizeBytes": 90_000_000_000},
        }
    }

    [(result, said, mend)] = findings(doctor_host.memory(patient))

    assert (result, mend) == (Result.WARNING, "magictl disable large")
    assert "large, which is enabled and does not run, has 40.0 GB" in said


def test_another_host_is_not_looked_at() -> None:
    ran = piped("doctor", "--url", "http://192.0.2.1:8000")

    assert ran.returncode == 1
    assert "run magictl doctor there" in ran.stderr


def test_a_gpu_of_windows_is_one(open_folder: Path) -> None:
    patient = patient_of(open_folder)
    patient.tree = Tree(proc=open_folder, sys=open_folder, dev=open_folder)
    (open_folder / "dxg").touch()

    (open_folder / "dxg").chmod(0o666)
    assert [result for result, _, _ in findings(doctor_host.gpu(patient))] == [Result.OK]
    (open_folder / "dxg").chmod(0o600)
    assert [result for result, _, _ in findings(doctor_host.gpu(patient))] == [Result.FAILED]


def test_a_check_that_hangs_holds_up_no_other(monkeypatch: pytest.MonkeyPatch, open_folder: Path) -> None:
    monkeypatch.setattr(doctor_module, "_PATIENCE", 0.2)

    def hangs(patient: Patient) -> Iterator[Finding]:
        yield Finding(Result.OK, "so far")
        time.sleep(30)

    told = findings(doctor_module._made("x", hangs, patient_of(open_folder)))

    assert [result for result, _, _ in told] == [Result.OK, Result.UNKNOWN]


def test_a_check_that_breaks_holds_up_no_other(open_folder: Path) -> None:
    def breaks(patient: Patient) -> Iterator[Finding]:
        yield Finding(Result.OK, "so far")
        raise RuntimeError("of all things")

    told = findings(doctor_module._made("x", breaks, patient_of(open_folder)))

    assert told == [
        (Result.OK, "so far", None),
        (Result.UNKNOWN, "this could not be looked at: RuntimeError: of all things", None),
    ]
