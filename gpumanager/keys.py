"""API keys: read from the environment and from a file, never from the config itself, which
people paste into chats."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gpumanager.addresses import is_loopback

KEYS_ENV = "GPUMANAGER_API_KEYS"
SHORTEST_SECRET = 16

CALLBACK_ENV = "GPUMANAGER_CALLBACK_SECRET"

Role = Literal["client", "admin"]
"""`client`: its own jobs. `admin`: everything."""

_ROLES: Mapping[str, Role] = {"client": "client", "admin": "admin"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LIMIT = re.compile(r"[1-9][0-9]{0,5}")
_URGENCY = re.compile(r"[0-7]")
_SHAPE = "NAME KEY [max_queued=N] [role=admin|client] [urgency=N] [most_urgent=N]"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key by the name it has in logs. `max_queued` bounds its jobs in the queue, running ones
    included; None leaves them to the queue's own bound. A key that was given no `role` may do
    everything, as all keys could before there were roles. `urgency` is that of its jobs that ask
    for none, from 0 (most urgent) to 7, and none of them is more urgent than `most_urgent`."""

    name: str
    secret: str
    max_queued: int | None = None
    role: Role | None = None
    urgency: int | None = None
    most_urgent: int = 0

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r}, ***)"


GUARD_IT = f"set {KEYS_ENV} or auth.keys_file, or listen on 127.0.0.1"
"""What to do where a broker is `unguarded`."""


def unguarded(host: str, keys: Collection[ApiKey]) -> bool:
    """Whether everybody who can reach `host`, where the broker listens, may use it: there are no
    keys, and it is more than loopback."""
    return not keys and not is_loopback(host)


class KeysError(Exception):
    """The keys cannot be read; the text names the place, never a key."""


def load_keys(environ: Mapping[str, str], file: str | None) -> tuple[ApiKey, ...]:
    """The keys of GPUMANAGER_API_KEYS (separated by `;` or newlines) and of `file` (a line each;
    `#` begins a comment), each written as `_SHAPE` says. Raises KeysError.
    """
    keys = list(_parse(re.split(r"[;\n]", environ.get(KEYS_ENV, "")), KEYS_ENV))
    if file is not None:
        try:
            with open(file, encoding="utf-8") as lines:
                keys += _parse(lines, os.path.basename(file))
        except UnicodeDecodeError:
            raise KeysError(f"{file}: is not UTF-8 text") from None
        except OSError as error:
            raise KeysError(f"{file}: {error.strerror or error}") from None
        if not keys:
            raise KeysError(f"{file}: holds no key; everybody would be let in")
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise KeysError(f"the name '{twice}' is given to two keys")
    return tuple(keys)


def load_callback_secret(
    environ: Mapping[str, str], file: str | None, *, wanted: bool
) -> bytes | None:
    """What callbacks are signed with: that of GPUMANAGER_CALLBACK_SECRET, else that in `file`,
    `whsec_` and 24 to 64 bytes in base64 (Standard Webhooks); None if it is not `wanted`. Raises
    KeysError."""
    if not wanted:
        return None
    where, text = CALLBACK_ENV, environ.get(CALLBACK_ENV, "")
    if not text and file is not None:
        where = os.path.basename(file)
        try:
            with open(file, encoding="ascii") as kept:
                text = kept.read(1024)
        except UnicodeDecodeError:
            raise KeysError(f"{file}: is not ASCII text") from None
        except OSError as error:
            raise KeysError(f"{file}: {error.strerror or error}") from None
    if not text.strip():
        raise KeysError(
            f"jobs.callbacks lists hosts, and there is no secret to sign with: set {CALLBACK_ENV} "
            "or jobs.callback_secret_file"
        )
    try:
        kind, _, encoded = text.strip().partition("_")
        secret = base64.b64decode(encoded, validate=True) if kind == "whsec" else b""
    except (binascii.Error, ValueError):
        secret = b""
    if not 24 <= len(secret) <= 64:
        raise KeysError(f"{where}: must be whsec_ and 24 to 64 bytes in base64")
    return secret


def _parse(lines: Iterable[str], source: str) -> Iterator[ApiKey]:
    for number, line in enumerate(lines, start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        where = f"{source}, entry {number}"
        if len(words) < 2 or not _NAME.fullmatch(words[0]):
            raise KeysError(f"{where}: must be {_SHAPE}")
        if len(words[1]) < SHORTEST_SECRET:
            raise KeysError(f"{where}: the key must have at least {SHORTEST_SECRET} characters")
        yield _with_options(ApiKey(words[0], words[1]), words[2:], where)


def _urgency(name: str, value: str, where: str) -> int:
    if not _URGENCY.fullmatch(value):
        raise KeysError(f"{where}: {name}=N wants a number from 0 (most urgent) to 7")
    return int(value)


def _with_options(key: ApiKey, words: list[str], where: str) -> ApiKey:
    for number, word in enumerate(words):
        name, _, value = word.partition("=")
        if any(earlier.startswith(f"{name}=") for earlier in words[:number]):
            raise KeysError(f"{where}: {name} is given twice")
        if name == "max_queued":
            if not _LIMIT.fullmatch(value):
                raise KeysError(f"{where}: max_queued=N wants a number from 1 to 999999")
            key = replace(key, max_queued=int(value))
        elif name == "role":
            if value not in _ROLES:
                raise KeysError(f"{where}: role must be admin or client")
            key = replace(key, role=_ROLES[value])
        elif name == "urgency":
            key = replace(key, urgency=_urgency(name, value, where))
        elif name == "most_urgent":
            key = replace(key, most_urgent=_urgency(name, value, where))
        else:
            raise KeysError(
                f"{where}: after the key may come max_queued=N, role=admin|client, urgency=N and "
                "most_urgent=N"
            )
    if key.urgency is not None and key.urgency < key.most_urgent:
        raise KeysError(
            f"{where}: urgency={key.urgency} is more urgent than most_urgent={key.most_urgent}, "
            "which is the most urgent that this key may have"
        )
    return key
