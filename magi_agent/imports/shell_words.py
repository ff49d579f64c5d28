"""Shell text taken apart into commands and words, as POSIX sh does it; nothing is run, and nothing is expanded.

What a shell would put its own text in place of (``$VARIABLE``, ``$(command)``, backquotes, ``{a,b}``) stays as it
stands there, and the word says so: ``shlex`` cannot tell it from the same characters in quotes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from magi_agent.imports.imported import InvalidImport

_CONTINUATION: Final = re.compile(r"[\\^`]\r?\n")  # of sh, of cmd.exe and of PowerShell
_BLANK: Final = re.compile(r"[^\S\n]+")
_COMMENT: Final = re.compile(r"#[^\n]*")
_OPERATOR: Final = re.compile(r"\d*(?:<<<?|<>|<&|>>|>&|>\||[<>])|&>>?|&&|\|\||\|&|;;|[;&|()]")
_REDIRECTION: Final = re.compile(r"\d*[<>]|&>")
_PLAIN: Final = re.compile(r"[^\s\\'\"$`^;&|<>()]+")
_PLAIN_WITHOUT_SHELL: Final = re.compile(r"[^\s\\'\"$^`]+")
_VARIABLE: Final = re.compile(r"\$(?:\{[^{}]*\}|[A-Za-z_][A-Za-z0-9_]*|[0-9@*#?$!-])")
_MACRO: Final = re.compile(r"\$\{[^{}]*\}")
_BRACE: Final = re.compile(r"[{}]")
_DRIVE: Final = re.compile(r"[A-Za-z]:")
_MORE: Final = re.compile(r"(?:\(|\)|\d*<<<?|;;)")
_MAX_WORDS: Final = 5000
_PASTE_ALONE: Final = "paste the llama-server command alone"


@dataclass(frozen=True, slots=True)
class Word:
    """One word."""

    text: str
    line: int
    expands: str | None = None
    """The first thing in it that a shell would put something else in place of."""


@dataclass(slots=True)
class Command:
    """One simple command."""

    words: list[Word] = field(default_factory=list)
    redirections: list[str] = field(default_factory=list)
    """Where its input and output go, as it stands there."""
    piped: bool = False
    """Whether it reads what the command before it writes."""


@dataclass(frozen=True, slots=True)
class _Operator:
    text: str
    line: int


def commands(text: str) -> list[Command]:
    """The commands of a shell text. Raises ``InvalidImport`` for what is more than simple commands."""
    found = [Command()]
    redirection: _Operator | None = None
    tokens = list(_Reader(text, is_shell=True).tokens())
    for token, following in zip(tokens, [*tokens[1:], None], strict=False):
        if redirection is not None:
            if not isinstance(token, Word):
                break
            gap = "" if redirection.text.endswith("&") else " "
            found[-1].redirections.append(f"{redirection.text}{gap}{token.text}")
            redirection = None
        elif isinstance(token, Word):
            found[-1].words.append(token)
        elif token.text == "\n":
            # No command begins with a dash: a line that does goes on with the one before it.
            if not (found[-1].words and isinstance(following, Word) and following.text.startswith("-")):
                found.append(Command())
        elif _MORE.fullmatch(token.text):
            raise InvalidImport(f"{token.text} makes it more than plain commands: {_PASTE_ALONE}", token.line)
        elif _REDIRECTION.match(token.text):
            redirection = token
        else:
            found.append(Command(piped=token.text in ("|", "|&")))
    if redirection is not None:
        raise InvalidImport(f"nothing stands behind {redirection.text}", redirection.line)
    for command in found:
        _check_length(command.words)
    return [command for command in found if command.words]


def words(text: str) -> list[Word]:
    """The words of a command that no shell sees: a newline is a blank, and only ``${…}`` waits to be filled in."""
    found = [token for token in _Reader(text, is_shell=False).tokens() if isinstance(token, Word)]
    _check_length(found)
    return found


def _check_length(words: list[Word]) -> None:
    if len(words) > _MAX_WORDS:
        raise InvalidImport(f"a command has more than {_MAX_WORDS} words", words[0].line)


def _braces(text: str) -> str | None:
    """The first ``{a,b}`` or ``{1..3}`` in a text."""
    begin: int | None = None
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            begin = brace.start()
        elif begin is not None:
            found = text[begin : brace.end()]
            if "," in found or ".." in found:
                return found
            begin = None
    return None


class _Reader:
    """One pass over a text."""

    def __init__(self, text: str, *, is_shell: bool) -> None:
        self._text = text
        self._is_shell = is_shell
        self._at = 0
        self._line = 1
        self._expansions: list[str] = []

    def tokens(self) -> Iterator[Word | _Operator]:
        while self._at < len(self._text):
            if self._take(_CONTINUATION) or self._take(_BLANK) or self._take(_COMMENT):
                continue
            line = self._line
            if self._text[self._at] == "\n":
                self._advance(self._at + 1)
                if self._is_shell:
                    yield _Operator("\n", line)
            elif self._is_shell and (operator := self._take(_OPERATOR)):
                yield _Operator(operator, line)
            else:
                yield self._word()

    def _word(self) -> Word:
        line = self._line
        self._expansions = []
        said: list[str] = []
        bare: list[str] = []  # what stands outside of quotes
        plain = _PLAIN if self._is_shell else _PLAIN_WITHOUT_SHELL
        while self._at < len(self._text):
            mark = self._text[self._at]
            if self._take(_CONTINUATION):
                continue
            if mark.isspace() or (self._is_shell and mark in ";&|<>()"):
                break
            if text := self._take(plain):
                said.append(text)
                bare.append(text)
            elif mark == "'":
                said.append(self._quoted(self._at + 1, "'"))
            elif mark == '"':
                said.append(self._in_double_quotes())
            elif mark == "\\":
                said.append(self._escaped(is_path=len(said) > 0 and _DRIVE.match(said[0]) is not None))
            else:
                said.append(self._expansion())
        if self._is_shell and (braces := _braces("".join(bare))):
            self._expansions.append(braces)
        return Word("".join(said), line, next(iter(self._expansions), None))

    def _in_double_quotes(self) -> str:
        line = self._line
        said: list[str] = []
        self._advance(self._at + 1)
        while self._at < len(self._text):
            mark = self._text[self._at]
            if mark == '"':
                self._advance(self._at + 1)
                return "".join(said)
            if mark == "\\":
                following = self._text[self._at + 1 : self._at + 2]
                said.append({"\n": ""}.get(following, following) if following in '"\\$`\n' else f"\\{following}")
                self._advance(self._at + 2)
            elif mark in "$`":
                said.append(self._expansion())
            else:
                end = next(
                    (at for at in range(self._at, len(self._text)) if self._text[at] in '"\\$`'), len(self._text)
                )
                said.append(self._text[self._at : end])
                self._advance(end)
        raise InvalidImport('a quotation mark (") is not closed', line)

    def _escaped(self, *, is_path: bool) -> str:
        """What follows a backslash; in a path of Windows, the backslash too."""
        following = self._text[self._at + 1 : self._at + 2]
        self._advance(self._at + 2)
        return f"\\{following}" if is_path else following

    def _expansion(self) -> str:
        """Text at a ``$``, a backquote or a ``^``, as it stands there; noted where something would be put in place."""
        begin = self._at
        mark = self._text[begin]
        if not self._is_shell:
            if not self._take(_MACRO):
                self._advance(begin + 1)
                return mark
        elif mark == "`":
            self._quoted(begin + 1, "`")
        elif self._text.startswith("$(", begin):
            self._nested()
        elif self._text.startswith("$'", begin):
            self._quoted(begin + 2, "'")
        elif not self._take(_VARIABLE):
            self._advance(begin + 1)
            return mark
        text = self._text[begin : self._at]
        self._expansions.append(text)
        return text

    def _quoted(self, begin: int, mark: str) -> str:
        end = self._text.find(mark, begin)
        if end < 0:
            raise InvalidImport(f"a quotation mark ({mark}) is not closed", self._line)
        self._advance(end + 1)
        return self._text[begin:end]

    def _nested(self) -> None:
        """Step over ``$(…)``; what is in quotes in there counts like the rest, for nobody runs it."""
        depth = 0
        for at in range(self._at + 1, len(self._text)):
            depth += {"(": 1, ")": -1}.get(self._text[at], 0)
            if depth == 0:
                self._advance(at + 1)
                return
        raise InvalidImport("$( is not closed", self._line)

    def _take(self, pattern: re.Pattern[str]) -> str:
        """Step over what ``pattern`` matches here."""
        found = pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._advance(found.end())
        return found.group()

    def _advance(self, at: int) -> None:
        self._line += self._text.count("\n", self._at, at)
        self._at = at
