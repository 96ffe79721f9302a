"""What event files say: read strictly, and made a trace of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpumanager.config import parse_config
from gpumanager.simulation.eventlines import BadEvents, read
from gpumanager.simulation.recorded import Recorded, reconstruct

AT = "2026-11-24T10:00:{:06.3f}+00:00"


def at(seconds: float) -> str:
    return AT.format(seconds)


def job(ticket: int, came: float, wait: float, prepare: float, run: float, **more: Any) -> Any:
    """Times are in seconds."""
    return {
        "event": "job",
        "time": at(came + wait + prepare + run),
        "arrived": at(came),
        "consumer": "a",
        "kind": "llm",
        "ticket": ticket,
        "client": "alice",
        "requester": "alice",
        "urgency": 2,
        "wait_ms": wait * 1000,
        "prepare_ms": prepare * 1000,
        "run_ms": run * 1000,
        "needed_mib": 6000,
        "total_mib": 10_000,
        **more,
    }


def moved(event: str, consumer: str, end: float, seconds: float, **more: Any) -> Any:
    return {
        "event": event,
        "time": at(end),
        "consumer": consumer,
        "ms": round(seconds * 1000),
        **more,
    }


def evicted(consumer: str, target: str, end: float, seconds: float, **more: Any) -> Any:
    figures = {"target": target, "outcome": "released", "mib": 6000, "expected_mib": 6000}
    return moved("evicted", consumer, end, seconds, **figures, **more)


SWAP = [
    {"event": "started", "time": at(0), "version": "1"},
    moved("loaded", "a", 4.0, 3.0),
    job(1, 1.0, 0.0, 3.0, 2.0),
    evicted("a", "b", 7.0, 1.0),
    moved("loaded", "b", 9.0, 2.0),
    job(2, 2.0, 4.0, 3.0, 1.0, consumer="b", requester="bob", client="bob", kind="tts"),
    job(3, 3.0, 7.0, 0.0, 1.0, consumer="b"),
]
"""a is loaded and runs; b comes for a's room; the third had it already."""


def made(tmp_path: Path, events: list[Any], **more: Any) -> Recorded:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in events))
    return reconstruct(read([str(path)]), "events.jsonl", **more)


def test_a_swap_is_what_it_was(tmp_path: Path) -> None:
    found = made(tmp_path, SWAP)
    trace = found.trace
    assert (trace.total_mib, trace.reserved_mib, trace.loaded) == (10_000, 256, frozenset())
    sizes = {
        name: (size.mib, size.load_s, size.unload_s) for name, size in trace.footprints.items()
    }
    assert sizes == {"a": (6000, 3.0, 1.0), "b": (6000, 2.0, 1.0)}
    assert [(task.at, task.needs, task.run_s, task.requester) for task in trace.tasks] == [
        (0.0, "a", 2.0, "alice"),
        (1.0, "b", 1.0, "bob"),
        (2.0, "b", 1.0, "alice"),
    ]
    assert found.real.decisions == (
        ("grant", "1"),
        ("load", "a", "1"),
        ("grant", "2"),
        ("evict", "a", "2"),
        ("load", "b", "2"),
        ("grant", "3"),
    )
    assert [job.waited_s for job in found.real.jobs] == pytest.approx([0.0, 4.0, 7.0])
    assert found.guesses == ()


def test_a_config_says_what_things_need(tmp_path: Path) -> None:
    config = parse_config("""
        gpu: {total_mib: 12000, reserved_mib: 100}
        consumers:
          a: {url: "http://127.0.0.1:1", unload: /u, vram_resident_mib: 7000, pinned: true}
    """)
    trace = made(tmp_path, SWAP, config=config).trace
    assert (trace.total_mib, trace.reserved_mib) == (12_000, 100)
    assert (trace.footprints["a"].mib, trace.footprints["a"].movable) == (7000, False)
    assert (trace.footprints["b"].mib, trace.footprints["b"].movable) == (6000, True)
    assert made(tmp_path, SWAP, config=config, card_mib=16_000).trace.total_mib == 16_000


def test_models_are_told_apart(tmp_path: Path) -> None:
    events = [job(1, 0.0, 0.0, 0.0, 1.0, model="m"), job(2, 0.0, 1.0, 0.0, 1.0, model="n")]
    found = made(tmp_path, events, card_mib=20_000)
    assert [task.needs for task in found.trace.tasks] == ["a/m", "a/n"]


def test_a_broker_that_did_not_tell_when_jobs_came(tmp_path: Path) -> None:
    old = [{k: v for k, v in each.items() if k != "arrived"} for each in SWAP]
    assert [task.at for task in made(tmp_path, old).trace.tasks] == [0.0, 1.0, 2.0]


def test_who_loads_with_his_first_job_is_known_by_how_long_it_took(tmp_path: Path) -> None:
    events = [job(1, 0.0, 0.0, 0.0, 9.0)]
    events += [job(n, 10.0 + n, 0.0, 0.0, 1.0) for n in range(2, 6)]
    found = made(tmp_path, events)
    assert found.trace.loaded == frozenset()
    assert found.trace.footprints["a"].load_s == 8.0
    assert [task.run_s for task in found.trace.tasks] == [1.0] * 5


def test_who_was_loaded_already_is_known_by_that_nobody_loaded_him(tmp_path: Path) -> None:
    assert made(tmp_path, SWAP[3:]).trace.loaded == {"a"}


def test_what_an_operator_had_done_takes_its_turn(tmp_path: Path) -> None:
    events = [
        *SWAP,
        evicted("b", "a", 21.0, 1.0),
        moved("loaded", "a", 24.0, 3.0),
        evicted("a", "a", 31.0, 1.0),
    ]
    found = made(tmp_path, events)
    assert [(t.at, t.needs, t.operation) for t in found.trace.tasks[3:]] == [
        (19.0, "a", "load"),
        (29.0, "a", "unload"),
    ]
    assert found.real.decisions[-4:] == (
        ("grant", "4"),
        ("evict", "b", "4"),
        ("load", "a", "4"),
        ("grant", "5"),
    )


def test_who_left_before_his_turn_waits_and_leaves(tmp_path: Path) -> None:
    gone: dict[str, Any] = {
        "event": "refused",
        "time": at(5.0),
        "consumer": "b",
        "code": "client_gone",
    }
    gone |= {"status": 499, "client": "carl", "wait_ms": 3000.0}
    full = {**gone, "code": "queue_full", "wait_ms": None}
    found = made(tmp_path, [*SWAP, gone, full])
    (left,) = [task for task in found.trace.tasks if task.requester == "carl"]
    assert (left.at, left.needs, left.leaves_s) == (1.0, "b", 3.0)
    (job,) = [each for each in found.real.jobs if each.task is left]
    assert job.granted is None
    assert job.waited_s == pytest.approx(3.0)


def test_a_client_that_waits_is_played_so(tmp_path: Path) -> None:
    events = [job(1, 0.0, 0.0, 0.0, 1.0), job(2, 3.0, 0.0, 0.0, 1.0), job(3, 30.0, 0.0, 0.0, 1.0)]
    tasks = made(tmp_path, events, clients_wait=True).trace.tasks
    assert [(task.after, task.think_s) for task in tasks] == [(None, 0.0), (1, 2.0), (None, 0.0)]
    assert all(task.after is None for task in made(tmp_path, events).trace.tasks)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = json.dumps(job(1, 0.0, 0.0, 0.0, 1.0))
    path.write_text(f'{{"event": "missed", "count": 7}}\n\n{whole}\n{whole[:40]}')
    found = reconstruct(read([str(path)]), "it")
    assert found.guesses == (
        "a was never seen to load: it is taken to take 5 s",
        "7 events are missing, which the broker did not keep",
        f"{path}, line 4 is not whole, and was passed over",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no job that had the GPU"),
        ("no JSON\n", "line 1: is no JSON object (found 'no JSON')"),
        ("[1]\n", "line 1: is no JSON object"),
        ("\xff\n", "line 1: is no text"),
        ('{"a": 1}\n', "line 1: is no event of a broker, which has 'event' and 'time' (found 'a')"),
        (
            '{"event": "job", "time": "noon"}\n',
            "line 1: 'time' is no time (RFC 3339) (found 'noon'",
        ),
        ('{"event": "job", "time": "2026-11-24T10:00:00"}\n', "without a zone"),
        (
            json.dumps({**job(1, 0, 0, 0, 1), "wait_ms": "long"}) + "\n",
            "line 1: the event 'job' has to have a number of 0 or more in 'wait_ms' "
            '(found "long")',
        ),
        (json.dumps({**job(1, 0, 0, 0, 1), "run_ms": -1}) + "\n", "in 'run_ms' (found -1)"),
        (json.dumps({**job(1, 0, 0, 0, 1), "consumer": None}) + "\n", "a text in 'consumer'"),
        (json.dumps({**job(1, 0, 0, 0, 1), "arrived": "x"}) + "\n", "a time (RFC 3339)"),
        (
            json.dumps({**job(1, 0, 0, 0, 1), "total_mib": None}) + "\n",
            "says how much memory the card has: give it with --card-mib",
        ),
        (
            json.dumps({**job(1, 0, 0, 0, 1), "total_mib": 5000}) + "\n",
            "a needs 6000 MiB, more than the card has to give (4744)",
        ),
        ("x" * (1 << 20), "line 1: is far longer than an event"),
    ],
)
def test_a_file_that_is_no_brokers_is_told_with_the_line(
    text: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "it"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadEvents) as told:
        reconstruct(read([str(path)]), "it")
    assert said in str(told.value)


def test_several_files_are_put_in_order(tmp_path: Path) -> None:
    (tmp_path / "2").write_text("".join(f"{json.dumps(each)}\n" for each in SWAP[4:]))
    (tmp_path / "1").write_text("".join(f"{json.dumps(each)}\n" for each in SWAP[:4]))
    found = reconstruct(read([str(tmp_path / "2"), str(tmp_path / "1")]), "it")
    assert found.real.decisions == made(tmp_path, SWAP).real.decisions
    with pytest.raises(BadEvents, match="cannot be read: No such file"):
        read([str(tmp_path / "3")])
