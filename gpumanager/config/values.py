"""What single values of the config may be: each function returns the value as it is kept, or raises
ValueError with what is allowed."""

from __future__ import annotations

import ipaddress
import json
import re
import ssl
import sys
from collections.abc import Mapping
from urllib.parse import urlsplit

from gpumanager.addresses import why_never

METHODS = ("http", "unit", "container", "signal", "checkpoint")
"""The eviction methods, of which an entry of `evict` has one."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def number(value: object) -> object:
    """Seconds: YAML's ints where a float is meant, or a number with a unit. Booleans and
    infinities are no numbers."""
    if isinstance(value, str) and (
        found := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(ms|[smhd])", value)
    ):
        return float(found[1]) * _UNITS[found[2]]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number of seconds, or one with its unit, such as 90s or 15m")
    if not abs(value) <= sys.float_info.max:  # so that it is no NaN either
        raise ValueError("must be a finite number")
    return float(value)


OWN_ROUTES = frozenset(
    [
        "audio",
        "chat",
        "completions",
        "consumers",
        "drain",
        "embeddings",
        "events",
        "history",
        "images",
        "jobs",
        "messages",
        "models",
        "plan",
        "queue",
        "reload",
        "responses",
        "status",
        "trace",
    ]
)
"""What stands behind `/v1/` for something else than a kind of job."""


def kind(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", value):
        raise ValueError(
            "a kind must be 1 to 32 lower-case letters, digits, '_' or '-', such as embed"
        )
    if value in OWN_ROUTES:
        raise ValueError(f"is no kind: /v1/{value} is another route of the broker")
    return value


DROP_IN_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/embeddings",
)
"""The routes of OpenAI's, Anthropic's and Ollama's protocols that run jobs."""


def drop_in(value: str) -> str:
    if value not in DROP_IN_ROUTES:
        raise ValueError(f"must be one of {', '.join(DROP_IN_ROUTES)}")
    return value


def same_paths(value: object) -> object:
    """A list of routes stands for routes to the same paths."""
    return {each: each for each in value} if isinstance(value, list | tuple) else value


def bare_model(value: object) -> object:
    """A bare string stands for a model's name."""
    return {"name": value} if isinstance(value, str) else value


def model_name(value: str) -> str:
    if not value or len(value) > 512 or not value.isprintable() or value != value.strip():
        raise ValueError("must be the name of a model: 1 to 512 printable characters")
    return value


def path(value: str) -> str:
    if not re.fullmatch(r"/[!-~]*", value):
        raise ValueError(
            "must start with '/' and hold printable ASCII only (percent-encode the rest)"
        )
    return value


def method(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z]{1,16}", value):
        raise ValueError("must be an HTTP method such as POST")
    return value.upper()


def header_name(value: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", value):
        raise ValueError("a header's name must be letters, digits and '-', such as X-Api-Key")
    if value.lower() in _FRAMING:
        raise ValueError("is set by the broker itself")
    return value


_FRAMING = frozenset({"host", "connection", "content-length", "transfer-encoding"})


def header_value(value: str) -> str:
    if not re.fullmatch(r"[\t -~\xa0-\xff]*", value) or value != value.strip():
        raise ValueError("must be one line of Latin-1 text, without spaces around it")
    return value


def url(value: str) -> str:
    allowed = "must be http://HOST[:PORT][/BASE] or https://…, without credentials, query, fragment"
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError(allowed) from None
    if (
        not re.fullmatch(r"[!-~]+", value)
        or parts.scheme not in ("http", "https")
        or not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]+)?", parts.netloc)
        or port == 0
        or not is_hostname(parts.hostname or "")
        or "?" in value
        or "#" in value
    ):
        raise ValueError(allowed)
    return value.rstrip("/")


def is_hostname(value: str) -> bool:
    """Labels of 1 to 63 characters; an IPv6 address passes, the URL's syntax has seen to it."""
    return ":" in value or (
        len(value) <= 253 and all(0 < len(label) <= 63 for label in value.split("."))
    )


def listen(value: str) -> str:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|[A-Za-z0-9.-]+):([0-9]{1,5})", value)
    if found is None or int(found[2]) > 65535 or (found[1] and not is_ipv6(found[1])):
        raise ValueError("must be HOST:PORT or [IPV6]:PORT, with a port of 0 to 65535")
    return value


def is_ipv6(value: str) -> bool:
    try:
        ipaddress.IPv6Address(value)
    except ValueError:
        return False
    return True


def host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", value):
        raise ValueError("must be a host name without a port, such as gpu.example.org")
    return value.lower()


def device(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and re.match(r"(GPU-|MIG-|simulated:).", value):
        return value
    raise ValueError("must be NVML's index (0, 1, …), a UUID (GPU-…, MIG-…), or simulated:FILE")


def audio_prefix(value: str) -> str:
    path(value)
    if not value.endswith("/") or len(value) < 3 or "//" in value or re.search(r"[<>%?#]", value):
        raise ValueError("must be a path such as /audio/, starting and ending with '/'")
    if not {".", ".."}.isdisjoint(value.split("/")):
        raise ValueError("must not hold '.' or '..'")
    if value.startswith(("/v1/", "/healthz/", "/consumers/")):
        raise ValueError(
            "must not lie under /v1/, /healthz/ or /consumers/: these are the broker's own"
        )
    return value


def consumer_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError(
            "a consumer's name must be 1 to 64 letters, digits, '.', '_' or '-', "
            "and start with a letter or digit"
        )
    return value


def port(value: object) -> int:
    """A port as a key, which a file holds as a text."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536:
        return value
    if isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,4}", value) and int(value) < 65536:
        return int(value)
    raise ValueError("must be a port: a number from 1 to 65535")


def host_port(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) <= 65535 or not is_hostname(host.strip("[]")):
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:8188")
    return value


def pattern(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"must be a regular expression: {error}") from None
    return value


def unit_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,254}", value):
        raise ValueError("must be the name of a systemd unit, such as comfyui.service")
    return value


def container_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}", value):
        raise ValueError("must be the name or id of a container, such as comfyui")
    return value


def arguments(value: tuple[str, ...]) -> tuple[str, ...]:
    if value and not value[0]:
        raise ValueError("must be a program and its arguments, without a shell")
    return value


def bare_path(value: object) -> object:
    """A bare string stands for a call's path."""
    if isinstance(value, str):
        return {"path": value}
    if not isinstance(value, Mapping):
        raise ValueError("must be a path, or a mapping with a path")
    return value


def bare_path_or_none(value: object) -> object:
    return value if value is None else bare_path(value)


def bare_expression(value: object) -> object:
    return {"expr": value} if isinstance(value, str) else value


def parallel(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        raise ValueError("must be a whole number, or auto")
    return value


def bare_method(value: object) -> object:
    return {"http": True} if value == "http" else value


def listed(value: object) -> object:
    """A single one stands for a list of it."""
    return value if value is None or isinstance(value, list | tuple) else (value,)


def file(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must be the absolute path of a file")
    return value


def certificates(value: str) -> str:
    file(value)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(value)
    except ssl.SSLError:
        raise ValueError("must be a file of certificates in PEM") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    return value


def is_json(value: object) -> object:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("must be a value that JSON can express") from None
    return value


def callback_host(value: str) -> str:
    """A host that callbacks may go to: see `host_entry`."""
    host, _ = host_entry(value)
    try:
        never = why_never(host)
    except ValueError:
        return value.lower()
    if never is not None:
        raise ValueError(f"nothing is ever sent there: the address is {never}")
    return value.lower()


def host_entry(value: str) -> tuple[str, int | None]:
    """The host and the port of `NAME`, `NAME:PORT`, `*.NAME`, or the same with an address (one of
    IPv6 in brackets); the host in lower case. Raises ValueError."""
    found = _CALLBACK_HOST.fullmatch(value.lower())
    if found is None or not 0 < int(found["port"] or 1) < 65536:
        raise ValueError(
            "must be a host name, an address (one of IPv6 in brackets) or *.NAME, with :PORT "
            "unless it is that of the scheme"
        )
    if found["v6"] is not None:
        ipaddress.IPv6Address(found["v6"])
    return found["v6"] or found["name"], None if found["port"] is None else int(found["port"])


_CALLBACK_HOST = re.compile(
    r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>(?:\*\.)?[a-z0-9_](?:[a-z0-9_.-]{0,251}[a-z0-9_])?))"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
