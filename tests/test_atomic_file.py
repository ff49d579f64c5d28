"""Replacing a file: whole old or whole new, whatever happens, and nothing left beside it."""

import os
import random
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from magi_agent.atomic_file import remove_leftovers, sync_folder, write_atomically
from tests.conftest import SystemdUser
from tests.faulty_disk import filled, read_only, small_disk

OLD, NEW = b"old" * 1000, b"new" * 20_000


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_with_its_folders_and_replaced(tmp_path):
    path = tmp_path / "deep" / "er" / "state.json"
    write_atomically(path, OLD)
    assert path.read_bytes() == OLD
    write_atomically(path, NEW, mode=0o600)
    assert path.read_bytes() == NEW
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_atomically(path, b"", durable=False)
    assert path.read_bytes() == b""
    assert names(path.parent) == ["state.json"]


def test_readers_see_the_old_content_or_the_new_while_it_is_replaced(tmp_path):
    path = tmp_path / "state"
    write_atomically(path, OLD)
    done = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(200):
            write_atomically(path, NEW if number % 2 else OLD, durable=False)
    finally:
        done.set()
        reader.join()
    assert seen <= {OLD, NEW}


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from magi_agent.atomic_file import write_atomically
path = Path(sys.argv[1])
for number in range(10**9):
    write_atomically(path, b"%d\\n" % number * 20_000)
    if number == 0:
        print("begun", flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "state"
    random_ = random.Random(8)
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begun\n"
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(random_.random() * 0.05)
            writer.send_signal(signal.SIGKILL)
        lines = path.read_bytes().splitlines()
        assert len(lines) == 20_000
        assert len(set(lines)) == 1
        remove_leftovers(path)
        assert names(tmp_path) == ["state"]


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path, systemd_user: SystemdUser):
    with small_disk(tmp_path / "disk") as disk:
        write_atomically(disk / "state", OLD)
        with filled(disk):
            with pytest.raises(OSError, match="No space left"):
                write_atomically(disk / "state", NEW)
            assert names(disk) == ["filler", "state"]
            assert (disk / "state").read_bytes() == OLD
        write_atomically(disk / "state", NEW[:8192])
        assert (disk / "state").read_bytes() == NEW[:8192]


def test_a_read_only_disk_leaves_the_old_file(tmp_path, systemd_user: SystemdUser):
    with small_disk(tmp_path / "disk") as disk:
        write_atomically(disk / "state", OLD)
        with read_only(disk), pytest.raises(OSError, match="Read-only"):
            write_atomically(disk / "state", NEW)
        assert (disk / "state").read_bytes() == OLD


def test_what_cannot_be_replaced_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "folder", NEW)
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        write_atomically(tmp_path / "file" / "state", NEW)
    with pytest.raises(OSError, match="too long"):
        write_atomically(tmp_path / ("x" * 250), NEW)
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes somebody else, as root")
def test_a_folder_that_can_be_written_and_not_read_refuses_before_anything_is_replaced(tmp_path):
    # Its entries could be renamed, and that it cannot be fsynced would be found out after that.
    folder = tmp_path / "state"
    folder.mkdir()
    write_atomically(folder / "file", OLD, mode=0o666)
    code = (
        "import os, sys; from pathlib import Path; from magi_agent.atomic_file import write_atomically\n"
        f"os.chdir({str(folder)!r}); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "write_atomically(Path('file'), b'new')"
    )
    folder.chmod(0o733)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "PermissionError" in ran.stderr
    assert (folder / "file").read_bytes() == OLD
    assert names(folder) == ["file"]


@pytest.mark.parametrize("name", ["state", "reg[1]*.json", "a?b"])
def test_only_the_leftovers_of_one_file_are_removed(tmp_path, name):
    path = tmp_path / name
    write_atomically(path, OLD)
    for other in (f".{name}.abc_123.tmp", ".other.abc.tmp", f".{name}.abc", f"{name}.tmp", ".reg1x.json.abc.tmp"):
        (tmp_path / other).write_bytes(b"")
    before = names(tmp_path)
    remove_leftovers(path)
    assert set(before) - set(names(tmp_path)) == {f".{name}.abc_123.tmp"}
    remove_leftovers(tmp_path / "missing" / "state")


def test_a_folder_can_be_synced_and_one_that_is_not_there_cannot(tmp_path):
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")


def test_no_descriptor_is_left_open(tmp_path):
    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = open_descriptors()
    for _ in range(20):
        write_atomically(tmp_path / "state", OLD, durable=False)
        with pytest.raises(OSError, match="directory"):
            write_atomically(tmp_path, NEW)
    assert open_descriptors() == before
