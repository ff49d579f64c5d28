"""The runtime settings: what each may be, what goes together, and how layers of them are joined."""

from __future__ import annotations

import timeit
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from magi_agent.runtime_settings.reading import (
    ADAPTER,
    InvalidRuntimeSettings,
    checked,
    read_kept,
    read_settings,
    written,
)
from magi_agent.runtime_settings.settings import (
    LoraAdapter,
    RuntimeSettings,
    faults_of,
    numbers_in,
    setting_names,
    wire_name,
)
from tests.runtime_settings.strategies import FIELDS, RUNTIME_SETTINGS

VALID: dict[str, list[Any]] = {
    "n_gpu_layers": [-1, 0, 100_000],
    "ctx_size": [0, 100_000_000],
    "n_threads": [-1, 4096],
    "batch_size": [1, 1_000_000],
    "parallel_slots": [-1, 1, 1024],
    "flash_attention": ["on", "off", "auto"],
    "cache_type_k": ["bf16", "iq4_nl"],
    "mmap": [True, False],
    "tensor_split": [[0, 1], [0.5], [1.0] * 128],
    "main_gpu": [0],
    "gpus": [
        ["0000:01:00.0"],
        ["00000000:C1:00.0", "GPU-5a1f8a9c-77ab-0b1e-9b5e-0123456789ab"],
        ["GPU-8c6a7d2b3e4f5061"],
    ],
    "n_cpu_moe": [0],
    "lora": [[], [{"path": "/m/a.gguf"}], [{"path": "/m/a b.gguf", "scale": -0.5}]],
    "draft_model": ["/m/größe $x;y.gguf"],
    "draft_max": [1],
    "draft_min": [0],
    "projector": ["none", "/m/mmproj.gguf"],
    "rope_scale": [0.001, 2, 1e9],
    "reasoning_budget": [-1, 0],
    "aliases": [[], ["gpt-4o", "org/model:tag@1+x_y.z"]],
    "extra_flags": [[], ["--no-warmup"], ["--temp=0.5"], ["--x="]],
    "binary": ["canary", "7_b-x"],
    "start_policy": ["alwaysOn", "onDemand", "manual"],
    "idle_timeout_seconds": [1, 31_536_000],
    "max_concurrent": [1, 100_000],
    "memory_high": [1, 1 << 60],
    "cpu_quota": [0.01, 2.5, 8192],
    "cpu_weight": [1, 10_000],
    "cpu_affinity": ["0", "0-7,16-23", "8191"],
    "numa_policy": ["default", "local"],
    "numa_nodes": ["0", "0-1,3"],
    "chat_template": ["chatml", "{% for m in messages %}{{ m['content'] }}{% endfor %}", "x" * 65_536, "é" * 50_000],
}
INVALID: dict[str, list[Any]] = {
    "n_gpu_layers": [-2, 100_001, "many", 1.5, []],
    "ctx_size": [-1, 100_000_001, True],
    "n_threads": [-2, 4097],
    "batch_size": [0, 1_000_001],
    "parallel_slots": [0, -2, 1025],
    "flash_attention": ["", "ON", "yes", 1],
    "cache_type_k": ["f8", "Q8_0"],
    "mmap": ["perhaps", 2],
    "split_mode": ["rows"],
    "tensor_split": [[], [-1], [0, 0], [1] * 129, ["a"], 1, [float("nan")], [float("inf")]],
    "main_gpu": [-1],
    "gpus": [[], "0000:01:00.0", ["CUDA0"], ["0"], ["01:00.0"], [""], ["GPU-"], ["0000:01:00.0,CUDA1"],
             ["0000:01:00.8"], ["0000:01:00.0\n"], ["0000:0A:00.0", "0000:0a:00.0"], ["GPU-5a1f8a9c;x"], ["--device"],
             ["MIG-5a1f8a9c"]],
    "n_cpu_moe": [-1],
    "lora": [[{}], [{"path": ""}], [{"path": "a.gguf"}], [{"path": "/m/a:b"}], [{"path": "/m/a,b"}], [{"path": "/$x"}],
             [{"path": "/m/a;b"}], [{"path": "/m", "size": 1}], [{"path": "/m", "scale": 1001}], ["/m"]],
    "draft_model": ["", "m.gguf", "/m/../x", "/m/a\nb", "/m/a\0b", "/" + "x" * 4096, 5],
    "draft_max": [0],
    "projector": ["", "None", "mmproj.gguf"],
    "rope_scale": [0, -1, float("nan"), float("inf")],
    "chat_template": ["", "two\nlines", "a\tb", "x" * 65_537, "é" * 50_001],
    "chat_template_file": ["template.jinja"],
    "reasoning_budget": [-2],
    "aliases": ["gpt-4o", [""], ["a b"], ["a,b"], ["-a"], ["é"], ["a", "a"], ["tier:fast"], ["x" * 201], [5]],
    "extra_flags": ["--x", ["-x"], ["x"], ["--"], ["--X"], ["--x y"], ["--x=$y"], ["--x=a;b"], ["--x=a\nb"],
                    ["--x=" + "y" * 1000]],
    "binary": ["", "Canary", "-x", "/opt/llama-server", "x" * 65],
    "start_policy": ["always_on", "AlwaysOn"],
    "idle_timeout_seconds": [0],
    "max_concurrent": [0, 100_001, "all"],
    "memory_high": [0],
    "cpu_quota": [0, 0.001, 8193],
    "cpu_weight": [0, 10_001],
    "cpu_affinity": ["", "a", "1-", "3-1", "8192", "0,,1", "-1", " 1", "٣"],
    "numa_policy": ["bound"],
    "numa_nodes": ["all"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALID.items() for value in values])
def test_what_a_setting_may_be(name: str, value: object) -> None:
    read = read_settings({name: value})

    assert read == read_settings({wire_name(name): value})
    assert [said for said, _ in read.said()] == [name]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_what_no_setting_may_be(name: str, value: object) -> None:
    with pytest.raises(InvalidRuntimeSettings) as refused:
        read_settings({name: value})

    assert {fault.name.partition(".")[0] for fault in refused.value.faults} == {name}
    assert str(refused.value).startswith(name)


@pytest.mark.parametrize(
    ("together", "name"),
    [
        ({"memory_high": 2, "memory_max": 1}, "memory_high"),
        ({"draft_min": 3, "draft_max": 2}, "draft_min"),
        ({"chat_template": "chatml", "chat_template_file": "/m/x.jinja"}, "chat_template_file"),
        ({"gpus": ["0000:01:00.0"], "extra_flags": ["--device=CUDA0"]}, "gpus"),
        ({"numa_policy": "bind"}, "numa_nodes"),
        ({"numa_policy": "interleave"}, "numa_nodes"),
        ({"numa_policy": "preferred"}, "numa_nodes"),
        ({"numa_policy": "preferred", "numa_nodes": "0-1"}, "numa_nodes"),
    ],
)
def test_what_does_not_go_together(together: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRuntimeSettings) as refused:
        read_settings(together)

    assert [fault.name for fault in refused.value.faults] == [name]
    for alone in together:
        if alone != "numa_policy":
            read_settings({alone: together[alone]})


@pytest.mark.parametrize(
    "together",
    [
        {"memory_high": 1, "memory_max": 1},
        {"draft_min": 2, "draft_max": 2},
        {"numa_policy": "bind", "numa_nodes": "0-1"},
        {"numa_policy": "preferred", "numa_nodes": "1"},
        {"numa_policy": "local"},
    ],
)
def test_what_goes_together(together: dict[str, Any]) -> None:
    assert dict(read_settings(together).said()) == together


def test_every_fault_is_told_at_once() -> None:
    wrong = RuntimeSettings(binary="No", aliases=("a b", "a b"), draft_model="x", lora=(LoraAdapter("y"),))

    assert [fault.name for fault in faults_of(wrong)] == [
        "draft_model",
        "lora",
        "aliases",
        "aliases",
        "aliases",
        "binary",
    ]
    with pytest.raises(InvalidRuntimeSettings, match="draft_model: must be an absolute path"):
        checked(wrong)


def test_numbers_and_ranges() -> None:
    assert numbers_in("3,0-2,2,8-8") == (0, 1, 2, 3, 8)
    assert numbers_in("8191,0") == (0, 8191)


def test_many_wide_ranges_cost_no_more_than_one() -> None:
    def seconds(text: str) -> float:
        return min(timeit.repeat(lambda: numbers_in(text), number=3, repeat=5))

    assert numbers_in(",".join(["0-8191"] * 142)) == tuple(range(8192))
    assert seconds(",".join(["0-8191"] * 142)) < 10 * seconds("0-8191")


@given(RUNTIME_SETTINGS, RUNTIME_SETTINGS, RUNTIME_SETTINGS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_what_was_said_goes_over_what_lies_under(
    top: RuntimeSettings, middle: RuntimeSettings, bottom: RuntimeSettings
) -> None:
    joined = top.over(middle)

    if top.chat_template or top.chat_template_file:
        middle = replace(middle, chat_template=None, chat_template_file=None)
        bottom = replace(bottom, chat_template=None, chat_template_file=None)
    assert dict(joined.said()) == {**dict(middle.said()), **dict(top.said())}
    assert joined.over(bottom) == top.over(middle.over(bottom))
    assert top.over(RuntimeSettings()) == RuntimeSettings().over(top) == top


@given(RUNTIME_SETTINGS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_what_is_written_is_read_again_from_files_and_from_the_wire(said: RuntimeSettings) -> None:
    assert read_settings(written(said)) == said
    assert read_kept(written(said)) == (said, ())
    on_the_wire = ADAPTER.dump_json(said, by_alias=True)
    assert ADAPTER.validate_json(on_the_wire, strict=True) == said
    assert checked(said) is said


@pytest.mark.parametrize("name", setting_names())
def test_the_strategy_leaves_no_setting_out_and_makes_valid_ones(name: str) -> None:
    @given(FIELDS[name])
    @settings(max_examples=30, deadline=None)
    def every_value(value: Any) -> None:
        ADAPTER.validate_python({name: value})
        faults = faults_of(replace(RuntimeSettings(), **{name: value}))
        assert {fault.name for fault in faults} <= ({"numa_nodes"} if name == "numa_policy" else set())

    every_value()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([*setting_names(), *map(wire_name, setting_names()), "x", ""])


@given(st.dictionaries(NAMES, ANYTHING, max_size=4))
@settings(deadline=None)
def test_anything_is_settings_or_refused_and_what_is_right_of_it_is_kept(document: dict[str, Any]) -> None:
    try:
        read = read_settings(document)
    except InvalidRuntimeSettings as error:
        assert error.faults  # noqa: PT017 - either outcome is right
        read, _ = read_kept(document)
    assert faults_of(read) == ()
    assert read_settings(written(read)) == read


class TestFiles:
    @pytest.mark.parametrize("name", ["flash_attention", "flashAttention", "reasoning"])
    def test_a_plain_on_or_off_of_yaml_is_the_word(self, name: str) -> None:
        assert read_settings({name: True}) == read_settings({name: "on"})
        assert read_settings({name: False}) == read_settings({name: "off"})

    @pytest.mark.parametrize("name", [name for name in setting_names() if name not in ("mmap", "mlock", "pinned")])
    def test_yes_is_no_number(self, name: str) -> None:
        if name not in ("flash_attention", "reasoning"):
            with pytest.raises(InvalidRuntimeSettings, match=f"{name}: must not be true or false"):
                read_settings({name: True})

    @pytest.mark.parametrize("document", [None, 5, "ctx_size", [], [("ctx_size", 5)]])
    def test_what_is_no_mapping_is_refused(self, document: object) -> None:
        with pytest.raises(InvalidRuntimeSettings):
            read_settings(document)

    def test_an_unknown_name_is_refused_with_the_nearest_there_is(self) -> None:
        with pytest.raises(
            InvalidRuntimeSettings, match=r"ctx_sizes: there is no such setting; did you mean ctx_size\?"
        ):
            read_settings({"ctx_sizes": 5})

    def test_a_name_given_twice_is_refused(self) -> None:
        with pytest.raises(InvalidRuntimeSettings, match="is given twice: as ctx_size and as ctxSize"):
            read_settings({"ctx_size": 5, "ctxSize": 6})

    def test_only_what_was_said_is_written(self) -> None:
        said = RuntimeSettings(mmap=False, lora=(LoraAdapter("/m/a.gguf", 0.5),), start_policy=None)

        assert written(said) == {"mmap": False, "lora": [{"path": "/m/a.gguf", "scale": 0.5}]}
        assert written(RuntimeSettings()) == {}


class TestKept:
    def test_one_that_is_none_costs_no_other(self) -> None:
        kept, faults = read_kept({"ctx_size": 5, "n_threads": "all", "of_the_future": 1, "mmap": None})

        assert kept == RuntimeSettings(ctx_size=5)
        assert [fault.name for fault in faults] == ["n_threads", "of_the_future"]

    @pytest.mark.parametrize("name", setting_names())
    def test_whichever_it_is(self, name: str) -> None:
        kept, faults = read_kept({"pinned": True, name: {"no": "value"}})

        assert kept == (RuntimeSettings() if name == "pinned" else RuntimeSettings(pinned=True))
        assert {fault.name.partition(".")[0] for fault in faults} == {name}

    def test_of_two_that_do_not_go_together_one_is_kept(self) -> None:
        kept, faults = read_kept({"cpuAffinity": "x", "memoryHigh": 5, "memoryMax": 4, "ctxSize": 3})

        assert kept == RuntimeSettings(memory_max=4, ctx_size=3)
        assert sorted(fault.name for fault in faults) == ["cpu_affinity", "memory_high"]


class TestWire:
    @pytest.mark.parametrize(
        "body",
        ['{"ctxSize": "5"}', '{"ctxSize": 5.0}', '{"ctxSize": true}', '{"mmap": 1}', '{"mmap": "yes"}',
         '{"chatTemplate": 5}', '{"aliases": "x"}', '{"tensorSplit": ["1"]}', '{"unknown": 1}', '{"ctxSize": NaN}',
         '{"lora": [{"path": "/m", "scale": "1"}]}', '{"startPolicy": "ALWAYS_ON"}', "[]", "null", "5"],
    )  # fmt: skip
    def test_nothing_unknown_and_nothing_of_another_type(self, body: str) -> None:
        with pytest.raises(ValidationError):
            ADAPTER.validate_json(body, strict=True)

    def test_both_spellings_are_read_and_one_is_written(self) -> None:
        expected = RuntimeSettings(ctx_size=5, tensor_split=(1.0, 2.0))
        for body in ('{"ctxSize": 5, "tensorSplit": [1, 2.0]}', '{"ctx_size": 5, "tensor_split": [1, 2.0]}'):
            assert ADAPTER.validate_json(body, strict=True) == expected

        assert list(ADAPTER.dump_python(expected, by_alias=True)) == [wire_name(name) for name in setting_names()]


class TestSchema:
    def test_every_setting_is_described_and_may_be_null(self) -> None:
        schema = ADAPTER.json_schema()

        assert list(schema["properties"]) == [wire_name(name) for name in setting_names()]
        assert schema["additionalProperties"] is False
        assert "required" not in schema
        for name, about in schema["properties"].items():
            assert about["description"].endswith("."), name
            assert {"type": "null"} in about["anyOf"], name
            assert about["default"] is None, name

    def test_every_field_has_a_default_so_that_a_new_one_breaks_no_stored_settings(self) -> None:
        assert all(field.default is None for field in fields(RuntimeSettings))
