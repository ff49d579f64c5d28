"""Properties of units and of the manager, as systemctl(1) shows them.

For what runs once and must work for anybody; the agent itself follows the manager over D-Bus.
"""

import subprocess
from typing import Final

from magi_agent.vocabulary import Scope

_SECONDS: Final = 10.0


class SystemctlFailed(Exception):
    """There is no systemctl, or it could not ask the manager; the message is a sentence."""


def properties(scope: Scope, unit: str | None, *names: str) -> dict[str, str]:
    """Properties of a unit, or with ``None`` of the manager; what systemd does not know is left out.

    The entries of a list that systemd shows one by one are joined by line breaks.

    Raises ``SystemctlFailed``.
    """
    command = ["systemctl", f"--{scope}", "show", f"--property={','.join(names)}"]
    if unit is not None:
        command += ["--", unit]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )  # fmt: skip
    except FileNotFoundError:
        raise SystemctlFailed("there is no systemctl here") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemctlFailed(f"systemctl does not answer: {error}") from None
    if ran.returncode != 0:
        raise SystemctlFailed(ran.stderr.strip().partition("\n")[0] or "systemctl failed")
    found: dict[str, str] = {}
    for line in ran.stdout.splitlines():
        name, is_one, value = line.partition("=")
        if is_one:
            # A list may come as a line for each of its entries.
            found[name] = f"{found[name]}\n{value}" if name in found else value
    return found
