"""Ids: readable, unique, fit for a URL and a unit's name, and there is always one more."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.registry.ids import id_for, slug
from magi_agent.servers.launch import model_id_of, unit_name
from magi_agent.systemd.transient import TransientService
from magi_agent.vocabulary import MAX_ID_LENGTH, RESERVED_IDS

VALID = re.compile(r"[a-z0-9._-]{1,180}")
TEXTS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=260)
# What a file system takes: any bytes but these two. And what is near to the words that ids must not be.
BYTES = st.binary(min_size=1, max_size=255).map(lambda name: os.fsdecode(name.translate(None, b"/\0") or b"x"))
WORDS = st.lists(st.sampled_from([*RESERVED_IDS, "port", "range", "Rescan", "-", ".", "_", "x", "日"]), min_size=1).map(
    "".join
)
ENDS = st.sampled_from([".gguf", ".GGUF", ".Gguf", "-00001-of-00003.gguf", "-00001-OF-00003.GGUF"])
NAMES = TEXTS | BYTES | WORDS
PATHS = st.builds(
    lambda folders, name, end: "/" + "/".join([*folders, name + end]), st.lists(NAMES, max_size=3), NAMES, ENDS
)


def assert_fit(model_id: str) -> None:
    assert VALID.fullmatch(model_id), model_id
    assert model_id[0].isalnum()
    assert model_id[-1].isalnum()
    assert len(model_id) <= MAX_ID_LENGTH
    assert model_id not in RESERVED_IDS
    unit = unit_name(model_id)
    assert len(unit) <= 255
    assert model_id_of(unit) == model_id
    TransientService(name=unit, description="", argv=("/bin/true",))  # it refuses the names that systemd does


@pytest.mark.parametrize(
    ("path", "model_id"),
    [
        ("/m/Qwen3-8B-Q4_K_M.gguf", "qwen3-8b-q4_k_m"),
        ("/m/SmolLM2-135M-Instruct.Q4_1.GGUF", "smollm2-135m-instruct.q4_1"),
        ("/m/q-00001-of-00004.gguf", "q"),
        ("/m/Q-00001-OF-00004.GGUF", "q"),
        ("/m/q-00001-of-00004-Q4_K_M.gguf", "q-00001-of-00004-q4_k_m"),
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


def test_a_name_that_is_too_long_is_cut_and_its_suffixes_are_not():
    path = f"/{'f' * 250}/{'x' * 178}-...yyy.gguf"
    ids = [id_for(path, ())]
    for _ in range(3):
        ids.append(id_for(path, set(ids)))
    assert ids[0] == "x" * 178  # nothing of the separators that the cut leaves at the end
    assert re.fullmatch(r"x{89}-f{90}", ids[1])
    assert re.fullmatch(r"x{173}-[0-9a-f]{6}", ids[2])
    assert ids[3] == "x" * 178 + "-2"
    for model_id in ids:
        assert_fit(model_id)


@given(PATHS)
def test_an_id_is_the_names_slug_wherever_it_has_one(path):
    name = path.rpartition("/")[2]
    stem = re.sub(r"(?i)(-\d{5}-of-\d{5})?\.gguf$", "", name)
    letters = re.sub(r"[^a-z0-9]", "", stem.lower())
    model_id = id_for(path, ())
    if not letters:
        assert re.fullmatch(r"model-[0-9a-f]{8}", model_id)
    elif slug(stem) not in RESERVED_IDS:
        assert letters.startswith(re.sub(r"[._-]", "", model_id))


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
