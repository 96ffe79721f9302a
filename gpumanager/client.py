"""Talking to a running broker, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import requests

KEY_ENV = "GPUMANAGER_API_KEY"
"""In the environment of a client: the key it shows."""

TIMEOUT_S = 10.0
LONG_TIMEOUT_S = 3600.0
"""For what waits in the queue: unloading, loading."""

UNAUTHORIZED = 401


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

    def _call(self, method: str, path: str, query: Mapping[str, int | str], timeout: float) -> Any:
        answer = self._answer(method, path, timeout, params=dict(query))
        try:
            body = answer.json()
        except ValueError:
            message = f"{self.url} is no gpumanager: it answered no JSON"
            raise BrokerUnavailable(message) from None
        if answer.status_code >= 300:
            said = body.get("message") if isinstance(body, dict) else None
            said = said or f"{self.url} answered {answer.status_code}"
            if answer.status_code == UNAUTHORIZED:
                said += f"; here: --key, or {KEY_ENV}"
            raise BrokerUnavailable(said, answer.status_code)
        return body

    def _answer(self, method: str, path: str, timeout: float, **more: Any) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False  # the broker is on this machine, or where the URL says
            try:
                return session.request(
                    method, self.url + path, headers=self._headers, timeout=timeout, **more
                )
            except (requests.RequestException, ValueError) as error:
                reason = _reason(error, timeout)
                raise BrokerUnavailable(f"{self.url} cannot be asked: {reason}") from None


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
