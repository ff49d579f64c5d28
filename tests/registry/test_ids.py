"""Ids: readable, unique, fit for a URL and a unit's name, and there is always one more."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.registry.ids import MAX_ID_LENGTH, RESERVED_IDS, id_for, slug

VALID = re.compile(r"[a-z0-9][a-z0-9._-]*")
PATHS = st.lists(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=260),
    min_size=1,
    max_size=4,
).map(lambda parts: "/" + "/".join(parts) + ".gguf")


def assert_fit(model_id: str) -> None:
    assert VALID.fullmatch(model_id), model_id
    assert model_id[-1].isalnum()
    assert len(model_id) <= MAX_ID_LENGTH
    assert len(f"magi-llama-{model_id}.service") <= 255
    assert model_id not in RESERVED_IDS


@pytest.mark.parametrize(
    ("path", "model_id"),
    [
        ("/m/Qwen3-8B-Q4_K_M.gguf", "qwen3-8b-q4_k_m"),
        ("/m/SmolLM2-135M-Instruct.Q4_1.GGUF", "smollm2-135m-instruct.q4_1"),
        ("/m/q-00001-of-00004.gguf", "q"),
        ("/m/with spaces & $;.gguf", "with-spaces"),
        ("/m/-rf.gguf", "rf"),
        ("/m/caf\udce9.gguf", "caf"),
        ("/m/registry.gguf", "registry-m"),
        ("/m/servers.gguf", "servers-m"),
        ("/m/profiles.gguf", "profiles-m"),
        ("/m/tiers.gguf", "tiers-m"),
        ("/m/port-range.gguf", "port-range-m"),
        ("/m/rescan.gguf", "rescan-m"),
        ("/m/Rescan.gguf", "rescan-m"),
        ("/m/x.part.tar", "x.part.tar"),
    ],
)
def test_a_readable_id_is_made_of_the_files_name(path, model_id):
    assert id_for(path, ()) == model_id


@pytest.mark.parametrize("path", ["/m/日本語.gguf", "/m/....gguf", "/m/___.gguf", "/m/\udcff.gguf"])
def test_a_name_with_nothing_in_it_gets_an_id_of_its_own(path):
    model_id = id_for(path, ())
    assert re.fullmatch(r"model-[0-9a-f]{8}", model_id)
    assert id_for(path + "x", ()) != model_id


def test_duplicates_get_their_folders_name_then_a_hash_then_a_number():
    taken: set[str] = set()
    given_ids = []
    for _ in range(6):
        given_ids.append(id_for("/models/New Models/x-7b.gguf", taken))
        taken.add(given_ids[-1])
    assert given_ids[:2] == ["x-7b", "x-7b-new-models"]
    assert re.fullmatch(r"x-7b-[0-9a-f]{6}", given_ids[2])
    assert given_ids[3:] == ["x-7b-2", "x-7b-3", "x-7b-4"]
    assert id_for("/x.gguf", {"x"}).startswith("x-")


@given(st.lists(PATHS, min_size=1, max_size=30))
def test_any_paths_get_fit_and_unique_ids(paths):
    taken: set[str] = set()
    for path in paths:
        model_id = id_for(path, taken)
        assert_fit(model_id)
        assert model_id not in taken
        taken.add(model_id)


@given(PATHS, st.integers(1, 12))
def test_one_path_may_hold_any_number_of_models_over_time(path, count):
    taken: set[str] = set()
    for _ in range(count):
        model_id = id_for(path, taken)
        assert_fit(model_id)
        taken.add(model_id)
    assert len(taken) == count


@given(st.text())
def test_a_slug_stays_as_it_is(text):
    assert slug(slug(text)) == slug(text)
