"""What a server is started with, pasted back, gives the settings it was started with: for every setting there is."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings

from magi_agent.imports.command_line import read_command_line
from magi_agent.imports.imported import ImportedModel
from magi_agent.imports.server_options import option_named
from magi_agent.runtime_settings.known_options import KnownOptions, read_help
from magi_agent.runtime_settings.passing import LOAD_MODE, PASSINGS, passed
from magi_agent.runtime_settings.settings import LoraAdapter, RuntimeSettings, faults_of
from tests.runtime_settings.strategies import FIELDS, RUNTIME_SETTINGS

PASSED = (*(passing.setting for passing in PASSINGS), "mode", "lora", "extra_flags")
"""The settings that llama-server is told about by ``passed``."""


@pytest.fixture(scope="module")
def known(llama_server: Path) -> KnownOptions:
    return read_help(
        subprocess.run([llama_server, "--help"], check=True, capture_output=True, text=True, timeout=60).stdout
    )


def _pasted(given: RuntimeSettings, known: KnownOptions | None) -> ImportedModel:
    """What ``given`` is started with, as a line that a person could paste."""
    started = passed(given, known)
    assert not started.faults
    line = shlex.join([f"{name}={value}" for name, value in started.environment.items()])
    allowed = {flag.partition("=")[0] for flag in given.extra_flags or ()}
    [model] = read_command_line(f"{line} {shlex.join(['llama-server', *started.argv])}", allowed).models
    return model


def _is_told(flag: str) -> bool:
    """Whether a flag that nobody knows is told from what stands around it, once it is two words."""
    name, has_value, value = flag.partition("=")
    return option_named(name) is None and not value.startswith("-") and (not has_value or value != "")


def _told(given: RuntimeSettings) -> RuntimeSettings:
    flags = {flag.partition("=")[0]: flag for flag in given.extra_flags or () if _is_told(flag)}
    return replace(
        RuntimeSettings(**{name: getattr(given, name) for name in PASSED}),
        extra_flags=tuple(flags.values()) or None,
        lora=given.lora or None,
        mode=None if given.mode == "generate" else given.mode,
        mlock=given.mlock or None,
    )


@pytest.mark.parametrize("is_asked", [False, True])
def test_what_is_passed_on_comes_back(known: KnownOptions, is_asked: bool) -> None:
    build = known if is_asked else None

    @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(RUNTIME_SETTINGS)
    @example(RuntimeSettings(n_gpu_layers=-1, n_threads=-1, parallel_slots=-1, reasoning_budget=-1))
    @example(RuntimeSettings(chat_template='it\'s "$HOME" `x` {a,b} \\ # -c', draft_model="/m/$(x) y.gguf"))
    def check(given: RuntimeSettings) -> None:
        told = _told(given)
        if is_asked:
            told = replace(told, extra_flags=None)  # which this build has not
            if known[LOAD_MODE] and told.mlock:
                told = replace(told, mmap=told.mmap is not False)  # they are one option, so both are said
        model = _pasted(told, build)
        assert not model.left_out
        assert passed(model.settings, build) == passed(told, build)
        for name in PASSED:
            back = getattr(model.settings, name)
            # Some are written with fewer digits than a float has; what is written was compared above.
            if name not in ("lora", "tensor_split") and not isinstance(back, float):
                assert back == getattr(told, name), name

    check()


@pytest.mark.parametrize("name", [passing.setting for passing in PASSINGS])
def test_no_setting_is_forgotten(name: str) -> None:
    @settings(max_examples=20)
    @given(FIELDS[name])
    def check(value: object) -> None:
        given = RuntimeSettings(**{name: value})  # type: ignore[arg-type]  # of this name's own type
        if not faults_of(given) and not (name == "mlock" and value is False):
            model = _pasted(given, None)
            assert [said for said, _ in model.settings.said()] == [name]
            assert [entry.became.partition(" = ")[0] for entry in model.carried][:1] == [name]

    check()


def test_lora_adapters_come_back() -> None:
    given = RuntimeSettings(lora=(LoraAdapter("/m/a.gguf", 0.5), LoraAdapter("/m/b.gguf", -2.0)))
    assert _pasted(given, None).settings == given
