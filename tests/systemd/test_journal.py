"""Reading what units wrote, from a real journal."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from magi_agent.systemd import journal as journal_module
from magi_agent.systemd import journalctl
from magi_agent.systemd.errors import JournalError
from magi_agent.systemd.journal import Journal, Selection
from magi_agent.systemd.journal_entries import JournalEntry
from tests.conftest import SystemdUser
from tests.systemd.units import MakeName, run, shown, systemctl, until

LAST_WORD = "that was all"

Speak = Callable[..., Awaitable[str]]


@pytest.fixture
def journal(systemd_user: SystemdUser) -> Journal:
    return Journal(systemd_user.journal)


@pytest.fixture
def speak(systemd_user: SystemdUser, unit_name: MakeName, tmp_path: Path) -> Speak:
    """Runs a script in a unit until its last word is in the journal; returns the unit's identifier."""

    async def run_unit(script: str, *properties: str, name: str = "") -> str:
        name = name or unit_name("journal")
        identifier = name.removesuffix(".service")
        file = tmp_path / "script"
        file.write_text(f"{script}\necho '{LAST_WORD}'\nexec sleep 600\n")
        await asyncio.to_thread(
            run,
            *("systemd-run", "--user", "--quiet", f"--unit={name}", f"--property=SyslogIdentifier={identifier}"),
            *(f"--property={item}" for item in properties),
            *("bash", str(file)),
        )
        invocation = shown(name, "InvocationID")
        reader = Journal(systemd_user.journal)
        deadline = time.monotonic() + 20
        while not any(
            entry.message == LAST_WORD
            for entry in await reader.read_last(identifier, lines=3, invocation_id=invocation)
        ):
            assert time.monotonic() < deadline, "the unit's words are not in the journal"
            await asyncio.sleep(0.02)
        return identifier

    return run_unit


def messages(entries: list[JournalEntry]) -> list[str]:
    return [entry.message for entry in entries]


async def test_the_last_lines_come_oldest_first(journal: Journal, speak: Speak) -> None:
    before = time.time()
    identifier = await speak("for i in 1 2 3 4 5; do echo line $i; done")

    entries = await journal.read_last(identifier, lines=3)

    assert messages(entries) == ["line 4", "line 5", LAST_WORD]
    assert before - 1 <= entries[0].timestamp <= entries[-1].timestamp <= time.time() + 1
    assert {entry.priority for entry in entries} == {6}
    assert str(entries[-1].pid) == shown(f"{identifier}.service", "MainPID")
    assert {entry.invocation_id for entry in entries} == {shown(f"{identifier}.service", "InvocationID")}


async def test_the_priority_is_the_units_own(journal: Journal, speak: Speak) -> None:
    identifier = await speak("echo '<3>an error'; echo '<7>a detail'")

    entries = await journal.read_last(identifier, lines=10)

    assert [(entry.priority, entry.message) for entry in entries][:2] == [(3, "an error"), (7, "a detail")]


async def test_one_run_is_told_from_another(journal: Journal, speak: Speak) -> None:
    identifier = await speak("echo first run")
    name = f"{identifier}.service"
    first = shown(name, "InvocationID")
    systemctl("stop", name)
    await speak("echo second run", name=name)
    second = shown(name, "InvocationID")

    assert messages(await journal.read_last(identifier, lines=10, invocation_id=first)) == ["first run", LAST_WORD]
    assert messages(await journal.read_last(identifier, lines=10, invocation_id=second)) == ["second run", LAST_WORD]
    assert await journal.read_last(identifier, lines=10, invocation_id="0" * 32) == []
    both = ["first run", LAST_WORD, "second run", LAST_WORD]
    assert messages(await journal.read_last(identifier, lines=10)) == both


async def test_an_identifier_that_a_stranger_claims_counts_for_nothing(journal: Journal, speak: Speak) -> None:
    identifier = await speak("echo true words")
    run("systemd-cat", f"--identifier={identifier}", "echo", "false words")
    stranger = await speak("echo other words", f"SyslogIdentifier={identifier}")

    assert messages(await journal.read_last(stranger, lines=10)) == ["other words", LAST_WORD]
    invocation = shown(f"{identifier}.service", "InvocationID")
    for chosen in (None, invocation):
        told = messages(await journal.read_last(identifier, lines=10, invocation_id=chosen))
        assert told == ["true words", LAST_WORD]


async def test_text_that_is_no_utf_8_can_be_read(journal: Journal, speak: Speak) -> None:
    identifier = await speak(r"printf 'bad \377 byte\n'; printf 'escape \033[31m red\n'; echo 'größe 模型'")

    told = messages(await journal.read_last(identifier, lines=10))

    assert told[:3] == ["bad � byte", "escape \x1b[31m red", "größe 模型"]


async def test_a_long_line_is_there_and_cut(journal: Journal, speak: Speak) -> None:
    # journalctl would leave out what is longer than 4096 bytes.
    identifier = await speak("printf 'begin '; printf 'x%.0s' {1..20000}; echo")

    [long, last] = messages(await journal.read_last(identifier, lines=2))

    assert long == ("begin " + "x" * 20000)[:4096]
    assert last == LAST_WORD


async def test_what_is_too_much_is_cut_at_the_old_end(
    journal: Journal, speak: Speak, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_MAX_OUTPUT", 50_000)
    identifier = await speak("for i in {1..300}; do printf \"$i \"; printf 'x%.0s' {1..1000}; echo; done")

    told = messages(await journal.read_last(identifier, lines=500))

    assert told[-1] == LAST_WORD
    numbers = [int(message.split()[0]) for message in told[:-1]]
    assert 20 < len(numbers) < 50
    assert numbers == list(range(301 - len(numbers), 301))


async def test_what_an_ended_run_said_can_still_be_read(journal: Journal, unit_name: MakeName) -> None:
    name = unit_name("ended")
    identifier = name.removesuffix(".service")
    crash = ("--property=RemainAfterExit=no", "sh", "-c", "echo its last words; exit 3")
    run("systemd-run", "--user", "--quiet", f"--unit={name}", f"--property=SyslogIdentifier={identifier}", *crash)
    await until(lambda: shown(name, "ActiveState") == "failed", "it failed")
    invocation = shown(name, "InvocationID")

    told: list[str] = []
    for _ in range(200):
        told = messages(await journal.read_last(identifier, lines=10, invocation_id=invocation))
        if told:
            break
        await asyncio.sleep(0.05)

    assert told == ["its last words"]


async def test_where_the_run_said_nothing_systemds_own_words_are_told(
    journal: Journal, unit_name: MakeName, tmp_path: Path
) -> None:
    # The private manager does not log to the journal: a unit of the same user speaks in its place, which, like a
    # user's manager, is in a run of its own.
    invocation = "0123456789abcdef" * 2
    script = tmp_path / "manager.py"
    script.write_text(
        "import signal, socket\n"
        "sending = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "sending.connect('/run/systemd/journal/socket')\n"
        f"sending.send(b'MESSAGE=of another run\\nUSER_INVOCATION_ID={'f' * 32}\\n')\n"
        f"sending.send(b'MESSAGE=cannot execute\\nUSER_INVOCATION_ID={invocation}\\nPRIORITY=3\\n')\n"
        "signal.pause()\n"
    )
    run("systemd-run", "--user", "--quiet", f"--unit={unit_name('speaker')}", sys.executable, str(script))

    told: list[JournalEntry] = []
    for _ in range(200):
        told = await journal.read_last("systemdtest-silent", lines=10, invocation_id=invocation)
        if told:
            break
        await asyncio.sleep(0.02)

    assert [(entry.priority, entry.message) for entry in told] == [(3, "cannot execute")]
    assert told[0].invocation_id not in {"", invocation}


async def test_what_came_too_late_to_be_told_apart_is_better_than_nothing(journal: Journal) -> None:
    # Where a process ends at once, journald may not find out which unit it was; here there is none.
    run("systemd-cat", "--identifier=systemdtest-hasty", "echo", "hasty words")

    told: list[str] = []
    for _ in range(200):
        told = messages(await journal.read_last("systemdtest-hasty", lines=10, invocation_id="0" * 32))
        if told:
            break
        await asyncio.sleep(0.02)

    assert told == ["hasty words"]
    assert await journal.read_last("systemdtest-hasty", lines=10) == []


async def test_of_a_unit_that_never_was_there_is_nothing(journal: Journal) -> None:
    assert await journal.read_last("systemdtest-never", lines=10) == []
    assert await journal.read_last("systemdtest-never", lines=10, invocation_id="0" * 32) == []


async def test_a_folder_without_a_journal_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="No such file"):
        await Journal(tmp_path / "none").read_last("x", lines=1)


async def test_an_empty_journal_is_no_error(tmp_path: Path) -> None:
    assert await Journal(tmp_path).read_last("x", lines=1) == []


async def test_without_journalctl_is_a_typed_error(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(JournalError, match="journalctl: No such file or directory"):
        await journal.read_last("x", lines=1)


def stand_in_for_journalctl(folder: Path, script: str) -> None:
    """A journalctl that does what the real one does only when a disk or a file is damaged."""
    file = folder / "journalctl"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


async def test_a_journalctl_that_hangs_is_ended_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in_for_journalctl(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(journalctl, "_TIMEOUT", 0.5)

    with pytest.raises(JournalError, match=r"no answer within 0\.5 s"):
        await Journal().read_last("x", lines=1)

    assert not process_of(tmp_path).exists()


async def test_one_that_is_cancelled_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in_for_journalctl(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    reading = asyncio.create_task(Journal().read_last("x", lines=1))
    await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip(), "it runs")

    reading.cancel()
    await asyncio.wait([reading])

    assert reading.cancelled()
    assert not process_of(tmp_path).exists()


async def test_one_that_floods_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in_for_journalctl(tmp_path, f"echo $$ > {tmp_path}/pid; exec yes")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    assert await Journal().read_last("x", lines=1) == []

    assert not process_of(tmp_path).exists()


async def test_an_entry_that_is_too_long_is_left_out_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(journalctl, "_LONGEST_LINE", 100_000)
    entry = '{"__REALTIME_TIMESTAMP":"1","MESSAGE":"%s"}'
    long = entry % ("x" * 1_000_000)
    (tmp_path / "lines").write_text("\n".join((entry % "one", long, entry % "two", long, long, entry % "three")))
    stand_in_for_journalctl(tmp_path, f"cat {tmp_path}/lines; echo")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    told = [entry.message async for entry in Journal().oldest(Selection(any_of=[]))]

    assert told == ["one", "two", "three"]


async def test_the_right_to_read_some_of_the_journal_may_not_be_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = "Hint: You are currently not seeing messages from other users and the system."
    stand_in_for_journalctl(tmp_path, f'echo \'{said}\' >&2; echo \'{{"__REALTIME_TIMESTAMP":"1","__CURSOR":"x"}}\'')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    assert await Journal().end(of_others=False) == "x"
    with pytest.raises(JournalError, match="make the agent's user a member of the group systemd-journal"):
        await Journal().end(of_others=True)


async def test_no_right_to_read_the_journal_names_the_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "No journal files were opened due to insufficient permissions."
    stand_in_for_journalctl(tmp_path, f"echo '{said}' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    with pytest.raises(JournalError, match="insufficient permissions; make the agent's user a member"):
        await Journal().read_last("x", lines=1)


async def test_one_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in_for_journalctl(tmp_path, "echo 'Input/output error' >&2; echo more >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    with pytest.raises(JournalError, match=r"^the journal cannot be read: Input/output error$"):
        await Journal().read_last("x", lines=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"__REALTIME_TIMESTAMP":"1","MESSAGE":null}', ""),
        ('{"__REALTIME_TIMESTAMP":"1"}', ""),
        ('{"__REALTIME_TIMESTAMP":"1","MESSAGE":[104,105]}', "hi"),
        ('{"__REALTIME_TIMESTAMP":"1","MESSAGE":["one","two"]}', "one"),
        ('{"__REALTIME_TIMESTAMP":"1","MESSAGE":[[104,105],"two"]}', "hi"),
        ('{"__REALTIME_TIMESTAMP":"1","MESSAGE":"m","PRIORITY":"?","_PID":null}', "m"),
    ],
)
async def test_every_form_of_a_field_can_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, message: str
) -> None:
    stand_in_for_journalctl(tmp_path, f"cat <<'END'\n{line}\nno JSON\n[1]\n{{}}\nEND")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    [entry] = await Journal().read_last("x", lines=1)

    assert (entry.message, entry.timestamp, entry.priority, entry.pid) == (message, 0.000001, None, None)


def process_of(folder: Path) -> Path:
    return Path("/proc", (folder / "pid").read_text().strip())
