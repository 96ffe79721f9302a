"""In whose words an error is told: those of the protocol that the client speaks, so that its SDK
raises what it should, and tries again what it may.

Sources: OpenAI's API reference, "Error codes"; Anthropic's, "Errors"; Ollama's docs/api.md. Both
SDKs (openai 3.54 and anthropic 2.12 were tried) try 408, 409, 429 and 5xx again by themselves,
unless `x-should-retry` says no.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpumanager.errors import BrokerError, ConsumerUnreachable

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True, slots=True)
class Protocol:
    """`shape` makes an error's JSON of the broker's own envelope and the status; `schema` is its
    name in the API's description; `told_to_retry`: its SDKs read `x-should-retry`."""

    schema: str
    shape: Callable[[dict[str, Any], int], dict[str, Any]]
    told_to_retry: bool = False

    def body(self, error: BrokerError) -> dict[str, Any]:
        """The JSON that a client of this protocol gets for an error."""
        return self.shape(error.envelope(), error.status)

    def headers(self, error: BrokerError) -> list[tuple[str, str]]:
        """Headers of the answer beside `Content-Type`."""
        if not self.told_to_retry:
            return error.headers()
        # A 502 or 504 may stand for a job that ran: only a client knows whether it may run again.
        # Where nobody listened it did not.
        never_ran = isinstance(error, ConsumerUnreachable) and error.nothing_listens
        again = never_ran or (error.retryable and error.status in (408, 429, 503))
        return [*error.headers(), ("X-Should-Retry", "true" if again else "false")]


def _ours(said: dict[str, Any], status: int) -> dict[str, Any]:  # noqa: ARG001
    return said


def _openai(said: dict[str, Any], status: int) -> dict[str, Any]:
    code, message, rest = _parts(said)
    server = "server_error" if status >= 500 else "invalid_request_error"
    error = {
        "message": message,
        "type": _OPENAI_TYPES.get(status, server),
        "param": "model" if code == "model_not_found" else None,
        "code": code,
    }
    return {"error": {**error, **rest}}


def _anthropic(said: dict[str, Any], status: int) -> dict[str, Any]:
    code, message, rest = _parts(said)
    server = "api_error" if status >= 500 else "invalid_request_error"
    error = {"type": _ANTHROPIC_TYPES.get(status, server), "message": message, "code": code}
    return {"type": "error", "error": {**error, **rest}}


def _ollama(said: dict[str, Any], status: int) -> dict[str, Any]:  # noqa: ARG001
    code, message, rest = _parts(said)
    return {"error": message, "code": code, **rest}


def _parts(said: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    rest = {name: value for name, value in said.items() if name not in ("error", "message")}
    return said["error"], said["message"], rest


OURS = Protocol("Error", _ours)
OPENAI = Protocol("OpenAIError", _openai, told_to_retry=True)
ANTHROPIC = Protocol("AnthropicError", _anthropic, told_to_retry=True)
OLLAMA = Protocol("OllamaError", _ollama)

_BELOW = {
    "/v1/chat": OPENAI,
    "/v1/completions": OPENAI,
    "/v1/responses": OPENAI,
    "/v1/embeddings": OPENAI,
    "/v1/rerank": OPENAI,
    "/v1/audio": OPENAI,
    "/v1/images": OPENAI,
    "/v1/models": OPENAI,
    "/v1/messages": ANTHROPIC,
}


def protocol_of(path: str) -> Protocol:
    """The protocol of a request to `path`, also to one that is no route."""
    if path.startswith("/api/"):
        return OLLAMA
    return _BELOW.get("/".join(path.split("/", 3)[:3]), OURS)
