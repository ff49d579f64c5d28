"""A file of variables is read as the real systemd reads it."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from magi_agent.host.environment_file import read_environment_file, read_variables
from tests.conftest import SystemdUser

CASES = (
    "A=1\nB=two words\n",
    "# A=1\n; B=2\n  # C=3\nD=4 # kept\n",
    'A=\'single "x" $y \\n\'\nB="double \'x\' \\"q\\" \\$y \\\\ \\n \\`"\n',
    "A=one\\\ntwo\nB=last",
    "A=  spaced out  \nB='  kept  '\nC= 'a'  \"b\" c\n",
    "A=\nB=''\nC=x=y=z\n",
    "no assignment\nA=1\n",
    "1A=bad\nA B=bad\nexport C=bad\n_D=good\n",
    " A = 1\n\tB=2\r\nC=3\n",
    "A='open\nB=2\n",
    'A="open\nB=2',
    "A=quote'in'middle\nB=x\"y\"z\n",
    "A=ends with\\\\\nB=2\n",
    "A=1\nA=2\n",
    'A=trailing\\ \nB=\\"x\\"\n',
    "A='a''b'\"c\"d\n",
    "=nothing\nA=1\n",
    "A=\\\nB=2\n",
)


def as_systemd_reads(path: Path) -> dict[str, str]:
    ran = subprocess.run(
        ["systemd-run", "--user", "--quiet", "--pipe", "--wait", "--collect", f"--property=EnvironmentFile={path}",
         "/usr/bin/env", "--null"],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    found = dict(entry.partition("=")[::2] for entry in ran.stdout.split("\0") if entry)
    return {name: value for name, value in found.items() if len(name) == 1 or name == "_D"}


@pytest.mark.parametrize("text", CASES)
def test_what_people_write(systemd_user: SystemdUser, tmp_path: Path, text: str) -> None:
    path = tmp_path / "variables"
    path.write_bytes(text.encode())

    variables, _ = read_environment_file(path)

    assert variables == as_systemd_reads(path)


def test_what_nobody_would_write(systemd_user: SystemdUser, tmp_path: Path) -> None:
    numbers = random.Random(17)
    path = tmp_path / "variables"
    for _ in range(60):
        text = "".join(numbers.choice("AB=='\"\\\\ \t\n\n#;$x`") for _ in range(numbers.randrange(60)))
        # Of a comment's end the versions of systemd differ.
        text = "A=1\n" + text.replace("#", "x").replace(";", "x")
        path.write_bytes(text.encode())

        variables = {name: value for name, value in read_environment_file(path)[0].items() if len(name) == 1}

        assert variables == as_systemd_reads(path), text


def test_what_sets_nothing_is_told() -> None:
    assert read_variables("A=1\nMAGI_TCP off\n1B=2\n")[1] == ("MAGI_TCP off", "1B")


def test_what_is_no_such_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "huge").write_bytes(b"#" * 2_000_000)

    for name in ("binary", "huge"):
        with pytest.raises(ValueError):
            read_environment_file(tmp_path / name)
