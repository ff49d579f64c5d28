"""Settings as words: read as people mean them, and shown as they would be typed."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_agent.cli import setting_words
from magi_agent.cli.setting_descriptions import describe, schema
from magi_agent.cli.setting_words import WrongWordError, assigned, setting_of, shown, summary, values_of
from magi_agent.runtime_settings.reading import read_settings
from magi_agent.runtime_settings.settings import setting_names, wire_name

GIB = 1 << 30


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("ctx_size=8192", "ctx_size", 8192),
        ("ctx_size=32k", "ctx_size", 32768),
        ("ctxSize=1.5K", "ctx_size", 1536),
        ("CTX-SIZE=0", "ctx_size", 0),
        ("n_gpu_layers=all", "n_gpu_layers", -1),
        ("nGpuLayers=99", "n_gpu_layers", 99),
        ("memory_max=24G", "memory_max", 24 * GIB),
        ("memory_max=24GiB", "memory_max", 24 * GIB),
        ("memory_max=24gb", "memory_max", 24 * 10**9),
        ("memory_high=512M", "memory_high", 512 << 20),
        ("memory_high=1048576", "memory_high", 1048576),
        ("mmap=no", "mmap", False),
        ("mlock=true", "mlock", True),
        ("flash_attention=on", "flash_attention", "on"),
        ("cache_type_k=Q8_0", "cache_type_k", "q8_0"),
        ("start_policy=on-demand", "start_policy", "onDemand"),
        ("tensor_split=3,1.5", "tensor_split", [3.0, 1.5]),
        ("rope_scale=2", "rope_scale", 2.0),
        ("aliases=gpt, chat/best", "aliases", ["gpt", "chat/best"]),
        ("gpus=0000:01:00.0,GPU-8c6a7d2b", "gpus", ["0000:01:00.0", "GPU-8c6a7d2b"]),
        ('extra_flags=["--samplers=a,b"]', "extra_flags", ["--samplers=a,b"]),
        ("lora=/m/a:0.5,/m/b", "lora", [{"path": "/m/a", "scale": 0.5}, {"path": "/m/b", "scale": 1.0}]),
        ("chat_template={{ a=b }}", "chat_template", "{{ a=b }}"),
        ("cpu_affinity=0-7,16", "cpu_affinity", "0-7,16"),
        ("chatTemplateFile=/m/t.jinja", "chat_template_file", "/m/t.jinja"),
    ],
)  # fmt: skip
def test_a_word_is_read_as_a_person_means_it(word: str, name: str, value: object) -> None:
    assert assigned(word) == (name, value)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("ctx_size", "'ctx_size' is no KEY=VALUE"),
        ("ctx_size=", "ctx_size needs a value; to leave it to the defaults: --unset ctx_size"),
        ("chatTemplate=null", "chat_template needs a value; to leave it to the defaults: --unset chat_template"),
        ("ctxsiz=3", "no setting is called 'ctxsiz'; did you mean ctx_size?"),
        ("zzz=3", "no setting is called 'zzz'; all of them: magictl settings --list"),
        ("ctx_size=big", "ctx_size must be a whole number, as 32k, not 'big'"),
        ("ctx_size=2G", "ctx_size must be a whole number, as 32k, not '2G'"),
        ("batch_size=2k", "batch_size must be a whole number, not '2k'"),
        ("memory_max=lots", "memory_max must be a whole number, as 24G, not 'lots'"),
        ("memory_max=infG", "memory_max must be a whole number, as 24G, not 'infG'"),
        ("mmap=maybe", "mmap must be on or off, not 'maybe'"),
        ("rope_scale=nan", "rope_scale must be a number, not 'nan'"),
        ("tensor_split=1,x", "tensor_split must be a number, not 'x'"),
        ("extra_flags=[1", "extra_flags begins with '[' and is no JSON list"),
        ("split_mode=rows", "split_mode must be one of none, layer, row, tensor, not 'rows'"),
    ],
)
def test_a_wrong_word_is_answered_with_what_would_be_right(word: str, said: str) -> None:
    with pytest.raises(WrongWordError) as raised:
        assigned(word)

    assert str(raised.value).startswith(said)


WHOLE, NUMBER = st.integers(-1, 1 << 60), st.floats(0.001, 1e9, allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=","), min_size=1, max_size=20).filter(
    lambda text: text != "null"  # the word for no value
)
PATHS = st.text(st.characters(exclude_categories=["C"], exclude_characters=":,"), min_size=1).map(
    lambda path: f"/{path}"
)


@cache
def values(name: str) -> st.SearchStrategy[object]:
    """Values of a setting as JSON has them."""
    about = schema()["properties"][wire_name(name)]
    kind = about["anyOf"][0]
    if values_of(name) and kind.get("type") not in ("boolean", "integer"):
        return st.sampled_from(values_of(name))
    if kind["type"] == "array":
        item = kind["items"].get("type")
        lora = st.fixed_dictionaries({"path": PATHS, "scale": st.floats(-1000, 1000)})
        return st.lists({"number": NUMBER, "string": TEXT | st.just("a,b")}.get(item, lora), min_size=1, max_size=4)
    return {"boolean": st.booleans(), "integer": WHOLE, "number": NUMBER, "string": TEXT}[kind["type"]]


@pytest.mark.parametrize("name", setting_names())
@settings(deadline=None)  # A machine that does something else for a moment is no counterexample.
@given(data=st.data())
def test_what_is_shown_would_be_read_as_the_same(name: str, data: st.DataObject) -> None:
    value = data.draw(values(name))

    assert assigned(f"{name}={shown(name, value)}") == (name, value)


def test_a_list_whose_words_would_be_misread_is_shown_as_json() -> None:
    for words in (["[x"], ["a,b"], [" a"]):
        assert assigned(f"aliases={shown('aliases', words)}") == ("aliases", words)


@pytest.mark.parametrize("name", setting_names())
def test_each_offered_value_is_one_that_the_agent_takes(name: str) -> None:
    for word in values_of(name):
        _, value = assigned(f"{name}={word}")
        given = {name: value} | ({"numa_nodes": "0"} if name == "numa_policy" else {})

        read_settings(given)


def test_keys_are_taken_in_either_case() -> None:
    for name in setting_names():
        assert setting_of(name) == setting_of(wire_name(name)) == setting_of(name.replace("_", "-")) == name


def test_the_settings_that_take_sizes_are_those_in_bytes_and_in_tokens_of_context() -> None:
    said = {fact.label: fact.value.text for fact in describe()}

    assert {name for name, text in said.items() if text.startswith("Bytes ")} == setting_words.BYTES
    assert {name for name, text in said.items() if text.startswith("Context in tokens")} == setting_words.TOKENS


def test_each_setting_is_described_with_what_it_may_be() -> None:
    facts = {fact.label: fact for fact in describe()}

    assert list(facts) == list(setting_names())
    assert all(fact.value.text and fact.remark for fact in facts.values())
    assert facts["ctx_size"].remark == "whole number from 0 to 100000000, as 32k"
    assert facts["flash_attention"].remark == "on | off | auto"
    assert facts["start_policy"].remark == "alwaysOn | onDemand | manual"
    assert facts["lora"].remark == "path:scale,…"


def test_a_chat_template_is_cut_for_a_sheet_and_a_path_is_not() -> None:
    assert summary("chat_template", "x" * 300) == "x" * 49 + "…"
    assert summary("draft_model", "/m" + "x" * 300) == "/m" + "x" * 300
