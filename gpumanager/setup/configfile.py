"""The config that setup writes: a new one, or what is missing added to one that is there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from gpumanager.config import Config, parse_config
from gpumanager.setup.discovery import Found

HEAD = """\
# gpumanager's config, made by `gpumanager setup`. It is yours: setup adds what it finds later, and
# changes nothing that stands here. Check it with `gpumanager check FILE`, apply it with
# `gpumanager reload`. All keys: docs/config.md; the shortest way to see them is an editor that
# reads the schema (`gpumanager schema`).

"""


@dataclass(frozen=True, slots=True)
class Proposal:
    """The text of the file before and after; `added` are the names of new consumers."""

    before: str
    after: str
    added: tuple[str, ...]

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


def propose(
    before: str,
    found: Sequence[Found],
    *,
    listen: str,
    total_mib: int | None,
) -> Proposal:
    """What the config should be. `before` is empty for a new one; `total_mib` is the card's
    memory as measured, None without a measurement.

    Raises ConfigError if `before` has faults, and ValueError if it is laid out in a way that
    nothing can be added to.
    """
    old = parse_config(before) if before.strip() else None
    taken = set(old.consumers) if old else set()
    ports = {_port(consumer.url) for consumer in old.consumers.values()} if old else set()
    new: dict[str, Found] = {}
    for each in found:
        if each.port not in ports:
            name = _name(each, taken)
            taken.add(name)
            new[name] = each
    routed = set(old.routing) if old else set()
    routing: dict[str, str] = {}
    for name, each in new.items():
        if each.service.kind not in routed and each.service.kind not in routing:
            routing[each.service.kind] = name
    if old is None:
        after = _whole(new, routing, listen=listen, total_mib=total_mib)
    elif new:
        after = _with(before, old, new, routing)
    else:
        after = before
    parse_config(after)
    return Proposal(before, after, tuple(new))


def _whole(
    new: Mapping[str, Found],
    routing: Mapping[str, str],
    *,
    listen: str,
    total_mib: int | None,
) -> str:
    lines = [f"listen: {listen}", "", "gpu:"]
    if total_mib is None:
        lines += [
            "  # No NVIDIA driver answers here. Without a measurement the declared figures decide:",
            "  # set the card's memory here, and vram_resident_mib below.",
            "  total_mib: 0",
        ]
    else:
        lines.append(f"  # measured by NVML: {total_mib} MiB")
        lines.append("  total_mib: 0                    # 0: ask NVML")
    lines.append("  reserved_mib: 256               # a cushion that is promised to nobody")
    lines += ["", "# Which consumer serves POST /v1/<kind>."]
    lines.append("routing:" if routing else "routing: {}")
    lines += [f"  {kind}: {name}" for kind, name in routing.items()]
    lines += ["", "consumers:" if new else "consumers: {}"]
    for name, each in new.items():
        lines += _block(name, each, indent="  ")
    return HEAD + "\n".join(lines) + "\n"


def _with(before: str, old: Config, new: Mapping[str, Found], routing: Mapping[str, str]) -> str:
    """`before` with the new consumers at the end of its own, and its layout kept."""
    lines = before.splitlines()
    blocks: list[tuple[str, list[str]]] = []
    if routing:
        blocks.append(("routing", [f"{kind}: {name}" for kind, name in routing.items()]))
    rows: list[str] = []
    for name, each in new.items():
        rows += _block(name, each, indent="")
    blocks.append(("consumers", rows))
    for key, wanted in blocks:
        lines = _insert(lines, key, wanted, empty=not getattr(old, key))
    return "\n".join(lines) + "\n"


def _insert(lines: list[str], key: str, wanted: Iterable[str], *, empty: bool) -> list[str]:
    root = yaml.compose("\n".join(lines))
    place = None
    if isinstance(root, yaml.MappingNode):
        place = next((pair for pair in root.value if pair[0].value == key), None)
    if place is None:
        return [*lines, "", f"{key}:", *(f"  {row}".rstrip() for row in wanted)]
    node = place[1]
    if empty:
        at = place[0].start_mark.line
        indented = [f"  {row}".rstrip() for row in wanted]
        return [*lines[:at], f"{key}:", *indented, *lines[node.end_mark.line + 1 :]]
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        raise ValueError(f"{key} is written on one line; write it as a block, or add by hand")
    indent = " " * node.value[0][0].start_mark.column
    at = node.value[-1][1].end_mark.line + (node.value[-1][1].end_mark.column > 0)
    while at > 0 and not lines[at - 1].strip():
        at -= 1
    return [*lines[:at], *(f"{indent}{row}".rstrip() for row in wanted), *lines[at:]]


def _block(name: str, found: Found, *, indent: str) -> list[str]:
    """One consumer, as lines."""
    service, lines = found.service, [f"{name}:"]
    if service.preset is not None:
        lines.append(f"  preset: {service.preset}")
    lines.append(f"  url: {found.url}")
    rows = yaml.safe_dump(dict(service.config), sort_keys=False) if service.config else ""
    lines += [f"  {row}" for row in rows.splitlines()]
    if found.mib:
        lines.append(
            f"  vram_resident_mib: {found.mib}    # what it holds now; more is learned as it works"
        )
    else:
        lines.append(
            "  vram_resident_mib: 0    # what it needs is not known yet; it is learned as it works"
        )
    manager = found.manager
    if manager is not None and manager.kind == "unit":
        scope = f", scope: {manager.scope}"
        lines.append(
            "  # To stop it where it gives nothing back when it is asked, and start it again:"
        )
        lines.append(f"  # evict: [{_first(service)}{{unit: {manager.name}{scope}}}]")
    elif manager is not None:
        lines.append(
            "  # To stop it where it gives nothing back when it is asked, and start it again:"
        )
        lines.append(f"  # evict: [{_first(service)}{{container: {manager.name}}}]")
    return ["", *(f"{indent}{line}".rstrip() for line in lines)]


def _first(service: Any) -> str:
    """`http`, where the service has an unload call."""
    text = {"consumers": {"it": {"url": "http://127.0.0.1:1", **service.config}}}
    if service.preset is not None:
        text["consumers"]["it"]["preset"] = service.preset
    return "http, " if parse_config(yaml.safe_dump(text)).consumers["it"].unload else ""


def _name(found: Found, taken: set[str]) -> str:
    name = found.service.service
    return name if name not in taken else f"{name}-{found.port}"


def _port(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0]) if url.count(":") > 1 else 80
