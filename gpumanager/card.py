"""One GPU, and all that belongs to it: made once for each card by `app`."""

from __future__ import annotations

from gpumanager.clock import Clock
from gpumanager.config import Config
from gpumanager.consumers.admission import Admission
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.gpu.attribution import Attributor
from gpumanager.gpu.containers import ContainedConsumers
from gpumanager.gpu.device import Card, GpuMemory, open_card
from gpumanager.gpu.history import EVERY_S, MemoryHistory
from gpumanager.gpu.sampler import Sampler
from gpumanager.host.processes import ConsumerProcesses, ProcessTable
from gpumanager.residency.ahead import LookAhead
from gpumanager.residency.housekeeper import Housekeeper
from gpumanager.residency.room import RoomMaker
from gpumanager.residency.stopping import Stopping
from gpumanager.scheduling.factory import build_scheduler
from gpumanager.telemetry.events import Emit
from gpumanager.upstream.calls import ControlCalls
from gpumanager.worker import PeriodicWorker


class GpuCard:
    """The device and its `memory`; the `sampler`, which attributes that to consumers; its
    `history`; the `scheduler`, whose queue is in front of it; the `room` that is made on it,
    `stopping` consumers for it; the `housekeeper`, who does so in quiet times; and `ahead`, which
    prepares the next swap.

    `device` replaces the one of the config. Opens nothing and starts nothing.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        learned: Learned,
        calls: ControlCalls,
        admission: Admission,
        consumers: ConsumerProcesses,
        table: ProcessTable,
        clock: Clock,
        emit: Emit,
        device: Card | None = None,
    ) -> None:
        contained = ContainedConsumers(config, consumers, table)
        self.memory = GpuMemory(
            open_card(config.gpu.device) if device is None else device,
            clock,
            Attributor(consumers, contained, table, clock),
        )
        self._interval = config.gpu.sample_interval
        self.sampler = Sampler(self.memory, registry, learned, clock, emit, interval=self._interval)
        self.history = MemoryHistory(registry, clock)
        self.stopping = Stopping(config, listening=consumers.of, on_card=self._pids)
        self.room = RoomMaker(
            registry,
            learned,
            calls,
            self.stopping,
            self.sampler.look,
            admission.check,
            clock,
            emit,
            self._upcoming,
        )
        self.scheduler = build_scheduler(config.scheduler, self.room, self.room.outlook, clock)
        self.ahead = LookAhead(registry, self.scheduler, self.stopping, clock, emit)
        self.housekeeper = Housekeeper(registry, self.scheduler, self.room, clock, emit)

    def workers(self) -> list[PeriodicWorker]:
        """The threads that it always needs, not started."""
        return [
            PeriodicWorker("gpu-sampler", self.sampler.sample, retry_s=self._interval),
            PeriodicWorker("history", self.history.take, retry_s=EVERY_S),
        ]

    def close(self) -> None:
        """Forget the device's handles."""
        self.memory.close()

    def _upcoming(self) -> tuple[str, ...]:
        return self.scheduler.upcoming()  # which is made around the room

    def _pids(self, name: str) -> tuple[int, ...]:
        """The processes of a consumer that hold its memory."""
        reading = self.memory.measure()
        holdings = None if reading is None else reading.holdings
        return () if holdings is None else holdings.pids.get(name, ())
