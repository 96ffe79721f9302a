"""What the documents claim and a test can know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from docs import reference
from gpumanager import errors
from gpumanager.cli import main
from gpumanager.config import (
    Config,
    ConsumerConfig,
    GpuConfig,
    SchedulerConfig,
    Timeouts,
    parse_config,
)
from gpumanager.config.presets import names
from tests.support.sdk_calls import CALLS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [README, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]


def error_classes() -> list[type[errors.BrokerError]]:
    return [
        found
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, errors.BrokerError)
    ]


def test_the_readmes_table_of_errors_is_true() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.+?) \| (yes|no) \|", README, re.MULTILINE)
    told = {
        (int(status), code, retryable == "yes")
        for status, codes, retryable in rows
        for code in re.findall(r"`(\w+)`", codes)
    }
    # Nobody reads a 499.
    made = {(e.status, e.code, e.retryable) for e in error_classes() if e.status != 499}
    assert told == made


def test_the_readmes_config_loads() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert set(parse_config(text).consumers) == {"mvoice", "ollama"}


def test_every_preset_has_its_line() -> None:
    table = (ROOT / "docs" / "vram.md").read_text().partition("| Preset |")[2]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`([\w-]+)`", " ".join(rows))) == sorted(names())


def test_the_number_of_presets_is_right_wherever_it_stands() -> None:
    texts = [*DOCUMENTS, (ROOT / "config" / "consumers.yaml").read_text()]
    told = [n for text in texts for n in re.findall(r"(?:\[|each of )(\d+) servers", text)]
    told += [n for text in texts for n in re.findall(r"\b(\d+) presets\b", text)]
    assert told.count(str(len(names()))) == len(told) >= 3


def test_the_methods_of_the_documents_load() -> None:
    text = (ROOT / "docs" / "vram.md").read_text()
    (eviction_methods,) = re.findall(r"```yaml\n(evict:.*?)```", text, re.DOTALL)
    consumer = {"url": "http://127.0.0.1:1", "unload": "/u", **yaml.safe_load(eviction_methods)}
    config = parse_config(yaml.safe_dump({"consumers": {"it": consumer}}))
    named = [method.name for method in config.consumers["it"].eviction_methods]
    assert named == ["http", "unit", "container", "signal", "checkpoint"]


def test_the_example_config_shows_every_key() -> None:
    text = (ROOT / "config" / "consumers.yaml").read_text()
    models: list[type[BaseModel]] = [Config, GpuConfig, SchedulerConfig, ConsumerConfig, Timeouts]
    for model in models:
        for name, field in model.model_fields.items():
            assert re.search(rf"\b{field.alias or name}\b", text), name


def test_the_readmes_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("index", range(len(DOCUMENTS)))
def test_links_and_files_exist(index: int) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", DOCUMENTS[index]):
        assert (ROOT / link).exists() or (ROOT / "docs" / link).exists(), link
    for module in re.findall(r"`((?:tests|config|gpumanager)/[\w/.-]+)`", DOCUMENTS[index]):
        assert (ROOT / module).exists(), module


def test_the_modules_that_the_documents_name_exist() -> None:
    package = ROOT / "gpumanager"
    text = (ROOT / "docs" / "architecture.md").read_text()
    for room, module in re.findall(r"\*\*`(\w+)\.(\w+)`\*\*", text):
        in_room = (package / room / f"{module}.py").exists()
        in_module = (package / f"{room}.py").exists() and module in (
            package / f"{room}.py"
        ).read_text()
        assert in_room or in_module, f"{room}.{module}"


def test_the_reference_pages_are_what_they_describe() -> None:
    for name, text in reference.pages().items():
        written = (ROOT / "docs" / name).read_text()
        assert written == text, f"docs/{name} is old: python -m docs.reference"


def test_what_to_do_is_said_for_every_error() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| (\d{3}) ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE)
    told = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert told == {(e.status, e.code) for e in error_classes() if e.status != 499}


def test_every_command_is_in_the_readmes_table() -> None:
    table = README.partition("## The command line")[2].partition("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    told = {word for row in rows for word in re.findall(r"`([a-z]+)`", row.split("|")[1])}
    assert told == set(main.commands)


def test_every_picture_that_is_shown_is_there_and_no_other() -> None:
    shown = {
        name
        for text in DOCUMENTS
        for name in re.findall(r"!\[[^]]*\]\((?:docs/)?([\w-]+\.png)\)", text)
    }
    assert shown == {path.name for path in (ROOT / "docs").glob("*.png")}


def test_the_page_of_clients_names_tests_that_exist_and_every_call() -> None:
    text = (ROOT / "docs" / "clients.md").read_text()
    files = [
        file
        for folder in ("integration", "browser", "real")
        for file in (ROOT / "tests" / folder).glob("test_*.py")
    ]
    code = "".join(file.read_text() for file in files)
    named = re.findall(r"`(test_\w+)(?:\[(.+?)\])?`", text)
    for test, _ in named:
        assert f"\ndef {test}(" in code, test
    assert {call for _, call in named if call} == set(CALLS)
