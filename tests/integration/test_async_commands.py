"""`gpumanager submit`, `jobs`, `result` and `cancel`, against a running broker."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpumanager.cli import main
from gpumanager.keys import ApiKey
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.terminal import Terminal
from tests.support.threads import PATIENCE_S, Outcome, eventually

pytestmark = pytest.mark.timeout(60)

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


class Server:
    """A consumer that answers with a picture; a job with `slow` in it waits for `release`, one with
    `bad` is refused."""

    def __init__(self) -> None:
        self.jobs: list[Received] = []
        self.release = threading.Event()

    def __call__(self, connection: Connection, received: Received) -> None:
        self.jobs.append(received)
        if b"slow" in received.body:
            while not self.release.wait(0.02):
                if connection.wait_closed(0.02):
                    return
        if b"bad" in received.body:
            connection.send(answer(b"no such \x1b[31mmodel", "422 Unprocessable Entity"))
        else:
            connection.send(answer(PNG, headers=("Content-Type: image/png",)))


@pytest.fixture
def server() -> Server:
    return Server()


@contextmanager
def serving(
    server: Server, tmp_path: Path, keys: tuple[ApiKey, ...] = (), **limits: Any
) -> Iterator[LiveBroker]:
    jobs = {"dir": str(tmp_path / "kept"), **limits}
    with (
        ScriptedConsumer(server) as consumer,
        live_broker(config_for(consumer.url, jobs=jobs), keys=keys) as broker,
    ):
        try:
            yield broker
        finally:
            server.release.set()


@pytest.fixture
def broker(server: Server, tmp_path: Path) -> Iterator[LiveBroker]:
    with serving(server, tmp_path) as running:
        yield running


def run(broker: LiveBroker, *words: str, **more: Any) -> Any:
    return CliRunner().invoke(main, [*words, "--url", broker.url], catch_exceptions=False, **more)


def submitted(broker: LiveBroker, *words: str, **more: Any) -> list[Any]:
    done = run(broker, "submit", *words, **more)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def state(broker: LiveBroker, job: Any) -> Any:
    return broker.get(f"/v1/jobs/{job['id']}").json()["state"]


def busy(broker: LiveBroker) -> Any:
    """A job that runs until the consumer is released."""
    (job,) = submitted(broker, "image", '"slow"')
    eventually(lambda: state(broker, job) == "running")
    return job


def test_a_file_is_submitted_many_times_and_each_is_waited_for(
    broker: LiveBroker, server: Server, tmp_path: Path
) -> None:
    graph = tmp_path / "graph.json"
    graph.write_text('{"prompt": {}}')
    jobs = submitted(broker, "image", f"@{graph}", "--count", "5", "--wait")
    assert [job["state"] for job in jobs] == ["done"] * 5
    assert len({job["id"] for job in jobs}) == 5
    assert [job.body for job in server.jobs] == [b'{"prompt": {}}'] * 5
    assert {job.header("content-type") for job in server.jobs} == {"application/json"}


def test_without_wait_it_ends_while_the_job_runs(broker: LiveBroker, server: Server) -> None:
    jobs = submitted(broker, "image", '"slow"', "--count", "2")
    assert [job["ended"] for job in jobs] == [None, None]
    assert not server.release.is_set()


def test_data_comes_from_stdin_a_path_has_a_query_and_headers_are_sent(
    broker: LiveBroker, server: Server
) -> None:
    words = ("-H", "X-Own: mine", "-H", "content-type: text/plain", "--urgency", "1")
    (job,) = submitted(broker, "/v1/image?x=1", "-", *words, "--wait", input="no JSON")
    assert job["urgency"] == 1
    (sent,) = server.jobs
    assert sent.line.split()[1] == b"/api/image?x=1"
    assert (sent.body, sent.header("x-own"), sent.header("content-type")) == (
        b"no JSON",
        "mine",
        "text/plain",
    )


def test_a_files_name_says_what_it_is(broker: LiveBroker, server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "it.png"
    picture.write_bytes(PNG)
    submitted(broker, "image", f"@{picture}", "--wait")
    assert (server.jobs[0].header("content-type"), server.jobs[0].body) == ("image/png", PNG)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("image", "hello"), "the data is no JSON"),
        (("image", "@/nowhere/at.json"), "/nowhere/at.json cannot be read: No such file"),
        (("image", "@"), "cannot be read"),
        (("image", "{}", "-H", "nothing"), "must be 'Name: value' (found 'nothing')"),
        (("image", "{}", "--idempotency-key", "é"), "printable ASCII"),
    ],
)
def test_what_cannot_be_sent_is_told_and_nothing_is(
    broker: LiveBroker, server: Server, words: tuple[str, ...], said: str
) -> None:
    done = run(broker, "submit", *words)
    assert (done.exit_code, said in done.stderr.replace("\n", " ")) == (2, True), done.stderr
    assert broker.get("/v1/jobs").json() == {"jobs": []}


def test_the_same_key_is_the_same_jobs(broker: LiveBroker, server: Server) -> None:
    words = ("image", "{}", "--count", "3", "--idempotency-key", "tonight", "--wait")
    first, again = submitted(broker, *words), submitted(broker, *words)
    assert {job["id"] for job in first} == {job["id"] for job in again}
    assert len(server.jobs) == 3
    other = run(broker, "submit", "image", '"other"', "--idempotency-key", "tonight-2")
    assert (other.exit_code, "(422)" in other.stderr) == (1, True)


def test_a_refusal_says_how_many_were_taken(server: Server, tmp_path: Path) -> None:
    with serving(server, tmp_path, max_waiting=3) as broker:
        busy(broker)
        done = run(broker, "submit", "image", "{}", "--count", "9", "--wait")
        assert done.exit_code == 1
        assert len(done.stdout.splitlines()) == 3
        assert "3 of 9 jobs were taken, then: " in done.stderr
        assert done.stderr.endswith("(503)\n")


def test_a_full_disk_is_told(server: Server, tmp_path: Path) -> None:
    large = tmp_path / "large.bin"
    large.write_bytes(bytes(2**20 + 1))
    with serving(server, tmp_path, max_mib=1) as broker:
        done = run(broker, "submit", "image", f"@{large}")
        assert (done.exit_code, "(507)" in done.stderr) == (1, True)


def test_an_error_in_another_protocol_is_told(broker: LiveBroker) -> None:
    done = run(broker, "submit", "/v1/rerank", '{"model": "x"}')
    assert done.exit_code == 1
    assert "consumer" in done.stderr
    assert done.stderr.endswith("(501)\n")


def test_a_broker_that_keeps_no_jobs_is_told(server: Server) -> None:
    with ScriptedConsumer(server) as consumer, live_broker(config_for(consumer.url)) as other:
        done = run(other, "submit", "image", "{}")
        assert done.exit_code == 1
        assert "/v1/image was answered at once" in done.stderr
        assert "keeps no jobs" in done.stderr


def test_an_answer_that_is_cut_off_is_asked_for_again_under_the_same_key() -> None:
    keys: list[str | None] = []

    def scripted(peer: Connection, received: Received) -> None:
        keys.append(received.header("idempotency-key"))
        if len(keys) > 1:
            headers = ("Preference-Applied: respond-async",)
            peer.send(answer(b'{"id": "it"}', "202 Accepted", headers=headers))

    with ScriptedConsumer(scripted) as other:
        done = CliRunner().invoke(main, ["submit", "image", "{}", "--url", other.url])
    assert (done.exit_code, done.stdout) == (0, '{"id": "it"}\n'), done.output
    assert len(keys) == 2
    assert keys[0] == keys[1] is not None


def test_a_job_that_fails_while_waited_for_is_exit_code_1(broker: LiveBroker) -> None:
    done = run(broker, "submit", "image", '"bad"', "--wait")
    assert (done.exit_code, json.loads(done.stdout)["state"]) == (1, "failed")


def test_what_is_not_over_in_time_is_printed_as_it_is(broker: LiveBroker) -> None:
    done = run(broker, "submit", "image", '"slow"', "--wait", "--timeout", "0.1")
    assert (done.exit_code, json.loads(done.stdout)["ended"]) == (1, None)


def test_a_result_is_written_whole(broker: LiveBroker, tmp_path: Path) -> None:
    (job,) = submitted(broker, "image", "{}")
    out = tmp_path / "out.png"
    out.write_bytes(b"old")
    out.chmod(0o640)
    link = tmp_path / "link.png"
    link.symlink_to(out)
    done = run(broker, "result", job["id"], "-o", str(link), "-i")
    assert (done.exit_code, done.stdout) == (0, ""), done.output
    assert "200 OK\n" in done.stderr
    assert "Content-Type: image/png\n" in done.stderr
    assert out.read_bytes() == PNG
    assert link.is_symlink()
    assert out.stat().st_mode & 0o777 == 0o640
    assert sorted(each.name for each in tmp_path.iterdir()) == ["kept", "link.png", "out.png"]
    assert run(broker, "result", job["id"]).stdout_bytes == PNG
    assert run(broker, "result", job["id"], "-o", "-").stdout_bytes == PNG


def test_a_result_is_waited_for(broker: LiveBroker, server: Server, tmp_path: Path) -> None:
    job = busy(broker)
    early = run(broker, "result", job["id"], "--timeout", "0.1")
    assert (early.exit_code, early.stdout) == (5, "")
    assert "is not over after 0.1 s: it is running" in early.stderr
    out = tmp_path / "out.png"
    waiting = Outcome(lambda: run(broker, "result", job["id"], "-o", str(out)))
    server.release.set()
    assert waiting.result(PATIENCE_S).exit_code == 0
    assert out.read_bytes() == PNG


def test_a_failed_jobs_answer_goes_to_stderr_and_no_file_is_made(
    broker: LiveBroker, tmp_path: Path
) -> None:
    (job,) = submitted(broker, "image", '"bad"')
    out = tmp_path / "out.png"
    done = run(broker, "result", job["id"], "-o", str(out))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"no such ?[31mmodel\njob {job['id']}: failed (422)\n"
    assert not out.exists()


def test_exit_codes_tell_cancelled_and_lost(
    server: Server, tmp_path: Path, broker: LiveBroker
) -> None:
    running = busy(broker)
    (waiting,) = submitted(broker, "image", "{}")
    assert run(broker, "cancel", waiting["id"]).stdout == f"job {waiting['id']} is cancelled\n"
    done = run(broker, "result", waiting["id"])
    assert (done.exit_code, f"job {waiting['id']}: cancelled" in done.stderr) == (3, True)
    done = run(broker, "cancel", running["id"])
    assert (done.exit_code, f"job {running['id']} is " in done.stdout) == (0, True)
    assert run(broker, "result", running["id"]).exit_code == 3


def test_a_lost_job_is_exit_code_4() -> None:
    job = {"id": "it", "state": "lost", "ended": "2026-01-01T00:00:00Z", "status": None}
    gone = b'{"error": "job_lost", "message": "the broker ended while the job ran"}'

    def scripted(peer: Connection, received: Received) -> None:
        if b"/result" in received.line:
            peer.send(answer(gone, "502 Bad Gateway"))
        else:
            peer.send(answer(json.dumps(job).encode()))

    with ScriptedConsumer(scripted) as other:
        done = CliRunner().invoke(main, ["result", "it", "--url", other.url])
    assert (done.exit_code, "the broker ended" in done.stderr) == (4, True)


def test_a_result_that_breaks_off_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    job = {"id": "it", "state": "done", "ended": "2026-01-01T00:00:00Z", "status": 200}

    def scripted(peer: Connection, received: Received) -> None:
        if b"/result" in received.line:
            peer.send(answer(bytes(100_000))[:-1])
        else:
            peer.send(answer(json.dumps(job).encode()))

    out = tmp_path / "out"
    out.write_bytes(b"old")
    with ScriptedConsumer(scripted) as other:
        done = CliRunner().invoke(main, ["result", "it", "-o", str(out), "--url", other.url])
    assert (done.exit_code, "broke off" in done.stderr) == (1, True)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_device_is_written_to_and_stays_one(broker: LiveBroker, tmp_path: Path) -> None:
    (job,) = submitted(broker, "image", "{}")
    assert run(broker, "result", job["id"], "-o", "/dev/null").exit_code == 0
    assert Path("/dev/null").is_char_device()
    done = run(broker, "result", job["id"], "-o", str(tmp_path / "none" / "out.png"))
    assert (done.exit_code, "out.png cannot be written: No such" in done.stderr) == (1, True)


def test_a_job_that_is_not_there_is_told(broker: LiveBroker) -> None:
    for command in ("result", "cancel"):
        done = run(broker, command, "nothing")
        assert (done.exit_code, "no asynchronous job nothing" in done.stderr) == (1, True)


def test_the_jobs_are_shown_of_the_states_that_are_wanted(broker: LiveBroker) -> None:
    assert run(broker, "jobs").stdout == "there are no such jobs\n"
    (bad,) = submitted(broker, "image", '"bad"', "--count", "1")
    assert run(broker, "result", bad["id"]).exit_code == 1
    running = busy(broker)
    waiting = submitted(broker, "tts", "{}", "--count", "3")
    shown = run(broker, "jobs").stdout.splitlines()
    assert [line.split()[0] for line in shown] == [
        "id",
        *(job["id"] for job in reversed(waiting)),
        running["id"],
        bad["id"],
    ]
    assert max(map(len, shown)) <= 80
    assert shown[-1].split()[1:5] == ["failed", "(422)", "image", "mvoice"]
    assert "1." in shown[3]
    words = ("jobs", "--json", "--state", "waiting", "--state", "running")
    found = json.loads(run(broker, *words).stdout)["jobs"]
    assert [job["state"] for job in found] == ["waiting"] * 3 + ["running"]
    assert len(json.loads(run(broker, *words, "--limit", "2").stdout)["jobs"]) == 2
    late = run(broker, "cancel", waiting[0]["id"], bad["id"])
    assert (late.exit_code, "is over already: failed" in late.stdout) == (1, True)


def test_pages_are_put_together(broker: LiveBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumanager.cli.jobs.MOST_A_PAGE", 2)
    jobs = submitted(broker, "image", "{}", "--count", "5", "--wait")
    found = json.loads(run(broker, "jobs", "--json").stdout)["jobs"]
    assert {job["id"] for job in found} == {job["id"] for job in jobs}
    assert len(json.loads(run(broker, "jobs", "--json", "--limit", "3").stdout)["jobs"]) == 3


def test_a_clients_key_sees_its_own_only(server: Server, tmp_path: Path) -> None:
    keys = tuple(ApiKey(name, name * 20, role="client") for name in ("ann", "bob"))
    with serving(server, tmp_path, keys) as broker:
        (job,) = submitted(broker, "image", "{}", "--key", "ann" * 20)
        assert job["id"] in run(broker, "jobs", "--key", "ann" * 20).stdout
        assert job["id"] not in run(broker, "jobs", "--key", "bob" * 20).stdout
        for words in (("jobs",), ("result", job["id"]), ("submit", "image", "{}")):
            assert "--key" in run(broker, *words).stderr
        assert run(broker, "result", job["id"], "--key", "ann" * 20).stdout_bytes == PNG


@contextmanager
def terminal(broker: LiveBroker, words: str) -> Iterator[Terminal]:
    command = f"{sys.executable} -m gpumanager {words} --url {broker.url}"
    shown = Terminal(command, 24, 80)
    try:
        yield shown
    finally:
        shown.program.close(force=True)


def test_in_a_terminal_ids_stand_above_a_bar(broker: LiveBroker, server: Server) -> None:
    with terminal(broker, "submit image '\"slow\"' --count 3 --wait") as shown:
        shown.shows("0/3")
        jobs = [job["id"] for job in reversed(broker.get("/v1/jobs").json()["jobs"])]
        assert shown.lines()[:3] == jobs
        broker.delete(f"/v1/jobs/{jobs[2]}")
        server.release.set()
        shown.shows("2 done")
        lines = [line for line in shown.lines() if line]
        assert f"{jobs[2]} cancelled" in lines
        assert "3/3" not in " ".join(lines)  # the bar is gone
        assert shown.ends() == 1


def test_jobs_are_watched_until_q(broker: LiveBroker, server: Server) -> None:
    job = busy(broker)
    with terminal(broker, "jobs --watch --interval 0.2") as shown:
        shown.shows("running")
        assert any(job["id"] in line for line in shown.lines())
        submitted(broker, "image", "{}", "--count", "30")
        shown.shows("earlier jobs")
        server.release.set()
        eventually(lambda: state(broker, job) == "done")
        shown.shows("done")
        shown.program.send("q")
        assert shown.ends() == 0


def test_a_terminal_gets_no_bytes_that_are_no_text(broker: LiveBroker, server: Server) -> None:
    job = busy(broker)
    with terminal(broker, f"result {job['id']}") as shown:
        shown.shows("mvoice: running for")
        server.release.set()
        shown.shows("it is image/png, and no text: -o FILE writes it")
        assert shown.ends() == 2


def test_a_broker_that_restarts_meanwhile_is_waited_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: Iterator[bytes | None] = iter(
        [
            b'{"id": "it", "state": "waiting", "ended": null}',
            None,
            b'{"id": "it", "state": "done", "ended": "2026-01-01T00:00:00Z", "status": 200}',
            b"result",
        ]
    )
    monkeypatch.setattr("gpumanager.cli.following.AGAIN_S", 0.01)

    def scripted(peer: Connection, _: Received) -> None:
        if (said := next(answers)) is not None:
            peer.send(answer(said))

    with ScriptedConsumer(scripted) as other:
        done = CliRunner().invoke(main, ["result", "it", "--url", other.url])
    assert (done.exit_code, done.stdout) == (0, "result"), done.output


def test_the_wait_between_two_looks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    monkeypatch.setattr("gpumanager.cli.following.AGAIN_S", 0.1)

    def scripted(peer: Connection, _: Received) -> None:
        looks.append(time.monotonic())
        peer.send(answer(b'{"id": "it", "state": "waiting", "ended": null}'))

    with ScriptedConsumer(scripted) as other:
        words = ["result", "it", "--timeout", "0.5", "--url", other.url]
        assert CliRunner().invoke(main, words).exit_code == 5
    assert 3 <= len(looks) <= 8  # it answers at once, and is not asked again and again
