"""Sizes in names and headers that no model has: they are left out, so that every answer is a finite number."""

import math

import pytest

from magi_agent.discovery.description import describe
from magi_agent.discovery.facts import TierThresholds
from magi_agent.discovery.names import NameFacts
from magi_agent.discovery.scanner import Scanner
from magi_agent.discovery.sizes import SizeLabel, size_in
from tests.discovery.model_files import model_bytes, write_file

MANY = "9" * 400


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("OLMoE-1B-7B", SizeLabel(total=7.0, active=1.0)),
        ("0.5b-1.25b", SizeLabel(total=1.25, active=0.5)),
        (f"1b-{MANY}b", SizeLabel(total=1.0)),
        (f"1b-1.{MANY}b", SizeLabel(total=1.0)),
        (f"{MANY}b-{MANY}1b", SizeLabel()),
        (f"{MANY}b", SizeLabel()),
        (f"{MANY}x7b-a{MANY}b", SizeLabel()),
    ],
)
def test_a_number_has_as_many_digits_as_a_size_can_have(text, size):
    assert size_in(text) == size


def test_a_size_label_without_end_says_nothing(tmp_path):
    content = model_bytes(
        "llama", texts={"general.size_label": f"1b-{MANY}b", "general.name": f"M 1b-{MANY}b"}, elements=10_000_000
    )
    write_file(tmp_path / "m-7B.gguf", content)
    (facts,) = Scanner([tmp_path]).scan().models
    assert (facts.size_params, facts.active_params) == (1.0, None)


@pytest.mark.parametrize("size", [math.inf, math.nan])
def test_a_description_has_finite_sizes_whatever_a_name_says(size):
    name = NameFacts(size_params=size, active_params=size)
    told = describe(name, None, 7_000_000_000, TierThresholds(), "m.gguf")
    assert (told.size_params, told.active_params) == (7.0, None)
