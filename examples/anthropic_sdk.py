"""Use the Anthropic SDK through the broker: only its base URL changes. The server behind it has to
have /v1/messages: llama-server, vLLM, LocalAI, Ollama.

    pip install anthropic
    python examples/anthropic_sdk.py "Why is the sky blue?"

Environment: GPUMANAGER_URL (the broker), GPUMANAGER_API_KEY (your key), MODEL (the server's name of
the model).
"""

from __future__ import annotations

import os
import sys

from anthropic import Anthropic, APIConnectionError, APIError

URL = os.environ.get("GPUMANAGER_URL", "http://127.0.0.1:8770")
MODEL = os.environ.get("MODEL", "llama3.2")


def main() -> None:
    """Ask, and print the answer as it arrives."""
    question = " ".join(sys.argv[1:]) or "Why is the sky blue?"
    # The wait in the queue counts towards the time-out; the SDK tries again when Retry-After says.
    key = os.environ.get("GPUMANAGER_API_KEY", "none")
    with (
        Anthropic(base_url=URL, api_key=key, timeout=900) as client,
        client.messages.stream(
            model=MODEL, max_tokens=1024, messages=[{"role": "user", "content": question}]
        ) as stream,
    ):
        for text in stream.text_stream:
            print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        main()
    except APIConnectionError as error:
        sys.exit(f"no broker answers at {URL}: is it running? (gpumanager doctor; {error})")
    except APIError as error:  # what the broker or the consumer answered
        sys.exit(str(error))
