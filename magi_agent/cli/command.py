"""How a command of ``magictl`` is declared: options that all of them take, examples in the help text, the session."""

from collections.abc import Callable
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
