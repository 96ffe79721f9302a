"""What happens to a consumer, as functions from its state to the one after it. Pure; times are
monotonic seconds."""

from __future__ import annotations

from dataclasses import replace

from gpumanager.consumers import shares
from gpumanager.model import CONTEXT_MIB, ConsumerState, ProbeReport, StoppedBy

FIRST_QUARANTINE_S = 60.0
LONGEST_QUARANTINE_S = 600.0
"""For how long one that gave nothing back is not asked again, the first time and at most; twice as
long each time."""


def fresh(loaded: bool, now: float, *, residency_version: int = 0) -> ConsumerState:
    """A consumer of which nothing is known yet; whether it is loaded is assumed."""
    return ConsumerState(
        loaded=loaded, assumed=now if loaded else None, residency_version=residency_version
    )


def as_assumed(state: ConsumerState, loaded: bool, now: float) -> ConsumerState:
    """A fresh process, of which nothing is known."""
    return replace(
        shares.all_unloaded(state, None),
        loaded=loaded,
        assumed=now if loaded else None,
        unloaded_at=None,
        resident_mib=None,
    )


def job_started(
    state: ConsumerState, now: float, model: str | None = None, *, tells: bool = False
) -> ConsumerState:
    """See `Registry.job_started`."""
    return replace(
        shares.job_started(state, model, now, tells=tells),
        active=state.active + 1,
        cold=not state.has_loaded(model if tells else None),
        total_requests=state.total_requests + 1,
        last_used=now,
        loaded=True,
        unplaced=state.unplaced or (tells and model is None),
        growth=state.growth if state.loaded else state.growth.anew,
        assumed=state.assumed if state.loaded else now,
        unloaded_at=None,
        resident_mib=state.resident_mib if state.loaded else None,
        residency_version=state.residency_version + 1,
    )


def job_finished(
    state: ConsumerState,
    now: float,
    *,
    worked: bool,
    unloaded: ConsumerState | None,
    process_gone: bool,
    model: str | None = None,
    context: int | None = None,
    called: str | None = None,
) -> ConsumerState:
    """See `Registry.job_finished`. What it reported before the job is a lower bound of what it
    holds now."""
    state = replace(
        shares.job_finished(
            state,
            model,
            now,
            worked=worked,
            context=context,
            unloaded=unloaded,
            called=called,
        ),
        active=state.active - 1,
        last_used=now,
        assumed=None if worked else state.assumed,
        report_outdated=True,
        residency_version=state.residency_version + 1,
    )
    if process_gone:
        return replace(
            shares.all_unloaded(state, None),
            loaded=False,
            assumed=None,
            resident_mib=0,
            report_outdated=False,
            quarantine="",
            leaks=0,
        )
    if unloaded is not None and not state.active:  # others of its jobs may have loaded it since
        return replace(
            state,
            loaded=unloaded.loaded,
            assumed=unloaded.assumed,
            unloaded_at=unloaded.unloaded_at,
            resident_mib=unloaded.resident_mib,
            report_outdated=unloaded.report_outdated,
        )
    return state


def set_loaded(
    state: ConsumerState, loaded: bool, now: float, model: str | None = None
) -> ConsumerState:
    """The broker itself loaded or unloaded it, or one model of it."""
    if not loaded:
        state = replace(state, called=frozenset())
    if model is not None:
        others = any(name != model for name in state.loaded_models)
        said_mib = None if loaded else state.model(model).reported_mib
        change = shares.loaded if loaded else shares.unloaded
        state = change(state, model, now)
        if others:
            resident_mib = state.resident_mib
            if resident_mib is not None and said_mib is not None:
                resident_mib = max(0, resident_mib - said_mib)
            return replace(
                state,
                resident_mib=resident_mib,
                report_outdated=state.report_outdated or said_mib is None,
                residency_version=state.residency_version + 1,
            )
    elif not loaded:
        state = shares.all_unloaded(state, now)
    return replace(
        state,
        loaded=loaded,
        growth=state.growth.anew,
        assumed=None,
        unloaded_at=None if loaded else now,
        resident_mib=None if loaded else 0,
        report_outdated=False,
        on_cpu=(),
        items=(),
        residency_version=state.residency_version + 1,
    )


def came_back(state: ConsumerState, model: str) -> ConsumerState:
    """All that a model held was seen to be back: a probe that was answered before that may have
    listed it all the same, as a server does whose unload takes its time."""
    known = state.model(model)
    if known.active:
        return shares.with_models(state, {model: replace(known, unloaded_at=None)})
    known = replace(known, loaded=False, sure=False, held_mib=0, unloaded_at=None)
    state = shares.with_models(state, {model: known})
    loaded = state.loaded and (bool(state.loaded_models) or state.active > 0)
    return replace(state, loaded=loaded, residency_version=state.residency_version + 1)


def drop_assumption(state: ConsumerState) -> ConsumerState:
    """It cannot be loaded, as was assumed; unless it was confirmed meanwhile, or works on a job."""
    if state.assumed is None or state.active:
        return state
    version = state.residency_version + 1
    return replace(state, loaded=False, assumed=None, residency_version=version)


def stopped(state: ConsumerState, stopped_by: StoppedBy, now: float) -> ConsumerState:
    """The broker stopped it."""
    return replace(
        set_loaded(state, False, now),
        healthy=None,
        last_error="",
        stopped_by=stopped_by,
        quarantine="",
        leaks=0,
    )


def started(
    state: ConsumerState, now: float, *, resumed: bool, assumed_loaded: bool
) -> ConsumerState:
    """It was started again; `resumed`: it goes on where it was, with its model."""
    loaded = resumed or assumed_loaded
    return replace(
        as_assumed(state, loaded, now),
        healthy=True,
        assumed=None if resumed or not loaded else now,
        stopped_by=None,
        residency_version=state.residency_version + 1,
    )


def quarantined(state: ConsumerState, reason: str, ends_mib: int, now: float) -> ConsumerState:
    """It did not release memory that it was asked to."""
    seconds = min(LONGEST_QUARANTINE_S, FIRST_QUARANTINE_S * 2**state.leaks)
    return replace(
        state,
        quarantine=reason,
        quarantine_until=now + seconds,
        quarantine_mib=ends_mib,
        leaks=state.leaks + 1,
    )


def probe_succeeded(
    state: ConsumerState,
    report: ProbeReport,
    now: float,
    *,
    seen_version: int,
    assumed_loaded: bool,
) -> ConsumerState:
    """See `Registry.probe_succeeded`."""
    current = seen_version == state.residency_version
    if state.stopped_by is not None and (not current or state.stopped_by.method == "checkpoint"):
        # From just before it was stopped; or only its CUDA calls were.
        return replace(state, last_probe=now)
    if state.stopped_by is not None:  # somebody else has started it
        state = as_assumed(state, assumed_loaded, now)
    state = replace(state, healthy=True, last_error="", last_probe=now, stopped_by=None)
    state = replace(state, tells=report.loaded is not None)
    if not current or state.active:
        return state
    if report.items is not None:
        state = shares.listed(state, report.items, report.details, now)
    state = replace(state, on_cpu=report.on_cpu, items=report.items or ())
    loaded = state.loaded if report.loaded is None else report.loaded
    if report.loaded is not None:
        if state.loaded and not report.loaded and state.assumed is None:
            # It has unloaded by itself: the memory is on its way back, as after a call.
            state = replace(state, unloaded_at=now)
        state = replace(state, assumed=None)
    if report.resident_mib is None:
        resident = state.resident_mib if loaded == state.loaded else None
        return replace(state, loaded=loaded, resident_mib=resident)
    much = report.resident_mib > CONTEXT_MIB and not state.is_releasing(now)
    if report.loaded is None and much:
        loaded = True  # it cannot say so, but its memory does
        state = replace(state, assumed=None)
    return replace(state, loaded=loaded, resident_mib=report.resident_mib, report_outdated=False)


def probe_failed(
    state: ConsumerState, error: str, now: float, *, process_gone: bool
) -> ConsumerState:
    """See `Registry.probe_failed`."""
    if state.stopped_by is not None and not (
        process_gone and state.stopped_by.method == "checkpoint"  # that one had to go on
    ):
        return replace(state, last_probe=now)
    state = replace(state, healthy=False, last_error=error, last_probe=now, stopped_by=None)
    if not process_gone or state.active:
        return state
    return replace(
        shares.all_unloaded(state, None),
        loaded=False,
        assumed=None,
        unloaded_at=None,
        resident_mib=0,
        on_cpu=(),
        items=(),
        quarantine="",
        leaks=0,
        residency_version=state.residency_version + 1,
    )
