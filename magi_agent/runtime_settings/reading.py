"""Runtime settings at the edges: read from what JSON, YAML and TOML hold, and written for them.

Keys are snake_case in files and camelCase on the wire; both are read everywhere.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from magi_agent.runtime_settings.settings import Fault, RuntimeSettings, faults_of, setting_names, wire_name

ADAPTER: Final = TypeAdapter(RuntimeSettings)
_NONE_SET: Final = RuntimeSettings()
_YAML_WORDS: Final = {True: "on", False: "off"}
_ON_OR_OFF: Final = frozenset({"flash_attention", "flashAttention", "reasoning"})
_BOOLEAN: Final = frozenset(each.name for each in fields(RuntimeSettings) if each.type == (bool | None))
_NOT_BOOLEAN: Final = frozenset(
    spelling for name in setting_names() if name not in _BOOLEAN for spelling in (name, wire_name(name))
)


class InvalidRuntimeSettings(ValueError):
    """Settings that are none; ``faults`` says which, and why."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__("; ".join(f"{fault.name}: {fault.message}" for fault in faults))
        self.faults = faults


def read_settings(document: object) -> RuntimeSettings:
    """Settings from a file's mapping. Raises ``InvalidRuntimeSettings``."""
    if isinstance(document, Mapping):
        # A plain on or off is a boolean in YAML.
        document = {
            name: _YAML_WORDS[value] if isinstance(value, bool) and name in _ON_OR_OFF else value
            for name, value in document.items()
        }
        if misplaced := [name for name, value in document.items() if isinstance(value, bool) and name in _NOT_BOOLEAN]:
            # Taken for a number, it would be 1 or 0.
            raise InvalidRuntimeSettings(tuple(Fault(name, "must not be true or false") for name in misplaced))
    try:
        settings = ADAPTER.validate_python(document)
    except ValidationError as error:
        raise InvalidRuntimeSettings(
            tuple(
                Fault(".".join(map(str, problem["loc"])), message_of(problem))
                for problem in error.errors(include_url=False, include_input=False)
            )
        ) from None
    return checked(settings)


def read_kept(document: Mapping[str, object]) -> tuple[RuntimeSettings, tuple[Fault, ...]]:
    """Settings that this agent, or another version of it, has written, and what of them is no setting now.

    One that is none costs no other: it is left out.
    """
    if not document:  # of most models; they share one value
        return _NONE_SET, ()
    names = {wire_name(name): name for name in setting_names()}
    kept = {names.get(name, name): value for name, value in document.items() if value is not None}
    faults: list[Fault] = []
    while kept:
        try:
            return read_settings(kept), tuple(faults)
        except InvalidRuntimeSettings as error:
            faults += error.faults
            wrong = {fault.name.partition(".")[0] for fault in error.faults}
            kept = {name: value for name, value in kept.items() if name not in wrong} if wrong & kept.keys() else {}
    return RuntimeSettings(), tuple(faults)


def checked(settings: RuntimeSettings) -> RuntimeSettings:
    """The same settings. Raises ``InvalidRuntimeSettings`` for values that are malformed or do not go together."""
    if faults := faults_of(settings):
        raise InvalidRuntimeSettings(faults)
    return settings


def written(settings: RuntimeSettings) -> dict[str, Any]:
    """What somebody spoke about, as files hold it."""
    return {name: to_jsonable_python(value) for name, value in settings.said()}


def message_of(problem: ErrorDetails) -> str:
    """What is wrong, for a person; where there is no such setting, the nearest there is, in either spelling."""
    *within, name = problem["loc"] or ("",)
    if problem["type"] != "unexpected_keyword_argument" or (within and isinstance(within[-1], int)):
        return problem["msg"]
    names = {spelling(known): known for known in setting_names() for spelling in (str, wire_name)}
    if name in names:
        return f"is given twice: as {names[str(name)]} and as {wire_name(names[str(name)])}"
    near = difflib.get_close_matches(str(name), names, 1)
    return f"there is no such setting; did you mean {near[0]}?" if near else "there is no such setting"
