"""The calls the broker makes on its own account: health, residency, load, unload."""

from __future__ import annotations

import json
import logging
from typing import Any

from gpumanager.clock import Clock
from gpumanager.config import Call, Config, ConsumerConfig, Probe, Timeouts
from gpumanager.errors import BrokerError, ConsumerUnreachable
from gpumanager.model import ProbeReport
from gpumanager.upstream.exchange import Exchange, Outbound
from gpumanager.upstream.transport import OneShotAdapter
from gpumanager.watcher import Watcher

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 3.0
UNLOAD_TIMEOUT_S = 30.0
LOAD_TIMEOUT_S = 120.0
CANCEL_TIMEOUT_S = 10.0
LONGEST_ANSWER_BYTES = 4 * 1024 * 1024
LARGEST_FIGURE = 2**63
_MIB_PER_UNIT = {"B": 1 / 1024**2, "KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}


class ControlCalls:
    """Probes, loads and unloads consumers. Safe from any thread; raises BrokerError."""

    def __init__(self, config: Config, watcher: Watcher, clock: Clock) -> None:
        self._config = config
        self._watcher = watcher
        self._clock = clock
        self._adapter = OneShotAdapter()

    def probe(self, name: str) -> ProbeReport:
        """Ask the consumer how it is.

        An answer of `health` that is JSON with `loaded` and `gpu_resident_mib` is believed; a
        `probe` with expressions knows better where there is one. A consumer whose health is
        good but whose probe fails is healthy, with nothing known of its residency.
        """
        consumer = self._config.consumers[name]
        report = ProbeReport()
        if consumer.health is not None:
            report = _contract_report(self._json(name, consumer.health, PROBE_TIMEOUT_S))
        if consumer.probe is not None:
            try:
                answer = self._json(name, consumer.probe, PROBE_TIMEOUT_S)
            except BrokerError:
                if consumer.health is None:
                    raise
                return report
            report = _probe_report(consumer.probe, answer, report)
        return report

    def load(self, name: str) -> None:
        """Have the consumer load its model. Raises if it has no `load` call or answers badly."""
        call = self._config.consumers[name].load
        if call is None:
            raise ConsumerUnreachable(f"{name} has no load call", consumer=name)
        self._ok(name, call, LOAD_TIMEOUT_S)

    def unload(self, name: str) -> None:
        """Have the consumer drop its model, or each of the models its probe lists."""
        consumer = self._config.consumers[name]
        call = consumer.unload
        if call is None:
            raise ConsumerUnreachable(f"{name} has no unload call", consumer=name)
        if call.for_each is None:
            self._ok(name, call, UNLOAD_TIMEOUT_S)
            return
        for item in self._items(name, consumer):
            self._ok(name, call.for_item(item), UNLOAD_TIMEOUT_S)

    def cancel(self, name: str) -> None:
        """Make the call of `on_disconnect`. Raises if there is none or it answers badly."""
        call = self._config.consumers[name].on_disconnect
        if not isinstance(call, Call):
            raise ConsumerUnreachable(f"{name} has no call to cancel a job", consumer=name)
        self._ok(name, call, CANCEL_TIMEOUT_S)

    def busy(self, name: str) -> bool | None:
        """Whether the consumer says that it works on something; None if it does not tell."""
        probe = self._config.consumers[name].probe
        if probe is None:
            return None
        busy = probe.find_busy(self._json(name, probe, PROBE_TIMEOUT_S))
        return busy if isinstance(busy, bool) else None

    def _items(self, name: str, consumer: ConsumerConfig) -> list[str]:
        probe = consumer.probe
        if probe is None:
            return []
        found = probe.find_items(self._json(name, probe, PROBE_TIMEOUT_S))
        if not isinstance(found, list):
            raise ConsumerUnreachable(
                f"{name} does not tell what to unload: {probe.path} gave no list", consumer=name
            )
        return [item for item in found if isinstance(item, str)]

    def _json(self, name: str, call: Call, timeout: float) -> Any:
        """The answer as JSON, None where it is none."""
        try:
            return json.loads(self._ok(name, call, timeout))
        except (ValueError, RecursionError):
            return None

    def _ok(self, name: str, call: Call, timeout: float) -> bytes:
        """Make the call; the body of an answer that the call accepts."""
        status, body = self._call(name, call, call.timeout or timeout)
        accepted = status in call.ok if call.ok else 200 <= status < 300
        if not accepted:
            message = f"{name} answered {status} to {call.method} {call.path}"
            raise ConsumerUnreachable(message, consumer=name)
        return body

    def _call(self, name: str, call: Call, timeout: float) -> tuple[int, bytes]:
        consumer = self._config.consumers[name]
        body = None if call.json_body is None else json.dumps(call.json_body).encode()
        headers = list(call.headers.items())
        if body is not None:
            headers.append(("Content-Type", "application/json"))
        outbound = Outbound(
            method=call.method,
            base_url=consumer.base_url,
            target=consumer.base_path + call.path,
            headers=headers,
            body=body,
            length=len(body) if body is not None else 0 if call.method != "GET" else None,
        )
        timeouts = Timeouts(
            connect=min(timeout, consumer.timeouts.connect),
            first_byte=timeout,
            idle=timeout,
            total=timeout,
        )
        exchange = Exchange(name, outbound, timeouts, self._watcher, self._clock)
        try:
            exchange.send(self._adapter)
            parts: list[bytes] = []
            size = 0
            while chunk := exchange.read():
                size += len(chunk)
                if size > LONGEST_ANSWER_BYTES:
                    message = f"{name} answered {call.method} {call.path} without end"
                    raise ConsumerUnreachable(message, consumer=name)
                parts.append(chunk)
            return exchange.status, b"".join(parts)
        finally:
            exchange.close()


def _contract_report(answer: Any) -> ProbeReport:
    if not isinstance(answer, dict):
        return ProbeReport()
    loaded = answer.get("loaded")
    resident = answer.get("gpu_resident_mib")
    return ProbeReport(
        loaded=loaded if isinstance(loaded, bool) else None,
        resident_mib=_mib(resident, "MiB"),
    )


def _probe_report(probe: Probe, answer: Any, otherwise: ProbeReport) -> ProbeReport:
    loaded = probe.find_loaded(answer)
    resident = _mib(probe.find_resident(answer), probe.unit)
    return ProbeReport(
        loaded=loaded if isinstance(loaded, bool) else otherwise.loaded,
        resident_mib=otherwise.resident_mib if resident is None else resident,
    )


def _mib(figure: Any, unit: str) -> int | None:
    """A figure a consumer reported in MiB, rounded; None if it is none."""
    if isinstance(figure, bool) or not isinstance(figure, int | float):
        return None
    if not 0 <= figure <= LARGEST_FIGURE:  # NaN is neither
        return None
    return round(figure * _MIB_PER_UNIT[unit])
