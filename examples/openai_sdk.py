"""Use the OpenAI SDK through the broker: only its base URL changes.

    pip install openai
    python examples/openai_sdk.py "Why is the sky blue?"

The same client speaks, transcribes and draws: the broker sends each call to the consumer that has
its model. Environment: GPUMANAGER_URL (the broker), GPUMANAGER_API_KEY (your key), MODEL (one of
those that `client.models.list()` names).
"""

from __future__ import annotations

import os
import sys

from openai import APIConnectionError, APIError, OpenAI

URL = os.environ.get("GPUMANAGER_URL", "http://127.0.0.1:8770")
MODEL = os.environ.get("MODEL", "llama3.2")


def main() -> None:
    """Ask, and print the answer as it arrives."""
    question = " ".join(sys.argv[1:]) or "Why is the sky blue?"
    # The wait in the queue counts towards the time-out; the SDK tries again when Retry-After says.
    key = os.environ.get("GPUMANAGER_API_KEY", "none")
    with OpenAI(base_url=f"{URL}/v1", api_key=key, timeout=900) as client:
        stream = client.chat.completions.create(
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
