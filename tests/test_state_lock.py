"""One agent at a time on the same state, however the one before ended."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from magi_agent.errors import AlreadyRunning, ConfigurationError
from magi_agent.state_lock import StateLock
from tests.conftest import SystemdUser
from tests.faulty_disk import filled, read_only, small_disk

HOLD = """
import sys, time
from pathlib import Path
from magi_agent.state_lock import StateLock
lock = StateLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path: Path):
    lock = StateLock(tmp_path / "state")
    yield lock
    lock.release()


def holder(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_second_is_refused_with_the_first_ones_process_id(lock, tmp_path):
    with holder(tmp_path / "state") as first:
        try:
            with pytest.raises(AlreadyRunning) as refused:
                lock.acquire()
            assert f"process {first.pid}" in refused.value.message
            assert "REGISTRY_PATH" in refused.value.message
        finally:
            first.kill()


def test_a_killed_holder_holds_nothing(lock, tmp_path):
    with holder(tmp_path / "state") as first:
        first.send_signal(signal.SIGKILL)
    lock.acquire()
    with pytest.raises(AlreadyRunning):
        StateLock(tmp_path / "state").acquire()


def test_what_is_given_back_can_be_taken(lock, tmp_path):
    lock.acquire()
    other = StateLock(tmp_path / "state")
    with pytest.raises(AlreadyRunning):
        other.acquire()
    lock.release()
    lock.release()
    other.acquire()
    other.release()
    lock.acquire()


def test_children_do_not_keep_the_lock(lock, tmp_path):
    lock.acquire()
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        try:
            lock.release()
            other = StateLock(tmp_path / "state")
            other.acquire()
            other.release()
        finally:
            child.kill()


def test_folders_of_their_own_do_not_meet(lock, tmp_path):
    lock.acquire()
    other = StateLock(tmp_path / "other")
    other.acquire()
    other.release()


def test_a_folder_that_cannot_be_written_refuses_the_start(tmp_path, systemd_user: SystemdUser):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"registry\.registry_path: cannot keep state in"):
        StateLock(tmp_path / "file").acquire()
    with (
        small_disk(tmp_path / "disk") as disk,
        read_only(disk),
        pytest.raises(ConfigurationError, match="Read-only"),
    ):
        StateLock(disk).acquire()


def test_a_full_disk_does_not_keep_the_lock_from_holding(tmp_path, systemd_user: SystemdUser):
    with small_disk(tmp_path / "disk") as disk:
        (disk / "agent.lock").write_bytes(b"")
        with filled(disk):
            lock = StateLock(disk)
            lock.acquire()
            try:
                with pytest.raises(AlreadyRunning, match="another agent uses the state"):
                    StateLock(disk).acquire()
            finally:
                lock.release()
