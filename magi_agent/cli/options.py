"""The options every command takes, before or after its name, and what they make: a session."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import click

from magi_agent.cli.screen import Screen

if TYPE_CHECKING:
    from magi_agent.cli.address import Address
    from magi_agent.cli.client import Client


@dataclass
class Session:
    """What one run of ``magictl`` was told about the agent and the output, and what follows from it."""

    socket: str | None = None
    url: str | None = None
    token_file: str | None = None
    as_json: bool = False

    @cached_property
    def client(self) -> "Client":
        """The client for the address that was given, or the default. Raises ``click.UsageError`` for a bad one."""
        from magi_agent.cli.address import SocketAddress, UrlAddress, default_address, parse_url

        if self.socket is not None and self.url is not None:
            raise click.UsageError("give --socket or --url, not both")
        if self.socket == "":
            raise click.UsageError("--socket needs a path")
        try:
            if self.socket is not None:
                return self._client_at(SocketAddress(self.socket), None)
            address = parse_url(self.url) if self.url is not None else default_address(os.environ)
            # On the unix socket everybody is known without a token, and may do no more with that of the environment.
            named = os.environ.get("MAGI_TOKEN_FILE") if isinstance(address, UrlAddress) else None
            return self._client_at(address, named)
        except ValueError as error:
            raise click.UsageError(str(error)) from None

    def _client_at(self, address: "Address", token_named: str | None) -> "Client":
        from magi_agent.cli.client import Client
        from magi_agent.cli.silence import Silence

        def say(line: str) -> None:
            if not self.as_json:
                self.screen.note(line)

        return Client(address, self._token(token_named), Silence(address, say))

    def _token(self, named: str | None) -> str | None:
        """Return the token of the file that the option names, or else ``named``. Raises ``ValueError``."""
        path = self.token_file if self.token_file is not None else named
        if not path:
            return None
        from magi_agent.cli.token_reading import read_token

        return read_token(path)

    @cached_property
    def screen(self) -> Screen:
        """Where this run writes."""
        return Screen.of_this_process(self.as_json)


def _keep(context: click.Context, parameter: click.Parameter, value: object) -> None:
    """Remember an option for the session, whichever side of the command's name it stood on."""
    session = context.find_root().ensure_object(Session)
    if value not in {None, False}:
        setattr(session, parameter.name or "", value)


def options_everywhere() -> list[click.Parameter]:
    """Return the options that every command takes."""
    return [
        click.Option(
            ["--socket"],
            metavar="PATH",
            expose_value=False,
            callback=_keep,
            help="Reach the agent by this unix socket. [env: MAGI_SOCKET]",
        ),
        click.Option(
            ["--url"], metavar="URL", expose_value=False, callback=_keep, help="Reach the agent here. [env: MAGI_URL]"
        ),
        click.Option(
            ["--token-file"],
            metavar="FILE",
            expose_value=False,
            callback=_keep,
            help="Send the token in this file. [env: MAGI_TOKEN_FILE, for a URL]",
        ),
        click.Option(["--json", "as_json"], is_flag=True, expose_value=False, callback=_keep, help="Print JSON."),
    ]
