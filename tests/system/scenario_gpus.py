"""What GPUs need that no GPU is needed to see: device nodes before a start, and a place for what drivers compile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.system.host import Host, unit_of

_NODES = "magi-nvidia-uvm.service"
_MODPROBE = "/usr/bin/nvidia-modprobe"
_CACHES = "/var/cache/magi-llama"
_DRIVER = "/proc/driver"
_STAND_IN = """\
#!/usr/bin/python3
# As nvidia-modprobe: beside -u, the number of -c is no GPU's. In a container nobody may make devices: files have to do.
import pathlib, sys
names = {"-u -c 0": ("nvidia-uvm", "nvidia-uvm-tools"), "-c 255": ("nvidiactl",)}
for name in names.get(" ".join(sys.argv[1:])) or (f"nvidia{sys.argv[2]}",):
    pathlib.Path("/dev", name).touch()
"""
_ALL = {"nvidia-uvm", "nvidia-uvm-tools", "nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl"}


@contextlib.contextmanager
def made_up_driver(host: Host) -> Iterator[None]:
    """Have the host's kernel tell of a driver of NVIDIA's with four GPUs, none of which has a node."""
    if host.run("test", "-e", f"{_DRIVER}/nvidia", "-o", "-e", _MODPROBE, check=False).returncode == 0:
        pytest.skip("this host has a driver of NVIDIA's")
    host.run("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", _DRIVER)
    try:
        # With it, systemd 252 gives a unit a /proc without what is mounted on the host's.
        host.write(f"/run/systemd/system/{_NODES}.d/made-up.conf", "[Service]\nProtectControlGroups=no\n")
        host.run("systemctl", "daemon-reload")
        host.write(f"{_DRIVER}/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01\n")
        for minor in range(4):
            host.write(f"{_DRIVER}/nvidia/gpus/0000:{minor}1:00.0/information", f"Device Minor: \t {minor}\n")
        yield
    finally:
        host.run("umount", _DRIVER)
        host.run("sh", "-c", f"rm -rf {_MODPROBE} /dev/nvidia* /run/systemd/system/{_NODES}.d")
        host.run("systemctl", "daemon-reload")


def nodes(host: Host) -> set[str]:
    return set(host.output("find", "/dev", "-maxdepth", "1", "-name", "nvidia*", "-printf", "%f\\n").splitlines())


def restart(host: Host, model: str = "toy") -> None:
    host.must("POST", f"/api/models/servers/{model}/restart?wait=30", within=35)
    host.until_ready(model, within=10)


def test_without_nvidias_driver_its_unit_does_nothing(serving: Host) -> None:
    if serving.run("test", "-e", f"{_DRIVER}/nvidia", check=False).returncode == 0:
        pytest.skip("this host has a driver of NVIDIA's")
    before = serving.now()
    restart(serving)
    assert serving.property(_NODES, "ConditionResult") == "no"
    assert "made" not in serving.journal(f"--unit={_NODES}", f"--since={before}")
    assert serving.property(_NODES, "ActiveState") == "inactive"
    said = serving.run("systemd-analyze", "verify", "--man=no", _NODES)
    assert (said.stdout, said.stderr) == ("", "")


def test_every_gpu_has_its_node_before_a_server_starts(serving: Host) -> None:
    with made_up_driver(serving):
        serving.write(_MODPROBE, _STAND_IN, mode="0755")
        before = serving.now()
        restart(serving)
        assert nodes(serving) == _ALL
        said = serving.journal(f"--unit={_NODES}", f"--since={before}").splitlines()
        assert {f"made /dev/{name}" for name in _ALL} <= set(said)

        # Whoever made the rest, one that is missing is made.
        serving.run("rm", "/dev/nvidia2")
        restart(serving)
        assert nodes(serving) == _ALL

        # Many models at once are as many starts of the unit.
        for _ in range(8):
            serving.run("systemctl", "start", _NODES)
        assert serving.property(_NODES, "Result") == "success"


def test_nodes_are_looked_for_when_the_driver_is_loaded(serving: Host) -> None:
    """What loads it here takes two seconds, as a driver may that udev has begun to load."""
    with made_up_driver(serving):
        serving.write(_MODPROBE, _STAND_IN, mode="0755")
        loading = "/run/systemd/system/modprobe@nvidia.service.d"
        serving.write(
            f"{loading}/slow.conf",
            "[Unit]\nConditionCapability=\n[Service]\nExecStart=\nExecStart=/bin/sleep 2\n"
            f"ExecStart=/bin/mv {_DRIVER}/nvidia/late {_DRIVER}/nvidia/version\n",
        )
        serving.run("mv", f"{_DRIVER}/nvidia/version", f"{_DRIVER}/nvidia/late")
        serving.run("systemctl", "daemon-reload")
        try:
            restart(serving)
        finally:
            serving.run("rm", "-r", loading)
        assert nodes(serving) == _ALL
        assert serving.property(_NODES, "ConditionResult") == "yes"


def test_a_server_starts_though_nodes_cannot_be_made(serving: Host) -> None:
    with made_up_driver(serving):
        before = serving.now()
        server = serving.main_pid(unit_of("toy"))
        restart(serving)
        assert serving.main_pid(unit_of("toy")) not in {0, server}
        assert serving.property(_NODES, "ExecMainStatus") == "69"
        assert "sudo apt install nvidia-modprobe" in serving.journal(f"--unit={_NODES}", f"--since={before}")
    serving.run("systemctl", "reset-failed", _NODES)


def inside(host: Host, model: str, *command: str) -> str:
    """What a command prints as the servers' user and with what a model's server sees; its complaint where it fails."""
    ran = host.run(
        "nsenter", f"--target={host.main_pid(unit_of(model))}", "--mount", "--",
        "setpriv", "--reuid=magi-llama", "--regid=magi-llama", "--clear-groups", "--bounding-set=-all", "--", *command,
        check=False,
    )  # fmt: skip
    return (ran.stdout + ran.stderr).strip()


def keep(host: Host, model: str, path: str) -> str:
    """Have a model's server write a file; returns the complaint where it cannot."""
    return inside(host, model, "cp", "/etc/hostname", path).rpartition(": ")[2]


def test_a_server_keeps_what_drivers_compile_and_sees_no_other_servers(serving: Host) -> None:
    serving.add_model("other.gguf", "other")
    serving.must("POST", "/api/models/servers/other/start?wait=30", within=35)
    folder = f"{_CACHES}/toy"
    assert serving.output("stat", "--format=%U %a", folder) == "magi-llama 700"
    # llama-server keeps nothing there itself.
    assert inside(serving, "toy", "find", _CACHES) == f"{_CACHES}\n{folder}\n{folder}/cuda"
    assert inside(serving, "other", "find", _CACHES) == f"{_CACHES}\n{_CACHES}/other\n{_CACHES}/other/cuda"
    variables = serving.property(unit_of("toy"), "Environment").split()
    assert {f"XDG_CACHE_HOME={folder}", f"CUDA_CACHE_PATH={folder}/cuda"} <= set(variables)

    assert keep(serving, "toy", f"{folder}/cuda/index") == ""
    assert keep(serving, "toy", f"{_CACHES}/x") == "Read-only file system"
    assert keep(serving, "toy", f"{_CACHES}/other/x") == "No such file or directory"

    # It is there again after a crash, after systemd has read its units anew, and after a stop.
    serving.run("systemctl", "daemon-reload")
    server = serving.main_pid(unit_of("toy"))
    serving.run("systemctl", "kill", "--signal=KILL", unit_of("toy"))
    serving.until(lambda: serving.main_pid(unit_of("toy")) not in {0, server}, "systemd starts it again", 10)
    serving.until_ready("toy", within=15)
    assert keep(serving, "toy", f"{folder}/shaders") == ""
    serving.must("POST", "/api/models/servers/toy/stop?wait=30", within=35)
    serving.must("POST", "/api/models/servers/toy/start?wait=30", within=35)
    assert inside(serving, "toy", "find", folder, "-type", "f").splitlines() == [
        f"{folder}/cuda/index",
        f"{folder}/shaders",
    ]
    assert keep(serving, "toy", f"{folder}/shaders") == ""


def test_a_server_of_a_version_without_that_place_is_adopted_as_it_is(serving: Host) -> None:
    unit = unit_of("toy")
    server = serving.main_pid(unit)
    # As it would be, had the version before started the unit.
    serving.run(
        "sed", "--in-place", "-E", '/^Cache/d; s/ ?"?(XDG|CUDA|SYCL|LLAMA|__GL_SHADER_DISK)_CACHE[^ "]*"?//g',
        f"/run/systemd/transient/{unit}",
    )  # fmt: skip
    serving.run("systemctl", "daemon-reload")
    assert "CACHE" not in serving.property(unit, "Environment")
    assert "LLAMA_ARG_MODEL=/models/toy.gguf" in serving.property(unit, "Environment")
    assert serving.property(unit, "CacheDirectory") == ""

    serving.run("systemctl", "restart", "magi-agent.service")
    known = serving.until_ready("toy", within=20)
    assert (known["restartRequired"], known["restartReasons"]) == (False, [])
    assert serving.main_pid(unit) == server


def test_a_purge_removes_what_drivers_compiled(serving: Host) -> None:
    keep(serving, "toy", f"{_CACHES}/toy/cuda/index")
    serving.run("test", "-s", f"{_CACHES}/toy/cuda/index")
    serving.apt("remove", "magi-agent", within=60)
    serving.run("test", "-s", f"{_CACHES}/toy/cuda/index")
    serving.apt("purge", "magi-agent", within=60)
    assert serving.run("test", "-e", _CACHES, check=False).returncode == 1
