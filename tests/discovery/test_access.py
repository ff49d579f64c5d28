"""What is said of a path that may not be read: the component, and a command that lets both users read it.

The users are real, in a user database of the test's own; who may read what is asked of the kernel, as that user.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.other_users import ALICE, STAFF, python_beside_other_users

DENIAL = """
import json, os, pwd, sys
from magi_agent.discovery.access import denial
user, path = sys.argv[1:]
entry = pwd.getpwnam(user)
os.initgroups(user, entry.pw_gid); os.setgid(entry.pw_gid); os.setuid(entry.pw_uid)
try:
    os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
    print(json.dumps(None))
except PermissionError:
    print(json.dumps(denial(path)))
"""
WITHOUT_SETFACL = "/nonexistent"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes away permissions from somebody else, as root")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="magi-access-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def said_to(user: str, path: Path, tmp_path: Path, programs: str | None = None) -> str | None:
    """Why a user may not read a path; ``None`` where it may."""
    sentence: str | None = json.loads(python_beside_other_users(tmp_path, DENIAL, user, str(path), path=programs))
    return sentence


def granted(sentence: str, tmp_path: Path) -> str:
    """Run the command that a sentence ends with, as root, and return it."""
    found = re.search(r"; to allow it: (sudo .*)$", sentence)
    assert found, sentence
    command = found[1].replace("sudo ", "")
    python_beside_other_users(
        tmp_path, "import subprocess, sys; subprocess.run(sys.argv[1], shell=True, check=True)", command
    )
    return command


def grant_all(path: Path, tmp_path: Path, programs: str | None = None) -> list[str]:
    """Do what is said, until the service may read ``path``, and see that the servers may too."""
    commands: list[str] = []
    while sentence := said_to("magi-agent", path, tmp_path, programs):
        commands.append(granted(sentence, tmp_path))
        assert len(commands) < 9, commands
    assert said_to("magi-llama", path, tmp_path, programs) is None
    return commands


def model_of_alice(place: Path) -> Path:
    """A model as it lies in somebody's home: only its owner gets to it."""
    home = place / "alice"
    model = home / "models" / "my model.gguf"
    model.parent.mkdir(parents=True)
    model.touch(mode=0o600)
    home.chmod(0o700)
    model.parent.chmod(0o700)
    for path in (home, model.parent, model):
        os.chown(path, ALICE, ALICE)
    return model


@pytest.mark.skipif(shutil.which("setfacl") is None, reason="there is no setfacl here")
def test_with_access_lists_both_users_are_granted_it_and_nobody_else(place: Path, tmp_path: Path) -> None:
    model = model_of_alice(place)

    sentence = said_to("magi-agent", model, tmp_path)
    assert sentence is not None
    assert sentence.startswith(f"the folder {place}/alice does not let user magi-agent through; to allow it: ")
    commands = grant_all(model, tmp_path)

    assert commands == [
        f"setfacl -m g:magi-llama:x {place}/alice",
        f"setfacl -m g:magi-llama:x {place}/alice/models",
        f"setfacl -m g:magi-llama:r '{model}'",
    ]
    assert said_to("alice", model, tmp_path) is None
    assert said_to("bob", model, tmp_path) is not None


@pytest.mark.skipif(shutil.which("setfacl") is None, reason="there is no setfacl here")
def test_a_folder_that_is_to_be_scanned_is_granted_with_what_lies_in_it_now_and_later(
    place: Path, tmp_path: Path
) -> None:
    model = model_of_alice(place)
    home, folder = model.parent.parent, model.parent

    commands = grant_all(folder, tmp_path)

    assert commands[1:] == [f"setfacl -R -m g:magi-llama:rX,d:g:magi-llama:rX {folder}"]
    later = folder / "later.gguf"
    later.touch(mode=0o640)
    os.chown(later, ALICE, ALICE)
    for user in ("magi-agent", "magi-llama"):
        assert said_to(user, model, tmp_path) is None
        assert said_to(user, later, tmp_path) is None
        assert said_to(user, home, tmp_path) is not None


def test_without_access_lists_the_group_is_changed_where_nobody_loses_by_it(place: Path, tmp_path: Path) -> None:
    model = model_of_alice(place)

    commands = grant_all(model, tmp_path, WITHOUT_SETFACL)

    assert commands[0] == f"chgrp magi-llama {place}/alice && chmod g+x {place}/alice"
    assert all(command.startswith("chgrp magi-llama ") for command in commands)
    assert said_to("alice", model, tmp_path) is None
    assert said_to("bob", model, tmp_path) is not None


def test_without_access_lists_no_group_loses_what_it_has(place: Path, tmp_path: Path) -> None:
    folder = place / "shared"
    folder.mkdir()
    os.chown(folder, 0, STAFF)
    folder.chmod(0o750)
    assert said_to("bob", folder, tmp_path) is None

    sentence = said_to("magi-agent", folder, tmp_path, WITHOUT_SETFACL)

    assert sentence is not None
    grants = f"sudo setfacl -R -m g:magi-llama:rX,d:g:magi-llama:rX {folder}"
    assert sentence.endswith(f"; to allow it: sudo apt install acl && {grants}")


def test_where_no_access_list_can_be_everybody_is_let_in(place: Path, tmp_path: Path) -> None:
    folder = place / "shared"
    folder.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", folder], check=True)
    try:
        os.chown(folder, 0, STAFF)
        folder.chmod(0o750)
        commands = grant_all(folder, tmp_path)
        assert commands == [f"chmod o+rx {folder}"]
        assert said_to("bob", folder, tmp_path) is None
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_folder_of_the_readers_group_is_opened_to_that_group(place: Path, tmp_path: Path) -> None:
    folder = place / "models"
    folder.mkdir()
    os.chown(folder, 0, 61202)
    folder.chmod(0o700)

    commands = grant_all(folder, tmp_path, WITHOUT_SETFACL)

    assert commands == [f"chmod g+rx {folder}"]


def test_a_user_who_is_not_of_the_package_is_granted_it_as_everybody(place: Path, tmp_path: Path) -> None:
    model = model_of_alice(place)

    sentence = said_to("bob", model, tmp_path)
    assert sentence is not None
    assert granted(sentence, tmp_path) == f"chmod o+x {place}/alice"
    assert said_to("bob", model, tmp_path) != sentence


def test_what_the_owner_took_from_itself_is_given_back(place: Path, tmp_path: Path) -> None:
    model = model_of_alice(place)
    model.chmod(0o000)

    sentence = said_to("alice", model, tmp_path)
    assert sentence is not None
    assert granted(sentence, tmp_path) == f"chmod u+r '{model}'"
    assert said_to("alice", model, tmp_path) is None


def test_what_the_modes_do_not_forbid_may_be_forbidden_elsewhere(place: Path, tmp_path: Path) -> None:
    program = f"""
from magi_agent.discovery.access import denial
import os; os.setgid(61999); os.setuid(61999)
print(denial({str(place)!r}))
"""
    sentence = python_beside_other_users(tmp_path, program)

    assert "uid 61999 may not read it, though the modes of its folders allow it" in sentence


def test_commands_leave_strange_names_whole(place: Path, tmp_path: Path) -> None:
    model = place / "it's $HOME; rm -rf *.gguf"
    model.touch(mode=0o600)

    commands = grant_all(model, tmp_path)

    assert len(commands) == 1
    assert subprocess.run(["ls", place], capture_output=True, text=True, check=True).stdout.strip() == model.name
