"""The properties that make a unit: as a table, and as a real manager takes and shows them."""

from __future__ import annotations

import pwd
import re
from dataclasses import fields, replace
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import pytest

from magi_agent.systemd.bus import Bus
from magi_agent.systemd.jobs import JobResult
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.properties import HIDDEN, SIGNATURES, properties_of
from magi_agent.systemd.sandbox import GPU_DEVICES
from magi_agent.systemd.transient import KillMode, NumaPolicy, OomPolicy, Restart, Sandbox, TransientService
from magi_agent.systemd.unit_table import SERVICE, SYSTEMD, UNIT
from magi_agent.vocabulary import Scope
from tests.systemd.units import MakeName, shown, until

FULL = TransientService(
    name="magi-llama-toy.service",
    description="llama-server for toy",
    argv=("/usr/local/bin/llama-server", "--port", "8080"),
    environment={"LLAMA_ARG_MODEL": "/models/toy.gguf", "EMPTY": ""},
    environment_files=(PurePosixPath("/run/magi/keys"),),
    load_credentials={"api-key": PurePosixPath("/run/magi/key")},
    slice="magi-llama.slice",
    syslog_identifier="magi-llama-toy",
    log_extra_fields={"MAGI_MODEL": "toy"},
    log_rate_limit_interval_sec=30,
    log_rate_limit_burst=1000,
    oneshot=True,
    collect=True,
    standard_output=PurePosixPath("/run/magi/output"),
    restart=Restart.ON_FAILURE,
    restart_sec=0.5,
    start_limit_interval_sec=60,
    start_limit_burst=5,
    timeout_start_sec=31,
    timeout_stop_sec=21,
    kill_mode=KillMode.CONTROL_GROUP,
    oom_policy=OomPolicy.KILL,
    user="magi-llama",
    supplementary_groups=("render", "video"),
    dynamic_user=True,
    working_directory=PurePosixPath("/var/empty"),
    runtime_directory="magi-llama/toy",
    runtime_directory_mode=0o750,
    cache_directories=("magi-llama/toy", "magi-llama/toy/cuda"),
    requires_mounts_for=(PurePosixPath("/models"),),
    wants=("systemdtest-before.service",),
    log_level_max=4,
    read_only_paths=(PurePosixPath("/home/models"), PurePosixPath("/models")),
    sandbox=Sandbox.NONE,
    memory_high=1 << 30,
    memory_max=2 << 30,
    memory_swap_max=0,
    cpu_quota=2.5,
    cpu_weight=50,
    cpu_affinity=(9, 0, 1, 0),
    io_weight=60,
    io_read_bandwidth_max=(PurePosixPath("/models"), 1_000_000),
    numa_policy=NumaPolicy.BIND,
    numa_nodes=(0,),
    tasks_max=100,
    nice=5,
    oom_score_adjust=200,
)

PLAIN = {
    "Description": "llama-server for toy",
    "Type": "oneshot",
    "ExecStart": [
        ("/usr/local/bin/llama-server", ["/usr/local/bin/llama-server", "--port", "8080"], False),
    ],
    "Environment": ["LLAMA_ARG_MODEL=/models/toy.gguf", "EMPTY="],
    "EnvironmentFiles": [("/run/magi/keys", False)],
    "LoadCredential": [("api-key", "/run/magi/key")],
    "RuntimeDirectory": ["magi-llama/toy"],
    "RuntimeDirectoryMode": 0o750,
    "CacheDirectory": ["magi-llama/toy", "magi-llama/toy/cuda"],
    "CacheDirectoryMode": 0o700,
    "WorkingDirectory": "/var/empty",
    "RequiresMountsFor": ["/models"],
    "Wants": ["systemdtest-before.service"],
    "After": ["systemdtest-before.service"],
    "LogLevelMax": 4,
    "Slice": "magi-llama.slice",
    "CollectMode": "inactive-or-failed",
    "StandardOutputFileToTruncate": "/run/magi/output",
    "SyslogIdentifier": "magi-llama-toy",
    "LogExtraFields": [b"MAGI_MODEL=toy"],
    "LogRateLimitIntervalUSec": 30_000_000,
    "LogRateLimitBurst": 1000,
    "Restart": "on-failure",
    "RestartUSec": 500_000,
    "StartLimitIntervalUSec": 60_000_000,
    "StartLimitBurst": 5,
    "TimeoutStartUSec": 31_000_000,
    "TimeoutStopUSec": 21_000_000,
    "KillMode": "control-group",
    "OOMPolicy": "kill",
    "CPUAccounting": True,
    "MemoryAccounting": True,
    "TasksAccounting": True,
    "MemoryHigh": 1 << 30,
    "MemoryMax": 2 << 30,
    "MemorySwapMax": 0,
    "CPUQuotaPerSecUSec": 2_500_000,
    "CPUWeight": 50,
    "CPUAffinity": b"\x03\x02",
    "IOWeight": 60,
    "IOReadBandwidthMax": [("/models", 1_000_000)],
    "NUMAPolicy": 2,
    "NUMAMask": b"\x01",
    "TasksMax": 100,
    "Nice": 5,
    "OOMScoreAdjust": 200,
}
AS_WHOM = {"User": "magi-llama", "SupplementaryGroups": ["render", "video"], "DynamicUser": True}

SANDBOX_EVERYWHERE = {
    ("NoNewPrivileges", True),
    ("PrivateTmp", True),
    ("ProtectSystem", "strict"),
    ("ProtectControlGroups", True),
    ("ProtectKernelModules", True),
    ("ProtectHostname", True),
    ("RestrictNamespaces", 0),
    ("RestrictRealtime", True),
    ("RestrictSUIDSGID", True),
    ("LockPersonality", True),
    ("SystemCallArchitectures", "['native']"),
    ("SystemCallFilter", "(True, ['@system-service'])"),
    ("SystemCallFilter", "(False, ['@privileged'])"),
    ("SystemCallErrorNumber", 1),
    ("RestrictAddressFamilies", "(True, ['AF_INET', 'AF_INET6', 'AF_UNIX'])"),
    ("KeyringMode", "private"),
    ("UMask", 0o077),
}
SANDBOX_SYSTEM = SANDBOX_EVERYWHERE | {
    ("CapabilityBoundingSet", 0),
    ("AmbientCapabilities", 0),
    ("ProtectHome", "tmpfs"),
    ("ProtectClock", True),
    ("ProtectKernelLogs", True),
    ("ProtectKernelTunables", True),
    ("ProtectProc", "invisible"),
    ("RemoveIPC", True),
}
SANDBOX_USER = SANDBOX_EVERYWHERE | {("PrivateUsers", True), ("ProtectHome", "read-only")}


def table(unit: TransientService, scope: Scope, version: int = 252) -> dict[str, object]:
    return {item.name: item.value for item in properties_of(unit, scope=scope, systemd_version=version)}


def sandbox_of(sandbox: Sandbox, scope: Scope) -> set[tuple[str, object]]:
    """What a sandbox adds; lists as text, so that a set holds them."""
    bare = TransientService(name="x.service", description="x", argv=("/bin/true",), sandbox=Sandbox.NONE)
    without = properties_of(bare, scope=scope, systemd_version=252)
    added = properties_of(replace(bare, sandbox=sandbox), scope=scope, systemd_version=252)
    return {
        (item.name, str(item.value) if isinstance(item.value, (list, tuple)) else item.value)
        for item in added
        if item not in without
    }


def test_the_whole_table_in_the_system_scope() -> None:
    assert table(FULL, Scope.SYSTEM) == PLAIN | AS_WHOM


def test_the_whole_table_in_the_user_scope() -> None:
    as_oneself = replace(FULL, user=None, supplementary_groups=(), dynamic_user=False)

    assert table(as_oneself, Scope.USER) == PLAIN


def test_nothing_but_what_is_said() -> None:
    bare = TransientService(name="x.service", description="x", argv=("/bin/true",), sandbox=Sandbox.NONE)
    always = {
        *("Description", "Type", "ExecStart", "Restart", "RestartUSec", "StartLimitIntervalUSec", "StartLimitBurst"),
        *("TimeoutStartUSec", "TimeoutStopUSec", "KillMode", "OOMPolicy"),
        *("CPUAccounting", "MemoryAccounting", "TasksAccounting"),
    }

    assert table(bare, Scope.SYSTEM).keys() == always
    assert table(bare, Scope.USER).keys() == always


@pytest.mark.parametrize(
    "changes",
    [{"user": "somebody"}, {"dynamic_user": True}, {"supplementary_groups": ("render",)}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_users_manager_cannot_run_as_somebody_else(changes: dict[str, object]) -> None:
    bare = TransientService(name="x.service", description="x", argv=("/bin/true",))

    with pytest.raises(ValueError, match="as that user only"):
        properties_of(replace(bare, **changes), scope=Scope.USER, systemd_version=252)  # type: ignore[arg-type]


def test_the_sandboxes_of_the_system_scope() -> None:
    devices = str([(device, "rw") for device in GPU_DEVICES])

    assert sandbox_of(Sandbox.GPU, Scope.SYSTEM) == SANDBOX_SYSTEM | {
        ("DevicePolicy", "closed"),
        ("DeviceAllow", devices),
    }
    assert sandbox_of(Sandbox.CPU, Scope.SYSTEM) == SANDBOX_SYSTEM | {
        ("PrivateDevices", True),
        ("MemoryDenyWriteExecute", True),
    }


def test_the_gpu_of_a_windows_host_is_allowed_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "dxg"
    monkeypatch.setattr("magi_agent.systemd.sandbox._WSL", node)
    allowed = ("DeviceAllow", str([(str(node), "rw")]))
    assert allowed not in sandbox_of(Sandbox.GPU, Scope.SYSTEM)

    node.touch()

    assert allowed in sandbox_of(Sandbox.GPU, Scope.SYSTEM)
    for sandbox, scope in ((Sandbox.CPU, Scope.SYSTEM), (Sandbox.GPU, Scope.USER)):
        assert allowed not in sandbox_of(sandbox, scope)


def test_the_sandboxes_of_the_user_scope() -> None:
    assert sandbox_of(Sandbox.GPU, Scope.USER) == SANDBOX_USER
    assert sandbox_of(Sandbox.CPU, Scope.USER) == SANDBOX_USER | {("MemoryDenyWriteExecute", True)}


@pytest.mark.parametrize("version", [252, 257, 999])
@pytest.mark.parametrize("sandbox", list(Sandbox))
def test_every_property_has_a_signature(sandbox: Sandbox, version: int) -> None:
    for item in properties_of(replace(FULL, sandbox=sandbox), scope=Scope.SYSTEM, systemd_version=version):
        assert item.signature == SIGNATURES[item.name]


ROOT_HOME = pwd.getpwuid(0).pw_dir
"""What a sandbox hides beside everybody else's home."""


@pytest.mark.parametrize(
    ("folder", "bound"),
    [
        ("/home/models", "/home/models"),
        (f"{ROOT_HOME}/models/deep", f"{ROOT_HOME}/models/deep"),
        ("/tmp/a/with space/b", "/tmp/a"),
        ("/tmp/a/colon:/b", "/tmp/a"),
        ("/tmp/a/it's", "/tmp/a"),
        ('/tmp/a/"x"', "/tmp/a"),
        ("/tmp/a/b\\c", "/tmp/a"),
    ],
)
def test_folders_that_the_sandbox_would_hide_are_shown(folder: str, bound: str) -> None:
    unit = replace(FULL, sandbox=Sandbox.GPU, read_only_paths=(PurePosixPath(folder), PurePosixPath("/models")))

    assert table(unit, Scope.SYSTEM)["BindReadOnlyPaths"] == [(bound, bound, True, 0x4000)]


@pytest.mark.parametrize("scope", list(Scope))
def test_folders_that_nothing_hides_are_left_alone(scope: Scope) -> None:
    unit = TransientService(
        name="x.service", description="x", argv=("/bin/true",), read_only_paths=(PurePosixPath("/models"),)
    )

    assert "BindReadOnlyPaths" not in table(unit, scope)


@pytest.mark.parametrize(
    ("folder", "top"),
    [
        ("/home/with space/models", "/home"),
        ("/home/with space", "/home"),
        ("/var/tmp/a:b/models/deep", "/var/tmp"),
        ("/tmp/a b", "/tmp"),
    ],
)
def test_a_folder_that_systemd_cannot_bind_is_refused_in_words(folder: str, top: str) -> None:
    unit = replace(FULL, sandbox=Sandbox.GPU, read_only_paths=(PurePosixPath(folder),))

    with pytest.raises(ValueError, match=f"a folder right below {top} has a space.*; rename it"):
        table(unit, Scope.SYSTEM)


def test_what_is_hidden_is_hidden_by_the_table() -> None:
    assert {str(folder) for folder in HIDDEN[Scope.USER]} == {"/tmp", "/var/tmp"}
    assert {str(folder) for folder in HIDDEN[Scope.SYSTEM]} == {"/tmp", "/var/tmp", "/home", "/root", "/run/user"}


async def test_signatures_are_those_that_systemd_tells_of_itself(manager: SystemdManager) -> None:
    bus = await Bus.connect(Scope.USER)
    path = "/org/freedesktop/systemd1/unit/dbus_2eservice"
    [xml] = await bus.call(SYSTEMD, path, "org.freedesktop.DBus.Introspectable", "Introspect")
    bus.close()
    told = {
        entry.get("name"): entry.get("type")
        for interface in ElementTree.fromstring(str(xml))
        if interface.get("name") in {UNIT, SERVICE}
        for entry in interface.iter("property")
    }
    # It is shown with more than is given: when it ran, and how it ended.
    told["ExecStart"] = "a(sasb)"
    # It is given under this name, and shown as StandardOutput.
    told["StandardOutputFileToTruncate"] = "s"

    assert manager.version() >= 252
    assert {name: told.get(name) for name in SIGNATURES} == dict(SIGNATURES)


async def test_a_real_manager_takes_and_shows_all_of_it(
    manager: SystemdManager, unit_name: MakeName, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("secret")
    name = unit_name("full")
    unit = replace(
        FULL,
        name=name,
        argv=("/bin/sleep", "600"),
        environment_files=(),
        load_credentials={"api-key": PurePosixPath(tmp_path, "key")},
        runtime_directory=f"systemdtest/{name}",
        slice="systemdtest.slice",
        oneshot=False,
        standard_output=None,
        io_read_bandwidth_max=(PurePosixPath("/usr"), 1_000_000),
        user=None,
        supplementary_groups=(),
        dynamic_user=False,
        working_directory=PurePosixPath("/usr"),
        requires_mounts_for=(PurePosixPath("/usr"),),
    )

    assert await manager.start_transient(unit, limit=30) is JobResult.DONE

    expected = {
        "Type": "exec",
        "Slice": "systemdtest.slice",
        "SyslogIdentifier": "magi-llama-toy",
        "LogExtraFields": "MAGI_MODEL=toy",
        "LogLevelMax": "4",
        "Wants": "systemdtest-before.service",
        "Restart": "on-failure",
        "RestartUSec": "500ms",
        "StartLimitIntervalUSec": "1min",
        "StartLimitBurst": "5",
        "TimeoutStartUSec": "31s",
        "TimeoutStopUSec": "21s",
        "KillMode": "control-group",
        "OOMPolicy": "kill",
        "MemoryHigh": str(1 << 30),
        "MemoryMax": str(2 << 30),
        "MemorySwapMax": "0",
        "CPUQuotaPerSecUSec": "2.500000s",
        "CollectMode": "inactive-or-failed",
        "CPUWeight": "50",
        "CPUAffinity": "0-1 9",
        "IOWeight": "60",
        "IOReadBandwidthMax": "/usr 1000000",
        "NUMAPolicy": "bind",
        "NUMAMask": "0",
        "TasksMax": "100",
        "Nice": "5",
        "OOMScoreAdjust": "200",
        "RuntimeDirectory": f"systemdtest/{name}",
        "RuntimeDirectoryMode": "0750",
        "WorkingDirectory": "/usr",
    }
    assert {key: shown(name, key) for key in expected} == expected
    assert re.search(r"EMPTY=(\s|$)", shown(name, "Environment"))
    described = manager.get(name)
    assert described is not None
    assert described.control_group.endswith(f"/systemdtest.slice/{name}")


@pytest.mark.parametrize(("program", "result"), [("echo said", "done"), ("echo said && false", "failed")])
async def test_what_runs_for_a_moment_is_waited_for_and_forgotten(
    manager: SystemdManager, unit_name: MakeName, tmp_path: Path, program: str, result: str
) -> None:
    output = tmp_path / "output"
    output.write_text("what was here before, and longer than what is said now")
    unit = TransientService(
        name=unit_name("moment"),
        description="a moment",
        argv=("/bin/sh", "-c", program),
        oneshot=True,
        collect=True,
        standard_output=PurePosixPath(output),
    )

    assert (await manager.start_transient(unit, limit=30)).value == result

    assert output.read_text() == "said\n"
    await until(lambda: shown(unit.name, "LoadState") == "not-found", "it is forgotten")


@pytest.mark.parametrize("policy", list(NumaPolicy))
async def test_each_numa_policy_is_the_one_that_is_meant(
    manager: SystemdManager, unit_name: MakeName, policy: NumaPolicy
) -> None:
    unit = TransientService(
        name=unit_name("numa"),
        description="numa",
        argv=("/bin/sleep", "600"),
        numa_policy=policy,
        numa_nodes=() if policy in (NumaPolicy.DEFAULT, NumaPolicy.LOCAL) else (0,),
    )

    await manager.start_transient(unit, limit=30)

    assert shown(unit.name, "NUMAPolicy") == policy.value


def test_no_field_of_a_service_is_forgotten() -> None:
    # Nodes are a policy's.
    plain = TransientService(
        name="x.service",
        description="x",
        argv=("/bin/true",),
        sandbox=Sandbox.NONE,
        numa_policy=NumaPolicy.INTERLEAVE,
    )
    # These are a sandbox's, or another field's.
    unseen = {"name", "sandbox", "read_only_paths", "hidden_folders", "umask", "runtime_directory_mode"}

    before = table(plain, Scope.SYSTEM)
    for field in fields(TransientService):
        if field.name not in unseen:
            changed = replace(plain, **{field.name: getattr(FULL, field.name)})
            assert table(changed, Scope.SYSTEM) != before, field.name
