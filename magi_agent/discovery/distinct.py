"""One model for each file, however many names it has."""

from collections.abc import Iterable
from operator import attrgetter

from magi_agent.discovery.assembly import Candidate
from magi_agent.discovery.facts import ModelFacts

_file_path = attrgetter("file_path")


def distinct(folders: Iterable[tuple[Candidate, ...]]) -> tuple[ModelFacts, ...]:
    """Leave each file's model once: a link and its target, and two hard links, are one.

    The one that is no link stays, else the one whose path sorts first.
    """
    by_file: dict[tuple[int, int], Candidate] = {}
    models: list[ModelFacts] = []
    for candidates in folders:
        for candidate in candidates:
            identity = candidate.facts.identity
            if identity is None:
                models.append(candidate.facts)
                continue
            key = (identity.device, identity.inode)
            rival = by_file.setdefault(key, candidate)
            if rival is not candidate and _rank(candidate) < _rank(rival):
                by_file[key] = candidate
    models += [candidate.facts for candidate in by_file.values()]
    models.sort(key=_file_path)
    return tuple(models)


def _rank(candidate: Candidate) -> tuple[bool, str]:
    return candidate.via_link, candidate.facts.file_path
