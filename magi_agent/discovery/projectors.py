"""Which multimodal projector goes with which model.

A projector serves the models of its folder. Of several in one folder:

* One whose file name, or whose header's name, is the model's (quantization and the word ``mmproj`` apart) goes before
  one whose name says nothing (``mmproj-F16.gguf``). One that is named after another model does not count.
* Where a folder holds models of several names, a projector whose name says nothing goes with none of them.
* Then f16 goes before bf16, q8_0, f32 and the rest: every back end knows it, and nothing is lost. Then by path.
"""

import operator
import re
from collections.abc import Sequence
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


def offered(
    model: Named, projectors: Sequence[tuple[FileRecord, Named]], models: Sequence[Named], *, only_namesakes: bool
) -> list[FileRecord]:
    """Return the projectors that go with a model, the one to choose first.

    ``models`` are all of the folder, this one included. With ``only_namesakes`` a name must say that they belong
    together, as for an embedding model: few of them see.
    """
    alone = len({other.by_file for other in models}) == 1 and not only_namesakes
    ranked = [
        (strength, _preference(record), record.path, record)
        for record, name in projectors
        if (strength := _strength(model, name, alone)) is not None
    ]
    return [record for *_, record in sorted(ranked, key=operator.itemgetter(0, 1, 2))]


def _strength(model: Named, projector: Named, alone: bool) -> int | None:
    """Say how sure the pair is, 0 being surest; ``None`` for no pair."""
    if model.by_file and projector.by_file:
        if model.by_file == projector.by_file:
            return 0
        if model.by_file.startswith(projector.by_file) or projector.by_file.startswith(model.by_file):
            return 1
    if model.by_header and model.by_header == projector.by_header:
        return 1
    if not projector.by_file and alone:
        return 2
    # A name of its own, and only one model that it can be for.
    return 3 if alone and not model.by_file else None


def _preference(record: FileRecord) -> int:
    header = record.header.quantization if record.header else None
    quantization = header or quantization_in(record.filename) or ""
    return _PREFERENCE.index(quantization) if quantization in _PREFERENCE else len(_PREFERENCE)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
