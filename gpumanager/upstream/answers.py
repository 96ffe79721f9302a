"""What consumers say of themselves and of their models, read from the answers to the broker's
calls. Whatever is not of the kind that was asked for counts as not said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gpumanager.config import ModelList, Probe, expressions
from gpumanager.model import LoadedModel, ProbeReport, model_key

LARGEST_FIGURE = 2**63
_MIB_PER_UNIT = {"B": 1 / 1024**2, "KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}


def contract_report(answer: Any) -> ProbeReport:
    """What the answer of a health call says of the consumer: `loaded`, and `gpu_resident_mib`."""
    if not isinstance(answer, dict):
        return ProbeReport()
    loaded = answer.get("loaded")
    resident = answer.get("gpu_resident_mib")
    return ProbeReport(
        loaded=loaded if isinstance(loaded, bool) else None,
        resident_mib=_mib(resident, "MiB"),
    )


def probe_report(probe: Probe, answer: Any, otherwise: ProbeReport) -> ProbeReport:
    """What a probe's expressions find in its answer; what they do not find is as `otherwise`."""
    loaded = probe.find_loaded(answer)
    resident = _mib(probe.find_resident(answer), probe.unit)
    return ProbeReport(
        loaded=loaded if isinstance(loaded, bool) else otherwise.loaded,
        resident_mib=otherwise.resident_mib if resident is None else resident,
        on_cpu=_names(probe.find_on_cpu(answer)),
        items=names_in(probe.find_items(answer)),
        details=_loaded_models(probe.find_details(answer), probe.unit),
    )


def _loaded_models(found: Any, unit: str) -> dict[str, LoadedModel]:
    return {
        each["name"]: LoadedModel(
            _mib(each.get("resident"), unit), _mib(each.get("needs"), unit), _context(each)
        )
        for each in (found if isinstance(found, list) else ())
        if isinstance(each, dict) and isinstance(each.get("name"), str)
    }


def _context(said: Mapping[str, Any]) -> int | None:
    tokens = said.get("context")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens <= 0:
        return None
    return tokens if tokens <= LARGEST_FIGURE else None


def parsed(body: bytes) -> Any:
    """A body as JSON, None if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _names(found: Any) -> tuple[str, ...]:
    return names_in(found) or ()


def names_in(found: Any) -> tuple[str, ...] | None:
    """The texts of a list; None if it is none."""
    return (
        tuple(each for each in found if isinstance(each, str)) if isinstance(found, list) else None
    )


def details_of(answer: Any, names: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
    """What a list of models says of each, by the name that it has there."""
    lists = answer.values() if isinstance(answer, dict) else [answer]
    entries = [each for found in lists if isinstance(found, list) for each in found]
    wanted = set(names)
    return {
        name: entry
        for entry in entries
        if isinstance(entry, dict) and _is_json(entry)
        for name in (entry.get("id"), entry.get("name"))
        if isinstance(name, str) and name in wanted
    }


def sizes_and_aliases(call: ModelList, answer: Any) -> tuple[dict[str, int], dict[str, str]]:
    """What a list says of its models' sizes, in MiB, and of their other names."""
    sizes: dict[str, int] = {}
    aliases: dict[str, str] = {}
    found = expressions.search(call.details, answer)
    for each in found if isinstance(found, list) else ():
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            continue
        name, mib = model_key(each["name"]), _mib(each.get("size"), call.unit)
        if mib is not None:  # 0: it runs somewhere else, as Ollama's cloud models do
            sizes[name] = mib
        aliases |= dict.fromkeys(map(model_key, _names(each.get("aliases"))), name)
    return sizes, aliases


def _is_json(found: Any) -> bool:
    """Whether it can be handed on as JSON: Python also reads NaN and figures without bounds."""
    try:
        json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def _mib(figure: Any, unit: str) -> int | None:
    """A figure a consumer reported in MiB, rounded; None if it is none."""
    if isinstance(figure, bool) or not isinstance(figure, int | float):
        return None
    if not 0 <= figure <= LARGEST_FIGURE:  # NaN is neither
        return None
    return round(figure * _MIB_PER_UNIT[unit])
