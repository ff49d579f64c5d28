"""What ``magictl check`` changed and has still to put back."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from magi_agent.cli.client import Client, Json
from magi_agent.cli.exits import CommandError

_PUT_BACK_SECONDS = 30.0
_GONE_IS_FINE = frozenset({404})


@dataclass(frozen=True, slots=True)
class Step:
    """One request that puts one thing back."""

    what: str
    method: str
    path: str
    body: Json
    is_as_it_was: Callable[[Client], bool]
    """Asks the agent whether there is nothing to put back: it may have refused the change in the first place."""


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
            failure = self._take(step)
            if failure:
                body = "" if step.body is None else f" {json.dumps(step.body)}"
                failures.append(f"{step.what} was not put back ({failure}); to do it: {step.method} {step.path}{body}")
            else:
                self.steps.remove(step)
        return failures

    def _take(self, step: Step) -> str:
        try:
            self.client.request(step.method, step.path, step.body, timeout=_PUT_BACK_SECONDS, also_accept=_GONE_IS_FINE)
        except CommandError as error:
            return "" if self._is_as_it_was(step) else error.message
        return ""

    def _is_as_it_was(self, step: Step) -> bool:
        try:
            return step.is_as_it_was(self.client)
        except CommandError:
            return False
