"""Use the OpenAI SDK through the broker: chat and speech with one client, each in its turn.

    pip install openai
    python examples/openai_sdk.py "Why is the sky blue?"

The SDK uses paths such as /v1/chat/completions; the broker's routes are named by kind. A hook in
the SDK's HTTP client replaces the one by the other. The consumers have to speak OpenAI's API on
these routes. vLLM, llama-server, SGLang, LocalAI, Kokoro and Speaches do so with their presets,
Ollama with

    paths: {llm: /v1/chat/completions}
"""

from __future__ import annotations

import os
import sys
from typing import Any

from openai import APIConnectionError, APIError, DefaultHttpxClient, OpenAI

URL = os.environ.get("GPUMANAGER_URL", "http://127.0.0.1:8770")
MODEL = os.environ.get("MODEL", "llama3.2")
ROUTES = {
    "/v1/chat/completions": "/v1/llm",
    "/v1/audio/speech": "/v1/tts",
    "/v1/audio/transcriptions": "/v1/stt",
    "/v1/images/generations": "/v1/image",
}


def to_the_broker(request: Any) -> None:
    """Send a request for an OpenAI path to the broker's route of that kind."""
    path = ROUTES.get(request.url.path)
    if path is not None:
        request.url = request.url.copy_with(path=path)


def client() -> OpenAI:
    """The SDK's client, which asks the broker. The wait in the queue counts towards its time-out;
    its own retries follow the broker's Retry-After."""
    return OpenAI(
        base_url=f"{URL}/v1",
        api_key=os.environ.get("GPUMANAGER_API_KEY", "none"),
        timeout=900,
        http_client=DefaultHttpxClient(event_hooks={"request": [to_the_broker]}, timeout=900),
    )


def main() -> None:
    """Ask, and print the answer as it arrives."""
    question = " ".join(sys.argv[1:]) or "Why is the sky blue?"
    stream = client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], stream=True
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        main()
    except APIConnectionError as error:
        sys.exit(f"no broker answers at {URL}: is it running? (gpumanager doctor; {error})")
    except APIError as error:  # what the broker or the consumer answered
        sys.exit(str(error))
