"""Who may stop which jobs at a consumer."""

from __future__ import annotations

import pytest

from gpumanager.errors import Forbidden
from gpumanager.jobs.owners import Owners
from gpumanager.jobs.record import RequestRecord
from gpumanager.keys import Role


def request(key: str | None, role: Role = "client") -> RequestRecord:
    return RequestRecord(
        "id", "POST", "/", "127.0.0.1", 0.0, lambda event: None, key=key, role=role
    )


@pytest.fixture
def owners() -> Owners:
    owners = Owners()
    owners.began("comfyui", "a1", "alice")
    owners.began("comfyui", "b1", "bob")
    owners.began("other", "a2", "alice")
    return owners


@pytest.mark.parametrize("jobs", [["a1"], ["a1", "a1"]])
def test_a_client_stops_its_own(owners: Owners, jobs: list[str]) -> None:
    owners.check(request("alice"), "comfyui", jobs)


@pytest.mark.parametrize("jobs", [["b1"], ["a1", "b1"], ["a2"], ["unknown"], [], None])
def test_a_client_stops_nothing_else(owners: Owners, jobs: list[str] | None) -> None:
    with pytest.raises(Forbidden):
        owners.check(request("alice"), "comfyui", jobs)
    owners.check(request("boss", "admin"), "comfyui", jobs)
    owners.check(request(None, "admin"), "comfyui", jobs)


def test_whatever_goes_on_is_its_own_once_the_others_is_over(owners: Owners) -> None:
    owners.ended("comfyui", "b1")
    owners.ended("comfyui", "b1")
    owners.check(request("alice"), "comfyui", None)
    with pytest.raises(Forbidden, match="x works on no job of key 'bob'"):
        owners.check(request("bob"), "x", None)
    with pytest.raises(Forbidden, match="what comfyui works on is not a job of key 'bob'"):
        owners.check(request("bob"), "comfyui", None)
