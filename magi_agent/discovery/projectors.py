"""Which multimodal projector goes with which model.

A projector serves the models of its folder. Of several in one folder:

* One whose file name, or whose header's name, is the model's (quantization and the word ``mmproj`` apart) goes before
  one whose name says nothing (``mmproj-F16.gguf``). One that is named after another model does not count.
* Where a folder holds models of several names, a projector whose name says nothing goes with none of them.
* Then f16 goes before bf16, q8_0, f32 and the rest: every back end knows it, and nothing is lost. Then by path.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from magi_agent.discovery.files import FileRecord
from magi_agent.discovery.names import is_generic, stem_of
from magi_agent.discovery.quantization import quantization_in, without_quantization
from magi_agent.gguf.facts import HeaderFacts

_MARK = re.compile(r"(?i)(?<![a-z0-9])(?:mmproj(?:[-_]model)?|projector|vision[-_]?adapter)(?![a-z0-9])")
_PREFERENCE = ("f16", "bf16", "q8_0", "f32")


@dataclass(frozen=True, slots=True)
class Named:
    """What a model or a projector is called, in the forms that are compared."""

    by_file: str  # letters and digits alone; empty if the file's name says nothing
    by_header: str


def named(filename: str, header: HeaderFacts | None) -> Named:
    """Return the names of a model or a projector, without what differs between the two."""
    stem = _MARK.sub("", without_quantization(stem_of(filename)))
    by_file = "" if is_generic(stem.strip("-_. ")) else _plain(stem)
    return Named(by_file=by_file, by_header=_plain(_MARK.sub("", header.name)) if header and header.name else "")


def is_projector_name(filename: str) -> bool:
    """Tell whether a file of which nothing else is known calls itself a projector."""
    return _MARK.search(filename) is not None


class Projectors:
    """The projectors of one folder, to be found by the names of its models."""

    def __init__(self, records: Iterable[FileRecord], *, alone: bool) -> None:
        """``alone``: the folder's models have all the same name, or there is one only."""
        self.records = tuple(records)
        self.alone = alone
        self._ranked = sorted(self.records, key=_rank)
        self._by_file: dict[str, list[int]] = {}  # places in the ranking, as below
        self._by_header: dict[str, list[int]] = {}
        for place, record in enumerate(self._ranked):
            name = named(record.filename, record.header)
            self._by_file.setdefault(name.by_file, []).append(place)
            self._by_header.setdefault(name.by_header, []).append(place)
        self._nameless = self._by_file.pop("", [])
        self._by_header.pop("", None)
        self._names = sorted(self._by_file)
        self._lengths = sorted({len(name) for name in self._names})

    def offered(self, model: Named, *, only_namesakes: bool) -> list[FileRecord]:
        """Return those that go with a model of the folder, the one to choose first.

        With ``only_namesakes`` a name must say that they belong together, as for an embedding model: few of them see.
        """
        strengths: dict[int, int] = {}  # how sure the pair is, 0 being surest, by place
        for name in self._akin(model.by_file):
            strengths.update(dict.fromkeys(self._by_file[name], 0 if name == model.by_file else 1))
        for place in self._by_header.get(model.by_header, ()):
            strengths.setdefault(place, 1)
        if self.alone and not only_namesakes:
            for place in self._nameless:
                strengths.setdefault(place, 2)
            if not model.by_file:
                # A name of its own, and only one model that it can be for.
                for place in range(len(self._ranked)):
                    strengths.setdefault(place, 3)
        return [self._ranked[place] for place in sorted(strengths, key=lambda place: (strengths[place], place))]

    def _akin(self, name: str) -> Iterator[str]:
        """Yield the names with which this one begins, itself among them, and those that begin with it."""
        if not name:
            return
        for length in self._lengths:
            if length <= len(name) and name[:length] in self._by_file:
                yield name[:length]
        place = bisect_right(self._names, name)
        while place < len(self._names) and self._names[place].startswith(name):
            yield self._names[place]
            place += 1


def _rank(record: FileRecord) -> tuple[int, str]:
    return _preference(record), record.path


def _preference(record: FileRecord) -> int:
    header = record.header.quantization if record.header else None
    quantization = header or quantization_in(record.filename) or ""
    return _PREFERENCE.index(quantization) if quantization in _PREFERENCE else len(_PREFERENCE)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
