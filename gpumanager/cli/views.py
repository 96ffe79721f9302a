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

from gpumanager.model import NORMAL

COLOURS = ("dodger_blue2", "dark_orange", "green4", "medium_purple", "deep_pink4", "yellow4")
BAR_WIDTH = 60

T = TypeVar("T")

_LOUD = {"error": "red", "warning": "yellow"}
_QUIET_FIELDS = frozenset({"number", "time", "event", "level", "client", "request_id", "path"})


def console() -> Console:
    """Where it is shown; plain text, without a terminal."""
    return Console(highlight=False)


def status(found: Mapping[str, Any]) -> RenderableType:
    """The card, the consumers, the queue."""
    return Group(card(found), services(found), troubles(found), queue(found["queue"]))


def gone(reason: str) -> RenderableType:
    """In place of the picture, while the broker is away."""
    return Panel(Text(f"{reason}; trying again", style="red"), title="gpumanager")


def queue(entries: Sequence[Mapping[str, Any]], rows: int | None = None) -> RenderableType:
    """Who runs and who waits, below its head in so many rows; what is cut is counted."""
    if not entries:
        return Text("no job runs, and none waits", style="dim")
    table = _table()
    for name in ("ticket", "", "consumer", "kind", "client", "for", "turn in"):
        style = "dim" if name in ("ticket", "client") else None
        table.add_column(name, style=style, no_wrap=True)
    shown, cut = cut_to(entries, rows)
    for entry in shown:
        running, overdue = entry["state"] == "running", entry.get("overdue", False)
        table.add_row(
            str(entry["ticket"]),
            _place(entry),
            entry["consumer"],
            entry["kind"] + _urgency(entry),
            entry["client"],
            _duration(entry["age_ms"]),
            "" if running else ("? " if overdue else "") + _duration(entry["estimate_ms"]),
        )
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


def services(found: Mapping[str, Any], rows: int | None = None) -> RenderableType:
    """The consumers, below their head in so many rows; what is cut is counted, and those of which
    there is something to say are the last that are."""
    table = _table()
    for name in ("consumer", "state", "model", "holds", "needs", "jobs", "usual run", "last used"):
        right = name in ("holds", "needs", "jobs", "usual run")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    kinds: dict[str, list[str]] = {}
    for kind, to in found["routing"].items():
        for name in [to] if isinstance(to, str) else to:
            kinds.setdefault(name, []).append(kind)
    shown, cut = cut_to(found["consumers"], rows)
    if cut:
        shown = sorted(found["consumers"], key=_plainness)[: len(shown)]
    for consumer in shown:
        name = consumer["name"]
        run = consumer["learned"].get("run_ms")
        table.add_row(
            f"{name} ({', '.join(kinds[name])})" if name in kinds else name,
            _state(consumer),
            "loaded" if consumer["loaded"] else Text("not loaded", style="dim"),
            _mib(consumer["gpu_resident_mib"]),
            _mib(consumer["vram_budget_mib"]),
            str(consumer["total_requests"]),
            "" if run is None else _duration(run["p50"]),
            _ago(consumer.get("last_used"), found["time"]),
        )
    return Group(table, _more(cut, "consumers")) if cut else table


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
    usual = {
        each["name"]: each["learned"].get("run_ms", {}).get("p50") for each in found["consumers"]
    }
    parts: list[RenderableType] = []
    for entry in entries:
        expected = usual.get(entry["consumer"])
        text = f"{entry['consumer']} {entry['kind']} for {entry['client']}, "
        text += _duration(entry["age_ms"])
        if expected:
            text += f" of usually {_duration(expected)}"
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


def _duration(ms: float) -> str:
    if ms < 1000:
        return f"{ms:.0f} ms"
    seconds = ms / 1000
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _ago(then: str | None, now: str) -> str:
    if then is None:
        return "never"
    seconds = (_time(now) - _time(then)).total_seconds()
    return f"{_duration(max(0.0, seconds) * 1000)} ago"


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _plain(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text or not text else text
