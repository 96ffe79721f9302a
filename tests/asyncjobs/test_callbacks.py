"""Callbacks: real sockets, a store on disk, and a clock that is moved by hand."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from gpumanager.asyncjobs.callbacks import AGAIN_S, Callbacks
from gpumanager.asyncjobs.model import AsyncJob, Callback, Submission
from gpumanager.asyncjobs.store import Store
from gpumanager.asyncjobs.targets import Resolve, Targets, resolved
from gpumanager.telemetry.events import CallbackSent
from gpumanager.upstream.watcher import Watcher
from tests.support.clock import FakeClock
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually

SECRET = bytes(range(32))


class Receiver:
    """Somebody who is called: answers as `says` says, and keeps what came."""

    def __init__(self, says: bytes = answer(status="204 No Content", headers=())) -> None:
        self.says = says
        self.came: list[Received] = []

    def __call__(self, connection: Connection, received: Received) -> None:
        self.came.append(received)
        connection.send(self.says)


def verified(received: Received) -> Any:
    """The message, as one checks it who knows nothing but Standard Webhooks."""
    name = received.header("webhook-id")
    timestamp = received.header("webhook-timestamp")
    version, _, signed = (received.header("webhook-signature") or "").partition(",")
    mac = hmac.new(SECRET, digestmod=hashlib.sha256)
    for part in (name, ".", timestamp, "."):
        assert part is not None
        mac.update(part.encode())
    mac.update(received.body)
    assert version == "v1"
    assert base64.b64decode(signed) == mac.digest()
    return json.loads(received.body)


class Calling:
    """A store in a folder, and callbacks that are attempted with `turn`."""

    def __init__(
        self,
        folder: Path,
        hosts: Sequence[str],
        clock: FakeClock,
        resolve: Resolve | None = None,
    ) -> None:
        self.events: list[CallbackSent] = []
        self.clock = clock
        self.watcher = Watcher()
        self.store = Store(folder, most_bytes=2**20, most_waiting=10)
        self.store.open()
        self.callbacks = Callbacks(
            self.store,
            targets=Targets(hosts, resolve),
            secret=SECRET,
            shown=lambda job: {
                "id": job.id,
                "state": job.state,
                "ended": "then",
                "callback": job.callback and job.callback.attempts,
            },
            watcher=self.watcher,
            clock=clock,
            emit=self.events.append,  # type: ignore[arg-type]
        )

    def over(self, url: str, state: Any = "done") -> AsyncJob:
        """A job that has ended."""
        submission = Submission(
            "tts", "voice", 5, "me", None, "admin", {}, callback=url, fingerprint="x"
        )
        now = self.clock.now().timestamp()
        job, _ = self.store.submit(submission, self.store.draft(), now)
        ended = self.store.ended(job, state, now)
        assert ended is not None
        return ended

    def kept(self, job: AsyncJob) -> Callback:
        found = self.store.find(job.id)
        assert found is not None
        assert found.callback is not None
        return found.callback

    def close(self) -> None:
        self.callbacks.stop()
        self.store.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def calling(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., Calling]]:
    with ExitStack() as stack:

        def make(*hosts: str, resolve: Resolve | None = None) -> Calling:
            made = Calling(tmp_path / "jobs", hosts, clock, resolve)
            stack.callback(made.close)
            return made

        yield make


@contextmanager
def receiving(says: bytes | None = None) -> Iterator[tuple[Receiver, ScriptedConsumer]]:
    receiver = Receiver() if says is None else Receiver(says)
    with ScriptedConsumer(receiver) as server:
        yield receiver, server


def test_the_end_of_a_job_is_told_once_and_signed(calling: Callable[..., Calling]) -> None:
    with receiving() as (receiver, server):
        it = calling(f"127.0.0.1:{server.port}")
        job = it.over(f"{server.url}/done?of=me")
        assert it.callbacks.turn() == 0.0
        assert it.callbacks.turn() > 0  # nothing more
        (came,) = receiver.came
        assert came.line == b"POST /done?of=me HTTP/1.1"
        assert came.header("content-type") == "application/json"
        assert came.header("webhook-id") == f"msg_{job.id}"
        assert came.header("webhook-timestamp") == str(int(it.clock.now().timestamp()))
        assert verified(came) == {
            "type": "job.done",
            "timestamp": "then",
            "data": {"id": job.id, "state": "done", "ended": "then"},
        }
        assert it.kept(job) == Callback(f"{server.url}/done?of=me", "delivered", 1)
        (event,) = it.events
        assert (event.told, event.host) == ("delivered", f"127.0.0.1:{server.port}")


@pytest.mark.parametrize("state", ["failed", "cancelled", "lost"])
def test_each_end_has_a_type(calling: Callable[..., Calling], state: str) -> None:
    with receiving() as (receiver, server):
        it = calling(f"127.0.0.1:{server.port}")
        it.over(server.url, state)
        it.callbacks.turn()
        assert verified(receiver.came[0])["type"] == f"job.{state}"


def test_a_failed_attempt_is_made_again_later_and_later_and_then_given_up(
    calling: Callable[..., Calling], clock: FakeClock
) -> None:
    with receiving(answer(status="500 Internal Server Error")) as (receiver, server):
        it = calling(f"127.0.0.1:{server.port}")
        job = it.over(server.url)
        for number, seconds in enumerate(AGAIN_S, start=1):
            assert it.callbacks.turn() == 0.0
            assert len(receiver.came) == number
            kept = it.kept(job)
            assert (kept.state, kept.attempts) == ("pending", number)
            assert kept.failure == "it answered 500"
            clock.advance(seconds - 0.5)
            assert 0 < it.callbacks.turn() <= 0.5  # not yet
            assert len(receiver.came) == number
            clock.advance(0.5)
        it.callbacks.turn()
        assert it.kept(job).state == "failed"
        clock.advance(1e6)
        assert it.callbacks.turn() > 0
        assert len(receiver.came) == len(AGAIN_S) + 1
        assert len({each.header("webhook-id") for each in receiver.came}) == 1
        assert len({each.body for each in receiver.came}) == 1
        assert len({each.header("webhook-timestamp") for each in receiver.came}) > 1
        assert all(verified(each) for each in receiver.came)
        told = [each.told for each in it.events]
        assert told == ["retried"] * len(AGAIN_S) + ["failed"]
        assert (it.events[-1].level, it.events[0].level) == ("warning", "info")


def test_a_receiver_that_comes_back_is_told(
    calling: Callable[..., Calling], clock: FakeClock
) -> None:
    with receiving(answer(status="503 Service Unavailable")) as (receiver, server):
        it = calling(f"127.0.0.1:{server.port}")
        job = it.over(server.url)
        it.callbacks.turn()
        receiver.says = answer(b"thanks")
        clock.advance(AGAIN_S[0])
        it.callbacks.turn()
        assert it.kept(job) == Callback(server.url, "delivered", 2)


def test_one_that_is_gone_is_not_called_again(calling: Callable[..., Calling]) -> None:
    with receiving(answer(status="410 Gone")) as (_, server):
        it = calling(f"127.0.0.1:{server.port}")
        job = it.over(server.url)
        it.callbacks.turn()
        assert it.kept(job).state == "failed"


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect"])
def test_a_redirect_is_not_followed(calling: Callable[..., Calling], status: str) -> None:
    with receiving() as (other, elsewhere):
        to = (f"Location: {elsewhere.url}/",)
        with receiving(answer(status=status, headers=to)) as (receiver, server):
            it = calling(f"127.0.0.1:{server.port}", f"127.0.0.1:{elsewhere.port}")
            job = it.over(server.url)
            it.callbacks.turn()
            assert (len(receiver.came), other.came) == (1, [])
            assert it.kept(job).failure == f"it answered {status[:3]}"


def test_a_proxy_of_the_environment_is_not_used(
    calling: Callable[..., Calling], monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as (proxy, between), receiving() as (receiver, server):
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, between.url)
        it = calling(f"127.0.0.1:{server.port}")
        it.over(server.url)
        it.callbacks.turn()
        assert (len(receiver.came), proxy.came) == (1, [])


@pytest.mark.parametrize("address", ["169.254.169.254", "fd00:ec2::254", "fe80::1", "0.0.0.0"])
def test_a_name_that_leads_to_such_an_address_is_not_called(
    calling: Callable[..., Calling], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(socket.socket, "connect", None)  # nobody gets that far
    it = calling("hooks.test", resolve=lambda *_: [address])
    job = it.over("http://hooks.test/")
    it.callbacks.turn()
    assert "never called" in (it.kept(job).failure or "")
    assert it.kept(job).state == "pending"  # another time it may lead elsewhere


def test_the_address_that_was_checked_is_the_one_that_is_called(
    calling: Callable[..., Calling], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads elsewhere a moment later gets nothing from that."""
    asked: list[str] = []

    def resolve(host: str, _port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"]

    def looked_up(*_: object, **__: object) -> object:
        raise AssertionError("the name was looked up a second time")

    with receiving() as (receiver, server):
        it = calling(f"localhost:{server.port}", resolve=resolve)
        it.over(f"http://localhost:{server.port}/")
        monkeypatch.setattr(socket, "getaddrinfo", looked_up)
        it.callbacks.turn()
        assert asked == ["localhost"]
        assert receiver.came[0].header("host") == f"localhost:{server.port}"


def test_the_next_address_is_tried_where_one_is_not_there(
    calling: Callable[..., Calling],
) -> None:
    with receiving() as (receiver, server):
        it = calling(f"localhost:{server.port}", resolve=lambda *_: ["::1", "127.0.0.1"])
        it.over(f"http://localhost:{server.port}/")
        it.callbacks.turn()
        assert len(receiver.came) == 1


def test_a_host_that_is_not_listed_any_more_is_not_called(
    calling: Callable[..., Calling],
) -> None:
    with receiving() as (receiver, server):
        it = calling("elsewhere")
        job = it.over(server.url)
        it.callbacks.turn()
        assert (receiver.came, it.kept(job).state) == ([], "failed")


def test_a_name_that_cannot_be_resolved_is_tried_again(calling: Callable[..., Calling]) -> None:
    def resolve(_host: str, _port: int) -> Sequence[str]:
        raise socket.gaierror(-2, "Name or service not known")

    it = calling("hooks.test", resolve=resolve)
    job = it.over("http://hooks.test/")
    it.callbacks.turn()
    kept = it.kept(job)
    assert kept.state == "pending"
    assert kept.failure == "its host cannot be resolved: Name or service not known"


@pytest.mark.parametrize("name", ["localhost", "other.test"])
def test_the_certificate_has_to_be_that_of_the_name(
    calling: Callable[..., Calling], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    authority = trustme.CA()
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(file)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(tls)
    receiver = Receiver()
    with ScriptedConsumer(receiver, tls=tls) as server:
        it = calling(f"localhost:{server.port}", resolve=lambda *_: ["127.0.0.1"])
        job = it.over(f"https://localhost:{server.port}/")
        it.callbacks.turn()
        if name == "localhost":
            assert verified(receiver.came[0])["type"] == "job.done"
        else:
            assert receiver.came == []
            assert "certificate that is not trusted" in (it.kept(job).failure or "")


def test_a_restart_goes_on_with_what_is_pending(
    calling: Callable[..., Calling], clock: FakeClock
) -> None:
    with receiving(answer(status="500 Internal Server Error")) as (receiver, server):
        host = f"127.0.0.1:{server.port}"
        first = calling(host)
        job = first.over(server.url)
        first.callbacks.turn()
        first.close()
        second = calling(host)
        assert second.kept(job).attempts == 1
        assert 0 < second.callbacks.turn() <= AGAIN_S[0]
        receiver.says = answer()
        clock.advance(AGAIN_S[0])
        second.callbacks.turn()
        assert second.kept(job) == Callback(server.url, "delivered", 2)
        ids = [each.header("webhook-id") for each in receiver.came]
        assert ids == [f"msg_{job.id}"] * 2


def test_an_answer_without_end_is_cut_off_and_its_status_counts(
    calling: Callable[..., Calling],
) -> None:
    cut = threading.Event()

    def endless(connection: Connection, _received: Received) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        try:
            while True:
                connection.send(b"x" * 65536)
        finally:
            cut.set()

    with ScriptedConsumer(endless) as server:
        it = calling(f"127.0.0.1:{server.port}")
        job = it.over(server.url)
        it.callbacks.turn()
        assert it.kept(job).state == "delivered"
        assert cut.wait(PATIENCE_S)


class Silent:
    """Takes a request, and answers nothing until the connection ends."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, connection: Connection, _received: Received) -> None:
        self.asked.set()
        connection.wait_closed()


def test_the_end_of_the_broker_ends_an_attempt_which_is_made_again(
    calling: Callable[..., Calling],
) -> None:
    silent = Silent()
    with ScriptedConsumer(silent) as server:
        it = calling(f"127.0.0.1:{server.port}")
        job = it.over(server.url)
        it.callbacks.wake()
        assert silent.asked.wait(PATIENCE_S)
        names = {each.name for each in threading.enumerate()}
        assert "async-callbacks" in names
        it.callbacks.stop()
        assert "async-callbacks" not in {each.name for each in threading.enumerate()}
        assert it.kept(job) == Callback(server.url)


def test_one_that_hangs_does_not_keep_the_others_waiting(
    calling: Callable[..., Calling], clock: FakeClock
) -> None:
    silent = Silent()
    with ScriptedConsumer(silent) as hanging, receiving() as (receiver, server):
        it = calling(f"127.0.0.1:{hanging.port}", f"127.0.0.1:{server.port}")
        stuck = [it.over(hanging.url) for _ in range(3)]
        it.over(server.url)
        attempt = threading.Thread(target=it.callbacks.turn, name="attempt")
        attempt.start()
        assert silent.asked.wait(PATIENCE_S)
        clock.advance(13)  # more than it takes to the first byte
        it.watcher.sweep()
        attempt.join(PATIENCE_S)
        assert not attempt.is_alive()
        assert "no answer within 10 s" in (it.kept(stuck[0]).failure or "")
        it.callbacks.turn()
        assert len(receiver.came) == 1
        assert it.callbacks.turn() > 0  # the other two of the same URL: later
        assert [it.kept(each).attempts for each in stuck] == [1, 0, 0]
        clock.advance(4 * 13)
        silent.asked.clear()
        again = threading.Thread(target=it.callbacks.turn, name="attempt")
        again.start()
        assert silent.asked.wait(PATIENCE_S)
        it.callbacks.stop()
        again.join(PATIENCE_S)
        assert not again.is_alive()


def test_the_thread_goes_on_by_itself(calling: Callable[..., Calling]) -> None:
    with receiving() as (receiver, server):
        it = calling(f"127.0.0.1:{server.port}")
        jobs = [it.over(server.url) for _ in range(3)]
        it.callbacks.wake()
        eventually(lambda: [it.kept(each).state for each in jobs] == ["delivered"] * 3)
        assert len(receiver.came) == 3


def test_names_of_the_system_are_resolved(calling: Callable[..., Calling]) -> None:
    with receiving() as (receiver, server):
        it = calling(f"localhost:{server.port}", resolve=resolved)
        it.over(f"http://localhost:{server.port}/")
        it.callbacks.turn()
        assert len(receiver.came) == 1
