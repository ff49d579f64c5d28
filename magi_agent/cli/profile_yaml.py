"""A profile as it is edited: YAML with the keys of the profile files."""

import math
import re
from collections.abc import Mapping

import yaml

from magi_agent.cli.answers import record
from magi_agent.cli.exits import CommandError
from magi_agent.cli.phrasing import snake_case

_HEADER = """\
# Save and leave, and the profile is replaced by this; leave without saving, and nothing changes.
# Settings of a model while the profile is active, as: runtime_settings: {id: {ctx_size: 8192}}
# What there is: magictl settings --list

"""


def to_yaml(profile: Mapping[str, object]) -> str:
    """Return a Profile of the API's for a person to edit."""
    settings = record(profile.get("runtimeSettings"))
    document = {
        "profile": {key: profile.get(key) for key in ("name", "description")},
        "enabled_models": profile.get("enabledModels"),
        "runtime_settings": {
            model_id: {snake_case(key): value for key, value in record(said).items() if value is not None}
            for model_id, said in settings.items()
        },
        "tier_config": _snake_keys(profile.get("tierConfig")),
        "two_stage": _snake_keys(profile.get("twoStage")),
        "load_balancing": _snake_keys(profile.get("loadBalancing")),
    }
    return _HEADER + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def from_yaml(text: str) -> dict[str, object]:
    """Return what a person has written as a request of the API's. Raises ``CommandError``."""
    try:
        document = _for_json(yaml.load(text, Loader=_Loader))  # noqa: S506  # a safe loader, made even simpler
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise CommandError("ProfileInvalid", f"{place}this is no YAML: {problem}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # What stands behind a tag is taken on trust, and anything may be raised where it is not so.
        raise CommandError("ProfileInvalid", f"this is no YAML: {error}") from None
    if not isinstance(document, dict):
        raise CommandError("ProfileInvalid", "a profile is a mapping, with 'profile:' and 'enabled_models:'")
    names = document.pop("profile", None)
    body = {**document, **record(names)}
    # What is left empty means the default.
    return {key: value for key, value in body.items() if value is not None}


class _Loader(yaml.SafeLoader):
    """YAML without what surprises people: ``on`` and ``off`` are words, and so are dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # the base class says so
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in {"bool", "timestamp"}]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)\Z", re.IGNORECASE), list("tTfF"))


def _for_json(value: object) -> object:
    """Return a value as JSON can carry it; no limit, which is infinity in YAML, is null."""
    if isinstance(value, dict):
        return {str(key): _for_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_for_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float) or value is None else str(value)


def _snake_keys(value: object) -> object:
    if isinstance(value, list):
        return [_snake_keys(one) for one in value]
    if isinstance(value, dict):
        return {snake_case(key): one for key, one in value.items()}
    return value
