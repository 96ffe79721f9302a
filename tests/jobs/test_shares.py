"""How much of the queue one requester may have."""

from __future__ import annotations

import pytest

from gpumanager.errors import QueueFull
from gpumanager.jobs.shares import Shares
from gpumanager.model import Job


def of_key(name: str) -> Job:
    return Job("a", "tts", key=name, requester=name)


def of_address(address: str) -> Job:
    return Job("a", "tts", requester=address)


def test_where_nothing_bounds_them_nothing_is_counted() -> None:
    shares = Shares({"alice": 1})
    assert [shares.enter(of_address("10.0.0.1")) for _ in range(3)] == [None] * 3
    assert [shares.enter(of_key("bob")) for _ in range(3)] == [None] * 3


def test_each_address_has_its_own_share() -> None:
    shares = Shares(most=2)
    left = [shares.enter(of_address("10.0.0.1")) for _ in range(2)]
    with pytest.raises(QueueFull, match=r"2 jobs of the client at 10\.0\.0\.1 are in the queue"):
        shares.enter(of_address("10.0.0.1"))
    assert shares.enter(of_address("10.0.0.2")) is not None
    leave = left[0]
    assert leave is not None
    leave()
    assert shares.enter(of_address("10.0.0.1")) is not None


@pytest.mark.parametrize("own", [1, 3])
def test_a_keys_own_bound_goes_before_everybodys(own: int) -> None:
    shares = Shares({"alice": own}, most=2)
    for name, bound in (("alice", own), ("bob", 2)):
        for _ in range(bound):
            assert shares.enter(of_key(name)) is not None
        with pytest.raises(QueueFull, match=f"{bound} jobs of key '{name}' are in the queue"):
            shares.enter(of_key(name))


def test_who_has_left_takes_no_memory() -> None:
    shares = Shares(most=1)
    for number in range(100):
        leave = shares.enter(of_address(f"10.0.0.{number}"))
        assert leave is not None
        leave()
    assert shares._queued == {}
