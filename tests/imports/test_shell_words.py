"""Words come apart as a real shell takes them apart, and what a shell would put in place is told."""

import shlex
import subprocess
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_agent.imports.imported import InvalidImport
from magi_agent.imports.shell_words import commands, words

PLAIN = [
    "llama-server -m x.gguf -c 4096",
    "a 'b c' d",
    "a 'b'\"c\"d",
    r"a\ b c",
    r'"a \"b\" \\ \n \$x" c',
    "a \\\n  b \\\n\tc",
    "a # b 'c",
    "a#b c",
    "'' a \"\"",
    r"'a\b' \'",
    '"a\\\nb"',
    "a\\\nb",
    "-ot 'blk\\.(0|1)\\.ffn=CPU' -x",
    '\'{"a": 1, "b": [2]}\'',
    '"a\nb" c',
    "x=1 y='2 3' z",
    "~a/b 5% a:b a@b +c",
]


@pytest.mark.parametrize("text", PLAIN)
def test_as_a_real_shell(text: str) -> None:
    real = subprocess.run(
        ["/bin/sh", "-c", f"printf '%s\\0' {text}"], check=True, capture_output=True, text=True, timeout=20
    ).stdout.split("\0")[:-1]
    [command] = commands(text)
    said = [word.text for word in command.words]
    assert [word.replace("~a/b", real[0]) if word == "~a/b" else word for word in said] == real
    assert not any(word.expands for word in command.words)


@pytest.mark.parametrize(
    ("text", "expands"),
    [
        ("a $X b", "$X"),
        ("a ${X:-y z} b", "${X:-y z}"),
        ('a "x $X y" b', "$X"),
        ("a $(nproc --all) b", "$(nproc --all)"),
        ("a x$(echo $(date) )y b", "$(echo $(date) )"),
        ("a `nproc --all` b", "`nproc --all`"),
        ("a $'x\\ny' b", "$'x\\ny'"),
        ("a {x,y} b", "{x,y}"),
        ("a {1..3} b", "{1..3}"),
        ("a $1 b", "$1"),
    ],
)
def test_what_would_be_put_in_place_is_told(text: str, expands: str) -> None:
    [command] = commands(text)
    assert next(word for word in command.words if word.expands).expands == expands


@pytest.mark.parametrize("text", ["a '$X' b", r"a \$X b", r'a "\$X" b', "a '{x,y}' b", "a 5$ b", "a {x} b"])
def test_what_is_quoted_is_only_text(text: str) -> None:
    [command] = commands(text)
    assert not any(word.expands for word in command.words)
    assert len(command.words) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a && b || c; d & e\nf", [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]]),
        ("a -x\n-y 1\n  --z\n\nb", [["a", "-x", "-y", "1", "--z"], ["b"]]),
        ("a ^\r\n -b `\n -c \\\r\n -d", [["a", "-b", "-c", "-d"]]),
        ("# c\n\n#!/bin/sh\na", [["a"]]),
        ("a > x 2>&1 < y &>> z b", [["a", "b"]]),
        ("a 12>x", [["a"]]),
        ("C:\\a\\b.exe -m D:\\x\\y.gguf", [["C:\\a\\b.exe", "-m", "D:\\x\\y.gguf"]]),
    ],
)
def test_commands(text: str, expected: list[list[str]]) -> None:
    assert [[word.text for word in command.words] for command in commands(text)] == expected


def test_redirections_and_pipes_are_told() -> None:
    first, second = commands("a > x 2>&1 | tee y")
    assert first.redirections == ["> x", "2>&1"]
    assert (first.piped, second.piped) == (False, True)


def test_lines_are_told() -> None:
    [command] = commands("\na \\\n b 'c\n' \\\n d")
    assert [word.line for word in command.words] == [2, 3, 3, 5]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb 'c", 2),
        ('a\n\nb "c', 3),
        ("a $(b", 1),
        ("a `b", 1),
        ("(a)", 1),
        ("a\nf() { b; }", 2),
        ("a << EOF\nx\nEOF", 1),
        ("a >", 1),
        ("a\nb > ; c", 2),
        ("case x in a) b;; esac", 1),
        ("diff <(a) b", 1),
    ],
)
def test_what_is_more_than_commands_is_refused(text: str, line: int) -> None:
    with pytest.raises(InvalidImport) as refusal:
        commands(text)
    assert refusal.value.line == line


def test_without_a_shell_only_braced_names_wait_to_be_filled_in() -> None:
    found = words("a | b > c $X ${Y}/z `d` $(e) \\\n f\n# g 'h\ni")
    assert [word.text for word in found] == ["a", "|", "b", ">", "c", "$X", "${Y}/z", "`d`", "$(e)", "f", "i"]
    assert [word.expands for word in found if word.expands] == ["${Y}"]


@settings(max_examples=300)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=5))
def test_what_is_quoted_comes_back(said: list[str]) -> None:
    assert [[word.text for word in command.words] for command in commands(shlex.join(said))] == ([said] if said else [])
    assert [word.text for word in words(shlex.join(said))] == said


@settings(max_examples=500)
@given(st.text("ab -'\"\\$(){}`|&;<>#=,\n\r\t^0.") | st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (commands, words):
        with suppress(InvalidImport):
            read(text)
