"""What the shell offers where TAB is pressed: model ids, profile names, settings and their values.

A person waits for the answer, so the agent gets less than a second for it, and where it is not reachable nothing is
offered, and nothing said.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from magi_agent.cli.answers import models_of, records, text, texts
from magi_agent.cli.exits import CommandError
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import safe

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_ASK_SECONDS = 0.6


def model_ids(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem[str]]":
    """Offer the ids of all models, with what they are."""
    described = [
        (model_id, f"{text(model.get('displayName'))} {text(model.get('quantization'))}".strip())
        for model_id, model in models_of(_asked(context, "/api/models/registry"))
    ]
    return _offered(described, incomplete, _given(context, parameter))


def running_ids(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem[str]]":
    """Offer the ids of the models that run, with their states."""
    answer = _asked(context, "/api/models/servers")
    servers = records(answer.get("servers")) if isinstance(answer, dict) else []
    described = [
        (text(server.get("modelId")), text(server.get("state")))
        for server in servers
        if server.get("isRunning") is True
    ]
    return _offered(described, incomplete, _given(context, parameter))


def profile_names(
    context: click.Context,
    parameter: click.Parameter,  # noqa: ARG001  # click's signature
    incomplete: str,
) -> "list[CompletionItem[str]]":
    """Offer the names of the profiles."""
    return _offered(((name, "") for name in texts(_asked(context, "/api/models/profiles"))), incomplete)


def setting_keys(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem[str]]":
    """Offer the settings."""
    from magi_agent.runtime_settings.settings import setting_names

    return _offered(((name, "") for name in setting_names()), incomplete, _given(context, parameter))


def setting_words(
    context: click.Context,
    parameter: click.Parameter,
    incomplete: str,
) -> "list[CompletionItem[str]]":
    """Offer ``KEY=`` for each setting that is not given yet, and behind the ``=`` the values that it may have."""
    from magi_agent.cli.setting_words import WrongWordError, setting_of, values_of
    from magi_agent.runtime_settings.settings import setting_names

    key, equals, begun = incomplete.partition("=")
    if not equals:
        given = {word.partition("=")[0] for word in _given(context, parameter)}
        return _offered(((f"{name}=", "") for name in setting_names() if name not in given), incomplete)
    try:
        values = values_of(setting_of(key))
    except WrongWordError:
        return []
    return _offered(((f"{key}={value}", "") for value in values), f"{key}={begun}")


def folders(
    context: click.Context,  # noqa: ARG001  # click's signature
    parameter: click.Parameter,  # noqa: ARG001  # likewise
    incomplete: str,
) -> "list[CompletionItem[str]]":
    """Have the shell offer its folders."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


def litellm_or_files(
    context: click.Context,  # noqa: ARG001  # click's signature
    parameter: click.Parameter,  # noqa: ARG001  # likewise
    incomplete: str,
) -> "list[CompletionItem[str]]":
    """Offer the word ``litellm``, and have the shell offer its files."""
    from click.shell_completion import CompletionItem

    words = _offered([("litellm", "a LiteLLM router's configuration")], incomplete)
    return [*words, CompletionItem(incomplete, type="file")]


def _asked(context: click.Context, path: str) -> object:
    session = context.find_root().ensure_object(Session)
    try:
        return session.client.request("GET", path, timeout=_ASK_SECONDS).body
    except (CommandError, click.UsageError):
        return None


def _given(context: click.Context, parameter: click.Parameter) -> frozenset[str]:
    """Return the words that stand on the line already for the same parameter."""
    given = context.params.get(parameter.name or "")
    return frozenset(given) if isinstance(given, tuple) else frozenset()


def _offered(
    described: Iterable[tuple[str, str]], incomplete: str, given: frozenset[str] = frozenset()
) -> "list[CompletionItem[str]]":
    from click.shell_completion import CompletionItem

    return [
        CompletionItem(word, help=safe(what) or None)
        for word, what in described
        if word.startswith(incomplete) and word not in given and word.isprintable()
    ]
