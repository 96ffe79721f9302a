"""The balance: the card's own figures, else the declared ones."""

from __future__ import annotations

from dataclasses import replace

from gpumanager.gpu.accounting import Balance, Held, balance, disproved, held, plausible
from gpumanager.model import (
    RELEASE_S,
    ConsumerState,
    GpuProcess,
    Growth,
    Holdings,
    MemoryReading,
)

READING = MemoryReading(total_mib=24000, used_mib=6000, free_mib=18000)


def test_a_measurement_decides() -> None:
    assert balance(READING, 0, [9000]) == Balance("measured", 24000, 6000, 18000)


def test_a_configured_total_caps_a_larger_card() -> None:
    assert balance(READING, 8000, []) == Balance("measured", 8000, 6000, 2000)
    assert balance(READING, 5000, []).free_mib == 0


def test_without_a_measurement_the_declared_figures_add_up() -> None:
    assert balance(None, 8000, [2800, 1000]) == Balance("ledger", 8000, 3800, 4200)
    assert balance(None, 8000, [9000]).free_mib == 0


def test_without_either_nothing_is_known() -> None:
    assert balance(None, 0, [2800]) == Balance("unknown")


def test_while_the_card_cannot_be_read_the_last_reading_is_the_ledgers_base() -> None:
    game = GpuProcess(9, 1000, "game")
    last = replace(READING, holdings=Holdings({"tts": 5000}, foreign=(game,)))
    assert balance(None, 0, [6000], last) == Balance("ledger", 24_000, 7000, 17_000)
    assert balance(None, 8000, [6000], last) == Balance("ledger", 8000, 7000, 1000)
    assert balance(None, 0, [6000], READING) == Balance("ledger", 24_000, 6000, 18_000)
    loaded = ConsumerState(loaded=True)
    assert held("tts", loaded, 0, None, last=last) == Held(5000, 5000, "declared")
    assert held("tts", loaded, 6000, None, last=last) == Held(6000, 6000, "declared")
    asleep = ConsumerState(loaded=False, resident_mib=0)
    assert held("tts", asleep, 6000, None, last=last).mib == 0
    assert held("tts", asleep, 6000, None, last=last, keeps_mib=1200).mib == 1200
    assert held("tts", asleep, 6000, None, keeps_mib=1200).mib == 0  # nobody ever measured it


def test_what_is_on_its_way_back_is_held_but_not_its_own() -> None:
    reading = replace(READING, holdings=Holdings({"tts": 5000}))
    state = ConsumerState(loaded=False, unloaded_at=100.0)
    assert held("tts", state, 6000, reading, now=101, keeps_mib=300) == Held(5000, 300, "measured")
    assert held("tts", state, 6000, reading, now=100 + RELEASE_S).surely_mib == 5000
    assert held("tts", replace(state, unloaded_at=None), 6000, reading, now=101).surely_mib == 5000


DECLARED = {"tts": 6000, "llm": 6000, "stt": 3000}


def assumed(at: float, *, active: int = 0) -> ConsumerState:
    return ConsumerState(loaded=True, assumed=at, active=active)


def test_what_is_assumed_takes_room_but_is_no_room_of_its_own() -> None:
    assert held("tts", assumed(1), 6000, None) == Held(6000, 0, "declared")
    assert held("tts", ConsumerState(loaded=True), 6000, None) == Held(6000, 6000, "declared")


def loaded(states: dict[str, ConsumerState], total: int) -> list[str]:
    return [name for name, each in plausible(states, DECLARED, None, total).items() if each.loaded]


def test_a_ledger_over_the_total_drops_the_oldest_assumptions() -> None:
    states = {"tts": assumed(2), "llm": assumed(1), "stt": assumed(3)}
    assert loaded(states, 15_000) == ["tts", "llm", "stt"]
    assert loaded(states, 10_000) == ["tts", "stt"]
    assert loaded(states, 8000) == ["stt"]
    assert loaded(states, 0) == ["tts", "llm", "stt"]  # no total, no ledger
    states["llm"] = assumed(1, active=1)
    assert loaded(states, 10_000) == ["llm", "stt"]


def test_what_is_known_is_never_dropped() -> None:
    states = {
        "tts": ConsumerState(loaded=True),
        "llm": ConsumerState(loaded=True, assumed=1, resident_mib=500),
        "stt": assumed(3),
    }
    assert loaded(states, 2000) == ["tts", "llm"]
    assert plausible(states, DECLARED, READING, 2000) is states


def test_what_surely_is_loaded_disproves_what_would_not_fit_beside_it() -> None:
    states = {"tts": ConsumerState(loaded=True), "llm": assumed(1), "stt": assumed(2)}
    assert disproved(states, DECLARED, 10_000) == ["llm"]
    assert disproved(states, DECLARED, 15_000) == []
    assert disproved(states, DECLARED, 0) == []  # no total, no ledger


def test_one_that_leaks_is_not_credited_with_what_it_has_leaked() -> None:
    growth = Growth("leaks", "jobs", grown_mib=900, mib_per_job=10.0, jobs=80)
    reading = MemoryReading(8000, 4000, 4000, holdings=Holdings({"tts": 4000}))
    state = ConsumerState(loaded=True, growth=growth)
    assert held("tts", state, 3000, reading) == Held(4000, 3200, "measured")
    assert held("tts", replace(state, loaded=False), 3000, reading).surely_mib == 4000
    cache = replace(growth, verdict="grows", over="")
    assert held("tts", replace(state, growth=cache), 3000, reading).surely_mib == 4000
