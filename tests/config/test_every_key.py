"""Every key of the config does something."""

from __future__ import annotations

from pathlib import Path

from tests.support.reads import PACKAGE, keys, read_keys

ELSEWHERE = {
    ("ConsumerConfig", "preset"): PACKAGE / "config" / "presets.py",
}
"""Keys that are used up before the schema sees them, and where."""


def test_every_key_is_read_by_something() -> None:
    unread = keys() - read_keys()
    for key, path in ELSEWHERE.items():
        assert f'"{key[1]}"' in path.read_text(encoding="utf-8")
        unread.discard(key)
    assert unread == set()


def test_a_key_that_only_its_namesake_is_read_of_counts_as_unread(tmp_path: Path) -> None:
    source = tmp_path / "reader.py"
    source.write_text(
        "class Reader:\n"
        "    def __init__(self, config: Config) -> None:\n"
        "        self._config = config\n"
        "    def look(self, name: str) -> None:\n"
        "        consumer = self._config.consumers[name]\n"
        "        if (done := consumer.done) is not None and done.matches('POST', '/'):\n"
        "            print(done.poll.every, done.poll.target)\n"
        "        for each, other in self._config.consumers.items():\n"
        "            print(each, [method.unit for method in other.eviction_methods])\n"
    )
    assert read_keys([source]) == {
        ("Config", "consumers"),
        ("ConsumerConfig", "done"),
        ("ConsumerConfig", "evict"),
        ("ConsumerConfig", "unload"),
        ("Done", "match"),
        ("Done", "poll"),
        ("Match", "method"),
        ("Match", "path"),
        ("Poll", "every"),
        ("Call", "path"),
        ("Call", "query"),
        ("EvictionMethod", "unit"),
    }
