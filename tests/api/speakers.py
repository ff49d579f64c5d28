"""Units that go by the name of a model's server and say what a test has them say."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from magi_agent.servers.launch import unit_name
from tests.systemd.units import run, shown, until


@dataclass(frozen=True, slots=True)
class Speaker:
    """The unit of one model."""

    model_id: str
    journal: Path
    folder: Path

    @property
    def unit(self) -> str:
        return unit_name(self.model_id)

    async def say(self, script: str, *, and_stay: bool = False) -> str:
        """Run a script of bash in the unit until its last word is in the journal; returns the run's id."""
        last_word = f"said {self._said()}"
        file = self.folder / f"{self.model_id}.sh"
        file.write_text(f"{script}\necho {shlex.quote(last_word)}\n{'exec sleep 600' if and_stay else 'sleep 0.2'}\n")
        identifier = self.unit.removesuffix(".service")
        await asyncio.to_thread(
            run,
            *("systemd-run", "--user", "--quiet", f"--unit={self.unit}", "--property=RemainAfterExit=yes"),
            *(f"--property=SyslogIdentifier={identifier}", "bash", str(file)),
        )
        invocation = shown(self.unit, "InvocationID")
        await until(lambda: last_word in self.output(), f"the journal has {last_word!r}")
        if not and_stay:
            await self.stop()
        return invocation

    async def stop(self) -> None:
        await asyncio.to_thread(run, "systemctl", "--user", "stop", self.unit)

    def output(self) -> list[str]:
        """All that is in the journal of it, as journalctl's own words."""
        words = ["journalctl", f"--directory={self.journal}", "--quiet", "--output=cat", "--all"]
        printed = subprocess.run(
            [*words, f"_SYSTEMD_USER_UNIT={self.unit}"], capture_output=True, timeout=30, check=False
        ).stdout
        return printed.decode(errors="replace").splitlines()

    def _said(self) -> int:
        return sum(line.startswith("said ") for line in self.output())
