"""``magictl``: the command line that talks to the agent.

Only the group is here. Each command lives in a module of its own, imported when it is called, so that no command pays
for another's imports.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

from magi_agent import __version__
from magi_agent.cli.command import LazyGroup
from magi_agent.cli.exits import CommandError, Exit, OutputError
from magi_agent.cli.options import Session, options_everywhere

_COMMANDS = {
    "status": "status.status",
    "models": "listing.models",
    "servers": "listing.servers",
    "show": "show.show",
    "start": "power.start",
    "stop": "power.stop",
    "restart": "power.restart",
    "enable": "choices.enable",
    "disable": "choices.disable",
    "settings": "model_settings.settings",
    "tier": "overrides.tier",
    "thinking": "overrides.thinking",
    "port": "ports.port",
    "port-range": "ports.port_range",
    "profile": "profile.profile",
    "rescan": "rescan.rescan",
    "scan": "scan.scan",
    "logs": "logs.logs",
    "host": "host.host",
    "drain": "drain.drain",
    "export": "transfer.export",
    "import": "transfer.import_file",
    "token": "token.token",
    "check": "check.check",
    "doctor": "doctor.doctor",
    "completion": "completion.completion",
}
"""Each command, in the order of the help text, and the module of this package that has it."""


_EXAMPLES = (
    "magictl status                      what runs, what is missing, and why",
    "magictl models                      what could run",
    "magictl start ID                    start one, and watch it load",
    "magictl settings ID ctx_size=16k    choose how one is run",
    "magictl servers --json | jq .       for scripts",
)
A_SHELL_ASKS = "_MAGICTL_COMPLETE"
"""Variable by which a shell asks for completions: click's name for it."""
_STATUSES = ("0 done   1 failed   2 wrong usage   3 agent not reachable   4 no such model or profile",)


@click.group(
    cls=LazyGroup,
    params=options_everywhere(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="magictl", message="%(prog)s %(version)s")
def command_line() -> None:
    """Run local language models through the MAGI agent.

    Looks for the agent at --socket or --url; else at $MAGI_URL or $MAGI_SOCKET; else at the system's socket
    /run/magi-agent/api.sock, at your own $XDG_RUNTIME_DIR/magi-agent/api.sock, or at http://127.0.0.1:8000.
    """


command_line.modules = _COMMANDS
command_line.blocks = (("Examples", _EXAMPLES), ("Exit status", _STATUSES))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``magictl`` with ``arguments`` (default: this process's) and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A mark or a name that the terminal's character set lacks must not end the command.
            stream.reconfigure(errors="replace")
    session = Session()
    if A_SHELL_ASKS in os.environ:
        from magi_agent.cli.completion import register

        register()
    try:
        return _run(session, words)
    except OutputError as error:
        return _give_up_output(error)


def _run(session: Session, words: list[str]) -> int:
    try:
        outcome = command_line.main(words, prog_name="magictl", standalone_mode=False, obj=session)
    except CommandError as error:
        explained = _explained(session, error)
        session.screen.failure(explained)
        return explained.exit_status
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return Exit.USAGE
    except click.ClickException as error:
        session.as_json = session.as_json or "--json" in words
        session.screen.failure(_usage_failure(error))
        return error.exit_code
    except click.Abort:
        session.screen.failure(CommandError("Interrupted", "interrupted"))
        return Exit.FAILED
    return int(outcome) if isinstance(outcome, int) else Exit.OK


def _give_up_output(error: OutputError) -> int:
    """Say on standard error that standard output failed, and let Python not try again as it ends."""
    if not error.nobody_reads:
        with suppress(OSError):
            click.echo(f"magictl: {error}", err=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return Exit.FAILED


def _explained(session: Session, error: CommandError) -> CommandError:
    if error.exit_status != Exit.NOT_FOUND:
        return error
    from magi_agent.cli.names import with_suggestion

    return with_suggestion(session.client, error)


def _usage_failure(error: click.ClickException) -> CommandError:
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    context = error.ctx if isinstance(error, click.UsageError) else None
    # A question that is its own advice needs no other.
    if context is not None and not message.endswith("?"):
        message = f"{message}; see: {context.command_path} --help"
    return CommandError("UsageError", message)


def run() -> NoReturn:
    """Run ``magictl`` as a process."""
    sys.exit(main())


if __name__ == "__main__":
    run()
