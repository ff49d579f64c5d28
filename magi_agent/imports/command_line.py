"""llama-server command lines as people paste them: from a terminal, a start script, a unit file, a container's start.

What is read is only text. No command is run, no variable is looked up, no pattern is expanded.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from magi_agent.imports.gathering import Gathering, file_name
from magi_agent.imports.imported import (
    HIDDEN,
    MAX_IMPORTED_MODELS,
    Imported,
    ImportedModel,
    InvalidImport,
    LeftOut,
    Origin,
    is_secret,
    shown,
)
from magi_agent.imports.server_options import HOST, MODEL, Named, option_named
from magi_agent.imports.shell_words import Command, Word, commands

_SERVER: Final = re.compile(r"llama-server(?:[-_.][\w.-]*)?|llama-cpp-server|server(?:\.exe)?", re.IGNORECASE)
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_NUMBER: Final = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_CPUS: Final = re.compile(r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*")
_SHELLS: Final = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish"})
_CONTAINERS: Final = frozenset({"docker", "podman", "nerdctl"})
_CPU_LIST: Final = frozenset({"-c", "--cpu-list"})
_MOST_NESTED: Final = 4
_EXEC_START: Final = re.compile(r"^[^\S\n]*ExecStart=[-@:+!|]*", re.MULTILINE)
_SUPERVISED: Final = "nothing: systemd runs the server, which outlives the agent and every session"
_USER: Final = "the servers' user is the operator's choice: see servers.llama_server_user"


@dataclass(frozen=True, slots=True)
class _Wrapper:
    """A command that runs another one."""

    instead: str | None = _SUPERVISED
    """What takes its place; ``None`` where it leaves no trace."""
    valued: str = ""
    """The letters of its options that take a value."""
    operands: int = 0
    """How many words stand between its options and the command."""

    @property
    def is_needless(self) -> bool:
        """Whether nothing needs to be done for it."""
        return self.instead == _SUPERVISED


_WRAPPERS: Final[Mapping[str, _Wrapper]] = MappingProxyType(
    {
        **dict.fromkeys(("nohup", "setsid", "unbuffer"), _Wrapper()),
        "exec": _Wrapper(valued="a"),
        "screen": _Wrapper(valued="ScepstT"),
        "time": _Wrapper(valued="fo"),
        "stdbuf": _Wrapper(valued="ioe"),
        "env": _Wrapper(None, "uC"),
        **dict.fromkeys(("then", "else", "{", "!"), _Wrapper(None)),
        "do": _Wrapper("systemd starts a failed server again"),
        **dict.fromkeys(("sudo", "doas", "runuser"), _Wrapper(_USER, "ugGhpCrtTDRU")),
        **dict.fromkeys(("gosu", "su-exec"), _Wrapper(_USER, operands=1)),
        "nice": _Wrapper("see the setting cpu_weight", "n"),
        "chrt": _Wrapper("see the setting cpu_weight", "TPD", 1),
        "ionice": _Wrapper("see the setting io_weight", "cnpPu"),
        "taskset": _Wrapper("see the setting cpu_affinity", operands=1),
        "numactl": _Wrapper(
            "see the settings numa_policy and numa_nodes, and numa for llama-server's own part in it", "imNCpPw"
        ),
        "timeout": _Wrapper(
            "a server runs until it is told to stop: see the settings start_policy and idle_timeout_seconds", "ks", 1
        ),
        "systemd-run": _Wrapper(
            "the agent makes the unit itself: see the settings memory_max, cpu_quota and the like", "pEuHMGC"
        ),
        "prime-run": _Wrapper("which GPUs there are is the host's business: see the setting gpus"),
    }
)
_GPUS: Final = (
    "settings hold no environment; which GPUs are used, the setting gpus says, by addresses that magictl host shows"
)
_VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES"), _GPUS
        ),
        **dict.fromkeys(
            ("LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"),
            "servers download nothing: add the folder to discovery.model_scan_path",
        ),
    }
)
_OTHER_VARIABLE: Final = (
    "settings hold no environment; where a server needs it, a drop-in of magi-llama-.service says it"
)
_NO_CONTAINER: Final = "the agent runs llama-server itself, in systemd's sandbox and without a container"
_CONTAINER_SWITCHES: Final = frozenset(
    {
        *("-d", "--detach", "-i", "--interactive", "-t", "--tty", "-it", "-ti", "-dit", "-itd", "-di", "-id", "-dt"),
        *("--rm", "--init", "--privileged", "--read-only", "--oom-kill-disable", "-P", "--publish-all", "--replace"),
        *("--no-healthcheck", "-q", "--quiet", "--disable-content-trust", "--use-api-socket"),
    }
)
"""Options of ``docker run`` that take no value; all others take one."""


@dataclass(frozen=True, slots=True)
class _Invocation:
    """How llama-server is called by one command."""

    program: str
    arguments: Sequence[Word]
    variables: Sequence[tuple[str, Word]]
    """Each with its name, and its value as a word."""
    wrappers: Sequence[tuple[str, Sequence[Word]]]
    """Each with what it is told."""
    container: str | None = None


@dataclass(frozen=True, slots=True)
class _Unwrapped:
    """A command without those that run it."""

    words: Sequence[Word]
    around: Sequence[Word]
    """All that stood before it."""
    variables: Sequence[tuple[str, Word]]
    wrappers: Sequence[tuple[str, Sequence[Word]]]


def read_command_line(text: str, allowed_flags: Collection[str] = ()) -> Imported:
    """Each llama-server that a text starts. Raises ``InvalidImport`` if it starts none.

    ``allowed_flags`` are those that may be extra flags; others are left out, and suggested.
    """
    return Imported(Origin.COMMAND_LINE, *_read(_EXEC_START.sub("", text), allowed_flags))


def read_command(words: Sequence[Word], variables: Iterable[tuple[str, Word]], gathering: Gathering) -> bool:
    """Read one command into ``gathering``, with variables from elsewhere; whether it starts a llama-server."""
    invocation = _invocation(words)
    if invocation is None:
        return False
    if invocation.container is not None:
        gathering.in_container = True
        gathering.leave_out(invocation.container, _NO_CONTAINER)
    elif invocation.program != "llama-server":
        gathering.carry(
            invocation.program,
            "nothing: the agent runs servers.llama_server_path; the setting binary names one of the others",
        )
    for name, told in invocation.wrappers:
        _take_wrapper(name, told, gathering)
    for name, value in (*variables, *invocation.variables):
        read_variable(name, value, gathering)
    read_arguments(invocation.arguments, gathering)
    return True


def simple_commands(command: Command, depth: int = 0) -> Iterator[Command]:
    """A command, or those of the text that a shell is told to run by it (``sudo bash -c '…'``)."""
    unwrapped = _unwrapped(command.words)
    inner = _told_to_shell(unwrapped.words) if depth < _MOST_NESTED else None
    if inner is None:
        yield command
        return
    try:
        found = commands(inner.text)
    except InvalidImport as error:
        raise InvalidImport(error.reason, inner.line or None) from None
    for one in found:
        redirections = [*one.redirections, *command.redirections]
        yield from simple_commands(Command([*unwrapped.around, *one.words], redirections, one.piped), depth + 1)


def read_variable(name: str, value: Word, gathering: Gathering) -> None:
    """Read an environment variable of llama-server's."""
    named = option_named(name)
    # What another program is told may be a secret whatever it is called, and nobody needs to see it here.
    is_known = named is not None or name.startswith("LLAMA_ARG_") or name in _VARIABLES
    source = f"{name}={value.text if is_known and not is_secret(name) else HIDDEN}"
    if named is not None:
        # One that negates is not read further than that it is there.
        _give(gathering, named, name, None if named.negated else value.text, source, value.expands)
    elif name.startswith("LLAMA_ARG_"):
        gathering.leave_out(source, "it is no variable of llama-server that is known here")
    else:
        gathering.leave_out(source, _VARIABLES.get(name, _OTHER_VARIABLE))


def read_arguments(words: Sequence[Word], gathering: Gathering) -> None:
    """Read llama-server's own arguments."""
    place = 0
    after_secret = False
    while place < len(words):
        word = words[place]
        place += 1
        if not _is_option(word.text):
            _leave_out_stray(word, gathering, is_secret=after_secret)
            continue
        name, is_attached, attached = word.text.partition("=") if word.text.startswith("--") else (word.text, "", "")
        if name.startswith("--"):
            name = name.replace("_", "-")  # as llama-server does
        named = option_named(name)
        # llama-server takes no -x=value, and yet people write it.
        called = name.partition("=")[0]
        meant = named or option_named(called)
        after_secret = meant.option.secret if meant else is_secret(called)
        if after_secret:
            named, name = meant, called
        taken = [] if is_attached else _values(named, words[place : place + 2], is_text=after_secret)
        place += len(taken)
        value = attached if is_attached else ":".join(value.text for value in taken) if taken else None
        source = f"{name} {HIDDEN}" if after_secret else " ".join((word.text, *(value.text for value in taken)))
        # Of a secret, not even that is told.
        expands = None if after_secret else next((part.expands for part in (word, *taken) if part.expands), None)
        _give(gathering, named, name, value, source, expands)


def _read(text: str, allowed_flags: Collection[str]) -> tuple[tuple[ImportedModel, ...], tuple[LeftOut, ...]]:
    found = commands(text)
    models: list[ImportedModel] = []
    left_out: list[LeftOut] = []
    exported: list[tuple[str, Word]] = []
    for command in (one for several in found for one in simple_commands(several)):
        gathering = Gathering(allowed_flags)
        if command.words[0].text == "export":
            exported += _assignments(command.words[1:])
        elif read_command(command.words, exported, gathering):
            models.append(_finished(command, gathering))
        elif command is found[0] and _is_option(command.words[0].text):
            read_arguments(command.words, gathering)
            models.append(_finished(command, gathering))
        else:
            left_out.append(_other_command(command))
    if len(models) > MAX_IMPORTED_MODELS:
        raise InvalidImport(f"it has more than {MAX_IMPORTED_MODELS} models")
    if not models:
        raise InvalidImport("no llama-server command is in it")
    return tuple(models), tuple(left_out)


def _finished(command: Command, gathering: Gathering) -> ImportedModel:
    for redirection in command.redirections:
        gathering.leave_out(redirection, "what a server writes goes to the journal: see magictl logs")
    return gathering.finished("")


def _other_command(command: Command) -> LeftOut:
    """A command that starts no llama-server, by its name alone: what it is given may be anything."""
    first = command.words[0].text
    if assigned := _ASSIGNMENT.fullmatch(first):
        return LeftOut(f"{shown(assigned[1])}=…", "variables of a shell are not filled in: write their values")
    source = f"{'| ' if command.piped else ''}{shown(first)}{' …' if len(command.words) > 1 else ''}"
    return LeftOut(source, "only llama-server commands are read")


def _invocation(words: Sequence[Word]) -> _Invocation | None:
    """How a command starts llama-server, behind wrappers or in a container; ``None`` if it does not."""
    unwrapped = _unwrapped(words)
    if not unwrapped.words:
        return None
    first, *rest = unwrapped.words
    name = file_name(first.text)
    if name in _CONTAINERS:
        return _in_container(unwrapped)
    if _SERVER.fullmatch(name):
        return _Invocation(first.text, rest, unwrapped.variables, unwrapped.wrappers)
    return None


def _unwrapped(words: Sequence[Word]) -> _Unwrapped:
    variables: list[tuple[str, Word]] = []
    wrappers: list[tuple[str, Sequence[Word]]] = []
    place = 0
    while place < len(words):
        name = file_name(words[place].text)
        wrapper = _WRAPPERS.get(name)
        if _ASSIGNMENT.fullmatch(words[place].text):
            variables += _assignments([words[place]])
            place += 1
        elif wrapper is not None:
            end = _end_of_options(words, place + 1, wrapper)
            wrappers.append((name, words[place + 1 : end]))
            place = end
        else:
            break
    return _Unwrapped(words[place:], words[:place], variables, wrappers)


def _end_of_options(words: Sequence[Word], place: int, wrapper: _Wrapper) -> int:
    """Where what a wrapper is told ends."""
    while place < len(words) and words[place].text.startswith("-"):
        option = words[place].text
        place += 1
        if option.startswith("--"):
            takes_next = len(option) > 2 and "=" not in option and not _begins_command(words[place : place + 1])
        else:
            takes_next = option[-1] in wrapper.valued
        place += takes_next
    return min(place + wrapper.operands, len(words))


def _begins_command(words: Sequence[Word]) -> bool:
    """Whether here stands what is known to be run, an option or an assignment."""
    for word in words:
        name = file_name(word.text)
        known = name in _WRAPPERS or name in _CONTAINERS or name in _SHELLS or _SERVER.fullmatch(name)
        return bool(known or word.text.startswith("-") or _ASSIGNMENT.fullmatch(word.text))
    return True


def _told_to_shell(words: Sequence[Word]) -> Word | None:
    """The text that a shell is told to run: what stands behind its option ``-c``."""
    if not words or file_name(words[0].text) not in _SHELLS:
        return None
    for option, text in pairwise(words[1:]):
        if not option.text.startswith("-"):
            return None
        if not option.text.startswith("--") and "c" in option.text:
            return text
    return None


def _in_container(unwrapped: _Unwrapped) -> _Invocation | None:
    """How ``docker run`` and its like start llama-server; ``None`` if the image is none of llama.cpp's."""
    words = unwrapped.words
    variables = list(unwrapped.variables)
    place = next((at for at, word in enumerate(words[:3]) if word.text == "run"), 0) + 1
    while 1 < place < len(words) and words[place].text.startswith("-"):
        name, is_attached, value = words[place].text.partition("=")
        if not name.startswith("--") and len(name) > 2 and name not in _CONTAINER_SWITCHES:
            name, is_attached, value = name[:2], "=", words[place].text[2:]
        if not is_attached and name not in _CONTAINER_SWITCHES and place + 1 < len(words):
            place += 1
            value = words[place].text
        if name in ("-e", "--env"):
            variables += _assignments([replace(words[place], text=value)])
        place += 1
    if place == 1 or place >= len(words) or "llama" not in words[place].text.lower():
        return None
    image, rest = words[place].text, words[place + 1 :]
    if rest and (_SERVER.fullmatch(file_name(rest[0].text)) or rest[0].text == "--server"):
        rest = rest[1:]
    elif rest and not _is_option(rest[0].text):
        return None
    return _Invocation(image, rest, variables, unwrapped.wrappers, f"{words[0].text} run … {image}")


def _assignments(words: Iterable[Word]) -> list[tuple[str, Word]]:
    return [
        (assigned[1], Word(assigned[2], word.line, word.expands))
        for word in words
        if (assigned := _ASSIGNMENT.fullmatch(word.text))
    ]


def _take_wrapper(name: str, told: Sequence[Word], gathering: Gathering) -> None:
    wrapper = _WRAPPERS[name]
    texts = [word.text for word in told]
    # What systemd-run is told may hold variables, and they secrets.
    source = name if name == "systemd-run" else " ".join((name, *texts))
    if name == "taskset" and len(texts) == 2 and texts[0] in _CPU_LIST and _CPUS.fullmatch(texts[1]):
        gathering.set("cpu_affinity", texts[1], source)
    elif wrapper.is_needless:
        gathering.carry(source, _SUPERVISED)
    elif wrapper.instead is not None:
        gathering.leave_out(source, wrapper.instead)


def _leave_out_stray(word: Word, gathering: Gathering, *, is_secret: bool) -> None:
    if is_secret:
        gathering.leave_out(HIDDEN, "it stands behind a secret, and may be part of it")
    elif word.expands is not None:
        gathering.leave_out(word.text, _not_filled_in(word.expands))
    else:
        gathering.leave_out(word.text, "no option stands before it, and llama-server takes nothing else")


def _give(
    gathering: Gathering, named: Named | None, name: str, value: str | None, source: str, expands: str | None
) -> None:
    option = named.option if named else None
    if expands is not None and option is MODEL and value and not re.search(r"[$`]", file_name(value)):
        # The name of the file is enough to find the model by.
        gathering.give(Named(MODEL), name, file_name(value), source)
    elif expands is not None and not (option and (option.refused or option.needless or option is HOST)):
        gathering.leave_out(source, _not_filled_in(expands))
    elif named is None:
        gathering.give_unknown(name, value, source)
    else:
        gathering.give(named, name, value, source)


def _not_filled_in(expands: str) -> str:
    return f"{shown(expands)} is not filled in: write what it stands for"


def _values(named: Named | None, following: Sequence[Word], *, is_text: bool) -> list[Word]:
    """The words that are an option's value: llama-server takes no word that is neither option nor value."""
    if not following or (named and named.option.switch):
        return []
    first, *rest = following
    is_text = is_text or (named is not None and named.option.any_text)
    if _is_option(first.text) and (not is_text or option_named(first.text)):
        return []
    if named and named.option.second_number and rest and ":" not in first.text and _NUMBER.fullmatch(rest[0].text):
        return [first, rest[0]]
    return [first]


def _is_option(text: str) -> bool:
    return len(text) > 1 and text.startswith("-") and not _NUMBER.fullmatch(text)
