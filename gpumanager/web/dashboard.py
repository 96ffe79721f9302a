"""The dashboard: one page without outside requests, which asks `/v1/status` by itself."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from flask import Response, request


def wanted() -> bool:
    """True for a browser that opens the broker's address: it names HTML, where curl and SDKs say
    `*/*`. Not by preference: Chromium names images with the same quality."""
    return any(name == "text/html" and quality for name, quality in request.accept_mimetypes)


def response(status: int = 200) -> Response:
    """The page. It holds nothing secret: what it shows it has to ask for, with a key if need be."""
    page, policy = _page()
    answer = Response(page, status=status, content_type="text/html; charset=utf-8")
    answer.headers["Content-Security-Policy"] = policy
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers["Referrer-Policy"] = "no-referrer"
    answer.headers["Cache-Control"] = "no-cache"
    answer.headers["Vary"] = "Accept"
    return answer


@cache
def _page() -> tuple[str, str]:
    """The page, and a policy that allows its own script and style, by their digests, and
    nothing else."""
    page = files("gpumanager.web").joinpath("static", "dashboard.html").read_text("utf-8")
    script, style = (
        " ".join(_digest(text) for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        for tag in ("script", "style")
    )
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _digest(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
