"""YAML that anybody may have written: one plain document, within bounds."""

from typing import Final

import yaml

from magi_agent.imports.imported import InvalidImport
from magi_agent.plain_yaml import AliasInYaml, EmptyYaml, InvalidYaml, read_plain

_MAX_DEPTH: Final = 50


def read_yaml(text: str) -> object:
    """The one document in ``text``. Raises ``InvalidImport``."""
    try:
        node, document = read_plain(text)
    except EmptyYaml:
        raise InvalidImport("the document is empty") from None
    except AliasInYaml as error:
        raise InvalidImport("YAML aliases are not followed: write out what they stand for", error.line) from None
    except InvalidYaml as error:
        # What a reader says of a value may hold the value, and that may be a secret.
        raise InvalidImport(error.reason or f"it is not YAML: {type(error.__cause__).__name__}", error.line) from None
    _refuse_repeated_keys(node)
    return document


def _refuse_repeated_keys(node: yaml.Node, depth: int = 0) -> None:
    """As programs in Go do; Python's reader would silently take the last."""
    if depth > _MAX_DEPTH:
        raise InvalidImport("it is nested too deeply", node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise InvalidImport(f"{key.value} stands there twice", key.start_mark.line + 1)
                seen.add(key.value)
            _refuse_repeated_keys(value, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value, depth + 1)
