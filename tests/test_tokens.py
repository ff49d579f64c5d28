"""Tokens and the file that keeps their hashes."""

from __future__ import annotations

import ast
import hmac
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from magi_agent import tokens
from magi_agent.errors import ConfigurationError
from magi_agent.token_file import TokenFile
from magi_agent.tokens import (
    MAX_RATE,
    MAX_TOKENS,
    Token,
    Tokens,
    TokensUnreadable,
    digest_of,
    is_name,
    is_secret,
    line_of,
    new_secret,
    parse_tokens,
    read_tokens,
    token_of,
    written,
)
from magi_agent.vocabulary import TokenScope

HERE = Path("/etc/magi-agent/tokens")
HASH = f"sha256:{'0f' * 32}"

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", fullmatch=True).filter(is_name)
ends = st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(UTC)).map(  # noqa: DTZ001
    lambda moment: moment.replace(microsecond=0)
)
digests = st.binary(min_size=32, max_size=32)
rates = st.none() | st.integers(1, MAX_RATE)
newer_keys = st.lists(st.from_regex(r"(?!rate)[a-z][a-z0-9_-]{0,31}=[!-~]{1,20}", fullmatch=True), max_size=2).map(
    tuple
)
any_token = st.builds(
    Token, names, st.sampled_from(TokenScope), st.binary(min_size=32, max_size=32), st.none() | ends, rates, newer_keys
)
many = st.lists(any_token, max_size=20, unique_by=(lambda token: token.name, lambda token: token.digest))
blanks = st.text(" \t", min_size=1, max_size=3)
remarks = st.one_of(
    st.just(""), blanks, st.text(st.characters(exclude_characters="\n", codec="utf-8")).map("  # {}".format)
)


@given(many, st.data())
def test_what_is_written_is_read_whatever_is_written_between(kept: list[Token], data: st.DataObject) -> None:
    lines = []
    for token in kept:
        lines.append(data.draw(remarks))
        line = data.draw(blanks).join(line_of(token).split(" "))
        lines.append(data.draw(blanks) + line + data.draw(blanks) + data.draw(st.sampled_from(["", "\r"])))

    assert parse_tokens("\n".join(lines), HERE) == Tokens(tuple(kept))
    assert parse_tokens("\n".join(line_of(token) for token in kept) + "\n", HERE) == Tokens(tuple(kept))


@given(st.text())
def test_any_text_is_tokens_or_refused_with_one_line_that_quotes_nothing_of_it(text: str) -> None:
    try:
        parse_tokens(text, HERE)
    except ConfigurationError as error:
        assert re.match(rf"{HERE}:\d+: ", error.message)  # noqa: PT017  # either outcome is right
        assert "\n" not in error.message  # noqa: PT017


@given(st.sampled_from([1, 2, 3]), st.text(st.characters(codec="ascii", exclude_characters="\n"), min_size=1))
def test_a_field_that_is_no_good_is_refused_and_never_shown(place: int, word: str) -> None:
    secret = new_secret()
    fields = ["front", "read", HASH, "2027-01-31T00:00:00Z"]
    fields[place] = f"{word}{secret}"
    # That would be a newer agent's.
    assume(place != 3 or "=" not in word)
    with pytest.raises(ConfigurationError) as refused:
        parse_tokens(" ".join(fields), HERE)
    assert secret not in refused.value.message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("front", "wants a name, a scope"),
        ("front read", "wants a name, a scope"),
        (f"front read {HASH} 2027-01-31T00:00:00Z more", "wants a name, a scope"),
        (f"-front read {HASH}", "the name wants"),
        (f"{'x' * 65} read {HASH}", "the name wants"),
        (f"fr/ont read {HASH}", "the name wants"),
        (f"magi_front read {HASH}", "the name wants"),
        (f"front write {HASH}", "the scope of front must be one of read, infer, admin"),
        (f"front READ {HASH}", "the scope of front must be one of read, infer, admin"),
        (f"front read {HASH[:-1]}", "the hash of front wants"),
        (f"front read {HASH}0", "the hash of front wants"),
        (f"front read md5:{'0f' * 16}", "the hash of front wants"),
        (f"front read {'0f' * 32}", "the hash of front wants"),
        (f"front read {HASH} never", "the end of front must be a time in UTC"),
        *(
            (f"front read {HASH} rate={word}", "the rate of front must be")
            for word in ("", "0", "1000001", "6.5", "-1")
        ),
        (f"front read {HASH} rate=6 2027-01-31T00:00:00Z", "wants a name, a scope"),
        (f"front read {HASH} 2027-01-31", "the end of front must be a time in UTC"),
        (f"front read {HASH} 2027-01-31T00:00:00", "the end of front must be a time in UTC"),
        (f"front read {HASH} 0001-01-01T00:00:00+23:00", "the end of front must be a time in UTC"),
    ],
)
def test_a_bad_line_is_named_with_what_it_wants(line: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_tokens(f"# tokens\n\n{line}\n", HERE)

    assert refused.value.message.startswith(f"{HERE}:3: {said}")


def test_a_token_with_a_key_that_is_not_known_lets_nobody_in_and_the_others_hold(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    newer = f"newer infer {HASH} 2999-01-31T00:00:00Z hosts=10.0.0.0/8 rate=6 models=a,b"
    path.write_text(f"{newer}\nfront read sha256:{'ab' * 32}\n")
    path.chmod(0o640)

    found = read_tokens(path)

    token, front = found.tokens
    assert (token.name, token.rate, token.unknown) == ("newer", 6, ("hosts=10.0.0.0/8", "models=a,b"))
    assert front.unknown == ()
    (said,) = found.not_understood
    assert said.startswith(f"{path}: the token newer has a key that this agent does not know")
    assert "10.0.0.0" not in f"{said} {token}"
    # What is changed here keeps it.
    TokenFile(path).limit("newer", 7)
    TokenFile(path).remove("front")
    assert token_of(path.read_text()) == replace(token, rate=7)
    assert TokenFile(path).remove("newer").name == "newer"


@pytest.mark.parametrize("word", ["hosts=", "Hosts=a", "=a", "hosts", f"{'h' * 33}=a", "rate=6 rate=7"])
def test_what_is_no_key_is_a_mistake(word: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_tokens(f"front read {HASH} 2999-01-31T00:00:00Z {word}", HERE)


def test_an_end_in_another_zone_is_the_same_moment() -> None:
    token = token_of(f"front read {HASH} 2027-01-31T02:30:00+02:30")

    assert token is not None
    assert token.until == datetime(2027, 1, 31, tzinfo=timezone(timedelta(0)))
    assert line_of(token) == f"front read {HASH} 2027-01-31T00:00:00Z"
    assert token.has_ended(datetime(2027, 1, 31, tzinfo=UTC))
    assert not token.has_ended(datetime(2027, 1, 30, 23, 59, 59, tzinfo=UTC))


def test_each_name_and_each_token_stands_once() -> None:
    other = f"sha256:{'ab' * 32}"
    with pytest.raises(ConfigurationError, match=r":2: there is another token called front; each name once"):
        parse_tokens(f"front read {HASH}\nfront read {other}\n", HERE)
    with pytest.raises(ConfigurationError, match=r":3: ops is the same token as front; each token once"):
        parse_tokens(f"front read {HASH}\n\nops admin {HASH.upper().replace('SHA', 'sha')}\n", HERE)


def test_there_is_a_most_of_tokens_and_of_bytes(tmp_path: Path) -> None:
    lines = [line_of(Token(f"t{number}", TokenScope.READ, number.to_bytes(32, "big"))) for number in range(300)]
    assert len(parse_tokens("\n".join(lines[:MAX_TOKENS]), HERE)) == MAX_TOKENS
    with pytest.raises(ConfigurationError, match=rf":{MAX_TOKENS + 1}: more than {MAX_TOKENS} tokens"):
        parse_tokens("\n".join(lines), HERE)
    path = tmp_path / "tokens"
    path.write_text("#" * 65_536)
    path.chmod(0o640)
    assert len(read_tokens(path).tokens) == 0
    for size in (65_537, 1 << 40):
        os.truncate(path, size)
        with pytest.raises(ConfigurationError, match="larger than 65536 bytes"):
            read_tokens(path)


@pytest.mark.parametrize("between", ["\r", "\v", "\f", "\x1c", "\x85", "\u2028"])
def test_only_the_end_of_a_line_ends_a_remark(between: str) -> None:
    hidden = f"# a remark{between}intruder admin {HASH}"

    assert len(parse_tokens(f"{hidden}\n", HERE)) == 0
    with pytest.raises(ConfigurationError, match=":2: wants a name"):
        parse_tokens(f"{hidden}\nfront read\n", HERE)


def test_a_file_that_is_not_there_holds_none(tmp_path: Path) -> None:
    found = read_tokens(tmp_path / "tokens")

    assert (len(found.tokens), found.is_there, found.problems) == (0, False, ())


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o660, 0o400])
def test_who_else_of_the_group_may_use_it_is_the_operators_matter(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"front read {HASH}\n")
    path.chmod(mode)

    assert read_tokens(path).problems == ()


def test_what_is_no_file_or_no_text_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path, said in (
        (pipe, "is no file"),
        (tmp_path, "is no file|cannot be read"),
        (Path("/dev/null"), "is no file"),
        (tmp_path / "bytes", "is not UTF-8 text"),
        (tmp_path / "bytes" / "tokens", "cannot be read: Not a directory"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            read_tokens(path)


@pytest.fixture
def nobody() -> Iterator[None]:
    """Be a user who may not read root's files."""
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_what_may_not_be_read_says_which_command_allows_it(nobody: None) -> None:
    with pytest.raises(TokensUnreadable) as refused:
        read_tokens(Path("/etc/shadow"))

    assert "chgrp magi-agent /etc/shadow && chmod 0640 /etc/shadow" in refused.value.message


def test_a_token_is_256_random_bits_with_a_mark() -> None:
    made = {new_secret() for _ in range(1000)}

    assert len(made) == 1000
    for secret in made:
        assert re.fullmatch(r"magi_[A-Za-z0-9_-]{43}", secret)
        assert is_secret(secret)
    assert digest_of("magi_x") == sha256(b"magi_x").digest()


@pytest.mark.parametrize("secret", ["", " ", "a b", "a\tb", "ü", "a=b", "x" * 513, "a,b", '"a"', "\udcff"])
def test_what_has_not_the_form_of_a_token(secret: str) -> None:
    assert not is_secret(secret)


def test_every_hash_is_compared_in_constant_time_wherever_the_right_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [new_secret() for _ in range(5)]
    held = Tokens(tuple(Token(f"t{n}", TokenScope.READ, digest_of(secret)) for n, secret in enumerate(secrets)))
    compared: list[tuple[bytes, bytes]] = []

    def counted(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(tokens, "compare_digest", counted)
    for position, secret in enumerate([*secrets, new_secret()]):
        compared.clear()
        found = held.find(secret)
        assert (found.name if found else None) == (f"t{position}" if position < 5 else None)
        assert compared == [(token.digest, digest_of(secret)) for token in held]


def test_nothing_compares_hashes_in_another_way() -> None:
    """Not by ``==``, not by looking one up: what takes longer for a better guess tells the guess."""
    tree = ast.parse(inspect.getsource(tokens.Tokens.find).lstrip().replace("\n    ", "\n"))

    assert not any(isinstance(node, ast.Compare | ast.Subscript | ast.Break) for node in ast.walk(tree))
    assert sum(isinstance(node, ast.Return) for node in ast.walk(tree)) == 1


@given(ends)
def test_a_moment_is_written_as_it_is_read(moment: datetime) -> None:
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", written(moment))
    assert datetime.fromisoformat(written(moment)) == moment
