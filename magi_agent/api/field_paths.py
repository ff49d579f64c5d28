"""Where in a body something is wrong, as its sender sees it: by the names of the wire, whichever names were sent."""

from collections.abc import Iterable
from typing import get_args

from pydantic import BaseModel

from magi_agent.runtime_settings.settings import RuntimeSettings, wire_name


def wire_path(place: Iterable[str | int], schema: type[BaseModel]) -> str:
    """The place of a pydantic error in a body of ``schema``, with the fields' camelCase names, joined by dots.

    Indices of lists and keys of maps stay as they are: a key may be any name a person gave.
    """
    names = []
    model: type[BaseModel] | None = schema
    within: object = None
    for step in place:
        if model is None:
            names.append(wire_name(str(step)) if within is RuntimeSettings else str(step))
            model, within = _model_in(within), RuntimeSettings if RuntimeSettings in get_args(within) else None
            continue
        field = next(
            (field for name, field in model.model_fields.items() if step in (name, field.validation_alias)), None
        )
        names.append(str(step if field is None else field.validation_alias or step))
        within = None if field is None else field.annotation
        model = within if isinstance(within, type) and issubclass(within, BaseModel) else None
    return ".".join(names)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The model that a list, a map or an optional type holds."""
    for argument in get_args(annotation):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument
        if (found := _model_in(argument)) is not None:
            return found
    return None
