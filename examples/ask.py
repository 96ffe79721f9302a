"""Ask an LLM through the broker with requests: wait in the queue, try again where that helps, and
stream the answer.

    python examples/ask.py "Why is the sky blue?"

It uses Ollama's /api/chat, to which the preset sends `llm` jobs. Environment: GPUMANAGER_URL (the
broker), GPUMANAGER_API_KEY (your key), MODEL (Ollama's name of the model).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import requests

URL = os.environ.get("GPUMANAGER_URL", "http://127.0.0.1:8770")
KEY = os.environ.get("GPUMANAGER_API_KEY")
MODEL = os.environ.get("MODEL", "llama3.2")
TRIES = 4


def post(kind: str, body: Any) -> requests.Response:
    """Send a job. If the broker says that it may be tried again, try again after the time that it
    says. Raises SystemExit with the reason."""
    # The longest wait in the queue; the time-outs here only have to be longer.
    headers = {"Prefer": "wait=300"} | ({"Authorization": f"Bearer {KEY}"} if KEY else {})
    for left in reversed(range(TRIES)):
        try:
            answer = requests.post(
                f"{URL}/v1/{kind}", json=body, headers=headers, stream=True, timeout=(5, 900)
            )
        except requests.ConnectionError:
            sys.exit(f"no broker answers at {URL}: is it running? (gpumanager doctor)")
        except (requests.RequestException, ValueError) as error:
            sys.exit(f"the request to {URL} failed: {error}")
        if answer.ok:
            return answer
        try:
            error = answer.json()
        except ValueError:
            error = {}
        if not (left and error.get("retryable")):
            sys.exit(f"{answer.status_code} {error.get('error', '')}: {error.get('message', '')}")
        time.sleep(float(answer.headers.get("Retry-After", 2)))
    raise AssertionError("unreachable")


def words(question: str) -> Iterator[str]:
    """The answer, piece by piece, as it arrives."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "stream": True}
    with post("llm", body) as answer:
        try:
            for line in answer.iter_lines():
                if line:
                    yield json.loads(line).get("message", {}).get("content", "")
        except requests.RequestException as error:
            sys.exit(f"\nthe answer broke off: {error}")
        except (ValueError, AttributeError):
            sys.exit(f"this is not an answer of Ollama's /api/chat: {line[:200]!r}")


if __name__ == "__main__":
    for word in words(" ".join(sys.argv[1:]) or "Why is the sky blue?"):
        print(word, end="", flush=True)
    print()
