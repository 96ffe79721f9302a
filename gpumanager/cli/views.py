"""What the terminal shows, drawn with rich from the broker's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpumanager.cli.words import shortened
from gpumanager.model import NORMAL

COLOURS = ("dodger_blue2", "dark_orange", "green4", "medium_purple", "deep_pink4", "yellow4")
BAR_WIDTH = 60
WIDE, NARROW = 96, 76
"""Columns that all of a table needs, and what is most worth knowing."""

MODEL_WIDTH, LONGEST_MODEL = 18, 60
"""Characters of a model's name that fit then; and of any."""

UNLOADED_SHOWN = 3
"""Models of one consumer that are shown although they are not loaded."""

T = TypeVar("T")
_Cells = dict[str, Text | str]
"""A row, by the names of its columns."""

_LOUD = {"error": "red", "warning": "yellow"}
_QUIET_FIELDS = frozenset({"number", "time", "event", "level", "client", "request_id", "path"})


def console() -> Console:
    """Where it is shown; plain text, without a terminal."""
    return Console(highlight=False)


def status(found: Mapping[str, Any], width: int) -> RenderableType:
    """The card, the consumers, the queue, in so many columns."""
    return Group(
        card(found),
        services(found, width=width),
        troubles(found),
        queue(found["queue"], width=width),
    )


def gone(reason: str) -> RenderableType:
    """In place of the picture, while the broker is away."""
    return Panel(Text(f"{reason}; trying again", style="red"), title="gpumanager")


def queue(
    entries: Sequence[Mapping[str, Any]], rows: int | None = None, *, width: int = WIDE
) -> RenderableType:
    """Who runs and who waits, below its head in so many rows; what is cut is counted. In less than
    `WIDE` columns there is room for the models or for the clients."""
    if not entries:
        return Text("no job runs, and none waits", style="dim")
    table = _table()
    names = ["ticket", "", "consumer", "model", "kind", "client", "for", "turn in"]
    if not any("model" in entry for entry in entries):
        names.remove("model")
    elif width < WIDE:
        names.remove("client")
    for name in names:
        style = "dim" if name in ("ticket", "client") else None
        table.add_column(name, style=style, no_wrap=True)
    name_width = width - (WIDE - MODEL_WIDTH if width >= WIDE else NARROW - MODEL_WIDTH)
    shown, cut = cut_to(entries, rows)
    for entry in shown:
        running, overdue = entry["state"] == "running", entry.get("overdue", False)
        cells: _Cells = {
            "ticket": str(entry["ticket"]),
            "": _place(entry),
            "consumer": entry["consumer"],
            "model": _model(entry.get("model", ""), name_width),
            "kind": entry["kind"] + _urgency(entry),
            "client": entry["client"],
            "for": duration(entry["age_ms"]),
            "turn in": ""
            if running
            else ("? " if overdue else "") + duration(entry["estimate_ms"]),
        }
        table.add_row(*(cells[name] for name in names))
    return Group(table, _more(cut, "in the queue")) if cut else table


def _table() -> Table:
    return Table(box=None, pad_edge=False)


def _urgency(entry: Mapping[str, Any]) -> str:
    urgency = entry.get("urgency", NORMAL)
    return "" if urgency == NORMAL else f" u={urgency}"


def _place(entry: Mapping[str, Any]) -> Text | str:
    if entry["state"] == "waiting":
        return f"{entry['position']}."
    if entry.get("overdue"):
        return Text("runs, overdue", style="yellow")
    return Text("runs", style="green")


def services(
    found: Mapping[str, Any], rows: int | None = None, *, width: int = WIDE
) -> RenderableType:
    """The consumers, each with its models below it, below their head in so many rows; what is cut
    is counted. Models are cut first, and consumers of which there is something to say last. In less
    than `WIDE` columns there is no room for how many jobs they had, and how long those took."""
    table = _table()
    names = ["consumer", "state", "model", "holds", "needs", "jobs", "usual run", "last used"]
    if width < WIDE:
        names = [name for name in names if name not in ("jobs", "usual run")]
    for name in names:
        right = name in ("holds", "needs", "jobs", "usual run")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    name_width = width - (WIDE - MODEL_WIDTH if width >= WIDE else NARROW - MODEL_WIDTH)
    kinds: dict[str, list[str]] = {}
    for kind, to in found["routing"].items():
        for name in [to] if isinstance(to, str) else to:
            kinds.setdefault(name, []).append(kind)
    consumers, cut = cut_to(found["consumers"], rows)
    if cut:
        consumers = sorted(found["consumers"], key=_plainness)[: len(consumers)]
    wanted = 0 if cut else sum(len(models_shown(each)) for each in consumers)
    left = wanted if rows is None else rows - len(consumers)
    room = wanted if wanted <= left else max(0, left - 1)
    models_cut = wanted - room if left > 0 else 0
    for consumer in consumers:
        cells = _consumer(consumer, kinds.get(consumer["name"], ()), found["time"])
        table.add_row(*(cells[name] for name in names))
        its = models_shown(consumer)[:room]
        room -= len(its)
        for model in its:
            cells = _of_model(model, name_width, found["time"])
            table.add_row(*(cells[name] for name in names))
    if cut:
        return Group(table, _more(cut, "consumers"))
    return Group(table, _more(models_cut, "models")) if models_cut else table


def models_shown(consumer: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Of a consumer's models those that are loaded, the largest first, then some that were used
    last."""
    models = consumer.get("models", ())
    loaded = [each for each in models if each["loaded"]]
    rest = [each for each in models if not each["loaded"] and "last_used" in each]
    rest.sort(key=lambda each: each["last_used"], reverse=True)
    return [*loaded, *rest[:UNLOADED_SHOWN]]


def _consumer(consumer: Mapping[str, Any], kinds: Sequence[str], now: str) -> _Cells:
    name, loaded = consumer["name"], sum(each["loaded"] for each in consumer.get("models", ()))
    what = f"{loaded} loaded" if loaded else "loaded"
    return {
        "consumer": f"{name} ({', '.join(kinds)})" if kinds else name,
        "state": _state(consumer),
        "model": what if consumer["loaded"] else Text("not loaded", style="dim"),
        "holds": _mib(consumer["gpu_resident_mib"]),
        "needs": _mib(consumer["vram_budget_mib"]) if consumer["vram_budget_mib"] else "",
        **_figures(consumer, now),
    }


def _of_model(model: Mapping[str, Any], name_width: int, now: str) -> _Cells:
    said = [("works", model["active"]), ("pinned", model["pinned"])]
    name = _model(model["name"], name_width - 2)
    loaded = f"{model['context']} tokens" if "context" in model else "loaded"
    return {
        "consumer": Text.assemble("  ", name, style="" if model["loaded"] else "dim"),
        "state": Text(
            ", ".join(word for word, so in said if so), style="green" if model["active"] else "dim"
        ),
        "model": loaded if model["loaded"] else Text("not loaded", style="dim"),
        "holds": _mib(model["held_mib"]),
        "needs": _mib(model["learned"]["needed"]["mib"]),
        **_figures(model, now),
    }


def _figures(of: Mapping[str, Any], now: str) -> _Cells:
    run = of["learned"].get("run_ms")
    return {
        "jobs": str(of["total_requests"]),
        "usual run": "" if run is None else duration(run["p50"]),
        "last used": _ago(of.get("last_used"), now),
    }


def _model(name: str, width: int) -> Text:
    """Its name comes from a client, and is no markup."""
    return Text(shortened(name, max(3, min(LONGEST_MODEL, width))))


def _plainness(consumer: Mapping[str, Any]) -> int:
    """The higher, the less there is to say of it."""
    ill = consumer["probed"] and not consumer["healthy"]
    if ill or "quarantine" in consumer or "on_cpu" in consumer or consumer["breaker"] != "closed":
        return 0
    return 1 if consumer["loaded"] else 2


def event_line(event: Mapping[str, Any]) -> str:
    """An event as `events` prints it: time, name, and its fields as `name=value`."""
    if event["event"] == "missed":
        return f"… {event['count']} events were missed"
    at = event["time"][:19].replace("T", " ")
    fields = " ".join(
        f"{name}={_plain(value)}" for name, value in event.items() if name not in _QUIET_FIELDS
    )
    return f"{at} {event['event']:<14} {fields}".rstrip()


def card(found: Mapping[str, Any], most: int = BAR_WIDTH) -> RenderableType:
    """Whose memory it is, as a bar of at most `most` cells."""
    size = min(BAR_WIDTH, most)
    gpu = found["gpu"]
    total = gpu["total_mib"]
    if not total:
        return Text(gpu.get("err", "the card's memory is not known"), style="yellow")
    holders = [(each["name"], each["gpu_resident_mib"]) for each in found["consumers"]]
    others = gpu["used_mib"] - sum(mib for _, mib in holders)
    bar, key = Text(), Text()
    coloured = [
        (name, mib, COLOURS[index % len(COLOURS)])
        for index, (name, mib) in enumerate(holders)
        if mib > 0
    ]
    if others > 0:
        coloured.append(("others", others, "grey50"))
    drawn = 0
    for name, mib, colour in coloured:
        width = min(size - drawn, max(1, round(size * mib / total)))
        bar.append("█" * width, style=colour)
        drawn += width
        key.append("■ ", style=colour)
        key.append(f"{name} {_mib(mib)}  ")
    bar.append("·" * (size - drawn), style="dim")
    key.append(f"free {_mib(gpu['free_mib'])} of {_mib(total)}")
    if gpu.get("memory") == "host":
        key.append(" of the host's memory, which is the card's")
    parts: list[RenderableType] = [bar, key]
    if gpu["source"] != "measured":
        parts.append(Text(gpu.get("err", "by the declared figures"), style="yellow"))
    return Group(*parts)


def running(found: Mapping[str, Any], most: int = BAR_WIDTH) -> RenderableType:
    """What runs, and how far it should be."""
    entries = [entry for entry in found["queue"] if entry["state"] == "running"]
    if not entries:
        return Text("nothing", style="dim")
    usual: dict[tuple[str, str | None], float | None] = {}
    for each in found["consumers"]:
        usual[each["name"], None] = each["learned"].get("run_ms", {}).get("p50")
        for model in each.get("models", ()):
            took = model["learned"].get("run_ms", {}).get("p50")
            usual[each["name"], model["name"]] = took or usual[each["name"], None]
    parts: list[RenderableType] = []
    for entry in entries:
        name, model = entry["consumer"], entry.get("model")
        expected = usual.get((name, model), usual.get((name, None)))
        who = name if model is None else f"{name} ({shortened(model, LONGEST_MODEL)})"
        text = f"{who} {entry['kind']} for {entry['client']}, "
        text += duration(entry["age_ms"])
        if expected:
            text += f" of usually {duration(expected)}"
            share = min(entry["age_ms"], expected)
            parts.append(ProgressBar(total=expected, completed=share, width=min(BAR_WIDTH, most)))
        parts.insert(len(parts) - bool(expected), Text(text))
    return Group(*parts)


def lately(events: Sequence[Mapping[str, Any]], rows: int) -> RenderableType:
    """What happened last, the newest first, in so many rows; what is cut is counted."""
    if not events:
        return Text("nothing yet", style="dim")
    shown, cut = cut_to(list(reversed(events)), rows)
    lines = [
        Text(event_line(event), _LOUD.get(event["level"], ""), no_wrap=True, overflow="ellipsis")
        for event in shown
    ]
    return Group(*lines, *([_more(cut, "earlier")] if cut else []))


def cut_to(things: Sequence[T], rows: int | None) -> tuple[Sequence[T], int]:
    """As many of the first as have room in so many rows, one of which then says how many are
    left out; and that number."""
    if rows is None or len(things) <= rows:
        return things, 0
    shown = things[: max(0, rows - 1)]
    return shown, len(things) - len(shown)


def _more(cut: int, what: str) -> Text:
    return Text(f"… and {cut} {what}", style="dim")


def _state(consumer: Mapping[str, Any]) -> Text:
    if "stopped_by" in consumer:
        return Text(f"stopped by the broker ({consumer['stopped_by']})", style="dim")
    if "quarantine" in consumer:
        return Text("in quarantine", style="yellow")
    if consumer["breaker"] != "closed":
        return Text("failing", style="red")
    if not consumer["probed"]:
        return Text("not probed", style="dim")
    if not consumer["healthy"]:
        return Text("down", style="red")
    if "on_cpu" in consumer:
        return Text("partly on the CPU", style="yellow")
    if consumer.get("growth", {}).get("verdict") == "leaks":
        return Text("leaks memory", style="yellow")
    return Text("healthy", style="green")


def troubles(found: Mapping[str, Any]) -> RenderableType:
    """Since when and why consumers are down: a line for each, none if all are healthy."""
    lines = []
    for consumer in found["consumers"]:
        what, since = "", None
        if consumer["breaker"] != "closed":
            what, since = "failing", consumer.get("breaker_since")
        elif consumer["probed"] and not consumer["healthy"] and "stopped_by" not in consumer:
            what, since = "down", consumer.get("health_since")
        if what:
            when = (
                "" if since is None else f" for {_ago(since, found['time']).removesuffix(' ago')}"
            )
            why = consumer.get("last_error", "")
            text = f"{consumer['name']} has been {what}{when}" + (f": {why}" if why else "")
            lines.append(Text(text, style="red"))
    return Group(*lines)


def _mib(mib: int) -> str:
    return f"{mib / 1024:.1f} GiB" if mib >= 10 * 1024 else f"{mib} MiB"


def duration(ms: float) -> str:
    """Milliseconds, for a person."""
    if ms < 1000:
        return f"{ms:.0f} ms"
    seconds = ms / 1000
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _ago(then: str | None, now: str) -> str:
    if then is None:
        return "never"
    seconds = max(0.0, (_time(now) - _time(then)).total_seconds())
    for unit, length, least in (("days", 86400, 172800), ("h", 3600, 7200), ("min", 60, 600)):
        if seconds >= least:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{duration(seconds * 1000)} ago"


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _plain(value: object) -> str:
    text = str(value)
    return text if text and text.isprintable() and " " not in text else repr(text)
