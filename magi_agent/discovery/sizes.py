"""Sizes in billions of parameters, as names and size labels write them."""

import re
from dataclasses import dataclass

_SIZE = re.compile(
    r"""
    (?<![a-z0-9])(?<!\d\.)
    (?:(?P<experts>\d{1,3})x|(?P<kind>[aer])(?=\d))?
    (?P<number>\d{1,4}(?:\.\d{1,3})?|(?<=-)\d{1,2}_\d)
    (?P<unit>[bmt])
    (?![a-z0-9])
    (?P<of_experts>-\d{1,3}e(?![a-z0-9]))?
    """,
    re.VERBOSE,
)
_ACTIVE_THEN_TOTAL = re.compile(r"(?<![a-z0-9.])(\d{1,4}(?:\.\d{1,3})?)b-(\d{1,4}(?:\.\d{1,3})?)b(?![a-z0-9])")
_BILLIONS = {"b": 1.0, "m": 0.001, "t": 1000.0}


@dataclass(frozen=True, slots=True)
class SizeLabel:
    """What a name or a size label says about a model's size; billions of parameters."""

    total: float | None = None
    active: float | None = None  # what one token uses, of a mixture of experts
    is_product: bool = False  # "8x7B": experts times their size, which counts the shared weights several times


def size_in(text: str) -> SizeLabel:
    """Read ``7B``, ``0.6B``, ``135M``, ``30B-A3B``, ``8x7B``, ``E4B``, ``17B-16E`` out of a name.

    Of several sizes the first counts: ``7B-Instruct-1M`` is 7 (the other is a context length).
    """
    text = text.lower()
    pair = _ACTIVE_THEN_TOTAL.search(text)
    if pair and float(pair.group(1)) < float(pair.group(2)):
        return SizeLabel(total=float(pair.group(2)), active=float(pair.group(1)))  # OLMoE-1B-7B
    total: float | None = None
    effective: float | None = None
    trillions: float | None = None
    active: float | None = None
    is_product = False
    for match in _SIZE.finditer(text):
        value = round(float(match["number"].replace("_", ".")) * _BILLIONS[match["unit"]], 6)
        if match["kind"] == "a" or match["of_experts"]:
            active = value if active is None else active
        elif match["kind"] == "e":
            effective = value if effective is None else effective
        elif match["unit"] == "t":
            trillions = value if trillions is None else trillions
        elif total is None and value > 0:
            experts = int(match["experts"] or 0)
            is_product = experts > 1
            total = round(value * experts, 6) if is_product else value
    if total is None:
        total = effective if effective is not None else trillions
    return SizeLabel(total=total, active=active, is_product=is_product)
