"""Setting single keys in config files of other programs: everything else in them stays, comments
and layout included (JSON, which has no comments, is laid out anew), and a backup is kept."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from datetime import datetime
from io import StringIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import tomlkit
import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from tomlkit.exceptions import TOMLKitError

Change = Callable[[Any], None]
"""Sets keys in a file's mapping, in place."""

Merge = Callable[[str, Change], str]
"""A file's text with a change made to it. Raises CannotMerge."""


class CannotMerge(Exception):
    """The file is broken, or laid out in a way that nothing can be set in; the text says why."""


def yaml_with(text: str, change: Change) -> str:
    """For YAML."""
    editor = YAML(typ="rt")
    editor.preserve_quotes = True
    editor.width = 10_000  # lines stay as long as they are
    editor.indent(**_indents(text))
    try:
        root = editor.load(text)
        plain = _unshared(yaml.safe_load(text))
    except (YAMLError, yaml.YAMLError) as error:
        raise CannotMerge(f"is not valid YAML: {_first_line(error)}") from None
    if root is None:
        root, plain = editor.load("{}"), {}
        root.fa.set_block_style()
    _must_be_mapping(root)
    change(root)
    change(plain)
    out = StringIO()
    editor.dump(root, out)
    # A file of comments alone has no mapping that they could belong to.
    after = out.getvalue() if yaml.safe_load(text) else _appended(text, out.getvalue())
    return _checked(after, yaml.safe_load, plain)


def toml_with(text: str, change: Change) -> str:
    """For TOML."""
    try:
        root = tomlkit.parse(text)
        plain = tomllib.loads(text)
    except (TOMLKitError, tomllib.TOMLDecodeError) as error:
        raise CannotMerge(f"is not valid TOML: {_first_line(error)}") from None
    change(root)
    change(plain)
    return _checked(tomlkit.dumps(root), tomllib.loads, plain)


def json_with(text: str, change: Change) -> str:
    """For JSON, which has no comments; its indentation stays."""
    try:
        root = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise CannotMerge(f"is not valid JSON: {error}") from None
    _must_be_mapping(root)
    before = deepcopy(root)
    change(root)
    if root == before:
        return text
    indent = re.search(r"^([ \t]+)\S", text, re.MULTILINE)
    return json.dumps(root, indent=indent[1] if indent else 2, ensure_ascii=False) + "\n"


def _must_be_mapping(root: Any) -> None:
    if not isinstance(root, dict):
        raise CannotMerge("is no mapping of keys to values")


def _unshared(value: Any) -> Any:
    """A copy in which aliases are copies, too, so that a change reaches one place only."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_unshared(each) for each in value]
    return value


def _indents(text: str) -> dict[str, int]:
    """How the lists of a YAML text are indented: `- ` below its key, or two further right."""
    found = re.search(r"^( *)[^\s#][^\n]*:[ ]*\n(?:[ ]*#[^\n]*\n)*( *)- ", text, re.MULTILINE)
    offset = len(found[2]) - len(found[1]) if found else 2
    return {"mapping": 2, "sequence": offset + 2, "offset": offset}


def _appended(text: str, added: str) -> str:
    gap = "" if not text.strip() or text.endswith("\n") else "\n"
    return f"{text}{gap}{added}" if text.strip() else added


def _checked(after: str, load: Callable[[str], Any], expected: Any) -> str:
    """Nothing but the change came in: an alias, say, may lead into another key."""
    with suppress(ValueError, yaml.YAMLError):
        if load(after) == expected:
            return after
    raise CannotMerge("is laid out in a way that nothing can be set in")


def _first_line(error: Exception) -> str:
    """Of an error that quotes the file: what is wrong, and where."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {getattr(error, 'problem', '') or 'cannot be read'}"
    return next(iter(str(error).splitlines()), "cannot be read")


def read(path: Path) -> str:
    """A file's text, empty if there is none. Raises CannotMerge, OSError."""
    try:
        return path.read_text("utf-8") if path.exists() else ""
    except UnicodeDecodeError:
        raise CannotMerge("is no text in UTF-8") from None


def write(path: Path, text: str, now: datetime) -> Path | None:
    """Put `text` into a file, whole or not at all, and give back its backup; None if it is new.
    A link stays one; the file keeps who may read it. Raises OSError."""
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    mode, backup = 0o600, None
    if target.exists():
        mode = target.stat().st_mode & 0o777
        backup = next(each for each in _backups(target, now) if not each.exists())
        backup.touch(mode=mode)
        backup.write_bytes(target.read_bytes())
    with NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, mode)
    os.replace(file.name, target)
    return backup


def _backups(path: Path, now: datetime) -> Iterator[Path]:
    name = f"{path.name}.{now:%Y%m%d-%H%M%S}"
    yield path.with_name(f"{name}.bak")
    for number in range(2, 1000):
        yield path.with_name(f"{name}-{number}.bak")
