"""Which model of a registry an imported reference means: a path, a file's name, a name, or a place on Hugging Face."""

import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from magi_agent.imports.gathering import file_name

_PART: Final = re.compile(r"-\d{5}-of-\d{5}$")
_EXTENSION: Final = re.compile(r"\.gguf$", re.IGNORECASE)
_REPOSITORY: Final = re.compile(r"([^/:\s]+)/([^/:\s]+)(?::([^/:\s]+)|/([^:\s]+))?")
_USUAL_QUANTIZATION: Final = "Q4_K_M"
"""What llama-server takes from a repository where nobody says which."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may be meant."""

    model_id: str
    path: str
    parts: tuple[str, ...] = ()
    """Paths of all its files."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path it goes by."""
        return tuple(dict.fromkeys((self.path, *self.parts)))


def match(reference: str, models: Iterable[Candidate]) -> tuple[str, ...]:
    """The ids of the models that ``reference`` may mean: none, the one, or several that it does not tell apart.

    The closest likeness counts: the same path; the same file name, in a folder of the same name before others; the
    same id or name but for letter case, extension and part number; files of the repository on Hugging Face that it
    names, as its own cache, llama-server's and LM Studio lay them out.
    """
    if not reference:
        return ()
    models = tuple(models)
    for alike in (_by_path, _by_file_name, _by_stem, _by_repository):
        if found := alike(reference, models):
            return tuple(model.model_id for model in found)
    return ()


def _by_path(reference: str, models: Sequence[Candidate]) -> list[Candidate]:
    path = posixpath.normpath(reference)
    return [model for model in models if any(posixpath.normpath(other) == path for other in model.paths)]


def _by_file_name(reference: str, models: Sequence[Candidate]) -> list[Candidate]:
    return _closest(models, lambda model: max(_common_end(reference, path) for path in model.paths))


def _by_stem(reference: str, models: Sequence[Candidate]) -> list[Candidate]:
    stem = _stem(reference)
    return [
        model
        for model in models
        if stem and (stem == model.model_id.lower() or any(stem == _stem(path) for path in model.paths))
    ]


def _by_repository(reference: str, models: Sequence[Candidate]) -> list[Candidate]:
    named = _REPOSITORY.fullmatch(reference)
    if named is None:
        return []
    user, repository, quantization, _ = named.groups()
    found = [model for model in models if any(_is_of(path, user, repository) for path in model.paths)]
    if quantization is not None:
        return [model for model in found if _is_quantized(model, quantization)]
    usual = [model for model in found if _is_quantized(model, _USUAL_QUANTIZATION)]
    return usual if len(found) > 1 and usual else found


def _is_of(path: str, user: str, repository: str) -> bool:
    """Whether a file is one of a repository, by the places where programs keep what they download."""
    folders = path.lower().split("/")
    user, repository = user.lower(), repository.lower()
    return (
        f"models--{user}--{repository}" in folders
        or folders[-3:-1] == [user, repository]
        or folders[-1].startswith(f"{user}_{repository}_")
    )


def _is_quantized(model: Candidate, quantization: str) -> bool:
    """Whether a file's name ends with a quantization, as it does on Hugging Face."""
    wanted = re.compile(rf"(?:^|[-._]){re.escape(quantization)}$", re.IGNORECASE)
    return any(wanted.search(_stem(path)) for path in model.paths)


def _stem(path: str) -> str:
    return _PART.sub("", _EXTENSION.sub("", file_name(path))).lower()


def _closest(models: Sequence[Candidate], likeness: Callable[[Candidate], int]) -> list[Candidate]:
    best = max(map(likeness, models), default=0)
    return [model for model in models if best and likeness(model) == best]


def _common_end(reference: str, path: str) -> int:
    """How many parts of two paths are the same, from the end."""
    count = 0
    for one, other in zip(re.split(r"[/\\]", reference)[::-1], path.split("/")[::-1], strict=False):
        if one != other:
            break
        count += 1
    return count
