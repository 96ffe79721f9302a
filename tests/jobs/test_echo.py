"""A client's words, repeated by a consumer, are no evidence that the memory ran out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpumanager.config import OutOfMemory
from gpumanager.jobs.echo import says_out_of_memory

SIGNS = OutOfMemory()
REAL = "CUDA out of memory. Tried to allocate 2.00 GiB"


def says(answer: Any, request: Any) -> bool:
    sides = [
        each if isinstance(each, bytes) else json.dumps(each).encode() for each in (answer, request)
    ]
    return says_out_of_memory(SIGNS, *sides)


@pytest.mark.parametrize("answer", [{"error": {"message": REAL}}, REAL.encode(), [REAL]])
@pytest.mark.parametrize("request_", [{"prompt": "a cat"}, b"", b"--boundary\r\n\xff", ["x"], {}])
def test_the_consumers_own_words_count(answer: Any, request_: Any) -> None:
    assert says(answer, request_)


@pytest.mark.parametrize(
    ("answer", "request_"),
    [
        # A value that is not in a list, as ComfyUI says it.
        (
            {"error": "ckpt_name: 'CUDA out of memory' not in ['sdxl.safetensors']"},
            {"prompt": {"4": {"inputs": {"ckpt_name": "CUDA out of memory"}}}},
        ),
        # Quotes and umlauts are written otherwise in an answer.
        ({"error": 'got "CUDA: \u00fc out of memory"'}, {"x": 'got "CUDA: \u00fc out of memory"'}),
        # Only a part of it is repeated, or more comes before.
        ({"error": "unknown model 'OutOfMemoryError'"}, {"model": "org/OutOfMemoryError-7b"}),
        (
            b"no such file: CUDA out of memory.wav",
            b'name="file"; filename="CUDA out of memory.wav"',
        ),
        # Half of the words are the consumer's.
        ({"error": "GPU worker: bad value 'out of memory'"}, {"x": "out of memory"}),
        # A key is the client's, too.
        ({"error": "unexpected field cudaMalloc failed"}, {"cudaMalloc failed": 1}),
    ],
)
def test_what_stands_in_the_request_does_not(answer: Any, request_: Any) -> None:
    assert not says(answer, request_)


def test_beside_an_echo_the_consumers_own_words_count() -> None:
    request = {"prompt": "what does 'out of memory' mean?"}
    assert says({"error": REAL, "prompt": request["prompt"]}, request)


def test_short_texts_of_a_request_leave_an_answer_as_it_is() -> None:
    assert says({"error": REAL}, {"a": ["o", "of", "memory", "CUDA", 1, None, True]})


def test_a_deep_request_is_no_trouble() -> None:
    assert says(REAL.encode(), b"[" * 100_000)
