"""What a llama-server's --help says of its options: of the installed one, of older ones, and of no llama-server."""

from __future__ import annotations

import subprocess
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from magi_agent.runtime_settings.known_options import MAX_HELP, KnownOption, KnownOptions, read_help
from magi_agent.runtime_settings.passing import LORA, MODES, PASSINGS, Form

# Written after builds of 2024 and 2025, whose options had other names and forms.
BEFORE_VALUES = """\
usage: llama-server [options]

-h,    --help, --usage                  print usage and exit
-ngl,  --gpu-layers, --n-gpu-layers N   number of layers to store in VRAM
                                        (env: LLAMA_ARG_N_GPU_LAYERS)
-fa,   --flash-attn                     enable Flash Attention (default: disabled)
                                        (env: LLAMA_ARG_FLASH_ATTN)
--mlock                                 force system to keep model in RAM rather than swapping or compressing
--no-mmap                               do not memory-map model (slower load but may reduce pageouts if not
                                        using mlock)
                                        (env: LLAMA_ARG_NO_MMAP)
--lora-scaled FNAME SCALE               path to LoRA adapter with user defined scaling
--draft-max, --draft, --draft-n N       number of tokens to draft for speculative decoding (default: 16)
-md,   --model-draft FNAME              draft model for speculative decoding (default: unused)
-a,    --alias STRING                   set alias for model name (to be used by REST API)
                                        (env: LLAMA_ARG_ALIAS)
--chat-template JINJA_TEMPLATE          set custom jinja chat template, e.g. -x or --no-mmap
                                        (env: LLAMA_ARG_CHAT_TEMPLATE)
"""
AFTER_REMOVALS = """\
--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or
                                        --spec-ngram-mod-n-max
                                        (env: LLAMA_ARG_DRAFT_MAX)
--spec-draft-n-max N                    number of tokens to draft for speculative decoding (default: 3)
                                        (env: LLAMA_ARG_SPEC_DRAFT_N_MAX)
"""


@cache
def help_of(llama_server: Path) -> str:
    return subprocess.run(
        [llama_server, "--help"], capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL
    ).stdout


@pytest.fixture
def installed(llama_server: Path) -> KnownOptions:
    return read_help(help_of(llama_server))


def known(options: KnownOptions, name: str) -> KnownOption:
    option = options[name]
    assert option is not None, name
    return option


class TestInstalled:
    def test_every_line_that_begins_an_option_is_one(self, installed: KnownOptions, llama_server: Path) -> None:
        begun = [line for line in help_of(llama_server).splitlines() if line.startswith("-") and line[:5] != "-----"]

        assert len(installed.options) == len(begun) > 200
        for option, line in zip(installed.options, begun, strict=True):
            assert line.startswith(option.names[0])

    def test_it_knows_all_that_settings_are_passed_on_as(self, installed: KnownOptions) -> None:
        for passing in PASSINGS:
            assert installed.first_of(passing.names) == passing.names[0], passing.setting
        for names in (*MODES.values(), LORA):
            assert installed.first_of(names) == names[0]

    def test_texts_have_the_variable_that_is_assumed_where_nobody_asked(self, installed: KnownOptions) -> None:
        for passing in PASSINGS:
            if passing.form is Form.TEXT:
                assert known(installed, passing.names[0]).variable == passing.variable

    @pytest.mark.parametrize(
        ("name", "names", "takes_value", "variable"),
        [
            ("--flash-attn", ("-fa", "--flash-attn"), True, "LLAMA_ARG_FLASH_ATTN"),
            ("--no-mmap", ("--mmap", "--no-mmap"), False, "LLAMA_ARG_MMAP"),
            ("--mlock", ("--mlock",), False, "LLAMA_ARG_MLOCK"),
            ("--no-kv-offload", ("-kvo", "--kv-offload", "-nkvo", "--no-kv-offload"), False, "LLAMA_ARG_KV_OFFLOAD"),
            ("-fitt", ("-fitt", "--fit-target"), True, "LLAMA_ARG_FIT_TARGET"),
            ("--numa", ("--numa",), True, "LLAMA_ARG_NUMA"),
            ("--hf-token", ("-hft", "--hf-token"), True, "HF_TOKEN"),
            ("--temp", ("--temp", "--temperature"), True, None),
            ("--version", ("--version",), False, None),
        ],
    )
    def test_options_of_each_kind(
        self, installed: KnownOptions, name: str, names: tuple[str, ...], takes_value: bool, variable: str | None
    ) -> None:
        option = known(installed, name)

        assert (option.names, option.takes_value, option.variable) == (names, takes_value, variable)

    def test_what_was_removed_is_unknown(self, installed: KnownOptions) -> None:
        assert installed["--draft-max"] is None
        assert installed.first_of(("--draft-max", "--spec-draft-n-max")) == "--spec-draft-n-max"
        assert [option.names for option in installed.options if option.is_removed]

    def test_texts_are_one_line_each(self, installed: KnownOptions) -> None:
        assert "'auto', or 'all'" in known(installed, "--n-gpu-layers").text
        for option in installed.options:
            assert option.text == " ".join(option.text.split())


class TestOlder:
    def test_names_forms_and_variables_of_then(self) -> None:
        options = read_help(BEFORE_VALUES)

        assert [option.names[-1] for option in options.options] == [
            "--usage", "--n-gpu-layers", "--flash-attn", "--mlock", "--no-mmap", "--lora-scaled", "--draft-n",
            "--model-draft", "--alias", "--chat-template",
        ]  # fmt: skip
        assert not known(options, "--flash-attn").takes_value
        assert not known(options, "--no-mmap").takes_value
        assert options["--mmap"] is None
        assert known(options, "--model-draft").variable is None
        assert known(options, "--draft-max").takes_value
        assert options.first_of(("--spec-draft-model", "--model-draft")) == "--model-draft"
        assert options.first_of(("--spec-type",)) is None

    def test_options_that_are_listed_as_removed_are_none(self) -> None:
        options = read_help(AFTER_REMOVALS)

        assert (options["--draft"], options["--draft-max"]) == (None, None)
        assert known(options, "--spec-draft-n-max").variable == "LLAMA_ARG_SPEC_DRAFT_N_MAX"

    def test_an_option_named_in_anothers_text_is_not_taken_for_one(self) -> None:
        assert len(read_help("--a N   like\n        --b M\n   --c\n").options) == 1


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "command not found", "-", "--", "---", "-----", "- x", "-x only short", "----- common params -----",
     "--=", "\0", "--\ud800"],
)  # fmt: skip
def test_what_lists_no_options_has_none(text: str) -> None:
    assert read_help(text).options == ()


@given(
    st.text()
    | st.lists(
        st.text(st.sampled_from("-,= abNX0(env:)\t_\u2028é")) | st.sampled_from(["-a,  --b N  x", "(env: LLAMA_ARG_X)"])
    ).map("\n".join)
)
@example("--a,--b,--c")
@example("--a" + ", --a" * 1000)
@example("(env: X)\n--a (env: X)")
def test_any_text_is_read_as_far_as_it_is_one(text: str) -> None:
    options = read_help(text)

    for option in options.options:
        assert any(name.startswith("--") for name in option.names)
        assert all(name.startswith("-") and " " not in name for name in option.names)
        for name in option.names:
            assert (options[name] is None) == option.is_removed or options[name] is not option
    assert read_help(text) == options


def test_a_flood_of_text_is_cut_off() -> None:
    flood = "--option-{} N   text\n"
    text = "".join(flood.format(number) for number in range(200_000))
    begin = time.process_time()

    options = read_help(text)

    assert time.process_time() - begin < 10
    assert len(text) > 2 * MAX_HELP
    assert 0 < sum(len(option.text) for option in options.options) <= MAX_HELP
