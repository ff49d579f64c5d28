"""What ``nvml_program`` printed, checked: it runs beside NVIDIA's libraries, where a hostile model may have been."""

import re
from typing import Annotated, Final, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from magi_agent.host.nvml_program import MOST_GPUS, MOST_PROCESSES

MAX_TEXT: Final = 1 << 20
"""Characters that are read."""
_ADDRESS: Final = re.compile(r"([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}):([0-9a-fA-F]{2})\.([0-7])")


def pci_address(text: str) -> str:
    """A PCI address as sysfs writes it, ``0000:01:00.0``. Raises ``ValueError``.

    NVML writes the domain with eight digits, CUDA in capital letters.
    """
    found = _ADDRESS.fullmatch(text)
    if not found:
        raise ValueError(f"{text[:40]!r} is no PCI address")
    domain, bus, device, function = found.groups()
    return f"{int(domain, 16):04x}:{bus}:{device}.{function}".lower()


def _shown(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


_Address = Annotated[str, AfterValidator(pci_address)]
_Word = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_shown)]
_Sentence = Annotated[str, Field(max_length=2000), AfterValidator(_shown)]
_Bytes = Annotated[int, Field(ge=0, lt=1 << 60)]
_Pid = Annotated[int, Field(gt=0, lt=1 << 31)]


class _Told(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, frozen=True, strict=True)


_Kind = TypeVar("_Kind", bound=_Told)


class NvidiaGpu(_Told):
    """One GPU; ``reasons`` says for each key (as on the wire) why it is ``None``."""

    pci_address: _Address
    uuid: _Word | None
    name: _Word | None
    memory_total_bytes: Annotated[int, Field(gt=0, lt=1 << 60)] | None
    memory_free_bytes: _Bytes | None
    temperature_celsius: Annotated[int, Field(ge=-100, le=300)] | None
    utilization_percent: Annotated[int, Field(ge=0, le=100)] | None
    processes: Annotated[dict[_Pid, _Bytes | None], Field(max_length=MOST_PROCESSES)] | None
    """The bytes that each has of it, by process id; ``None`` where the driver does not say."""
    reasons: dict[_Word, _Sentence] = Field(default_factory=dict, max_length=16)


class NvidiaFigures(_Told):
    """All of them, or why there are none, or not all."""

    gpus: Annotated[list[NvidiaGpu], Field(max_length=MOST_GPUS)]
    problem: _Sentence | None


class _CudaOrder(_Told):
    order: Annotated[list[_Address], Field(max_length=MOST_GPUS)]
    problem: _Sentence | None


def read_figures(text: str) -> NvidiaFigures:
    """The answer to ``--figures``. Raises ``ValueError``."""
    return _read(NvidiaFigures, text)


def read_order(text: str) -> tuple[str, ...]:
    """The PCI addresses of CUDA's numbers, in order, of the answer to ``--cuda-order``. Raises ``ValueError``."""
    told = _read(_CudaOrder, text)
    if told.problem:
        raise ValueError(told.problem)
    return tuple(told.order)


def _read(kind: type[_Kind], text: str) -> _Kind:
    # Libraries may have printed something before it.
    last = text[:MAX_TEXT].strip().rpartition("\n")[2]
    try:
        return kind.model_validate_json(last)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"its answer is not as it should be: {where}: {problem['msg']}") from None
