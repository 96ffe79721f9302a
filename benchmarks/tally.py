"""What came of the jobs of a benchmark, from many clients at once."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import requests


@dataclass
class Tally:
    """What came of the jobs."""

    statuses: Counter[str] = field(default_factory=Counter)
    out_of_memory: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, answer: requests.Response, label: str = "") -> None:
        """Take in an answer; with a label, of a job that is expected to fail."""
        word = label + str(answer.status_code)
        if answer.status_code == 503:
            word += " " + str(_code(answer.json().get("error")))
        with self.lock:
            self.statuses[word] += 1
            if not label and ran_out(answer):
                self.out_of_memory += 1


def ran_out(answer: requests.Response) -> bool:
    """Whether an answer says that the card's memory ran out; llama.cpp's router says no more than
    that a model failed to load."""
    text = answer.text.lower()
    return answer.status_code >= 500 and ("out of memory" in text or "failed to load" in text)


def _code(error: object) -> object:
    """The broker's code of an error, in its own words or in OpenAI's."""
    return error.get("code") if isinstance(error, dict) else error
