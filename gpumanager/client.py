"""Talking to a running broker, for the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import requests

KEY_ENV = "GPUMANAGER_API_KEY"
"""In the environment of a client: the key it shows."""

TIMEOUT_S = 10.0
LONG_TIMEOUT_S = 3600.0
"""For what waits in the queue: unloading, loading."""

UNAUTHORIZED = 401
_PIECE_BYTES = 64 * 1024

Answer = requests.Response
"""What `Connection.send` gives back."""


class BrokerUnavailable(Exception):
    """The broker could not be asked, or refused; the text says why. `status` is the answer's, 0
    if there was none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class BrokerClient:
    """One broker, by its URL and a key, if it wants one. Every call returns the answer's JSON,
    and raises BrokerUnavailable."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.key = key
        self._headers = {} if key is None else {"X-Api-Key": key.encode()}

    def get(self, path: str, **query: int | str) -> Any:
        """The JSON that a GET of `path` is answered with. Raises BrokerUnavailable."""
        return self._call("GET", path, query, TIMEOUT_S)

    def post(self, path: str, **query: int | str) -> Any:
        """The JSON that a POST to `path` is answered with. Raises BrokerUnavailable."""
        return self._call("POST", path, query, LONG_TIMEOUT_S)

    def job(self, kind: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Run a job; the status of its answer and the answer itself."""
        answer = self._answer("POST", f"/v1/{kind}", LONG_TIMEOUT_S, json=body)
        return answer.status_code, answer.content

    def delete(self, path: str, **query: int | str) -> Any:
        """Have something taken away."""
        return self._call("DELETE", path, query, TIMEOUT_S)

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """For several requests one after the other, and for answers that are no JSON."""
        with requests.Session() as session:
            session.trust_env = False  # the broker is on this machine, or where the URL says
            yield Connection(self.url, self._headers, session)

    def _call(self, method: str, path: str, query: Mapping[str, int | str], timeout: float) -> Any:
        answer = self._answer(method, path, timeout, params=dict(query))
        if answer.status_code >= 300:
            raise refusal(self.url, answer)
        return json_of(self.url, answer)

    def _answer(self, method: str, path: str, timeout: float, **more: Any) -> Answer:
        with self.connected() as connection:
            return connection.send(method, path, timeout=timeout, **more)


class Connection:
    """Requests to one broker, over one connection for as long as that keeps. Of one thread."""

    def __init__(
        self, url: str, headers: Mapping[str, str | bytes], session: requests.Session
    ) -> None:
        self.url = url
        self._headers = headers
        self._session = session

    def send(
        self,
        method: str,
        path: str,
        *,
        timeout: float = TIMEOUT_S,
        headers: Mapping[str, str | bytes] | None = None,
        **more: Any,
    ) -> Answer:
        """The answer, whatever its status; `timeout`, in seconds, is for each piece of it, `more`
        what requests takes. Raises BrokerUnavailable, if there is none."""
        sent = {**(headers or {}), **self._headers}
        try:
            return self._session.request(
                method, self.url + path, headers=sent, timeout=timeout, **more
            )
        except (requests.RequestException, ValueError) as error:
            reason = _reason(error, timeout)
            raise BrokerUnavailable(f"{self.url} cannot be asked: {reason}") from None

    def pieces(self, answer: Answer) -> Iterator[bytes]:
        """The body of one that was asked for with `stream=True`. Raises BrokerUnavailable, if it
        breaks off."""
        try:
            yield from answer.iter_content(_PIECE_BYTES)
        except requests.RequestException:
            raise BrokerUnavailable(f"{self.url} broke off in the middle of the answer") from None


def refusal(url: str, answer: Answer) -> BrokerUnavailable:
    """What an answer with an error's status says, in whatever protocol it does."""
    body = json_of(url, answer)
    said = None
    if isinstance(body, dict):
        said = body.get("message")
        inner = body.get("error")  # as clients of OpenAI, Anthropic and Ollama know errors
        if said is None:
            said = inner.get("message") if isinstance(inner, dict) else inner
    said = str(said or f"{url} answered {answer.status_code}")
    if answer.status_code == UNAUTHORIZED:
        said += f"; here: --key, or {KEY_ENV}"
    return BrokerUnavailable(said, answer.status_code)


def json_of(url: str, answer: Answer) -> Any:
    """Its body. Raises BrokerUnavailable, if it is no JSON."""
    try:
        return answer.json()
    except (ValueError, requests.RequestException):
        raise BrokerUnavailable(f"{url} is no gpumanager: it answered no JSON") from None


def _reason(error: Exception, timeout: float) -> str:
    if isinstance(error, requests.Timeout):
        return f"no answer within {timeout:g} s"
    if isinstance(error, requests.ConnectionError):
        told = str(error)
        if "NameResolutionError" in told or "Failed to resolve" in told:
            return "its name cannot be resolved"
        if "refused" in told:
            return "nobody listens there"
        return "it cannot be reached, or broke off"
    return str(error)
