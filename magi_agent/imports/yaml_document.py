"""YAML that anybody may have written: one plain document, within bounds."""

from typing import Final

import yaml

from magi_agent.imports.imported import InvalidImport

_MAX_DEPTH: Final = 50


def read_yaml(text: str) -> object:
    """The one document in ``text``. Raises ``InvalidImport``."""
    try:
        _refuse_aliases(text)
        loader = yaml.CSafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise InvalidImport("the document is empty")
        _refuse_repeated_keys(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        reason = " ".join(filter(None, (error.context, error.problem))) or "it is not YAML"
        raise InvalidImport(reason, mark.line + 1 if mark else None) from None
    except InvalidImport:
        raise
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # What stands behind a tag such as !!timestamp is taken on trust, and anything may be raised where it is not so.
        raise InvalidImport(f"it is not YAML: {type(error).__name__}") from None


def _refuse_aliases(text: str) -> None:
    # A few nested aliases expand to gigabytes.
    for token in yaml.scan(text, Loader=yaml.CSafeLoader) if "*" in text else ():
        if isinstance(token, yaml.AliasToken):
            raise InvalidImport(
                "YAML aliases are not followed: write out what they stand for", token.start_mark.line + 1
            )


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
