"""Bearer tokens: which there are, what each one allows, and the file that keeps them, as hashes.

The file has one line for each token, with blanks between its fields::

    # name      scope  hash of the token   end (optional, UTC)  requests in a minute (optional)
    front-end   read   sha256:<64 digits>
    contractor  admin  sha256:<64 digits>  2027-01-31T00:00:00Z
    laptop      infer  sha256:<64 digits>                       rate=60

A key that is not known is a newer agent's, and may limit the token: that one lets nobody in, and the others hold.
Empty lines and those that begin with ``#`` say nothing. No sentence of this module holds any other word of a line than
the name of a token: somebody may have put the token itself where its hash belongs.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Final

from magi_agent.errors import ConfigurationError
from magi_agent.vocabulary import TokenScope

PREFIX: Final = "magi_"
"""Each token that is made here begins with it, so that people and scanners see what it is."""
MAX_TOKENS: Final = 256
MAX_RATE: Final = 1_000_000
"""Requests in a minute that a token may be held to."""
_RANDOM_BYTES: Final = 32
_MAX_BYTES: Final = 64 * 1024
_MAX_SECRET: Final = 512
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
# What may stand behind "Bearer": https://www.rfc-editor.org/rfc/rfc6750#section-2.1
_SECRET: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_HASH: Final = re.compile(r"sha256:([0-9a-fA-F]{64})")
_RATE: Final = "rate="
_KEY: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}=.+")
_COUNT: Final = re.compile(r"[0-9]{1,7}")
_LINE: Final = "wants a name, a scope, sha256: with 64 hexadecimal digits and, maybe, an end and a rate"
_ADVICE: Final = "'magictl token add' writes such a line"


class TokensUnreadable(ConfigurationError):
    """The file is there, and this user may not read it."""


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept of one token: never the token itself."""

    name: str
    scope: TokenScope
    digest: bytes
    """SHA-256 of the token."""
    until: datetime | None = None
    """When it ends, in UTC; ``None`` where it does not."""
    rate: int | None = None
    """How many requests to models its bearers may make in a minute; ``None`` for any number."""
    unknown: tuple[str, ...] = ()
    """Keys of a newer agent, as they stand there. They may limit the token, so nobody is let in by it."""

    def has_ended(self, now: datetime) -> bool:
        """Whether it is past its end."""
        return self.until is not None and self.until <= now

    def __str__(self) -> str:
        end = f", until {written(self.until)}" if self.until else ""
        rate = f", {self.rate} requests in a minute" if self.rate else ""
        unknown = ", with a key that is not known here" if self.unknown else ""
        return f"{self.name} ({self.scope}{end}{rate}{unknown})"


class Tokens:
    """The tokens that hold, in the file's order."""

    def __init__(self, tokens: tuple[Token, ...] = ()) -> None:
        self._tokens = tokens

    def __iter__(self) -> Iterator[Token]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and self._tokens == other._tokens

    def __hash__(self) -> int:
        return hash(self._tokens)

    def find(self, secret: str) -> Token | None:
        """The token that ``secret`` is, ended or not.

        Takes as long for every secret: all hashes are compared, each in constant time.
        """
        digest = digest_of(secret)
        found = None
        for token in self._tokens:
            if compare_digest(token.digest, digest):
                found = token
        return found


@dataclass(frozen=True, slots=True)
class TokensFile:
    """What a file of tokens came to."""

    tokens: Tokens
    is_there: bool
    problems: tuple[str, ...] = ()
    """What is wrong with it and keeps nobody from using it, in sentences."""
    not_understood: tuple[str, ...] = ()
    """The tokens that let nobody in, since they have a key that is not known, in sentences."""


def new_secret() -> str:
    """Make a token: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def is_secret(text: str) -> bool:
    """Whether ``text`` has the form of a token, of whatever origin."""
    return len(text) <= _MAX_SECRET and _SECRET.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether a token may be called ``text``."""
    return _NAME.fullmatch(text) is not None and not text.startswith(PREFIX)


def digest_of(secret: str) -> bytes:
    """What is kept of a token."""
    return sha256(secret.encode(errors="surrogateescape")).digest()


def written(moment: datetime) -> str:
    """``moment`` as it stands in the file and on the wire: whole seconds of UTC."""
    # Not strftime: it leaves the zeros of early years out.
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


def line_of(token: Token) -> str:
    """The line that keeps ``token``."""
    fields = [token.name, token.scope.value, f"sha256:{token.digest.hex()}"]
    if token.until:
        fields.append(written(token.until))
    if token.rate:
        fields.append(f"{_RATE}{token.rate}")
    return " ".join((*fields, *token.unknown))


def token_of(line: str) -> Token | None:
    """The token that a line keeps; ``None`` where it keeps none. Raises ``ValueError`` with a sentence."""
    fields = line.split()
    if not fields or fields[0].startswith("#"):
        return None
    keys: list[str] = []
    while len(fields) > 3 and (fields[-1].startswith(_RATE) or _KEY.fullmatch(fields[-1])):
        keys.insert(0, fields.pop())
    rates = [key for key in keys if key.startswith(_RATE)]
    if len(fields) not in (3, 4) or len(rates) > 1:
        raise ValueError(f"{_LINE}; {_ADVICE}")
    name, scope, said = fields[:3]
    if not is_name(name):
        raise ValueError("the name wants at most 64 letters, digits and '.', '_', '@' or '-', a letter or digit first")
    if scope not in list(TokenScope):
        raise ValueError(f"the scope of {name} must be one of {', '.join(TokenScope)}")
    found = _HASH.fullmatch(said)
    if found is None:
        raise ValueError(f"the hash of {name} wants sha256: and 64 hexadecimal digits, never the token; {_ADVICE}")
    until = _moment(name, fields[3]) if len(fields) == 4 else None
    held_to = _rate(name, rates[0].removeprefix(_RATE)) if rates else None
    unknown = tuple(key for key in keys if key not in rates)
    return Token(name, TokenScope(scope), bytes.fromhex(found[1]), until, held_to, unknown)


def _rate(name: str, text: str) -> int:
    if _COUNT.fullmatch(text) and 1 <= (rate := int(text)) <= MAX_RATE:
        return rate
    raise ValueError(f"the rate of {name} must be {_RATE} and a number of requests in a minute, from 1 to {MAX_RATE}")


def _moment(name: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"the end of {name} must be a time in UTC, such as 2027-01-31T00:00:00Z")


def parse_tokens(text: str, path: Path) -> Tokens:
    """Read the text of a file of tokens. Raises ``ConfigurationError`` with the line that is wrong."""
    found: list[Token] = []
    names: set[str] = set()
    digests: dict[bytes, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        try:
            token = token_of(line)
        except ValueError as error:
            raise ConfigurationError(f"{path}:{number}: {error}") from None
        if token is None:
            continue
        if token.name in names:
            raise ConfigurationError(f"{path}:{number}: there is another token called {token.name}; each name once")
        if token.digest in digests:
            raise ConfigurationError(
                f"{path}:{number}: {token.name} is the same token as {digests[token.digest]}; each token once"
            )
        if len(found) == MAX_TOKENS:
            raise ConfigurationError(f"{path}:{number}: more than {MAX_TOKENS} tokens, which is the most")
        found.append(token)
        names.add(token.name)
        digests[token.digest] = token.name
    return Tokens(tuple(found))


def read_text(path: Path) -> tuple[str, os.stat_result]:
    """The text of a file of tokens, and what the kernel says about the file.

    Raises ``FileNotFoundError``, and ``ConfigurationError`` for what can be no such file. Blocks: call it from a
    thread.
    """
    try:
        # Somebody's pipe would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigurationError(f"{path}: is no file; tokens are kept in one")
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigurationError(f"{path}: larger than {_MAX_BYTES} bytes, which no file of tokens is")
        return data.decode(), status
    except FileNotFoundError:
        raise
    except PermissionError:
        raise TokensUnreadable(
            f"{path}: this user may not read it; the agent's group wants to (as root: chgrp magi-agent {path} && "
            f"chmod 0640 {path})"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: is not UTF-8 text") from None


def read_tokens(path: Path) -> TokensFile:
    """Read a file of tokens; one that is not there holds none.

    Raises ``ConfigurationError`` with one line that says what is wrong, where, and what to do. Blocks: call it from a
    thread.
    """
    try:
        text, status = read_text(path)
    except FileNotFoundError:
        return TokensFile(Tokens(), is_there=False)
    if status.st_mode & stat.S_IWOTH:
        raise ConfigurationError(
            f"{path}: every user of this host may write it, and so give themselves a token; look at what it holds, "
            f"then: chmod 0640 {path}"
        )
    problems = (
        (f"{path}: every user of this host may read it; to change that: chmod 0640 {path}",)
        if status.st_mode & stat.S_IROTH
        else ()
    )
    tokens = parse_tokens(text, path)
    not_understood = tuple(
        f"{path}: the token {token.name} has a key that this agent does not know; it may limit the token, so that one "
        "lets nobody in"
        for token in tokens
        if token.unknown
    )
    return TokensFile(tokens, is_there=True, problems=problems, not_understood=not_understood)
