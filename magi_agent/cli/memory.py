"""What a model needs of memory, in lines of ``magictl show``."""

from collections.abc import Iterator, Mapping

from magi_agent.cli.answers import record, text
from magi_agent.cli.grid import Cell
from magi_agent.cli.phrasing import number, size, tokens
from magi_agent.cli.sheet import Fact

_BASES: Mapping[str, str] = {
    "estimated": "estimated",
    "reported": "as llama-server reported it",
    "measured": "as measured",
}

_SOURCES: Mapping[str, str] = {
    "derived": "derived from the need; memory_max sets another",
    "set": "its memory_max",
    "operator": "by the operator, at the unit",
}


def memory_facts(memory: Mapping[str, object]) -> Iterator[Fact]:
    """The lines, of an answer of ``GET /api/models/ID/memory``; nothing of an agent that does not know it."""
    yield from _need_facts(memory)
    if used := record(memory.get("used")):
        why = text(used.get("gpuUnavailable"))
        yield Fact("uses", Cell(_places(used)), f"(of GPUs nobody knows: {why})" if why else "")
    runs = record(memory.get("runningLimits"))
    limit = record((runs or record(memory.get("limits"))).get("max"))
    if limit:
        when = "" if runs else ", once it is started"
        yield Fact(
            "limit", Cell(size(limit.get("limitBytes"))), f"({_SOURCES.get(text(limit.get('source')), '')}{when})"
        )


def _need_facts(memory: Mapping[str, object]) -> Iterator[Fact]:
    need = record(memory.get("need"))
    if not need:
        if problem := text(memory.get("problem")):
            yield Fact("needs", Cell(problem, "dim"))
        return
    cut = ", cut to fit" if need.get("contextIsCut") is True else ""
    slots = number(need.get("slots"))
    shared = f" for {slots:.0f} slots" if slots is not None and slots > 1 else ""
    basis, on_gpus = text(need.get("basis")), text(need.get("gpuBasis"))
    found = _BASES.get(basis, basis)
    if number(need.get("gpuBytes")) and on_gpus and on_gpus != basis:
        found = f"{found}, on GPUs {_BASES.get(on_gpus, on_gpus)}"
    yield Fact(
        "needs",
        Cell(_places(need)),
        f"({found}, with a context of {tokens(need.get('contextTokens'))}{shared}{cut})",
    )


def _places(memory: Mapping[str, object]) -> str:
    on_gpus = f" and {size(memory.get('gpuBytes'))} on GPUs" if number(memory.get("gpuBytes")) else ""
    return f"{size(memory.get('hostBytes'))} of RAM{on_gpus}"
