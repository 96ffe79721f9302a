"""How far what somebody believes is from what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass
class Deviations:
    """Pairs of figures in MiB, by what they are figures of."""

    of: dict[str, list[int]] = field(default_factory=dict)

    def add(self, what: str, believed: int, measured: int) -> None:
        """Take in a pair."""
        self.of.setdefault(what, []).append(believed - measured)

    def summary(self) -> dict[str, dict[str, Any]]:
        """For each, and for `all` of them together: how many pairs there are, and the median, the
        95th percentile and the worst of by how much they differ, in MiB; `worst` has its sign
        (more was believed than there was: above 0)."""
        together = [each for figures in self.of.values() for each in figures]
        parts = {**self.of, "all": together} if together else {}
        return {what: _summary(figures) for what, figures in parts.items()}


def _summary(figures: list[int]) -> dict[str, Any]:
    sizes = sorted(abs(each) for each in figures)
    return {
        "pairs": len(figures),
        "median": median(sizes),
        # The nearest rank: a figure that there was.
        "p95": sizes[math.ceil(0.95 * len(sizes)) - 1],
        "worst": max(figures, key=abs),
    }


def table(title: str, summary: dict[str, dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [f"| {title} | Pairs | Median | 95 % are within | Worst |", "|---|---|---|---|---|"]
    for what, row in summary.items():
        lines.append(
            f"| {what} | {row['pairs']} | {row['median']:g} MiB | {row['p95']} MiB"
            f" | {row['worst']:+d} MiB |"
        )
    return "\n".join(lines)
