"""Ids for models: readable, unique, and fit for a unit's name and a URL."""

import hashlib
import itertools
import re
from collections.abc import Container, Iterator
from pathlib import PurePosixPath
from typing import Final

from magi_agent.discovery.names import stem_of
from magi_agent.vocabulary import MAX_ID_LENGTH, RESERVED_IDS

_OUTSIDE_ALPHABET: Final = re.compile(r"[^a-z0-9._-]+")


def slug(text: str) -> str:
    """``text`` in lower case and ``[a-z0-9._-]``, with no separator at either end; may be empty."""
    return _OUTSIDE_ALPHABET.sub("-", text.lower()).strip("-._")


def id_for(file_path: str, taken: Container[str]) -> str:
    """A new id for the model at ``file_path`` that is neither taken nor reserved.

    The file's name; where that is taken, with its folder's name; where that is taken too, with a hash of its path; and
    where a model that lay at this path before has that as well, with a number.
    """
    return next(name for name in _names(file_path) if name not in taken and name not in RESERVED_IDS)


def _names(file_path: str) -> Iterator[str]:
    path = PurePosixPath(file_path)
    digest = hashlib.sha256(file_path.encode(errors="surrogateescape")).hexdigest()
    bare = slug(stem_of(path.name))[:MAX_ID_LENGTH].rstrip("-._")
    if bare:
        yield bare
        if folder := slug(path.parent.name):
            yield _joined(bare, folder)
        yield _joined(bare, digest[:6])
    else:
        bare = f"model-{digest[:8]}"
        yield bare
    for number in itertools.count(2):
        yield _joined(bare, str(number))


def _joined(bare: str, suffix: str) -> str:
    suffix = suffix[: MAX_ID_LENGTH // 2].rstrip("-._")
    return f"{bare[: MAX_ID_LENGTH - 1 - len(suffix)].rstrip('-._')}-{suffix}"
