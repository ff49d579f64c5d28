"""``magictl doctor``: whether this host is as the agent needs it, and how to mend what is not."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Final

from magi_agent.cli.address import is_on_this_host
from magi_agent.cli.command import command
from magi_agent.cli.doctor_findings import Finding, Result, unknown
from magi_agent.cli.doctor_patient import Patient
from magi_agent.cli.exits import CommandError, Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import counted
from magi_agent.cli.screen import Screen

_PATIENCE: Final = 120.0
"""Seconds for one check: a file system or a program that does not answer must not hold up the others."""
_MARKS: Final = {
    Result.OK: Cell("✓", "green"),
    Result.WARNING: Cell("!", "yellow"),
    Result.FAILED: Cell("✗", "bold red"),
    Result.UNKNOWN: Cell("!", "cyan"),
}
_LABEL_WIDTH: Final = 14

Check = Callable[[Patient], Iterator[Finding]]


@command(
    "magictl doctor", "sudo magictl doctor", "magictl doctor --json | jq '.findings[] | select(.result != \"ok\")'"
)
def doctor(session: Session) -> int:
    """Check this host, and say how to mend what is wrong.

    Configuration (the one that the running agent goes by, else the one that its unit names), tokens, service, sockets,
    launcher, users, llama-server with its libraries and devices, GPUs, model folders, ports, systemd, control groups
    and memory. It works with the agent down, and without root, who sees more. Nothing is changed; llama-server is run
    only as the servers are. Exit status 0: nothing is wrong; 1: something is.

    With --json: an object with the findings (check, result, found, mend), and how many there are of each result.
    """
    screen = session.screen
    address = session.client.address
    if not is_on_this_host(address):
        raise CommandError(
            "DoctorElsewhere",
            f"the doctor looks at its own host, and {address} may be another; run magictl doctor there",
            {"address": str(address)},
        )
    # What the parts that are used here log for the agent's journal is said by the findings.
    logging.getLogger("magi_agent").addHandler(logging.NullHandler())
    patient = Patient(session.client)
    findings: list[tuple[str, Finding]] = []
    for label, check in _checks():
        for finding in _made(label, check, patient):
            findings.append((label, finding))
            if not screen.as_json:
                _show(screen, label, finding)
    results = [finding.result for _, finding in findings]
    if screen.as_json:
        screen.json(
            {
                "findings": [
                    {"check": label, "result": finding.result, "found": finding.found, "mend": finding.mend}
                    for label, finding in findings
                ],
                **{result.value: results.count(result) for result in Result},
            }
        )
    else:
        screen.line("")
        screen.line(Cell(_summary(results, is_root=patient.is_root), "bold"))
    return Exit.FAILED if Result.FAILED in results else Exit.OK


def _checks() -> tuple[tuple[str, Check], ...]:
    from magi_agent.cli import (
        doctor_agent,
        doctor_control_groups,
        doctor_folders,
        doctor_host,
        doctor_ports,
        doctor_programs,
        doctor_reach,
        doctor_sockets,
    )

    return (
        ("configuration", doctor_agent.configuration),
        ("tokens", doctor_agent.tokens),
        ("systemd", doctor_host.systemd),
        ("service", doctor_agent.service),
        ("sockets", doctor_sockets.sockets),
        ("agent", doctor_agent.agent),
        ("launcher", doctor_agent.launcher),
        ("users", doctor_host.users),
        ("llama-server", doctor_programs.binaries),
        ("GPU", doctor_host.gpu),
        ("devices", doctor_programs.devices),
        ("model folders", doctor_folders.folders),
        ("ports", doctor_ports.ports),
        ("server address", doctor_reach.reach),
        ("control groups", doctor_control_groups.control_groups),
        ("memory", doctor_host.memory),
    )


def _made(label: str, check: Check, patient: Patient) -> list[Finding]:
    """What a check finds within its time."""
    findings: list[Finding] = []

    def work() -> None:
        try:
            findings.extend(check(patient))
        except Exception as error:  # noqa: BLE001  # whatever it was, the other checks are worth making
            findings.append(unknown(f"this could not be looked at: {type(error).__name__}: {error}"))

    thread = threading.Thread(target=work, name=f"doctor {label}", daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if thread.is_alive():
        return [*findings, unknown(f"no answer within {_PATIENCE:.0f} s; a file system or a program hangs")]
    return findings


def _show(screen: Screen, label: str, finding: Finding) -> None:
    mend = (Cell("; mend: ", "dim"), Cell(finding.mend, "bold")) if finding.mend else ()
    screen.line(_MARKS[finding.result], f" {label:<{_LABEL_WIDTH}}  ", finding.found, *mend)


def _summary(results: list[Result], *, is_root: bool) -> str:
    wrong, known, unseen = (results.count(result) for result in (Result.FAILED, Result.WARNING, Result.UNKNOWN))
    parts = [f"{wrong} wrong" if wrong else "nothing is wrong"]
    if known:
        parts.append(f"{known} to know of")
    if unseen:
        parts.append(f"{counted(unseen, 'thing')} could not be looked at" + ("" if is_root else "; root can see more"))
    return ", ".join(parts)
