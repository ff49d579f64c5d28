"""The body of an import: as large as the choices for all models are, and so read in pieces, beside the event loop."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Final

from aiohttp import web
from pydantic import ValidationError

from magi_agent.api.exchange import (
    MOST_ERRORS,
    InvalidJson,
    errors_on_wire,
    fault_on_wire,
    object_in,
    received_json,
)
from magi_agent.api.field_paths import wire_path
from magi_agent.api.representations import port_range_of, profile_faults, profile_of
from magi_agent.api.schemas import MOST_MODELS, MOST_PROFILES, ChoicesBody, ExportBody
from magi_agent.errors import ValidationFailed
from magi_agent.profiles.profile import Profile
from magi_agent.registry.model import Choices
from magi_agent.runtime_settings.settings import faults_of
from magi_agent.transfer import Export, ModelChoices

MAX_EXPORT: Final = 64 << 20
"""Bytes."""
_PIECES: Final = {"models": (16, MOST_MODELS), "profiles": (1, MOST_PROFILES)}
"""How many entries are validated at once, and how many there may be."""


async def export_of(request: web.Request) -> Export:
    """The export that a request carries.

    Raises ``UnsupportedMediaType``, ``PayloadTooLarge``, ``InvalidJson``, ``ValidationFailed``, ``BadRequest``,
    ``RequestTimeout``.
    """
    return await asyncio.to_thread(_read, await received_json(request, MAX_EXPORT))


def _read(raw: bytes) -> Export:
    document = _parsed(raw)
    said: ExportBody | None = None
    models: dict[str, ModelChoices] = {}
    profiles: dict[str, Profile] = {}
    errors: list[dict[str, str]] = []
    for piece in _pieces(document):
        try:
            # As text, so that words are taken for enumerations in strict mode.
            body = ExportBody.model_validate_json(json.dumps(piece), strict=True)
        except ValidationError as error:
            errors += errors_on_wire(error, lambda place: wire_path(place, ExportBody))
        else:
            said = said or body
            for model_id, sent in body.models.items():
                within = f"models.{model_id}.runtimeSettings."
                errors += (fault_on_wire(fault, within) for fault in faults_of(sent.runtime_settings))
                models[model_id] = _choices_of(sent)
            for slug, profile in body.profiles.items():
                within = f"profiles.{slug}."
                if faults := profile_faults(profile, within):
                    errors += faults
                else:
                    profiles[slug] = profile_of(profile)
        if len(errors) >= MOST_ERRORS:
            break
    if errors or said is None:
        raise ValidationFailed(errors[:MOST_ERRORS])
    return Export(
        models,
        profiles,
        said.active_profile,
        port_range_of(said.port_range),
        has_port_range="port_range" in said.model_fields_set,
    )


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        # A function of Python's own lets other threads have their turn, which the parser by itself does not.
        document = json.loads(raw.decode(), object_pairs_hook=lambda pairs: dict(pairs), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidJson(f"the body is not JSON: {error}") from None
    return object_in(document)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _pieces(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The document in parts that are documents themselves; the first has whatever is not divided."""
    divided = {key: document[key] for key in _PIECES if isinstance(document.get(key), dict)}
    yield {key: value for key, value in document.items() if key not in divided}
    for key, entries in divided.items():
        size, most = _PIECES[key]
        if len(entries) > most:
            raise ValidationFailed([{"field": key, "message": f"must be at most {most}, not {len(entries)}"}])
        items = list(entries.items())
        for start in range(0, len(items), size):
            yield {"version": 1, key: dict(items[start : start + size])}


def _choices_of(sent: ChoicesBody) -> ModelChoices:
    return ModelChoices(
        sent.filename,
        sent.size_bytes,
        sent.fingerprint,
        Choices(sent.tier_override, sent.thinking_override, sent.enabled, sent.port, sent.runtime_settings),
    )
