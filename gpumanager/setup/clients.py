"""The clients that `connect` knows: what each needs to use the broker, as text and, where it has a
config file in a known place, as a change to that.

Sources, read in November 2026: the documents of Open WebUI (environment variables), Continue
(config.yaml reference), aider (OpenAI compatible APIs), Codex (config reference), Claude Code
(settings), SillyTavern (chat completions), wyoming-openai, n8n (credentials of OpenAI and Ollama).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpumanager.client import KEY_ENV
from gpumanager.folders import config_folder
from gpumanager.setup.connections import NO_KEY, NO_MODEL, Offered
from gpumanager.setup.merging import Change, Merge, json_with, toml_with, yaml_with

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
EMBED, SPEECH, STT = "/v1/embeddings", "/v1/audio/speech", "/v1/audio/transcriptions"
IMAGES, OLLAMA = "/v1/images/generations", "/api/chat"

MOST_MODELS = 12
"""Models that are written into a config; a list of hundreds is of no use there."""

NAME = "gpumanager"


@dataclass(frozen=True, slots=True)
class Settings:
    """`text` is what to type, or what is in the file; `notes` say what to know beside it. `file`
    and `merged` belong together: where the client keeps its config, and its text with this set."""

    where: str
    text: str
    notes: tuple[str, ...] = ()
    file: Path | None = None
    merged: Callable[[str], str] | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """A client by its `name` on the command line. It needs one of the routes `needs`. `settings`
    makes them from what is offered, the model that is wanted, and the environment."""

    name: str
    title: str
    needs: tuple[str, ...]
    settings: Callable[[Offered, str | None, Mapping[str, str]], Settings]

    def works_with(self, offer: Offered) -> bool:
        """Whether some consumer serves what it needs."""
        return any(route in offer.routes for route in self.needs)


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or "/")


def _in_file(
    where: Path, merge: Merge, change: Change, notes: Iterable[str], display: str
) -> Settings:
    return Settings(
        display, merge("", change), tuple(notes), where, lambda text: merge(text, change)
    )


def _about_models(offer: Offered, kind: str, wanted: str | None) -> list[str]:
    if wanted is not None or offer.named(kind):
        return []
    return [f"The broker lists no model for {kind}: put its name where {NO_MODEL} stands."]


def _about_containers(offer: Offered) -> list[str]:
    if not offer.is_here:
        return []
    return [
        f"From a container {offer.url} leads nowhere. Have the broker listen on an address that "
        "containers reach (`listen`), with keys, name the host that they use for it in "
        "`allowed_hosts` (such as host.docker.internal), and use that in the URL."
    ]


def _set(target: Any, values: Mapping[str, Any], *, not_ours: Iterable[str] = ()) -> None:
    """Set keys, and take away those that would count instead, of another time or another server."""
    for key in not_ours:
        target.pop(key, None)
    for key, value in values.items():
        if target.get(key) != value:
            target[key] = value


# -- programs with a config file -----------------------------------------------------------------


def _continue(offer: Offered, wanted: str | None, environ: Mapping[str, str]) -> Settings:
    secret = f"${{{{ secrets.{KEY_ENV} }}}}"

    def entry(model: str, roles: list[str]) -> dict[str, Any]:
        return {
            "name": f"{model} ({NAME})",
            "provider": "openai",
            "model": model,
            "apiBase": offer.openai_url,
            "apiKey": offer.key(secret),
            "roles": roles,
        }

    chats = [wanted] if wanted else offer.named("llm")[:MOST_MODELS] or [NO_MODEL]
    entries = [entry(model, ["chat", "edit", "apply"]) for model in chats]
    entries += [entry(model, ["embed"]) for model in offer.named("embed")[:1]]

    def change(root: Any) -> None:
        for key, value in (("name", "Local"), ("version", "1.0.0"), ("schema", "v1")):
            root.setdefault(key, value)
        if not root.get("models"):
            root["models"] = []
        places = {each.get("name"): each for each in root["models"]}
        for each in entries:
            if each["name"] in places:
                _set(places[each["name"]], each)
            else:
                root["models"].append(dict(each))

    notes = _about_models(offer, "llm", wanted)
    if offer.needs_key and not offer.shown_key:
        notes.append(f"Put the key into ~/.continue/.env: {KEY_ENV}=…")
    where = _home(environ) / ".continue" / "config.yaml"
    return _in_file(where, yaml_with, change, notes, "~/.continue/config.yaml")


def _aider(offer: Offered, wanted: str | None, environ: Mapping[str, str]) -> Settings:
    model = offer.first("llm", wanted)
    values = {"model": f"openai/{model}", "openai-api-base": offer.openai_url}
    notes = _about_models(offer, "llm", wanted)
    from_environment = offer.needs_key and not offer.shown_key
    if not from_environment:
        values["openai-api-key"] = offer.key()
    else:
        notes.append(f'Before you start it: export OPENAI_API_KEY="${KEY_ENV}"')

    def change(root: Any) -> None:
        _set(root, values, not_ours=["openai-api-key"] if from_environment else [])

    where = _home(environ) / ".aider.conf.yml"
    return _in_file(where, yaml_with, change, notes, "~/.aider.conf.yml")


def _codex(offer: Offered, wanted: str | None, environ: Mapping[str, str]) -> Settings:
    provider = {"name": NAME, "base_url": offer.openai_url, "wire_api": "responses"}
    if offer.needs_key:
        provider["env_key"] = KEY_ENV

    def change(root: Any) -> None:
        _set(root, {"model": offer.first("llm", wanted), "model_provider": NAME})
        providers = root.setdefault("model_providers", {})
        if NAME not in providers:
            providers[NAME] = dict(provider)
        else:
            _set(providers[NAME], provider, not_ours=[] if offer.needs_key else ["env_key"])

    notes = _about_models(offer, "llm", wanted)
    if offer.needs_key:
        notes.append(f"It reads the key from {KEY_ENV} in its environment.")
    folder = Path(environ.get("CODEX_HOME") or _home(environ) / ".codex")
    return _in_file(folder / "config.toml", toml_with, change, notes, "~/.codex/config.toml")


def _claude_code(offer: Offered, wanted: str | None, environ: Mapping[str, str]) -> Settings:
    model = offer.first("llm", wanted)
    env = {
        "ANTHROPIC_BASE_URL": offer.url,
        "ANTHROPIC_MODEL": model,
        # What it asks for beside the model, by the names of Anthropic's own.
        "ANTHROPIC_DEFAULT_OPUS_MODEL": model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
    }
    helped = offer.needs_key and not offer.shown_key
    if not helped:
        env["ANTHROPIC_AUTH_TOKEN"] = offer.key()

    helper = f"printenv {KEY_ENV}"

    def change(root: Any) -> None:
        if helped:
            root["apiKeyHelper"] = helper
        elif root.get("apiKeyHelper") == helper:
            del root["apiKeyHelper"]
        others = ["ANTHROPIC_API_KEY", *(["ANTHROPIC_AUTH_TOKEN"] if helped else [])]
        _set(root.setdefault("env", {}), env, not_ours=others)

    notes = _about_models(offer, "llm", wanted)
    if helped:
        notes.append(f"It asks `{helper}` for the key: export that before you start it.")
    folder = Path(environ.get("CLAUDE_CONFIG_DIR") or _home(environ) / ".claude")
    return _in_file(folder / "settings.json", json_with, change, notes, "~/.claude/settings.json")


def _shell(offer: Offered, wanted: str | None, environ: Mapping[str, str]) -> Settings:
    reference = f'"${KEY_ENV}"'
    key = offer.key(reference)
    values = {
        "OPENAI_BASE_URL": offer.openai_url,
        "OPENAI_API_BASE": offer.openai_url,  # the older name of the same
        "OPENAI_API_KEY": key,
    }
    if MESSAGES in offer.routes:
        values |= {"ANTHROPIC_BASE_URL": offer.url, "ANTHROPIC_AUTH_TOKEN": key}
        values |= {"ANTHROPIC_MODEL": wanted} if wanted else {}
    if OLLAMA in offer.routes:
        values["OLLAMA_HOST"] = offer.url
        values |= {"OLLAMA_API_KEY": key} if offer.needs_key else {}
    lines = ["# The broker, for programs that read these; made by `gpumanager connect shell`."]
    for name, value in values.items():
        lines.append(f"export {name}={value if value == reference else shlex.quote(value)}")
    text = "\n".join(lines) + "\n"
    where = config_folder(environ) / NAME / "clients.sh"
    notes = (f"Have a shell read it: . {where}",)
    return Settings("a file that a shell reads", text, notes, where, lambda _: text)


# -- programs with settings of their own ---------------------------------------------------------


def _open_webui(offer: Offered, wanted: str | None, _: Mapping[str, str]) -> Settings:
    url, key = offer.openai_url, offer.key()
    lines = [f"OPENAI_API_BASE_URL={url}", f"OPENAI_API_KEY={key}", "ENABLE_OLLAMA_API=false"]
    if wanted:
        lines.append(f"DEFAULT_MODELS={wanted}")
    if SPEECH in offer.routes:
        lines += [
            "AUDIO_TTS_ENGINE=openai",
            f"AUDIO_TTS_OPENAI_API_BASE_URL={url}",
            f"AUDIO_TTS_OPENAI_API_KEY={key}",
            f"AUDIO_TTS_MODEL={_or(offer, 'tts', 'tts-1')}",
        ]
    if STT in offer.routes:
        lines += [
            "AUDIO_STT_ENGINE=openai",
            f"AUDIO_STT_OPENAI_API_BASE_URL={url}",
            f"AUDIO_STT_OPENAI_API_KEY={key}",
            f"AUDIO_STT_MODEL={_or(offer, 'stt', 'whisper-1')}",
        ]
    if IMAGES in offer.routes:
        lines += [
            "ENABLE_IMAGE_GENERATION=true",
            "IMAGE_GENERATION_ENGINE=openai",
            f"IMAGES_OPENAI_API_BASE_URL={url}",
            f"IMAGES_OPENAI_API_KEY={key}",
            *(f"IMAGE_GENERATION_MODEL={model}" for model in offer.named("image")[:1]),
        ]
    if EMBED in offer.routes and offer.named("embed"):
        lines += [
            "RAG_EMBEDDING_ENGINE=openai",
            f"RAG_OPENAI_API_BASE_URL={url}",
            f"RAG_OPENAI_API_KEY={key}",
            f"RAG_EMBEDDING_MODEL={offer.first('embed')}",
        ]
    notes = [
        "They count at its first start. Later the same is in its Admin Panel, Settings: "
        "Connections, Audio, Images, Documents.",
        *_about_containers(offer),
    ]
    return Settings("its environment", "\n".join(lines) + "\n", tuple(notes))


def _or(offer: Offered, kind: str, otherwise: str) -> str:
    """The model for a kind whose servers often list none, and take any name."""
    found = offer.first(kind)
    return otherwise if found == NO_MODEL else found


def _typed(where: str, rows: Iterable[tuple[str, str]], notes: Iterable[str]) -> Settings:
    given = list(rows)
    width = max(len(name) for name, _ in given)
    text = "".join(f"{name + ':':<{width + 2}}{value}\n" for name, value in given)
    return Settings(where, text, tuple(notes))


def _key_to_type(offer: Offered) -> str:
    return offer.key(f"the key that {KEY_ENV} holds") if offer.needs_key else f"{NO_KEY} (any text)"


def _sillytavern(offer: Offered, wanted: str | None, _: Mapping[str, str]) -> Settings:
    rows = [
        ("API", "Chat Completion"),
        ("Chat Completion Source", "Custom (OpenAI-compatible)"),
        ("Custom Endpoint (Base URL)", offer.openai_url),
        ("Custom API Key", _key_to_type(offer)),
        ("Model ID", offer.first("llm", wanted)),
    ]
    if SPEECH in offer.routes:
        rows += [
            ("Extensions, TTS, provider", "OpenAI Compatible"),
            ("Provider Endpoint", f"{offer.openai_url}/audio/speech"),
            ("TTS Model", _or(offer, "tts", "tts-1")),
        ]
    return _typed("its API Connections (the plug)", rows, _about_models(offer, "llm", wanted))


def _home_assistant(offer: Offered, wanted: str | None, _: Mapping[str, str]) -> Settings:
    rows = []
    notes = list(_about_containers(offer))
    if OLLAMA in offer.routes:
        rows += [
            ("Add integration", "Ollama"),
            ("URL", offer.url),
            ("Model", offer.first("llm", wanted)),
        ]
    else:
        notes.append("No consumer speaks Ollama's protocol, so its Ollama integration has nobody.")
    speech, stt = SPEECH in offer.routes, STT in offer.routes
    if speech or stt:
        rows.append(("Run", "wyoming-openai (a container; also on PyPI), with"))
    if stt:
        rows += [
            ("  STT_OPENAI_URL", offer.openai_url),
            ("  STT_OPENAI_KEY", _key_to_type(offer)),
            ("  STT_MODELS", _or(offer, "stt", "whisper-1")),
        ]
    if speech:
        rows += [
            ("  TTS_OPENAI_URL", offer.openai_url),
            ("  TTS_OPENAI_KEY", _key_to_type(offer)),
            ("  TTS_MODELS", _or(offer, "tts", "tts-1")),
        ]
    if speech or stt:
        rows.append(("Add integration", "Wyoming Protocol, with the host and port of that"))
    notes += _about_models(offer, "llm", wanted)
    return _typed("Settings, Devices & services", rows or [("Nothing", "to set")], notes)


def _n8n(offer: Offered, wanted: str | None, _: Mapping[str, str]) -> Settings:
    rows = [
        ("New credential", "OpenAI"),
        ("API Key", _key_to_type(offer)),
        ("Base URL", offer.openai_url),
        ("Model, in its nodes", offer.first("llm", wanted)),
    ]
    if OLLAMA in offer.routes:
        rows += [("Or a credential", "Ollama"), ("Base URL", offer.url)]
        rows += [("API Key", _key_to_type(offer))] if offer.needs_key else []
    notes = [*_about_models(offer, "llm", wanted), *_about_containers(offer)]
    if RESPONSES not in offer.routes:
        notes.append(
            "No consumer serves /v1/responses: switch 'Use Responses API' off in its nodes."
        )
    return _typed("Credentials", rows, notes)


CLIENTS = (
    Client("open-webui", "Open WebUI", (CHAT,), _open_webui),
    Client("continue", "Continue", (CHAT,), _continue),
    Client("aider", "aider", (CHAT,), _aider),
    Client("codex", "Codex", (RESPONSES,), _codex),
    Client("claude-code", "Claude Code", (MESSAGES,), _claude_code),
    Client("sillytavern", "SillyTavern", (CHAT,), _sillytavern),
    Client("home-assistant", "Home Assistant", (OLLAMA, SPEECH, STT), _home_assistant),
    Client("n8n", "n8n", (CHAT,), _n8n),
    Client("shell", "a shell", (CHAT, RESPONSES, MESSAGES, OLLAMA, SPEECH, STT, IMAGES), _shell),
)
