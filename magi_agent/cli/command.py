"""How a command of ``magictl`` is declared: options that all of them take, examples in the help text, the session."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import click

from magi_agent.cli.options import Session, options_everywhere


class HelpfulCommand(click.Command):
    """A command whose help text ends with examples, each shown as it is typed."""

    examples: tuple[str, ...] = ()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        super().format_epilog(ctx, formatter)
        write_block(formatter, "Examples", self.examples)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for, so that none pays for another's imports."""

    modules: Mapping[str, str] = {}
    """Each command, in the order in which people need them, and where it is: module of this package, and function."""
    blocks: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """What stands below the list of commands: titles and lines."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the blocks."""
        super().format_epilog(ctx, formatter)
        for title, lines in self.blocks:
            write_block(formatter, title, lines)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # the base class says so
        """Return the names in the order in which people need them."""
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  # likewise
        """Return the command of this name."""
        place = self.modules.get(cmd_name)
        if place is None:
            return None
        module, _, function = place.partition(".")
        found = getattr(import_module(f"magi_agent.cli.{module}"), function)
        if not isinstance(found, click.Command):
            raise TypeError(f"magi_agent.cli.{place} is no command")
        return found


def write_block(formatter: click.HelpFormatter, title: str, lines: tuple[str, ...]) -> None:
    """Write ``lines`` as they are, below a title."""
    if not lines:
        return
    formatter.write_paragraph()
    formatter.write_heading(title)
    for line in lines:
        formatter.write(f"  {line}\n")


def command(*examples: str, name: str | None = None) -> Callable[[Callable[..., Any]], HelpfulCommand]:
    """Make a command of a function whose first argument is the session. Each example is a line to type."""

    def declare(function: Callable[..., Any]) -> HelpfulCommand:
        wrapped = click.make_pass_decorator(Session, ensure=True)(function)
        declared = click.command(name=name, cls=HelpfulCommand)(wrapped)
        declared.params += options_everywhere()
        declared.examples = examples
        return declared

    return declare


def group(modules: Mapping[str, str], *examples: str) -> Callable[[Callable[..., Any]], LazyGroup]:
    """Make a group of commands of a function that does nothing but say in its docstring what they are about."""

    def declare(function: Callable[..., Any]) -> LazyGroup:
        declared = click.group(cls=LazyGroup, params=options_everywhere())(function)
        declared.modules = modules
        declared.blocks = (("Examples", examples),)
        return declared

    return declare
