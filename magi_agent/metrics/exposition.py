"""Families of metrics as text, in either of the two forms."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from magi_agent.metrics.forms import Form
from magi_agent.metrics.prometheus_parts import ALLOWUTF8, Metric, floatToGoString, generate_latest

_OPEN_METRICS: Final[Callable[..., bytes]] = generate_latest
_NUMBER: Final[Callable[[float], str]] = floatToGoString
_WITH_SUFFIX: Final = {"counter": "_total", "info": "_info"}
"""What is behind the name of each sample of a family; in the older form, the family is named by its samples."""
_OLDER_KINDS: Final = {"info": "gauge", "unknown": "untyped"}


class _Families:
    """A collector of what was collected already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """The families."""
        return self._families


def rendered(families: Sequence[Metric], form: Form) -> bytes:
    """The families as text; takes some milliseconds for a thousand samples."""
    if form is Form.TEXT:
        return "".join(line for family in families for line in _older(family)).encode()
    # Names are valid already; escaped, llama-server's would lose their colon.
    return _OPEN_METRICS(_Families(families), escaping=ALLOWUTF8)


def _older(family: Metric) -> Iterator[str]:
    name = family.name + _WITH_SUFFIX.get(family.type, "")
    yield f"# HELP {name} {_escaped(family.documentation)}\n"
    yield f"# TYPE {name} {_OLDER_KINDS.get(family.type, family.type)}\n"
    for sample in family.samples:
        labels = ",".join(f'{label}="{_quoted(value)}"' for label, value in sorted(sample.labels.items()))
        yield f"{sample.name}{f'{{{labels}}}' if labels else ''} {_NUMBER(sample.value)}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', r"\"")
