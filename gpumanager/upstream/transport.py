"""One-shot HTTP connections for `requests`, each open to being ended from another thread.

Every exchange opens a connection of its own and closes it at its end. On loopback that costs less
than a tenth of a millisecond; in return an idle connection that the consumer closes just as it is
reused, after which nobody can know whether the job ran, cannot happen, and a consumer that
serves one connection at a time is never blocked by an idle one.

`requests` is kept for its adapter, which is where the field's tools hook in. What it would do
before and after each request (a pool's keys, a dictionary of headers, cookies) is left out: see
docs/performance.md.
"""

from __future__ import annotations

from types import FunctionType
from typing import IO, Any, Protocol

import requests
import requests.adapters

from gpumanager.upstream.wire import Wire


class Opener(Protocol):
    """Stands where `requests` has one of urllib3's pools."""

    def urlopen(self, *, timeout: Any, **_: Any) -> Wire:
        """Send the request, and return with the head of its answer."""


class Request(requests.PreparedRequest):
    """A request that `requests` has not touched: nothing added, nothing re-encoded. It brings the
    one that sends it along."""

    def __init__(
        self,
        method: str,
        url: str,
        headers: list[tuple[str, str]],
        body: bytes | IO[bytes] | None,
        opener: Opener,
    ) -> None:
        super().__init__()
        self.method = method
        self.url = url
        self.headers = dict(headers)  # type: ignore[assignment]  # for whoever looks
        self.body = body  # type: ignore[assignment]  # or a file
        self.opener = opener


class OneShotAdapter(requests.adapters.HTTPAdapter):
    """A `requests` adapter for `Request`s. Safe from any thread."""

    def get_connection_with_tls_context(self, request: Any, *_: Any, **__: Any) -> Any:
        return request.opener

    def cert_verify(self, *_: Any, **__: Any) -> None:
        """Done where the connection is opened."""

    def request_url(self, request: Any, proxies: Any) -> str:  # noqa: ARG002
        return ""  # the head has the exact target

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        response = requests.Response()
        response.status_code = resp.status
        response.reason = resp.reason
        response.raw = resp
        response.request = req
        return response


ADAPTER = OneShotAdapter()


def is_hooked() -> bool:
    """Whether `ADAPTER.send` is no longer that of `requests`: whoever put himself there, as mocks
    do, is to see a request before the consumer does, or instead of it."""
    send = OneShotAdapter.send
    return not isinstance(send, FunctionType) or send.__globals__ is not vars(requests.adapters)
