"""Consumers that break: scripts for a ScriptedConsumer, each one way of going wrong."""

from __future__ import annotations

import threading

from tests.support.sockets import Connection, Received

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


def refuses(connection: Connection, _: Received) -> None:
    connection.sock.close()


def says_nothing(connection: Connection, _: Received) -> None:
    connection.wait_closed(3)


def resets(connection: Connection, _: Received) -> None:
    connection.reset()


def half_a_head(connection: Connection, _: Received) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\nX-Half: ")


def drips_its_head(connection: Connection, _: Received) -> None:
    pause = threading.Event()
    for byte in HEAD * 3:
        connection.send(bytes([byte]))
        pause.wait(0.05)


def speaks_nonsense(connection: Connection, _: Received) -> None:
    connection.send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


def oversized_head(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n")


def promises_more(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"Content-Length: 100\r\n\r\nonly this")


def breaks_a_chunk(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\nzz\r\n")


def stalls_in_its_body(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"Content-Length: 100\r\n\r\nonly this")
    connection.wait_closed(3)


def goes_on_for_ever(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while not connection.wait_closed(0.1):
        connection.send(b"1\r\nx\r\n")


def upgrades_unasked(connection: Connection, _: Received) -> None:
    connection.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")


def gives_two_lengths(connection: Connection, _: Received) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab")


def sends_no_header_line(connection: Connection, _: Received) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\nBad Name: x\r\nContent-Length: 2\r\n\r\nab")


def omits_the_last_chunk(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n")


def sends_a_nonsense_chunk(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\nzz\r\n")


def resets_in_its_body(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"\r\nonly this")
    connection.sock.settimeout(0.2)
    connection.wait_closed(0.2)
    connection.reset()
