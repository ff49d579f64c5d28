"""Why a program cannot be executed is told from its file, in words that say what to do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from magi_agent.servers.diagnosis import diagnosed
from magi_agent.servers.failure import Failure
from magi_agent.servers.program_faults import program_fault


@pytest.fixture
def program(llama_server: Path, tmp_path: Path) -> Path:
    """A copy of the real one."""
    return Path(shutil.copy(llama_server.resolve(), tmp_path / "llama-server"))


def test_a_program_that_can_be_executed_has_no_fault(program: Path) -> None:
    assert program_fault(program) is None


def test_one_that_is_not_there(tmp_path: Path) -> None:
    fault = program_fault(tmp_path / "gone")

    assert fault is not None
    assert fault.cause == f"there is no {tmp_path}/gone"
    assert fault.advice == "install llama-server there, or name another: llama_server_path below [servers]"


def test_one_that_may_not_be_executed(program: Path) -> None:
    program.chmod(0o644)

    fault = program_fault(program)

    assert fault is not None
    assert fault.cause == f"{program} may not be executed"
    assert fault.advice == f"chmod a+x {program}"


def test_one_that_is_no_program(program: Path) -> None:
    program.write_bytes(b"hello")

    fault = program_fault(program)

    assert fault is not None
    assert fault.cause == f"{program}: it is no program (no ELF file)"
    assert "built for this machine" in fault.advice


def test_one_whose_loader_is_not_there(program: Path) -> None:
    program.write_bytes(program.read_bytes().replace(b"/lib64/ld-linux", b"/lib65/ld-linux", 1))

    fault = program_fault(program)

    assert fault is not None
    assert fault.cause == f"{program} needs the loader /lib65/ld-linux-x86-64.so.2, which is not here"


def test_a_folder(tmp_path: Path) -> None:
    fault = program_fault(tmp_path)

    assert fault is not None
    assert fault.cause == f"{tmp_path} is a folder"


def test_of_a_script_nothing_is_claimed(program: Path) -> None:
    program.write_text("#!/nowhere/sh\n")

    assert program_fault(program) is None


def test_where_the_file_does_not_tell_the_doctor_does() -> None:
    failure = Failure(
        datetime(2026, 1, 1, tzinfo=UTC), "exit-code", "systemd could not execute llama-server", exit_status=203
    )

    told = diagnosed(failure, [], "toy")

    assert told == replace(failure, advice="sudo magictl doctor looks at the program, and at what servers see of it")
