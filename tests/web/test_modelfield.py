"""Which model a body names, and the same body with another."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from typing import IO, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumanager.errors import BadRequest
from gpumanager.upstream.proxy import Inbound
from gpumanager.web import modelfield
from gpumanager.web.modelfield import find_model, with_model

FORM = "multipart/form-data; boundary=xYz"


def inbound(body: bytes | IO[bytes], content_type: str = "application/json") -> Inbound:
    file = io.BytesIO(body) if isinstance(body, bytes) else body
    length = len(body) if isinstance(body, bytes) else file.seek(0, io.SEEK_END)
    file.seek(0)
    return Inbound("POST", "", [("Content-Type", content_type)], file, length, "r1")


def read(request: Inbound) -> bytes:
    assert request.body is not None
    return request.body.read()


def form(*parts: tuple[str, bytes]) -> bytes:
    body = b""
    for name, value in parts:
        file = "" if name == "model" else '; filename="a.wav"'
        body += f'--xYz\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        body += value + b"\r\n"
    return body + b"--xYz--\r\n"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.just("model"), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.text(max_size=6), json_values, max_size=4),
    st.text(min_size=1, max_size=20),
    st.text(max_size=20),
    st.booleans(),
    st.booleans(),
)
def test_only_the_name_of_the_outermost_object_changes(
    rest: dict[str, Any], model: str, new: str, ascii_only: bool, large: bool
) -> None:
    said = {**rest, "model": model}
    body = json.dumps(said, ensure_ascii=ascii_only, indent=2 if large else None).encode(
        "utf-8", "surrogatepass"
    )
    request = inbound(body)
    field = modelfield._in_json(body) if large else find_model(request)
    assert field.model == model
    changed = with_model(request, field, new)
    answer = read(changed)
    assert json.loads(answer.decode("utf-8", "surrogatepass")) == {**said, "model": new}
    assert changed.length == len(answer)


def test_nothing_else_of_the_bytes_changes() -> None:
    body = b'{ "n": 1.0e2,\t"model" : "a\\u00e9" ,"x":{"model":"inner"}, "s":"{\\"model\\":1}" }'
    changed = read(with_model(inbound(body), find_model(inbound(body)), "b"))
    assert changed == body.replace(b'"a\\u00e9"', b'"b"')


@pytest.mark.parametrize("padding", [0, modelfield.WHOLE_BYTES])
def test_a_key_and_a_text_may_be_escaped(padding: int) -> None:
    body = b'{"s": "\\\\", "t": "\\"", "mod\\u0065l": "a", "x": "' + b"x" * padding + b'"}'
    request = inbound(body)
    field = find_model(request)
    assert field.model == "a"
    assert json.loads(read(with_model(request, field, "b")))["model"] == "b"


@pytest.mark.parametrize("padding", [0, modelfield.WHOLE_BYTES])
@pytest.mark.parametrize(
    "body", [b'{"x": ""}', b'{"model": null}', b'{"model": ""}', b'{"x": {"model": "inner"}}']
)
def test_a_body_may_name_none(body: bytes, padding: int) -> None:
    assert find_model(inbound(body[:-1] + b',"y":"' + b"y" * padding + b'"}')).model is None


@pytest.mark.parametrize("padding", [0, modelfield.WHOLE_BYTES])
def test_a_mark_of_the_byte_order_does_no_harm(padding: int) -> None:
    body = b'\xef\xbb\xbf {"model": "a", "x": "' + b"x" * padding + b'"}'
    request = inbound(body)
    assert read(with_model(request, find_model(request), "b")) == body.replace(b'"a"', b'"b"')


def test_another_encoding_than_utf_8_is_left_as_it_is() -> None:
    request = inbound('{"model": "a"}'.encode("utf-16"))
    field = find_model(request)
    assert field.model == "a"
    with pytest.raises(BadRequest, match="in UTF-8"):
        with_model(request, field, "b")


def test_a_compressed_body_is_said_to_be_one() -> None:
    body = gzip.compress(b'{"model": "a"}')
    request = inbound(body)
    request.headers.append(("Content-Encoding", "gzip"))
    with pytest.raises(BadRequest, match=r"compressed .*gzip.*: send it as it is"):
        find_model(request)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "no body"),
        (b"hello", "no JSON"),
        (b'{"model": "a"', "no JSON"),
        (b'["model"]', "JSON object"),
        (b'{"model": 3}', "must be a text"),
        (b'{"model": ["a"]}', "must be a text"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (json.dumps({"model": "m" * 10_000}).encode(), "at most 512 characters"),
    ],
)
def test_a_body_that_cannot_be_told_is_refused(body: bytes, why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        find_model(inbound(body))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"[1" + b" " * modelfield.WHOLE_BYTES, "JSON object"),
        (b'{"model": 3, "x": "' + b"x" * modelfield.WHOLE_BYTES + b'"}', None),
        (b'{"model": {"a": 1}, "x": "' + b"x" * modelfield.WHOLE_BYTES + b'"}', "must be a text"),
        (b'{"model": "a", "x": "' + b"x" * modelfield.WHOLE_BYTES + b'"', "ends within an object"),
        (b'{"model": "a", "x": "' + b"x" * modelfield.WHOLE_BYTES, "ends within a text"),
        (b'{"model": "' + b"m" * modelfield.WHOLE_BYTES + b'"}', "at most 512"),
    ],
)
def test_a_large_one_too(body: bytes, why: str | None) -> None:
    if why is None:
        assert find_model(inbound(body)).model is None  # the consumer will say what is wrong
        return
    with pytest.raises(BadRequest, match=why):
        find_model(inbound(body))


@pytest.mark.parametrize(
    "inner",
    [
        b'"' + b'\\"' * 2_000_000 + b'"',
        b'["' + b'","' * 1_000_000 + b'"]',
        b"[" + b"1," * 4_000_000 + b"1]",
    ],
    ids=["escapes", "texts", "numbers"],
)
@pytest.mark.timeout(20)
def test_what_it_takes_grows_with_the_length_only(inner: bytes) -> None:
    """With the square of it each would take many minutes."""
    request = inbound(b'{"x": ' + inner + b', "model": "a"}')
    field = find_model(request)
    assert (field.model, field.end - field.start) == ("a", 3)


def test_a_form_names_it_before_and_after_its_file() -> None:
    sound = b"RIFF\r\n--xY\r\nno boundary" * 1000
    for body in (
        form(("model", b"whisper-1"), ("file", sound)),
        form(("file", sound), ("language", b"en"), ("model", b"whisper-1")),
    ):
        request = inbound(body, FORM)
        field = find_model(request)
        assert field.model == "whisper-1"
        changed = with_model(request, field, "base.en")
        assert read(changed) == body.replace(b"whisper-1", b"base.en")
        assert changed.length == len(body) - 2


def test_a_model_behind_a_gigabyte_is_found_without_reading_that_into_memory() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b'--xYz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n')
        file.seek(1024**3, io.SEEK_CUR)  # a hole: takes no room on the disk
        file.write(b'\r\n--xYz\r\nContent-Disposition: form-data; name="model"\r\n\r\nw\r\n--xYz--')
        request = inbound(cast("IO[bytes]", file), FORM)
        field = find_model(request)
        assert field.model == "w"
        changed = with_model(request, field, "large-v3")
        assert changed.body is not None
        assert request.length is not None
        changed.body.seek(request.length - 40)
        assert b"\r\n\r\nlarge-v3\r\n--xYz--" in changed.body.read()


@pytest.mark.parametrize("where", range(4))
def test_a_form_of_large_parts_names_it_wherever_it_stands(where: int) -> None:
    large = ("file", b"x" * (modelfield._WINDOW_BYTES + 100))
    parts = [large, ("prompt", b"y"), large]
    parts.insert(where, ("model", b"whisper-1"))
    request = inbound(form(*parts), FORM)
    field = find_model(request)
    assert field.model == "whisper-1"
    assert read(with_model(request, field, "w")) == form(*parts).replace(b"whisper-1", b"w")
    assert find_model(inbound(form(large, ("prompt", b"y"), large), FORM)).model is None


def test_an_unquoted_name_and_a_quoted_boundary_will_do() -> None:
    body = b"--a b\r\ncontent-disposition:form-data; name=model\r\n\r\nw\r\n--a b--"
    assert find_model(inbound(body, 'multipart/form-data; boundary="a b"')).model == "w"


def test_a_form_may_name_none() -> None:
    assert find_model(inbound(form(("file", b"x")), FORM)).model is None
    assert find_model(inbound(form(("model", b"")), FORM)).model is None


@pytest.mark.parametrize(
    ("body", "content_type", "why"),
    [
        (b"x", "multipart/form-data", "no boundary"),
        (b"hello", FORM, "its boundary is not in it"),
        (b"--xYz\r\nContent-Disposition: form-data; name=model\r\n\r\nw", FORM, "cut off"),
        (form(("file", b"x" * 2**21))[:-9], FORM, "cut off"),
        (b"--xYz\r\nw\r\n--xYz--", FORM, "cut off, or a part of it has no head"),
        (form(("model", b"m" * 10_000)), FORM, "at most 512"),
        (form(("model", b"\xff")), FORM, "UTF-8"),
    ],
)
def test_a_form_that_cannot_be_told_is_refused(body: bytes, content_type: str, why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        find_model(inbound(body, content_type))
