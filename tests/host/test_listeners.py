"""Who listens on a port: real sockets of real units, of this process, and of control groups below a unit's own."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import locations
import pytest

from magi_agent.host import listeners as module
from magi_agent.host.listeners import Listener, listeners, owned_by
from magi_agent.host.unified_hierarchy import Hierarchy
from tests.conftest import PortRanges, SystemdUser
from tests.systemd.units import run, shown, systemctl, wait_until

LISTENS = """
import os, pathlib, socket, sys, time
if "below" in sys.argv:
    own = pathlib.Path("/proc/self/cgroup").read_text().rpartition(":")[2].strip().lstrip("/")
    for top in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        if os.path.isdir(f"{top}/{own}"):
            os.makedirs(f"{top}/{own}/deep/deeper")
            pathlib.Path(f"{top}/{own}/deep/deeper/cgroup.procs").write_text("0")
            break
host, port = sys.argv[1], int(sys.argv[2])
listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
    listening.setsockopt(socket.SOL_SOCKET, option, 1)
listening.bind((host, port))
listening.listen()
time.sleep(600)
"""

Listen = Callable[..., str]


@pytest.fixture
def listen(systemd_user: SystemdUser, tmp_path: Path) -> Iterator[Listen]:
    """Has a unit listen; returns its control group."""
    script = tmp_path / "listens.py"
    script.write_text(LISTENS)
    units: list[str] = []

    def start(port: int, *words: str, host: str = "127.0.0.1", properties: tuple[str, ...] = ()) -> str:
        unit = f"listenerstest-{os.getpid()}-{len(units)}-{port}.service"
        units.append(unit)
        options = [f"--property={item}" for item in properties]
        known = len(listeners(port))
        command = (sys.executable, str(script), host, str(port), *words)
        run("systemd-run", "--user", "--quiet", f"--unit={unit}", *options, *command)
        wait_until(
            lambda: len(listeners(port)) > known or shown(unit, "ActiveState") == "failed", "the unit listens or fails"
        )
        assert shown(unit, "ActiveState") == "active", run("systemctl", "--user", "status", unit, check=False).stdout
        return shown(unit, "ControlGroup")

    yield start
    if units:
        systemctl("kill", "--signal=KILL", *units, check=False)
        systemctl("stop", *units, check=False)
        systemctl("reset-failed", *units, check=False)


@pytest.fixture
def port(unused_ports: PortRanges) -> int:
    return unused_ports()[0]


def stranger(port: int, host: str = "127.0.0.1") -> socket.socket:
    """A socket of this process, which is in no unit."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        listening.setsockopt(socket.SOL_SOCKET, option, 1)
    listening.bind((host, port))
    listening.listen()
    return listening


class TestListeners:
    def test_of_a_free_port_are_none(self, port: int) -> None:
        assert listeners(port) == ()

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
    def test_are_found_at_whatever_address(self, port: int, host: str) -> None:
        with stranger(port, host) as listening:
            [found] = listeners(port)

            assert found.address == host
            assert found.uid == os.getuid()
            assert found.inode == os.fstat(listening.fileno()).st_ino

    def test_are_all_found(self, port: int) -> None:
        with stranger(port, "127.0.0.1"), stranger(port, "127.0.0.1"), stranger(port, "::1"):
            assert sorted(found.address for found in listeners(port)) == ["127.0.0.1", "127.0.0.1", "::1"]

    def test_are_none_of_another_port(self, port: int, unused_ports: PortRanges) -> None:
        with stranger(unused_ports()[0]):
            assert listeners(port) == ()

    def test_are_not_those_that_only_are_bound_or_connected(self, port: int, unused_ports: PortRanges) -> None:
        other = unused_ports()[0]
        with stranger(other), socket.socket() as client:
            client.bind(("127.0.0.1", port))
            assert listeners(port) == ()
            client.connect(("127.0.0.1", other))
            assert listeners(port) == ()

    def test_of_a_crowded_host_are_found_in_many_answers(self, port: int) -> None:
        # More than one read of the kernel's answer holds.
        crowd = [stranger(port) for _ in range(600)]
        try:
            assert len(listeners(port)) == 600
        finally:
            for one in crowd:
                one.close()

    def test_leave_no_file_open(self, port: int) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            listeners(port)
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    def test_are_the_same_by_proc(self, port: int) -> None:
        with stranger(port, "127.0.0.1"), stranger(port, "::1"), stranger(port, "127.0.0.2"):
            by_netlink = {(found.address, found.uid, found.inode) for found in listeners(port)}
            by_proc = list(module._by_proc(port))

        assert {(found.address, found.uid, found.inode) for found in by_proc} == by_netlink
        assert {found.cgroup_id for found in by_proc} == {None}


class TestOwnedBy:
    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
    def test_the_unit_that_listens(self, listen: Listen, port: int, host: str) -> None:
        group = listen(port, host=host)

        assert owned_by(port, group) is True
        assert owned_by(port, group.rpartition("/")[0]) is True, "a slice owns what its units own"

    def test_not_another_unit(self, listen: Listen, port: int, unused_ports: PortRanges) -> None:
        listen(port)
        other = listen(unused_ports()[0])

        assert owned_by(port, other) is False

    def test_not_a_unit_whose_port_a_stranger_holds(self, listen: Listen, port: int, unused_ports: PortRanges) -> None:
        group = listen(unused_ports()[0])

        with stranger(port):
            assert owned_by(port, group) is False

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
    def test_not_a_unit_that_shares_its_port_with_a_stranger(self, listen: Listen, port: int, host: str) -> None:
        # Of the same user and with SO_REUSEPORT: the kernel gives some connections to one, some to the other.
        group = listen(port)

        with stranger(port, host):
            assert owned_by(port, group) is False
        assert owned_by(port, group) is True

    @pytest.mark.parametrize(
        ("strangers", "asked", "owned"),
        [
            ("::1", "127.0.0.1", True),
            ("127.0.0.2", "127.0.0.1", True),
            ("127.0.0.1", "127.0.0.1", False),
            ("0.0.0.0", "127.0.0.1", False),
            ("::", "127.0.0.1", False),
            ("::1", None, False),
            ("::1", "localhost", False),
        ],
    )
    def test_only_those_count_that_may_answer_at_the_address(
        self, listen: Listen, port: int, strangers: str, asked: str | None, owned: bool
    ) -> None:
        group = listen(port, host="127.0.0.1")

        with stranger(port, strangers):
            assert owned_by(port, group, asked) is owned

    def test_a_stranger_on_all_ipv4_addresses_does_not_answer_at_an_ipv6_one(self, listen: Listen, port: int) -> None:
        group = listen(port, host="::1")

        with stranger(port, "0.0.0.0"):
            assert owned_by(port, group, "::1") is True

    def test_a_unit_whose_socket_is_in_a_group_below_its_own(self, listen: Listen, port: int) -> None:
        group = listen(port, "below", properties=("Delegate=yes",))

        assert owned_by(port, group) is True
        assert owned_by(port, f"{group}/deep") is True
        assert owned_by(port, f"{group}/deep/deeper") is True

    def test_not_a_group_that_is_gone(self, listen: Listen, port: int) -> None:
        group = listen(port)

        assert owned_by(port, f"{group}/none") is False
        assert owned_by(port, f"{group}2") is False
        assert owned_by(port, "") is False

    def test_nobody_where_nobody_listens(self, listen: Listen, port: int, unused_ports: PortRanges) -> None:
        assert owned_by(port, listen(unused_ports()[0])) is False

    def test_takes_well_under_what_the_event_loop_notices(self, listen: Listen, port: int) -> None:
        group = listen(port)
        took = []
        for _ in range(50):
            began = time.perf_counter()
            owned_by(port, group)
            took.append(time.perf_counter() - began)

        # The best of many: the machine may be busy with other things.
        assert min(took) < 0.002


ASKS = f"""
import json, os, sys
sys.path.insert(0, {str(locations.CHECKOUT)!r})
from magi_agent.host.listeners import listeners, owned_by
if len(sys.argv) > 4:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
port, group = int(sys.argv[1]), sys.argv[2]
with open(sys.argv[3], "w") if len(sys.argv) < 5 else sys.stdout as answer:
    found = [[l.address, l.uid, l.cgroup_id is not None] for l in listeners(port)]
    print(json.dumps([found, owned_by(port, group)]), file=answer)
"""


class TestSurroundings:
    def ask_in_a_unit(self, tmp_path: Path, port: int, group: str, *properties: str) -> list[object]:
        script, answer = tmp_path / "asks.py", tmp_path / "answer"
        script.write_text(ASKS)
        options = [f"--property={item}" for item in properties]
        command = (sys.executable, str(script), str(port), group, str(answer))
        run("systemd-run", "--user", "--quiet", "--wait", "--collect", *options, *command)
        told = json.loads(answer.read_text())
        assert isinstance(told, list)
        return told

    def test_without_netlink_the_owner_is_not_known(self, listen: Listen, port: int, tmp_path: Path) -> None:
        group = listen(port)

        told = self.ask_in_a_unit(tmp_path, port, group, "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX")

        assert told == [[["127.0.0.1", os.getuid(), False]], None]

    def test_without_a_sight_of_the_control_groups_the_owner_is_not_known(
        self, listen: Listen, port: int, tmp_path: Path
    ) -> None:
        group = listen(port)

        told = self.ask_in_a_unit(tmp_path, port, group, "TemporaryFileSystem=/sys/fs/cgroup")

        assert told == [[["127.0.0.1", os.getuid(), True]], None]

    def test_with_read_only_control_groups_the_owner_is_known(self, listen: Listen, port: int, tmp_path: Path) -> None:
        group = listen(port)

        told = self.ask_in_a_unit(tmp_path, port, group, "ProtectControlGroups=yes", "PrivateTmp=no")

        assert told == [[["127.0.0.1", os.getuid(), True]], True]

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
    def test_somebody_without_privileges_is_told_the_same(self, listen: Listen, port: int) -> None:
        group = listen(port)

        told = json.loads(run(sys.executable, "-c", ASKS, str(port), group, "-", "as nobody").stdout)

        assert told == [[["127.0.0.1", 0, True]], True]

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
    @pytest.mark.parametrize(
        ("mounts", "owned"),
        [
            ('umount -R -l /sys/fs/cgroup && mount -t cgroup2 none "/sys/fs/cgroup"', True),
            ("mount -t tmpfs none /sys/fs/cgroup", None),
        ],
        ids=["version 2 alone", "something else on top"],
    )
    def test_the_version_2_hierarchy_is_found_where_it_can_be_seen(
        self, listen: Listen, port: int, mounts: str, owned: bool | None
    ) -> None:
        group = listen(port)

        told = run(
            *("unshare", "--mount", "--propagation=private", "sh", "-c", f'{mounts} && exec "$@"', "sh"),
            *(sys.executable, "-c", ASKS, str(port), group, "-", "as nobody"),
        )

        assert json.loads(told.stdout) == [[["127.0.0.1", 0, True]], owned]

    def test_a_hierarchy_that_is_seen_in_part_knows_its_part_only(self) -> None:
        hierarchy = Hierarchy(Path("/sys/fs/cgroup"), PurePosixPath("/container"))

        assert hierarchy.folder_of("/container/x.service") == Path("/sys/fs/cgroup/x.service")
        assert hierarchy.folder_of("/other/x.service") is None


def test_addresses_are_read_as_proc_writes_them() -> None:
    assert sys.byteorder == "little", "the texts below are of such a machine"
    assert module._proc_address("0100007F") == "127.0.0.1"
    assert module._proc_address("00000000000000000000000001000000") == "::1"
    assert module._proc_address("B80D0120000000000000000001000000") == "2001:db8::1"


def test_a_listener_is_a_value() -> None:
    assert Listener("::", 0, 1, None) == Listener("::", 0, 1, None)
