"""The config that setup writes: a new one, or what is missing added to one that is there."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from gpumanager.addresses import host_and_port
from gpumanager.config import Config, parse_config
from gpumanager.host.processes import own_addresses
from gpumanager.setup.discovery import Found
from gpumanager.setup.yamledit import with_entries

HEAD = """\
# gpumanager's config, made by `gpumanager setup`. It is yours: setup adds what it finds later, and
# changes nothing that stands here. Check it with `gpumanager check`, apply it with
# `gpumanager reload`. What setup shall not add again: comment it out, or list its port in
# setup.ignore. All keys: docs/config.md; the shortest way to see them is an editor that reads the
# schema (`gpumanager schema`).

"""

_URL_IN_COMMENT = re.compile(r"""#.*\burl:\s*["']?(https?://[^\s"',}]+)""")


KEPT_SHARE = 16
"""Of the host's memory, where that is the card's, one part in so many should be kept free."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Memory in MiB as the user says it, where it cannot be measured: the card's, and what
    consumers need, by name. 0: not known."""

    total_mib: int = 0
    needs_mib: Mapping[str, int] = field(default_factory=dict)

    def of(self, name: str, found: Found) -> Found:
        """What was found, with what the user says that it needs."""
        said = self.needs_mib.get(name)
        return found if said is None else replace(found, mib=said)


@dataclass(frozen=True, slots=True)
class Proposal:
    """The text of the file before and after, and what it says then. `new` are the consumers that
    come in, by name; `ignored` those of the finds that stay out because the file says so."""

    before: str
    after: str
    config: Config
    new: Mapping[str, Found]
    ignored: tuple[Found, ...] = ()

    @property
    def added(self) -> tuple[str, ...]:
        """The names of the new consumers."""
        return tuple(self.new)

    @property
    def changed(self) -> bool:
        return self.before != self.after

    def diff(self, name: str) -> list[str]:
        """As a unified diff, a line each."""
        return list(
            difflib.unified_diff(
                self.before.splitlines(), self.after.splitlines(), name, name, lineterm=""
            )
        )

    def routes(self) -> dict[str, str]:
        """For each new consumer, which jobs it gets, in words."""
        told = {}
        for name, each in self.new.items():
            kind = each.service.kind
            own = [
                str(kind) for kind in self.config.routing if name in self.config.candidates(kind)
            ]
            if own:
                told[name] = "gets " + " and ".join(f"POST /v1/{kind}" for kind in own)
            else:
                other = " or ".join(self.config.candidates(kind))
                told[name] = f"not routed: POST /v1/{kind} goes to {other} (see `routing`)"
        return told


class CannotAdd(ValueError):
    """The file is laid out in a way that nothing can be added to; `by_hand` is what to add."""

    def __init__(self, reason: str, by_hand: str) -> None:
        super().__init__(reason)
        self.by_hand = by_hand


def propose(
    before: str,
    found: Sequence[Found],
    *,
    listen: str,
    total_mib: int | None,
    of_host: bool = False,
    figures: Figures | None = None,
) -> Proposal:
    """What the config should be. `before` is empty for a new one; `total_mib` is the card's
    memory as measured, None without a measurement, where `figures` may help; `of_host`: that is
    the host's memory.

    Raises ConfigError if `before` has faults, or the figures do; and CannotAdd.
    """
    figures = figures or Figures()
    old = parse_config(before) if before.strip() else None
    taken = set(old.consumers) if old else set()
    known = (
        {port for each in old.consumers.values() if (port := local_port(each.url))} | set(old.ports)
        if old
        else set()
    )
    unwanted = (set(old.setup.ignore) if old else set()) | set(_commented_out(before))
    new: dict[str, Found] = {}
    ignored = []
    for each in found:
        if each.port in known:
            continue
        if each.port in unwanted:
            ignored.append(each)
            continue
        name = _name(each, taken)
        taken.add(name)
        new[name] = figures.of(name, each)
    routed = set(old.routing) if old else set()
    routing: dict[str, str] = {}
    for name, each in new.items():
        if each.service.kind not in routed and each.service.kind not in routing:
            routing[each.service.kind] = name
    if old is None:
        after = _whole(new, routing, listen, total_mib, figures.total_mib, of_host=of_host)
    elif new:
        after = _with(before, new, routing)
    else:
        after = before
    return Proposal(before, after, parse_config(after), new, tuple(ignored))


def _whole(
    new: Mapping[str, Found],
    routing: Mapping[str, str],
    listen: str,
    measured_mib: int | None,
    said_mib: int,
    *,
    of_host: bool,
) -> str:
    lines = [f"listen: {listen}", "", "gpu:"]
    cushion = "  reserved_mib: 256               # a cushion that is promised to nobody"
    if measured_mib is not None and of_host:
        lines.append(f"  # measured: {measured_mib} MiB of the host's memory, which is the card's")
        lines.append("  total_mib: 0                    # 0: all of it")
        cushion = f"  reserved_mib: {measured_mib // KEPT_SHARE:<17} # for other programs"
    elif measured_mib is not None:
        lines.append(f"  # measured by NVML: {measured_mib} MiB")
        lines.append("  total_mib: 0                    # 0: ask NVML")
    elif said_mib:
        lines.append("  # No NVIDIA driver answers here: the declared figures decide.")
        lines.append(f"  total_mib: {said_mib}")
    else:
        lines += [
            "  # No NVIDIA driver answers here. Without a measurement the declared figures decide:",
            "  # set the card's memory here, and vram_resident_mib below.",
            "  total_mib: 0",
        ]
    lines.append(cushion)
    lines += ["", "# Which consumer serves POST /v1/<kind>."]
    lines.append("routing:" if routing else "routing: {}")
    lines += [f"  {kind}: {name}" for kind, name in routing.items()]
    lines += ["", "consumers:" if new else "consumers: {}"]
    for name, each in new.items():
        lines += [f"  {line}".rstrip() for line in _block(name, each)]
    return HEAD + "\n".join(lines) + "\n"


def _with(before: str, new: Mapping[str, Found], routing: Mapping[str, str]) -> str:
    """`before` with the new consumers at the end of its own, and its layout kept."""
    rows: list[str] = []
    for name, each in new.items():
        rows += _block(name, each)
    routes = [f"{kind}: {name}" for kind, name in routing.items()]
    after = before
    try:
        if routing:
            after = with_entries(after, "routing", routing, routes)
        consumers = {name: _entry(each) for name, each in new.items()}
        return with_entries(after, "consumers", consumers, rows)
    except ValueError as error:
        by_hand = (["routing:", *_indented(routes)] if routing else []) + [
            "consumers:",
            *_indented(rows),
        ]
        raise CannotAdd(str(error), "\n".join(by_hand)) from None


def _entry(found: Found) -> dict[str, Any]:
    """One consumer, as data."""
    preset = {} if found.service.preset is None else {"preset": found.service.preset}
    return {
        **preset,
        "url": found.url,
        **found.service.config,
        "vram_resident_mib": found.mib or 0,
    }


def _block(name: str, found: Found) -> list[str]:
    """One consumer, as lines, with an empty one before it and what there is to say about it."""
    entry = _entry(found)
    mib = entry.pop("vram_resident_mib")
    rows = yaml.safe_dump(entry, sort_keys=False, allow_unicode=True).splitlines()
    lines = ["", f"{name}:", *_indented(rows)]
    if mib:
        lines.append(f"  vram_resident_mib: {mib}    # for now; more is learned as it works")
    else:
        lines.append(
            "  vram_resident_mib: 0    # what it needs is not known yet; it is learned as it works"
        )
    manager = found.manager
    if manager is None:
        return lines
    what = f"container: {manager.name}"
    if manager.kind == "unit":
        what = f"unit: {manager.name}, scope: {manager.scope}"
    lines.append("  # To stop it where it gives nothing back when it is asked, and start it again:")
    lines.append(f"  # evict: [{_first(entry)}{{{what}}}]")
    return lines


def _first(entry: Mapping[str, Any]) -> str:
    """`http`, where the consumer has an unload call."""
    text = yaml.safe_dump({"consumers": {"it": dict(entry)}})
    return "http, " if parse_config(text).consumers["it"].unload else ""


def _indented(rows: Iterable[str]) -> list[str]:
    return [f"  {row}".rstrip() for row in rows]


def _name(found: Found, taken: set[str]) -> str:
    name = found.service.service
    return name if name not in taken else f"{name}-{found.port}"


def _commented_out(text: str) -> Iterable[int]:
    """The ports of consumers that stand in comments: the user does not want them."""
    for line in text.splitlines():
        found = _URL_IN_COMMENT.search(line)
        if found and (port := local_port(found[1])):
            yield port


def local_port(url: str) -> int | None:
    """The port of a consumer's URL, None if that is on another machine: an IP address that is
    none of this one's. A name counts as this one's."""
    try:
        host, port = host_and_port(url)
    except ValueError:
        return None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return port
    if address.is_loopback or address.is_unspecified:
        return port
    return port if str(address) in own_addresses() else None
