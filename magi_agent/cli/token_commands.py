"""``magictl token add``, ``list``, ``rate`` and ``revoke``."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import click

from magi_agent.cli.command import command
from magi_agent.cli.exits import CommandError
from magi_agent.cli.grid import Cell, Column, Grid
from magi_agent.cli.journal_note import note_in_journal
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import NOTHING
from magi_agent.errors import ConfigurationError, MagiError
from magi_agent.settings.loading import load_settings
from magi_agent.settings.settings import Settings
from magi_agent.token_file import TokenFile
from magi_agent.tokens import MAX_RATE, Token, TokensUnreadable, digest_of, is_name, new_secret, written
from magi_agent.vocabulary import Scope, TokenScope

_COLUMNS = (Column("TOKEN"), Column("SCOPE"), Column("RATE", justify="right"), Column("UNTIL"))
_NO_RATE = "none"
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")

_where = click.option(
    "--tokens-path",
    metavar="FILE",
    type=click.Path(),
    help="The file of tokens, where it is not the one of the configuration.",
)


@command(
    "magictl token add front-end --scope read",
    "magictl token add contractor --scope admin --until 2027-01-31",
    "magictl token add laptop --scope infer --rate 60",
    "(umask 077; sudo magictl token add laptop --scope admin > ~/.config/magi-token)",
)
@click.argument("name", metavar="NAME")
@click.option(
    "--scope",
    type=click.Choice([scope.value for scope in TokenScope]),
    required=True,
    help="What it allows: to read, to use the models (infer), or everything (admin).",
)
@click.option("--until", metavar="DATE", help="When it ends: after this day, or at this time; in UTC.")
@click.option(
    "--rate",
    metavar="N",
    type=click.IntRange(1, MAX_RATE),
    help="How many requests to models it may make in a minute; any number, where nothing is said.",
)
@_where
def add(session: Session, name: str, scope: str, until: str | None, rate: int | None, tokens_path: str | None) -> None:
    """Make a token, and print it: once, and nothing else.

    The name stands in the journal beside what its bearer changed. Only root, or whoever may write the file, makes
    tokens. With --json: an object with name, scope, until, rate and token.
    """
    if not is_name(name):
        raise click.UsageError(
            f"{name!r} is no name for a token; use at most 64 letters, digits and '.', '_', '@' or '-', a letter or "
            "digit first",
            click.get_current_context(),
        )
    secret = new_secret()
    token = Token(name, TokenScope(scope), digest_of(secret), _end(until) if until is not None else None, rate)
    with _foreseen(f"token add {name} --scope {scope}"):
        where, scope_of_units = _configured(tokens_path)
        file = TokenFile(where)
        file.add(token)
    note_in_journal(f"token {token} was added to {file.path}")
    screen = session.screen
    if screen.as_json:
        screen.json({**_described(token), "token": secret, "path": str(file.path)})
    else:
        screen.text(f"{secret}\n")
        screen.note(Cell("✓ ", "green"), f"{token} is in {file.path}; the token itself is shown this once")
        screen.note(_takes_effect(scope_of_units))


@command("magictl token list", "magictl token list --json", name="list")
@_where
def list_tokens(session: Session, tokens_path: str | None) -> None:
    """List the tokens: names, scopes, how many requests to models in a minute, ends.

    With --json: an object with the path and a list of tokens.
    """
    with _foreseen("token list"):
        where, _ = _configured(tokens_path)
        file = TokenFile(where)
        tokens = file.tokens()
    screen = session.screen
    if screen.as_json:
        screen.json({"path": str(file.path), "tokens": [_described(token) for token in tokens]})
        return
    if not tokens:
        screen.note(f"there are no tokens in {file.path}; make one: magictl token add NAME --scope read")
        return
    screen.grid(Grid(_COLUMNS, tuple(_row(token) for token in tokens)))


@command("magictl token rate laptop 60", "magictl token rate laptop none", name="rate")
@click.argument("name", metavar="NAME")
@click.argument("rate", metavar="N|none")
@_where
def limit(session: Session, name: str, rate: str, tokens_path: str | None) -> None:
    """Say how many requests to models a token may make in a minute.

    So many may come at once, too; those beyond are answered 429, with when to ask again. The token stays the same.
    With --json: an object with name, scope, until and rate of the token.
    """
    wanted = None if rate == _NO_RATE else _rate(rate)
    with _foreseen(f"token rate {name} {rate}"):
        where, scope_of_units = _configured(tokens_path)
        file = TokenFile(where)
        token = file.limit(name, wanted)
    note_in_journal(f"token {token} has another rate in {file.path}")
    screen = session.screen
    if screen.as_json:
        screen.json({**_described(token), "path": str(file.path)})
    else:
        told = f"{token.rate} requests in a minute" if token.rate else "any number of requests"
        screen.line(Cell("✓ ", "green"), Cell(name, "bold"), f" may make {told}")
        screen.note(_takes_effect(scope_of_units))


@command("magictl token revoke front-end")
@click.argument("name", metavar="NAME")
@_where
def revoke(session: Session, name: str, tokens_path: str | None) -> None:
    """Take a token back.

    With --json: an object with name, scope, until and rate of the token that was.
    """
    with _foreseen(f"token revoke {name}"):
        where, scope_of_units = _configured(tokens_path)
        file = TokenFile(where)
        token = file.remove(name)
    note_in_journal(f"token {token} was taken out of {file.path}")
    screen = session.screen
    if screen.as_json:
        screen.json({**_described(token), "path": str(file.path)})
    else:
        screen.line(Cell("✓ ", "green"), Cell(name, "bold"), f" is out of {file.path}")
        screen.note(
            Cell("! ", "yellow"), "it holds until the agent reads the file again; ", _takes_effect(scope_of_units)
        )


def _configured(tokens_path: str | None) -> tuple[Path, Scope]:
    """Return where the tokens are kept, and of whose systemd the agent is. Raises ``ConfigurationError``."""
    if tokens_path is not None:
        return Path(tokens_path), Scope.USER if os.environ.get("MAGI_SYSTEMD_SCOPE") == Scope.USER else Scope.SYSTEM
    settings: Settings = load_settings({}, os.environ)
    return settings.tokens_path, settings.systemd_scope


def _takes_effect(scope: Scope) -> str:
    user = " --user" if scope is Scope.USER else ""
    return f"to have the agent go by it: systemctl{user} reload magi-agent"


@contextmanager
def _foreseen(words: str) -> Iterator[None]:
    """Turn what may go wrong with the file into the command's own error."""
    try:
        yield
    except PermissionError as error:
        raise CommandError(
            "PermissionDenied",
            f"no permission for {error.filename or 'the file of tokens'}; as root: sudo magictl {words}",
        ) from None
    except OSError as error:
        raise CommandError("FileUnwritable", f"the tokens could not be changed: {error}") from None
    except TokensUnreadable:
        raise CommandError(
            "PermissionDenied", f"no permission to read the file of tokens; as root: sudo magictl {words}"
        ) from None
    except ConfigurationError as error:
        raise CommandError("TokensInvalid", f"{error}; --tokens-path names another file") from None
    except MagiError as error:
        raise CommandError(error.error, error.message) from None


def _end(text: str) -> datetime:
    """Return the moment that a person means: with a day, its last one."""
    context = click.get_current_context()
    try:
        if _DATE.fullmatch(text):
            day = datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
            moment = day + timedelta(days=1)
        else:
            moment = datetime.fromisoformat(text)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise click.UsageError(
            f"{text!r} is no end; give a day, such as 2027-01-31, or a time, such as 2027-01-31T18:00Z", context
        ) from None
    moment = moment.replace(microsecond=0)
    if moment <= datetime.now(UTC):
        raise click.UsageError(f"{text} is past; a token wants an end that is to come", context)
    return moment


def _rate(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= len(str(MAX_RATE)) and 1 <= (rate := int(text)) <= MAX_RATE:
        return rate
    raise click.UsageError(
        f"{text!r} is no rate; give a number of requests in a minute, from 1 to {MAX_RATE}, or '{_NO_RATE}'",
        click.get_current_context(),
    )


def _described(token: Token) -> dict[str, object]:
    return {
        "name": token.name,
        "scope": token.scope.value,
        "until": written(token.until) if token.until else None,
        "rate": token.rate,
        "ended": token.has_ended(datetime.now(UTC)),
        "understood": not token.unknown,
    }


def _row(token: Token) -> tuple[Cell, ...]:
    ended = token.has_ended(datetime.now(UTC))
    end = written(token.until) if token.until else NOTHING
    if token.unknown:
        end += " (lets nobody in: it has a key that is not known here)"
    return (
        Cell(token.name, "bold"),
        Cell(token.scope.value),
        Cell(str(token.rate)) if token.rate else Cell(NOTHING, "dim"),
        Cell(f"{end} (past)", "yellow") if ended else Cell(end, "" if token.until else "dim"),
    )
