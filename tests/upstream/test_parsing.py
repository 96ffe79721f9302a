"""What comes as an answer, and what is read from it: beside h11, which is stricter about heads and
was written by others."""

from __future__ import annotations

import time

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumanager.upstream.parsing import (
    LARGEST_HEAD_BYTES,
    LARGEST_TRAILERS_BYTES,
    LONGEST_CHUNK_LINE,
    BrokenAnswer,
    ChunkedBody,
    HeadReader,
    InvalidAnswer,
    body_of,
)

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def read(data: bytes, pieces: int = 1, method: str = "POST") -> tuple[int, bytes]:
    """Status and content of an answer that comes in pieces of that size (1: one by one; 0: at once)
    and ends with the connection. Raises what is wrong with it."""
    step = pieces or len(data) or 1
    parts = [data[at : at + step] for at in range(0, len(data), step)]
    head = HeadReader()
    rest = None
    while rest is None:
        rest = head.feed(parts.pop(0) if parts else b"")
    body = body_of(method, head.status, head.fields)
    content = body.feed(rest) if rest else b""
    while body.fault is None and body.left != 0:
        content += body.feed(parts.pop(0) if parts else b"")
    if body.fault is not None:
        raise body.fault
    return head.status, content


def by_h11(data: bytes, method: str = "POST") -> tuple[int, bytes]:
    """The same by h11. Raises RemoteProtocolError."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=LARGEST_HEAD_BYTES)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "it")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    connection.receive_data(b"")
    status, content = 0, b""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            content += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return status, content
        elif isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("closed")


# -- one that is right, however it is cut --------------------------------------------------------

GOOD = {
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "chunks": (CHUNKED + b"2\r\nok\r\n1a\r\n" + b"z" * 26 + b"\r\n0\r\n\r\n", b"ok" + b"z" * 26),
    "capital": (CHUNKED + b"A\r\n0123456789\r\n000\r\n\r\n", b"0123456789"),
    "extensions": (CHUNKED + b'2;a=b;c="d e"\r\nok\r\n0 ; x\r\n\r\n', b"ok"),
    "spaces": (CHUNKED + b"2  \r\nok\r\n0 \t\r\n\r\n", b"ok"),
    "trailers": (CHUNKED + b"2\r\nok\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"ok"),
    "until close": (b"HTTP/1.1 200 OK\r\n\r\nok\r\n", b"ok\r\n"),
    "1.0": (b"HTTP/1.0 200\r\n\r\nok", b"ok"),
    "interim": (b"HTTP/1.1 103 X\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\n\r\nok", b"ok"),
    "204": (b"HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
    "304": (b"HTTP/1.1 304 Same\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
    "304, length": (b"HTTP/1.1 304 Same\r\nContent-Length: 5\r\n\r\n", b""),
    "bare LF": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", b"ok"),
    "surplus": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok, and more", b"ok"),
    "same lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok", b"ok"),
}


@pytest.mark.parametrize("pieces", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("name", GOOD)
def test_a_good_answer_is_read_whole_wherever_it_is_cut(name: str, pieces: int) -> None:
    data, content = GOOD[name]
    assert read(data, pieces)[1] == content


@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked", "X: y"])
def test_head_has_no_body_whatever_its_head_says(framing: str) -> None:
    data = f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode()
    assert read(data, method="HEAD") == (200, b"")


# -- one that is not -----------------------------------------------------------------------------

LENGTHS = ["-2", "+2", "abc", "2, 3", "", "0x2", "2.0", "2 2", "9" * 5000, "2,", "\u0662"]
BAD_HEADS = {
    **{f"length {text[:9]!r}": f"HTTP/1.1 200 OK\r\nContent-Length: {text}" for text in LENGTHS},
    "two lengths": "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3",
    "folded length": "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n 3",
    "bare CR in a length": "HTTP/1.1 200 OK\r\nContent-Length: 2\r",
    "gzip, chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked",
    "gzip": "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip",
    "two codings": "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
    "chunked twice": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked",
    "chunked, NUL": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\0",
    "vtab": "HTTP/1.1 200 OK\r\nTransfer-Encoding: \x0bchunked",
    "a space in a name": "HTTP/1.1 200 OK\r\nContent Length: 2",
    "no colon": "HTTP/1.1 200 OK\r\nContent-Length",
    "no name": "HTTP/1.1 200 OK\r\n: 2",
    "folded first": "HTTP/1.1 200 OK\r\n X: 2",
    "lone CR for an empty line": "HTTP/1.1 200 OK\r\nX: y\r\n\r",
    "upgrade": "HTTP/1.1 101 Switching Protocols",
    "0.9": "ok",
    "2": "HTTP/2 200 OK",
    "status": "HTTP/1.1 20 OK",
    "status 0": "HTTP/1.1 000 OK",
    "arabic status": "HTTP/1.1 \u0662\u0660\u0660 OK",
    "line before": "\r\nHTTP/1.1 200 OK",
    "101 fields": "HTTP/1.1 200 OK" + 101 * "\r\nX: y",
    "64 KiB": "HTTP/1.1 200 OK\r\nX: " + "y" * LARGEST_HEAD_BYTES,
    "64 KiB of folds": "HTTP/1.1 200 OK\r\nX: y" + "\r\n z" * (LARGEST_HEAD_BYTES // 4),
    "1001 interim": "HTTP/1.1 102 Processing\r\n\r\n" * 1001 + "HTTP/1.1 200 OK",
}


@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_bad_head_is_refused(name: str, pieces: int) -> None:
    with pytest.raises(InvalidAnswer):
        read(BAD_HEADS[name].encode() + b"\r\n\r\nok", pieces)


BAD_CHUNKS = {
    "no hex": b"zz\r\n",
    "negative": b"-5\r\nhello\r\n0\r\n\r\n",
    "plus": b"+5\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "empty": b"\r\nhello\r\n0\r\n\r\n",
    "space before": b" 5\r\nhello\r\n0\r\n\r\n",
    "bare LF": b"5\nhello\r\n0\r\n\r\n",
    "17 digits": b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    "longer than it said": b"5\r\nhello!\r\n0\r\n\r\n",
    "LF behind it": b"5\r\nhello\n0\r\n\r\n",
    "CR behind it": b"5\r\nhello\r0\r\n\r\n",
    "NUL in an extension": b"5;a\0\r\nhello\r\n0\r\n\r\n",
    "CR in an extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "line without end": b"5;" + b"a" * LONGEST_CHUNK_LINE,
    "digits without end": b"0" * LONGEST_CHUNK_LINE,
    "framing without content": 20 * (b"1;" + b"a" * 4000 + b"\r\nx\r\n"),
    "trailer without colon": b"0\r\nzz\r\n\r\n",
    "trailer with LF": b"0\r\nA: b\n\r\n",
    "trailers without end": b"0\r\n" + LARGEST_TRAILERS_BYTES * b"A: b\r\n",
    "trailer without end": b"0\r\nA: " + LARGEST_TRAILERS_BYTES * b"b",
}


@pytest.mark.parametrize("pieces", [0, 1, 5])
@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_bad_chunks_are_refused(name: str, pieces: int) -> None:
    with pytest.raises(InvalidAnswer):
        read(CHUNKED + BAD_CHUNKS[name], pieces)


@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("name", ["length", "chunks", "capital", "extensions", "trailers"])
def test_one_that_is_cut_short_anywhere_is_broken(name: str, pieces: int) -> None:
    data = GOOD[name][0]
    for end in range(len(data)):
        with pytest.raises(BrokenAnswer):
            read(data[:end], pieces)


@pytest.mark.parametrize("end", [b"00000", b"0\r\n", b"0\r\n\r", b"0\r\nA: b\r\n"])
def test_the_end_of_the_connection_is_not_the_last_chunk(end: bytes) -> None:
    with pytest.raises(BrokenAnswer):
        read(CHUNKED + end, 0)


def test_what_was_good_comes_before_what_is_wrong() -> None:
    body = ChunkedBody()
    assert body.feed(b"5\r\nhello\r\n2\r\n, \r\nzz\r\n") == b"hello, "
    assert isinstance(body.fault, InvalidAnswer)


@pytest.mark.parametrize("said", ["a\0b", "x\x1b[2J", "a\rb", "\u00fc"])
def test_what_a_head_says_is_kept_as_it_came(said: str) -> None:
    head = HeadReader()
    assert head.feed(f"HTTP/1.1 200 It {said}\r\nX-A: {said}\r\n\r\n".encode("latin-1")) == b""
    assert (head.status, head.reason, head.fields) == (200, f"It {said}", [("X-A", said)])


def test_a_folded_field_is_one() -> None:
    head = HeadReader()
    assert head.feed(b"HTTP/1.1 200 OK\r\nX-A: one\r\n\t two\r\nX-B: y\r\n\r\n") == b""
    assert head.fields == [("X-A", "one two"), ("X-B", "y")]


# -- what it costs -------------------------------------------------------------------------------


def test_chunks_of_one_byte_cost_time_by_their_number_only() -> None:
    """Quadratic would be a hundred times as long; a machine under load is not."""

    def seconds(count: int) -> float:
        body = ChunkedBody()
        data = b"1\r\nx\r\n" * count
        began = time.thread_time()
        assert len(body.feed(data)) == count
        return time.thread_time() - began

    few = min(seconds(2000) for _ in range(5))
    assert seconds(20_000) < 40 * few


# -- beside h11 ----------------------------------------------------------------------------------

BITS = st.sampled_from(
    [
        *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 204 No\r\n", b"HTTP/1.0 200 OK\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n"),
        *(b"Content-Length: 5\r\n", b"Content-Length: 5, 5\r\n", b"Content-Length: +5\r\n"),
        *(b"X: y\r\n", b" folded\r\n", b"X : y\r\n", b"X\r\n", b"\r\n", b"\r", b"\n", b"\0"),
        *(b"5\r\nhello\r\n", b"0\r\n\r\n", b"5;x=y\r\nhello\r\n", b"5\r\nhell\r\n", b"00\r\n\r\n"),
        *(b"-5\r\n", b"zz\r\n", b"hello", b"0\r\nA: b\r\n\r\n", b"5 \r\nhello\r\n"),
    ]
)
ANSWERS = st.builds(
    lambda status, fields, body: b"".join([status, *fields, b"\r\n", *body]),
    st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 304 Same\r\n", b"HTTP/1.0 200 OK\r\n"]),
    st.lists(BITS, max_size=3),
    st.lists(BITS, max_size=5),
)


@given(ANSWERS, st.sampled_from([0, 1, 3]), st.sampled_from(["POST", "HEAD"]))
def test_what_h11_takes_for_an_answer_is_read_the_same(
    data: bytes, pieces: int, method: str
) -> None:
    try:
        theirs = by_h11(data, method)
    except h11.RemoteProtocolError:
        return
    assert read(data, pieces, method) == theirs


@given(ANSWERS, st.sampled_from([0, 1, 3]))
def test_chunks_that_h11_refuses_are_refused(data: bytes, pieces: int) -> None:
    whole = CHUNKED + data.partition(b"\r\n\r\n")[2]
    try:
        ours = read(whole, pieces)
    except (InvalidAnswer, BrokenAnswer):
        return
    assert ours == by_h11(whole)
