"""``magictl profile``: named sets of models. Only the group is here; its commands are imported when they are called."""

from magi_agent.cli.command import group

_COMMANDS = {
    "list": "profiles.list_profiles",
    "show": "profiles.show",
    "active": "profiles.active",
    "activate": "profile_activation.activate",
    "create": "profile_changes.create",
    "edit": "profile_changes.edit",
    "delete": "profile_changes.delete",
}


@group(
    _COMMANDS,
    "magictl profile list",
    "magictl profile create evening --from-current",
    "magictl profile activate evening --dry-run",
)
def profile() -> None:
    """Work with profiles: named sets of models that are in use.

    A profile names the models that are in use while it is active, and may say how each is run.
    """
