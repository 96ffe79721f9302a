"""The calls that people's programs make with the SDKs of OpenAI, Anthropic and Ollama: each by its
name, with what it returned as plain data, to be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anthropic import Anthropic
    from ollama import Client as Ollama
    from openai import OpenAI

WAV = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(range(256)) * 40
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
ASK: Any = [{"role": "user", "content": "Why is the sky blue? – “Rayleigh”"}]
LLM, STT, TTS, EMBED, IMAGE = "qwen3:8b", "whisper-1", "kokoro", "bge-m3", "sdxl"
OLLAMA = "llama3.2:3b"
OLLAMA_EMBED = "nomic:latest"


class Clients:
    """One of each SDK, with `url` for its base, as its documents say, and `key` where it keeps one.
    Each is imported and made when somebody asks for it: that takes longer than most tests."""

    def __init__(
        self, stack: ExitStack, url: str, key: str, max_retries: int, timeout: float
    ) -> None:
        self._stack, self._url, self._key = stack, url, key
        self._max_retries, self._timeout = max_retries, timeout

    @cached_property
    def openai(self) -> OpenAI:
        from openai import OpenAI

        return self._stack.enter_context(
            OpenAI(
                base_url=f"{self._url}/v1",
                api_key=self._key,
                max_retries=self._max_retries,
                timeout=self._timeout,
            )
        )

    @cached_property
    def anthropic(self) -> Anthropic:
        from anthropic import Anthropic

        return self._stack.enter_context(
            Anthropic(
                base_url=self._url,
                api_key=self._key,
                max_retries=self._max_retries,
                timeout=self._timeout,
            )
        )

    @cached_property
    def ollama(self) -> Ollama:
        from ollama import Client

        headers = {"Authorization": f"Bearer {self._key}"}
        client: Ollama = Client(host=self._url, headers=headers, timeout=self._timeout)
        self._stack.callback(client.close)
        return client


@contextmanager
def clients(
    url: str, *, key: str = "none", max_retries: int = 0, timeout: float = 20
) -> Iterator[Clients]:
    """Clients that are closed when the block is left."""
    with ExitStack() as stack:
        yield Clients(stack, url, key, max_retries, timeout)


def _dump(found: Any) -> Any:
    return found.model_dump() if hasattr(found, "model_dump") else found


def _all(stream: Any) -> list[Any]:
    return [_dump(each) for each in stream]


Call = Callable[[Clients], Any]


def _spoken(it: Clients) -> Any:
    speech = it.openai.audio.speech
    with speech.with_streaming_response.create(model=TTS, voice="af", input="Hi.") as answer:
        return b"".join(answer.iter_bytes())


def _anthropic_events(it: Clients) -> Any:
    with it.anthropic.messages.stream(model=LLM, max_tokens=9, messages=ASK) as stream:
        pieces = list(stream.text_stream)
        return pieces, _dump(stream.get_final_message())


CALLS: dict[str, Call] = {
    "openai chat": lambda it: _dump(it.openai.chat.completions.create(model=LLM, messages=ASK)),
    "openai chat, streamed": lambda it: _all(
        it.openai.chat.completions.create(model=LLM, messages=ASK, stream=True)
    ),
    "openai completions": lambda it: _dump(it.openai.completions.create(model=LLM, prompt="A")),
    "openai completions, streamed": lambda it: _all(
        it.openai.completions.create(model=LLM, prompt="A", stream=True)
    ),
    "openai responses": lambda it: _dump(it.openai.responses.create(model=LLM, input="Why?")),
    "openai responses, streamed": lambda it: _all(
        it.openai.responses.create(model=LLM, input="Why?", stream=True)
    ),
    "openai embeddings": lambda it: _dump(
        it.openai.embeddings.create(model=EMBED, input=["one", "two"])
    ),
    "openai embeddings, floats": lambda it: _dump(
        it.openai.embeddings.create(model=EMBED, input="one", encoding_format="float")
    ),
    "openai speech": lambda it: (
        it.openai.audio.speech.create(model=TTS, voice="af", input="Hello.").content
    ),
    "openai speech, streamed": _spoken,
    "openai transcriptions": lambda it: _dump(
        it.openai.audio.transcriptions.create(model=STT, file=("a b.wav", WAV))
    ),
    "openai transcriptions, as text": lambda it: it.openai.audio.transcriptions.create(
        model=STT, file=("a.wav", WAV), response_format="text"
    ),
    "openai transcriptions, streamed": lambda it: _all(
        it.openai.audio.transcriptions.create(model=STT, file=("a.wav", WAV), stream=True)
    ),
    "openai translations": lambda it: _dump(
        it.openai.audio.translations.create(model=STT, file=("a.wav", WAV))
    ),
    "openai images": lambda it: _dump(it.openai.images.generate(model=IMAGE, prompt="A sky")),
    "openai image edits": lambda it: _dump(
        it.openai.images.edit(model=IMAGE, prompt="Bluer", image=("a.png", PNG, "image/png"))
    ),
    "openai image variations": lambda it: _dump(
        it.openai.images.create_variation(model=IMAGE, image=("a.png", PNG, "image/png"))
    ),
    "anthropic messages": lambda it: _dump(
        it.anthropic.messages.create(model=LLM, max_tokens=9, messages=ASK)
    ),
    "anthropic messages, streamed": lambda it: _all(
        it.anthropic.messages.create(model=LLM, max_tokens=9, messages=ASK, stream=True)
    ),
    "anthropic messages, with its helper": _anthropic_events,
    "anthropic count_tokens": lambda it: _dump(
        it.anthropic.messages.count_tokens(model=LLM, messages=ASK)
    ),
    "ollama chat": lambda it: _dump(it.ollama.chat(OLLAMA, ASK)),
    "ollama chat, streamed": lambda it: _all(it.ollama.chat(OLLAMA, ASK, stream=True)),
    "ollama generate": lambda it: _dump(it.ollama.generate(OLLAMA, "Why?")),
    "ollama generate, streamed": lambda it: _all(it.ollama.generate(OLLAMA, "Why?", stream=True)),
    "ollama embed": lambda it: _dump(it.ollama.embed(OLLAMA_EMBED, ["one"])),
    "ollama embeddings": lambda it: _dump(it.ollama.embeddings(OLLAMA_EMBED, "one")),
    "ollama show": lambda it: _dump(it.ollama.show(OLLAMA)),
    "ollama pull, streamed": lambda it: _all(it.ollama.pull(OLLAMA, stream=True)),
}
"""Those that send a body: the consumer is asked."""

LISTS: dict[str, Call] = {
    "openai models": lambda it: [each.id for each in it.openai.models.list()],
    "openai one model": lambda it: it.openai.models.retrieve(LLM).id,
    "anthropic models": lambda it: [each.id for each in it.anthropic.models.list()],
    "ollama list": lambda it: [each.model for each in it.ollama.list().models],
    "ollama ps": lambda it: [each.model for each in it.ollama.ps().models],
}
"""Those that only look: the broker may answer for several consumers at once."""
