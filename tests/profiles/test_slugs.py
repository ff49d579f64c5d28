"""Slugs: what a profile's file is called, and which names can have none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.errors import ValidationFailed
from magi_agent.profiles.profiles import slug_of


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("development", "development"),
        ("Fast Only", "fast-only"),
        ("fast_only", "fast-only"),
        ("  Night  Shift_2 ", "night-shift-2"),
        ("a__b  c", "a-b-c"),
        ("v1.5-beta", "v1.5-beta"),
        ("Größe", "größe"),
        ("日本", "日本"),
        ("Active Duty", "active-duty"),
        ("a-_-b", "a---b"),
        ("x" * 100, "x" * 100),
        ("7", "7"),
    ],
)
def test_a_slug_is_lower_case_with_dashes(name, slug):
    assert slug_of(name) == slug


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "___", ".", "..", "...", ".hidden", "a/b", "/etc/passwd", "../up", "a\\b", "active", "Active",
        " ACTIVE ", "a.", "-a", "-", "a\0b", "a\nb", "\tdevelopment", "development\n", "a\x1cb", "a\x7f", "a\x1b[31m",
        "a\u202eb", "a\u2028b", "a:b", "a*", "a?b", "a%2fb", "{a}", "a&b", "x" * 101, "日" * 67,
        "e\u0301", "\ud800", "🦙",
    ],
)  # fmt: skip
def test_a_name_that_can_be_no_file_of_its_own_is_refused(name):
    with pytest.raises(ValidationFailed) as refused:
        slug_of(name)
    assert refused.value.status == 422
    assert refused.value.message.startswith("name: ")
    assert refused.value.message.isprintable()
    assert refused.value.details == {
        "errors": [{"field": "name", "message": refused.value.message.removeprefix("name: ")}]
    }


@given(st.text())
def test_whatever_is_asked_for_a_slug_is_a_plain_file_name_and_stays_itself(name):
    try:
        slug = slug_of(name)
    except ValidationFailed:
        return
    assert slug
    assert len(f"{slug}.yaml".encode()) <= 255
    assert "/" not in slug
    assert slug[0] not in ".-"
    assert slug.isprintable()
    assert slug != "active"
    assert slug_of(slug) == slug
