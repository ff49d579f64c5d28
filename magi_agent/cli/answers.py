"""Reading the agent's JSON without trusting its shape: what is missing or of another kind is simply absent."""

from collections.abc import Iterator, Mapping


def record(value: object) -> Mapping[str, object]:
    """Return ``value`` where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def records(value: object) -> list[Mapping[str, object]]:
    """Return the JSON objects of a list, or the values of an object of objects."""
    values: list[object] = []
    if isinstance(value, list):
        values = value
    elif isinstance(value, dict):
        values = list(value.values())
    return [item for item in values if isinstance(item, dict)]


def text(value: object) -> str:
    """Return ``value`` where it is a string, else an empty one."""
    return value if isinstance(value, str) else ""


def texts(value: object) -> list[str]:
    """Return the strings of a list."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def models_of(registry: object) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield id and Model of each model in the registry's answer, by id."""
    models = record(record(registry).get("models"))
    for model_id in sorted(models):
        yield model_id, record(models[model_id])
