"""Presets: what they fill in, and that their expressions fit the servers' real answers."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from gpumanager.config import ConsumerConfig, parse_config
from gpumanager.config.presets import names

GIB = 1024**3

OLLAMA_PS = {
    "models": [
        {
            "name": "llama3.1:8b",
            "model": "llama3.1:8b",
            "size": 6654289920,
            "digest": "46e0c10c039e",
            "details": {
                "family": "llama",
                "parameter_size": "8.0B",
                "quantization_level": "Q4_K_M",
            },
            "expires_at": "2026-05-11T11:38:39.120Z",
            "size_vram": 6654289920,
            "context_length": 4096,
        },
        {"name": "nomic-embed-text:latest", "size": 577000000, "size_vram": 0},
    ]
}
COMFYUI_STATS = {
    "system": {"os": "posix", "comfyui_version": "0.3.60", "pytorch_version": "2.8.0+cu128"},
    "devices": [
        {
            "name": "cuda:0 NVIDIA GeForce RTX 4090 : cudaMallocAsync",
            "type": "cuda",
            "index": 0,
            "vram_total": 24 * GIB,
            "vram_free": 17 * GIB,
            "torch_vram_total": 6 * GIB,
            "torch_vram_free": 1 * GIB,
        }
    ],
}


def consumer(preset: str, **keys: Any) -> ConsumerConfig:
    document = {"consumers": {"it": {"preset": preset, "url": "http://127.0.0.1:1", **keys}}}
    return parse_config(yaml.safe_dump(document)).consumers["it"]


@pytest.mark.parametrize("preset", names())
def test_a_url_is_enough(preset: str) -> None:
    filled = consumer(preset)
    assert filled.health is not None
    assert filled.paths


def test_ollama() -> None:
    ollama = consumer("ollama")
    assert ollama.probe is not None
    assert ollama.unload is not None
    assert ollama.probe.find_loaded(OLLAMA_PS) is True
    assert ollama.probe.find_loaded({"models": []}) is False
    assert ollama.probe.find_loaded({"error": "odd"}) is None
    assert ollama.probe.find_resident(OLLAMA_PS) == 6654289920
    assert ollama.probe.find_resident({"models": []}) == 0
    items = ollama.probe.find_items(OLLAMA_PS)
    assert items == ["llama3.1:8b", "nomic-embed-text:latest"]
    call = ollama.unload.for_item(items[0])
    assert (call.method, call.path) == ("POST", "/api/generate")
    assert call.json_body == {"model": "llama3.1:8b", "keep_alive": 0}


def test_comfyui() -> None:
    comfyui = consumer("comfyui")
    assert comfyui.probe is not None
    assert comfyui.unload is not None
    assert comfyui.probe.find_resident(COMFYUI_STATS) == 6 * GIB
    assert comfyui.probe.find_loaded(COMFYUI_STATS) is None
    assert comfyui.unload.json_body == {"unload_models": True, "free_memory": True}
    assert comfyui.on_disconnect == "none"


def test_any_key_can_be_overridden() -> None:
    ollama = consumer(
        "ollama",
        health="/",
        paths={"llm": "/v1/chat/completions", "tts": "/x"},
        unload=None,
        probe=None,
    )
    assert ollama.health is not None
    assert ollama.health.path == "/"
    assert ollama.paths["llm"].path == "/v1/chat/completions"
    assert ollama.paths["tts"].path == "/x"
    assert ollama.unload is None


def test_a_path_of_ones_own_leaves_the_presets_others() -> None:
    assert set(consumer("ollama", paths={"image": "/x"}).paths) == {"image", "llm"}
