"""Changing the file of tokens: one line of it at a time, whatever else the file says stays as it is."""

import fcntl
import grp
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from magi_agent.atomic_file import remove_leftovers, write_atomically
from magi_agent.errors import MagiError
from magi_agent.tokens import MAX_TOKENS, Token, Tokens, line_of, parse_tokens, read_text, token_of

AGENT_GROUP: Final = "magi-agent"
_MODE: Final = 0o640
_FOLDER_MODE: Final = 0o755
_HEADING: Final = """\
# The tokens of MAGI Agent's API: name, scope (read, infer or admin), hash and, maybe, an end in UTC and a rate.
# 'magictl token' changes this file, and 'systemctl reload magi-agent' has the agent read it again.
"""
_PATIENCE: Final = 5.0
_PAUSE: Final = 0.02


class TokenExists(MagiError):
    """There is a token of this name."""

    error = "TokenExists"


class TokenNotFound(MagiError):
    """There is no token of this name."""

    error = "TokenNotFound"


class TokensBusy(MagiError):
    """Somebody else changes the file, and does not come to an end."""

    error = "TokensBusy"


class TokenFile:
    """The file, for those who may write it.

    Everything here blocks, and raises ``OSError`` and ``ConfigurationError`` (for a file that is no good) beside what
    each says.
    """

    def __init__(self, path: Path) -> None:
        # A link stays a link: what it leads to is what is replaced.
        self.path = Path(os.path.realpath(path))

    def tokens(self) -> Tokens:
        """The tokens it holds; none where it is not there."""
        return parse_tokens(self._text(), self.path)

    def add(self, token: Token) -> None:
        """Write a token into it. Raises ``TokenExists`` and ``TokensBusy``."""
        self.path.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        with self._to_oneself():
            text = self._text()
            held = parse_tokens(text, self.path)
            if any(each.name == token.name for each in held):
                raise TokenExists(
                    f"there is a token called {token.name} already; give this one another name, or first: "
                    f"magictl token revoke {token.name}"
                )
            if len(held) >= MAX_TOKENS:
                raise TokenExists(f"{self.path} holds {MAX_TOKENS} tokens, which is the most; revoke one first")
            before = text if not text or text.endswith("\n") else f"{text}\n"
            self._write(f"{before or _HEADING}{line_of(token)}\n")

    def remove(self, name: str) -> Token:
        """Take a token out of it, and return what was kept of it. Raises ``TokenNotFound`` and ``TokensBusy``."""
        if not self.path.parent.is_dir():
            raise TokenNotFound(_there_is_none(name))
        with self._to_oneself():
            text = self._text()
            found = next((token for token in parse_tokens(text, self.path) if token.name == name), None)
            if found is None:
                raise TokenNotFound(_there_is_none(name))
            lines = text.split("\n")
            self._write("\n".join(line for line in lines if token_of(line) != found))
        return found

    def limit(self, name: str, rate: int | None) -> Token:
        """Hold a token to so many requests in a minute, or to none, and return what is kept of it now.

        Raises ``TokenNotFound`` and ``TokensBusy``.
        """
        if not self.path.parent.is_dir():
            raise TokenNotFound(_there_is_none(name))
        with self._to_oneself():
            text = self._text()
            found = next((token for token in parse_tokens(text, self.path) if token.name == name), None)
            if found is None:
                raise TokenNotFound(_there_is_none(name))
            limited = replace(found, rate=rate)
            lines = text.split("\n")
            if limited != found:
                self._write("\n".join(line_of(limited) if token_of(line) == found else line for line in lines))
        return limited

    def _text(self) -> str:
        try:
            return read_text(self.path)[0]
        except FileNotFoundError:
            return ""

    def _write(self, text: str) -> None:
        remove_leftovers(self.path)
        try:
            write_atomically(self.path, text.encode(), mode=_MODE, owner=self._owner())
        except PermissionError as error:
            # It is about a temporary file, which says nothing to anybody.
            raise PermissionError(error.errno, error.strerror, str(self.path)) from None

    def _owner(self) -> tuple[int, int]:
        """Whose it is: whose it was and, where that is root's own group or nobody's yet, the agent's group."""
        try:
            status = self.path.stat()
            user, group = status.st_uid, status.st_gid
        except FileNotFoundError:
            user, group = os.geteuid(), os.getegid()
        if user == 0 and group == 0:
            with suppress(KeyError):
                group = grp.getgrnam(AGENT_GROUP).gr_gid
        return user, group

    @contextmanager
    def _to_oneself(self) -> Iterator[None]:
        """Let nobody else change it meanwhile. The lock is the folder's: the file itself is replaced."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            deadline = time.monotonic() + _PATIENCE
            while True:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TokensBusy(f"another program keeps {self.path.parent} locked; try again") from None
                    time.sleep(_PAUSE)
            yield
        finally:
            os.close(folder)


def _there_is_none(name: str) -> str:
    return f"no token is called {name}; the names are in: magictl token list"
