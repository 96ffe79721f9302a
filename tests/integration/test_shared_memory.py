"""A broker on a chip whose memory is the host's, of which other programs take all the time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from gpumanager.gpu.simulated import SimulatedCard
from tests.support.broker import LiveBroker, live_broker
from tests.support.fake_servers import Running, fake_server
from tests.support.shared_card import OTHERS_MIB, SWING_MIB, SharedCard

HOST_MIB = 14_000
NEEDS = {"voice": 5000, "images": 6000, "words": 7000}
RESERVED_MIB = 2 * SWING_MIB

pytestmark = pytest.mark.timeout(90)


class Machine:
    def __init__(self, live: LiveBroker, card: SharedCard, fakes: dict[str, Running]) -> None:
        self.live, self.card, self.fakes = live, card, fakes

    def job(self, kind: str) -> int:
        return requests.post(f"{self.live.url}/v1/{kind}", json={}, timeout=60).status_code

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = requests.get(f"{self.live.url}/v1/status", timeout=10).json()
        return found

    def outcomes(self) -> list[tuple[str, str, str | None]]:
        events = requests.get(f"{self.live.url}/v1/events", timeout=10).json()["events"]
        evicted = [each for each in events if each["event"] == "evicted"]
        return [(e["consumer"], e["outcome"], e.get("taken_by")) for e in evicted]


@contextmanager
def machine(folder: Path, tells: str, **gpu: Any) -> Iterator[Machine]:
    with ExitStack() as stack:
        simulated = SimulatedCard.create(folder / "card.json", HOST_MIB)
        fakes = {
            name: stack.enter_context(fake_server("plain", simulated.path, name, mib))
            for name, mib in NEEDS.items()
        }
        config = {
            "gpu": {"reserved_mib": RESERVED_MIB, "release_timeout": 1, "sample_interval": 0.2}
            | gpu,
            "health_interval": 0.5,
            "routing": {"tts": "voice", "image": "images", "llm": "words"},
            "consumers": {
                name: {
                    "url": fake.url,
                    "health": "/quiet",
                    "unload": "/unload",
                    "paths": dict.fromkeys(("tts", "image", "llm"), "/job"),
                    "vram_resident_mib": NEEDS[name],
                }
                for name, fake in fakes.items()
            },
        }
        card = SharedCard(str(simulated.path), tells)
        live = stack.enter_context(live_broker(yaml.safe_dump(config), card=card))
        yield Machine(live, card, fakes)


@pytest.mark.parametrize("tells", ["processes", "in all", "nothing"])
def test_jobs_fit_and_evictions_are_judged_rightly(tmp_path: Path, tells: str) -> None:
    with machine(tmp_path, tells) as it:
        kinds = random.Random(3).choices(["tts", "image", "llm"], k=40)
        with ThreadPoolExecutor(6, "client") as clients:
            assert list(clients.map(it.job, kinds)) == [200] * 40
        outcomes = it.outcomes()
        assert len(outcomes) >= 10
        assert {outcome for _, outcome, _ in outcomes} <= {"released", "partial"}
        status = it.status()
        assert status["scheduler"]["out_of_memory"]["seen"] == 0
        assert not [each for each in status["consumers"] if "quarantine" in each]
        gpu = status["gpu"]
        assert gpu["memory"] == "host"
        assert ("on_gpu_mib" in gpu) == (tells != "nothing")
        assert gpu["attribution"]["source"] == ("processes" if tells == "processes" else "totals")
        metrics = requests.get(f"{it.live.url}/metrics", timeout=10).text
        assert 'gpumanager_gpu_info{memory="host",name="simulated card"} 1.0' in metrics


@pytest.mark.parametrize(
    ("tells", "outcome", "by"),
    [
        ("processes", "stolen", "other programs of this machine"),
        ("in all", "stolen", "other programs of this machine"),
        ("nothing", "leaked", None),
    ],
)
def test_a_program_that_takes_what_was_released_makes_nobody_a_leak(
    tmp_path: Path, tells: str, outcome: str, by: str | None
) -> None:
    with machine(tmp_path, tells) as it:
        assert it.job("llm") == 200
        it.card.grab = NEEDS["words"] // 2
        assert it.job("image") == 503
        assert it.outcomes() == [("words", outcome, by)]
        status = it.status()
        assert not [each for each in status["consumers"] if "quarantine" in each]
        refusal = requests.post(f"{it.live.url}/v1/image", json={}, timeout=60)
        assert "other programs of this machine" in refusal.text


def test_a_true_leak_is_one_where_it_can_be_told(tmp_path: Path) -> None:
    with machine(tmp_path, "processes") as it:
        SimulatedCard(tmp_path / "card.json").misbehave(leaks={"words": 1.0})
        assert it.job("llm") == 200
        requests.post(f"{it.live.url}/v1/consumers/words/unload", timeout=60)
        assert it.outcomes() == [("words", "leaked", None)]
        (words,) = [each for each in it.status()["consumers"] if each["name"] == "words"]
        assert "quarantine" in words


def test_a_total_in_the_config_is_the_gpus_share(tmp_path: Path) -> None:
    total = NEEDS["images"] + RESERVED_MIB + 100
    with machine(tmp_path, "processes", total_mib=NEEDS["words"] + RESERVED_MIB + 100) as it:
        assert it.job("image") == 200
        gpu = it.status()["gpu"]
        assert gpu["used_mib"] == NEEDS["images"]
        assert gpu["total_mib"] - gpu["free_mib"] == NEEDS["images"]
        assert total - NEEDS["images"] < OTHERS_MIB
        assert it.job("tts") == 200  # after the images, which the share has no room beside
        assert it.outcomes() == [("images", "released", None)]
