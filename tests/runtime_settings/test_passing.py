"""What settings are passed on as, for builds that call options by other names; real starts are in tests/servers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from magi_agent.runtime_settings.known_options import KnownOptions, read_help
from magi_agent.runtime_settings.passing import PASSINGS, RESERVED, Form, disallowed, passed
from magi_agent.runtime_settings.settings import LoraAdapter, RuntimeSettings, setting_names
from magi_agent.servers.unit_limits import LIMITS
from tests.runtime_settings.strategies import RUNTIME_SETTINGS
from tests.runtime_settings.test_known_options import BEFORE_VALUES

NEWEST = """\
-ngl,  --gpu-layers, --n-gpu-layers N   number of layers, either an exact number, 'auto', or 'all'
-fa,   --flash-attn [on|off|auto]       set Flash Attention use
--mmap, --no-mmap                       whether to memory-map model
--mlock                                 keep model in RAM
-md,   --spec-draft-model FNAME         draft model
                                        (env: LLAMA_ARG_SPEC_DRAFT_MODEL)
--spec-type none,draft-simple           types of speculative decoding
--lora-scaled FNAME:SCALE,...           path to LoRA adapter
--warmup, --no-warmup                   whether to perform warmup
--temp, --temperature N                 temperature
--shell CMD                             whether to run a shell for whoever asks - do not enable in
                                        untrusted environments (default: none)
--fim-qwen-7b-default                   use default Qwen 2.5 Coder 7B (note: can download weights from the
                                        internet)
"""
BY_LOAD_MODE = read_help(
    """\
--mlock                                 DEPRECATED in favor of `--load-mode`: keep model in RAM
--mmap, --no-mmap                       DEPRECATED in favor of `--load-mode`: whether to memory-map model
-lm,   --load-mode MODE                 model loading mode (default: auto)
                                        (env: LLAMA_ARG_LOAD_MODE)
"""
)
OLDER, NEWER = read_help(BEFORE_VALUES), read_help(NEWEST)
DRAFT = RuntimeSettings(draft_model="/m/d $x;.gguf")
ADAPTERS = RuntimeSettings(lora=(LoraAdapter("/m/a b.gguf", 0.5), LoraAdapter("/m/c.gguf")))


@pytest.mark.parametrize(
    ("said", "known", "argv"),
    [
        (RuntimeSettings(), None, []),
        (RuntimeSettings(n_gpu_layers=-1), None, ["--n-gpu-layers", "all"]),
        (RuntimeSettings(n_gpu_layers=-1), NEWER, ["--n-gpu-layers", "all"]),
        (RuntimeSettings(n_gpu_layers=-1), OLDER, ["--n-gpu-layers", "999"]),
        (RuntimeSettings(n_gpu_layers=0), OLDER, ["--n-gpu-layers", "0"]),
        (RuntimeSettings(flash_attention="on"), OLDER, ["--flash-attn"]),
        (RuntimeSettings(flash_attention="off"), OLDER, []),
        (RuntimeSettings(flash_attention="auto"), OLDER, []),
        (RuntimeSettings(flash_attention="off"), NEWER, ["--flash-attn", "off"]),
        (RuntimeSettings(flash_attention="off"), None, ["--flash-attn", "off"]),
        (RuntimeSettings(mmap=True), None, ["--mmap"]),
        (RuntimeSettings(mmap=True), NEWER, ["--mmap"]),
        (RuntimeSettings(mmap=True), OLDER, []),
        (RuntimeSettings(mmap=False), None, ["--no-mmap"]),
        (RuntimeSettings(mmap=False), OLDER, ["--no-mmap"]),
        (RuntimeSettings(mlock=True), NEWER, ["--mlock"]),
        (RuntimeSettings(mlock=False), NEWER, []),
        (RuntimeSettings(mlock=False), None, []),
        (RuntimeSettings(), BY_LOAD_MODE, []),
        (RuntimeSettings(mmap=True), BY_LOAD_MODE, ["--load-mode", "mmap"]),
        (RuntimeSettings(mmap=False), BY_LOAD_MODE, ["--load-mode", "none"]),
        (RuntimeSettings(mlock=True), BY_LOAD_MODE, ["--load-mode", "mmap+mlock"]),
        (RuntimeSettings(mlock=False), BY_LOAD_MODE, []),
        (RuntimeSettings(mmap=True, mlock=True), BY_LOAD_MODE, ["--load-mode", "mmap+mlock"]),
        (RuntimeSettings(mmap=True, mlock=False), BY_LOAD_MODE, ["--load-mode", "mmap"]),
        (RuntimeSettings(mmap=False, mlock=True), BY_LOAD_MODE, ["--load-mode", "mlock"]),
        (RuntimeSettings(mmap=False, mlock=False), BY_LOAD_MODE, ["--load-mode", "none"]),
        (DRAFT, OLDER, ["--model-draft", "/m/d $x;.gguf"]),
        (DRAFT, NEWER, ["--spec-type", "draft-simple"]),
        (DRAFT, None, ["--spec-type", "draft-simple"]),
        (RuntimeSettings(draft_model="/m/d", extra_flags=("--spec-type=draft-eagle3",)), None,
         ["--spec-type", "draft-eagle3"]),
        (RuntimeSettings(draft_max=4), OLDER, ["--draft-max", "4"]),
        (ADAPTERS, None, ["--lora-scaled", "/m/a b.gguf:0.5,/m/c.gguf:1"]),
        (ADAPTERS, NEWER, ["--lora-scaled", "/m/a b.gguf:0.5,/m/c.gguf:1"]),
        (ADAPTERS, OLDER, ["--lora-scaled", "/m/a b.gguf", "0.5", "--lora-scaled", "/m/c.gguf", "1"]),
        (RuntimeSettings(mode="generate"), None, []),
        (RuntimeSettings(mode="embedding"), None, ["--embeddings"]),
        (RuntimeSettings(mode="rerank"), None, ["--reranking"]),
        (RuntimeSettings(tensor_split=(3, 1.5, 0)), None, ["--tensor-split", "3,1.5,0"]),
        (RuntimeSettings(rope_scale=1e9, rope_freq_base=1e-9), None,
         ["--rope-scale", "1000000000", "--rope-freq-base", "1e-09"]),
        (RuntimeSettings(extra_flags=("--no-warmup", "--temp=0.5", "--x=")), None,
         ["--no-warmup", "--temp", "0.5", "--x", ""]),
        (RuntimeSettings(extra_flags=("--no-warmup", "--temp=0.5")), NEWER, ["--no-warmup", "--temp", "0.5"]),
        (RuntimeSettings(pinned=True, idle_timeout_seconds=5, memory_max=5, aliases=("x",), binary="b"), None, []),
    ],
)  # fmt: skip
def test_each_build_gets_what_it_knows(said: RuntimeSettings, known: KnownOptions | None, argv: list[str]) -> None:
    out = passed(said, known)

    assert (out.argv, out.faults) == (argv, [])


@pytest.mark.parametrize("known", [NEWER, None])
def test_texts_travel_in_the_environment_where_the_build_has_a_variable(known: KnownOptions | None) -> None:
    assert passed(DRAFT, known).environment == {"LLAMA_ARG_SPEC_DRAFT_MODEL": "/m/d $x;.gguf"}
    assert passed(DRAFT, OLDER).environment == {}
    assert passed(RuntimeSettings(chat_template="$x"), OLDER).environment == {"LLAMA_ARG_CHAT_TEMPLATE": "$x"}


@pytest.mark.parametrize(
    ("said", "known", "name", "says"),
    [
        (RuntimeSettings(ctx_size=5), OLDER, "ctx_size", "knows no --ctx-size, which ctx_size = 5 needs"),
        (RuntimeSettings(draft_min=5), NEWER, "draft_min", "--spec-draft-n-min"),
        (RuntimeSettings(mode="rerank"), NEWER, "mode", "--reranking"),
        (RuntimeSettings(mlock=True), read_help("--x  y"), "mlock", "--mlock"),
        (RuntimeSettings(mmap=False), read_help("--x  y"), "mmap", "--no-mmap"),
        (ADAPTERS, read_help("--lora FNAME  x"), "lora", "--lora-scaled"),
        (RuntimeSettings(chat_template_file="/m/x"), OLDER, "chat_template_file", "--chat-template-file"),
        (RuntimeSettings(extra_flags=("--nonsense",)), NEWER, "extra_flags", "knows no --nonsense"),
        (RuntimeSettings(extra_flags=("--temp",)), NEWER, "extra_flags", "--temp takes a value: write --temp=VALUE"),
        (RuntimeSettings(extra_flags=("--no-warmup=1",)), NEWER, "extra_flags", "takes no value: write --no-warmup"),
    ],
)
def test_what_a_build_does_not_know_is_a_fault(
    said: RuntimeSettings, known: KnownOptions, name: str, says: str
) -> None:
    out = passed(said, known)

    [fault] = out.faults
    assert (fault.name, out.argv, out.environment) == (name, [], {})
    assert says in fault.message


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--no-warmup", None),
        ("--temp=0.5", None),
        ("--temperature=0.5", "not allowed; servers.allowed_flags in agent.toml"),
        ("--nonsense", "not allowed"),
        ("--ctx-size=5", "a setting stands for it"),
        ("--no-mmap", "a setting stands for it"),
        ("--mmap", "a setting stands for it"),
        ("--gpu-layers=5", "a setting stands for it"),
        ("--host=0.0.0.0", "the agent alone sets it"),
        ("--api-key=x", "the agent alone sets it"),
        ("--fim-qwen-7b-default", "may fetch models"),
        ("--shell=sh", "calls it dangerous"),
    ],
)
def test_a_flag_is_passed_on_if_the_configuration_names_it_and_it_is_nobody_elses(flag: str, says: str | None) -> None:
    allowed = ("--no-warmup", "--temp", "--ctx-size", "--no-mmap", "--mmap", "--gpu-layers", "--host", "--api-key",
               "--fim-qwen-7b-default", "--shell")  # fmt: skip
    faults = list(disallowed(RuntimeSettings(extra_flags=(flag,)), allowed, NEWER))

    if says is None:
        assert faults == []
    else:
        [fault] = faults
        assert fault.name == "extra_flags"
        assert says in fault.message


def test_another_name_of_a_reserved_option_is_reserved_too() -> None:
    known = read_help("-m,    --model, --weights FNAME   model path to load\n")

    [fault] = disallowed(RuntimeSettings(extra_flags=("--weights=/m",)), ("--weights",), known)

    assert "no extra flag" in fault.message


@given(RUNTIME_SETTINGS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_what_a_person_can_put_any_character_into_is_not_in_argv(said: RuntimeSettings) -> None:
    out = passed(said, None)

    assert out.faults == []
    assert not any(set("$;\n\0") & set(argument) for argument in out.argv)
    assert all(isinstance(value, str) for value in (*out.argv, *out.environment.values()))


def test_no_setting_is_forgotten() -> None:
    """Each is an option, more than one, a limit of the unit, or the agent's own."""
    elsewhere = {
        "mode", "lora", "projector", "aliases", "extra_flags", "binary", "start_policy", "pinned",
        "idle_timeout_seconds", "max_concurrent", "gpus",
    }  # fmt: skip
    options = [passing.setting for passing in PASSINGS]

    assert len(set(options)) == len(options)
    assert {*options, *LIMITS, *elsewhere} == set(setting_names())
    assert len(options) + len(LIMITS) + len(elsewhere) == len(fields(RuntimeSettings))


def test_every_option_that_a_setting_stands_for_is_reserved() -> None:
    said: dict[str, Any] = {"draft_model": "/d", "mode": "rerank", "lora": (LoraAdapter("/l"),), "mmap": False}
    for argument in passed(RuntimeSettings(**said), None).argv:
        assert not argument.startswith("--") or argument in RESERVED or argument == "--spec-type"
    for passing in PASSINGS:
        assert set(passing.names) <= RESERVED
        assert (passing.variable is not None) == (passing.form is Form.TEXT)


@pytest.mark.parametrize("flag", ["--no-warmup", "--no-warmup=--agent", "--temp=0.5"])
def test_without_the_builds_own_word_no_extra_flag_is_passed_on(flag: str) -> None:
    settings = RuntimeSettings(extra_flags=(flag,))

    (fault,) = disallowed(settings, ("--no-warmup", "--temp"), None)

    assert "cannot be checked" in fault.message


@pytest.mark.parametrize(("value", "is_fine"), [("-1", True), ("-.5", True), ("--agent", False), ("-ag", False)])
def test_a_value_is_no_flag_in_disguise(value: str, is_fine: bool) -> None:
    known = read_help("--seed SEED                             RNG seed\n")
    settings = RuntimeSettings(extra_flags=(f"--seed={value}",))

    assert bool(tuple(disallowed(settings, ("--seed",), known))) is not is_fine
