"""What an unprivileged process may not read is listed, with the reason and the command that would allow it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.discovery.model_files import model_bytes, write_file

MODEL = model_bytes("llama")
# A first run as root imports all there is: the interpreter's own files may lie where only root can look.
AS_NOBODY = """
import contextlib, io, json, os, sys
from magi_agent.cli.magictl import main
from magi_agent.discovery.scanner import Scanner

folder = sys.argv[1]
with contextlib.redirect_stdout(io.StringIO()):
    main(["scan", folder, "--json"])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
if len(sys.argv) == 2:
    sys.exit(main(["scan", folder, "--json"]))
scanner = Scanner([folder])
for line in sys.stdin:
    print(json.dumps({facts.filename: facts.status for facts in scanner.scan().models}), flush=True)
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes away permissions from somebody else, as root")


@pytest.fixture
def models() -> Iterator[Path]:
    """A folder that everybody can reach, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="magi-permissions-"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


def scanned_by_nobody(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", AS_NOBODY, str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def suggested(sentence: str) -> str:
    match = re.search(r"to allow it: (sudo chmod .*)$", sentence)
    assert match, sentence
    return match[1].removeprefix("sudo ")


def test_unreadable_files_and_folders_are_listed_and_the_command_that_is_named_helps(models):
    write_file(models / "fine.gguf", MODEL)
    denied = write_file(models / "denied $x.gguf", MODEL)
    denied.chmod(0o600)
    inner = write_file(models / "closed" / "inner.gguf", MODEL)
    inner.parent.chmod(0o700)
    behind = write_file(models / "no-entry" / "deep" / "x.gguf", MODEL)
    (models / "linked.gguf").symlink_to(behind)
    behind.parent.parent.chmod(0o644)

    answer = scanned_by_nobody(models)
    statuses = {model["filename"]: model["status"] for model in answer["models"].values()}
    assert statuses == {"fine.gguf": "ok", "denied $x.gguf": "invalid", "linked.gguf": "invalid"}
    problems = {model["filename"]: model["problem"] for model in answer["models"].values()}
    assert problems["denied $x.gguf"] == (
        f"its mode does not let user nobody read it; to allow it: sudo chmod o+r '{denied}'"
    )
    assert f"the folder {models}/no-entry does not let user nobody through" in problems["linked.gguf"]
    assert any(f"{models}/closed: the folder cannot be read" in problem for problem in answer["problems"])
    assert f"{denied}: {problems['denied $x.gguf']}" in answer["problems"]

    for _ in range(4):
        sentences = [model["problem"] for model in answer["models"].values() if model["problem"]] + answer["problems"]
        for sentence in sentences:
            subprocess.run(suggested(sentence), shell=True, check=True)
        answer = scanned_by_nobody(models)
        if not answer["problems"] and all(model["status"] == "ok" for model in answer["models"].values()):
            break
    assert sorted(model["filename"] for model in answer["models"].values()) == [
        "denied $x.gguf",
        "fine.gguf",
        "inner.gguf",
        "x.gguf",
    ]
    assert answer["problems"] == []
    assert {model["status"] for model in answer["models"].values()} == {"ok"}


def test_a_change_of_permissions_is_seen_by_a_scanner_that_knows_the_file(models):
    path = write_file(models / "x.gguf", MODEL)
    write_file(models / "y.gguf", MODEL)
    command = [sys.executable, "-c", AS_NOBODY, str(models), "again"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def scan() -> dict[str, str]:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            statuses: dict[str, str] = json.loads(child.stdout.readline())
            return statuses

        try:
            assert scan() == {"x.gguf": "ok", "y.gguf": "ok"}
            path.chmod(0o600)
            assert scan() == {"x.gguf": "invalid", "y.gguf": "ok"}
            path.chmod(0o644)
            assert scan() == {"x.gguf": "ok", "y.gguf": "ok"}
        finally:
            child.stdin.close()
