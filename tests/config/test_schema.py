"""Defaults, short forms, and what each key allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from gpumanager.config import (
    KINDS,
    Call,
    Config,
    ConfigError,
    ConsumerConfig,
    LoadCall,
    config_path_from_env,
    load_config,
    parse_config,
)
from gpumanager.model import Declared

ROOT = Path(__file__).parent.parent.parent


def consumer(**keys: Any) -> ConsumerConfig:
    document = {"consumers": {"mvoice": {"url": "http://127.0.0.1:8766", **keys}}}
    return parse_config(yaml.safe_dump(document)).consumers["mvoice"]


def test_the_example_loads_and_has_the_ports_people_know() -> None:
    config = load_config(ROOT / "config" / "consumers.yaml")
    assert config.port == 8770
    ports = {name: c.base_url.rpartition(":")[2] for name, c in config.consumers.items()}
    assert ports == {"mvoice": "8766", "whisper": "8178", "ollama": "11434", "comfyui": "8188"}
    for kind in KINDS:
        assert kind in config.consumers[config.candidates(kind)[0]].paths


def test_the_examples_comments_show_the_defaults() -> None:
    """A key that stands in a comment stands there with its default."""
    text = (ROOT / "config" / "consumers.yaml").read_text()
    uncommented = "\n".join(
        line.replace("# ", "", 1)
        if line.lstrip().startswith(
            (
                "# sample",
                "# health_i",
                "# drain",
                "# max_body",
                "# max_header",
                "# auth:",
                "# allowed_hosts",
                "# log:",
                "# audio_path",
                "# vram_managed",
                "# on_disc",
                "# timeouts",
            )
        )
        else line
        for line in text.splitlines()
    )
    assert uncommented != text
    assert parse_config(uncommented) == parse_config(text)


def test_the_contracts_example_loads() -> None:
    config = parse_config(
        """
listen: 127.0.0.1:8770
audio_proxy: mvoice
audio_path_prefix: /audio/
gpu: {total_mib: 0, reserved_mib: 256, device: 0, sample_interval: 2}
scheduler: {kind: locked, max_queue: 256, max_wait: 600}
health_interval: 5
drain_timeout: 30
max_body_mib: 1024
routing: {tts: mvoice, llm: ollama}
consumers:
  mvoice:
    url: http://127.0.0.1:8766
    health: {path: /health}
    paths:
      tts: {path: /api/tts, method: POST}
    vram_resident_mib: 2800
    vram_managed: false
    priority: 10
    can_coexist_with: [ollama]
    load: {method: POST, path: /api/admin/load}
    unload: {method: POST, path: /api/admin/unload}
    timeouts: {connect: 3, first_byte: 120, idle: 60, total: 600}
    on_disconnect: native
  ollama: {preset: ollama, url: "http://127.0.0.1:11434", vram_resident_mib: 9000}
"""
    )
    assert config.consumers["mvoice"].can_coexist_with == ("ollama",)
    assert config.consumers["ollama"].paths["llm"].path == "/api/chat"


def test_defaults_are_those_of_the_contract() -> None:
    config = Config()
    assert (config.listen, config.audio_path_prefix) == ("127.0.0.1:8770", "/audio/")
    assert (config.gpu.total_mib, config.gpu.reserved_mib, config.gpu.device) == (0, 256, 0)
    assert config.gpu.sample_interval == 2
    scheduler = config.scheduler
    assert (scheduler.kind, scheduler.max_queue, scheduler.max_wait) == ("locked", 256, 600)
    assert (config.health_interval, config.drain_timeout, config.max_body_mib) == (5, 30, 1024)
    timeouts = consumer().timeouts
    assert (timeouts.connect, timeouts.first_byte) == (3, 120)
    assert (timeouts.idle, timeouts.total) == (60, 600)
    assert consumer().on_disconnect == "native"


def test_a_consumer_may_have_to_be_told_that_its_client_left() -> None:
    told = consumer(on_disconnect={"path": "/interrupt"}).on_disconnect
    assert isinstance(told, LoadCall)
    assert (told.method, told.path) == ("POST", "/interrupt")
    with pytest.raises(ConfigError) as refused:
        consumer(on_disconnect={"path": "interrupt", "metod": "PUT"})
    faults = {fault.path: fault.message for fault in refused.value.faults}
    assert set(faults) == {
        "consumers.mvoice.on_disconnect.path",
        "consumers.mvoice.on_disconnect.metod",
    }
    assert "did you mean 'method'?" in faults["consumers.mvoice.on_disconnect.metod"]


def test_a_bare_string_is_a_path() -> None:
    short = consumer(health="/h", load="/l", unload="/u", paths={"tts": "/t"})
    long = consumer(
        health={"path": "/h", "method": "GET"},
        load={"path": "/l", "method": "post"},
        unload={"path": "/u", "method": "POST"},
        paths={"tts": {"path": "/t", "method": None}},
    )
    assert short == long


def test_an_address_is_taken_apart() -> None:
    config = parse_config('listen: "[::1]:99"')
    assert (config.host, config.port) == ("::1", 99)
    based = consumer(url="https://host:1/base/x/")
    assert (based.base_url, based.base_path) == ("https://host:1", "/base/x")
    assert consumer().base_path == ""


def test_an_unload_for_each_item_is_filled_in() -> None:
    call = consumer(
        probe={"path": "/ps", "items": "models"},
        unload={
            "for_each": "items",
            "path": "/models/{item}",
            "json": {"model": "{item}", "list": ["{item}!", 0], "keep_alive": 0},
        },
    ).unload
    assert call is not None
    made = call.for_item("a/b c")
    assert made.path == "/models/a%2Fb%20c"
    assert made.json_body == {"model": "a/b c", "list": ["a/b c!", 0], "keep_alive": 0}


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("listen", "8770", "HOST:PORT"),
        ("listen", "127.0.0.1:70000", "port of 0 to 65535"),
        ("listen", "127.0.0.1", "HOST:PORT"),
        ("listen", "[::::]:80", "[IPV6]:PORT"),
        ("listen", "host:٣٣", "HOST:PORT"),
        ("audio_path_prefix", "audio", "must start with '/'"),
        ("audio_path_prefix", "/", "such as /audio/"),
        ("audio_path_prefix", "/v1/audio/", "the broker's own"),
        ("audio_path_prefix", "/a<b>/", "such as /audio/"),
        ("audio_path_prefix", "/a/../v1/", "must not hold '.' or '..'"),
        ("health_interval", 0, "greater than 0"),
        ("health_interval", "5", "must be a number"),
        ("health_interval", True, "must be a number"),
        ("health_interval", float("inf"), "finite"),
        ("health_interval", float("nan"), "finite"),
        ("drain_timeout", -1, "at least 0"),
        ("max_body_mib", 0, "at least 1"),
        ("max_body_mib", 1.5, "whole number"),
        ("gpu.total_mib", -1, "at least 0"),
        ("gpu.total_mib", "8000", "whole number"),
        ("gpu.total_mib", True, "whole number"),
        ("gpu.device", -1, "NVML's index"),
        ("gpu.device", "first", "GPU-…"),
        ("gpu.device", True, "NVML's index"),
        ("gpu.device", 1.5, "NVML's index"),
        ("gpu.sample_interval", 0, "greater than 0"),
        ("scheduler.kind", "fair", "must be one of locked, passthrough"),
        ("scheduler.max_queue", 0, "at least 1"),
        ("scheduler.max_queue", 100_000, "at most 10000"),
        ("scheduler.policy", "lifo", "must be one of fifo, affinity"),
        ("scheduler.max_overtake", -1, "at least 0"),
        ("scheduler.max_overtaken_by", 1.5, "whole number"),
        ("consumers.mvoice.max_parallel", 0, "at least 1"),
        ("consumers.mvoice.max_parallel", 1001, "at most 1000"),
        ("consumers.mvoice.max_parallel", "all", "must be a whole number, or auto"),
        ("consumers.mvoice.max_parallel", 1.5, "whole number"),
        ("consumers.mvoice.can_run_with", "ollama", "must be a list"),
        ("log.format", "xml", "must be one of logfmt, json"),
        ("log.level", "loud", "must be one of debug, info, warning, error"),
        ("consumers.mvoice.url", "127.0.0.1:8766", "must be http://HOST"),
        ("consumers.mvoice.url", "ftp://h", "must be http://HOST"),
        ("consumers.mvoice.url", "http://", "must be http://HOST"),
        ("consumers.mvoice.url", "http://u:p@h", "without credentials"),
        ("consumers.mvoice.url", "http://h/?q", "without credentials, query"),
        ("consumers.mvoice.url", "http://h:0", "must be http://HOST"),
        ("consumers.mvoice.url", "http://h:99999", "must be http://HOST"),
        ("consumers.mvoice.url", "http://[::1", "must be http://HOST"),
        ("consumers.mvoice.url", "http://h/a b", "must be http://HOST"),
        ("consumers.mvoice.url", "http://{host}", "must be http://HOST"),
        ("consumers.mvoice.url", "http://h\\x", "must be http://HOST"),
        ("consumers.mvoice.url", "http://[::1]x:80", "must be http://HOST"),
        ("consumers.mvoice.url", "http://h:", "must be http://HOST"),
        ("consumers.mvoice.url", "http://a..b", "must be http://HOST"),
        ("consumers.mvoice.url", "http://" + "a" * 64, "must be http://HOST"),
        ("consumers.mvoice.url", 8766, "must be a string"),
        ("consumers.mvoice.health", ["/h"], "a path, or a mapping"),
        ("consumers.mvoice.health", 5, "a path, or a mapping"),
        ("consumers.mvoice.paths", ["/t"], "must be a mapping"),
        ("consumers.mvoice.vram_resident_mib", 2800.5, "whole number"),
        ("consumers.mvoice.vram_managed", "yes", "true or false"),
        ("consumers.mvoice.vram_managed", 1, "true or false"),
        ("consumers.mvoice.priority", "high", "whole number"),
        ("consumers.mvoice.can_coexist_with", "ollama", "must be a list"),
        ("consumers.mvoice.on_disconnect", "abort", "must be one of native, none"),
        ("consumers.mvoice.on_disconnect", 5, "must be one of native, none"),
        ("consumers.mvoice.timeouts.connect", 0, "greater than 0"),
        ("consumers.mvoice.timeouts", 5, "must be a mapping"),
        ("consumers.mvoice", "http://h", "must be a mapping"),
        ("consumers", ["mvoice"], "must be a mapping"),
    ],
)
def test_what_is_not_allowed(where: str, value: Any, words: str) -> None:
    document: dict[str, Any] = {
        "consumers": {"mvoice": {"url": "http://127.0.0.1:8766", "timeouts": {}}},
        "gpu": {},
        "scheduler": {},
        "log": {},
    }
    inner = document
    *parents, last = where.split(".")
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    with pytest.raises(ConfigError) as refused:
        parse_config(yaml.safe_dump(document))
    (fault,) = refused.value.faults
    assert fault.path == where
    assert fault.line is not None
    assert words in fault.message


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("consumers.mvoice.health", {"tcp": "8188"}, "must be HOST:PORT"),
        ("consumers.mvoice.health", {"method": "GET"}, "either a path or tcp"),
        ("consumers.mvoice.health", {"path": "/", "tcp": "h:1"}, "either a path or tcp"),
        ("consumers.mvoice.floor_mib", -1, "at least 0"),
        ("consumers.mvoice.max_mib", -1, "at least 0"),
        ("consumers.mvoice.pinned", "yes", "true or false"),
        ("consumers.mvoice.idle_unload", "15", "such as 90s or 15m"),
        ("consumers.mvoice.idle_unload", "1y", "such as 90s or 15m"),
        ("consumers.mvoice.idle_unload", "0s", "greater than 0"),
        ("consumers.mvoice.idle_unload", "15m", "needs an 'unload' call"),
        ("consumers.mvoice.evict", "http", "has no 'unload' call"),
        ("consumers.mvoice.evict", ["stop"], "must be http, or have exactly one of unit"),
        ("consumers.mvoice.evict", [{}], "exactly one of unit"),
        ("consumers.mvoice.evict", [{"unit": "a.service", "signal": "TERM"}], "exactly one of"),
        ("consumers.mvoice.evict", [{"unit": "-x"}], "name of a systemd unit"),
        ("consumers.mvoice.evict", [{"unit": "a b"}], "name of a systemd unit"),
        ("consumers.mvoice.evict", [{"container": "../x"}], "name or id of a container"),
        ("consumers.mvoice.evict", [{"container": "x", "socket": "x.sock"}], "absolute path"),
        ("consumers.mvoice.evict", [{"container": "x", "scope": "user"}], "belongs to unit"),
        ("consumers.mvoice.evict", [{"signal": "STOP"}], "must be one of TERM, INT, QUIT"),
        ("consumers.mvoice.evict", [{"signal": "TERM", "start": "serve"}], "must be a list"),
        ("consumers.mvoice.evict", [{"signal": "TERM", "start": [""]}], "without a shell"),
        ("consumers.mvoice.evict", [{"unit": "a.service", "start": ["x"]}], "belongs to signal"),
        ("consumers.mvoice.evict", [{"checkpoint": False}], "must be one of true"),
        ("consumers.mvoice.oom", {"patterns": ["("]}, "must be a regular expression"),
        ("consumers.mvoice.oom", {"status": [99]}, "at least 100"),
        ("consumers.mvoice.settled", "/x", "is required"),
        ("consumers.mvoice.done", {"id": "x"}, "is required"),
        ("eviction", "random", "must be one of lru, cost"),
        ("default_resident", ["mvoice"], "neither a load nor a warm call"),
        ("default_resident", ["voice"], "unknown consumer 'voice'"),
        ("restore_after", -1, "greater than 0"),
        ("gpu.release_timeout", 0, "greater than 0"),
    ],
)
def test_what_is_not_allowed_of_memory(where: str, value: Any, words: str) -> None:
    """The fault may lie deeper in what was given."""
    document: dict[str, Any] = {
        "consumers": {"mvoice": {"url": "http://127.0.0.1:8766"}},
        "gpu": {},
    }
    *parents, last = where.split(".")
    inner = document
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    if last == "idle_unload" and value != "15m":
        inner["unload"] = "/unload"
    with pytest.raises(ConfigError) as refused:
        parse_config(yaml.safe_dump(document))
    assert words in refused.value.faults[0].message
    assert {fault.path.startswith(where) for fault in refused.value.faults} == {True}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(7, 7), (1.5, 1.5), ("90s", 90), ("15m", 900), ("1.5 h", 5400), ("200ms", 0.2)],
)
def test_a_duration_may_have_a_unit(value: object, seconds: float) -> None:
    assert consumer(idle_unload=value, unload="/u").idle_unload == pytest.approx(seconds)


def test_the_ways_to_evict() -> None:
    assert consumer().eviction_methods == ()
    assert [method.name for method in consumer(unload="/u").eviction_methods] == ["http"]
    assert consumer(unload="/u", evict=[]).eviction_methods == ()
    eviction_methods = consumer(
        unload="/u",
        evict=["http", {"unit": "a@1.service", "scope": "system"}, {"checkpoint": True}],
    ).eviction_methods
    assert [method.name for method in eviction_methods] == ["http", "unit", "checkpoint"]
    assert (eviction_methods[1].scope, eviction_methods[1].grace) == ("system", 10)
    (single,) = consumer(evict={"signal": "TERM", "start": ["serve", "--it"]}).eviction_methods
    assert (single.name, single.start) == ("signal", ("serve", "--it"))


def test_one_stands_for_a_list_of_it() -> None:
    done = consumer(
        done={
            "match": {"path": "/prompt"},
            "id": "prompt_id",
            "poll": "/history/{id}",
            "until": "length(@) > `0`",
            "cancel": {"path": "/cancel/{id}"},
        }
    ).done
    assert done is not None
    assert done.match.path == ("/prompt",)
    assert done.cancel[0].filled("id", "a/b").path == "/cancel/a%2Fb"


def test_placeholders_and_query() -> None:
    call = Call.model_validate(
        {
            "path": "/m/{model}?x=1",
            "query": {"q": "{model}", "n": 2, "f": True},
            "json": ["{model}"],
        }
    ).filled("model", "a/b &c")
    assert call.target == "/m/a%2Fb%20%26c?x=1&q=a%2Fb+%26c&n=2&f=true"
    assert call.json_body == ["a/b &c"]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 23.65 GiB total capacity)",
        "RuntimeError: CUDA error: out of memory",
        "HIP out of memory. Tried to allocate 512 MiB",
        "torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory",
        "llama runner process has terminated: cudaMalloc failed: out of memory",
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4 MiB: hipMallocAsync failed",
        "cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED",
        "unable to allocate CUDA0 buffer",
        "out of memory on CUDA device 0",
        "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
        "ggml_gallocr_reserve_n: failed to allocate CUDA0 buffer of size 4294967296",
        "vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "VK_ERROR_OUT_OF_DEVICE_MEMORY",
        "XPU out of memory. Tried to allocate 2.00 GiB",
        "No available memory for the cache blocks. Try increasing gpu_memory_utilization",
        "model name=ggml-org/gemma-3-12b-it-GGUF:Q4_K_M failed to load",
        "model name=\\n failed to load",
        "with internal loader: could not load model: rpc error: code = Canceled desc = ",
    ],
)
def test_the_words_for_out_of_memory(text: str) -> None:
    signs = consumer().out_of_memory
    assert signs.said_in(f'{{"error": "{text}"}}'.encode())


@pytest.mark.parametrize(
    "text",
    [
        "model requires more system memory (12 GiB) than is available (8 GiB)",
        "the prompt is out of scope",
        "internal error",
        "failed to allocate a slot for the request",
        "rate limit exceeded",
        "model name=x is not found",
        "could not load model: rpc error: code = Unavailable desc = error reading from server: EOF",
    ],
)
def test_other_words(text: str) -> None:
    assert not consumer().out_of_memory.said_in(text.encode())


def test_the_most_is_no_less_than_what_is_needed() -> None:
    assert consumer(vram_resident_mib=2800, max_mib=2800).declared == Declared(2800, 2800)
    assert consumer(max_mib=100).declared == Declared(0, 100)
    with pytest.raises(ConfigError, match="is less than 'vram_resident_mib', 2800"):
        consumer(vram_resident_mib=2800, max_mib=2799)


def test_a_bad_request_is_no_lack_of_memory() -> None:
    assert 400 not in consumer().out_of_memory.status
    assert 500 in consumer().out_of_memory.status


def test_a_consumer_may_have_its_own_words() -> None:
    signs = consumer(oom={"status": [418], "patterns": ["teapot is full"]}).out_of_memory
    assert signs.status == (418,)
    assert signs.said_in(b"The TEAPOT is full")
    assert not signs.said_in(b"CUDA out of memory")


@pytest.mark.parametrize(
    ("call", "path", "words"),
    [
        ({"path": "free"}, "path", "must start with '/'"),
        ({"path": "/a b"}, "path", "printable ASCII"),
        ({"path": "/ü"}, "path", "printable ASCII"),
        ({"path": "/x\r\nX: y"}, "path", "printable ASCII"),
        ({"path": "/x", "method": "P OST"}, "method", "HTTP method"),
        ({"path": "/x", "timeout": 0}, "timeout", "greater than 0"),
        ({"path": "/x", "ok": [99]}, "ok[0]", "at least 100"),
        ({"path": "/x", "ok": 200}, "ok", "must be a list"),
        ({"path": "/x", "headers": {"X-A": 1}}, "headers.X-A", "must be a string"),
        ({"path": "/x", "headers": {"X-A": "a\r\nX-B: b"}}, "headers.X-A", "one line"),
        ({"path": "/x", "headers": {"X A": "a"}}, "headers.X A", "a header's name"),
        ({"path": "/x", "headers": {"Host": "a"}}, "headers.Host", "by the broker itself"),
        ({"path": "/x", "headers": {"content-length": "1"}}, "headers.content-length", "itself"),
        ({"path": "/x", "json": float("nan")}, "json", "JSON can express"),
        ({"method": "POST"}, "path", "is required"),
        ({"path": "/x", "jsn": {}}, "jsn", "did you mean 'json'?"),
    ],
)
def test_what_a_call_may_not_be(call: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        consumer(load=call)
    (fault,) = refused.value.faults
    assert fault.path == f"consumers.mvoice.load.{path}"
    assert words in fault.message


@pytest.mark.parametrize(
    ("probe", "path", "words"),
    [
        ({"path": "/p", "loaded": "a["}, "loaded", "JMESPath expression"),
        ({"path": "/p", "resident": ""}, "resident", "JMESPath expression"),
        ({"path": "/p", "loaded": "(" * 5000}, "loaded", "JMESPath expression"),
        ({"path": "/p", "loaded": "a[" + "9" * 5000 + "]"}, "loaded", "JMESPath expression"),
        ({"path": "/p", "loaded": "a && lenght(b[0:2])"}, "loaded", "did you mean 'length'?"),
        ({"path": "/p", "items": 5}, "items", "must be a string"),
        ({"path": "/p", "unit": "TB"}, "unit", "must be one of B, KiB, MiB, GiB"),
        ({"path": "/p", "json": {"when": "2026-01-01"}}, "json", "JSON can express"),
    ],
)
def test_what_a_probe_may_not_be(probe: dict[str, Any], path: str, words: str) -> None:
    text = yaml.safe_dump({"consumers": {"m": {"url": "http://h", "probe": probe}}})
    with pytest.raises(ConfigError) as refused:
        parse_config(text.replace("'2026-01-01'", "2026-01-01"))
    (fault,) = refused.value.faults
    assert fault.path == f"consumers.m.probe.{path}"
    assert words in fault.message


@pytest.mark.parametrize(
    ("expression", "answer"),
    [("length(@)", None), ("sum(@)", ["a"]), ("ceil(@)", float("inf")), ("@[::0]", [1])],
)
def test_an_answer_that_does_not_fit_gives_nothing(expression: str, answer: Any) -> None:
    probe = consumer(probe={"path": "/p", "resident": expression}).probe
    assert probe is not None
    assert probe.find_resident(answer) is None


def test_where_the_config_is_looked_for() -> None:
    assert config_path_from_env({"GPUMANAGER_CONFIG": "/etc/x.yaml"}) == "/etc/x.yaml"
    assert config_path_from_env({"GPUMANAGER_CONFIG": ""}) == "config/consumers.yaml"
    assert config_path_from_env({}) == "config/consumers.yaml"


def test_a_ca_file_has_to_hold_certificates(tmp_path: Path) -> None:
    authority, other = tmp_path / "ca.pem", tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(authority)
    other.write_text("no certificate")
    https = "https://gpu.example:8443"
    assert consumer(url=https, ca_file=str(authority)).ca_file == str(authority)
    for file, url, said in [
        (str(other), https, "ca_file: must be a file of certificates in PEM"),
        (str(tmp_path / "none.pem"), https, "ca_file: cannot be read: No such file or directory"),
        ("ca.pem", https, "ca_file: must be the absolute path of a file"),
        (str(authority), "http://gpu.example", "ca_file: is of use only where 'url' is https"),
    ]:
        with pytest.raises(ConfigError, match=said):
            consumer(url=url, ca_file=file)


def test_ports_are_numbers_of_consumers_elsewhere() -> None:
    config = parse_config(
        "ports: {11434: ollama}\nconsumers: {ollama: {url: 'http://127.0.0.1:11500'}}"
    )
    assert dict(config.ports) == {11434: "ollama"}
    assert config.addresses == ("127.0.0.1:8770", "127.0.0.1:11434")


@pytest.mark.parametrize(
    ("ports", "why"),
    [
        ("{11500: ollama}", "'ollama' listens there itself: move it, and its 'url', to another"),
        ("{8770: ollama}", "is the port of 'listen' already"),
        ("{11434: olama}", "unknown consumer 'olama'; did you mean 'ollama'?"),
        ("{0: ollama}", "must be a port: a number from 1 to 65535"),
        ("{x: ollama}", "must be a port"),
        ("{99999: ollama}", "must be a port"),
    ],
)
def test_a_port_that_cannot_be_is_refused(ports: str, why: str) -> None:
    text = f"ports: {ports}\nconsumers: {{ollama: {{url: 'http://127.0.0.1:11500'}}}}"
    with pytest.raises(ConfigError) as refused:
        parse_config(text)
    assert why in str(refused.value)
