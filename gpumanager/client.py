"""Asking a running broker, for the command line."""

from __future__ import annotations

from typing import Any

import requests

TIMEOUT_S = 10.0


class BrokerUnavailable(Exception):
    """The broker could not be asked, or refused; the text says why."""


def ask(url: str, path: str, key: str | None = None) -> Any:
    """The JSON a broker answers to GET `path`. Raises BrokerUnavailable."""
    with requests.Session() as session:
        session.trust_env = False  # the broker is on this machine, or where the URL says
        headers = {} if key is None else {"X-Api-Key": key}
        try:
            answer = session.get(url.rstrip("/") + path, headers=headers, timeout=TIMEOUT_S)
            body = answer.json()
        except requests.exceptions.InvalidJSONError:
            raise BrokerUnavailable(f"{url} is no gpumanager: it answered no JSON") from None
        except (requests.RequestException, ValueError) as error:
            raise BrokerUnavailable(f"{url} cannot be asked: {_reason(error)}") from None
    if answer.status_code != 200:
        message = body.get("message") if isinstance(body, dict) else None
        raise BrokerUnavailable(message or f"{url} answered {answer.status_code}")
    return body


def _reason(error: Exception) -> str:
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT_S:g} s"
    if isinstance(error, requests.ConnectionError):
        return "nobody listens there"
    return str(error)
