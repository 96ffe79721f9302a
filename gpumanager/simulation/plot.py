"""A comparison as a picture (SVG): what the card did over time, a row for each policy, and how long
jobs waited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from gpumanager.simulation.policies import Comparison
from gpumanager.simulation.trace import Course

WIDTH = 960
_LEFT, _RIGHT, _TOP = 110, 20, 64
_ROW, _GAP = 26, 14
_CURVES = 220
_COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#9467bd",
    "#d62728",
    "#8c564b",
    "#17becf",
    "#bcbd22",
    "#e377c2",
    "#7f7f7f",
)
_SWAP = "#c8c8c8"
_JOINED_S = 0.02
_MOST_SPANS = 2000
_MOST_POINTS = 500
_DASHES = ("none", "6 3", "2 2", "8 3 2 3", "1 3")


def svg(comparison: Comparison) -> str:
    """The picture, as text."""
    courses = comparison.all_courses
    names = sorted({job.task.needs for course in courses for job in course.jobs})
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(names)}
    lanes = len(courses) * (_ROW + _GAP)
    height = _TOP + lanes + 60 + _CURVES + 70
    root = Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}")
    root.set("font-family", "sans-serif")
    _add(root, "rect", width=WIDTH, height=height, fill="white")
    _text(root, _LEFT, 20, f"{comparison.trace.name}: what the card does", size=14)
    _legend(root, colours)
    last = max((job.ended for course in courses for job in course.jobs), default=1.0) or 1.0
    for row, course in enumerate(courses):
        _lane(root, course, _TOP + row * (_ROW + _GAP), last, colours)
    _axis(root, _TOP + lanes, last)
    _curves(root, courses, _TOP + lanes + 70)
    return tostring(root, encoding="unicode") + "\n"


def _legend(root: Element, colours: Mapping[str, str]) -> None:
    x = float(_LEFT)
    for name, colour in [*colours.items(), ("unloading, loading", _SWAP)]:
        _add(root, "rect", x=x, y=32, width=10, height=10, fill=colour)
        _text(root, x + 14, 41, name)
        x += 24 + 7 * len(name)


def _lane(root: Element, course: Course, y: float, last: float, colours: Mapping[str, str]) -> None:
    _text(root, _LEFT - 8, y + _ROW - 8, course.policy, anchor="end")
    width = WIDTH - _LEFT - _RIGHT
    _add(root, "rect", x=_LEFT, y=y, width=width, height=_ROW, fill="#f4f4f4")
    spans = list(_spans(course, colours))
    if len(spans) > _MOST_SPANS:
        spans = list(_columns(spans, last / width))
    for begin, end, colour in spans:
        x = _x(begin, last)
        width_of_span = max(0.3, _x(end, last) - x)
        _add(root, "rect", x=x, y=y, width=width_of_span, height=_ROW, fill=colour)


def _spans(course: Course, colours: Mapping[str, str]) -> Iterator[tuple[float, float, str]]:
    """What the card does, from when to when, in its colour; what follows at once in the same
    colour is one span."""
    spans = [(move.at, move.at + move.seconds, _SWAP) for move in course.moves]
    spans += [
        (job.began, job.ended, colours[job.task.needs])
        for job in course.jobs
        if job.began is not None
    ]
    spans.sort()
    if not spans:
        return
    begin, end, colour = spans[0]
    for later in spans[1:]:
        if later[2] == colour and later[0] - end < _JOINED_S:
            end = max(end, later[1])
        else:
            yield begin, end, colour
            begin, end, colour = later
    yield begin, end, colour


def _columns(
    spans: Sequence[tuple[float, float, str]], wide_s: float
) -> Iterator[tuple[float, float, str]]:
    """Of so many spans that they are narrower than a line: what was done for longest in each part
    of `wide_s` seconds, if that was at least half of it."""
    shares: dict[int, dict[str, float]] = {}
    for begin, end, colour in spans:
        for column in range(int(begin / wide_s), int(end / wide_s) + 1):
            inside = min(end, (column + 1) * wide_s) - max(begin, column * wide_s)
            share = shares.setdefault(column, {})
            share[colour] = share.get(colour, 0.0) + max(0.0, inside)
    for column, share in sorted(shares.items()):
        if sum(share.values()) >= wide_s / 2:
            longest = max(share, key=lambda colour: share[colour])
            yield column * wide_s, (column + 1) * wide_s, longest


def _axis(root: Element, y: float, last: float) -> None:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _x(share * last, last)
        _text(root, x, y + 10, _seconds(share * last), anchor="middle")


def _curves(root: Element, courses: Sequence[Course], y: float) -> None:
    """Which share of the jobs waited no longer than so long."""
    longest = max((job.waited_s for course in courses for job in course.jobs), default=1.0) or 1.0
    _text(root, _LEFT, y - 10, "Share of the jobs that waited no longer than …", size=14)
    bottom, right = y + _CURVES, WIDTH - _RIGHT
    for share in (0.0, 0.5, 0.95, 1.0):
        at = bottom - share * _CURVES
        _add(root, "line", x1=_LEFT, x2=right, y1=at, y2=at, stroke="#dddddd")
        _text(root, _LEFT - 8, at + 4, f"{share:.0%}", anchor="end")
    for place, course in enumerate(courses):
        waits = sorted(job.waited_s for job in course.jobs)
        every = max(1, len(waits) // _MOST_POINTS)
        points = [(0.0, 0.0)]
        points += [(wait, (n + 1) / len(waits)) for n, wait in enumerate(waits) if n % every == 0]
        points.append((longest, 1.0))
        colour = _COLOURS[place % len(_COLOURS)]
        drawn = [
            f"{_x(wait, longest):.1f},{bottom - share * _CURVES:.1f}" for wait, share in points
        ]
        curve = _add(root, "polyline", points=" ".join(drawn), fill="none", stroke=colour)
        curve.set("stroke-width", "2")
        curve.set("stroke-dasharray", _DASHES[place % len(_DASHES)])
        _text(root, WIDTH - 180, bottom - 16 * (len(courses) - place), course.policy, fill=colour)
    _axis(root, bottom + 6, longest)


def _x(seconds: float, last: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * seconds / last


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


def _text(
    root: Element,
    x: float,
    y: float,
    words: str,
    *,
    size: int = 12,
    anchor: str = "start",
    fill: str = "#222222",
) -> None:
    text = _add(root, "text", x=x, y=y, fill=fill)
    text.set("font-size", str(size))
    text.set("text-anchor", anchor)
    text.text = words


def _add(parent: Element, tag: str, **attributes: float | str) -> Element:
    told = {
        name: value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
        for name, value in attributes.items()
    }
    return SubElement(parent, tag, told)
