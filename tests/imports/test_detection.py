"""Any text is read as what it is, or refused with a reason; nothing else happens, whatever stands in it."""

import json
import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magi_agent.imports.detection import import_text, origin_of, read_import
from magi_agent.imports.imported import MAX_IMPORT_BYTES, InvalidImport, Origin


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("llama-server -m x.gguf", Origin.COMMAND_LINE),
        ("#!/bin/sh\nif [ -f x ]; then\nllama-server -m x.gguf\nfi", Origin.COMMAND_LINE),
        ("docker run ghcr.io/ggml-org/llama.cpp:server -m x", Origin.COMMAND_LINE),
        ("-c 1", Origin.COMMAND_LINE),
        ("models:\n  a: {cmd: x}", Origin.LLAMA_SWAP),
        ("# c\nlogLevel: info\n\n'models' :\n  a:\n    cmd: |\n      [x]\n", Origin.LLAMA_SWAP),
        ('{"models": {"a": {"cmd": "x"}}}', Origin.LLAMA_SWAP),
        ("version = 1\n", Origin.ROUTER_PRESET),
        ("; c\n[a]\nc = 1", Origin.ROUTER_PRESET),
        ("  [*] ; all\n  c = 1", Origin.ROUTER_PRESET),
        ("[ggml-org/x-GGUF:Q8_0]\r\nc = 1", Origin.ROUTER_PRESET),
        ('{"version": 1, "models": {}}', Origin.EXPORT),
        ('\n {"models": [], "version": 7, "profiles": []}', Origin.EXPORT),
    ],
)
def test_what_a_text_is(text: str, origin: Origin) -> None:
    assert origin_of(import_text(text)) is origin


def test_it_is_read_as_that() -> None:
    for text, origin in (
        ("llama-server -m x -c 7 --temp 1", Origin.COMMAND_LINE),
        ("models: {x: {cmd: llama-server -m x -c 7 --temp 1}}", Origin.LLAMA_SWAP),
        ("[x]\nm = x\nc = 7\ntemp = 1", Origin.ROUTER_PRESET),
    ):
        read = read_import(b"\xef\xbb\xbf" + text.encode(), {"--temp"})
        assert read.origin is origin
        [model] = read.models
        assert (model.settings.ctx_size, model.settings.extra_flags) == (7, ("--temp=1",))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"GGUF\x03\x00\x00\x00", "control characters"),
        (b"llama-server\n\n-m \x1b[31mx", "line 3"),
        (b"\x7fELF\x02\x01", "control characters"),
        (b"\x89PNG\r\n", "UTF-8"),
        ("llama-server -m ä".encode("latin-1"), "UTF-8"),
        ("llama-server -m x".encode("utf-16"), "UTF-8"),
        ("llama-server -m \udc80", "UTF-8"),
        (b"llama-server " + b"x" * 10_000_000, "longer"),
        ("x" * (MAX_IMPORT_BYTES + 1), "longer"),
        ('{"version": 1, "models": {}}', "export"),
        ("[Unit]\nDescription=x\n[Service]\nExecStart=llama-server -m x", "ExecStart"),
        ('{"version": 1, "mod', "is it whole"),
        ("{", "is it whole"),
        ('{"version": 99}', "neither an export"),
        ("services:\n  llama:\n    command: -m x", "compose"),
        ("{" * 100_000, "."),
        ('{"models": ' + "[" * 100_000, "."),
        ("hello world", "no llama-server command"),
        ("llama-server -m 'x", "not closed"),
    ],
)
def test_what_is_refused(data: bytes | str, reason: str) -> None:
    with pytest.raises(InvalidImport, match=reason):
        read_import(data)


@pytest.mark.parametrize(
    "text",
    [
        "llama-server " + "-c 1 " * 200_000,
        "llama-server " + "-ot x " * 20_000,
        "llama-server " + "--frob x " * 20_000,
        "llama-server -m " + "$(" * 300_000,
        "llama-server -m " + "\\" * 1_000_000,
        "llama-server -m '" + "x" * 1_000_000 + "'",
        'llama-server -m "' + "x$y" * 300_000 + '"',
        "llama-server " + "{,x" * 300_000,
        "sudo " * 200_000 + "llama-server",
        "bash -c " * 100_000,
        "[a]\n" + "c = 1\n" * 150_000,
        "[a]\nc = " + " " * 1_000_000 + "x",
        "".join(f"[{number}]\n" for number in range(150_000)),
        "[" * 1_000_000,
        "models: " + "{a: " * 200_000,
        "models: {a: {cmd: '" + "${PORT}" * 100_000 + "'}}",
        "models:\n" + "".join(f"  m{number}: {{cmd: llama-server}}\n" for number in range(20_000)),
    ],
    ids=lambda text: text[:24],
)
def test_the_longest_texts_take_no_time_to_speak_of(text: str) -> None:
    begun = time.process_time()
    with suppress(InvalidImport):
        read_import(text[:MAX_IMPORT_BYTES])
    assert time.process_time() - begun < 20


@pytest.mark.parametrize(
    ("begin", "repeated", "end"),
    [
        ("llama-server -m x -c {", ",", ""),
        ("llama-server -m x ", "{,", ""),
        ("llama-server -m x", "\n", "\n[x"),
        ("version", "\n", "x"),
        ("[x]", " ", "x"),
        ("[y]\n[", " ", "x"),
        ("[x]\nc = a", " ", "b"),
        ("[x]\nc = a", " ;", "b"),
        ("[x]\nc", " ", "b"),
        ("llama-server -m x -", "1", "x"),
        ("llama-server -m x -mu http", "://a", ""),
        ("llama-server -m x -mu http://", "@", " "),
        ("llama-server -m x -zz ", "a_key='", ""),
    ],
)
def test_the_time_grows_with_the_length_only(begin: str, repeated: str, end: str) -> None:
    """Four times the text takes some four times as long, and not sixteen times."""

    def seconds(count: int) -> float:
        text = begin + repeated * (count // len(repeated)) + end
        taken = []
        for _ in range(3):
            begun = time.process_time()
            with suppress(InvalidImport):
                read_import(text)
            taken.append(time.process_time() - begun)
        return min(taken)

    assert seconds(20_000) < 8 * max(seconds(5_000), 0.04)


PIECES = st.sampled_from(
    [
        *(
            "llama-server",
            "docker",
            "run",
            "sudo",
            "bash -c",
            "'",
            '"',
            "\\",
            "\n",
            " ",
            "$X",
            "$(",
            ")",
            "`",
            "|",
            "&",
        ),
        *(";", ">", "<", "{", "}", ",", "=", "-", "--", "-c", "-ngl", "-fa", "--api-key", "--lora-scaled", "-m", "-a"),
        *("1", "all", "auto", "x.gguf", "/m/x.gguf:1", "models:", "  a:", "cmd:", "ttl:", "- ", "[", "]", "[a]", "*"),
        *("&x", "*x", "version", "model", "mmap", "true", "#", "${PORT}", "macros:", "env:", "aliases:", "\t", "é"),
    ]
)


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(PIECES, max_size=30).map("".join) | st.lists(PIECES, max_size=30).map(" ".join) | st.text() | st.binary()
)
def test_any_text_is_read_or_refused(data: bytes | str) -> None:
    try:
        read = read_import(data)
    except InvalidImport as refusal:
        text = str(refusal)
    else:
        text = "".join(f"{entry}" for model in read.models for entry in (*model.carried, *model.left_out))
    text.encode()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
_KEYS = [
    *("cmd", "env", "aliases", "ttl", "macros", "proxy", "name", "filters", "checkEndpoint", "metadata", "unlisted"),
    *("groups", "hooks", "globalTTL", "apiKeys", "on_startup", "preload", "members", "persistent", "matrix"),
]
_DOCUMENT = st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=5)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(_DOCUMENT, st.dictionaries(st.text(max_size=5), _DOCUMENT | _JSON, min_size=1, max_size=2), _JSON)
def test_any_llama_swap_document_is_read_or_refused(
    top: dict[str, object], models: dict[str, object], env: object
) -> None:
    models["real"] = {"cmd": "llama-server -m ${x}", "env": env, "aliases": env, "macros": env, "ttl": env}
    with suppress(InvalidImport):
        read_import(json.dumps({**top, "models": models}))
