"""The balance: the card's own figures, else the declared ones."""

from __future__ import annotations

from gpumanager.ledger import Balance, balance
from gpumanager.model import MemoryReading

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
