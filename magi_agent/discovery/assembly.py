"""From the files of one folder to the models in it.

Parts named ``-00001-of-00005`` are one model; a projector goes with its model; adapters and the like are left out.
What has not changed since the last time is not made again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from magi_agent.discovery.access import shown
from magi_agent.discovery.description import describe
from magi_agent.discovery.facts import ModelFacts, TierThresholds
from magi_agent.discovery.files import FileRecord
from magi_agent.discovery.kinds import Kind, kind_of, unusable
from magi_agent.discovery.names import display_name, is_generic, name_facts, split_of
from magi_agent.discovery.projectors import Named, Projectors, is_projector_name, named
from magi_agent.discovery.split_sets import SplitSet, faults_of
from magi_agent.gguf.facts import HeaderFacts
from magi_agent.vocabulary import ModelStatus


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about a folder or a file that an operator should know, and that is no model of its own."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.message}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model found in a folder. The same files may be found in another folder too, by a link."""

    facts: ModelFacts
    via_link: bool


@dataclass(frozen=True, slots=True)
class _Group:
    """The files of one model, what it is called, and what was made of them."""

    records: tuple[FileRecord, ...]
    split: SplitSet | None
    title: Named
    candidate: Candidate  # without projector


class FolderAssembly:
    """The models of one folder, kept so that a change costs what changed."""

    def __init__(self, folder: str, hints: Sequence[str], thresholds: TierThresholds) -> None:
        """Stand for ``folder``; ``hints`` are the names of the folders from it upwards, nearest first."""
        self._folder = folder
        self._hints = tuple(hints)
        self._thresholds = thresholds
        self._groups: dict[object, _Group] = {}
        self._projectors = Projectors((), alone=False)
        self._paired: dict[object, tuple[_Group, Candidate]] = {}  # with these projectors
        self.candidates: tuple[Candidate, ...] = ()
        self.problems: tuple[Problem, ...] = ()

    @property
    def samples(self) -> tuple[str | None, ...]:
        """The samples of the candidates' data, which are no part of their being equal."""
        return tuple(candidate.facts.sample for candidate in self.candidates)

    def update(self, records: Iterable[FileRecord]) -> None:
        """Assemble the folder from what its files are now."""
        sorted_out = _sort_out(records)
        groups: dict[object, _Group] = {}
        for key, members in sorted_out.sets.items():
            known = self._groups.get(key)
            if known is None or len(known.records) != len(members) or any(map(_differ, known.records, members)):
                known = self._group(key, tuple(members))
            groups[key] = known
        self._groups = groups
        self.problems = tuple(sorted_out.problems)
        if sorted_out.projectors:
            self._pair(sorted_out.projectors)
            self.candidates = tuple(candidate for _, candidate in self._paired.values())
        else:
            self._projectors, self._paired = Projectors((), alone=False), {}
            self.candidates = tuple(group.candidate for group in groups.values())

    def _pair(self, projectors: list[FileRecord]) -> None:
        """Give each model its projectors, anew where it or any of them changed."""
        alone = len({group.title.by_file for group in self._groups.values()}) == 1
        before = self._paired
        if self._projectors.records != tuple(projectors) or self._projectors.alone != alone:
            self._projectors = Projectors(projectors, alone=alone)
            before = {}
        self._paired = {}
        for key, group in self._groups.items():
            known = before.get(key)
            if known is None or known[0] is not group:
                known = group, _with_projector(group, self._projectors)
            self._paired[key] = known

    def _group(self, key: object, records: tuple[FileRecord, ...]) -> _Group:
        split = SplitSet.of(key[0], key[1], records, self._folder) if isinstance(key, tuple) else None
        first = split.first if split else records[0]
        header = first.header if first else None
        filename = split.filename if split else records[0].filename
        files = tuple(split.parts.values()) if split else records  # in order, and no part by two names
        facts = self._facts(files, split, first, header, filename)
        candidate = Candidate(facts, any(record.link_target for record in records))
        return _Group(records, split, named(filename, header), candidate)

    def _facts(
        self,
        records: tuple[FileRecord, ...],
        split: SplitSet | None,
        first: FileRecord | None,
        header: HeaderFacts | None,
        filename: str,
    ) -> ModelFacts:
        status, problem = faults_of(split) if split else (records[0].status, records[0].problem)
        if status is ModelStatus.OK and header is not None:
            problem = (None if split else _fault_of_single(header)) or unusable(header)
            status = ModelStatus.INVALID if problem else status
        whole = all(record.header is not None for record in records) and (split is None or not split.missing)
        count = sum(record.header.parameter_count for record in records if record.header) if whole else None
        name = name_facts(filename, self._hints)
        told = describe(name, header, count, self._thresholds, filename)
        return ModelFacts(
            file_path=split.path if split else records[0].path,
            filename=filename,
            display_name=display_name(self._title(filename, header), _shown_quantization(told.quantization)),
            family=told.family,
            version=told.version,
            size_params=told.size_params,
            quantization=told.quantization,
            thinking_mode=told.thinking_mode,
            is_instruct=told.is_instruct,
            is_coder=told.is_coder,
            assigned_tier=told.tier,
            architecture=header.architecture if header else None,
            context_length=header.context_length if header else None,
            size_bytes=sum(record.identity.size for record in records if record.identity),
            parts=tuple(record.path for record in records),
            projector_path=None,
            has_vision=False,
            is_embedding=told.is_embedding,
            is_reranker=told.is_reranker,
            has_chat_template=bool(header and header.has_chat_template),
            status=status,
            problem=problem,
            parameter_count=count,
            active_params=told.active_params,
            identity=first.identity if first else None,
            fingerprint=header.fingerprint if header else None,
            sample=_sample_of(records) if whole else None,
            header=header,
        )

    def _title(self, filename: str, header: HeaderFacts | None) -> str:
        """Return what to make the display name from: the file's name, unless it says nothing."""
        if not is_generic(filename):
            return filename
        if header is not None and header.name and not is_generic(header.name):
            return header.name
        return next((hint for hint in self._hints if not is_generic(hint)), filename)


@dataclass(slots=True)
class _SortedOut:
    sets: dict[object, list[FileRecord]]  # by file name, or by (prefix, count) of a split set
    projectors: list[FileRecord]
    problems: list[Problem]


def _sort_out(records: Iterable[FileRecord]) -> _SortedOut:
    out = _SortedOut({}, [], [])
    for record in records:
        kind = kind_of(record.header) if record.header else None
        if kind is Kind.OTHER:
            continue
        if kind is Kind.PROJECTOR or (kind is None and is_projector_name(record.filename)):
            if record.status is ModelStatus.OK:
                out.projectors.append(record)
            else:
                out.problems.append(Problem(record.path, f"the projector cannot be used: {record.problem}"))
            continue
        if record.identity is None and record.link_target is None and record.problem:
            # Nobody's damaged file: somebody has to grant it, or to look at the disk.
            out.problems.append(Problem(record.path, record.problem))
        split = split_of(record.filename)
        if split is None or split.count == 1:
            out.sets[record.filename] = [record]
        else:
            out.sets.setdefault((split.prefix, split.count), []).append(record)
    return out


def _with_projector(group: _Group, projectors: Projectors) -> Candidate:
    facts = group.candidate.facts
    ranked = projectors.offered(group.title, only_namesakes=facts.is_embedding)
    if not ranked or ranked[0].header is None:
        return group.candidate
    header = ranked[0].header
    # Projectors made before audio existed say nothing of either, and are for images.
    sees = header.has_vision_encoder or not header.has_audio_encoder
    paths = tuple(record.path for record in ranked)
    hears = header.has_audio_encoder
    facts = replace(facts, projector_path=paths[0], projectors=paths, has_vision=sees, has_audio=hears)
    return replace(group.candidate, facts=facts)


def _sample_of(records: Sequence[FileRecord]) -> str | None:
    samples = [record.header.sample for record in records if record.header and record.header.sample]
    if len(samples) < len(records):
        return None
    return samples[0] if len(samples) == 1 else blake2b("".join(samples).encode(), digest_size=8).hexdigest()


def _fault_of_single(header: HeaderFacts) -> str | None:
    count = header.split_count or 1
    if count < 2:
        return None
    number = (header.split_no or 0) + 1
    return (
        f"it is part {number} of {count} of a split model, and its name does not say so; "
        f"llama-server finds the parts only as <name>-{number:05d}-of-{count:05d}.gguf"
    )


def _differ(one: FileRecord, other: FileRecord) -> bool:
    return one is not other


def _shown_quantization(quantization: str) -> str | None:
    return None if quantization == "unknown" else shown(quantization)
