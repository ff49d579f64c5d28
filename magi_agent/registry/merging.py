"""Joining what a scan found with what the registry knows: a pure function.

A model that was found is the one the registry knows

1. if it is the same file at the same path; else
2. if it is certainly the same file, wherever it went: device, inode, size and header fingerprint are the same, and no
   sample of the data says otherwise; else
3. if it lies at the same path: a file that was replaced; else
4. if device, inode and size are the same and a header that nobody could read may be; file systems give the inode of a
   file that went to the next new one, so where neither header is known the time of the last write has to be the same
   too; else
5. if the content is the same: a copy of a file that went.

Each step is taken for all that was found before the next one is; of several known models that fit, a listed one comes
before one that went. What fits none is new.

**Content** is size, header fingerprint and a sample of the data. Two models of one size and header, as two checkpoints
of one training have, are told apart by the sample alone. Where one was never taken, as in what an earlier agent left,
it tells nothing apart. Of a model that is not whole, as a split set of which some parts went already, the content
counts that it had when it was last whole.

**A move to another disk** is a copy that is listed, for as long as the copying takes, and at some time later the end of
what was copied. Each of both is a model with an id. So when a model goes whose content a listed one has, it goes on
there, with its id and its choices, and the other's id is given up, if

* nobody has made anything of the other: no choice was made for it since it came, and its server does not run. Who
  chose something for a copy has made it a model of its own, and nothing moves then. (A start is such a choice: it gives
  a port.) And if
* the other came later: it was found whole just now, or its number as a copy is higher. A file that comes gets a number
  if listed files have its content: one more than the highest of theirs. What comes first, or together with its like in
  one scan, has 0, and so has what somebody chose for. The numbers are kept in the registry file: it makes no difference
  how much later the other goes, nor how often the agent was started in between. And if
* it is not its disk that went: its device is still there, under a folder that is scanned or in place of one that was
  removed. A disk that is mounted late or taken out must not leave its ids to the copies elsewhere. For one that was
  found whole just now, that is not asked.

Of several copies the last one counts: the older ones were beside it and stay models of their own. Of several models
that went, one with choices comes before one without. Where what was copied went before the copy was whole, as a copy on
a network file system may be seen seconds later, the copy is the model that went once it is whole.

The id that is given up is remembered as one that went, of which nothing is known but the path: it is not given to other
content elsewhere. A model that was not found stays listed as missing while its server runs; else it is remembered
unlisted, so that its id and its choices come back with it.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Final

from magi_agent.discovery.facts import ModelFacts
from magi_agent.registry.content import Content, content_of, may_equal
from magi_agent.registry.ids import id_for
from magi_agent.registry.model import Choices, Model
from magi_agent.vocabulary import ModelStatus

MAX_REMEMBERED: Final = 10_000
"""How many models without any choice are remembered after they went."""

_NOTHING_CHOSEN: Final = Choices()
_file_path: Final = attrgetter("file_path")
_present: Final = attrgetter("present")


@dataclass(frozen=True, slots=True)
class Merge:
    """The registry's models after a scan, and how they differ from those before."""

    models: dict[str, Model]
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    has_learned: bool = False
    """Whether more is known by which a model will be recognised; no news to anybody, but to be kept."""

    @property
    def is_news(self) -> bool:
        """Whether anything differs."""
        return bool(self.added or self.changed or self.removed)


def merge(
    known: Mapping[str, Model],
    found: Iterable[ModelFacts],
    running: Collection[str],
    devices: Collection[int] | None = None,
) -> Merge:
    """Join ``found`` with ``known``; ``running`` are the ids of models whose servers run.

    ``devices`` are those that are there; ``None`` says that no disk is away.
    """
    found = sorted(found, key=_file_path)
    assigned, left = _recognise(known, found)
    moved = _moved(left, found, assigned, running, devices)
    given_up = {assigned[path].model_id: model.content for path, model in moved.items()}
    assigned |= moved
    taken = set(known)
    merged: dict[str, Model] = {}
    added, changed = [], []
    came: dict[str, Content] = {}
    has_learned = False
    for facts in found:
        before = assigned.get(facts.file_path)
        if before is not None and before.present and _tell_the_same(before.facts, facts):
            merged[before.model_id] = before
            continue
        content = content_of(facts)
        if before is None:
            model = Model(id_for(facts.file_path, taken), facts)
            taken.add(model.model_id)
        else:
            model = replace(before, facts=facts, present=True, last_whole=None if content else before.content)
            has_learned = has_learned or before.facts.sample != facts.sample
        merged[model.model_id] = model
        if before is None or not before.present:
            added.append(model.model_id)
        elif model.facts != before.facts:
            changed.append(model.model_id)
        if content and _comes(before, facts, content):
            came[model.model_id] = content
    merged |= _numbered(merged, came)
    unfound = dict(_unfound(known, merged, given_up, running))
    removed = [model_id for model_id, model in unfound.items() if known[model_id].present and not model.present]
    changed += [model_id for model_id, model in unfound.items() if model.present and model is not known[model_id]]
    return Merge(_within_bounds(merged | unfound), tuple(added), tuple(changed), tuple(removed), has_learned)


def _unfound(
    known: Mapping[str, Model],
    merged: Mapping[str, Model],
    given_up: Mapping[str, Content | None],
    running: Collection[str],
) -> Iterator[tuple[str, Model]]:
    """The known models that were not found, as they are now, by id."""
    for model_id, model in known.items():
        if model_id in merged:
            continue
        if model_id in given_up:
            yield model_id, _given_up(model, given_up[model_id])
        elif model.present and model_id in running:
            yield model_id, _missing(model)
        else:
            yield model_id, replace(model, present=False) if model.present else model


def _recognise(known: Mapping[str, Model], found: list[ModelFacts]) -> tuple[dict[str, Model], list[Model]]:
    """The known model for each path found, where there is one, and the models that are left."""
    # Stable: of those that went, the one that did so last comes first.
    left = sorted(known.values(), key=_present, reverse=True)
    unchanged = {id(model.facts): model for model in left if model.present}
    assigned = {facts.file_path: model for facts in found if (model := unchanged.get(id(facts))) is not None}
    new = [facts for facts in found if id(facts) not in unchanged]
    left = _without(left, assigned)
    for sign in _SIGNS:
        if not new or not left:
            break
        # The first of them last. Nearly every sign is one model's, for which a deque would take ten times as much.
        by_sign: defaultdict[object, list[Model]] = defaultdict(list)
        for model in reversed(left):
            if (told_by := sign.of_known(model)) is not None:
                by_sign[told_by].append(model)
        for facts in new:
            fitting = by_sign.get(told_by, []) if (told_by := sign.of_found(facts)) is not None else []
            places = reversed(range(len(fitting)))
            if (place := next((place for place in places if sign.fits(facts, fitting[place].facts)), None)) is not None:
                assigned[facts.file_path] = fitting.pop(place)
        new = [facts for facts in new if facts.file_path not in assigned]
        left = _without(left, assigned)
    return assigned, left


def _without(models: list[Model], assigned: Mapping[str, Model]) -> list[Model]:
    used = {model.model_id for model in assigned.values()}
    return [model for model in models if model.model_id not in used]


@dataclass(frozen=True, slots=True)
class _Heir:
    """A listed model of which nobody has made anything; where its file lies, a model that went may go on."""

    there: Model
    path: str
    content: Content
    comes: bool

    def takes(self, went: Model, devices: Collection[int] | None) -> bool:
        """Whether ``went`` goes on here."""
        if not self.content.may_equal(went.content):
            return False
        if not went.present:
            return self.comes and self.there.content is None
        return self.comes or (self.there.copy_number > went.copy_number and _disk_is_there(went, devices))


def _moved(
    left: list[Model],
    found: list[ModelFacts],
    assigned: Mapping[str, Model],
    running: Collection[str],
    devices: Collection[int] | None,
) -> dict[str, Model]:
    """Those of the models that are left which go on elsewhere, by the paths where they do."""
    by_size: defaultdict[int, list[_Heir]] = defaultdict(list)
    for heir in sorted(_heirs(found, assigned, running) if left else (), key=_lateness):
        by_size[heir.content.size].append(heir)
    moved: dict[str, Model] = {}
    fitting = [model for model in left if by_size and (content := model.content) and content.size in by_size]
    for model in sorted(fitting, key=_claim):
        heirs = by_size[model.content.size] if model.content else []
        taking = next((heir for heir in heirs if heir.takes(model, devices)), None)
        if taking is not None:
            heirs.remove(taking)
            moved[taking.path] = model
    return moved


def _heirs(found: list[ModelFacts], assigned: Mapping[str, Model], running: Collection[str]) -> Iterator[_Heir]:
    for facts in found:
        there = assigned.get(facts.file_path)
        if there is None or (there.facts is facts and not there.copy_number):
            continue
        content = content_of(facts)
        comes = content is not None and _comes(there, facts, content)
        if content is None or not (comes or there.copy_number):
            continue
        if there.choices == _NOTHING_CHOSEN and there.former_id is None and there.model_id not in running:
            yield _Heir(there, facts.file_path, content, comes)


def _lateness(heir: _Heir) -> tuple[bool, int]:
    return not heir.comes, -heir.there.copy_number


def _claim(went: Model) -> tuple[bool, bool, int]:
    return not went.present, went.choices == _NOTHING_CHOSEN, went.copy_number


def _comes(before: Model | None, facts: ModelFacts, content: Content) -> bool:
    """Whether a path has a content that was not there before, where ``before`` was."""
    if before is None or not content.may_equal(before.content):
        return True
    # The same file comes back with its disk.
    return not before.present and not _is_same_file(before.facts, facts)


def _is_same_file(one: ModelFacts, other: ModelFacts) -> bool:
    # Without the device: its number may be another one after each mount.
    return (
        one.identity is not None
        and other.identity is not None
        and (
            (one.identity.inode, one.identity.size, one.identity.mtime_ns)
            == (other.identity.inode, other.identity.size, other.identity.mtime_ns)
        )
    )


def _disk_is_there(model: Model, devices: Collection[int] | None) -> bool:
    return devices is None or model.facts.identity is None or model.facts.identity.device in devices


def _numbered(merged: Mapping[str, Model], came: Mapping[str, Content]) -> dict[str, Model]:
    """The models that came, with their numbers as copies of those that were there."""
    if not came or len(came) == len(merged):
        return {model_id: replace(merged[model_id], copy_number=0) for model_id in came if merged[model_id].copy_number}
    headers = {content.fingerprint for content in came.values()}
    highest: defaultdict[tuple[int, str], dict[str | None, int]] = defaultdict(dict)
    for model_id, model in merged.items():
        if model.last_whole is None and model.facts.fingerprint not in headers:
            continue
        if model_id not in came and (content := model.content) is not None:
            numbers = highest[content.size, content.fingerprint]
            numbers[content.sample] = max(model.copy_number, numbers.get(content.sample, 0))
    numbered = {}
    for model_id, content in came.items():
        model, numbers = merged[model_id], highest[content.size, content.fingerprint]
        fitting = [number for sample, number in numbers.items() if may_equal(sample, content.sample)]
        number = 1 + max(fitting) if fitting and model.choices == _NOTHING_CHOSEN else 0
        if number != model.copy_number:
            numbered[model_id] = replace(model, copy_number=number)
    return numbered


def _missing(before: Model) -> Model:
    """The model whose server runs, without its file."""
    if before.facts.status is ModelStatus.MISSING:
        return before
    # No word on whether its server runs: it may end before the next scan.
    problem = "its file is gone: its server cannot be started again until the file is back"
    return replace(before, facts=replace(before.facts, status=ModelStatus.MISSING, problem=problem))


def _given_up(before: Model, content: Content | None) -> Model:
    """The model whose file is another's now, as it is remembered: with its content, unless that went with the file."""
    if not before.present:
        return before
    if before.content is not None and not before.content.may_equal(content):
        return replace(before, present=False)
    facts = replace(before.facts, identity=None, fingerprint=None, sample=None, header=None)
    return replace(before, facts=facts, present=False, last_whole=None, copy_number=0)


def _tell_the_same(one: ModelFacts, other: ModelFacts) -> bool:
    # The scanner gives the same object where nothing changed, and that is nearly always nearly all.
    return one is other or (one == other and one.header == other.header and one.sample == other.sample)


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


def _always(_one: ModelFacts, _other: ModelFacts) -> bool:
    return True


def _samples_agree(one: ModelFacts, other: ModelFacts) -> bool:
    return may_equal(one.sample, other.sample)


def _may_be_the_same(one: ModelFacts, other: ModelFacts) -> bool:
    if one.fingerprint is None and other.fingerprint is None:
        return one.identity == other.identity
    return may_equal(one.fingerprint, other.fingerprint) and _samples_agree(one, other)


@dataclass(frozen=True, slots=True)
class _Sign:
    """By what a known model and one that was found are told to be one; ``None`` tells nothing."""

    of_known: Callable[[Model], object]
    of_found: Callable[[ModelFacts], object]
    fits: Callable[[ModelFacts, ModelFacts], bool] = _always


def _by(sign: Callable[[ModelFacts], object], fits: Callable[[ModelFacts, ModelFacts], bool] = _always) -> _Sign:
    return _Sign(lambda model: sign(model.facts), sign, fits)


def _exactly(content: Content | None) -> object:
    return content


def _header(content: Content | None) -> object:
    return (content.size, content.fingerprint) if content else None


def _header_without_sample(content: Content | None) -> object:
    return _header(content) if content and content.sample is None else None


def _by_content(known: Callable[[Content | None], object], found: Callable[[Content | None], object]) -> _Sign:
    return _Sign(lambda model: known(model.content), lambda facts: found(content_of(facts)))


_SIGNS: Final = (
    _by(_file_at_path),
    _by(_certain_file, _samples_agree),
    _by(_file_path),
    _by(_file, _may_be_the_same),
    _by_content(_exactly, _exactly),
    _by_content(_header_without_sample, _header),
    _by_content(_header, _header_without_sample),
)


def _within_bounds(models: dict[str, Model]) -> dict[str, Model]:
    """Forget the longest-gone models nobody chose anything for, past the bound."""
    forgettable = [
        model_id for model_id, model in models.items() if not model.present and model.choices == _NOTHING_CHOSEN
    ]
    # What went just now stands before what had gone before it.
    for model_id in forgettable[MAX_REMEMBERED:]:
        del models[model_id]
    return models
