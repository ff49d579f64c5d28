"""``magictl check``: the endpoint test script of the API.

Every choice is left as it was found, also when a check fails or the person interrupts: an interrupt lets the request
under way end, then everything is put back.
"""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from magi_agent.cli.answers import record, text
from magi_agent.cli.command import command
from magi_agent.cli.endpoints import ENDPOINTS, Endpoint, EndpointChecks, Finding, InterruptedCheckError
from magi_agent.cli.exits import CommandError, Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import NOTHING
from magi_agent.cli.screen import Screen
from magi_agent.cli.undo import UndoList

_MOST_PROBLEMS = 8
_PATH_WIDTH = max(len(endpoint.path) for endpoint in ENDPOINTS)


class _Interrupts:
    """Counts the wishes to end: the first ends the check at its next request, the second at once."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._count = 0
        self._putting_back = False

    def none_yet(self) -> bool:
        """Whether the check may go on."""
        return self._count == 0

    def hold_off(self) -> None:
        """Let nothing interrupt from now on."""
        self._putting_back = True

    def on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # a handler's signature
        """Count one."""
        self._count += 1
        if self._putting_back:
            return
        if self._count > 1:
            raise InterruptedCheckError
        self._screen.note("interrupted: ending the request under way, then putting everything back")


@contextmanager
def _handled(interrupts: _Interrupts) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupts.on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@command("magictl check", "magictl check --json | jq .rate", "magictl check --url http://127.0.0.1:8000")
def check(session: Session) -> int:
    """Check the eleven endpoints: statuses, shapes, and that keys are camelCase.

    Choices are tried on the smallest model that is not in use, and a profile is made and deleted. All is left as it
    was found. Exit status 0: all passed; 1: not.
    """
    client, screen = session.client, session.screen
    agent = record(client.ask("GET", "/").body)
    undo = UndoList(client)
    interrupts = _Interrupts(screen)
    report = _Report(screen, str(client.address))
    report.begin(agent)
    with _handled(interrupts):
        try:
            checks = EndpointChecks(client, undo, interrupts.none_yet)
            for endpoint in ENDPOINTS:
                report.add(endpoint, checks.run(endpoint))
        except InterruptedCheckError:
            report.interrupted = True
        finally:
            interrupts.hold_off()
            report.left_behind = undo.put_back()
    return report.end()


class _Report:
    """Writes the lines and the summary, or one JSON document."""

    def __init__(self, screen: Screen, address: str) -> None:
        self._screen = screen
        self._address = address
        self._findings: list[tuple[Endpoint, Finding]] = []
        self.interrupted = False
        self.left_behind: list[str] = []

    def begin(self, agent: Mapping[str, object]) -> None:
        """Say what is checked."""
        if self._screen.as_json:
            return
        name = " ".join(part for part in (text(agent.get("name")), text(agent.get("version"))) if part)
        self._screen.line(Cell(name or "agent", "bold"), " at ", self._address)
        self._screen.line("")

    def add(self, endpoint: Endpoint, finding: Finding) -> None:
        """Write the line of one check."""
        self._findings.append((endpoint, finding))
        if self._screen.as_json:
            return
        number = len(self._findings)
        mark = Cell("✗", "bold red") if finding.problems else Cell("✓", "green")
        status = str(finding.status or NOTHING)
        self._screen.line(
            mark,
            f" {number:2} ",
            Cell(f"{endpoint.method:<6} ", "cyan"),
            f"{endpoint.path:<{_PATH_WIDTH}}  ",
            Cell(f"{status:>3}", "red" if finding.problems else "green"),
            Cell(f" {finding.seconds * 1000:5.0f} ms", "dim"),
        )
        if finding.note:
            self._screen.line(Cell(f"     {finding.note}", "dim"))
        for problem in finding.problems[:_MOST_PROBLEMS]:
            self._screen.line("     ", Cell(problem, "red"))
        if len(finding.problems) > _MOST_PROBLEMS:
            self._screen.line(Cell(f"     and {len(finding.problems) - _MOST_PROBLEMS} more (--json lists all)", "red"))

    def end(self) -> int:
        """Write the summary and return the exit status."""
        failed = sum(bool(finding.problems) for _, finding in self._findings)
        failed += len(ENDPOINTS) - len(self._findings)
        passed = len(ENDPOINTS) - failed
        rate = round(100 * passed / len(ENDPOINTS), 1)
        if self._screen.as_json:
            self._screen.json(self._json(passed, failed, rate))
        else:
            self._show_summary(passed, failed, rate)
        if self.left_behind:
            self._screen.failure(CommandError("NotPutBack", "; ".join(self.left_behind)))
        if self.interrupted:
            self._screen.failure(CommandError("Interrupted", "interrupted; the checks not made count as failed"))
        return Exit.FAILED if failed or self.left_behind or self.interrupted else Exit.OK

    def _show_summary(self, passed: int, failed: int, rate: float) -> None:
        style = "bold red" if failed else "bold green"
        self._screen.line("")
        self._screen.line(Cell("Total   ", "bold"), f"{len(ENDPOINTS):>5}")
        self._screen.line(Cell("Passed  ", "bold"), Cell(f"{passed:>5}", "green" if passed else ""))
        self._screen.line(Cell("Failed  ", "bold"), Cell(f"{failed:>5}", "red" if failed else ""))
        self._screen.line(Cell("Rate    ", "bold"), Cell(f"{rate:>5g} %", style))

    def _json(self, passed: int, failed: int, rate: float) -> dict[str, object]:
        return {
            "address": self._address,
            "checks": [
                {
                    "number": number,
                    "name": endpoint.name,
                    "method": endpoint.method,
                    "path": endpoint.path,
                    "status": finding.status,
                    "milliseconds": round(finding.seconds * 1000, 1),
                    "passed": not finding.problems,
                    "problems": finding.problems,
                    "note": finding.note,
                }
                for number, (endpoint, finding) in enumerate(self._findings, 1)
            ],
            "total": len(ENDPOINTS),
            "passed": passed,
            "failed": failed,
            "rate": rate,
            "interrupted": self.interrupted,
            "leftBehind": self.left_behind,
        }
