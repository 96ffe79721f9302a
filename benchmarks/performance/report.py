"""From figures to a table, a plot, and the page they live on."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

Results = dict[str, dict[str, list[dict[str, float]]]]

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
BROKER = "gpumanager, locked"
SERIAL = "HAProxy, maxconn 1"


def values(results: Results, measure: str, name: str, key: str) -> list[float]:
    """One figure, a round after the other; empty if it was not measured."""
    return [row[key] for row in results.get(measure, {}).get(name, []) if key in row]


def spread(found: list[float], digits: int = 2) -> str:
    """Median and, of several, the lowest and the highest."""
    if not found:
        return "–"
    text = f"{median(found):.{digits}f}"
    return text if len(found) == 1 else f"{text} ({min(found):.{digits}f}–{max(found):.{digits}f})"


def added(results: Results, name: str, key: str) -> list[float]:
    """What a contestant adds to the direct way at its best, round by round, in ms. At its best:
    whether client and upstream happen to share a core makes a factor of four there."""
    straight = min(values(results, "latency", "direct", key), default=0.0)
    return [found - straight for found in values(results, "latency", name, key)]


def ratios(found: list[float], base: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(found, base, strict=False) if b > 0]


def table(results: Results) -> str:
    """All of it as Markdown."""
    parts = [
        _latency(results),
        _gaps(results),
        _lines(results),
        _events(results),
        _bulk(results),
        _rest(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _rows(title: str, heads: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [f"### {title}", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _latency(results: Results) -> str:
    base = added(results, "HAProxy", "p50_ms")
    rows = []
    for name in results.get("latency", {}):
        own = added(results, name, "p50_ms")
        rows.append(
            [
                name,
                spread(values(results, "latency", name, "p50_ms"), 3),
                "–" if name == "direct" else spread(own, 3),
                "–" if name == "direct" else spread(added(results, name, "p99_ms"), 3),
                "–" if name == "direct" else spread(ratios(own, base), 1),
            ]
        )
    heads = ["small JSON, one by one", "p50 ms", "added p50 ms", "added p99 ms", "× HAProxy's"]
    return _rows("Added latency", heads, sorted(rows, key=lambda row: row[1]))


def _gaps(results: Results) -> str:
    rows = []
    for measure in (each for each in results if each.startswith("gap:")):
        serial = values(results, measure, SERIAL, "gap_ms")
        own = values(results, measure, BROKER, "gap_ms")
        rows.append(
            [
                measure.removeprefix("gap:"),
                spread(values(results, measure, "direct", "gap_ms"), 3),
                spread(serial, 3),
                spread(own, 3),
                spread(ratios(own, serial), 1),
            ]
        )
    heads = ["jobs of", "direct ms", f"{SERIAL} ms", "gpumanager ms", "ratio"]
    return _rows("Idle gap: the GPU between two waiting jobs", heads, rows)


def _lines(results: Results) -> str:
    rows = [
        [
            measure.removeprefix("line:"),
            spread(values(results, measure, SERIAL, "gap_ms"), 3),
            spread(values(results, measure, BROKER, "gap_ms"), 3),
        ]
        for measure in results
        if measure.startswith("line:")
    ]
    heads = ["waiting", f"{SERIAL} ms", "gpumanager ms"]
    return _rows("Idle gap by the length of the queue, jobs of 5 ms", heads, rows)


def _events(results: Results) -> str:
    rows = [
        [
            name,
            spread(values(results, "events", name, "first_ms")),
            spread(values(results, "events", name, "delay_p50_ms")),
            spread(values(results, "events", name, "delay_p99_ms")),
            f"{max(values(results, 'events', name, 'batched')):.0f}",
        ]
        for name in results.get("events", {})
    ]
    heads = ["server-sent events", "first byte ms", "delay p50 ms", "delay p99 ms", "batched"]
    return _rows("Events, 10 ms apart", heads, rows)


def _bulk(results: Results) -> str:
    base = values(results, "bulk", "nginx", "mib_per_s")
    rows = []
    for name in results.get("bulk", {}):
        rate = values(results, "bulk", name, "mib_per_s")
        rows.append(
            [
                name,
                spread(rate, 0),
                spread(ratios(rate, base), 2),
                spread(values(results, "bulk", name, "cpu_s_per_gib")),
                spread(values(results, "upload", name, "seconds"), 3),
            ]
        )
    heads = ["bulk", "answer MiB/s", "× nginx's", "CPU s/GiB", "64 MiB upload s"]
    return _rows("Bulk", heads, rows)


def _rest(results: Results) -> str:
    def line(text: str, measure: str, key: str, digits: int = 2) -> list[list[str]]:
        found = values(results, measure, BROKER, key)
        return [[text, spread(found, digits)]] if found else []

    rows = [
        *line("start-up to the first answer, s", "start", "seconds"),
        *line("RSS idle, MiB", "rest", "rss_mib", 1),
        *line("CPU at rest, five consumers probed, % of a core", "rest", "cpu_percent"),
        *line("RSS at the end of the run, with 64 waiting, MiB", "status", "rss_mib", 1),
        *line("`/v1/status` with 64 waiting, p50 ms", "status", "p50_ms"),
        *line("`/v1/status` with 64 waiting, p99 ms", "status", "p99_ms"),
        *line(
            "trace with swaps: makespan by the sum of work, loads and releases", "trace", "ratio"
        ),
    ]
    return _rows("gpumanager alone", ["", "median (lowest–highest)"], rows)


def write(results: Results, docs: Path, command: str) -> None:
    """Put table and plot into `performance.md` and `performance.svg`."""
    page = docs / "performance.md"
    rounds = max((len(rows) for by in results.values() for rows in by.values()), default=0)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = (
        f"`{command}` on {today}: {os.cpu_count()} cores, {platform.system()} "
        f"{platform.release().split('-')[0]}, Python {platform.python_version()}; "
        f"{rounds} interleaved rounds, median (lowest–highest).\n\n"
        "![Added latency and idle gap](performance.svg)\n\n"
    )
    text = page.read_text("utf-8")
    figures = f"{BEGIN}\n{head}{table(results)}\n{END}"
    page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: figures, text, flags=re.DOTALL), "utf-8")
    plot(results, docs / "performance.svg")


def plot(results: Results, file: Path) -> None:
    """Added latency, and idle gaps, as bars on a logarithmic axis."""
    mpl: Any = import_module("matplotlib")
    mpl.use("svg")
    plt: Any = import_module("matplotlib.pyplot")
    mpl.rcParams["svg.hashsalt"] = "gpumanager"
    left: dict[str, Any] = {
        name: [max(value, 0.001) for value in added(results, name, "p50_ms")]
        for name in results.get("latency", {})
        if name != "direct"
    }
    right = {
        f"{measure.removeprefix('gap:')}\n{name}": values(results, measure, name, "gap_ms")
        for measure in results
        if measure.startswith("gap:")
        for name in (SERIAL, BROKER)
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for axis, bars, title in (
        (axes[0], left, "added to a small request, p50"),
        (axes[1], right, "idle gap between two jobs"),
    ):
        names = list(bars)
        middles = [median(bars[name]) for name in names]
        errors = [
            [middle - min(bars[name]) for name, middle in zip(names, middles, strict=True)],
            [max(bars[name]) - middle for name, middle in zip(names, middles, strict=True)],
        ]
        colours = ["#2a78d6" if "gpumanager" in name else "#8d99a6" for name in names]
        axis.barh(names, middles, xerr=errors, color=colours, capsize=2)
        axis.set_xscale("log")
        axis.set_xlabel("ms, logarithmic")
        axis.set_title(title)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
