"""Models in several files, as llama.cpp's ``gguf-split`` makes them: ``<prefix>-00001-of-00005.gguf`` and so on."""

from dataclasses import dataclass
from itertools import islice

from magi_agent.discovery.access import shown
from magi_agent.discovery.files import FileRecord
from magi_agent.discovery.names import split_of
from magi_agent.vocabulary import ModelStatus

_MISSING_NAMED = 3


@dataclass(frozen=True, slots=True)
class SplitSet:
    """The parts of one model, as far as they are there."""

    folder: str
    prefix: str
    count: int  # parts, by the names
    parts: dict[int, FileRecord]  # by number, from 1

    @classmethod
    def of(cls, prefix: str, count: int, records: tuple[FileRecord, ...], folder: str) -> "SplitSet":
        """Order the parts. Of two names for one part (``.gguf`` and ``.GGUF``) the first counts."""
        parts: dict[int, FileRecord] = {}
        for record in sorted(records, key=_filename):
            split = split_of(record.filename)
            if split is not None:
                parts.setdefault(split.number, record)
        return cls(folder, prefix, count, dict(sorted(parts.items())))

    @property
    def first(self) -> FileRecord | None:
        """The part that llama-server is given, and that holds the metadata."""
        return self.parts.get(1)

    @property
    def filename(self) -> str:
        """The first part's file name, even while it is missing."""
        return self.first.filename if self.first else self._name(1)

    @property
    def path(self) -> str:
        """The first part's path, even while it is missing."""
        return f"{self.folder.rstrip('/')}/{self.filename}"

    @property
    def missing(self) -> int:
        """How many parts are not there."""
        return self.count - len(self.parts)

    def _name(self, number: int) -> str:
        return f"{self.prefix}-{number:05d}-of-{self.count:05d}.gguf"

    def missing_sentence(self) -> str:
        """Name the missing parts, the first few of them."""
        # A name may claim far more parts than there are: no list of them all is made.
        numbers = (number for number in range(1, self.count + 1) if number not in self.parts)
        names = ", ".join(shown(self._name(number)) for number in islice(numbers, _MISSING_NAMED))
        more = f" and {self.missing - _MISSING_NAMED} more" if self.missing > _MISSING_NAMED else ""
        return f"{self.missing} of {self.count} parts missing: {names}{more}"


def faults_of(split: SplitSet) -> tuple[ModelStatus, str | None]:
    """Say whether a set can be used: all parts there, each whole, and all telling the same story."""
    for number, record in split.parts.items():
        if record.status is ModelStatus.INVALID:
            return ModelStatus.INVALID, f"part {number} of {split.count}: {record.problem}"
    disagreement = _disagreement(split)
    if disagreement:
        return ModelStatus.INVALID, disagreement
    if split.missing:
        return ModelStatus.INCOMPLETE, split.missing_sentence()
    for number, record in split.parts.items():
        if record.status is not ModelStatus.OK:
            return record.status, f"part {number} of {split.count}: {record.problem}"
    headers = [record.header for record in split.parts.values() if record.header]
    there = sum(header.tensor_count for header in headers)
    expected = headers[0].split_tensors_count
    if expected is not None and there != expected:
        return ModelStatus.INVALID, f"the parts hold {there} tensors, and their headers speak of {expected}"
    return ModelStatus.OK, None


def _disagreement(split: SplitSet) -> str | None:
    tensors: int | None = None
    for number, record in split.parts.items():
        header = record.header
        if header is None:
            continue
        if header.split_count != split.count:
            says = "says nothing of a split model" if header.split_count is None else f"speaks of {header.split_count}"
            return f"{shown(record.filename)} is named as one of {split.count} parts, and its header {says}"
        if header.split_no is not None and header.split_no != number - 1:
            return f"{shown(record.filename)} is part {header.split_no + 1} by its header"
        if tensors is not None and header.split_tensors_count not in (None, tensors):
            return f"{shown(record.filename)} is a part of another model than the parts before it"
        tensors = header.split_tensors_count if tensors is None else tensors
    return None


def _filename(record: FileRecord) -> str:
    return record.filename
