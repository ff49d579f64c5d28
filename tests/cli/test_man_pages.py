"""The man pages name each command and option there is, no other, and what each defaults to."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import locations
import pytest

from magi_agent.cli.agent import AgentExit
from magi_agent.cli.agent import command_line as magi_agent
from magi_agent.cli.exits import Exit
from magi_agent.cli.magictl import command_line as magictl
from magi_agent.settings import SETTINGS

FOLDER = locations.CHECKOUT / "docs" / "man"
MAGICTL, MAGI_AGENT = FOLDER / "magictl.1", FOLDER / "magi-agent.8"


def plain(roff: str) -> str:
    """A page's source without what only decides how it looks."""
    roff = re.sub(r"\\f[A-Z]", "", roff).replace("\\-", "-").replace("\\ ", " ")
    roff = re.sub(r"^\.(?:[BIR]{1,2}|TP|PP|nf|fi)\b ?", "", roff, flags=re.MULTILINE)
    return re.sub(" +", " ", roff.replace('"', ""))


def section(page: Path, heading: str) -> str:
    """One section or subsection of a page, up to the next."""
    pattern = rf"^\.S[HS] {re.escape(heading)}(?![\w-]).*?(?=^\.S[HS] |\Z)"
    found = re.search(pattern, plain(page.read_text()), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section {heading}"
    return found[0]


def options_of(command: click.Command) -> set[str]:
    # As the program itself would call it: a command keeps the names of its help option from the first time on.
    context = click.Context(command, **(command.context_settings or magictl.context_settings))
    return {name for parameter in command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)
            if name.startswith("-")}  # fmt: skip


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def commands_of(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Each command that does something, by the words it is called by."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands_of(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def test_magictls_page_has_every_command_with_every_option_and_no_other() -> None:
    everywhere = options_of(magictl)
    assert everywhere <= options_in(section(MAGICTL, "OPTIONS"))
    assert options_in(section(MAGICTL, "OPTIONS")) <= everywhere
    for name, command in commands_of(magictl):
        told = options_in(section(MAGICTL, name))

        assert told == options_of(command) - everywhere, name


def test_magictls_page_has_the_commands_in_the_order_of_the_help_and_no_other() -> None:
    commands = plain(MAGICTL.read_text()).partition(".SH COMMANDS")[2].partition(".SH EXIT")[0]
    headings = re.findall(r"^\.SS ((?:profile )?[a-z-]+)", commands, re.MULTILINE)

    assert headings == [name for name, _ in commands_of(magictl)]


def test_magictls_page_says_what_each_command_is_for_in_the_words_of_its_help() -> None:
    for name, command in commands_of(magictl):
        first = (command.help or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")

        assert first in section(MAGICTL, name).replace("\n", " "), name


def test_magictls_page_has_the_exit_statuses_and_the_waits() -> None:
    assert re.findall(r"^(\d+)$", section(MAGICTL, "EXIT STATUS"), re.MULTILINE) == [
        str(status.value) for status in Exit
    ]
    assert "from 1 to 3600; 600 by default" in section(MAGICTL, "start")


def test_magi_agents_page_has_every_option_with_variable_and_default() -> None:
    text = plain(MAGI_AGENT.read_text())
    told = options_in(text.partition(".SH OPTIONS")[2].partition(".SH EXIT")[0])

    assert told == options_of(magi_agent)
    for setting in SETTINGS:
        entry = re.search(rf"^{setting.option} VALUE$.*?(?=^--|^\.S)", text, re.MULTILINE | re.DOTALL)
        assert entry, setting.option
        assert f"${setting.variable}" in entry[0]
        assert f"{setting.default} by default" in entry[0] if setting.default else "$" in entry[0]


def test_magi_agents_page_has_the_exit_statuses() -> None:
    assert re.findall(r"^(\d+)$", section(MAGI_AGENT, "EXIT STATUS"), re.MULTILINE) == [
        str(status.value) for status in AgentExit
    ]


@pytest.mark.parametrize("page", [MAGICTL, MAGI_AGENT])
def test_groff_has_nothing_to_complain_about(page: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("there is no groff here")
    drawn = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", str(page)], capture_output=True, text=True, timeout=60, check=True
    )

    assert drawn.stderr == ""
    assert "EXIT STATUS" in re.sub(r"\x1b\[[\d;]*m|.\x08", "", drawn.stdout)
