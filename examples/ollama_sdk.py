"""Use Ollama's Python client through the broker: only its host changes. Ollama's own command line
and whatever else reads OLLAMA_HOST works the same way.

    pip install ollama
    python examples/ollama_sdk.py "Why is the sky blue?"

Environment: GPUMANAGER_URL (the broker), GPUMANAGER_API_KEY (your key), MODEL (Ollama's name of the
model).
"""

from __future__ import annotations

import os
import sys
import time

from ollama import Client, ResponseError

URL = os.environ.get("GPUMANAGER_URL", "http://127.0.0.1:8770")
KEY = os.environ.get("GPUMANAGER_API_KEY")
MODEL = os.environ.get("MODEL", "llama3.2")
TRIES = 4


def main() -> None:
    """Ask, and print the answer as it arrives. Unlike the others, this client never tries again by
    itself: a 503 of the broker's means that the job has not run, and may be sent once more."""
    question = " ".join(sys.argv[1:]) or "Why is the sky blue?"
    headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}
    with Client(URL, headers=headers, timeout=900) as client:
        for left in reversed(range(TRIES)):
            try:
                asked = [{"role": "user", "content": question}]
                for part in client.chat(MODEL, asked, stream=True):
                    print(part.message.content or "", end="", flush=True)
                break
            except ResponseError as error:
                if not left or error.status_code != 503:
                    raise
                time.sleep(2)
    print()


if __name__ == "__main__":
    try:
        main()
    except ConnectionError as error:
        sys.exit(f"no broker answers at {URL}: is it running? (gpumanager doctor; {error})")
    except ResponseError as error:  # what the broker or the consumer answered
        sys.exit(f"{error.status_code}: {error.error}")
