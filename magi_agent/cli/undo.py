"""What ``magictl check`` changed and has still to put back."""

from dataclasses import dataclass, field

from magi_agent.cli.client import Client, Json
from magi_agent.cli.exits import CommandError

_PUT_BACK_SECONDS = 30.0
_GONE_IS_FINE = frozenset({404})


@dataclass(frozen=True, slots=True)
class Step:
    """One request that puts one thing back, and what a person would do to the same end."""

    what: str
    method: str
    path: str
    body: Json = None


@dataclass
class UndoList:
    """Steps to put back, the latest first. A step is listed before its change is asked for, so none can be missed."""

    client: Client
    steps: list[Step] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Remember ``step``."""
        self.steps.append(step)

    def put_back(self) -> list[str]:
        """Take all steps; return one sentence for each that failed, which stays listed."""
        failures: list[str] = []
        for step in reversed(list(self.steps)):
            try:
                self.client.request(
                    step.method, step.path, step.body, timeout=_PUT_BACK_SECONDS, also_accept=_GONE_IS_FINE
                )
            except CommandError as error:
                failures.append(f"{step.what} was not put back: {error.message}")
            else:
                self.steps.remove(step)
        return failures
