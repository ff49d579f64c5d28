"""``magictl check``: the endpoint test script of the API.

Every choice is left as it was found, also when a check fails or the person interrupts: an interrupt lets the request
under way end, then everything is put back.
"""

from collections.abc import Mapping

from magi_agent.cli.answers import text
from magi_agent.cli.command import command
from magi_agent.cli.endpoints import ENDPOINTS, Endpoint, EndpointChecks, Finding, Result
from magi_agent.cli.exits import CommandError, Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.interrupts import InterruptedCheckError, Interrupts
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import NOTHING
from magi_agent.cli.screen import Screen
from magi_agent.cli.undo import UndoList

_MOST_PROBLEMS = 8
_PATH_WIDTH = max(len(endpoint.path) for endpoint in ENDPOINTS)
_DENIED = frozenset({401, 403})
_MARKS: Mapping[Result, Cell] = {
    Result.PASSED: Cell("✓", "green"),
    Result.FAILED: Cell("✗", "bold red"),
    Result.SKIPPED: Cell("-", "yellow"),
}
_STYLES: Mapping[Result, str] = {Result.PASSED: "green", Result.FAILED: "red", Result.SKIPPED: "yellow"}


@command("magictl check", "magictl check --json | jq .rate", "magictl check --url http://127.0.0.1:8000")
def check(session: Session) -> int:
    """Check the eleven endpoints of the API.

    Statuses, headers, shapes, and that keys are camelCase. Choices are tried on the smallest model that is not in use,
    and a profile is made and deleted; nothing is started or stopped, and all is left as it was found. What a host
    without models gives no chance to try is skipped, and counts as neither passed nor failed. Exit status 0: nothing
    failed; 1: something did.
    """
    client, screen = session.client, session.screen
    agent = client.get("/", "name", "version")
    undo = UndoList(client)
    interrupts = Interrupts(screen)
    report = _Report(screen, str(client.address))
    report.begin(agent)
    with interrupts.handled():
        try:
            checks = EndpointChecks(client, undo, interrupts)
            for endpoint in ENDPOINTS:
                report.add(endpoint, checks.run(endpoint))
        except InterruptedCheckError:
            report.interrupted = True
        finally:
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
        status = str(finding.status or NOTHING)
        self._screen.line(
            _MARKS[finding.result],
            f" {number:2} ",
            Cell(f"{endpoint.method:<6} ", "cyan"),
            f"{endpoint.path:<{_PATH_WIDTH}}  ",
            Cell(f"{status:>3}", _STYLES[finding.result]),
            Cell(f" {finding.seconds * 1000:5.0f} ms", "dim"),
            Cell(f"  {finding.note}" if finding.note else "", "dim"),
        )
        for problem in finding.problems[:_MOST_PROBLEMS]:
            self._screen.line("     ", Cell(problem, "red"))
        if len(finding.problems) > _MOST_PROBLEMS:
            self._screen.line(Cell(f"     and {len(finding.problems) - _MOST_PROBLEMS} more (--json lists all)", "red"))

    def end(self) -> int:
        """Write the summary and return the exit status."""
        results = [finding.result for _, finding in self._findings]
        # What was not come to was not seen to be right.
        results += [Result.FAILED] * (len(ENDPOINTS) - len(results))
        counts = {result: results.count(result) for result in Result}
        rate = round(100 * counts[Result.PASSED] / len(ENDPOINTS), 1)
        if self._screen.as_json:
            self._screen.json(self._json(counts, rate))
        else:
            self._show_summary(counts, rate)
            self._say_what_is_denied()
        if self.left_behind:
            self._screen.failure(CommandError("NotPutBack", "; ".join(self.left_behind)))
        if self.interrupted:
            self._screen.failure(CommandError("Interrupted", "interrupted; the checks not made count as failed"))
        return Exit.FAILED if counts[Result.FAILED] or self.left_behind or self.interrupted else Exit.OK

    def _show_summary(self, counts: Mapping[Result, int], rate: float) -> None:
        rows = [("Total", f"{len(ENDPOINTS)}", "")]
        for result, count in counts.items():
            if count or result is not Result.SKIPPED:
                rows.append((result.capitalize(), f"{count}", _STYLES[result] if count else ""))
        style = "bold red" if counts[Result.FAILED] else "bold green"
        rows.append(("Rate", f"{rate:g} %", style))
        self._screen.line("")
        for label, value, style in rows:
            number, _, unit = value.partition(" ")
            self._screen.line(Cell(f"{label:<8}", "bold"), Cell(f"{number:>5} {unit}".rstrip(), style))

    def _say_what_is_denied(self) -> None:
        denied = [endpoint for endpoint, finding in self._findings if finding.status in _DENIED]
        if not denied:
            return
        right = "no access" if any(endpoint.method == "GET" for endpoint in denied) else "read access only"
        self._screen.note(
            Cell("! ", "yellow"),
            f"{right} by {self._address}: {len(denied)} of {len(ENDPOINTS)} could not be checked; "
            "root and members of the group magi may do everything by --socket",
        )

    def _json(self, counts: Mapping[Result, int], rate: float) -> dict[str, object]:
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
                    "result": finding.result,
                    "problems": finding.problems,
                    "note": finding.note,
                }
                for number, (endpoint, finding) in enumerate(self._findings, 1)
            ],
            "total": len(ENDPOINTS),
            "passed": counts[Result.PASSED],
            "failed": counts[Result.FAILED],
            "skipped": counts[Result.SKIPPED],
            "rate": rate,
            "interrupted": self.interrupted,
            "leftBehind": self.left_behind,
        }
