"""What is shown of the models of a consumer that tells them apart: in the list of models, in the
metrics, and on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.scene import Scene, models
from tests.support.threads import eventually

pytestmark = pytest.mark.timeout(60)

SIZES = {"titles:1b": 1000, "code:20b": 6000, "chat:8b": 3000}


@pytest.fixture
def it() -> Iterator[Scene]:
    with models(SIZES) as scene:
        yield scene


def listed(it: Scene) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in it.broker.get("/v1/models").json()["data"]}


def test_the_list_of_models_says_what_each_needs_as_soon_as_it_was_seen(it: Scene) -> None:
    eventually(lambda: listed(it).keys() == SIZES.keys())
    assert not any(each["loaded"] or "vram_mib" in each for each in listed(it).values())
    it.used("titles:1b", "code:20b")
    eventually(lambda: listed(it)["code:20b"].get("vram_mib") == 6000)
    found = listed(it)
    assert found["titles:1b"]["vram_source"] == found["code:20b"]["vram_source"] == "measured"
    assert (found["titles:1b"]["vram_mib"], found["titles:1b"]["loaded"]) == (1000, True)
    assert "vram_mib" not in found["chat:8b"]
    assert it.broker.post("/v1/consumers/ollama/unload?model=code:20b").status_code == 200
    assert {name: each["loaded"] for name, each in listed(it).items()} == {
        "titles:1b": True,
        "code:20b": False,
        "chat:8b": False,
    }
    assert listed(it)["code:20b"]["vram_mib"] == 6000
