"""``magictl token``: who may use the API by token. Only the group is here; its commands are imported when called."""

from magi_agent.cli.command import group

_COMMANDS = {
    "add": "token_commands.add",
    "list": "token_commands.list_tokens",
    "rate": "token_commands.limit",
    "revoke": "token_commands.revoke",
}


@group(
    _COMMANDS,
    "magictl token add front-end --scope read",
    "magictl token list",
    "magictl token rate laptop 60",
    "magictl token revoke front-end",
)
def token() -> None:
    """Work with tokens: who may use the API from elsewhere.

    A token is shown once, when it is made; the agent keeps its hash alone. These commands work on the file itself,
    and need no agent.
    """
