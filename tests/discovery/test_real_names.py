"""Names and headers as publishers really make them, and what is found in them. The table is ``real_names.txt``."""

from __future__ import annotations

import pytest

from magi_agent.discovery.description import Description, describe
from magi_agent.discovery.facts import ModelFacts, TierThresholds
from magi_agent.discovery.families import UNKNOWN_FAMILY
from magi_agent.discovery.names import NameFacts, name_facts
from magi_agent.discovery.quantization import refined
from magi_agent.discovery.scanner import Scanner
from magi_agent.vocabulary import ModelStatus, ThinkingMode
from tests.discovery.model_files import write_file
from tests.discovery.real_names import Expected, Row, read_table

ROWS = read_table()
LLAMA = "llama"
FLAGS = {"i": "is_instruct", "c": "is_coder", "e": "is_embedding", "r": "is_reranker"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFacts]:
    """All rows' models, by row; each in a folder of its own, scanned at once."""
    top = tmp_path_factory.mktemp("names") / "m"
    folders = {}
    for number, row in enumerate(ROWS):
        path = write_file(top / f"{number:03d}" / row.file, row.content())
        folders[str(path)] = row.file
    result = Scanner([top]).scan()
    assert not result.problems
    return {folders[facts.file_path]: facts for facts in result.models}


def test_no_file_stands_in_the_table_twice():
    assert len({row.file for row in ROWS}) == len(ROWS) >= 200


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.file)
def test_a_real_name_tells_what_people_read_in_it(found: dict[str, ModelFacts], row: Row):
    facts = found[row.file]
    assert (facts.status, facts.problem) == (ModelStatus.OK, None)
    assert row.expected == Expected(
        family=facts.family,
        version=facts.version,
        size_params=facts.size_params,
        active_params=facts.active_params,
        quantization=facts.quantization,
        flags="".join(letter for letter, name in FLAGS.items() if getattr(facts, name)),
        thinking_mode=facts.thinking_mode,
        tier=facts.assigned_tier,
    )


@pytest.mark.parametrize("row", [row for row in ROWS if row.source != "-"], ids=lambda row: row.file)
def test_header_and_name_do_not_contradict_each_other(found: dict[str, ModelFacts], row: Row):
    *folders, filename = row.file.split("/")
    header = found[row.file].header
    by_name = describe(name_facts(filename, folders[::-1]), None, None, TierThresholds(), filename)
    by_header = describe(NameFacts(), header, row.parameters, TierThresholds(), "")
    assert contradictions(by_name, by_header) == row.differs


def contradictions(by_name: Description, by_header: Description) -> set[str]:
    """The facts on which both speak, and say different things."""
    found = {
        name
        for name in ("version", "active_params")
        if (one := getattr(by_name, name)) is not None and (other := getattr(by_header, name)) is not None
        if one != other
    }
    flags = ("is_coder", "is_embedding", "is_reranker")
    found |= {name for name in flags if getattr(by_name, name) != getattr(by_header, name)}
    # A header without a name, of the architecture of many, says nothing of the family.
    if by_header.family not in (by_name.family, LLAMA) and by_name.family != UNKNOWN_FAMILY:
        found.add("family")
    if by_name.size_params and abs(by_name.size_params - by_header.size_params) > 0.1 * by_header.size_params:
        found.add("size_params")
    quantizations = (by_header.quantization, by_name.quantization)
    # "Q4_K_XL" is more than a header can say, and "Q4" is less.
    if "unknown" not in quantizations and not str(refined(*quantizations)).startswith(by_name.quantization):
        found.add("quantization")
    if by_name.thinking_mode is ThinkingMode.ALWAYS and by_header.thinking_mode is not ThinkingMode.ALWAYS:
        found.add("thinking_mode")
    return found
