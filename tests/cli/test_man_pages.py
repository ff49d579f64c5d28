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
from magi_agent.configuration import NEEDS_RESTART
from magi_agent.settings.table import SETTINGS
from tests.cli.man_settings import keys

FOLDER = locations.CHECKOUT / "docs" / "man"
MAGICTL, MAGI_AGENT = FOLDER / "magictl.1", FOLDER / "magi-agent.8"
MAGI_AGENT_TOML, MAGI_LLAMA_SLICE = FOLDER / "magi-agent.toml.5", FOLDER / "magi-llama.slice.7"
README = locations.CHECKOUT / "debian" / "README.Debian"


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
    headings = re.findall(r"^\.SS ((?:(?:profile|token) )?[a-z-]+)", commands, re.MULTILINE)

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


def test_the_configurations_page_has_every_key_as_the_code_has_it() -> None:
    told = MAGI_AGENT_TOML.read_text().partition(".SH KEYS\n")[2].partition(".SH ")[0]

    # The right text: PYTHONPATH=. .venv/bin/python -m tests.cli.man_settings
    assert told == keys()


def test_the_configurations_page_names_what_waits_for_a_restart() -> None:
    told = section(MAGI_AGENT_TOML, "Reading it again")

    # Each in a line of its own, with what separates it from the next.
    named = re.findall(r"^([a-z_]+)(?: ,)?$", told.partition("The keys\n")[2].partition("wait for")[0], re.MULTILINE)
    assert set(named) - {"and"} == set(NEEDS_RESTART)


def test_the_configurations_page_says_what_the_package_sets() -> None:
    shipped = subprocess.run(
        [locations.CHECKOUT / "packaging" / "deb" / "agent-toml", locations.CHECKOUT / "etc" / "agent.toml"],
        capture_output=True, text=True, timeout=30, check=True,
    ).stdout  # fmt: skip
    text = plain(MAGI_AGENT_TOML.read_text()).partition("The package's file differs")[2].partition(".SS")[0]
    told = {" ".join(pair.split()).rstrip(" ,.") for pair in re.split(r",\n|\band\n|\.\n", text.partition("keys:")[2])}

    assert told - {""} == {f"{key} is {value}" for key, value in re.findall(r'^(\w+) = "(.*)"$', shipped, re.MULTILINE)}


def test_the_units_page_names_each_unit_of_the_package_and_the_folders_of_drop_ins() -> None:
    text = plain(MAGI_LLAMA_SLICE.read_text())

    units = [path.name for path in (locations.CHECKOUT / "systemd").iterdir()]
    assert len(units) > 5
    for name in units:
        assert name in text, name


@pytest.mark.parametrize("page", [MAGI_LLAMA_SLICE, MAGI_AGENT_TOML, README])
def test_other_pages_use_commands_that_there_are(page: Path) -> None:
    commands = {name.split()[0]: command for name, command in commands_of(magictl)}
    text = plain(page.read_text())

    used = re.findall(r"(?<![\w/-])magictl (?!works)([a-z-]+)(.*)", text)
    assert used
    for name, rest in used:
        assert name in commands, name
        told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest.partition(",")[0]))
        assert told <= options_of(commands[name]) | {"--scope"}, (name, rest)


def test_readme_fits_a_terminal() -> None:
    assert max(map(len, README.read_text().splitlines())) < 80


@pytest.mark.parametrize("page", sorted(FOLDER.iterdir()), ids=lambda page: page.name)
def test_groff_has_nothing_to_complain_about(page: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("there is no groff here")
    drawn = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", str(page)], capture_output=True, text=True, timeout=60, check=True
    )

    assert drawn.stderr == ""
    assert "SEE ALSO" in re.sub(r"\x1b\[[\d;]*m|.\x08", "", drawn.stdout)
