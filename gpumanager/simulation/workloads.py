"""Workloads, each from a seed: who asks for what, when, and what that takes.

They are what people do with one card at home or in a small office. What models need and how long
they take is of the order that their users report for a card with 24 GB. A client that waits for an
answer before it asks again is played so: its next job comes after the one before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from gpumanager.simulation.trace import Footprint, Task, Trace

CARD_MIB = 24_000
RESERVED_MIB = 256

SMALL_JOBS = 9
"""Of an instance that the exact solver can do."""


@dataclass(slots=True)
class _Sheet:
    """The jobs as they are written down. Random figures come from `chance`."""

    chance: random.Random
    most: int
    tasks: list[Task] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.tasks) >= self.most

    def add(
        self,
        at: float,
        needs: str,
        run_s: float,
        *,
        kind: str = "llm",
        requester: str = "-",
        urgency: int = 3,
        session: str | None = None,
        after: int | None = None,
        think_s: float = 0.0,
    ) -> int:
        """One more job, if there is place for it; returns its number."""
        number = len(self.tasks) + 1
        if not self.full:
            about = round(run_s * self.chance.lognormvariate(0, 0.3), 3)
            self.tasks.append(
                Task(
                    number,
                    round(at, 3),
                    needs,
                    about,
                    kind,
                    requester,
                    urgency,
                    session,
                    after,
                    round(think_s, 3),
                )
            )
        return number

    def pause(self, mean_s: float) -> float:
        """A random time between two things that do not depend on each other."""
        return self.chance.expovariate(1 / mean_s)


def _chat_bursts(sheet: _Sheet) -> Mapping[str, Footprint]:
    """Six people chat now and then, a few messages at a time; each has a favourite of three models,
    of which no two fit together."""
    models = {
        "llm/small": Footprint(9_000, 6.0),
        "llm/medium": Footprint(15_500, 11.0),
        "llm/large": Footprint(19_000, 15.0),
    }
    people = [f"person-{number}" for number in range(1, 7)]
    favourite = {who: sheet.chance.choice(list(models)) for who in people}
    at = 0.0
    while not sheet.full:
        at += sheet.pause(25.0)
        who = sheet.chance.choice(people)
        name = favourite[who] if sheet.chance.random() < 0.8 else sheet.chance.choice(list(models))
        before: int | None = None
        for _ in range(sheet.chance.randint(2, 5)):
            think_s = 0.0 if before is None else 2.0 + sheet.pause(6.0)
            before = sheet.add(
                at, name, 4.0, requester=who, session=who, after=before, think_s=think_s
            )
    return models


def _voice_assistant(sheet: _Sheet) -> Mapping[str, Footprint]:
    """Somebody talks to an assistant: transcription, then a language model, then speech, which fit
    together; somebody else has pictures made, for which most of that has to go."""
    needs = {
        "stt": Footprint(3_000, 3.0),
        "llm": Footprint(12_000, 9.0),
        "tts": Footprint(4_000, 4.0),
        "image": Footprint(16_000, 14.0),
    }
    at = 0.0
    while not sheet.full:
        at += sheet.pause(40.0)
        if sheet.chance.random() < 0.35:
            before: int | None = None
            for _ in range(sheet.chance.randint(1, 3)):
                before = sheet.add(
                    at, "image", 12.0, kind="image", requester="painter", urgency=5, after=before
                )
            continue
        session, before = f"talk-{at:.0f}", None
        for turn in range(sheet.chance.randint(1, 3)):
            think_s = 3.0 + sheet.pause(3.0) if turn else 0.0
            for name, run_s in (("stt", 0.8), ("llm", 2.5), ("tts", 1.2)):
                before = sheet.add(
                    at,
                    name,
                    run_s,
                    kind=name,
                    requester="speaker",
                    urgency=1,
                    session=session,
                    after=before,
                    think_s=think_s,
                )
                think_s = 0.05
    return needs


def _image_night(sheet: _Sheet) -> Mapping[str, Footprint]:
    """A script queues a night's pictures at once, and people chat meanwhile; both models fit on the
    card together."""
    return _night(sheet, image_mib=12_000, llm_mib=10_000)


def _crowded_night(sheet: _Sheet) -> Mapping[str, Footprint]:
    """The same, but the two models do not fit together: each answer to a person in between costs
    two swaps."""
    return _night(sheet, image_mib=14_000, llm_mib=13_000)


def _night(sheet: _Sheet, image_mib: int, llm_mib: int) -> Mapping[str, Footprint]:
    needs = {"image": Footprint(image_mib, 12.0), "llm": Footprint(llm_mib, 8.0)}
    pictures = max(1, round(sheet.most * 0.6))
    for _ in range(pictures):
        sheet.add(0.0, "image", 10.0, kind="image", requester="script", urgency=6)
    at, gap = 0.0, pictures * 10.0 / max(1, sheet.most - pictures)
    while not sheet.full:
        at += sheet.pause(gap)
        who = f"person-{sheet.chance.randint(1, 3)}"
        sheet.add(at, "llm", 3.0, requester=who, urgency=2)
    return needs


def _agent_fleet(sheet: _Sheet) -> Mapping[str, Footprint]:
    """Six agents at once, each in a loop: it looks things up (embeddings, a reranker), plans with a
    large model, and writes with another one; the two large ones do not fit together."""
    needs = {
        "embed": Footprint(1_200, 1.5),
        "rerank": Footprint(1_000, 1.2),
        "planner": Footprint(17_000, 14.0),
        "coder": Footprint(15_000, 12.0),
    }
    last: dict[str, int | None] = {f"agent-{number}": None for number in range(1, 7)}
    while not sheet.full:
        for who in list(last):
            before = last[who]
            steps = [("embed", 0.2), ("rerank", 0.3)] if sheet.chance.random() < 0.5 else []
            steps.append(("planner", 6.0))
            steps += [("coder", 5.0)] * sheet.chance.randint(1, 3)
            at = 0.0 if before is not None else sheet.pause(5.0)
            for name, run_s in steps:
                before = sheet.add(
                    at,
                    name,
                    run_s,
                    kind="embed" if name in ("embed", "rerank") else "llm",
                    requester=who,
                    after=before,
                    think_s=0.2 + sheet.pause(0.5),
                )
            last[who] = before
    return needs


def _alternating(sheet: _Sheet) -> Mapping[str, Footprint]:
    """Two models that do not fit together, each asked for by two clients, which send the next
    request as soon as they have an answer."""
    needs = {"left": Footprint(14_000, 8.0), "right": Footprint(14_000, 8.0)}
    last: dict[str, int | None] = {f"{name}-{n}": None for n in (1, 2) for name in needs}
    begins = {who: 0.2 * place for place, who in enumerate(last)}  # in turn: left, right, left, …
    while not sheet.full:
        for who, before in list(last.items()):
            at = 0.0 if before is not None else begins[who] + sheet.chance.uniform(0.0, 0.1)
            name = who.partition("-")[0]
            last[who] = sheet.add(at, name, 1.0, requester=who, after=before)
    return needs


def _busy_office(sheet: _Sheet) -> Mapping[str, Footprint]:
    """Eight people chat with a server that works on eight requests at a time, and two have pictures
    made, for which it has to go."""
    needs = {"vllm": Footprint(16_000, 12.0, parallel=8), "image": Footprint(12_000, 10.0)}
    people = {f"person-{number}": "vllm" for number in range(1, 9)}
    people |= {f"painter-{number}": "image" for number in (1, 2)}
    last: dict[str, int | None] = dict.fromkeys(people)
    while not sheet.full:
        for who, before in list(last.items()):
            chats = people[who] == "vllm"
            if not chats and sheet.chance.random() < 0.6:
                continue
            last[who] = sheet.add(
                sheet.pause(8.0) if before is None else 0.0,
                people[who],
                5.0 if chats else 10.0,
                kind="llm" if chats else "image",
                requester=who,
                after=before,
                think_s=2.0 + sheet.pause(8.0),
            )
    return needs


def _mixed(sheet: _Sheet) -> Mapping[str, Footprint]:
    """Eight clients with mixed jobs for five servers that never all fit."""
    needs = {
        "voice": Footprint(6_000, 4.0),
        "whisper": Footprint(5_000, 3.0),
        "ollama": Footprint(12_000, 8.0, 1.0),
        "comfyui": Footprint(10_000, 12.0, 1.5),
        "vllm": Footprint(11_000, 30.0, 2.0),
    }
    run_s = {"voice": 1.5, "whisper": 1.0, "ollama": 6.0, "comfyui": 20.0, "vllm": 4.0}
    kinds = {"voice": "tts", "whisper": "stt", "comfyui": "image"}
    last: dict[str, int | None] = {f"client-{number}": None for number in range(1, 9)}
    while not sheet.full:
        for who, before in list(last.items()):
            (name,) = sheet.chance.choices(list(needs), (3, 2, 3, 1, 0.5))
            last[who] = sheet.add(
                sheet.pause(10.0) if before is None else 0.0,
                name,
                run_s[name],
                kind=kinds.get(name, "llm"),
                requester=who,
                after=before,
                think_s=sheet.pause(10.0),
            )
    return needs


@dataclass(frozen=True, slots=True)
class _Kind:
    write: Callable[[_Sheet], Mapping[str, Footprint]]
    jobs: int


_KINDS = {
    "chat-bursts": _Kind(_chat_bursts, 120),
    "voice-assistant": _Kind(_voice_assistant, 120),
    "image-night": _Kind(_image_night, 120),
    "crowded-night": _Kind(_crowded_night, 120),
    "agent-fleet": _Kind(_agent_fleet, 160),
    "alternating": _Kind(_alternating, 160),
    "mixed": _Kind(_mixed, 200),
    "busy-office": _Kind(_busy_office, 200),
}

WORKLOADS: dict[str, str] = {
    name: " ".join((kind.write.__doc__ or "").split()) for name, kind in _KINDS.items()
}
"""What each of them is, by its name."""


def workload(name: str, seed: int, jobs: int | None = None) -> Trace:
    """The workload of that name; the same for the same seed. `jobs` is how many it has, by default
    as many as it usually has."""
    kind = _KINDS[name]
    chance = random.Random(f"{name} {seed}")  # noqa: S311  # it has to be the same again
    sheet = _Sheet(chance, kind.jobs if jobs is None else jobs)
    needs = kind.write(sheet)
    return Trace(name, CARD_MIB, needs, tuple(sheet.tasks), RESERVED_MIB)


def at_once(trace: Trace, within_s: float = 1.0) -> Trace:
    """The same jobs, all of which come within so many seconds and wait for nobody: for what the
    order of a queue comes to by itself."""
    last = max((task.at for task in trace.tasks), default=0.0) or 1.0
    count = len(trace.tasks)
    return replace(
        trace,
        tasks=tuple(
            replace(
                task,
                at=round(within_s * (0.5 * task.at / last + 0.5 * task.number / count), 3),
                after=None,
                think_s=0.0,
            )
            for task in trace.tasks
        ),
    )
