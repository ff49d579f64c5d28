"""Runtime settings as people type and read them: ``ctx_size=32k`` and its like.

What a setting may be stands in its type; here is only how a word becomes a value of it, and a value a word that would
be read as the same value again.
"""

import json
import math
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from magi_agent.runtime_settings.settings import LoraAdapter, RuntimeSettings, setting_names, wire_name

_YES = frozenset({"on", "true", "yes"})
_NO = frozenset({"off", "false", "no"})
_LAYERS = frozenset({"n_gpu_layers", "draft_n_gpu_layers"})
_ALL_LAYERS = "all"
BYTES = frozenset({"memory_high", "memory_max", "io_read_bandwidth_max"})
"""Settings in bytes, which may be typed as ``24G``."""
TOKENS = frozenset({"ctx_size", "yarn_orig_ctx"})
"""Settings in tokens of context, which may be typed as ``32k``."""
_BINARY_UNITS: Mapping[str, int] = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_DECIMAL_UNITS: Mapping[str, int] = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_MOST_SHOWN = 50


class WrongWordError(ValueError):
    """A word that is no setting, or no value of one; the sentence says what would be."""


def setting_of(key: str) -> str:
    """Return the name of the setting that ``key`` means, in snake_case or camelCase. Raises ``WrongWordError``."""
    name = _keys().get(key.replace("-", "_").lower())
    if name is None:
        from magi_agent.cli.names import close_to

        close = close_to(key, list(setting_names()))
        meant = f"did you mean {' or '.join(close)}?" if close else "all of them: magictl settings --list"
        raise WrongWordError(f"no setting is called {key!r}; {meant}")
    return name


@cache
def _keys() -> Mapping[str, str]:
    names = setting_names()
    return {name: name for name in names} | {wire_name(name).lower(): name for name in names}


def assigned(word: str) -> tuple[str, object]:
    """Return the setting and its JSON value that a word ``KEY=VALUE`` stands for. Raises ``WrongWordError``."""
    key, equals, value = word.partition("=")
    if not equals:
        raise WrongWordError(f"{word!r} is no KEY=VALUE")
    name = setting_of(key.strip())
    if value in ("", "null"):  # the API's word for the default; text would take it as it is
        raise WrongWordError(f"{name} needs a value; to leave it to the defaults: --unset {name}")
    try:
        return name, _read(name, _plain_type(name), value)
    except ValueError as error:
        raise WrongWordError(f"{name} {error}") from None


def values_of(name: str) -> tuple[str, ...]:
    """Return the words that a setting may be, where they are a closed set."""
    kind = _plain_type(name)
    if kind is bool:
        return "on", "off"
    if name in _LAYERS:
        return (_ALL_LAYERS,)
    return _words_of(kind)


def shown(name: str, value: object) -> str:
    """Return a setting's JSON value as it would be typed."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if name in _LAYERS and value == -1:
        return _ALL_LAYERS
    if name in BYTES or name in TOKENS:
        return _in_units(value, "kmgtp" if name in BYTES else "k")
    if isinstance(value, list):
        return _listed(value)
    return _number_shown(value)


def summary(name: str, value: object) -> str:
    """Return a setting's JSON value for a sheet of facts: a chat template, which may be as long as a page, is cut."""
    text = shown(name, value)
    return text if name != "chat_template" or len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 1] + "…"


def _read(name: str, kind: Any, word: str) -> object:
    if word.startswith("[") and get_origin(kind) is tuple:
        return _read_json(word)
    if get_origin(kind) is tuple:
        [element, *_] = get_args(kind)
        return [_read_element(_bare(element), part.strip()) for part in word.split(",") if part.strip()]
    if kind is bool:
        return _read_switch(word)
    if words := _words_of(kind):
        return _read_choice(words, word)
    if kind is int:
        return _read_whole(name, word.strip())
    return _read_number(word) if kind is float else word


def _read_element(kind: Any, word: str) -> object:
    if kind is LoraAdapter:
        path, colon, scale = word.rpartition(":")
        return {"path": path, "scale": _read_number(scale)} if colon else {"path": word, "scale": 1.0}
    return _read_number(word) if kind is float else word


def _read_json(word: str) -> object:
    try:
        value: object = json.loads(word)
    except ValueError as error:
        raise ValueError(f"begins with '[' and is no JSON list: {error}") from None
    return value


def _read_switch(word: str) -> bool:
    if word.lower() in _YES:
        return True
    if word.lower() in _NO:
        return False
    raise ValueError(f"must be on or off, not {word!r}")


def _read_choice(words: tuple[str, ...], word: str) -> str:
    def folded(text: str) -> str:
        return text.replace("-", "").replace("_", "").lower()

    for known in words:
        if folded(known) == folded(word):
            return known
    raise ValueError(f"must be one of {', '.join(words)}, not {word!r}")


def _read_whole(name: str, word: str) -> int:
    if name in _LAYERS and word.lower() == _ALL_LAYERS:
        return -1
    try:
        return int(word)
    except ValueError:
        pass
    if name in BYTES and (count := _with_unit(word)) is not None:
        return count
    if name in TOKENS and word[-1:].lower() == "k" and (count := _with_unit(word)) is not None:
        return count
    also = ", as 24G" if name in BYTES else ", as 32k" if name in TOKENS else ""
    raise ValueError(f"must be a whole number{also}, not {word!r}")


def _with_unit(word: str) -> int | None:
    """Read ``24G`` and ``24GiB``, in powers of 1024 as systemd does, and ``24GB``, in powers of 1000."""
    text = word.lower()
    units: Mapping[str, int] = _BINARY_UNITS
    if text.endswith("ib"):
        text = text[:-2]
    elif text.endswith("b"):
        text, units = text[:-1], _DECIMAL_UNITS
    try:
        count = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        return None
    return round(count) if math.isfinite(count) else None


def _read_number(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"must be a number, not {word!r}") from None
    return value


def _in_units(value: object, letters: str) -> str:
    if not isinstance(value, int):
        return str(value)
    for letter in reversed(letters):
        count, rest = divmod(value, _BINARY_UNITS[letter])
        if count and not rest:
            return f"{count}{letter if letter == 'k' else letter.upper()}"
    return str(value)


def _listed(values: list[object]) -> str:
    parts = [_element_shown(value) for value in values]
    as_json = any("," in part or part != part.strip() or part.startswith("[") for part in parts)
    return json.dumps(values) if as_json else ",".join(parts)


def _element_shown(value: object) -> str:
    if isinstance(value, dict):
        return f"{value.get('path')}:{_number_shown(value.get('scale', 1.0))}"
    return _number_shown(value)


def _number_shown(value: object) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


@cache
def _types() -> Mapping[str, Any]:
    return get_type_hints(RuntimeSettings, include_extras=True)


def _plain_type(name: str) -> Any:
    return _bare(_types()[name])


def _bare(kind: Any) -> Any:
    """Return a type without its bounds and without ``None``."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _bare(get_args(kind)[0])
    if origin in {Union, UnionType}:
        [other] = [one for one in get_args(kind) if one is not type(None)]
        return _bare(other)
    return kind


def _words_of(kind: Any) -> tuple[str, ...]:
    if get_origin(kind) is Literal:
        return tuple(get_args(kind))
    return tuple(str(word) for word in kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else ()
