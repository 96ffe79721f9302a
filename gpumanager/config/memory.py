"""The config's rules about the card's memory: how it is taken back, and how a consumer says that it
ran out. The text below a key is its description in docs/config.md and in the JSON Schema."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, StrictBool, StrictStr, model_validator

from gpumanager.config import values
from gpumanager.config.calls import ContainerName, File, Model, Pattern, Seconds, Status, UnitName

_BELONGS = {"scope": "unit", "socket": "container", "start": "signal"}


class EvictionMethod(Model):
    """One eviction method: a way to free the memory that a consumer holds. `evict` lists
    them in the order in which the broker tries them. Each entry has exactly one of `http`,
    `unit`, `container`, `signal` and `checkpoint`; a bare `http` stands for `{http: true}`."""

    http: Literal[True] | None = None
    """Its `unload` call."""
    unit: UnitName | None = None
    """Its systemd unit is stopped, and started again."""
    scope: Literal["user", "system"] = "user"
    """For `unit`: the user's or the system's service manager."""
    container: ContainerName | None = None
    """Its container is stopped, and started again."""
    socket: File | None = None
    """For `container`: the engine's socket; none: the first of Docker's and Podman's usual ones."""
    signal: Literal["TERM", "INT", "QUIT"] | None = None
    """Its process group gets this signal, and KILL after `grace`."""
    start: Annotated[tuple[StrictStr, ...], AfterValidator(values.arguments)] = ()
    """For `signal`: the program, with its arguments, that starts it again; empty: a supervisor
    has to."""
    checkpoint: Literal[True] | None = None
    """The driver moves its memory to the host's, and brings it back."""
    grace: Seconds = 10.0
    """How long it may take to end; for `checkpoint`, how long each step may take."""

    @model_validator(mode="before")
    @classmethod
    def _exactly_one(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        given = value if isinstance(value, Mapping) else {}
        chosen = [name for name in values.METHODS if given.get(name) is not None]
        if len(chosen) != 1:
            raise ValueError(
                f"must be http, or have exactly one of {', '.join(values.METHODS[1:])}"
            )
        for key, method in _BELONGS.items():
            if key in given and chosen != [method]:
                raise ValueError(f"'{key}' belongs to {method}")
        return value

    @property
    def name(self) -> str:
        """`http`, `unit`, `container`, `signal` or `checkpoint`."""
        return next(name for name in values.METHODS if getattr(self, name) is not None)


HTTP = EvictionMethod(http=True)

_OUT_OF_MEMORY = (
    r"(CUDA|HIP|XPU|GPU|VRAM|device)\b.{0,80}\bout of (device )?memory",
    r"\bOutOfMemoryError\b",
    r"out of memory.{0,80}\b(CUDA|HIP|XPU|GPU|VRAM|device)\b",
    r"(Error|ERROR_)Out_?Of_?Device_?Memory",
    r"\b(CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|hipErrorOutOfMemory)\b",
    r"\bCU(BLAS|DNN|SPARSE)_STATUS_ALLOC_FAILED\b",
    r"\b(cuda|hip)Malloc\w* failed",
    r"Allocation on device",
    r"(failed|unable) to allocate (CUDA|ROCm|Vulkan|SYCL|backend) ?\w* ?buffer",
    r"No available memory for the cache blocks",
    r"(not enough|insufficient) (GPU memory|VRAM)\b",
    # These two do not say why a model was not loaded; a lack of memory is the usual reason. The
    # first is of llama.cpp's router (the name may be missing, as it is the request's own word), the
    # second of LocalAI with llama.cpp's backend.
    r"\bmodel name=\s*\S*\s+failed to load\b",
    r"could not load model: rpc error: code = Canceled\b",
)


class OutOfMemory(Model):
    """How a consumer's answer says that the card's memory ran out: it has one of the statuses, and
    one of the patterns matches words of its body that are not in the request. The broker believes
    it unless the card's figures speak against it."""

    status: tuple[Status, ...] = (500, 502, 503, 507)
    """The statuses."""
    patterns: tuple[Pattern, ...] = _OUT_OF_MEMORY
    """They are matched in the body; upper and lower case count as equal."""
    retry: StrictBool = True
    """The broker unloads other consumers and runs the job once more; `false`: it only learns from
    the failure."""

    def said_in(self, body: bytes) -> bool:
        """Whether the text of an answer says so."""
        return any(pattern.search(body) for pattern in self._compiled)

    def found_in(self, body: bytes) -> Iterator[bytes]:
        """The words of it that say so."""
        for pattern in self._compiled:
            for match in pattern.finditer(body):
                yield match[0]

    @cached_property
    def _compiled(self) -> tuple[re.Pattern[bytes], ...]:
        return tuple(re.compile(each.encode(), re.IGNORECASE) for each in self.patterns)
