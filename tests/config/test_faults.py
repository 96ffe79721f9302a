"""Every fault at once, each where it is; and no text that gets past it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumanager.config import ConfigError, load_config, parse_config
from gpumanager.config.loading import LARGEST_BYTES
from gpumanager.config.presets import names


def faults(text: str | bytes) -> list[tuple[int | None, str, str]]:
    with pytest.raises(ConfigError) as refused:
        parse_config(text)
    return [(fault.line, fault.path, fault.message) for fault in refused.value.faults]


@pytest.mark.parametrize(
    ("scheduler", "key", "message"),
    [
        ("{hold: 3}", "hold", "is of use only with 'policy: affinity'"),
        ("{hold: 3s, policy: fifo}", "hold", "is of use only with 'policy: affinity'"),
        ("{policy: affinity, kind: passthrough}", "policy", "is of use only with 'kind: locked'"),
    ],
)
def test_a_key_of_the_queue_that_would_do_nothing(scheduler: str, key: str, message: str) -> None:
    assert faults(f"scheduler: {scheduler}") == [(1, f"scheduler.{key}", message)]
    for good in ("{hold: 0}", "{hold: 3, policy: affinity}", "{policy: affinity, kind: locked}"):
        parse_config(f"scheduler: {good}")


def test_all_faults_at_once_each_with_its_line() -> None:
    found = faults(
        """\
listen: nowhere
rooting: {}
gpu:
  reserved_mib: 10
  sample_interval: 0
routing: {tts: mvoce, Video: ollama}
audio_proxy: nobody
consumers:
  mvoice:
    url: http://127.0.0.1:8766
    vram_residnet_mib: 3
    can_coexist_with: [ollama, mvoice, olama]
    timeouts:
      connect: -3
    unload: {for_each: items, path: /x}
  ollama: {preset: olama, url: "http://127.0.0.1:11434"}
  nameless:
    priority: 1
  "odd name": {url: "http://127.0.0.1:1"}
"""
    )
    assert [(line, path) for line, path, _ in found] == [
        (1, "listen"),
        (2, "rooting"),
        (5, "gpu.sample_interval"),
        (6, "routing.Video"),
        (6, "routing.tts"),
        (7, "audio_proxy"),
        (11, "consumers.mvoice.vram_residnet_mib"),
        (12, "consumers.mvoice.can_coexist_with[1]"),
        (12, "consumers.mvoice.can_coexist_with[2]"),
        (14, "consumers.mvoice.timeouts.connect"),
        (15, "consumers.mvoice.unload.for_each"),
        (16, "consumers.ollama.preset"),
        (17, "consumers.nameless.url"),
        (19, "consumers.odd name"),
    ]
    words = {path: message for _, path, message in found}
    assert "did you mean 'routing'?" in words["rooting"]
    assert "did you mean 'mvoice'?" in words["routing.tts"]
    assert "lower-case" in words["routing.Video"]
    assert "did you mean 'vram_resident_mib'?" in words["consumers.mvoice.vram_residnet_mib"]
    assert "did you mean 'ollama'?" in words["consumers.mvoice.can_coexist_with[2]"]
    preset = words["consumers.ollama.preset"]
    assert preset == f"unknown preset 'olama'; did you mean 'ollama'? known: {', '.join(names())}"
    assert words["consumers.nameless.url"] == "is required"


def test_with_whom_a_consumer_runs_is_checked() -> None:
    found = faults(
        """
consumers:
  mvoice: {url: "http://127.0.0.1:1", can_run_with: [ollama, mvoice, olama]}
  ollama: {url: "http://127.0.0.1:2"}
"""
    )
    assert [path for _, path, _ in found] == [
        "consumers.mvoice.can_run_with[1]",
        "consumers.mvoice.can_run_with[2]",
    ]
    assert "max_parallel" in found[0][2]


def test_jobs_that_one_call_would_stop_together_do_not_run_at_once() -> None:
    ((_, path, message),) = faults(
        """
consumers:
  a: {url: "http://127.0.0.1:1", max_parallel: 2, on_disconnect: {path: /interrupt}}
"""
    )
    assert path == "consumers.a.max_parallel"
    assert "on_disconnect" in message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("slots: {path: /props, count: n}, on_disconnect: {path: /interrupt}", "on_disconnect"),
        ("health: /health", "needs 'slots'"),
        ("slots: {path: /props, count: n}", "needs a 'health' or 'probe' call"),
    ],
)
def test_auto_needs_a_server_that_can_be_asked(keys: str, words: str) -> None:
    ((_, path, message),) = faults(
        f"""
consumers:
  a: {{url: "http://127.0.0.1:1", max_parallel: auto, {keys}}}
"""
    )
    assert path == "consumers.a.max_parallel"
    assert words in message


@pytest.mark.parametrize("keys", ["unload: /u", "evict: [{signal: TERM, start: [x]}]"])
def test_who_is_started_ahead_is_a_unit_or_a_container(keys: str) -> None:
    text = f'consumers:\n  a: {{url: "http://127.0.0.1:1", start_ahead: true, {keys}}}\n'
    ((_, path, message),) = faults(text)
    assert path == "consumers.a.start_ahead"
    assert "a unit or a container" in message
    parse_config(text.replace(keys, "evict: {unit: a.service}"))
    parse_config(text.replace(keys, "evict: [{container: a}]"))


def test_lists_and_their_items_are_told_of_in_the_configs_own_words() -> None:
    found = faults(
        """\
routing: {llm: [], embed: [a, 5], image: 5, tts: {a: b}, rerank: [a, nobody]}
ports: {08188: a, "011434": a}
consumers:
  a:
    url: http://127.0.0.1:1
    models: [x, {name: y, served_at: z}]
    gpu_work: [/x, {path: /y, methods: GET}]
"""
    )
    port = "must be a port: a number from 1 to 65535"
    assert [(path, message) for _, path, message in found] == [
        ("routing.embed[1]", "must be a string"),
        ("routing.image", "must be a string"),
        ("routing.llm", "must not be empty"),
        ("routing.rerank[1]", "unknown consumer 'nobody'; known: a"),
        ("routing.tts", "must be a string"),
        ("ports.011434", port),
        ("ports.08188", port),
        (
            "consumers.a.models[1].served_at",
            "unknown key 'served_at'; did you mean 'served_as'? "
            "known: name, pinned, prefetch, served_as, vram_mib",
        ),
        (
            "consumers.a.gpu_work[1].methods",
            "unknown key 'methods'; did you mean 'method'? known: method, path",
        ),
    ]


def test_a_fault_tells_what_was_found() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config("max_body_mib: -3\nlisten: " + "x" * 500)
    first, second = refused.value.faults
    assert str(first) == "line 1: max_body_mib: must be at least 1 (found -3)"
    assert len(str(second)) < 200
    assert str(refused.value).startswith("<config>: 2 faults\n  line 1: ")


def test_memory_that_can_never_be_enough() -> None:
    found = faults(
        """\
gpu: {total_mib: 8000, reserved_mib: 256}
consumers:
  llm: {url: "http://127.0.0.1:1", vram_resident_mib: 7744}
  image:
    url: http://127.0.0.1:2
    vram_resident_mib: 7745
"""
    )
    assert [(line, path) for line, path, _ in found] == [(6, "consumers.image.vram_resident_mib")]
    assert "7744 MiB are left" in found[0][2]
    assert faults("gpu: {total_mib: 100}")[0][1] == "gpu.reserved_mib"


def test_what_a_preset_filled_in_is_found_at_the_preset() -> None:
    found = faults(
        """\
consumers:
  ollama:
    url: http://127.0.0.1:11434
    preset: ollama
    probe: {path: /api/ps}
"""
    )
    # The preset's unload is made for each item, which this probe does not list.
    assert [(line, path) for line, path, _ in found] == [(4, "consumers.ollama.unload.for_each")]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "empty"),
        ("# nothing\n", None, "empty"),
        ("[1, 2]", 1, "must be a mapping"),
        ("just text", 1, "must be a mapping"),
        ("a: [1,\nb: 2", 2, "not valid YAML"),
        ("a: 1\n\tb: 2", 2, "not valid YAML"),
        ("listen: a:1\nlisten: b:1", 2, "twice, first in line 1"),
        ("1: 2", 1, "in quotes"),
        ("? [a]\n: b", 1, "must be a string"),
        ("log: &x {level: *x}", None, "alias contains itself"),
        ("log: *nowhere", 1, "not valid YAML"),
        ("log: {<<: 5}", 1, "must merge a mapping"),
        ("listen: !!python/object/apply:os.system [x]", 1, "is not allowed"),
        ("listen: !!set {a, b}", 1, "is not allowed"),
        ("listen: !secret x", 1, "is not allowed"),
        ("!!set {listen}", 1, "must be a mapping at the top"),
        ("listen: !!python/name:os.system x", 1, "is not allowed"),
        ("a: 1\n---\nb: 2", 2, "not valid YAML"),
        ("listen: 2026-13-45", 1, "no valid timestamp"),
        ("listen: !!timestamp x", 1, "no valid timestamp"),
        ("listen: !!bool x", 1, "no valid bool"),
        ("listen: !!int ''", 1, "no valid int"),
        ("max_body_mib: 0b_", 1, "no valid int"),
        ("max_body_mib: 1" + "0" * 5000, 1, "no valid int"),
        ("health_interval: 1" + "0" * 400, 1, "a finite number"),
        ("health_interval: 1" + ":1" * 300 + ".5", 1, "no valid float"),
        ("log: &x {<<: {<<: *x}}", None, "alias contains itself"),
        ("<x: 1", 1, "unknown key '<x'"),
        (b"listen: \xff\xfe", 1, "not UTF-8"),
        ("listen: \0", None, "not valid YAML"),
        ("a: " + "[" * 5000, None, "nested too deeply"),
    ],
)
def test_texts_that_are_no_config(text: str | bytes, line: int | None, words: str) -> None:
    found = faults(text)
    assert len(found) == 1
    assert found[0][0] == line
    assert words in found[0][2]


def test_faults_of_the_text_do_not_hide_those_of_the_keys() -> None:
    found = faults(
        """\
listen: nowhere
listen: 127.0.0.1:1
1: x
health_interval: 2026-13-45
max_body_mib: 0
audio_proxy: nobody
"""
    )
    assert [(line, path) for line, path, _ in found] == [
        (1, "listen"),
        (2, "listen"),
        (3, ""),
        (4, "health_interval"),
        (5, "max_body_mib"),
        (6, "audio_proxy"),
    ]


def test_where_consumers_are_no_mapping_references_are_not_blamed() -> None:
    found = faults("consumers: [mvoice]\nrouting: {tts: mvoice}\naudio_proxy: mvoice")
    assert [path for _, path, _ in found] == ["consumers"]


def test_keys_that_look_like_the_schemas_own_marks_are_told_of() -> None:
    found = faults(
        """\
consumers:
  mvoice:
    url: http://h
    <call>: 1
    on_disconnect: {path: /x, <word>: 1}
"""
    )
    assert [(line, path) for line, path, _ in found] == [
        (4, "consumers.mvoice.<call>"),
        (5, "consumers.mvoice.on_disconnect.<word>"),
    ]


def test_secrets_are_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(
            """\
consumers:
  mvoice:
    url: http://user:hunter/2@host
    load: {path: /x, headers: {Authorization: "hunter2\\n"}}
"""
        )
    assert [fault.path for fault in refused.value.faults] == [
        "consumers.mvoice.url",
        "consumers.mvoice.load.headers.Authorization",
    ]
    assert "hunter" not in str(refused.value)
    assert "host" in refused.value.faults[0].found


def test_a_fault_is_one_line_whatever_the_key() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config('"a\\nb\\e[31m": 1')
    assert len(str(refused.value).splitlines()) == 2
    assert "\x1b" not in str(refused.value)


def test_anchors_and_merges_work() -> None:
    config = parse_config(
        """\
consumers:
  a: &base {url: "http://127.0.0.1:1", priority: 5, timeouts: &t {connect: 1}}
  b: {<<: *base, priority: 7}
  c: {<<: [*base], timeouts: {<<: *t, idle: 9}}
"""
    )
    assert (config.consumers["b"].priority, config.consumers["b"].timeouts.connect) == (7, 1)
    assert (config.consumers["c"].timeouts.connect, config.consumers["c"].timeouts.idle) == (1, 9)


def test_a_byte_order_mark_is_no_matter() -> None:
    assert parse_config(b"\xef\xbb\xbflisten: 127.0.0.1:1").port == 1


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match="cannot be read") as refused:
        load_config(path)
    assert refused.value.source == str(path)


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_config(tmp_path / "pipe")


def test_a_file_far_too_large_for_a_config_is_not_read(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (LARGEST_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than 1024 KiB"):
        load_config(large)


KEYS = st.sampled_from(
    [
        *("listen", "gpu", "scheduler", "routing", "consumers", "log", "audio_proxy", "mvoice"),
        *("url", "health", "probe", "paths", "tts", "path", "method", "json", "ok", "timeouts"),
        *("unload", "load", "for_each", "items", "preset", "can_coexist_with", "total_mib"),
        *("vram_resident_mib", "loaded", "resident", "unit", "headers", "max_queue", "", "x"),
        *("on_disconnect", "<call>", "[key]", "<<", "=", "a\nb"),
    ]
)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 9000),
        st.integers(),
        st.integers(250, 2000).map(lambda bits: 2**bits),
        st.floats(),
        st.text(max_size=8),
        st.dates(),
        st.binary(max_size=4),
        st.sampled_from(["ollama", "mvoice", "http://127.0.0.1:1", "/x", "items", "a[", "GPU-1"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_whatever_stands_there_it_loads_or_is_faulted(document: dict[str, Any]) -> None:
    try:
        parse_config(yaml.safe_dump(document))
    except ConfigError as error:
        assert error.faults  # noqa: PT017  # what matters is that nothing else is raised
        assert str(error)  # noqa: PT017


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_whatever_the_text_it_loads_or_is_faulted(text: str | bytes) -> None:
    try:
        parse_config(text)
    except ConfigError as error:
        assert error.faults  # noqa: PT017  # as above


TAGS = ["int", "float", "bool", "null", "timestamp", "binary", "map", "seq", "set", "omap", "merge"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TAGS), st.text(max_size=8))
def test_whatever_the_tag_it_loads_or_is_faulted(tag: str, text: str) -> None:
    scalar = yaml.safe_dump(text, default_style='"').strip()
    try:
        parse_config(f"max_body_mib: !!{tag} {scalar}")
    except ConfigError as error:
        assert [fault.line for fault in error.faults] == [1]  # noqa: PT017  # as above
