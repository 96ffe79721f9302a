"""Which model a request names, and the same request with another name.

A body may be a form with an hour of sound in it. So what is large is searched where it lies,
through a memory map, and a name is replaced in its place; every other byte stays as it came. That
is why no parser of a library does this: none tells where in the body a value stands.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import UnsupportedOperation
from typing import IO, cast

from gpumanager.errors import BadRequest
from gpumanager.upstream.proxy import Inbound
from gpumanager.upstream.splice import Spliced

WHOLE_BYTES = 1024 * 1024
"""A body up to this size is read whole. A larger one of JSON is only searched for its model: that
it is JSON to its end is left to the consumer."""

LONGEST_NAME = 512
"""Characters of a model's name."""

_LONGEST_TOKEN = 6 * LONGEST_NAME + 1000
"""Of JSON: a longer text is no name, whatever escapes it is written with."""

_HEAD_BYTES = 16 * 1024
"""Of one part of a form; real ones have two hundred."""

_BOUNDARY = re.compile(r'\bboundary=(?:"([^"\r\n]{1,70})"|([^\s;",]{1,70}))', re.IGNORECASE)
_NAME = re.compile(
    rb'(?i:content-disposition)[ \t]*:[^\r\n]*;[ \t]*name="?model"?[ \t]*(?:;|\r\n|$)'
)
_MARK = re.compile(rb'["{}\[\],:]')
_BACKSLASH = ord("\\")
_NESTED_MARK = re.compile(rb'["{}\[\]]')
_FIRST_WINDOW_BYTES = 256
_WINDOW_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ModelField:
    """The model that a body names, None if it names none, and where the value stands in it: bytes
    from `start` to `end`, the quotes of JSON included. In a small body of JSON that is looked for
    only when somebody wants to replace it: `end` is 0."""

    model: str | None
    start: int = 0
    end: int = 0
    json: bool = True


def find_model(inbound: Inbound) -> ModelField:
    """The model that a request names. Raises BadRequest if that cannot be told: the body is neither
    a JSON object nor a form, or its `model` is no text."""
    given = {name.lower(): value for name, value in inbound.headers}
    content_type = given.get("content-type", "")
    if (coding := given.get("content-encoding", "identity").strip().lower()) not in (
        "",
        "identity",
    ):
        raise BadRequest(
            f"the body is compressed (Content-Encoding: {coding[:32]}), so the model that it names "
            "cannot be read: send it as it is"
        )
    form = content_type.lower().lstrip().startswith("multipart/")
    if inbound.body is None or not inbound.length:
        raise BadRequest("the request has no body, so it names no model")
    body, at = inbound.body, inbound.body.tell()
    try:
        if inbound.length <= WHOLE_BYTES:
            data = body.read(inbound.length)
            return _in_form(data, content_type) if form else _in_small_json(data)
        with _mapped(body) as mapped:
            return _in_form(mapped, content_type) if form else _in_json(mapped)
    finally:
        body.seek(at)


def read_json(inbound: Inbound) -> object:
    """What a body of JSON says, None if it is none, or is larger than `WHOLE_BYTES`."""
    body, length = inbound.body, inbound.length
    if body is None or not length or length > WHOLE_BYTES:
        return None
    at = body.tell()
    try:
        said: object = json.loads(body.read(length))
    except (ValueError, RecursionError):
        return None
    finally:
        body.seek(at)
    return said


def with_model(inbound: Inbound, field: ModelField, name: str) -> Inbound:
    """The request with another model's name in it, its length mended. It has to name one."""
    if inbound.body is None or inbound.length is None:
        return inbound
    if not field.end:
        at = inbound.body.tell()
        field = _in_json(inbound.body.read(inbound.length))
        inbound.body.seek(at)
    piece = json.dumps(name).encode() if field.json else name.encode()
    body = Spliced(inbound.body, inbound.length, start=field.start, end=field.end, piece=piece)
    return replace(inbound, body=cast("IO[bytes]", body), length=body.size)


def _mapped(body: IO[bytes]) -> mmap.mmap:
    try:
        return mmap.mmap(body.fileno(), 0, access=mmap.ACCESS_READ)
    except (AttributeError, UnsupportedOperation):  # some other server's input: no file
        data = body.read()
        mapped = mmap.mmap(-1, len(data))
        mapped.write(data)
        return mapped


def _in_small_json(data: bytes) -> ModelField:
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "malformed"
        raise BadRequest(f"the body is no JSON: {reason}") from None
    if not isinstance(said, dict):
        raise BadRequest("the body must be a JSON object")
    if said.get("model") in (None, ""):
        return ModelField(None)
    if not isinstance(said["model"], str):
        raise BadRequest("'model' must be a text")
    return ModelField(_fits(said["model"]))


def _in_json(data: bytes | mmap.mmap) -> ModelField:
    """The last `model` of the outermost object: with two of them that is the one that counts for
    the usual parsers."""
    if not re.match(rb"(?:\xef\xbb\xbf)?\s*\{", data):
        raise BadRequest("the body must be a JSON object, in UTF-8")
    depth, key, awaits_value, found = 0, b"", False, ModelField(None)
    for start, end in _tokens(data):
        text = data[start:end] if end - start <= _LONGEST_TOKEN else b'"'
        if text in b"{[":
            if depth == 1 and awaits_value and _is_model(key):
                raise BadRequest("'model' must be a text")
            depth, awaits_value = depth + 1, False
        elif text in b"}]":
            depth -= 1
        elif depth == 1 and text == b":":
            awaits_value = True
        elif depth == 1 and text == b",":
            awaits_value, key = False, b""
        elif depth == 1 and not awaits_value:
            key = text
        elif depth == 1 and _is_model(key):
            found = ModelField(_name(text) or None, start, end)
    if depth:
        raise BadRequest("the body is no JSON: it ends within an object")
    return found


def _is_model(key: bytes) -> bool:
    return key == b'"model"' or (b"\\" in key and _text(key) == "model")


def _name(text: bytes) -> str:
    name = _text(text) if len(text) > 1 else "m" * (LONGEST_NAME + 1)  # see _LONGEST_TOKEN
    if name is None:
        raise BadRequest("'model' must be a text")
    return _fits(name)


def _text(token: bytes) -> str | None:
    try:
        return str(json.loads(token))
    except ValueError:
        return None


def _tokens(data: bytes | mmap.mmap) -> Iterator[tuple[int, int]]:
    """Where the texts and the signs of JSON begin and end. Numbers and words are passed over, and
    below the outermost object colons and commas, of which there may be millions."""
    at = depth = 0
    while mark := (_MARK if depth == 1 else _NESTED_MARK).search(data, at):
        start, at = mark.start(), mark.end()
        depth += (mark[0] in b"{[") - (mark[0] in b"}]")
        while mark[0] == b'"':
            at = _find(data, b'"', at) + 1
            if not at:
                raise BadRequest("the body is no JSON: it ends within a text")
            backslashes, before = 0, at - 2
            while before > start and data[before] == _BACKSLASH:
                backslashes, before = backslashes + 1, before - 1
            if backslashes % 2 == 0:
                break
        yield start, at


def _find(data: bytes | mmap.mmap, piece: bytes, start: int, most: int | None = None) -> int:
    """As `bytes.find`, in the next `most` bytes, which is many times as fast as a map's own."""
    end = len(data) if most is None else min(len(data), start + most)
    at, window = start, _FIRST_WINDOW_BYTES  # what is near is found without copying much
    while at < end:
        found = data[at : at + window + len(piece) - 1].find(piece)
        if found >= 0:
            return at + found
        at, window = at + window, min(8 * window, _WINDOW_BYTES)
    return -1


def _in_form(data: bytes | mmap.mmap, content_type: str) -> ModelField:
    """The part `model` of a form, wherever it stands. Clients send it before their file or behind
    it, so a large part is only searched for its end where neither is so."""
    given = _BOUNDARY.search(content_type)
    if given is None:
        raise BadRequest("the form's Content-Type has no boundary")
    line = b"\r\n--" + (given[1] or given[2]).encode("latin-1")
    at = -2 if data[: len(line) - 2] == line[2:] else _find(data, line, 0)
    if at == -1:
        raise BadRequest("the body is no form: its boundary is not in it")
    found, large = _forward(data, line, at, near=True)
    if found is None and large is not None:
        found = _backward(data, line, large)
        if found is None:
            found, _ = _forward(data, line, large, near=False)
    return found or ModelField(None)


def _forward(
    data: bytes | mmap.mmap, line: bytes, at: int, *, near: bool
) -> tuple[ModelField | None, int | None]:
    """The part `model` behind the boundary at `at`; `near`: only up to the first large part, whose
    boundary is the second result."""
    while data[at + len(line) : at + len(line) + 2] != b"--":
        begin = at + len(line)
        head_end = data.find(b"\r\n\r\n", begin, begin + _HEAD_BYTES)
        if head_end < 0:
            raise BadRequest("the form is cut off, or a part of it has no head")
        end = _find(data, line, head_end + 2, _WINDOW_BYTES if near else None)
        if end < 0 and near and len(data) - head_end > _WINDOW_BYTES:
            return None, at
        if end < 0:
            raise BadRequest("the form is cut off")
        found = _in_part(data, begin, head_end, end)
        if found is not None:
            return found, None
        at = end
    return None, None


def _backward(data: bytes | mmap.mmap, line: bytes, stop: int) -> ModelField | None:
    """The part `model` among the small ones at the form's end, none of them before `stop`."""
    first = max(stop, len(data) - _WINDOW_BYTES)
    tail = data[first:]
    end = tail.rfind(line)
    while (at := tail.rfind(line, 0, max(end, 0))) >= 0:
        begin = at + len(line)
        head_end = tail.find(b"\r\n\r\n", begin, min(end, begin + _HEAD_BYTES))
        if head_end >= 0:
            found = _in_part(data, first + begin, first + head_end, first + end)
            if found is not None:
                return found
        end = at
    return None


def _in_part(data: bytes | mmap.mmap, begin: int, head_end: int, end: int) -> ModelField | None:
    """The value of a part, if that is `model`: its head begins at `begin`."""
    if not _NAME.search(data[begin : head_end + 2]):
        return None
    start = head_end + 4
    if end - start > 4 * LONGEST_NAME:
        raise BadRequest(f"a model's name has at most {LONGEST_NAME} characters")
    try:
        name = data[start:end].decode()
    except UnicodeDecodeError:
        raise BadRequest("'model' must be a text in UTF-8") from None
    return ModelField(_fits(name) or None, start, end, json=False)


def _fits(name: str) -> str:
    if len(name) > LONGEST_NAME:
        raise BadRequest(f"a model's name has at most {LONGEST_NAME} characters")
    return name
