"""connect.md: what `gpumanager connect` says for each client, of a broker that has everything."""

from __future__ import annotations

from dataclasses import replace

from gpumanager.setup.clients import CLIENTS, Client
from gpumanager.setup.connections import Offered
from gpumanager.web.ways import DROP_IN

EXAMPLE = Offered(
    "http://127.0.0.1:8770",
    routes=frozenset(way.path for way in DROP_IN),
    models=(("qwen3:8b", ("llm",)), ("bge-m3", ("embed",)), ("kokoro", ("tts",))),
)

_LANGUAGES = {".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json", ".sh": "sh"}


def connect_page(written: str) -> str:
    """The page; `written` stands above it."""
    parts = [
        written,
        "# What to type\n",
        "`gpumanager connect` asks the running broker for its models and routes, and says what a "
        "client needs to use it. It lists the clients that it knows; `gpumanager connect CLIENT` "
        "prints the settings, and what to know beside them; `--model NAME` chooses the model.\n",
        "`--write` sets them where the client keeps its config. Everything else in the file stays "
        "as it is, and a backup is kept beside it. A second time there is nothing to change. A "
        "file that is broken is left alone, and named.\n",
        "Where the broker has keys, the settings name the environment variable that holds one "
        "(`GPUMANAGER_API_KEY`), or where to type it. The key itself is in none of them, unless "
        "you ask with `--show-key`; `--write` never puts it into a file.\n",
        "The examples are of a broker at `http://127.0.0.1:8770` without keys, whose consumers "
        "serve all routes. What was tried with each protocol: [clients.md](clients.md).\n",
        "| Client | Command | Sets by `--write` | Needs |",
        "|---|---|---|---|",
        *(_row(client) for client in CLIENTS),
        "",
    ]
    for client in CLIENTS:
        settings = client.settings(EXAMPLE, None, {"HOME": "~"})
        keyed = client.settings(replace(EXAMPLE, needs_key=True), None, {"HOME": "~"})
        language = _LANGUAGES.get(settings.file.suffix, "text") if settings.file else "text"
        where = f"`{settings.where}`" if settings.where.startswith("~") else settings.where
        with_keys = [each for each in keyed.notes if each not in settings.notes]
        notes = [*settings.notes, *(f"With keys: {each}" for each in with_keys)]
        parts += [
            f"## {client.title}\n",
            f"In {where}:\n",
            f"```{language}\n{settings.text}```\n",
            *(f"- {note}" for note in notes),
            *([""] if notes else []),
        ]
    return "\n".join(parts)


def _row(client: Client) -> str:
    settings = client.settings(EXAMPLE, None, {"HOME": "~"})
    file = f"`{settings.file}`" if settings.file else "–"
    needs = ", ".join(f"`{route}`" for route in client.needs[:3])
    more = " or others" if len(client.needs) > 3 else ""
    return f"| {client.title} | `gpumanager connect {client.name}` | {file} | {needs}{more} |"
