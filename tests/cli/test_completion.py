"""`magictl completion`: what real shells make of a line where TAB is pressed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from magi_agent.runtime_settings.settings import setting_names
from tests.cli.conftest import Magictl
from tests.cli.stand_in import StandIn, error, profile, server
from tests.cli.terminal import MAGICTL, Terminal, on_terminal, piped, surroundings, without_control

SHELLS = ["bash", "zsh", "fish"]
_START = {
    "bash": (["--norc", "--noprofile", "-i"], "bind 'set bell-style none'; source <(magictl completion bash)"),
    "zsh": (["-f", "-i"], "autoload -U compinit; compinit -u; source <(magictl completion zsh)"),
    "fish": (["--no-config", "-i"], "magictl completion fish | source"),
}
_SHOW_WORDS = 'if [ -n "$_MAGICTL_COMPLETE" ]; then command magictl; else printf \'<%s>\' "$@"; echo; fi'
_SHOW_INSTEAD = {
    "bash": f"magictl() {{ {_SHOW_WORDS}; }}",
    "zsh": f"magictl() {{ {_SHOW_WORDS}; }}",
    "fish": "function magictl; printf '<%s>' $argv; echo; end",
}
"""Has the shell show the words that `magictl` would get, instead of running it."""


@pytest.fixture
def busy(agent: StandIn) -> StandIn:
    """An agent with a profile of its own, a model that runs, and one with a name that should not reach a terminal."""
    agent.profiles["evening"] = profile("evening")
    agent.servers["tiny-chat"] = server("tiny-chat")
    agent.models["old-14b"]["displayName"] = "Old: 14B\x1b[2J"
    return agent


def here(agent: StandIn | None, home: Path) -> dict[str, str]:
    """The environment of a shell that finds `magictl`, and by it the agent."""
    path = f"{MAGICTL.parent}:{os.environ['PATH']}"
    return surroundings(PATH=path, HOME=str(home), PS1="> ", **({"MAGI_URL": agent.url} if agent else {}))


def asked(words: str, at: int, shell: str = "bash", url: str = "127.0.0.1:1") -> list[str]:
    """What `magictl` offers a shell that completes word ``at`` of a line."""
    asking = {"_MAGICTL_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    ended = piped(environment=surroundings(MAGI_URL=url, **asking))
    assert (ended.returncode, ended.stderr) == (0, "")
    return [line for line in ended.stdout.splitlines() if line]


def shows(words: str) -> Callable[[str], bool]:
    """The condition that these words stand in a terminal's output."""
    return lambda output: words in without_control(output)


@contextmanager
def shell_with_script(shell: str, environment: dict[str, str]) -> Iterator[Terminal]:
    """An interactive shell that has loaded the script, and shows words instead of running `magictl`."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"there is no {shell} here")
    options, setup = _START[shell]
    with on_terminal(*options, columns=160, environment=environment, program=program) as terminal:
        terminal.type(f"{setup}; {_SHOW_INSTEAD[shell]}; echo re''ady\r")
        terminal.wait_for(lambda output: "ready" in without_control(output).replace("re''ady", ""), "the shell")
        yield terminal


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_what_is_begun(busy: StandIn, tmp_path: Path, shell: str) -> None:
    lines = {
        "magictl sh\ttin\t": "<show><tiny-chat>",
        "magictl restart t\t": "<restart><tiny-chat>",
        "magictl profile activat\tev\t": "<profile><activate><evening>",
        "magictl settings qwen\tctx\t8k flash_attention=a\t": "<qwen2.5-7b><ctx_size=8k><flash_attention=auto>",
        "magictl settings tiny-chat start_policy=onD\tpin\tof\t": "<start_policy=onDemand><pinned=off>",
        "magictl settings tiny-chat --uns\tmlo\t": "<settings><tiny-chat><--unset><mlock>",
        "magictl tier old\tpow\t": "<tier><old-14b><powerful>",
        f"magictl import {tmp_path}/some-f\t--fo\told\t": f"<import><{tmp_path}/some-file.json><--for><old-14b>",
        f"magictl scan {tmp_path}/some-d\t": f"<scan><{tmp_path}/some-directory",
        f"magictl --url {busy.url} show old\t": f"<--url><{busy.url}><show><old-14b>",
        "magictl completion fi\t": "<completion><fish>",
    }
    (tmp_path / "some-file.json").touch()
    (tmp_path / "some-directory").mkdir()
    with shell_with_script(shell, here(busy, tmp_path)) as terminal:
        for line, words in lines.items():
            terminal.type(f"{line}\r")
            terminal.wait_for(shows(words), f"{line!r}")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("line", "listed"),
    [
        ("magictl show \t\t", ["tiny-chat", "qwen2.5-7b", "old-14b"]),
        ("magictl settings tiny-chat cache_type_k=q5\t\t\t", ["q5_0", "q5_1"]),
    ],
)
def test_a_shell_lists_what_may_be_meant(
    busy: StandIn, tmp_path: Path, shell: str, line: str, listed: list[str]
) -> None:
    with shell_with_script(shell, here(busy, tmp_path)) as terminal:
        begun = len(terminal.output)
        terminal.type(line)
        terminal.wait_for(lambda output: all(word in output[begun:] for word in listed), f"all of {listed}")

    assert "\x1b[2J q4_k_m" not in terminal.output
    assert "Traceback" not in terminal.output


@pytest.mark.parametrize("shell", SHELLS)
def test_without_an_agent_nothing_is_offered_and_nothing_said(tmp_path: Path, shell: str) -> None:
    with shell_with_script(shell, here(None, tmp_path) | {"MAGI_URL": "127.0.0.1:1"}) as terminal:
        terminal.type("magictl show tin\tx\r")
        terminal.wait_for(shows("<show><tinx>"), "the line as it was typed")
        terminal.type("magictl profile li\t\r")
        terminal.wait_for(shows("<profile><list>"), "what needs no agent")

    assert "listens" not in terminal.output


@pytest.mark.parametrize(
    ("words", "at", "offered"),
    [
        ("magictl sho", 1, ["show"]),
        ("magictl profile d", 2, ["delete"]),
        ("magictl --json profile d", 3, ["delete"]),
        ("magictl show ", 2, ["old-14b", "qwen2.5-7b", "tiny-chat"]),
        ("magictl start tiny-chat ", 3, ["old-14b", "qwen2.5-7b"]),
        ("magictl stop ", 2, ["tiny-chat"]),
        ("magictl profile show e", 3, ["evening"]),
        ("magictl profile create x --model o", 5, ["old-14b"]),
        # bash takes these apart, and replaces the last piece.
        ("magictl settings tiny-chat ctx", 3, ["ctx_size="]),
        ("magictl settings tiny-chat flash_attention =", 4, ["on", "off", "auto"]),
        ("magictl settings tiny-chat flash_attention = o", 5, ["on", "off"]),
        ("magictl settings tiny-chat flashAttention = o", 5, ["on", "off"]),
        ("magictl settings tiny-chat mmap = on ctx", 6, ["ctx_size="]),
        ("magictl settings tiny-chat mmap = on mm", 6, []),
        ("magictl settings tiny-chat nothing = o", 5, []),
        ("magictl settings tiny-chat ctx_size = 8", 5, []),
        ("magictl settings tiny-chat --unset mmap --unset ml", 6, ["mlock"]),
        # The others do not.
        ("magictl settings tiny-chat flash_attention=o", 3, ["flash_attention=on", "flash_attention=off"]),
        ("magictl thinking tiny-chat o", 3, ["on", "off"]),
        ("magictl show 'ti", 2, ["tiny-chat"]),
    ],
)
def test_what_fits_is_offered(busy: StandIn, words: str, at: int, offered: list[str]) -> None:
    shell = "bash" if " = " in words or words.endswith("=") else "zsh"
    lines = asked(words, at, shell, busy.url)

    if shell == "bash":
        assert lines == [f"plain,{word}" for word in offered]
    else:
        assert lines[1::3] == offered


def test_the_address_on_the_line_counts_and_bash_takes_it_apart(busy: StandIn) -> None:
    scheme, _, rest = busy.url.partition(":")
    host, _, port = rest.partition(":")

    assert asked(f"magictl --url {scheme} : {host} : {port} stop ", 8) == ["plain,tiny-chat"]


def test_what_models_are_is_told_without_what_moves_a_cursor(busy: StandIn) -> None:
    assert asked("magictl show old", 2, "zsh", busy.url)[2] == "Old: 14B\\x1b[2J q4_k_m"
    # fish says which word is being completed, and not its number.
    asking = {"_MAGICTL_COMPLETE": "fish_complete", "COMP_WORDS": "magictl show old", "COMP_CWORD": "old"}
    told = piped(environment=surroundings(MAGI_URL=busy.url, **asking)).stdout
    assert told == "plain,old-14b\tOld: 14B\\x1b[2J q4_k_m\n"


def test_an_agent_that_refuses_or_hangs_offers_nothing_soon(busy: StandIn) -> None:
    busy.always(*error(403, "Forbidden", "you may not"))
    assert asked("magictl show ", 2, url=busy.url) == []
    busy.always(200, [None, {"models": 5}])
    assert asked("magictl show ", 2, url=busy.url) == asked("magictl stop ", 2, url=busy.url) == []

    busy.fault = None
    busy.hold("GET", "/registry")
    begun = time.monotonic()
    assert asked("magictl show ", 2, url=busy.url) == []
    assert time.monotonic() - begun < 10, "the agent would take thirty seconds"


def test_every_setting_is_offered(busy: StandIn) -> None:
    assert asked("magictl settings tiny-chat ", 3) == [f"plain,{name}=" for name in setting_names()]


@pytest.mark.parametrize("words", ["magictl ", "magictl settings tiny-chat ", "magictl show "])
def test_a_completion_imports_nothing_heavy(busy: StandIn, words: str) -> None:
    program = (
        "import atexit, sys; from magi_agent.cli.magictl import main;"
        "atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr)); main([])"
    )
    at = words.count(" ")
    asking = {"_MAGICTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=surroundings(MAGI_URL=busy.url, **asking),
        timeout=60,
        check=True,
    )

    loaded = {name.partition(".")[0] for name in ended.stderr.split()}
    assert ended.stdout.startswith("plain,")
    assert loaded.isdisjoint({"rich", "pydantic", "aiohttp", "asyncio", "dbus_next", "psutil", "watchfiles", "yaml"})


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed_as_it_is_sourced(magictl: Magictl, shell: str) -> None:
    told = magictl("completion", shell)

    assert told.status == 0
    assert "_MAGICTL_COMPLETE" in told.out
    assert "_magictl_completion" in told.out
    assert magictl("completion", shell, "--json").json == {"shell": shell, "script": told.out}
    assert magictl("completion", "tcsh").status == 2


def test_an_export_goes_to_litellm_or_into_a_file() -> None:
    assert asked("magictl export li", 2) == ["plain,litellm", "file,li"]
    assert asked("magictl export ./li", 2) == ["file,./li"]
