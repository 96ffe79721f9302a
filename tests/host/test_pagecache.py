"""Files read ahead, for real: what is in the page cache afterwards."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import pytest

from gpumanager.host import pagecache
from gpumanager.host.pagecache import CHUNK, files_of, idle_io, read_ahead
from tests.support.pages import cached_bytes, drop, on_disk


def always() -> bool:
    return True


def test_a_file_is_in_the_page_cache_afterwards(tmp_path: Path) -> None:
    file = on_disk(tmp_path / "weights", 3 * CHUNK + 5)
    assert read_ahead(str(file), 10 * CHUNK, always) == 3 * CHUNK + 5
    assert cached_bytes(file) == 3 * CHUNK + 5


def test_what_is_there_already_is_not_read_again(tmp_path: Path) -> None:
    file = on_disk(tmp_path / "weights", 2 * CHUNK)
    read_ahead(str(file), 10 * CHUNK, always)
    assert read_ahead(str(file), 10 * CHUNK, always) == 0
    drop(file)
    assert read_ahead(str(file), 10 * CHUNK, always) == 2 * CHUNK


def test_it_is_read_anyway_where_nothing_tells_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = on_disk(tmp_path / "weights", CHUNK)
    monkeypatch.setattr(pagecache, "_NOWAIT", None)
    assert [read_ahead(str(file), CHUNK, always) for _ in range(2)] == [CHUNK, CHUNK]


def test_no_more_is_read_than_is_allowed(tmp_path: Path) -> None:
    file = on_disk(tmp_path / "weights", 4 * CHUNK)
    assert read_ahead(str(file), CHUNK + 7, always) == CHUNK + 7


def test_it_ends_at_the_next_chunk_when_it_is_told_to(tmp_path: Path) -> None:
    file = on_disk(tmp_path / "weights", 4 * CHUNK)
    answers = iter([True, True, False])
    assert read_ahead(str(file), 10 * CHUNK, lambda: next(answers)) == 2 * CHUNK


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        read_ahead(str(tmp_path / "gone"), CHUNK, always)


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf", "b.txt", "hub/x/2.bin", "hub/1.bin", "hub/x/deep/3.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "hub" / "pipe")
    (tmp_path / "hub" / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "hub" / "to-a").symlink_to(tmp_path / "a.gguf")

    def found(*places: str) -> list[str]:
        files = files_of(str(tmp_path / place) for place in places)
        return [str(Path(file).relative_to(tmp_path)) for file in files]

    assert found("b.txt", "*.gguf") == ["b.txt", "a.gguf", "b.gguf"]
    assert found("hub") == ["hub/1.bin", "hub/to-a", "hub/x/2.bin", "hub/x/deep/3.bin"]
    assert found("hub/**/*.bin") == ["hub/1.bin", "hub/x/2.bin", "hub/x/deep/3.bin"]
    assert found("missing", "*.none") == []


def test_only_so_many_files_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / str(number)).touch()
    monkeypatch.setattr(pagecache, "MOST_FILES", 3)
    assert len(list(files_of([str(tmp_path)]))) == 3


def test_only_the_thread_that_asks_leaves_the_disk_to_others() -> None:
    found = []

    def ask() -> None:
        idle_io()
        found.append(psutil.Process(threading.get_native_id()).ionice().ioclass)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [psutil.IOPRIO_CLASS_IDLE]
    assert psutil.Process().ionice().ioclass != psutil.IOPRIO_CLASS_IDLE


def test_what_is_available_is_a_part_of_the_hosts_memory() -> None:
    assert 0 < pagecache.available_bytes() <= psutil.virtual_memory().total
