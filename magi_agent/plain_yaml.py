"""YAML that anybody may have written: one document without aliases, and an error of one kind for all that is wrong."""

import yaml


class InvalidYaml(ValueError):
    """A text is not one plain YAML document; ``line`` counts from 1 where it is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        """Empty where the reader of YAML itself failed: see ``__cause__``."""
        self.line = line


class EmptyYaml(InvalidYaml):
    """There is no document in the text."""


class AliasInYaml(InvalidYaml):
    """The document has an alias: a few nested ones expand to gigabytes."""


def read_plain(text: str) -> tuple[yaml.Node, object]:
    """The one document in ``text``, as nodes (which know their lines) and as values. Raises ``InvalidYaml``."""
    try:
        for token in yaml.scan(text, Loader=yaml.CSafeLoader) if "*" in text else ():
            if isinstance(token, yaml.AliasToken):
                raise AliasInYaml("an alias", token.start_mark.line + 1)
        loader = yaml.CSafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise EmptyYaml("nothing in it")
        return node, loader.construct_document(node)
    except InvalidYaml:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        reason = " ".join(filter(None, (error.context, error.problem))) or "it is not YAML"
        raise InvalidYaml(reason, mark.line + 1 if mark else None) from error
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
        raise InvalidYaml("") from error
