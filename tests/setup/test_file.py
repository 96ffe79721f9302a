"""The config that setup writes: added to whatever layout is there, and never against the user's
word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumanager.config import ConfigError, parse_config
from gpumanager.setup.configfile import CannotAdd, Figures, Proposal, local_port, propose
from gpumanager.setup.discovery import Found
from gpumanager.setup.services import known_services
from gpumanager.setup.yamledit import with_entries

ROOT = Path(__file__).parent.parent.parent
SERVICES = {service.service: service for service in known_services()}

ENTRIES = {"new": {"preset": "p", "url": "http://127.0.0.1:1", "n": 0, "l": ["a", "b: c"]}}
ROWS = ["", "new:", "  preset: p", "  url: http://127.0.0.1:1", "  n: 0   # said"]
ROWS += ["  l: [a, 'b: c']", "  # evict: [x]"]


def found(name: str, port: int, **more: Any) -> Found:
    return Found(SERVICES[name], port, **more)


def proposed(before: str, *finds: Found, **more: Any) -> Proposal:
    return propose(before, finds, listen="127.0.0.1:1", **{"total_mib": 24_000, **more})


@pytest.mark.parametrize(
    "before",
    [
        "consumers:\n  a:\n    url: x\n",
        "consumers:\n  a:\n    url: x",
        "consumers:\n    a:\n        url: x\n\n\n\n",
        "consumers:\n  a:\n    url: x\n  # b:\n  #   url: y\n\n  # more\n\n# next\nlog: {}\n",
        "consumers:\n  a: {url: x}   # c\n  b: {url: y}\n",
        "consumers:\n  a:\n    url: x\n    t: [1,\n       2]\nlog: {}\n",
        "consumers:\n  a:\n    t:\n    - 1\n    - 2   # c\nlog: {}\n",
        "consumers:\n  a:\n    url: |\n      x\n      y\n\nlog: {}\n",
        "consumers:\n  a:\n    url: 'x\n      y'\nlog: 1\n",
        "consumers:\n  a:\nlog: 1\n",
        "consumers:\n  a:\n    url:\n",
        "consumers:\r\n  a:\r\n    url: x\r\nlog: 1\r\n",
        "? consumers\n: a: 1\n",
        "consumers: {a: {url: x}}\n",
        "consumers: {a: {url: x}, }   # c\nlog: {}\n",
        "consumers: {\n  a: {url: x},   # first\n  b: {url: y}    # second\n}\nlog: {}\n",
        "consumers: {a: }\n",
        "consumers: {}\n",
        "consumers: {}   # none\nlog: {}\n",
        "consumers:\n",
        "consumers:\nlog: {}\n",
        "consumers: # why\n\nlog: {}\n",
        "consumers: ~ # why\nlog: {}",
        "listen: a\n",
        "listen: a",
        "{consumers: {a: {url: x}}, log: {}}\n",
        "{log: {}}\n",
        "{consumers: {}, log: {}}",
        "{consumers: , log: {}}",
        "---\nconsumers: {a: 1}\n...\n",
        '"consumers": {a: 1}\n',
    ],
)
def test_entries_go_into_any_layout_and_nothing_else_changes(before: str) -> None:
    after = with_entries(before, "consumers", ENTRIES, ROWS)
    data, old = yaml.safe_load(after), yaml.safe_load(before)
    assert data["consumers"] == {**(old.get("consumers") or {}), **ENTRIES}
    assert {**data, "consumers": None} == {**old, "consumers": None}
    comments = re.findall(r"#.*", before)
    assert [line for line in re.findall(r"#.*", after) if line in comments] == comments
    assert ("\r\n" in after) == ("\r\n" in before)
    assert "\n" not in after.replace("\r\n", "") or "\r\n" not in before


def test_a_comment_about_what_comes_next_stays_with_it() -> None:
    before = "consumers:\n  a:\n    url: x\n\n# about logs\nlog: {}\n"
    assert with_entries(before, "consumers", ENTRIES, ROWS).endswith("# about logs\nlog: {}\n")


@pytest.mark.parametrize(
    "before",
    ["x: &x {a: {url: x}}\nconsumers: *x\n", "---\nlisten: 1\n...\n", "[1]\n", ""],
)
def test_what_cannot_be_added_to_is_told(before: str) -> None:
    with pytest.raises(ValueError, match=r"nothing can be added to|no mapping"):
        with_entries(before, "consumers", ENTRIES, ROWS)


def test_the_readmes_own_config_is_added_to() -> None:
    (before,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    proposal = proposed(before, found("comfyui", 8188), found("ollama", 11434))
    assert proposal.added == ("comfyui",)
    assert "routing: {tts: mvoice, llm: ollama, image: comfyui}" in proposal.after
    assert set(proposal.config.consumers) == {"mvoice", "ollama", "comfyui"}
    assert not proposed(proposal.after, found("comfyui", 8188)).changed


def test_a_config_on_one_line_is_added_to() -> None:
    before = "consumers: {it: {url: 'http://127.0.0.1:1'}}\n"
    proposal = proposed(before, found("ollama", 11434))
    assert set(proposal.config.consumers) == {"it", "ollama"}
    assert proposal.config.consumers["ollama"].preset == "ollama"


def test_what_cannot_be_added_comes_to_be_added_by_hand() -> None:
    before = "---\nconsumers: {it: {url: 'http://127.0.0.1:1'}}\n...\n"
    with pytest.raises(CannotAdd) as raised:
        proposed(before, found("ollama", 11434))
    by_hand = parse_config(raised.value.by_hand)
    assert dict(by_hand.routing) == {"llm": "ollama"}
    assert set(by_hand.consumers) == {"ollama"}


@pytest.mark.parametrize(
    "comment",
    [
        "  # ollama:\n  #   preset: ollama\n  #   url: http://127.0.0.1:11434\n",
        '  # ollama: {preset: ollama, url: "http://localhost:11434", vram_resident_mib: 9000}\n',
        "# url: 'http://127.0.0.1:11434/'\n",
    ],
)
def test_what_was_commented_out_does_not_come_back(comment: str) -> None:
    before = "consumers:\n  it: {url: 'http://127.0.0.1:1'}\n" + comment
    proposal = proposed(before, found("ollama", 11434), found("comfyui", 8188))
    assert proposal.added == ("comfyui",)
    assert [each.port for each in proposal.ignored] == [11434]


def test_what_is_to_be_ignored_is_not_added() -> None:
    proposal = proposed("setup: {ignore: [11434]}\n", found("ollama", 11434))
    assert (proposal.changed, proposal.added) == (False, ())
    assert [each.port for each in proposal.ignored] == [11434]
    with pytest.raises(ConfigError):
        parse_config("setup: {ignore: [0]}")


def test_another_machines_server_does_not_stand_for_ours() -> None:
    there = "consumers:\n  far: {url: 'http://192.0.2.7:11434'}\n"
    assert proposed(there, found("ollama", 11434)).added == ("ollama",)
    assert local_port("http://localhost/x") == 80
    assert local_port("https://[::1]") == 443
    assert local_port("http://192.0.2.7:1") is None
    assert local_port("http://127.0.0.1:x") is None


def test_it_says_who_is_routed_and_who_not() -> None:
    told = proposed(
        "", found("ollama", 11434), found("vllm", 8000), found("comfyui", 8188)
    ).routes()
    assert told == {
        "ollama": "gets POST /v1/llm",
        "vllm": "not routed: POST /v1/llm goes to ollama (see `routing`)",
        "comfyui": "gets POST /v1/image",
    }


def test_of_the_hosts_memory_a_part_is_left_to_other_programs() -> None:
    proposal = proposed("", found("ollama", 11434), total_mib=120_000, of_host=True)
    assert "measured: 120000 MiB of the host's memory, which is the card's" in proposal.after
    assert (proposal.config.gpu.total_mib, proposal.config.gpu.reserved_mib) == (0, 7500)
    assert proposed("", found("ollama", 11434)).config.gpu.reserved_mib == 256


def test_figures_that_the_user_says_stand_in_the_config() -> None:
    figures = Figures(16_000, {"ollama": 9000})
    proposal = proposed(
        "", found("ollama", 11434), found("comfyui", 8188), total_mib=None, figures=figures
    )
    assert proposal.config.gpu.total_mib == 16_000
    assert proposal.config.consumers["ollama"].vram_resident_mib == 9000
    assert proposal.config.consumers["comfyui"].vram_resident_mib == 0
    with pytest.raises(ConfigError, match="can never fit"):
        proposed("", found("ollama", 1), total_mib=None, figures=Figures(8000, {"ollama": 9000}))
