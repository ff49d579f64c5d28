"""Every option that the installed llama-server has is known by all its names, and what is said about each is true."""

import re
import subprocess
from itertools import chain
from pathlib import Path

import pytest

from magi_agent import imports
from magi_agent.imports.server_options import option_named
from magi_agent.runtime_settings.known_options import KnownOption, KnownOptions, read_help
from magi_agent.runtime_settings.passing import MODES, PASSINGS, RESERVED
from magi_agent.runtime_settings.settings import setting_names
from magi_agent.settings.table import SETTINGS


@pytest.fixture(scope="module")
def known(llama_server: Path) -> KnownOptions:
    return read_help(
        subprocess.run([llama_server, "--help"], check=True, capture_output=True, text=True, timeout=60).stdout
    )


def _has_several_names(option: KnownOption) -> bool:
    return len(option.names) > 1 or option.variable is not None or not option.takes_value


def test_all_names_of_an_option_mean_the_same(known: KnownOptions) -> None:
    options = [option for option in known.options if _has_several_names(option)]
    assert len(options) > 150
    for option in options:
        names = [*option.names, *filter(None, (option.variable,))]
        meant = [option_named(name) for name in names]
        assert None not in meant, names
        assert len({found.option.name for found in meant if found}) == 1, names


def test_what_takes_no_value_is_a_switch(known: KnownOptions) -> None:
    for option in known.options:
        named = option_named(option.names[-1])
        if named is not None:
            assert named.option.switch is not option.takes_value, option.names


def test_the_names_that_say_no_are_known_as_such(known: KnownOptions) -> None:
    negations = {
        name
        for option in known.options
        if len({name.removeprefix("--no-").removeprefix("--") for name in option.names if name.startswith("--")})
        < len([name for name in option.names if name.startswith("--")])
        for name in option.names
        if name.startswith("--no-")
    }
    assert len(negations) > 20
    for name in negations:
        named = option_named(name)
        assert named is not None, name
        assert named.negated, name


def test_each_setting_that_is_passed_on_is_known_by_what_it_is_passed_on_as(known: KnownOptions) -> None:
    for passing in PASSINGS:
        option = next((found for name in passing.names if (found := known[name])), None)
        assert option is not None, passing.setting
        for name in {*passing.names, *option.names, *filter(None, (option.variable, passing.variable))}:
            named = option_named(name)
            assert named is not None, name
            assert named.option.setting == passing.setting, name
    for mode, names in MODES.items():
        for name in names:
            named = option_named(name)
            assert named is not None, name
            assert (named.option.setting, named.option.meaning) == ("mode", mode)


def test_nothing_that_is_reserved_may_become_an_extra_flag() -> None:
    for name in RESERVED:
        named = option_named(name)
        assert named is not None, name
        option = named.option
        is_special = option.name in (
            "--model",
            "--hf-repo",
            "--hf-file",
            "--alias",
            "--lora",
            "--lora-scaled",
            "--host",
            "--load-mode",
        )
        assert option.refused or option.needless or option.setting or is_special, name


def test_reasons_point_to_settings_that_there_are() -> None:
    source = "".join(path.read_text() for path in Path(str(imports.__file__)).parent.glob("*.py"))
    there_are = {f"{setting.section}.{setting.name}" for setting in SETTINGS}
    pointed_to = set(re.findall(r"\b(?:agent|discovery|servers|api|systemd|profiles|registry)\.[a-z]+_[a-z_]+", source))
    assert len(pointed_to) > 8
    assert pointed_to <= there_are
    named = chain.from_iterable(
        re.split(r" and |, ", words)
        for words in re.findall(
            r"the settings? ((?:[a-z]+_[a-z_]+|pinned|numa)(?:(?: and |, )[a-z]+_[a-z_]+)*)", source
        )
    )
    assert set(named) <= set(setting_names())


def test_what_llama_server_calls_dangerous_is_nobodys_extra_flag(known: KnownOptions) -> None:
    dangerous = [option for option in known.options if "untrusted environments" in option.text]
    assert len(dangerous) >= 3
    for option in dangerous:
        assert not RESERVED.isdisjoint(option.names), option.names
