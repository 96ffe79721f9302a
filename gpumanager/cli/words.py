"""Names on the terminal. Those of models come from clients."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text without anything that would move the cursor or colour the terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)


def shortened(text: str, most: int) -> str:
    """The same, in at most so many characters. Models' names differ at their ends, so that it is
    cut in the middle."""
    text = visible(text)
    if len(text) <= most:
        return text
    front = (most - 1) // 2
    return f"{text[:front]}…{text[len(text) - (most - 1 - front) :]}"


def named(consumer: str, model: str | None) -> str:
    """A consumer, or the model of it."""
    return consumer if model is None else f"{consumer}'s model {visible(model)}"
