"""Joining what a scan found with what the registry knows: a pure function.

A model that was found is the one the registry knows

1. if it is the same file at the same path; else
2. if it is certainly the same file, wherever it went: device, inode, size and header fingerprint are the same; else
3. if it lies at the same path: a file that was replaced; else
4. if device, inode and size are the same and a header that nobody could read may be; file systems give the inode of a
   file that went to the next new one, so where neither header is known the time of the last write has to be the same
   too; else
5. if size and header fingerprint are the same: a copy of a file that went.

Each step is taken for all that was found before the next one is; of several known models that fit, a listed one comes
before one that went. What fits none is new. A move to another disk is a copy that is listed, and then the end of the
file that was copied: where that one has choices and the newcomer none, the newcomer's id is forgotten, and the file is
the model that went. A model that was not found stays listed as missing while its server runs; else it is remembered
unlisted, so that its id and its choices come back with it.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Final

from magi_agent.discovery.facts import ModelFacts
from magi_agent.registry.ids import id_for
from magi_agent.registry.model import Choices, Model
from magi_agent.vocabulary import ModelStatus

MAX_REMEMBERED: Final = 10_000
"""How many models without any choice are remembered after they went."""

_file_path: Final = attrgetter("file_path")
_present: Final = attrgetter("present")


@dataclass(frozen=True, slots=True)
class Merge:
    """The registry's models after a scan, and how they differ from those before."""

    models: dict[str, Model]
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]

    @property
    def is_news(self) -> bool:
        """Whether anything differs."""
        return bool(self.added or self.changed or self.removed)


def merge(
    known: Mapping[str, Model],
    found: Iterable[ModelFacts],
    running: Collection[str],
    newcomers: Collection[str] = frozenset(),
) -> Merge:
    """Join ``found`` with ``known``; ``running`` are the ids of models whose servers run.

    ``newcomers`` are the ids of those whose files became whole so lately that a move to another disk may go on.
    """
    found = sorted(found, key=_file_path)
    assigned = _recognise(known, found)
    moved = _moved_by_copying(known, found, assigned, running, newcomers)
    forgotten = {assigned[path].model_id for path in moved}
    assigned |= moved
    taken = set(known)
    merged: dict[str, Model] = {}
    added, changed = [], []
    for facts in found:
        before = assigned.get(facts.file_path)
        if before is None:
            model = Model(id_for(facts.file_path, taken), facts)
            taken.add(model.model_id)
        elif before.present and _tell_the_same(before.facts, facts):
            model = before
        else:
            model = replace(before, facts=facts, present=True)
        merged[model.model_id] = model
        if before is None or not before.present:
            added.append(model.model_id)
        elif model is not before and model.facts != before.facts:
            changed.append(model.model_id)
    removed = []
    for model_id, before in known.items():
        if model_id in merged:
            continue
        if model_id in forgotten:
            removed.append(model_id)
            continue
        model = before
        if before.present and model_id in running:
            if before.facts.status is not ModelStatus.MISSING:
                # No word on whether its server runs: it may end before the next scan.
                problem = "its file is gone: its server cannot be started again until the file is back"
                model = replace(before, facts=replace(before.facts, status=ModelStatus.MISSING, problem=problem))
                changed.append(model_id)
        elif before.present:
            model = replace(before, present=False)
            removed.append(model_id)
        merged[model_id] = model
    return Merge(_within_bounds(merged), tuple(added), tuple(changed), tuple(removed))


def _recognise(known: Mapping[str, Model], found: list[ModelFacts]) -> dict[str, Model]:
    """The known model for each path found, where there is one."""
    # Stable: of those that went, the one that did so last comes first.
    candidates = sorted(known.values(), key=_present, reverse=True)
    unchanged = {id(model.facts): model for model in candidates if model.present}
    assigned = {facts.file_path: model for facts in found if (model := unchanged.get(id(facts))) is not None}
    for sign in _SIGNS:
        if len(assigned) == len(found):
            break
        used = {model.model_id for model in assigned.values()}
        # The first of them last. Nearly every sign is one model's, for which a deque would take ten times as much.
        by_sign: defaultdict[object, list[Model]] = defaultdict(list)
        for model in reversed(candidates):
            if model.model_id not in used and (told_by := sign(model.facts)) is not None:
                by_sign[told_by].append(model)
        for facts in found:
            if facts.file_path in assigned or (fitting := by_sign.get(sign(facts))) is None:
                continue
            places = reversed(range(len(fitting)))
            fits = (place for place in places if sign is not _file or _may_be_the_same(facts, fitting[place].facts))
            if (place := next(fits, None)) is not None:
                assigned[facts.file_path] = fitting.pop(place)
    return assigned


def _moved_by_copying(
    known: Mapping[str, Model],
    found: list[ModelFacts],
    assigned: Mapping[str, Model],
    running: Collection[str],
    newcomers: Collection[str],
) -> dict[str, Model]:
    """The models with choices that went, by the paths where newcomers without any have their content."""
    nothing_chosen = Choices()
    used = {model.model_id for model in assigned.values()}
    went: defaultdict[object, deque[Model]] = defaultdict(deque)
    for model_id, model in known.items():
        if model.present and model_id not in used and model.choices != nothing_chosen:
            went[_content(model.facts)].append(model)
    went.pop(None, None)
    moved: dict[str, Model] = {}
    for facts in found if went else ():
        there = assigned.get(facts.file_path)
        if there is None or there.choices != nothing_chosen or there.model_id in running:
            continue
        is_new = there.model_id in newcomers or there.facts.status is ModelStatus.INCOMPLETE
        if is_new and (moved_here := went.get(_content(facts))):
            moved[facts.file_path] = moved_here.popleft()
    return moved


def _tell_the_same(one: ModelFacts, other: ModelFacts) -> bool:
    # The scanner gives the same object where nothing changed, and that is nearly always nearly all.
    return one is other or (one == other and one.header == other.header)


def _file_at_path(facts: ModelFacts) -> object:
    # Without the device: its number may be another one after each mount, and another disk's before.
    identity = facts.identity
    return (facts.file_path, identity.inode, identity.size, facts.fingerprint) if identity else None


def _certain_file(facts: ModelFacts) -> object:
    identity = facts.identity
    if identity is None or facts.fingerprint is None:
        return None
    return (identity.device, identity.inode, identity.size, facts.fingerprint)


def _file(facts: ModelFacts) -> object:
    identity = facts.identity
    return (identity.device, identity.inode, identity.size) if identity and identity.size else None


def _content(facts: ModelFacts) -> object:
    is_whole = facts.status in (ModelStatus.OK, ModelStatus.MISSING)
    return (facts.size_bytes, facts.fingerprint) if facts.fingerprint and is_whole else None


_SIGNS: Final[tuple[Callable[[ModelFacts], object], ...]] = (
    _file_at_path, _certain_file, _file_path, _file, _content,
)  # fmt: skip


def _may_be_the_same(one: ModelFacts, other: ModelFacts) -> bool:
    if one.fingerprint is None and other.fingerprint is None:
        return one.identity == other.identity
    return one.fingerprint == other.fingerprint or None in (one.fingerprint, other.fingerprint)


def _within_bounds(models: dict[str, Model]) -> dict[str, Model]:
    """Forget the longest-gone models nobody chose anything for, past the bound."""
    nothing_chosen = Choices()
    forgettable = [
        model_id for model_id, model in models.items() if not model.present and model.choices == nothing_chosen
    ]
    # What went just now stands before what had gone before it.
    for model_id in forgettable[MAX_REMEMBERED:]:
        del models[model_id]
    return models
