"""The registry file: what is written is read again, and what others wrote is read as far as it goes."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magi_agent.discovery.facts import FileIdentity, ModelFacts
from magi_agent.registry.content import Content
from magi_agent.registry.model import Choices, Model
from magi_agent.registry.stored import (
    DamagedRegistry,
    NewerRegistry,
    RegistryContent,
    RegistryWriter,
    read_registry,
)
from magi_agent.runtime_settings.settings import LoraAdapter, RuntimeSettings
from magi_agent.vocabulary import ModelStatus, ThinkingMode, Tier
from tests.registry.model_facts import facts_at
from tests.runtime_settings.strategies import RUNTIME_SETTINGS

# Any name a file can have: what is not UTF-8 in it is surrogate-escaped.
NAMES = (
    st.binary(min_size=1).map(lambda data: data.decode(errors="surrogateescape")).filter(lambda name: "\0" not in name)
)
PATHS = NAMES.map(lambda name: f"/models/{name}.gguf")
NUMBERS = st.integers(0, 2**63 - 1)
CHOICES = st.builds(
    Choices,
    tier_override=st.none() | st.sampled_from(Tier),
    thinking_override=st.none() | st.booleans(),
    enabled=st.booleans(),
    port=st.none() | st.integers(1, 65_535),
    runtime_settings=RUNTIME_SETTINGS,
)
FACTS = st.builds(
    ModelFacts,
    file_path=PATHS,
    filename=NAMES,
    display_name=st.text(),
    family=st.text(),
    version=st.none() | st.text(),
    size_params=st.floats(0, 1e6),
    quantization=st.text(),
    thinking_mode=st.sampled_from(ThinkingMode),
    is_instruct=st.booleans(),
    is_coder=st.booleans(),
    assigned_tier=st.sampled_from(Tier),
    architecture=st.none() | st.text(),
    context_length=st.none() | NUMBERS,
    size_bytes=NUMBERS,
    parts=st.lists(PATHS, max_size=3).map(tuple),
    projector_path=st.none() | PATHS,
    projectors=st.lists(PATHS, max_size=3).map(tuple),
    has_vision=st.booleans(),
    has_audio=st.booleans(),
    is_embedding=st.booleans(),
    is_reranker=st.booleans(),
    has_chat_template=st.booleans(),
    status=st.sampled_from(ModelStatus),
    problem=st.none() | st.text(),
    parameter_count=st.none() | NUMBERS,
    active_params=st.none() | st.floats(0, 1e6),
    identity=st.none()
    | st.builds(FileIdentity, NUMBERS, st.integers(0, 2**64 - 1), NUMBERS, st.integers(-(2**63), 2**63)),
    fingerprint=st.none() | st.text(),
    sample=st.none() | st.text(),
    header=st.none(),
)
CONTENT = st.builds(Content, NUMBERS, st.text(), st.none() | st.text())
CONTENTS = st.builds(
    RegistryContent,
    st.dictionaries(
        st.text(st.sampled_from("abc-_.0"), min_size=1),
        st.tuples(
            FACTS, CHOICES, st.booleans(), st.none() | st.text(min_size=1), st.none() | CONTENT, st.integers(0, 9)
        ),
        max_size=4,
    ).map(lambda models: {model_id: Model(model_id, *parts) for model_id, parts in models.items()}),
    st.none() | st.datetimes(timezones=st.just(UTC)),
    st.none() | st.text(min_size=1),
    st.none() | st.text(min_size=1),
)

FIRST = {
    "models": {
        "qwen_2.5_7b_q4km": {
            "file_path": "/models/Qwen2.5-7B-Instruct-Q4_K_M.gguf",
            "filename": "Qwen2.5-7B-Instruct-Q4_K_M.gguf",
            "family": "qwen",
            "version": "2.5",
            "size_params": 7.0,
            "quantization": "q4_k_m",
            "is_thinking_model": False,
            "thinking_override": True,
            "is_instruct": True,
            "is_coder": False,
            "assigned_tier": "balanced",
            "tier_override": "powerful",
            "port": 8083,
            "enabled": True,
            "n_gpu_layers": 99,
            "ctx_size": 32768,
            "n_threads": 8,
            "batch_size": 512,
            "model_id": "qwen_2.5_7b_q4km",
        },
        "plain": {"file_path": "/models/plain.gguf"},
    },
    "scan_path": "/models",
    "last_scan": "2024-05-01T12:00:00.123456",
    "port_range": [8080, 8099],
    "tier_thresholds": {"powerful_min": 14.0, "fast_max": 7.0},
}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CONTENTS)
def test_what_is_written_is_read_again(content):
    data = RegistryWriter().written(content)
    reading = read_registry(data)
    assert (reading.content, reading.version, reading.problems) == (content, 2, ())
    # No part of two facts' being equal.
    for model_id, model in content.models.items():
        assert reading.content.models[model_id].facts.sample == model.facts.sample


def test_what_a_reader_assumes_is_not_written():
    content = RegistryContent({"a": Model("a", replace(facts_at("/m/a.gguf"), version="3", is_coder=False))})
    data = RegistryWriter().written(content)
    stored = json.loads(data)["models"]["a"]
    assert {"file_path", "version", "size_params", "is_instruct", "identity"} < set(stored["facts"])
    assert not {"is_coder", "problem", "status", "projectors", "thinking_mode"} & set(stored["facts"])
    assert not any(stored["choices"].values())
    assert read_registry(data).content == content
    assert json.loads(data)["version"] == 2


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(CONTENTS, max_size=4))
def test_what_a_writer_remembers_of_earlier_content_changes_nothing(contents):
    writer = RegistryWriter()
    for content in contents:
        assert writer.written(content) == RegistryWriter().written(content)


def test_infinity_is_no_size_in_a_file():
    content = RegistryContent({"a": Model("a", facts_at("/m/a.gguf", size_params=float("inf")))})
    data = RegistryWriter().written(content)
    assert b"Infinity" not in data
    assert read_registry(data).content.models["a"].facts.size_params == 0.0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"models": []}',
        b'{"models": null}',
        b'{"models": {}, "version": "two"}',
        b'{"models": {}, "last_scan": "yesterday"}',
        b"\xff\xfe",
        b"\0" * 1000,
        b"[" * 100_000,
        b'{"models": {}, "x": ' + b"9" * 5000 + b"}",
        b"<html>",
    ],
)
def test_what_is_no_registry_is_damaged(data):
    with pytest.raises(DamagedRegistry) as damaged:
        read_registry(data)
    assert str(damaged.value).isprintable()


@given(st.data())
def test_a_registry_cut_or_changed_anywhere_is_read_or_damaged(data):
    whole = RegistryWriter().written(RegistryContent({"a": Model("a", facts_at("/m/a.gguf"), Choices(port=8080))}))
    at = data.draw(st.integers(0, len(whole) - 1))
    broken = data.draw(st.sampled_from([whole[:at], whole[:at] + b"x" + whole[at + 1 :], whole[:at] + whole[at + 1 :]]))
    try:
        reading = read_registry(broken)
    except (DamagedRegistry, NewerRegistry):
        return
    assert "a" in reading.content.models or reading.problems or b'"a"' not in broken


@pytest.mark.parametrize("version", [3, 4, 1000])
def test_a_newer_registry_is_refused(version):
    with pytest.raises(NewerRegistry, match=str(version)):
        read_registry(json.dumps({"version": version, "models": {}}).encode())


def test_one_model_that_cannot_be_read_harms_no_other():
    content = RegistryContent({name: Model(name, facts_at(f"/m/{name}.gguf"), Choices(port=8080)) for name in "abc"})
    document = json.loads(RegistryWriter().written(content))
    document["models"]["b"]["choices"]["port"] = "many"
    document["models"]["c"]["facts"]["from_the_future"] = {"x": 1}
    reading = read_registry(json.dumps(document).encode())
    assert set(reading.content.models) == {"a", "c"}
    assert reading.content.models["c"] == content.models["c"]
    (problem,) = reading.problems
    assert problem.startswith("model 'b': choices.port: ")


def test_a_runtime_setting_that_is_none_costs_no_other_choice():
    said = RuntimeSettings(ctx_size=4096, memory_high=5, memory_max=6, lora=(LoraAdapter("/m/l.gguf"),))
    chosen = Choices(Tier.FAST, True, True, 8080, said)
    content = RegistryContent({"a": Model("a", facts_at("/m/a.gguf"), chosen)})
    document = json.loads(RegistryWriter().written(content))
    stored = document["models"]["a"]["choices"]["runtime_settings"]
    stored.update(n_threads=10**9, from_the_future=1, memory_high=7, also_from_there=None)
    stored["lora"][0]["rank"] = 8
    reading = read_registry(json.dumps(document).encode())
    settings = RuntimeSettings(ctx_size=4096, memory_max=6)
    assert reading.content.models["a"].choices == replace(chosen, runtime_settings=settings)
    said_of = [problem.partition(" is left out")[0].rpartition(" ")[2] for problem in reading.problems]
    assert sorted(said_of) == ["from_the_future", "lora.0.rank", "memory_high", "n_threads"]
    assert all(problem.startswith("model 'a': its runtime setting ") for problem in reading.problems)


def test_settings_of_an_earlier_magi_that_no_server_takes_are_left_out():
    entry = {"file_path": "/m/x.gguf", "enabled": True, "n_threads": 10**9, "ctx_size": 2048}
    (model,) = read_registry(json.dumps({"models": {"x": entry}}).encode()).content.models.values()
    assert model.choices == Choices(enabled=True, runtime_settings=RuntimeSettings(ctx_size=2048))


def test_the_choices_of_an_earlier_magi_wait_under_their_path():
    reading = read_registry(json.dumps(FIRST).encode())
    assert (reading.version, reading.problems) == (1, ())
    qwen, plain = reading.content.models.values()
    assert (qwen.model_id, qwen.former_id) == ("qwen2.5-7b-instruct-q4_k_m", "qwen_2.5_7b_q4km")
    assert qwen.choices == Choices(
        tier_override=Tier.POWERFUL,
        thinking_override=True,
        enabled=True,
        port=8083,
        runtime_settings=RuntimeSettings(n_gpu_layers=99, ctx_size=32768, n_threads=8, batch_size=512),
    )
    assert (qwen.facts.file_path, qwen.facts.status) == (
        "/models/Qwen2.5-7B-Instruct-Q4_K_M.gguf",
        ModelStatus.MISSING,
    )
    assert not qwen.present
    assert (plain.model_id, plain.choices) == ("plain", Choices())
    assert reading.content.last_scan == datetime(2024, 5, 1, 12, 0, 0, 123456)  # noqa: DTZ001 - as that MAGI wrote it


@pytest.mark.parametrize(
    ("entry", "is_read"),
    [
        ({"file_path": "/m/x.gguf", "tier_override": None, "port": None, "n_gpu_layers": None}, True),
        ({"file_path": "/m/x.gguf", "version": 3, "family": None, "filename": 5}, True),
        ({"file_path": "/m/x.gguf", "unknown": [1, 2]}, True),
        ({"file_path": "/m/x.gguf", "port": 99999}, False),
        ({"file_path": "/m/x.gguf", "tier_override": "huge"}, False),
        ({"port": 8080}, False),
        ("text", False),
        (None, False),
    ],
)
@pytest.mark.parametrize("head", [{}, {"version": 1}, {"version": 0}])
def test_entries_of_an_earlier_magi_are_read_one_by_one(entry, is_read, head):
    document = {**head, "models": {"odd": entry, "fine": {"file_path": "/m/fine.gguf", "enabled": True}}}
    reading = read_registry(json.dumps(document).encode())
    assert reading.content.models["fine"].choices.enabled
    assert (len(reading.content.models) == 2, len(reading.problems)) == (is_read, 0 if is_read else 1)


def test_ids_of_an_earlier_magi_that_lead_to_one_name_become_two():
    document = {"models": {"one": {"file_path": "/a/x.gguf"}, "two": {"file_path": "/b/x.gguf"}}}
    models = read_registry(json.dumps(document).encode()).content.models
    assert {model_id: model.former_id for model_id, model in models.items()} == {"x": "one", "x-b": "two"}
