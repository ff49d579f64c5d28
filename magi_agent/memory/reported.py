"""What llama-server itself says when it loads a model: the sizes of its buffers.

The lines end in ``<buffer> <kind> buffer size = <n> MiB``, kind being model, output, KV, RS or compute. Builds up to
the middle of 2026 print them by themselves; later ones from verbosity 4 on (``--verbosity=4``), which the agent does
not ask for: with release b10434 that is 200 lines at load instead of 12, and 31 lines a request instead of 8. They are
read where they are there. The lines are a program's output: what is not understood in them is passed over.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from magi_agent.memory.need import NOTHING, Basis, MemoryNeed, Split

_BUFFER: Final = re.compile(r"(\S{1,100})\s+(model|output|KV|RS|compute) buffer size\s+=\s+(\d{1,9}\.\d{1,3}) MiB")
_BEGINS: Final = "load_model: loading model '"
"""What a server says before it loads its model and all that goes with it, again after it has slept."""
_KINDS: Final = {
    "model": "weights",
    "output": "output",
    "KV": "kv_cache",
    "RS": "recurrent_state",
    "compute": "compute",
}
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Reported:
    """Buffers as they were reported, those of a draft model with the model's own."""

    weights: Split = NOTHING
    kv_cache: Split = NOTHING
    recurrent_state: Split = NOTHING
    compute: Split = NOTHING
    output: Split = NOTHING
    mapped: int = 0
    """Of the weights on the host, bytes mapped from the file."""


def read_report(lines: Iterable[str]) -> Reported | None:
    """The buffers of the last load that the lines tell of; ``None`` where they do not tell."""
    splits: dict[str, Split] = {}
    mapped = 0
    for line in lines:
        if _BEGINS in line:
            splits, mapped = {}, 0
        if (found := _BUFFER.search(line)) is None:
            continue
        size = round(float(found[3]) * _MIB)
        name = _KINDS[found[2]]
        is_host = _is_on_host(found[1])
        splits[name] = splits.get(name, NOTHING) + (Split(host=size) if is_host else Split(gpu=size))
        if name == "weights" and found[1].endswith("_Mapped"):
            mapped += size
    if "weights" not in splits or "compute" not in splits:
        return None
    return Reported(**splits, mapped=mapped)


def refined(need: MemoryNeed, report: Reported) -> MemoryNeed:
    """An estimate, with what was reported in place of what was estimated."""
    return replace(
        need,
        weights=report.weights,
        kv_cache=report.kv_cache,
        recurrent_state=report.recurrent_state,
        compute=report.compute,
        output=report.output,
        draft=NOTHING,
        mapped=report.mapped,
        basis=Basis.REPORTED,
        gpu_basis=Basis.REPORTED,
    )


def _is_on_host(buffer: str) -> bool:
    """Whether a buffer is in the host's memory, by its name: CPU, CPU_Mapped, CPU_REPACK, AMX, CUDA_Host."""
    return buffer.startswith(("CPU", "AMX", "BLAS")) or buffer.endswith("_Host")
