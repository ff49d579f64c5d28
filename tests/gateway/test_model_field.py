"""Which model a body asks for."""

from __future__ import annotations

import json
import time
import tracemalloc
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.gateway.model_field import UnreadableBody, form_field, model_field, taken_apart
from magi_agent.gateway.senses import NOTHING, needed

SCALARS = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text() | st.integers()
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("model"), inner, max_size=4),
)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model":"a"}', "a"),
        (b' \r\n\t{ "model" : "a" , "x":1}', "a"),
        (b'\xef\xbb\xbf{"model":"a"}', "a"),
        (b'{"messages":[{"model":"no"}],"model":"a"}', "a"),
        (b'{"x":{"model":"no"},"y":"model","model":"a"}', "a"),
        (b'{"x":"\\"model\\":\\"no\\"","model":"a"}', "a"),
        (b'{"x":"\\\\","model":"a"}', "a"),
        (b'{"mod\\u0065l":"a"}', "a"),
        (b'{"model":"no","model":"a"}', "a"),
        (b'{"model":"\\u00e4\\/b"}', "ä/b"),
        ('{"model":"größe"}'.encode(), "größe"),
        (b"{}", None),
        (b'{"prompt":"x"}', None),
        (b'{"models":"x","Model":"y"}', None),
    ],
)
def test_the_name_is_found(body: bytes, name: str | None) -> None:
    assert model_field(body).name == name
    # A large body is looked at in another way.
    assert model_field(b" " * 20_000 + body.removeprefix(b"\xef\xbb\xbf")).name == name


@pytest.mark.parametrize(
    ("body", "wants_stream"),
    [
        (b'{"stream":true}', True),
        (b'{"stream": true }', True),
        (b'{"stream":false}', False),
        (b'{"stream":"true"}', False),
        (b'{"x":{"stream":true}}', False),
        (b'{"stream":true,"stream":false}', False),
        (b'{"stream":null,"model":"a"}', False),
    ],
)
def test_whether_the_answer_comes_piece_by_piece(body: bytes, wants_stream: bool) -> None:
    assert model_field(body).wants_stream is wants_stream
    assert model_field(b" " * 20_000 + body).wants_stream is wants_stream
    # Who names a model is answered without looking at all of it.
    named = body[:-1] + b',"model":"a"}'
    assert model_field(named).wants_stream is wants_stream


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"model"',
        b"null",
        b"{",
        b'{"model":"a"',
        b'{"model":"a',
        b'{"model":"a\\"}',
        b'{"model":5}',
        b'{"model":null}',
        b'{"model":""}',
        b'{"model":["a"]}',
        b'{"model":{"a":1}}',
        b'{"model":"\\x"}',
        b'{"model":"\xff"}',
        b'{"model":}',
        b'{"model":"' + b"x" * 2000 + b'"}',
        b"[" * 3_000_000,
    ],
)
def test_a_body_that_says_it_in_no_way_is_refused(body: bytes) -> None:
    for sent in (body, b" " * 20_000 + body):
        with pytest.raises(UnreadableBody):
            model_field(sent)


def test_another_name_takes_its_place_and_nothing_else_changes() -> None:
    body = b'{"a" : 1.50, "model" :\n"old \\u00e4", "z":[ 1 ,2]}'
    assert model_field(body).renamed(body, 'new "1"') == b'{"a" : 1.50, "model" :\n"new \\"1\\"", "z":[ 1 ,2]}'
    assert model_field(body).renamed(body, "old ä") is body
    assert model_field(b"{}").renamed(b"{}", "new") == b"{}"


@given(
    st.dictionaries(st.text() | st.just("model"), JSON, max_size=6), st.text(min_size=1, max_size=200), st.booleans()
)
def test_it_is_what_a_parser_finds(document: dict[str, object], name: str, is_first: bool) -> None:
    document.pop("model", None)
    document = {"model": name, **document} if is_first else {**document, "model": name}
    for indent in (None, 1):
        for ascii_only in (True, False):
            body = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")
            for sent in (body, body[:-1] + b" " * 20_000 + b"}"):
                found = model_field(sent)
                assert found.name == name
                assert json.loads(found.renamed(sent, "other")) == {**document, "model": "other"}


def test_a_large_body_takes_little_time_and_no_memory() -> None:
    image = b'{"messages":[{"content":"' + b"A" * 30_000_000 + b'"}],"model":"a"}'
    escapes = b'{"prompt":"' + b'\\"\\n' * 5_000_000 + b'","model":"a"}'
    for body in (image, escapes):
        tracemalloc.start()
        began = time.thread_time()
        assert model_field(body).name == "a"
        # Some milliseconds a megabyte, on a machine that may be busy.
        assert time.thread_time() - began < 3
        assert tracemalloc.get_traced_memory()[1] < 1_000_000 + len(body) * (body is escapes)
        tracemalloc.stop()


FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    b'name="model"\r\n\r\nno\r\n--xy\r\n'
    b'%s--xyz\r\ncontent-disposition:form-data; name="other"\r\n\r\nmodel\r\n--xyz--\r\n'
)


def test_what_has_more_parts_than_the_loop_may_stand_still_for_is_not_taken_apart() -> None:
    few, many = (b'{"model":"auto","image":[%b0]}' % (b"1," * number) for number in (1_000, 2_100_000))
    assert len(taken_apart(few)["image"]) == 1_001
    assert needed("/v1/chat/completions", few) == NOTHING
    for look in (taken_apart, partial(needed, "/v1/chat/completions")):
        with pytest.raises(UnreadableBody, match="name one"):
            look(many)
    # Whoever names a model is not kept from sending a text with as many.
    assert model_field(b'{"model":"a","content":"%b"}' % (b"1," * 2_100_000)).name == "a"


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n', "whisper"),
        (b'--xyz\r\nX: y\r\nCONTENT-DISPOSITION: form-data; x=y; name="model"\r\n\r\n w \r\n', "w"),
        (b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\n\r\n', None),
        (b'--xyz\r\nContent-Disposition: form-data; name="models"\r\n\r\nwhisper\r\n', None),
        (b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"x" * 2000 + b"\r\n", None),
        (b"", None),
    ],
)
def test_a_form_names_its_model_in_a_field(part: bytes, name: str | None) -> None:
    assert form_field(FORM % part, "xyz").name == name


@pytest.mark.parametrize("body", [b"", b"--xyz", b"--xyz\r\nX: y", b"--xyz\r\nX: y\r\n\r\nno end", b"--xyz--"])
def test_what_is_no_whole_form_names_none(body: bytes) -> None:
    assert form_field(body, "xyz").name is None


@pytest.mark.parametrize(
    ("value", "wants"), [(b"true", True), (b" true\r\n", True), (b"false", False), (b"", False), (b"x" * 2000, False)]
)
def test_a_form_says_whether_it_wants_a_stream(value: bytes, wants: bool) -> None:
    stream = b'--xyz\r\nContent-Disposition: form-data; name="stream"\r\n\r\n%s\r\n' % value
    model = b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n'
    for parts in (stream + model, model + stream):
        field = form_field(FORM % parts, "xyz")
        assert (field.name, field.wants_stream) == ("a", wants)
        assert field.renamed(FORM % parts, "b") == FORM % parts


def test_a_form_of_more_parts_than_anybody_needs_is_not_read_to_its_end() -> None:
    began = time.thread_time()
    with pytest.raises(UnreadableBody):
        form_field(b"--x\r\n\r\n\r\n" * 6_000_000, "x")
    assert time.thread_time() - began < 0.5


def test_a_boundary_that_is_no_text_is_one_nevertheless() -> None:
    said = (FORM % b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n').replace(b"xyz", b"x\xff")
    assert form_field(said, "x\udcff").name == "a"
