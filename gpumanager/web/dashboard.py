"""The dashboard: a page without outside requests, which asks `/v1/status` by itself. It is made of
a few files below `/dashboard/`, as they are, without a build step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from flask import Response, request

from gpumanager.errors import NotFound

PREFIX = "/dashboard/"
"""Where its files are. They hold nothing secret, so they need no key."""

_PAGE = "dashboard.html"
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data: blob:; media-src blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    content_type: str
    etag: str


def wanted() -> bool:
    """True for a browser that opens the broker's address: it names HTML, where curl and SDKs say
    `*/*`. Not by preference: Chromium names images with the same quality."""
    return any(name == "text/html" and quality for name, quality in request.accept_mimetypes)


def response(status: int = 200) -> Response:
    """The page. It holds nothing secret: what it shows it has to ask for, with a key if need be."""
    answer = _answer(_files()[_PAGE], status)
    answer.headers["Content-Security-Policy"] = _POLICY
    answer.headers["Vary"] = "Accept"
    return answer


def file(name: str) -> Response:
    """One of the page's scripts and style sheets. Raises NotFound."""
    found = _files().get(name)
    if found is None or name == _PAGE:
        raise NotFound(f"the dashboard has no file '{name}'")
    answer = _answer(found, 200)
    answer.make_conditional(request)
    return answer


def _answer(found: _File, status: int) -> Response:
    answer = Response(found.content, status=status, content_type=found.content_type)
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers["Referrer-Policy"] = "no-referrer"
    answer.headers["Cache-Control"] = "no-cache"
    answer.set_etag(found.etag)
    return answer


@cache
def _files() -> dict[str, _File]:
    """The content of each of the page's files, by name, read once."""
    found = {}
    for entry in files("gpumanager.web").joinpath("static").iterdir():
        content = entry.read_bytes()
        suffix = entry.name[entry.name.rfind(".") :]
        content_type = _TYPES.get(suffix, "text/html; charset=utf-8")
        digest = hashlib.sha256(content).hexdigest()[:16]
        found[entry.name] = _File(content, content_type, digest)
    return found
