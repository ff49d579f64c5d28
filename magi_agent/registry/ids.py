"""Ids for models: readable, unique, and fit for a unit's name and a URL."""

import hashlib
import re
from collections.abc import Container
from pathlib import PurePosixPath
from typing import Final

RESERVED_IDS: Final = frozenset({"registry", "servers", "profiles", "tiers", "port-range", "rescan"})
MAX_ID_LENGTH: Final = 200
_PART_NUMBER: Final = re.compile(r"-\d{5}-of-\d{5}$")
_OUTSIDE_ALPHABET: Final = re.compile(r"[^a-z0-9._-]+")


def slug(text: str) -> str:
    """``text`` in lower case and ``[a-z0-9._-]``, with no separator at either end; may be empty."""
    return _OUTSIDE_ALPHABET.sub("-", text.lower()).strip("-._")


def id_for(file_path: str, taken: Container[str]) -> str:
    """A new id for the model at ``file_path`` that is neither taken nor reserved.

    The file's name; where that is taken, with its folder's name; where that is taken too, with a hash of its path.
    """
    path = PurePosixPath(file_path)
    stem = path.name[: -len(path.suffix)] if path.suffix.lower() == ".gguf" else path.name
    digest = hashlib.sha256(file_path.encode(errors="surrogateescape")).hexdigest()
    bare = slug(_PART_NUMBER.sub("", stem))[:MAX_ID_LENGTH].rstrip("-._")
    folder = slug(path.parent.name)
    if not bare:
        candidates = [f"model-{digest[:8]}", f"model-{digest}"]
    else:
        candidates = [
            bare,
            *([_joined(bare, folder)] if folder else []),
            _joined(bare, digest[:6]),
            _joined(bare, digest),
        ]
    for candidate in candidates:
        if candidate not in taken and candidate not in RESERVED_IDS:
            return candidate
    raise ValueError(f"{file_path!r} has an id already")


def _joined(bare: str, suffix: str) -> str:
    suffix = suffix[: MAX_ID_LENGTH // 2]
    return f"{bare[: MAX_ID_LENGTH - 1 - len(suffix)]}-{suffix}"
