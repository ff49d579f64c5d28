"""``magi-agent``: the service. Started by systemd, or by hand on a terminal.

Exit status: 0 stopped as it was told, 1 a part of it died, 2 wrong usage, 73 another agent uses the same state,
78 the configuration is wrong (the last two as in sysexits.h).
"""

from magi_agent import without_openssl  # noqa: F401  # before all that would import it

# isort: split

import asyncio
import ctypes
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Final

import click

from magi_agent import __version__
from magi_agent.configuration import ConfigurationSources, needs_token
from magi_agent.errors import AlreadyRunning, ConfigurationError
from magi_agent.host.environment_file import read_environment_file
from magi_agent.settings.settings import DEFAULTS_SECTION, Settings, shown
from magi_agent.settings.table import SETTINGS
from magi_agent.tokens import TokensUnreadable, read_tokens

_ENVIRONMENT_FILE: Final = Path("/etc/default/magi-agent")
"""What the package's unit has in its environment."""
_PAUSE_BEFORE_THE_NEXT: Final = 1.0
_LAST_WAIT: Final = 3.0
"""Seconds, once the agent has stopped, that calls under way in threads have to come back."""
# Of mallopt(3).
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_OF_ITS_OWN: Final = 64 * 1024
"""Bytes from which a piece of memory is mapped for itself, and so given back to the kernel once it is let go."""
_LONGEST_NAME: Final = max(len(f"{setting.section}.{setting.name}") for setting in SETTINGS)


class AgentExit(IntEnum):
    """The exit statuses of ``magi-agent``."""

    OK = 0
    DIED = 1
    USAGE = 2
    STATE_IN_USE = 73
    CONFIGURATION = 78


def _options() -> list[click.Parameter]:
    options: list[click.Parameter] = [
        click.Option(
            ["--config"],
            metavar="FILE",
            help="Configuration file. [default: $MAGI_CONFIG or /etc/magi-agent/agent.toml]",
        ),
        click.Option(["--check"], is_flag=True, help="Check the configuration, show what holds, and exit."),
    ]
    for setting in SETTINGS:
        default = f" [default: {setting.default}]" if setting.default else ""
        text = f"{setting.help[:1].upper()}{setting.help[1:]}. ${setting.variable}{default}"
        options.append(click.Option([setting.option, setting.name], metavar="VALUE", help=text))
    return options


@click.command(params=_options(), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="magi-agent", message="%(prog)s %(version)s")
def command_line(config: str | None, check: bool, **given: str | None) -> int:
    """Run local language models, each in a systemd unit of its own.

    Finds the models in MODEL_SCAN_PATH and serves its API on a unix socket and on TCP. Stopping it stops no model.
    Every option is a key of the configuration file and an environment variable too; an option wins over the
    environment, and that over the file.
    """
    options = {name: value for name, value in given.items() if value is not None}
    is_activated = "LISTEN_FDS" in os.environ
    try:
        sources = ConfigurationSources(options, os.environ, Path(config) if config else None)
        settings = sources.read()
        if check:
            tokens = _tokens_of(settings)
            _show(settings)
            for line in (*tokens, *_set_for_the_service_alone()):
                click.echo(line)
            return AgentExit.OK
        return asyncio.run(_serve(settings, sources))
    except ConfigurationError as error:
        click.echo(f"magi-agent: {error}", err=True)
        if is_activated and not check:
            # Who is waiting in the socket has systemd start the next one at once, and that as often as it can.
            time.sleep(_PAUSE_BEFORE_THE_NEXT)
        return AgentExit.CONFIGURATION
    except AlreadyRunning as error:
        click.echo(f"magi-agent: {error}", err=True)
        return AgentExit.STATE_IN_USE


async def _serve(settings: Settings, sources: ConfigurationSources) -> int:
    _spare_memory()
    # What the service needs takes a third of a second to import: a wrong option or --check need not wait for it.
    from magi_agent.agent import Agent
    from magi_agent.log_output import set_up_logging

    set_up_logging(settings.log_level)
    outcome = AgentExit.OK if await Agent(settings, None, sources.read, sources).run() else AgentExit.DIED
    _end_by_force(outcome)
    return outcome


def _spare_memory() -> None:
    """Save some megabytes of those that the service would hold for good; before what it needs is imported."""
    libc = ctypes.CDLL(None)
    # Left to itself, glibc raises this threshold with the first large answer, and keeps what that one took.
    libc.mallopt(_M_MMAP_THRESHOLD, _OF_ITS_OWN)
    # Threads share one lock, Python's: arenas of their own would only hold more.
    libc.mallopt(_M_ARENA_MAX, 1)
    # In C, the lists in which aiohttp keeps middlewares need the library of C++, to be a tenth of a microsecond faster.
    os.environ["FROZENLIST_NO_EXTENSIONS"] = "1"


def _end_by_force(outcome: AgentExit) -> None:
    """End the process soon, whoever is still waited for: a call to a file system that hangs never comes back."""

    def end() -> None:
        sys.stderr.flush()
        os._exit(outcome)

    timer = threading.Timer(_LAST_WAIT, end)
    timer.daemon = True
    timer.start()


def _show(settings: Settings) -> None:
    click.echo("the configuration is valid; what holds:")
    values = shown(settings)
    for setting in SETTINGS:
        name = f"{setting.section}.{setting.name}"
        click.echo(f"  {name:{_LONGEST_NAME}}  {values[setting.name] or '-'}")
    for name, value in values.items():
        if name.startswith(f"{DEFAULTS_SECTION}."):
            click.echo(f"  {name:{_LONGEST_NAME}}  {value}")


def _set_for_the_service_alone() -> list[str]:
    """What the service would be told beside what this process was, where that may be read."""
    try:
        variables, _ = read_environment_file(_ENVIRONMENT_FILE)
    except (OSError, ValueError):
        return []
    known = {setting.variable for setting in SETTINGS} | {"MAGI_CONFIG"}
    more = [name for name in sorted(known & variables.keys()) if os.environ.get(name) != variables[name]]
    if not more:
        return []
    return [f"not counted: {', '.join(more)} of {_ENVIRONMENT_FILE}, for the service alone; magictl doctor counts them"]


def _tokens_of(settings: Settings) -> list[str]:
    """What there is to say of the tokens, none of which is in it. Raises ``ConfigurationError``, as a start would."""
    path = settings.tokens_path
    try:
        found = read_tokens(path)
    except TokensUnreadable as error:
        # Whoever checks a configuration need not be who may use it.
        return [f"tokens: {error}"]
    if settings.tcp and not settings.tcp.is_loopback and not found.tokens:
        raise ConfigurationError(f"api.tcp (MAGI_TCP): {needs_token(str(settings.tcp), path)}")
    now = datetime.now(UTC)
    ended = sum(token.has_ended(now) for token in found.tokens)
    state = "it is not there" if not found.is_there else f"it holds {len(found.tokens)}, of which {ended} have ended"
    lines = [f"tokens: {path}: {state}"]
    lines += [f"  {token}{', which is past' if token.has_ended(now) else ''}" for token in found.tokens]
    return [*lines, *(f"  {problem}" for problem in (*found.problems, *found.not_understood))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``magi-agent`` with ``arguments`` (default: this process's) and return its exit status."""
    try:
        outcome = command_line.main(arguments, prog_name="magi-agent", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return AgentExit.DIED
    return int(outcome) if isinstance(outcome, int) else AgentExit.OK


if __name__ == "__main__":
    sys.exit(main())
